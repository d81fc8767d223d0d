"""`kill -9` at random moments, during saves too: every restart continues, and the end is that of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.tiny import write_config, write_dataset

ROOT = Path(__file__).resolve().parents[3]
KILLS = int(os.environ.get("SSS_KILLS", "4"))

pytestmark = pytest.mark.slow


def start(config: Path, run_dir: Path, log: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "projects.u2pl.train", "--config", str(config), f"run.dir={run_dir}"],
        cwd=ROOT, stdout=log.open("ab"), stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_killed_runs_end_like_an_undisturbed_one(tmp_path: Path) -> None:
    farm = write_dataset(tmp_path / "farm", labeled=8, unlabeled=24)
    # a checkpoint after every step, so that many kills hit a save
    config = write_config(tmp_path / "c.yaml", farm, "few", optim={"epochs": 16}, run={"save_interval": 1})
    assert start(config, tmp_path / "whole", tmp_path / "whole.log").wait(timeout=300) == 0
    rng = random.Random(0)
    killed = 0
    folder, log = tmp_path / "killed", tmp_path / "killed.log"
    while killed < KILLS:
        process = start(config, folder, log)
        # wait until training has begun, then a random moment of it
        seen = (folder / "last.pt").stat().st_mtime_ns if (folder / "last.pt").exists() else 0
        while process.poll() is None:
            if (folder / "last.pt").exists() and (folder / "last.pt").stat().st_mtime_ns != seen:
                break
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.25))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += 1
    assert killed == KILLS, "the run ended before all kills; make it longer"
    assert start(config, folder, log).wait(timeout=300) == 0, log.read_text()[-2000:]
    ours, theirs = ((tmp_path / name) for name in ("killed", "whole"))
    lines = [
        [{k: v for k, v in json.loads(line).items() if k != "images_per_s"} for line in text.splitlines()]
        for text in ((ours / "metrics.jsonl").read_text(), (theirs / "metrics.jsonl").read_text())
    ]
    assert lines[0] == lines[1]
    states = [torch.load(path / "last.pt", weights_only=True) for path in (ours, theirs)]
    for role in ("student", "teacher"):
        for key, value in states[0]["networks"][role].items():
            assert torch.equal(value, states[1]["networks"][role][key]), f"{role}.{key}"
