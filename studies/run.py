"""Train the runs of a study: each is the project's own `train.sh`, started as a process.

Finished runs are skipped, interrupted ones continue from their last checkpoint, a failed one is reported and the
others go on. Everything happens in one thread, so that the kernel's "parent died" signal, which belongs to the
thread that started a process, reaches the runs exactly when the study itself has died.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import fcntl
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import IO, Any, Literal

from tqdm import tqdm

from common.data.split import changed
from common.errors import UserError, writing
from common.run.log import RunLock, duration, write_json
from studies.node import CONSOLE_FILE, run_environment
from studies.plan import Plan, describe, make_plan, save_plan
from studies.progress import Progress
from studies.records import bring_back, keep, recorded
from studies.study import FILE_NAME, OUTCOMES_NAME, Job, Study, resolve
from tools import ready
from tools.environment import config_hash
from tools.launch import count_gpus

Write = Callable[[str], None]
Status = Literal["finished before", "finished", "stopped", "failed"]

RESULT_KEYS = ("miou_best", "miou_last", "best", "last", "protocol", "split_hash", "config_hash", "seed")
PR_SET_PDEATHSIG = 1
TELL_EVERY_S = 60  # how far the study is, where there is no terminal


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
    place: str | None
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
    """Whether the run has ended with the configuration `expected` (its hash), the seed of the job and today's data."""
    result = read_result(job.run_dir)
    same = result is not None and result["config_hash"] == expected and result["seed"] == job.seed
    return same and not data_changed(job)


def data_changed(job: Job) -> list[str]:
    """What has changed of lists, classes, label map and the like since the result of a run, in words; not compared
    where there is none, or the data are not at hand.
    """
    known = (read_result(job.run_dir) or {}).get("truth")
    if not known:
        return []
    try:
        return changed(known, ready.truth_of(resolve(job)))
    except UserError:
        return []


def set_aside(job: Job, expected: str, write: Write = say) -> None:
    """Rename a run directory whose configuration or data are not the expected ones; nothing is deleted.

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
    what = " and ".join(data_changed(job))
    if found == expected and not what:
        return
    RunLock(job.run_dir).release()
    number = 1
    while (target := job.run_dir.with_name(f"{job.run_dir.name}.old{number}")).exists():
        number += 1
    job.run_dir.rename(target)
    what = what if found == expected else f"configuration has changed ({found} -> {expected})"
    write(f"{job.name}: {what}{' changed' * (found == expected)}; the former run is now {target.name}")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_count(study: Study, slots: int) -> int:
    """CPU threads of each run."""
    return study.threads or max(1, cores() // slots)


def places(study: Study, env: Mapping[str, str]) -> list[str | None]:
    """What each slot gives its run as `CUDA_VISIBLE_DEVICES`; None leaves it as it is.

    Numbers count among the GPUs that this process sees, as everywhere with CUDA.

    Raises:
        UserError: a GPU that is not there; without this its runs would train on the CPU.
    """
    if not study.gpus:
        return [None] * study.slots
    count = count_gpus()
    if max(study.gpus) >= count:
        known = f"has {count} (numbers 0 to {count - 1})" if count else "has none that torch can use"
        raise UserError(
            f"gpus={list(study.gpus)}: this machine {known}; correct 'gpus', or leave it out and give 'slots'"
        )
    visible = env.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else [str(number) for number in range(count)]
    chosen = [names[number] for number in study.gpus]
    size = study.processes
    return [",".join(chosen[i : i + size]) for i in range(0, len(chosen), size)]


def run_study(study: Study, out: Path, *, plan: Plan | None = None, write: Write = say) -> list[Outcome]:
    """Train everything that is missing below `out`; returns how each run ended, in the order of the study.

    A first SIGINT or SIGTERM lets the active runs save and stop, a second one ends them.

    Args:
        study: The study.
        out: Its folder.
        plan: What `make_plan` has made of it, if that was done before.
        write: Receives the lines that tell what happens.

    Raises:
        UserError: a mistake in a configuration, or GPUs that are not there; raised before anything starts.
    """
    plan = plan or make_plan(study, out)
    slots = places(study, os.environ)
    outcomes, waiting = begin(plan, out, write)
    env = run_environment(os.environ, thread_count(study, len(slots)))
    with _Pool(plan, slots, env, out, write) as pool:
        outcomes |= pool.run(waiting)
    return [outcomes[run.job.name] for run in plan.runs if run.job.name in outcomes]


def begin(plan: Plan, out: Path, write: Write) -> tuple[dict[str, Outcome], list[Job]]:
    """Make the folder, keep the plan there and say it; what has finished before, and the jobs that are left.

    Raises:
        UserError: the folder cannot be made or written.
    """
    with writing(out, "choose another --out", done="created"):
        out.mkdir(parents=True, exist_ok=True)
    save_plan(plan, out)
    for line in describe(plan):
        write(line)
    outcomes: dict[str, Outcome] = {}
    waiting = []
    for run in plan.runs:
        bring_back(plan.study, out, run.job)
        if finished(run.job, run.hash):
            write(f"{run.job.name}: finished before")
            outcomes[run.job.name] = Outcome(run.job, "finished before")
        else:
            waiting.append(run.job)
    known = read_outcomes(out)
    record(
        out, *(one for one in outcomes.values() if known.get(one.job.name, {}).get("status") != "finished")
    )
    return outcomes, waiting


def read_outcomes(out: Path) -> dict[str, dict[str, Any]]:
    """How runs ended last, by name; empty where nothing is known."""
    try:
        found = json.loads((out / OUTCOMES_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    known = found if isinstance(found, dict) else {}
    return {key: value for key, value in known.items() if isinstance(value, dict)}


def record(out: Path, *outcomes: Outcome, started: Job | None = None) -> None:
    """Note in `outcomes.json` how runs have ended, and forget the former end of one that has been started.

    Raises:
        UserError: the file cannot be written.
    """
    known = read_outcomes(out)
    if started is not None:
        known.pop(started.name, None)
    for one in outcomes:
        known[one.job.name] = {
            "status": one.status,
            "message": one.message,
            "seconds": round(one.seconds, 1),
            "at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }
    write_json(out / OUTCOMES_NAME, known)


def holder(run_dir: Path) -> str | None:
    """The live process that writes into a run directory, in words; None if there is none."""
    try:
        with (run_dir / ".lock").open("r+", encoding="utf-8") as handle:
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return handle.read().strip() or "an unknown process"
    except OSError:
        pass  # never used, or not ours to open: the run itself will say so
    return None


def save_study(source: Path, out: Path) -> None:
    """Keep the study's file beside its runs, for `report`.

    Raises:
        UserError: the folder cannot be written.
    """
    target = out / FILE_NAME
    if target.exists() and target.samefile(source):
        return
    with writing(target, "choose another --out"):
        out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def show_commands(study: Study, out: Path, write: Write = say) -> None:
    """Write the command of every run, and whether it would be skipped.

    Raises:
        UserError: a mistake in a configuration.
    """
    plan = make_plan(study, out)
    for line in describe(plan):
        write(line)
    for run in plan.runs:
        known = replace(run.job, run_dir=recorded(study, out, run.job))
        note = "finished before" if finished(known, run.hash) else "to do"
        write(f"{run.job.name}: {note}")
        write(f"  (cd projects/{run.job.method.project} && {shlex.join(run.job.command)})")


class _Pool:
    """Runs in progress, at most one per place, and the signals that stop them."""

    def __init__(
        self, plan: Plan, slots: Sequence[str | None], env: dict[str, str], out: Path, write: Write
    ) -> None:
        self.study, self.total, self.env, self.out, self.write = plan.study, len(plan.runs), env, out, write
        self.hashes = {run.job.name: run.hash for run in plan.runs}
        self.free = list(slots)
        self.number = 0
        self.stopping = 0
        self.told: set[str] = set()
        self.progress = Progress(self.total, 0)
        tqdm.monitor_interval = 0  # its thread would be a second one
        self.bar = tqdm(bar_format="{desc}", disable=None)  # with it, the runs' own lines stay in console.log
        self.spoken = time.monotonic()
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
        self.bar.close()

    def _say(self, text: str) -> None:
        with tqdm.external_write_mode():
            self.write(text)

    def _tell(self) -> None:
        """Show how far all runs are: one line that changes on a terminal, elsewhere a new one now and then."""
        if not self.bar.disable:
            self.bar.set_description_str(self.progress.text)
        elif time.monotonic() - self.spoken > TELL_EVERY_S:
            self.spoken = time.monotonic()
            self.write(f"study: {self.progress.text}")

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
        self.progress = Progress(self.total, self.number)
        outcomes: dict[str, Outcome] = {}
        while queue or self.selector.get_map():
            for job in [] if self.stopping else list(queue):
                if not self.free:
                    break
                if self._elsewhere(job):
                    continue
                queue.remove(job)
                outcome = self._begin(job)
                if outcome is not None:
                    outcomes[job.name] = self._report(outcome)
            if self.stopping and queue:
                outcomes |= {job.name: Outcome(job, "stopped", message="not started") for job in queue}
                queue = []
            for key, _ in self.selector.select(timeout=0.5):
                done = self._read(key.data)
                if done is not None:
                    outcomes[done.job.name] = self._report(done)
            self._tell()
        return outcomes

    def _elsewhere(self, job: Job) -> bool:
        """Whether a live process writes there: the rest of a killed study, saving, or a second study."""
        who = holder(job.run_dir)
        if who is not None and job.name not in self.told:
            self.told.add(job.name)
            self._say(f"{job.name}: waits for the live run in {job.run_dir} ({who})")
        return who is not None

    def _begin(self, job: Job) -> Outcome | None:
        """Start a run; its outcome if it has ended elsewhere meanwhile or cannot be started."""
        if finished(job, self.hashes[job.name]):
            return Outcome(job, "finished before")
        try:
            self._start(job)
        except (OSError, UserError) as error:
            return Outcome(job, "failed", message=str(error))
        return None

    def _start(self, job: Job) -> None:
        self.number += 1
        set_aside(job, self.hashes[job.name], self._say)
        job.run_dir.mkdir(parents=True, exist_ok=True)
        resumes = any(job.run_dir.glob("last*.pt"))
        self._say(
            f"run {self.number} of {self.total}: {job.name} ({'continues' if resumes else 'starts'}) in {job.run_dir}"
        )
        self._note(started=job)
        console = (job.run_dir / CONSOLE_FILE).open("ab", buffering=0)
        place = self.free[0]
        process = subprocess.Popen(
            job.command,
            cwd=job.folder,
            env=self.env if place is None else self.env | {"CUDA_VISIBLE_DEVICES": place},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches the run from here, once
            preexec_fn=_stop_with(os.getpid()),  # noqa: PLW1509  (this process runs no threads)
        )
        assert process.stdout is not None
        active = _Active(job, process, console, time.monotonic(), self.free.pop(0))
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
                self.progress.read(active.job.name, text)
                if self.bar.disable:
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
        self.free.append(active.place)

    def _note(self, *outcomes: Outcome, started: Job | None = None) -> None:
        """Keep the outcomes; a full disk must not end runs that may well have what they need."""
        try:
            record(self.out, *outcomes, started=started)
        except UserError as error:
            self._say(f"warning: {error}")

    def _report(self, outcome: Outcome) -> Outcome:
        self._note(outcome)
        self.progress.end(outcome.job.name, finished=outcome.status in ("finished", "finished before"))
        if outcome.status == "finished":
            keep(self.study, self.out, outcome.job)
        took = f" after {duration(outcome.seconds)}" if outcome.seconds else ""
        why = f": {outcome.message}" if outcome.message else ""
        self._say(f"{outcome.job.name}: {outcome.status}{took}{why}")
        return outcome


def failure(run_dir: Path) -> str:
    """Why a run that was started elsewhere has ended without a result, from the end of its `console.log`."""
    try:
        lines = (run_dir / CONSOLE_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "it has never started; see the folder 'cluster'"
    return _cause(1, [line.strip() for line in lines[-40:] if line.strip()])


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
