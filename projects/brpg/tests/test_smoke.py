"""The real shell scripts: train, stop, resume, evaluate, predict; one process, two, torchrun, Slurm's environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from projects.brpg import train
from tests import smoke
from tests.runs import Commands, result

run = Commands("brpg")
CONFIGS = run.folder / "configs"
OF_OPTIONS = {"collected_scarce", "collected_random", "loss_contra"}  # off in the smoke settings

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smoke.trained(tmp_path_factory, "brpg")


def test_train_stop_resume_evaluate_predict(whole: Path, tmp_path: Path) -> None:
    """The whole documented way, from another working directory; the stop is within the collection."""
    smoke.whole_way(Commands("brpg", SSS_DEVICE="cpu"), whole, tmp_path, stop=3)


def test_logged_keys_are_those_of_the_readme(whole: Path) -> None:
    explained = set(smoke.explained(run.folder))
    assert smoke.logged(whole) == explained - OF_OPTIONS
    assert explained >= OF_OPTIONS


def test_supervised_only_twin(tmp_path: Path) -> None:
    assert train.main(["--config", str(CONFIGS / "smoke_sup.yaml"), f"run.dir={tmp_path / 'run'}"]) == 0
    assert result(tmp_path / "run")["method"] == "sup_only"


def test_dry_run_forecasts_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smoke.dry_run(train.main, CONFIGS / "smoke.yaml", tmp_path, capsys)


@pytest.mark.slow
def test_two_processes_go_the_whole_way(tmp_path: Path) -> None:
    smoke.whole_way_of_two(run, tmp_path, stop=3)


@pytest.mark.slow
def test_the_same_losses_however_it_is_launched(tmp_path: Path) -> None:
    smoke.every_launcher(run, tmp_path)
