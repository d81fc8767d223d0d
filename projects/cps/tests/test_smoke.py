"""The real shell scripts: train, stop, resume, evaluate; one process, two, torchrun, Slurm's environment."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from projects.cps import eval as evaluation
from projects.cps import train
from projects.cps.tests.checkpoints import few_images
from projects.cps.tests.toys import METHODS
from tests.runs import Commands, losses, result

run = Commands("cps")
PROJECT = run.folder
README = (PROJECT / "README.md").read_text(encoding="utf-8")
CUTMIX = "configs/smoke_cps_cutmix.yaml"
CONFIGS = {method: f"configs/smoke_{method}.yaml" for method in METHODS} | {
    "cps": "configs/smoke.yaml", "sup_only": "configs/smoke_sup.yaml",
}  # fmt: skip

pytestmark = pytest.mark.smoke


def test_train_stop_resume_evaluate(tmp_path: Path) -> None:
    """The documented way, from another working directory."""
    folder, script = tmp_path / "run", str(PROJECT / "train.sh")
    out = run("sh", script, "1", "0", CUTMIX, f"run.dir={folder}", "run.max_steps=3", cwd=tmp_path)
    assert "stopped after step 3" in out
    assert not (folder / "result.json").exists()
    out = run("sh", script, "1", "0", CUTMIX, f"run.dir={folder}", cwd=tmp_path)
    assert "own last checkpoint" in out
    assert [step for step, _ in losses(folder)] == [5, 10]

    out = run("sh", str(PROJECT / "eval.sh"), str(folder), cwd=tmp_path)
    for name in ("last", "epoch_1", "epoch_2"):
        assert name in out
    assert f"{100 * result(folder)['miou_last']:.2f}" in out


def test_other_ways_to_launch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain python and the variables that srun sets; torchrun and the launcher with two processes."""
    arguments = ["--config", CUTMIX, "run.max_steps=2", "run.log_interval=1"]
    run(sys.executable, "train.py", *arguments, f"run.dir={tmp_path / 'plain'}")
    slurm = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0",
             "SLURM_JOB_NODELIST": "localhost", "SLURM_STEP_ID": "0"}  # fmt: skip
    run(sys.executable, "train.py", *arguments, f"run.dir={tmp_path / 'slurm'}", **slurm)
    assert losses(tmp_path / "slurm") == losses(tmp_path / "plain")

    two, short = tmp_path / "two", "data.epoch_images=48"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--master-port", "0", "--nproc-per-node", "2"]
    run(*torchrun, "-m", "projects.cps.train", *arguments, short, f"run.dir={two}")
    # the same command in another form goes on with the run, to its end
    out = run("sh", "train.sh", "2", "0", CUTMIX, short, f"run.dir={two}", "run.log_interval=1")
    assert "own last checkpoint" in out
    assert losses(two)[:2] != losses(tmp_path / "plain")
    assert len(losses(two)) == 4
    # both processes have measured the weights that the first one saved
    assert evaluation.main(["--run", str(two), "--epochs", "last"]) == 0
    assert f"{100 * result(two)['miou_last']:.2f}" in capsys.readouterr().out


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of every method."""
    folder = tmp_path_factory.mktemp("runs")
    few = few_images(folder)
    short = [few, few.replace("eval.list", "data.val"), "data.epoch_images=48", "eval.every_epochs=1"]
    for method in METHODS:
        words = ["--config", str(PROJECT / CONFIGS[method]), f"run.dir={folder / method}", "run.device=cpu"]
        batch = f"optim.batch_size={8 if method == 'gct' else 16}"
        assert train.main([*words, *short, batch, "run.log_interval=1"]) == 0
    return {method: folder / method for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_is_measured(
    runs: dict[str, Path], method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = result(runs[method])
    assert found["method"] == method
    assert found["network"] == "branch1"
    assert len(losses(runs[method])) == found["steps"] == (12 if method == "gct" else 6)
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
    table = README.split("## What is logged")[1].split("\n## ")[0]
    explained: dict[str, set[str]] = {}
    for row in table.splitlines():
        if row.startswith("| `"):
            _, keys, of, *_ = row.split("|")
            for key in re.findall(r"`(\w+)`", keys):
                explained[key] = set(re.findall(r"`(\w+)`", of)) or set(METHODS)
    for method, folder in runs.items():
        logged = {
            key for line in (folder / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)
        }
        assert logged == {key for key, methods in explained.items() if method in methods}, method


def test_dry_run_forecasts_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(PROJECT / CUTMIX)
    words = ["--config", config, "run.dry_run=true", f"run.dir={tmp_path / 'r'}", "run.device=cpu"]
    assert train.main(words) == 0
    forecast = r"dry run: peak memory [\d.]+ GiB per process, [\d.]+ images/s, about \w+ for \d+ steps"
    assert re.search(forecast, capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []
