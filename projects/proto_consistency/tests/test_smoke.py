"""The real shell scripts: train, stop, resume, evaluate, predict; one process, two, torchrun, Slurm's environment."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from projects.proto_consistency import train
from tests import smoke
from tests.runs import Commands, lines, result

run = Commands("proto_consistency")
CONFIGS = run.folder / "configs"
CONFIG = str(CONFIGS / "smoke.yaml")

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smoke.trained(tmp_path_factory, "proto_consistency")


def assert_both_heads_are_shown(parts: Path) -> None:
    """By `eval.sh`; the published tensor is that of the first process, also where each has its own."""
    found = result(parts)
    out = smoke.evaluate(run, parts)
    assert f"{100 * found['proto_last']['miou']:.2f}" in out
    both = json.loads((parts / "eval_whole_image_few_teacher_proto.json").read_text())
    assert both["last"]["iou"] == found["proto_last"]["iou"]


def test_train_stop_resume_evaluate_predict(whole: Path, tmp_path: Path) -> None:
    """The whole documented way, from another working directory; the stop is before the clustering."""
    ours = Commands("proto_consistency", SSS_DEVICE="cpu")
    assert_both_heads_are_shown(smoke.whole_way(ours, whole, tmp_path, stop=2))


def test_logged_keys_are_those_of_the_readme(whole: Path) -> None:
    left_out = {"pseudo_accuracy"}  # where nothing is kept
    assert smoke.logged(whole) - left_out == set(smoke.explained(run.folder)) - left_out


def test_stage_before_cluster_train(tmp_path: Path) -> None:
    """The documented three commands of a published setting, on the embedded dataset."""
    stage, file, main = tmp_path / "stage", tmp_path / "prototypes.npz", tmp_path / "main"
    assert train.main(["--config", str(CONFIGS / "smoke_sup.yaml"), f"run.dir={stage}"]) == 0
    assert result(stage)["method"] == "sup_only"
    program = [sys.executable, "cluster.py", "--config", "configs/smoke.yaml", "--out", str(file)]
    run(*program, "--checkpoint", str(stage / "best.pt"))
    chosen = ["method.proto.source=file", f"method.proto.init_path={file}"]
    out = smoke.train(run, main, "run.max_steps=2", *chosen)
    assert str(file) in out
    assert all(row["loss_proto_sup"] > 0 for row in lines(main) if "loss" in row)  # from the first step on


def test_mean_teacher(tmp_path: Path) -> None:
    settings = ["method.proto=null", "eval.head=linear", "run.panels=false"]
    assert train.main(["--config", CONFIG, f"run.dir={tmp_path / 'run'}", *settings]) == 0
    assert result(tmp_path / "run")["method"] == "mean_teacher"
    assert "prototype_usage" not in result(tmp_path / "run")


@pytest.mark.parametrize("source", ["warmup_end", "file"])
def test_dry_run_forecasts_and_leaves_nothing(
    tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without prototypes: they are not made yet in the one case, and are not there in the other."""
    smoke.dry_run(train.main, Path(CONFIG), tmp_path, capsys, f"method.proto.source={source}")


@pytest.mark.slow
def test_two_processes_go_the_whole_way(tmp_path: Path) -> None:
    assert_both_heads_are_shown(smoke.whole_way_of_two(run, tmp_path, stop=2))


@pytest.mark.slow
def test_the_same_losses_however_it_is_launched(tmp_path: Path) -> None:
    smoke.every_launcher(run, tmp_path)
