"""Run a script on two processes of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def run_on_two_processes(folder: Path, script: str) -> str:
    """Output of a module with `main(argv)` that two gloo processes run."""
    (folder / "two_ranks.py").write_text(textwrap.dedent(script), encoding="utf-8")
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(folder))),
        "OMP_NUM_THREADS": "1",
        "SSS_DEVICE": "cpu",
    }
    command = [sys.executable, "-m", "tools.launch", "--processes", "2", "--port", "0", "two_ranks", "--"]
    done = subprocess.run(
        command, env=env, cwd=folder, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
