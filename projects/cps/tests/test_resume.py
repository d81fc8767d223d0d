"""A run that is stopped and resumed, anywhere and in any way, is the run that was never stopped, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import load_config
from common.distributed import Dist
from common.run.checkpoint import kept_weights
from projects.cps import train
from projects.cps.config import Config
from projects.cps.tests.toys import METHODS, write
from tests.runs import (
    NOT_OF_THE_RUN,
    SEVERAL_RUNS,
    Runs,
    assert_same_run,
    differences,
    give_settings_back,
    launch_script,
    lines,
    saved,
    two_processes_are_refused,
    write_lists,
)
from tools.ports import free_port

BOUNDARY = 4  # steps of an epoch


_same_process_settings = pytest.fixture(autouse=True)(give_settings_back)
go = Runs(train.main)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few images of the embedded dataset: 3 labeled, 8 unlabeled, 4 to evaluate."""
    return write_lists(tmp_path_factory.mktemp("split"), 3, 8)


# --- one process -----------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in METHODS},
    "cps, accumulation, adam": {
        "method": "cps",
        "optim": {"batch_size": 4, "device_batch": 2, "optimizer": "adam", "lr": 0.001, "epochs": 3},
    },
    "cps_cutmix, all quirks off": {
        "method": "cps_cutmix",
        "quirks": {
            "unlabeled_pairing": "independent", "fixed_unlabeled_order": False, "train_mode_labels": False,
            "separate_statistics": False, "inclusive_crop": False,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_six_steps_are_three_and_three(name: str, tmp_path: Path, split: Path) -> None:
    """The stop falls into an epoch and into a log interval."""
    config = write(tmp_path / "c.yaml", split, **VARIANTS[name])
    go(config, tmp_path / "whole", 6)
    go(config, tmp_path / "parts", 3)
    assert saved(tmp_path / "parts")["step"] == 3
    go(config, tmp_path / "parts", 6)
    assert saved(tmp_path / "parts")["step"] == 6
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_the_compared_runs_use_everything(split: Path, tmp_path: Path) -> None:
    """The equality above would be cheap if draws, teacher or detector were asleep."""
    states = {}
    for method in ("cps_cutmix", "mean_teacher", "cct", "gct"):
        config = write(tmp_path / f"{method}.yaml", split, method)
        for steps in (2, 3):
            go(config, tmp_path / f"{method}{steps}", steps)
        states[method] = [saved(tmp_path / f"{method}{steps}") for steps in (2, 3)]
    for method in ("cps_cutmix", "cct"):
        assert differences(states[method][0]["draws"], states[method][1]["draws"])
    for method, name in (("mean_teacher", "branch2"), ("cct", "auxiliary"), ("gct", "detector")):
        assert differences(states[method][0]["networks"][name], states[method][1]["networks"][name])
    assert set(states["gct"][1]["optimizers"]) == {"branch1", "branch2", "detector"}
    assert float(states["gct"][1]["optimizers"]["detector"]["state"][0]["step"]) == 3
    for state in (states["cps_cutmix"][1], states["gct"][1]):
        momentum = state["optimizers"]["branch2"]["state"][0]["momentum_buffer"]
        assert momentum.any()


@pytest.mark.parametrize("method", ["cps_cutmix", "gct"])
def test_stops_around_the_end_of_an_epoch(split: Path, tmp_path: Path, method: str) -> None:
    """After its last step, in its middle, after the first step of the next; to the end, with all that is kept."""
    config = write(tmp_path / "c.yaml", split, method)
    go(config, tmp_path / "whole")
    for steps in (BOUNDARY, BOUNDARY + 1, 2 * BOUNDARY - 1, 3 * BOUNDARY):
        go(config, tmp_path / "parts", steps)
    assert not (tmp_path / "parts" / "result.json").exists()
    go(config, tmp_path / "parts")
    for name in ("last.pt", "best.pt", *(f"weights/epoch_{n}.pt" for n in (1, 2, 3))):
        assert_same_run(tmp_path / "whole", tmp_path / "parts", name=name)
    assert list(kept_weights(tmp_path / "parts", "epoch")) == ["epoch_1", "epoch_2", "epoch_3"]
    results = [json.loads((tmp_path / d / "result.json").read_text()) for d in ("whole", "parts")]
    for result in results:
        del result["seconds"], result["peak_memory_bytes"]
    assert results[0] == results[1]


def test_a_run_repeats_itself(split: Path, tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", split, "cps_cutmix")
    for name in "ab":
        go(config, tmp_path / name, 3)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    go(config, tmp_path / "c", 3, "run.seed=3")
    assert lines(tmp_path / "c") != lines(tmp_path / "a")


@pytest.mark.parametrize("method", ["cps_cutmix", "mean_teacher", "cct", "gct"])
def test_measuring_pseudo_labels_changes_nothing_else(split: Path, tmp_path: Path, method: str) -> None:
    """Nor does a stop in between; the figures are the same then too."""
    config = write(tmp_path / "c.yaml", split, method)
    measure = "run.pseudo_images=4"
    go(config, tmp_path / "plain", 9)
    go(config, tmp_path / "whole", 9, measure)
    go(config, tmp_path / "parts", 5, measure)
    go(config, tmp_path / "parts", 9, measure)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    found = lines(tmp_path / "whole")
    figures = [line for line in found if "pseudo_kept" in line]
    assert [line["step"] for line in figures] == [4, 8]
    assert [line for line in found if line not in figures] == lines(tmp_path / "plain")
    found = differences(saved(tmp_path / "plain"), saved(tmp_path / "whole"))
    assert not [path for path in found if not path.startswith(NOT_OF_THE_RUN)]


def test_images_that_are_never_used_are_in_the_log(split: Path, tmp_path: Path) -> None:
    go(write(tmp_path / "c.yaml", split, "cps"), tmp_path / "run", 1, "data.epoch_images=6")
    log = (tmp_path / "run" / "train.log").read_text()
    assert "data.epoch_images=6: the other 2 unlabeled images are never used" in log


def test_the_number_of_workers_does_not_matter(split: Path, tmp_path: Path) -> None:
    """Neither from the start nor for the rest of a run."""
    config = write(tmp_path / "c.yaml", split, "cps_cutmix")
    go(config, tmp_path / "none", 5)
    go(config, tmp_path / "some", 3, "data.workers=2")
    go(config, tmp_path / "some", 5)
    assert_same_run(tmp_path / "none", tmp_path / "some", besides=("/config/data/workers",))


def test_resume_from_another_directory(split: Path, tmp_path: Path) -> None:
    """The best weights come along, for the result tells about those of the whole run."""
    config = write(tmp_path / "c.yaml", split, "cps")
    go(config, tmp_path / "whole", 6)
    go(config, tmp_path / "first", 5)
    before = (tmp_path / "first" / "last.pt").read_bytes()
    go(config, tmp_path / "second", 6, f"run.resume={tmp_path / 'first'}")
    assert_same_run(tmp_path / "whole", tmp_path / "second", after=5)
    assert_same_run(tmp_path / "whole", tmp_path / "second", after=5, name="best.pt")
    assert (tmp_path / "first" / "last.pt").read_bytes() == before


# --- what is kept ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "epochs"),
    [
        ({"every_epochs": 0}, []),
        ({"every_epochs": 1, "after_epoch": 1}, [2, 3]),
        ({"every_epochs": 2}, [2, 3]),  # and the last
        ({"every_epochs": 1, "newest": 1}, [3]),
    ],
    ids=str,
)
def test_which_weights_are_kept(split: Path, tmp_path: Path, keep: dict[str, int], epochs: list[int]) -> None:
    eval_ = {"protocol": "whole_image", "during_training": "whole_image", "list": str(split / "val.txt")}
    config = write(tmp_path / "c.yaml", split, "sup_only", keep=keep, eval=eval_ | {"every_epochs": 0})
    go(config, tmp_path / "run", 9)
    go(config, tmp_path / "run")
    assert list(kept_weights(tmp_path / "run", "epoch")) == [f"epoch_{n}" for n in epochs]
    for n, path in zip(epochs, kept_weights(tmp_path / "run", "epoch").values(), strict=True):
        assert saved(path.parent, path.name)["step"] == BOUNDARY * n


# --- what is refused -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, split: Path) -> Path:
    """A run of nine steps (so there are best and kept weights) with its configuration beside it."""
    folder = tmp_path_factory.mktemp("stopped")
    go(write(folder / "c.yaml", split, "cps_cutmix"), folder / "run", 9)
    assert (folder / "run" / "best.pt").is_file()
    return folder


@pytest.fixture
def copied(stopped: Path, tmp_path: Path) -> Path:
    shutil.copytree(stopped, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lr=0.5", "optim.lr 0.02 -> 0.5"),
        ("method.cps_weight=1", "method.cps_weight 1.5 -> 1.0"),
        ("method.name=cps", "method.name 'cps_cutmix' -> 'cps'"),
        ("quirks.train_mode_labels=false", "quirks.train_mode_labels True -> False"),
        ("data.epoch_images=9", "data.epoch_images None -> 9"),
        ("model.width=8", "model.width 4 -> 8"),
        ("run.seed=3", "run.seed 2 -> 3"),
    ],
)
def test_other_settings_are_refused_by_name(copied: Path, override: str, words: str) -> None:
    go.refused_by_name(copied, override, words)


@pytest.mark.parametrize(
    "override",
    [
        "run.log_interval=1",
        "run.save_interval=2",
        "eval.every_epochs=2",
        "eval.network=mean",
        "keep.newest=1",
    ],
)
def test_settings_that_do_not_change_the_numbers_are_free(copied: Path, override: str) -> None:
    go(copied / "c.yaml", copied / "run", 10, override)
    assert saved(copied / "run")["step"] == 10


def test_weights_alone_cannot_be_resumed(copied: Path, tmp_path: Path) -> None:
    config, weights = copied / "c.yaml", copied / "run" / "weights" / "epoch_2.pt"
    message = go.refused(config, tmp_path / "new", f"run.resume={weights}")
    assert message.startswith(f"{weights}: holds weights only; set run.init")
    go(config, tmp_path / "new", 1, f"run.init={weights}")


def test_one_network_starts_both(copied: Path, split: Path, tmp_path: Path) -> None:
    """`run.init` with supervised-only weights: the second network begins as the first."""
    sup = write(tmp_path / "sup.yaml", split, "sup_only")
    go(sup, tmp_path / "sup", 2)
    go(copied / "c.yaml", tmp_path / "both", 1, f"run.init={tmp_path / 'sup' / 'last.pt'}", "optim.lr=1e-12")
    first, second = (
        saved(tmp_path / "both")["networks"][name]["classifier.weight"] for name in ("branch1", "branch2")
    )
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first, saved(tmp_path / "sup")["networks"]["branch1"]["classifier.weight"])


def test_another_number_of_processes_is_refused(copied: Path) -> None:
    cfg = load_config(Config, copied / "c.yaml")
    two_processes_are_refused(train.set_up(cfg, Dist()), saved(copied / "run"))


def test_a_finished_run_is_only_evaluated_again(copied: Path) -> None:
    go.only_evaluated_again(copied, 12)


# --- two processes ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(split: Path, tmp_path: Path) -> None:
    """Six steps and three plus three; every process has draws and, on CPUs, BatchNorm statistics of its own."""
    batch = {"optim": {"lr": 0.02, "epochs": 4, "batch_size": 4}}  # two steps an epoch
    configs = {name: write(tmp_path / f"{name}.yaml", split, name, **batch) for name in ("cps_cutmix", "cct")}

    def words(name: str, run: str, steps: int) -> str:
        parts = ["--config", str(configs[name]), f"run.dir={tmp_path / name / run}", f"run.max_steps={steps}"]
        return "|".join(parts)

    plan = (("whole", 6), ("parts", 3), ("parts", 6))
    runs = [words(name, run, steps) for name in configs for run, steps in plan]
    ports = " ".join(str(free_port()) for _ in runs)
    launch_script(tmp_path, SEVERAL_RUNS, *runs, TEST_PROGRAM="projects.cps.train", TEST_PORTS=ports)
    for name in configs:
        state = saved(tmp_path / name / "whole")
        assert len(state["rng"]) == len(state["draws"]) == 2
        assert differences(*state["draws"])  # not the same masks, places and noise on both
        assert saved(tmp_path / name / "parts")["step"] == 6
        assert_same_run(tmp_path / name / "whole", tmp_path / name / "parts")
