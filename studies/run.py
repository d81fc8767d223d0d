"""Train the runs of a study: each is the project's own `train.sh`, started as a process.

Finished runs are skipped, interrupted ones continue from their last checkpoint, a failed one is reported and the
others go on. Everything happens in one thread, so that the kernel's "parent died" signal, which belongs to the
thread that started a process, reaches the runs exactly when the study itself has died.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any, Literal

from common.config import config_hash
from common.errors import UserError
from common.runlog import RunLock, duration
from studies.study import FILE_NAME, ROOT, Job, Study, jobs, resolve

Write = Callable[[str], None]
Status = Literal["finished before", "finished", "stopped", "failed"]

RESULT_KEYS = ("miou_best", "miou_last", "best", "last", "protocol", "split_hash", "config_hash", "seed")
PR_SET_PDEATHSIG = 1
CONSOLE_FILE = "console.log"


@dataclass
class Outcome:
    """How a run ended; `message` says why one has failed."""

    job: Job
    status: Status
    seconds: float = 0.0
    message: str = ""


@dataclass
class _Active:
    """A run in progress."""

    job: Job
    process: subprocess.Popen[bytes]
    console: IO[bytes]
    began: float
    rest: bytes = b""
    last_lines: list[str] = field(default_factory=list)


def say(text: str) -> None:
    """Write a line to standard output at once."""
    with contextlib.suppress(BrokenPipeError):  # a closed terminal must not end the training
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def read_result(run_dir: Path) -> dict[str, Any] | None:
    """The content of `result.json` if it is there and complete, else None."""
    try:
        result = json.loads((run_dir / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    complete = isinstance(result, dict) and all(result.get(key) is not None for key in RESULT_KEYS)
    return result if complete else None


def finished(job: Job, expected: str) -> bool:
    """Whether the run has ended with the configuration `expected` (its hash) and the seed of the job."""
    result = read_result(job.run_dir)
    return result is not None and result["config_hash"] == expected and result["seed"] == job.seed


def set_aside(job: Job, expected: str, write: Write = say) -> None:
    """Rename a run directory whose configuration is not the expected one; nothing is deleted.

    Raises:
        UserError: a live run writes there.
    """
    saved = job.run_dir / "config.yaml"
    if not saved.is_file():
        return
    try:
        found = config_hash(resolve(job, saved))
    except UserError:
        found = "unreadable"  # made by another version of the project
    if found == expected:
        return
    RunLock(job.run_dir).release()
    number = 1
    while (target := job.run_dir.with_name(f"{job.run_dir.name}.old{number}")).exists():
        number += 1
    job.run_dir.rename(target)
    write(
        f"{job.name}: configuration has changed ({found} -> {expected}); the former run is now {target.name}"
    )


def thread_count(study: Study, slots: int) -> int:
    """CPU threads of each run."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return study.threads or max(1, cores // slots)


def run_environment(env: Mapping[str, str], threads: int) -> dict[str, str]:
    """Environment of a run: this interpreter, this checkout, so many threads, lines that arrive at once."""
    path = env.get("PYTHONPATH")
    return dict(env) | {
        "PYTHON": sys.executable,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{path}" if path else str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(threads),
    }


def run_study(study: Study, out: Path, *, slots: int | None = None, write: Write = say) -> list[Outcome]:
    """Train everything that is missing below `out`; returns how each run ended, in the order of the study.

    A first SIGINT or SIGTERM lets the active runs save and stop, a second one ends them.

    Raises:
        UserError: a mistake in a configuration; raised before anything starts.
    """
    todo = jobs(study, out)
    hashes = {job.name: config_hash(resolve(job)) for job in todo}
    slots = slots or study.slots
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be created ({error.strerror}); choose another --out") from None
    outcomes: dict[str, Outcome] = {}
    waiting = []
    for job in todo:
        if finished(job, hashes[job.name]):
            write(f"{job.name}: finished before")
            outcomes[job.name] = Outcome(job, "finished before")
        else:
            waiting.append(job)
    pool = _Pool(hashes, len(todo), slots, run_environment(os.environ, thread_count(study, slots)), write)
    with pool:
        outcomes |= pool.run(waiting)
    return [outcomes[job.name] for job in todo if job.name in outcomes]


def save_study(source: Path, out: Path) -> None:
    """Keep the study's file beside its runs, for `report`.

    Raises:
        UserError: the folder cannot be written.
    """
    target = out / FILE_NAME
    if target.exists() and target.samefile(source):
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}); choose another --out") from None


def show_commands(study: Study, out: Path, write: Write = say) -> None:
    """Write the command of every run, and whether it would be skipped.

    Raises:
        UserError: a mistake in a configuration.
    """
    for job in jobs(study, out):
        note = "finished before" if finished(job, config_hash(resolve(job))) else "to do"
        write(f"{job.name}: {note}")
        write(f"  (cd projects/{job.method.project} && {shlex.join(job.command)})")


class _Pool:
    """Runs in progress, at most `slots` at a time, and the signals that stop them."""

    def __init__(
        self, hashes: Mapping[str, str], total: int, slots: int, env: dict[str, str], write: Write
    ) -> None:
        self.hashes, self.total, self.slots, self.env, self.write = hashes, total, slots, env, write
        self.number = 0
        self.stopping = 0
        self.selector = selectors.DefaultSelector()
        self.former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Pool:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.former[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)
        for active in self._active():
            active.process.kill()
            active.process.wait()
            self._drop(active)
        self.selector.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.stopping += 1
        for active in self._active():
            with contextlib.suppress(ProcessLookupError):
                active.process.send_signal(signal.SIGTERM if self.stopping == 1 else signal.SIGKILL)

    def _active(self) -> list[_Active]:
        return [key.data for key in list(self.selector.get_map().values())]

    def run(self, waiting: Sequence[Job]) -> dict[str, Outcome]:
        """Outcome by job name; jobs that a stop request has kept from starting count as stopped."""
        queue = list(waiting)
        self.number = self.total - len(queue)
        outcomes: dict[str, Outcome] = {}
        while queue or self.selector.get_map():
            while queue and not self.stopping and len(self.selector.get_map()) < self.slots:
                job = queue.pop(0)
                try:
                    self._start(job)
                except (OSError, UserError) as error:
                    outcomes[job.name] = self._report(Outcome(job, "failed", message=str(error)))
            if self.stopping and queue:
                outcomes |= {job.name: Outcome(job, "stopped", message="not started") for job in queue}
                queue = []
            for key, _ in self.selector.select(timeout=0.5):
                done = self._read(key.data)
                if done is not None:
                    outcomes[done.job.name] = self._report(done)
        return outcomes

    def _start(self, job: Job) -> None:
        self.number += 1
        set_aside(job, self.hashes[job.name], self.write)
        job.run_dir.mkdir(parents=True, exist_ok=True)
        resumes = any(job.run_dir.glob("last*.pt"))
        self.write(
            f"run {self.number} of {self.total}: {job.name} ({'continues' if resumes else 'starts'}) in {job.run_dir}"
        )
        console = (job.run_dir / CONSOLE_FILE).open("ab", buffering=0)
        process = subprocess.Popen(
            job.command,
            cwd=job.folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches the run from here, once
            preexec_fn=_stop_with(os.getpid()),  # noqa: PLW1509  (this process runs no threads)
        )
        assert process.stdout is not None
        active = _Active(job, process, console, time.monotonic())
        self.selector.register(process.stdout, selectors.EVENT_READ, active)

    def _read(self, active: _Active) -> Outcome | None:
        """Pass on what the run has written; its outcome once it has closed its output."""
        assert active.process.stdout is not None
        data = os.read(active.process.stdout.fileno(), 65536)
        with contextlib.suppress(OSError):  # a full disk ends the run with its own message
            active.console.write(data)
        *lines, active.rest = (active.rest + data.replace(b"\r", b"\n")).split(b"\n")
        if not data and active.rest:
            lines.append(active.rest)
        for line in lines:
            text = line.decode("utf-8", errors="replace").rstrip()
            if text:
                active.last_lines = [*active.last_lines[-40:], text]
                self.write(f"{active.job.name} | {text}")
        if data:
            return None
        code = active.process.wait()
        self._drop(active)
        seconds = time.monotonic() - active.began
        if code == 0 and finished(active.job, self.hashes[active.job.name]):
            return Outcome(active.job, "finished", seconds)
        if code == 0 and read_result(active.job.run_dir):
            message = "its result.json carries another configuration hash or seed than the study asked for"
            return Outcome(active.job, "failed", seconds, message)
        if code == 0 or self.stopping:
            return Outcome(active.job, "stopped", seconds, "start the study again to go on")
        return Outcome(active.job, "failed", seconds, _cause(code, active.last_lines))

    def _drop(self, active: _Active) -> None:
        assert active.process.stdout is not None
        self.selector.unregister(active.process.stdout)
        active.process.stdout.close()
        active.console.close()

    def _report(self, outcome: Outcome) -> Outcome:
        took = f" after {duration(outcome.seconds)}" if outcome.seconds else ""
        why = f": {outcome.message}" if outcome.message else ""
        self.write(f"{outcome.job.name}: {outcome.status}{took}{why}")
        return outcome


def _cause(code: int, lines: Sequence[str]) -> str:
    """The run's own error line, or its last one."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"exit code {code}"])[-1].removeprefix("error: ")


def _stop_with(parent: int) -> Callable[[], None]:
    """What a run does first: have the kernel ask it to save and stop when the study dies, even of `kill -9`."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

    def prepare() -> None:
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(1)

    return prepare
