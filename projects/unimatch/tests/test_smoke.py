"""The real shell scripts: train, stop, resume, evaluate, predict; one process, two, torchrun, Slurm's environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from projects.unimatch import train
from tests import smoke
from tests.runs import Commands, result

run = Commands("unimatch")
CONFIGS = run.folder / "configs"

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smoke.trained(tmp_path_factory, "unimatch")


def test_train_stop_resume_evaluate_predict(whole: Path, tmp_path: Path) -> None:
    """The whole documented way, from another working directory."""
    smoke.whole_way(Commands("unimatch", SSS_DEVICE="cpu"), whole, tmp_path, stop=4)


VARIANTS = {
    "smoke_v2": ("unimatch_v2", "teacher"),
    "smoke_fixmatch": ("fixmatch", "student"),
    "smoke_fixmatch_v2": ("fixmatch_v2", "teacher"),
    "smoke_sup": ("sup_only", "student"),
}


def test_logged_keys_of_all_variants_are_those_of_the_readme(whole: Path, tmp_path: Path) -> None:
    found = smoke.logged(whole)
    for name, (method, network) in VARIANTS.items():
        folder = tmp_path / name
        words = [f"run.dir={folder}", "run.panels=false", "run.device=cpu"]
        assert train.main(["--config", str(CONFIGS / f"{name}.yaml"), *words]) == 0
        assert (result(folder)["method"], result(folder)["network"]) == (method, network)
        found |= smoke.logged(folder)
    assert found == set(smoke.explained(run.folder))


def test_dry_run_forecasts_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smoke.dry_run(train.main, CONFIGS / "smoke.yaml", tmp_path, capsys)


@pytest.mark.slow
def test_two_processes_go_the_whole_way(tmp_path: Path) -> None:
    smoke.whole_way_of_two(run, tmp_path, stop=4)


@pytest.mark.slow
def test_v2_goes_the_whole_way(tmp_path: Path) -> None:
    """Also by the teacher's weights, and photos whose sides are no multiples of 14; two processes."""
    how = {"processes": "2", "config": "configs/smoke_v2.yaml"}
    smoke.train(run, tmp_path / "whole", **how)
    smoke.whole_way(run, tmp_path / "whole", tmp_path, 4, **how)


@pytest.mark.slow
def test_the_same_losses_however_it_is_launched(tmp_path: Path) -> None:
    smoke.every_launcher(run, tmp_path)
