"""A run that is stopped and resumed, anywhere and in any way, is the run that was never stopped, bit for bit."""

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
from common.errors import UserError
from common.run.checkpoint import kept_weights
from projects.s4gan_mlmt import train
from projects.s4gan_mlmt.config import Config
from tests.runs import (
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

ROUND = 4  # steps


_same_process_settings = pytest.fixture(autouse=True)(give_settings_back)
go = Runs(train.main)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few images of the embedded dataset: 5 labeled, 7 unlabeled, 3 to evaluate."""
    return write_lists(tmp_path_factory.mktemp("split"), 5, 7, 3)


def write(path: Path, split: Path, method: str, **sections: Mapping[str, Any]) -> Path:
    """A configuration of 3 rounds of 4 steps; sections add to it.

    No number of batches divides a round, so the streams of images stand anywhere in their passes.
    """
    val = str(split / "val.txt")
    tree: dict[str, Any] = {
        "data": {"dataset": "shapes", "split": str(split), "val": val, "pipeline": "house", "crop_size": [32, 32],
                 "workers": 0},
        "optim": {"lr": 0.002, "steps": 3 * ROUND, "epochs": 3, "batch_size": 2, "unlabeled_batch_size": 3},
        "model": {"network": "deeplabv2", "layers": [1, 1, 1, 1], "width": 4, "d_width": 4},
        "method": {"name": method, "st_threshold": 0.45},
        "mlmt": {"backbone": "resnet_tiny", "size": 33, "labeled_batch": 2, "unlabeled_batch": 3, "workers": 0,
                 "epochs": 2, "burn_in_epochs": 0, "evaluation_epochs": 1},
        "eval": {"protocol": "whole_image", "during_training": "whole_image", "list": val, "every_epochs": 1},
        "keep": {"every_epochs": 1},
        "run": {"log_interval": 2, "deterministic": True, "channels_last": False, "panels": False, "device": "cpu"},
    }  # fmt: skip
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | dict(values)
    path.write_text(yaml.safe_dump(tree))
    return path


# --- one process -----------------------------------------------------------------------------------------------

SMALL = {"network": "deeplabv3plus", "layers": None, "backbone": "resnet_tiny", "width": 4, "inner_planes": 8,
         "low_planes": 4, "dilations": [1, 2, 3], "d_width": 4}  # fmt: skip
TWO_FORWARDS = {"batch_size": 4, "unlabeled_batch_size": None, "device_batch": 2, "steps": 12, "epochs": 3}
VARIANTS: dict[str, dict[str, Any]] = {
    "sup_only": {"method": "sup_only"},
    "s4gan": {"method": "s4gan"},
    "s4gan, later visits": {"method": "s4gan", "quirks": {"visits": "repeated_1_5"}},
    "s4gan, quirks off, another network, accumulation": {
        "method": "s4gan",
        "model": SMALL,
        "data": {"drop_last": True},
        "optim": TWO_FORWARDS,
        "quirks": {
            "visits": "once",
            "real_range": "own",
            "separate_statistics": False,
            "gate_dropout": False,
        },
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_six_steps_are_three_and_three(name: str, tmp_path: Path, split: Path) -> None:
    """The stop falls into a round, into a log interval and into a pass over the images of every loader."""
    sections = {k: v for k, v in VARIANTS[name].items() if k != "data"}
    config = write(tmp_path / "c.yaml", split, **sections)
    more = [f"data.{k}={str(v).lower()}" for k, v in VARIANTS[name].get("data", {}).items()]
    go(config, tmp_path / "whole", 6, *more)
    go(config, tmp_path / "parts", 3, *more)
    assert saved(tmp_path / "parts")["step"] == 3
    go(config, tmp_path / "parts", 6, *more)
    assert saved(tmp_path / "parts")["step"] == 6
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_the_compared_runs_use_everything(split: Path, tmp_path: Path) -> None:
    """The equality above would be cheap if an optimizer, the gate or dropout were asleep."""
    config = write(tmp_path / "c.yaml", split, "s4gan")
    for steps in (2, 3):
        go(config, tmp_path / f"{steps}", steps)
    two, three = (saved(tmp_path / name) for name in "23")
    for network in ("segmentation", "discriminator"):
        assert differences(two["networks"][network], three["networks"][network])
    assert set(three["optimizers"]) == {"segmentation", "discriminator"}
    assert float(three["optimizers"]["discriminator"]["state"][0]["step"]) == 3
    assert three["optimizers"]["segmentation"]["state"][0]["momentum_buffer"].any()
    assert differences(two["rng"], three["rng"]) == ["/0/torch"]  # dropout
    row = lines(tmp_path / "3")[0]
    assert {"loss_sup", "loss_fm", "loss_st", "loss_d", "kept", "loss", "lr"} <= set(row)
    assert row["loss_st"] > 0
    assert row["kept"] > 0


@pytest.mark.parametrize("method", ["sup_only", "s4gan"])
def test_stops_around_the_end_of_a_round(split: Path, tmp_path: Path, method: str) -> None:
    """After its last step, in its middle, after the first step of the next; to the end, with all that is kept."""
    config = write(tmp_path / "c.yaml", split, method)
    go(config, tmp_path / "whole")
    for steps in (ROUND, ROUND + 1, 2 * ROUND - 1, 3 * ROUND):
        go(config, tmp_path / "parts", steps)
    assert not (tmp_path / "parts" / "result.json").exists()
    go(config, tmp_path / "parts")
    for name in ("last.pt", "best.pt", *(f"weights/step_{n}.pt" for n in (4, 8, 12))):
        assert_same_run(tmp_path / "whole", tmp_path / "parts", name=name)
    assert list(kept_weights(tmp_path / "parts", "step")) == ["step_4", "step_8", "step_12"]
    results = [json.loads((tmp_path / d / "result.json").read_text()) for d in ("whole", "parts")]
    for result in results:
        del result["seconds"], result["peak_memory_bytes"]
    assert results[0] == results[1]


def test_a_run_repeats_itself(split: Path, tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", split, "s4gan")
    for name in "ab":
        go(config, tmp_path / name, 3)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    go(config, tmp_path / "c", 3, "run.seed=3")
    assert lines(tmp_path / "c") != lines(tmp_path / "a")


def test_workers_and_how_often_it_is_saved_do_not_matter(split: Path, tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", split, "s4gan")
    go(config, tmp_path / "none", 5)
    go(config, tmp_path / "some", 3, "data.workers=2", "run.save_interval=1")
    go(config, tmp_path / "some", 5)
    assert_same_run(tmp_path / "none", tmp_path / "some", besides=("/config/data/workers",))


def test_resume_from_another_directory(split: Path, tmp_path: Path) -> None:
    """The best weights come along, for the result tells about those of the whole run."""
    config = write(tmp_path / "c.yaml", split, "s4gan")
    go(config, tmp_path / "whole", 6)
    go(config, tmp_path / "first", 5)
    before = (tmp_path / "first" / "last.pt").read_bytes()
    go(config, tmp_path / "second", 6, f"run.resume={tmp_path / 'first'}")
    assert_same_run(tmp_path / "whole", tmp_path / "second", after=5)
    assert_same_run(tmp_path / "whole", tmp_path / "second", after=5, name="best.pt")
    assert (tmp_path / "first" / "last.pt").read_bytes() == before


# --- both branches ---------------------------------------------------------------------------------------------


def test_both_branches_resume_and_fuse(split: Path, tmp_path: Path) -> None:
    """Stopped in the segmentation branch, at its end, and in the image-level branch."""
    config = write(tmp_path / "c.yaml", split, "s4gan_mlmt", optim={"lr": 0.02})
    go(config, tmp_path / "whole")
    for steps in (5, 3 * ROUND, 3 * ROUND + 1):
        go(config, tmp_path / "parts", steps)
        assert not (tmp_path / "parts" / "result.json").exists()
    assert saved(tmp_path / "parts" / "mlmt")["step"] == 1
    go(config, tmp_path / "parts")
    for folder in ("", "mlmt"):
        assert_same_run(tmp_path / "whole" / folder, tmp_path / "parts" / folder)
    scores = [tmp_path / name / "mlmt" / "output_ema_raw_2.txt" for name in ("whole", "parts")]
    assert scores[0].read_bytes() == scores[1].read_bytes()
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert result["method"] == "s4gan_mlmt"
    assert result["fusion"] == {
        "scores": "mlmt/output_ema_raw_2.txt",
        "mode": "zero_logits",
        "threshold": 0.2,
    }
    assert set(result["unfused"]) >= {"miou", "iou", "miou_last"}
    assert result["miou"] == result["best"]["miou"]
    assert result["unfused"]["miou"] == result["miou"]  # the scores of so few steps switch nothing off
    go(config, tmp_path / "whole", None, "mlmt.keep_threshold=1")
    again = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert again["unfused"] == result["unfused"]
    background, *others = again["best"]["iou"].values()  # the first of classes that are all switched off
    assert not any(others)
    assert background == pytest.approx(again["best"]["pixel_accuracy"])
    assert background < 1
    assert again["miou"] == again["best"]["miou"] != result["miou"]
    assert again["miou_last"] == again["last"]["miou"]


# --- what is kept and measured ---------------------------------------------------------------------------------


def test_the_main_figure_is_that_of_the_named_step(split: Path, tmp_path: Path) -> None:
    """As the authors measure a file from the middle of the schedule; it falls into a round."""
    config = write(tmp_path / "c.yaml", split, "sup_only", keep={"every_epochs": 0})
    go(config, tmp_path / "run", None, "eval.after_steps=5")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["weights"] == "weights/step_5.pt"
    assert list(kept_weights(tmp_path / "run", "step")) == ["step_5"]
    assert saved(tmp_path / "run" / "weights", "step_5.pt")["step"] == 5
    go(config, tmp_path / "short", 5)
    network = saved(tmp_path / "run" / "weights", "step_5.pt")["networks"]["segmentation"]
    assert not differences(network, saved(tmp_path / "short")["networks"]["segmentation"])
    with pytest.raises(UserError, match=r"eval.after_steps=7: .* stands at step 12 and has kept no weights"):
        go(config, tmp_path / "run", None, "eval.after_steps=7")
    with pytest.raises(UserError, match=r"'eval.after_steps' is 13; expected 1 to optim\.steps=12"):
        go(config, tmp_path / "other", None, "eval.after_steps=13")


def test_nothing_is_measured_before_the_end_unless_wanted(split: Path, tmp_path: Path) -> None:
    eval_ = {"protocol": "original", "list": str(split / "val.txt")}
    config = write(tmp_path / "c.yaml", split, "sup_only", eval=eval_ | {"every_epochs": 0})
    go(config, tmp_path / "run")
    assert not any("miou" in line for line in lines(tmp_path / "run"))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["weights"] == "last.pt"
    assert result["miou"] == result["miou_last"]
    assert result["protocol"]["kind"] == "whole_image"


def test_pseudo_labels_are_measured_with_every_evaluation(split: Path, tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", split, "s4gan")
    go(config, tmp_path / "run", 5, "run.pseudo_images=2")
    measured = [line for line in lines(tmp_path / "run") if "pseudo_accuracy_all" in line]
    assert [line["step"] for line in measured] == [4]
    go(config, tmp_path / "none", 5)
    assert not differences(saved(tmp_path / "run")["networks"], saved(tmp_path / "none")["networks"])


# --- what is refused -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, split: Path) -> Path:
    """A run of nine steps (so there are best and kept weights) with its configuration beside it."""
    folder = tmp_path_factory.mktemp("stopped")
    go(write(folder / "c.yaml", split, "s4gan"), folder / "run", 9)
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
        ("optim.lr_d=0.5", "optim.lr_d 0.0001 -> 0.5"),
        ("optim.steps=24", "optim.steps 12 -> 24"),
        ("method.st_threshold=0.7", "method.st_threshold 0.45 -> 0.7"),
        ("method.name=s4gan_mlmt", "method.name 's4gan' -> 's4gan_mlmt'"),
        ("quirks.visits=once", "quirks.visits 'repeated_0_4' -> 'once'"),
        ("data.drop_last=true", "data.drop_last False -> True"),
        ("model.d_width=8", "model.d_width 4 -> 8"),
        ("run.seed=3", "run.seed 2 -> 3"),
    ],
)
def test_other_settings_are_refused_by_name(copied: Path, override: str, words: str) -> None:
    go.refused_by_name(copied, override, words)


@pytest.mark.parametrize(
    "override", ["run.log_interval=1", "eval.every_epochs=2", "keep.every_epochs=2", "mlmt.epochs=9"]
)
def test_settings_that_do_not_change_the_numbers_are_free(copied: Path, override: str) -> None:
    go(copied / "c.yaml", copied / "run", 10, override)
    assert saved(copied / "run")["step"] == 10


def test_weights_alone_cannot_be_resumed(copied: Path, tmp_path: Path) -> None:
    config, weights = copied / "c.yaml", copied / "run" / "weights" / "step_8.pt"
    message = go.refused(config, tmp_path / "new", f"run.resume={weights}")
    assert message.startswith(f"{weights}: holds weights only; set run.init")
    go(config, tmp_path / "new", 1, f"run.init={weights}")


def test_supervised_weights_start_a_run_whose_discriminator_is_new(split: Path, tmp_path: Path) -> None:
    sup = write(tmp_path / "sup.yaml", split, "sup_only")
    go(sup, tmp_path / "sup", 2)
    config, init = write(tmp_path / "c.yaml", split, "s4gan"), f"run.init={tmp_path / 'sup' / 'last.pt'}"
    go(config, tmp_path / "run", 1, init, "optim.lr=1e-12")
    key = "layer5.conv2d_list.0.weight"
    first, second = (saved(tmp_path / name)["networks"]["segmentation"][key] for name in ("run", "sup"))
    torch.testing.assert_close(first, second)


def test_another_number_of_processes_is_refused(copied: Path) -> None:
    cfg = load_config(Config, copied / "c.yaml")
    run = train.set_up(cfg, Dist())
    run.data.close()
    two_processes_are_refused(run, saved(copied / "run"))


def test_a_finished_run_is_only_evaluated_again(copied: Path) -> None:
    go.only_evaluated_again(copied, 12)


# --- two processes ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(split: Path, tmp_path: Path) -> None:
    """Six steps and three plus three; every process has dropout and BatchNorm statistics of its own."""
    batch = {"optim": {"lr": 0.002, "steps": 12, "epochs": 3, "batch_size": 4, "unlabeled_batch_size": 6}}
    configs = {name: write(tmp_path / f"{name}.yaml", split, name, **batch) for name in ("sup_only", "s4gan")}

    def words(name: str, run: str, steps: int) -> str:
        parts = ["--config", str(configs[name]), f"run.dir={tmp_path / name / run}", f"run.max_steps={steps}"]
        return "|".join(parts)

    plan = (("whole", 6), ("parts", 3), ("parts", 6))
    runs = [words(name, run, steps) for name in configs for run, steps in plan]
    ports = " ".join(str(free_port()) for _ in runs)
    launch_script(tmp_path, SEVERAL_RUNS, *runs, TEST_PROGRAM="projects.s4gan_mlmt.train", TEST_PORTS=ports)
    for name in configs:
        state = saved(tmp_path / name / "whole")
        assert len(state["rng"]) == 2
        assert "/torch" in differences(*state["rng"])  # not the same dropout on both
        assert saved(tmp_path / name / "parts")["step"] == 6
        assert_same_run(tmp_path / name / "whole", tmp_path / name / "parts")
