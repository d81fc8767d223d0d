"""The real shell scripts: train, stop, resume, evaluate, predict; one process, two, torchrun, Slurm's environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from projects.u2pl import train
from tests import smoke
from tests.runs import Commands, result

run = Commands("u2pl")
CONFIGS = run.folder / "configs"

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smoke.trained(tmp_path_factory, "u2pl")


def test_train_stop_resume_evaluate_predict(whole: Path, tmp_path: Path) -> None:
    """The whole documented way, from another working directory."""
    smoke.whole_way(Commands("u2pl", SSS_DEVICE="cpu"), whole, tmp_path, stop=4)


def test_logged_keys_are_those_of_the_readme(whole: Path) -> None:
    assert smoke.logged(whole) == set(smoke.explained(run.folder))


@pytest.mark.parametrize(("name", "method"), [("smoke_sup", "sup_only"), ("smoke_ael", "u2pl_ael")])
def test_the_other_methods(tmp_path: Path, name: str, method: str) -> None:
    assert train.main(["--config", str(CONFIGS / f"{name}.yaml"), f"run.dir={tmp_path / 'run'}"]) == 0
    assert result(tmp_path / "run")["method"] == method


def test_dry_run_forecasts_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smoke.dry_run(train.main, CONFIGS / "smoke.yaml", tmp_path, capsys)


@pytest.mark.slow
def test_two_processes_go_the_whole_way(tmp_path: Path) -> None:
    smoke.whole_way_of_two(run, tmp_path, stop=4)


@pytest.mark.slow
def test_ael_variant(tmp_path: Path) -> None:
    """Trained, stopped before the contrast, resumed and evaluated by the scripts; two processes."""
    whole, parts, how = (
        tmp_path / "whole",
        tmp_path / "parts",
        {"processes": "2", "config": "configs/smoke_ael.yaml"},
    )
    smoke.train(run, whole, **how)
    smoke.stop_and_resume(run, parts, 2, **how)
    smoke.assert_same_end(parts, whole)
    assert result(parts)["method"] == "u2pl_ael"
    smoke.evaluate(run, parts)


@pytest.mark.slow
def test_the_same_losses_however_it_is_launched(tmp_path: Path) -> None:
    smoke.every_launcher(run, tmp_path)
