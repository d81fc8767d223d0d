"""What the smoke tests of all projects share: the documented way by the real scripts, with few steps and images."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.data.dataset_yaml import load_spec
from tests.runs import Commands, losses, result

SLURM = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0",
         "SLURM_JOB_NODELIST": "localhost", "SLURM_STEP_ID": "0"}  # fmt: skip
SMOKE = "configs/smoke.yaml"


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills once for all test processes; not to be changed."""
    shared = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of all workers
    folder, complete = shared / name, shared / f"{name}.complete"
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of an attempt that failed
            folder.mkdir()
            make(folder)
            complete.touch()
    return folder


def train(run: Commands, folder: Path, *overrides: str, processes: str = "1", config: str = SMOKE) -> str:
    """Output of `train.sh` started from another working directory; the run lies in `folder`."""
    words = (str(run.folder / "train.sh"), processes, "0", config, f"run.dir={folder}", *overrides)
    return run("sh", *words, cwd=folder.parent)


def trained(factory: pytest.TempPathFactory, project: str) -> Path:
    """The finished run of a project's smoke settings by one process on the CPU; not to be changed."""
    run = Commands(project, SSS_DEVICE="cpu")
    return once(factory, f"smoke_{project}", lambda folder: train(run, folder / "run")) / "run"


def stop_and_resume(run: Commands, folder: Path, stop: int, *overrides: str, **how: str) -> None:
    """The same run as `train`, stopped after a step and started again."""
    assert f"stopped after step {stop}" in train(run, folder, *overrides, f"run.max_steps={stop}", **how)
    assert not (folder / "result.json").exists()
    assert "own last checkpoint" in train(run, folder, *overrides, **how)


def assert_same_end(one: Path, two: Path) -> None:
    assert losses(one) == losses(two) != []
    assert result(one)["last"] == result(two)["last"]


def evaluate(run: Commands, folder: Path) -> str:
    """Output of `eval.sh`, which shows the figure of training."""
    out = run("sh", str(run.folder / "eval.sh"), str(folder), cwd=folder.parent)
    assert f"{100 * result(folder)['miou_last']:.2f}" in out
    return out


def predict(run: Commands, run_dir: Path, folder: Path) -> None:
    """Masks of two photos by `predict.py`."""
    spec = load_spec("shapes")
    photos, masks = folder / "photos", folder / "masks"
    photos.mkdir()
    for item in spec.read_list("test")[:2]:
        Image.fromarray(spec.load_image(item)).save(photos / f"{item.id}.png")
    run(sys.executable, "predict.py", "--run", str(run_dir), "--input", str(photos), "--out", str(masks))
    found = sorted(masks.glob("*.png"))
    assert len(found) == 2
    for path in found:
        with Image.open(path) as image:
            assert image.mode == "P"
            assert np.asarray(image).max() < spec.num_classes


def whole_way(run: Commands, whole: Path, folder: Path, stop: int, **how: str) -> Path:
    """Train, stop, resume to the end of the run `whole`, evaluate, predict; returns the run."""
    parts = folder / "parts"
    stop_and_resume(run, parts, stop, **how)
    assert_same_end(parts, whole)
    evaluate(run, parts)
    predict(run, parts, folder)
    return parts


def whole_way_of_two(run: Commands, folder: Path, stop: int) -> Path:
    """The same by two processes, and once more the run that has ended."""
    train(run, folder / "whole", processes="2")
    parts = whole_way(run, folder / "whole", folder, stop, processes="2")
    assert "finished already" in train(run, parts, processes="2")
    return parts


def every_launcher(run: Commands, folder: Path) -> None:
    """Plain python, the variables that srun sets, torchrun and `train.sh` give the same losses, by one and by two."""
    words = ["--config", SMOKE, "run.max_steps=2"]
    program = f"projects.{run.folder.name}.train"

    def torchrun(processes: str) -> list[tuple[int, float]]:
        launcher = (sys.executable, "-m", "torch.distributed.run", "--master-port", "0")
        place = folder / f"torchrun{processes}"
        run(*launcher, "--nproc-per-node", processes, "-m", program, *words, f"run.dir={place}")
        return losses(place)

    run(sys.executable, "train.py", *words, f"run.dir={folder / 'plain'}")
    run(sys.executable, "train.py", *words, f"run.dir={folder / 'slurm'}", **SLURM)
    plain = losses(folder / "plain")
    assert plain
    assert torchrun("1") == plain == losses(folder / "slurm")
    train(run, folder / "two", "run.max_steps=2", processes="2")
    assert torchrun("2") == losses(folder / "two") != plain


def dry_run(
    program: Callable[[list[str]], int],
    config: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    *more: str,
) -> None:
    """A forecast, and nothing left behind."""
    words = ["--config", str(config), "run.dry_run=true", f"run.dir={folder / 'r'}", "run.device=cpu", *more]
    assert program(words) == 0
    forecast = r"dry run: peak memory [\d.]+ GiB per process, \d+ ms per step, [\d.]+ images/s, about \w+ for \d+ steps"
    assert re.search(forecast, capsys.readouterr().out)
    assert list(folder.iterdir()) == []


def logged(run_dir: Path) -> set[str]:
    """All keys of a run's metrics."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {key for line in lines for key in json.loads(line)}


def explained(project_folder: Path) -> dict[str, set[str]]:
    """Keys in the README's table of what is logged, and the methods named beside them."""
    readme = (project_folder / "README.md").read_text(encoding="utf-8")
    rows = [row.split("|") for row in readme.split("## What is logged")[1].split("\n## ")[0].splitlines()]
    cells = [(row[1], row[2]) for row in rows if len(row) > 3 and row[1].startswith(" `")]
    return {
        key: set(re.findall(r"`(\w+)`", of)) for keys, of in cells for key in re.findall(r"`(\w+)`", keys)
    }
