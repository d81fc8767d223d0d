"""The real shell scripts: train, stop, resume, evaluate, predict; one process, two, torchrun, Slurm's environment."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.data.dataset_yaml import load_spec
from tests.runs import Commands, losses, result

run = Commands("brpg")
PROJECT = run.folder
README = (PROJECT / "README.md").read_text(encoding="utf-8")

OF_OPTIONS = {"collected_scarce", "collected_random", "loss_contra"}  # off in the smoke settings

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize("processes", ["1", "2"])
def test_train_stop_resume_evaluate_predict(tmp_path: Path, processes: str) -> None:
    """The whole documented way, from another working directory."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    script = str(PROJECT / "train.sh")
    run("sh", script, processes, "0", "configs/smoke.yaml", f"run.dir={whole}", cwd=tmp_path)
    out = run("sh", script, processes, "0", "configs/smoke.yaml", f"run.dir={parts}", "run.max_steps=3")
    assert "stopped after step 3" in out
    assert not (parts / "result.json").exists()
    out = run("sh", script, processes, "0", "configs/smoke.yaml", f"run.dir={parts}")
    assert "own last checkpoint" in out
    assert losses(parts) == losses(whole)
    assert result(parts)["last"] == result(whole)["last"]

    out = run("sh", script, processes, "0", "configs/smoke.yaml", f"run.dir={parts}")
    assert "finished already" in out

    out = run("sh", "eval.sh", str(parts))
    shown = f"{100 * result(parts)['miou_last']:.2f}"
    assert shown in out

    spec = load_spec("shapes")
    photos = tmp_path / "photos"
    photos.mkdir()
    for item in spec.read_list("test")[:2]:
        Image.fromarray(spec.load_image(item)).save(photos / f"{item.id}.png")
    run(
        sys.executable,
        "predict.py",
        "--run",
        str(parts),
        "--input",
        str(photos),
        "--out",
        str(tmp_path / "masks"),
    )
    masks = sorted(p for p in (tmp_path / "masks").glob("*.png"))
    assert len(masks) == 2
    for mask in masks:
        with Image.open(mask) as image:
            assert image.mode == "P"
            assert np.asarray(image).max() < spec.num_classes


def test_supervised_only_twin(tmp_path: Path) -> None:
    run("sh", "train.sh", "1", "0", "configs/smoke_sup.yaml", f"run.dir={tmp_path / 'run'}")
    assert result(tmp_path / "run")["method"] == "sup_only"


def test_logged_keys_are_those_of_the_readme(tmp_path: Path) -> None:
    run("sh", "train.sh", "1", "0", "configs/smoke.yaml", f"run.dir={tmp_path / 'run'}")
    logged = set()
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        logged |= set(json.loads(line))
    table = README.split("## What is logged")[1].split("##")[0]
    explained = {
        key
        for row in table.splitlines()
        if row.startswith("| `")
        for key in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    assert logged == explained - OF_OPTIONS
    assert explained >= OF_OPTIONS


def test_the_same_losses_however_it_is_launched(tmp_path: Path) -> None:
    """Plain python, the launcher, torchrun with one and with two processes, and the variables that srun sets."""
    arguments = ["--config", "configs/smoke.yaml", "run.max_steps=2", "run.log_interval=1"]
    run(sys.executable, "train.py", *arguments, f"run.dir={tmp_path / 'plain'}")
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--master-port",
        "0",
        "-m",
        "projects.brpg.train",
    ]
    run(
        *torchrun[:3], "--nproc-per-node", "1", *torchrun[3:], *arguments, f"run.dir={tmp_path / 'torchrun1'}"
    )
    slurm = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0",
             "SLURM_JOB_NODELIST": "localhost", "SLURM_STEP_ID": "0"}  # fmt: skip
    run(sys.executable, "train.py", *arguments, f"run.dir={tmp_path / 'slurm'}", **slurm)
    one = {name: losses(tmp_path / name) for name in ("plain", "torchrun1", "slurm")}
    assert one["plain"]
    assert one["torchrun1"] == one["plain"] == one["slurm"]

    run(
        *torchrun[:3], "--nproc-per-node", "2", *torchrun[3:], *arguments, f"run.dir={tmp_path / 'torchrun2'}"
    )
    run("sh", "train.sh", "2", "0", *arguments[1:], f"run.dir={tmp_path / 'launch2'}")
    assert losses(tmp_path / "torchrun2") == losses(tmp_path / "launch2") != one["plain"]


def test_dry_run_forecasts_and_leaves_nothing(tmp_path: Path) -> None:
    out = run(
        sys.executable,
        "train.py",
        "--config",
        "configs/smoke.yaml",
        "run.dry_run=true",
        f"run.dir={tmp_path / 'r'}",
    )
    assert re.search(
        r"dry run: peak memory [\d.]+ GiB per process, [\d.]+ images/s, about \w+ for \d+ steps", out
    )
    assert list(tmp_path.iterdir()) == []
