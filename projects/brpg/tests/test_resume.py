"""A run that is stopped and resumed, in any phase, is the run that was never stopped, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from common.config import load_config
from common.distributed import Dist
from projects.brpg import train
from projects.brpg.config import Config
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

# epochs of two steps: supervised 1-2, mean teacher 3-4, collection 5-6, prototypes from step 7 on
SEMI, COLLECT, PROTOTYPES, END = 2, 4, 6, 10


_same_process_settings = pytest.fixture(autouse=True)(give_settings_back)
go = Runs(train.main)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few images of the embedded dataset: 3 labeled, 8 unlabeled, 4 to evaluate."""
    return write_lists(tmp_path_factory.mktemp("split"), 3, 8)


def write(path: Path, split: Path, **sections: Mapping[str, Any]) -> Path:
    """A configuration of 5 epochs of 2 steps; sections add to it."""
    val = str(split / "val.txt")
    tree: dict[str, Any] = {
        "data": {"dataset": "shapes", "split": str(split), "val": val, "crop_size": [33, 33], "workers": 0},
        "optim": {"lr": 0.002, "head_lr_factor": 10.0, "epochs": 5, "batch_size": 4},
        "model": {"backbone": "resnet_tiny", "width": 4, "inner_planes": 8, "dilations": [1, 2, 3],
                  "multi_grid": [1, 1, 1]},
        "method": {"collect_start": 2, "high_threshold": 0.25, "pseudo_threshold": 0.25, "unsup_points": 30,
                   "pseudo_threshold_end": 0.3, "queue_size": 50, "sample_per_image": 40, "grid_steps": 4,
                   "scarce_classes": "fewer"},
        "eval": {"during_training": "whole_image", "list": val, "every_epochs": 2},
        "run": {"log_interval": 3, "deterministic": True, "channels_last": False, "panels": False, "device": "cpu"},
    }  # fmt: skip
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | dict(values)
    path.write_text(yaml.safe_dump(tree))
    return path


# --- one process -----------------------------------------------------------------------------------------------

CONTRAST = {"contra_weight": 0.5, "low_rank": 1, "num_queries": 8, "num_negatives": 4, "contra_queue": 40,
            "contra_queue_first": 60, "current_class_threshold": 0.1, "low_entropy_threshold": 60.0}  # fmt: skip
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "published": {},
    "everything optional": {
        "model": {"aux_weight": 0.4},
        "method": {"threshold_type": "csp", "thre_min": 0.2, "thre_max": 0.3, "class_balanced": True,
                   "prototype_kind": "prob", "copy_paste": True, "strong_augmentation": "classmix", **CONTRAST},
        "eval": {"every_steps": 3},
    },
    "scarce classes, accumulation, adam": {
        "optim": {"device_batch": 2, "optimizer": "adam", "lr": 0.001},
        "method": {"scarce_queue": True, "queue_dtype": "float16", "collect_start": 1, "collect_epochs": 2,
                   "average_from_start": True},
        "quirks": {"own_teacher_statistics": False},
    },
    "one queue, cutout": {"method": {"prototype_kind": "random", "strong_augmentation": "cutout"}},
    "without prototypes": {"method": {"prototypes": False}},
}  # fmt: skip


@pytest.fixture(scope="module", params=VARIANTS)
def whole(request, tmp_path_factory: pytest.TempPathFactory, split: Path) -> Path:
    """A folder with a configuration and the run of nine steps that never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    go(write(folder / "c.yaml", split, **VARIANTS[request.param]), folder / "run", 9)
    return folder


@pytest.mark.parametrize(
    "stop",
    [SEMI + 1, COLLECT, COLLECT + 1, PROTOTYPES, PROTOTYPES + 1],
    ids=lambda step: f"after step {step}",
)
def test_a_stop_in_any_phase_changes_nothing(whole: Path, tmp_path: Path, stop: int) -> None:
    """The clustering itself comes after the stop at step 6, and before the one at step 7."""
    go(whole / "c.yaml", tmp_path / "parts", stop)
    state = saved(tmp_path / "parts")
    assert state["step"] == stop
    queues = any(key.startswith("memory.") for key in state["method"])
    assert queues is (stop <= PROTOTYPES and load_config(Config, whole / "c.yaml").method.prototypes)
    go(whole / "c.yaml", tmp_path / "parts", 9)
    assert_same_run(whole / "run", tmp_path / "parts")


def test_the_compared_runs_use_everything(split: Path, tmp_path: Path) -> None:
    """The equality above would be cheap if queues, prototypes, draws or the contrast were asleep."""
    config = write(tmp_path / "c.yaml", split, **VARIANTS["everything optional"])
    states = {}
    for steps in (COLLECT, PROTOTYPES, PROTOTYPES + 1, 9):
        go(config, tmp_path / "run", steps)
        states[steps] = saved(tmp_path / "run")
    written = [states[steps]["method"]["memory.high.written"].sum() for steps in (COLLECT, PROTOTYPES)]
    assert written[0] == 0 < written[1]
    assert differences(states[PROTOTYPES + 1]["centres"], states[9]["centres"])
    assert differences(states[COLLECT]["draws"], states[PROTOTYPES]["draws"])
    assert states[9]["method"]["negatives.written"].any()
    assert states[9]["method"]["paste_confidence.value"].any()
    assert differences(states[9]["networks"]["student"], states[9]["networks"]["teacher"])
    late = [line for line in lines(tmp_path / "run") if line["step"] == 9 and "loss" in line]
    assert all(late[0][key] > 0 for key in ("loss_unsup", "loss_proto", "loss_contra"))
    assert {line["step"] for line in lines(tmp_path / "run") if "miou" in line} == {4, 7, 8}


def test_stopping_after_every_step_to_the_end(split: Path, tmp_path: Path) -> None:
    """All ten steps one by one, evaluations and the result included."""
    config = write(tmp_path / "c.yaml", split)
    go(config, tmp_path / "whole")
    for steps in range(1, END + 1):
        go(config, tmp_path / "parts", steps)
    assert not (tmp_path / "parts" / "result.json").exists()
    go(config, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", name="best.pt")
    results = [json.loads((tmp_path / d / "result.json").read_text()) for d in ("whole", "parts")]
    for result in results:
        del result["seconds"], result["peak_memory_bytes"]
    assert results[0] == results[1]


def test_supervised_only_goes_on_too(split: Path, tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", split, method={"mode": "sup_only", "sup_only_order": "sampled"},
                   optim={"lr": 0.002, "epochs": 6, "batch_size": 2})  # fmt: skip
    go(config, tmp_path / "whole", 6)
    go(config, tmp_path / "parts", 3)
    assert saved(tmp_path / "parts")["method"] is None
    go(config, tmp_path / "parts", 6)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_run_repeats_itself(split: Path, tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", split)
    for name in "ab":
        go(config, tmp_path / name, 8)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    go(config, tmp_path / "c", 8, "run.seed=3")
    assert lines(tmp_path / "c") != lines(tmp_path / "a")


def test_measuring_pseudo_labels_changes_nothing_else(split: Path, tmp_path: Path) -> None:
    """Nor does a stop in between; the figures are the same then too."""
    config = write(tmp_path / "c.yaml", split, eval={"every_steps": 3})
    measure = "run.pseudo_images=4"
    go(config, tmp_path / "plain", 9)
    go(config, tmp_path / "whole", 9, measure)
    go(config, tmp_path / "parts", 5, measure)
    go(config, tmp_path / "parts", 9, measure)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    found = lines(tmp_path / "whole")
    figures = [line for line in found if "pseudo_kept" in line]
    assert [line["step"] for line in figures] == [4, 4, 7, 8]  # within epochs, and between them
    assert [line for line in found if line not in figures] == lines(tmp_path / "plain")
    found = differences(saved(tmp_path / "plain"), saved(tmp_path / "whole"))
    assert not [path for path in found if not path.startswith(NOT_OF_THE_RUN)]


def test_the_number_of_workers_does_not_matter(split: Path, tmp_path: Path) -> None:
    """Neither from the start nor for the rest of a run."""
    config = write(tmp_path / "c.yaml", split)
    go(config, tmp_path / "none", 5)
    go(config, tmp_path / "some", 3, "data.workers=2")
    go(config, tmp_path / "some", 5)
    assert_same_run(tmp_path / "none", tmp_path / "some", besides=("/config/data/workers",))


def test_resume_from_another_directory(split: Path, tmp_path: Path) -> None:
    """The best weights come along, for the result tells about those of the whole run."""
    config = write(tmp_path / "c.yaml", split)
    go(config, tmp_path / "whole", 7)
    go(config, tmp_path / "first", 5)
    before = (tmp_path / "first" / "last.pt").read_bytes()
    go(config, tmp_path / "second", 7, f"run.resume={tmp_path / 'first'}")
    assert_same_run(tmp_path / "whole", tmp_path / "second", after=5)
    assert_same_run(tmp_path / "whole", tmp_path / "second", after=5, name="best.pt")
    assert (tmp_path / "first" / "last.pt").read_bytes() == before


# --- what is refused -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, split: Path) -> Path:
    """A run of seven steps (so there are prototypes and a best teacher) with its configuration beside it."""
    folder = tmp_path_factory.mktemp("stopped")
    go(write(folder / "c.yaml", split), folder / "run", 7)
    assert (folder / "run" / "best.pt").is_file()
    return folder


@pytest.fixture
def copied(stopped: Path, tmp_path: Path) -> Path:
    shutil.copytree(stopped, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lr=0.5", "optim.lr 0.002 -> 0.5"),
        ("method.temperature=0.7", "method.temperature 0.1 -> 0.7"),
        ("method.prototypes=false", "method.prototypes True -> False"),
        ("method.collect_confidence=high", "method.collect_confidence 'both' -> 'high'"),
        ("quirks.own_prototypes=false", "quirks.own_prototypes True -> False"),
        ("model.width=8", "model.width 4 -> 8"),
        ("run.seed=3", "run.seed 2 -> 3"),
    ],
)
def test_other_settings_are_refused_by_name(copied: Path, override: str, words: str) -> None:
    go.refused_by_name(copied, override, words)


@pytest.mark.parametrize("override", ["run.log_interval=1", "eval.every_epochs=1", "eval.every_steps=1"])
def test_settings_that_do_not_change_the_numbers_are_free(copied: Path, override: str) -> None:
    go(copied / "c.yaml", copied / "run", 8, override)
    assert saved(copied / "run")["step"] == 8


def test_weights_alone_cannot_be_resumed(copied: Path, tmp_path: Path) -> None:
    config, weights = copied / "c.yaml", copied / "run" / "best.pt"
    message = go.refused(config, tmp_path / "new", f"run.resume={weights}")
    assert message.startswith(f"{weights}: holds weights only; set run.init")
    go(config, tmp_path / "new", 1, f"run.init={weights}")


def test_foreign_files_are_refused(copied: Path, tmp_path: Path) -> None:
    path = tmp_path / "foreign.pt"
    torch.save({"project": "u2pl", "config": {}, "optimizer": {}}, path)
    for key in ("run.resume", "run.init"):
        assert go.refused(copied / "c.yaml", tmp_path / "new", f"{key}={path}").startswith(f"{path}: ")


def test_another_number_of_processes_is_refused(copied: Path) -> None:
    cfg = load_config(Config, copied / "c.yaml")
    two_processes_are_refused(train.set_up(cfg, Dist()), saved(copied / "run"))


def test_a_finished_run_is_only_evaluated_again(copied: Path) -> None:
    go.only_evaluated_again(copied, END)


# --- two processes ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(split: Path, tmp_path: Path) -> None:
    """Nine steps, and stops during the collection, before the clustering and after it."""
    names = {"own": {}, "shared": {"quirks": {"own_prototypes": False}}}
    configs = {name: write(tmp_path / f"{name}.yaml", split, **names[name]) for name in names}

    def words(name: str, run: str, steps: int) -> str:
        parts = ["--config", str(configs[name]), f"run.dir={tmp_path / name / run}", f"run.max_steps={steps}"]
        return "|".join(parts)

    plan = (("whole", 9), ("parts", 5), ("parts", PROTOTYPES), ("parts", PROTOTYPES + 1), ("parts", 9))
    runs = [words(name, run, steps) for name in configs for run, steps in plan]
    ports = " ".join(str(free_port()) for _ in runs)
    launch_script(tmp_path, SEVERAL_RUNS, *runs, TEST_PROGRAM="projects.brpg.train", TEST_PORTS=ports)
    for name in configs:
        state = saved(tmp_path / name / "whole")
        assert len(state["rng"]) == len(state["draws"]) == 2
        assert differences(state["draws"][0]["torch"], state["draws"][1]["torch"])
        assert not differences(state["draws"][0]["numpy_keys"], state["draws"][1]["numpy_keys"])
        assert state["centres"][0].any()
        # one clustering for all; afterwards QUIRK quirks.own_prototypes
        assert bool(differences(*state["centres"])) is (name == "own")
        assert_same_run(tmp_path / name / "whole", tmp_path / name / "parts")
