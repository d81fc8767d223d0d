"""The real shell scripts: train, stop, resume, evaluate; one process, two, torchrun, Slurm's environment."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from projects.cps import eval as evaluation
from projects.cps import train
from projects.cps.tests.toys import METHODS
from tests import smoke
from tests.runs import Commands, losses, result

run = Commands("cps")
PROJECT = run.folder
CUTMIX = "configs/smoke_cps_cutmix.yaml"
CONFIGS = {method: f"configs/smoke_{method}.yaml" for method in METHODS} | {
    "cps": "configs/smoke.yaml", "sup_only": "configs/smoke_sup.yaml",
}  # fmt: skip

pytestmark = pytest.mark.smoke


def test_train_stop_resume_evaluate(tmp_path: Path) -> None:
    """The documented way, from another working directory."""
    folder = tmp_path / "run"
    smoke.stop_and_resume(run, folder, 4, config=CUTMIX)
    assert [step for step, _ in losses(folder)] == [1, 2, 3, 4, 5, 6]
    out = smoke.evaluate(run, folder)
    for name in ("last", "epoch_1", "epoch_2"):
        assert name in out


@pytest.mark.slow
def test_other_ways_to_launch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain python and the variables that srun sets; torchrun and the launcher with two processes."""
    arguments = ["--config", CUTMIX, "run.max_steps=2"]
    run(sys.executable, "train.py", *arguments, f"run.dir={tmp_path / 'plain'}")
    run(sys.executable, "train.py", *arguments, f"run.dir={tmp_path / 'slurm'}", **smoke.SLURM)
    assert losses(tmp_path / "slurm") == losses(tmp_path / "plain")

    two = tmp_path / "two"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--master-port", "0", "--nproc-per-node", "2"]
    run(*torchrun, "-m", "projects.cps.train", *arguments, f"run.dir={two}")
    # the same command in another form goes on with the run, to its end
    assert "own last checkpoint" in smoke.train(run, two, processes="2", config=CUTMIX)
    assert losses(two)[:2] != losses(tmp_path / "plain")
    assert len(losses(two)) == 6
    # both processes have measured the weights that the first one saved
    assert evaluation.main(["--run", str(two), "--epochs", "last"]) == 0
    assert f"{100 * result(two)['miou_last']:.2f}" in capsys.readouterr().out


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of every method."""

    def make(folder: Path) -> None:
        for method in METHODS:
            words = [
                "--config",
                str(PROJECT / CONFIGS[method]),
                f"run.dir={folder / method}",
                "run.device=cpu",
            ]
            assert train.main([*words, "eval.every_epochs=1"]) == 0

    folder = smoke.once(tmp_path_factory, "runs_of_cps", make)
    return {method: folder / method for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_is_measured(
    runs: dict[str, Path], method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = result(runs[method])
    assert found["method"] == method
    assert found["network"] == "branch1"
    assert len(losses(runs[method])) == found["steps"] == 6
    assert evaluation.main(["--run", str(runs[method])]) == 0
    out = capsys.readouterr().out
    for name in ("best", "last", "epoch_1", "epoch_2"):
        assert name in out
    assert f"{100 * found['miou_last']:.2f}" in out


@pytest.mark.parametrize("method", ["cps", "mean_teacher", "gct"])
def test_the_other_networks_can_be_measured(
    runs: dict[str, Path], method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for network in ("branch2", "mean"):
        assert evaluation.main(["--run", str(runs[method]), "--epochs", "last", "--network", network]) == 0
        assert network in capsys.readouterr().out


def test_logged_keys_are_those_of_the_readme(runs: dict[str, Path]) -> None:
    explained = smoke.explained(PROJECT)
    for method, folder in runs.items():
        of_method = {key for key, methods in explained.items() if not methods or method in methods}
        assert smoke.logged(folder) == of_method, method


def test_dry_run_forecasts_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smoke.dry_run(train.main, PROJECT / CUTMIX, tmp_path, capsys)
