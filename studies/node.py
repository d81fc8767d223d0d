"""What happens where a run is started, be it here or on a node of a cluster; loads nothing but the standard library."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CONSOLE_FILE = "console.log"
POLL_S = 0.2
SAVE_S = 300  # before the time of a job is over, its run is asked to save


def run_environment(env: Mapping[str, str], threads: int) -> dict[str, str]:
    """Environment of a run: this interpreter, this checkout, so many threads, lines that arrive at once."""
    path = env.get("PYTHONPATH")
    return dict(env) | {
        "PYTHON": sys.executable,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{path}" if path else str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(threads),
    }


def require_submitit() -> Any:
    """The module `submitit`.

    Raises:
        UserError: it is not installed.
    """
    try:
        import submitit
    except ImportError:
        raise UserError(
            "--submit: needs the library submitit, which is not installed; run 'pip install semiseg[slurm]' or "
            "'pip install submitit'"
        ) from None
    return submitit


class ClusterRun:
    """One run as the job of a cluster; an object of plain values, called on the node.

    Args:
        command: Of the run.
        folder: Where it is started.
        run_dir: Where it writes; what it prints goes to its `console.log`.
        threads: CPU threads.
    """

    def __init__(self, command: Sequence[str], folder: Path, run_dir: Path, threads: int) -> None:
        self.command, self.folder, self.run_dir, self.threads = list(command), folder, run_dir, threads

    def __call__(self) -> int:
        """Train; the exit code."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with (self.run_dir / CONSOLE_FILE).open("ab") as console:
            process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=run_environment(os.environ, self.threads),
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
            )
            _running.append(process)
            try:
                while (
                    process.poll() is None
                ):  # not `wait`, whose lock would stop `checkpoint` in this very thread
                    time.sleep(POLL_S)
                return process.returncode
            finally:
                _running.remove(process)

    def checkpoint(self) -> Any:
        """What the job does when its time is nearly over: stop the run, which saves, and submit it again."""
        for process in _running:
            _stop(process.pid, SAVE_S)
        again = ClusterRun(self.command, self.folder, self.run_dir, self.threads)
        return require_submitit().helpers.DelayedSubmission(again)


def _stop(pid: int, patience_s: float) -> None:
    """Ask a child to save and stop, and wait until it has; its exit code is left to whoever started it."""
    deadline = time.monotonic() + patience_s
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGTERM)
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            if time.monotonic() > deadline:
                return
            time.sleep(POLL_S)


_running: list[subprocess.Popen[bytes]] = []  # on the node; beside the object, which is pickled
