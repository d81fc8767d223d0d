"""`kill -9` at random moments, during saves too: every restart continues, and the end is that of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.run.checkpoint import kept_weights
from projects.cps.tests.test_resume import go, write
from tests.runs import ROOT, assert_same_run

KILLS = int(os.environ.get("SSS_KILLS", "2"))

pytestmark = pytest.mark.slow


def start(config: Path, run_dir: Path, log: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "projects.cps.train", "--config", str(config), f"run.dir={run_dir}"],
        cwd=ROOT, stdout=log.open("ab"), stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_killed_runs_end_like_an_undisturbed_one(tmp_path: Path) -> None:
    split = tmp_path / "split"
    split.mkdir()
    for name, indices in (("labeled", range(3)), ("unlabeled", range(10, 18)), ("val", range(400, 402))):
        (split / f"{name}.txt").write_text("".join(f"{i:06d}\n" for i in indices))
    # a checkpoint after every step, so that many kills hit a save
    run = {"save_interval": 1, "log_interval": 1, "panels": False, "device": "cpu"}
    optim = {"lr": 0.02, "epochs": 4 + 2 * KILLS, "batch_size": 2}
    config = write(tmp_path / "c.yaml", split, "cps_cutmix", optim=optim, run=run, keep={"every_epochs": 2})
    go(config, tmp_path / "whole")
    rng = random.Random(0)
    killed = 0
    folder, log = tmp_path / "killed", tmp_path / "killed.log"
    while killed < KILLS:
        process = start(config, folder, log)
        # wait until training has begun, then a random moment of it
        last = folder / "last.pt"
        seen = last.stat().st_mtime_ns if last.exists() else 0
        while process.poll() is None:
            if last.exists() and last.stat().st_mtime_ns != seen:
                break
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.25))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += 1
    assert killed == KILLS, "the run ended before all kills; make it longer"
    go(config, folder)
    names = [f"weights/{path.name}" for path in kept_weights(tmp_path / "whole", "epoch").values()]
    assert len(names) == optim["epochs"] // 2
    for name in ("last.pt", "best.pt", *names):
        assert_same_run(tmp_path / "whole", folder, name=name)
