"""The record of a run: console, train.log, metrics.jsonl and tensorboard.

Nothing here asks the device for a value between two intervals; at an interval one transfer brings all means.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.data.files import replacing
from common.distributed import Dist, mean_over_ranks
from common.errors import UserError, writing

LOG = logging.getLogger("semiseg")
ROOT = Path(__file__).resolve().parents[2]
LOCK_PATIENCE_S = 3.0
ZERO_PATIENCE = 200  # steps in a row after which an expected loss term that is exactly 0 is worth a warning

_locked: set[Path] = set()  # record locks do not exclude a second holder in the same process


class _ConsoleHandler(logging.Handler):
    """Writes messages to standard output, above a progress bar where there is one; warnings to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        with suppress(OSError):  # a closed pipe or terminal must not end the training; train.log has the line
            tqdm.write(prefix + self.format(record), file=stream)
            stream.flush()


class _LogFile(logging.FileHandler):
    """train.log; a full disk costs its lines, not the run, which the next checkpoint ends with a clear message."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 -- name of the base class
        del record


class _Tensorboard:
    """Event file written at once, in this thread: the usual writer's queue would hang the loop once its thread died.

    A full disk ends the event file with one warning, not the run, which the next checkpoint ends with a clear message.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._event = Event
        with writing(folder, "check its permissions"):
            folder.mkdir(parents=True, exist_ok=True)
            self._file: Any = EventsWriter(str(folder / "events"), filename_suffix=f".{os.getpid()}.{step}")
        self._write(step, file_version="brain.Event:2")
        if step:  # viewers drop what a killed run wrote after the step that is resumed
            self._write(step + 1, session_log=SessionLog(status=SessionLog.START))

    def _write(self, step: int, **content: Any) -> None:
        if self._file is None:
            return
        try:
            self._file.write_event(self._event(wall_time=time.time(), step=step, **content))
            self._file.flush()
        except OSError as error:
            LOG.warning("tensorboard: cannot be written (%s); no more of it in this run", error.strerror)
            self._file = None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point on each curve."""
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self._write(step, summary=scalar(name, value))

    def image(self, step: int, tag: str, image: np.ndarray[Any, Any]) -> None:
        """A picture, uint8 (H, W, 3)."""
        from tensorboardX.summary import image as summary

        self._write(step, summary=summary(tag, image, dataformats="HWC"))

    def close(self) -> None:
        """Finish the file."""
        if self._file is not None:
            _close(self._file)


def _close(file: Any) -> None:
    """Close it also where the disk is full, which has been said before."""
    with suppress(OSError):
        file.close()


def setup_console(dist: Dist) -> None:
    """Send the project's log messages to the console: everything on the first rank, warnings on the others.

    Calling it again, with the same or another `dist`, changes the level and adds nothing.
    """
    if not any(isinstance(handler, _ConsoleHandler) for handler in LOG.handlers):
        LOG.addHandler(_ConsoleHandler())
    LOG.propagate = False
    LOG.setLevel(logging.INFO if dist.is_main else logging.WARNING)


def jsonable(value: Any) -> Any:
    """`value` as JSON can hold it: tensors and arrays as lists, paths as text, NaN and infinities as null."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return jsonable(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace `path` by `content` in one step; see `jsonable` for the conversion.

    Raises:
        UserError: the folder is unwritable or the disk full; what was there is untouched.
    """
    with writing(path), replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(jsonable(content), file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def duration(seconds: float) -> str:
    """A time span in at most six characters: `45s`, `3m20`, `2h04`, `3d07h`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}"
    if whole < 100 * 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


class RunLock:
    """Holds a run directory for one live process; the system releases it when the process dies, however it dies."""

    def __init__(self, run_dir: Path) -> None:
        self.path = Path(run_dir).resolve() / ".lock"
        self._file: Any = None
        if self.path in _locked:
            raise self._taken(f"this process ({os.getpid()})")
        with writing(run_dir, "choose a writable run directory"):
            handle = self.path.open("a+", encoding="utf-8")
        if not self._lock(handle):
            handle.seek(0)
            holder = handle.read().strip() or "unknown"
            handle.close()
            raise self._taken(holder)
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        handle.flush()
        self._file = handle
        _locked.add(self.path)

    def _lock(self, handle: Any) -> bool:
        """Take the lock; a holder that is just dying gets a moment. False if it lives on."""
        deadline = time.monotonic() + LOCK_PATIENCE_S
        while True:
            try:
                # A record lock: unlike flock, not inherited by data workers that may outlive a killed parent.
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except (BlockingIOError, PermissionError):
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.1)
            except OSError as error:
                folder = self.path.parent
                LOG.warning(
                    "%s: cannot be locked (%s); do not start a second run here", folder, error.strerror
                )
                return True

    def _taken(self, holder: str) -> UserError:
        return UserError(
            f"{self.path.parent}: another live run writes here ({holder}); "
            "wait for it, stop it, or choose another run directory"
        )

    def release(self) -> None:
        """Let others use the directory; calling it again does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None
            _locked.discard(self.path)


class RunLog(ExitStack):
    """Console line, files and tensorboard of one training run.

    Use: construct it (takes the lock of the directory), find the start of the run, `begin(step)`, then
    `step(...)` after every optimizer step and `close()` at the end. Every rank constructs one and calls the
    same methods, for the means are taken over ranks; only the first rank writes.

    Args:
        run_dir: Where files go; None writes none (a dry run).
        dist: This process's place.
        total_steps: Optimizer steps of the whole run.
        images_per_step: Images that all ranks together take in one step, for images/s.
        interval: Steps between two lines.

    Raises:
        UserError: the directory is unwritable or another live process writes to it.
    """

    def __init__(
        self,
        run_dir: Path | None,
        dist: Dist,
        *,
        total_steps: int,
        images_per_step: int,
        interval: int = 20,
    ) -> None:
        super().__init__()
        self.run_dir, self.dist, self.interval = run_dir, dist, interval
        self.total_steps, self.images_per_step = total_steps, images_per_step
        self.last_means: dict[str, float] = {}
        self._sums: dict[tuple[str, ...], Tensor] = {}  # per set of terms: (2, T) sums and numbers of zeros
        self._counts: dict[tuple[str, ...], int] = {}
        self._expected: dict[str, int] = {}
        self._zero_run: dict[str, int] = {}
        self._metrics_bytes: int | None = None
        self._seconds_before = 0.0
        self._metrics: Any = None
        self._writer: _Tensorboard | None = None
        self._bar: Any = None
        self._step = self._first_step = self._interval_steps = 0
        self._begun_at = self._interval_at = time.perf_counter()
        self._paused_s = 0.0
        self._paused_total_s = 0.0
        setup_console(dist)
        if self.run_dir is not None and dist.is_main:
            self._open_files(self.run_dir)

    def _open_files(self, run_dir: Path) -> None:
        """Create the directory, take its lock and open train.log."""
        with writing(run_dir, "choose a writable run directory", done="created"):
            run_dir.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened:
            opened.callback(RunLock(run_dir).release)
            with writing(run_dir / "train.log", "check its permissions"):
                handler = _LogFile(run_dir / "train.log", encoding="utf-8")
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
            LOG.addHandler(handler)
            opened.callback(_close, handler)
            opened.callback(LOG.removeHandler, handler)
            self.push(opened.pop_all())

    def begin(self, step: int) -> None:
        """Start or continue after `step` finished steps.

        Lines of metrics.jsonl that belong to later steps are removed, so that a killed and resumed run leaves
        the same file as an undisturbed one. Also starts the clock and the progress bar.
        """
        self._step = self._first_step = step
        self._begun_at = self._interval_at = time.perf_counter()
        if not self.dist.is_main:
            return
        if self.run_dir is not None:
            self._cut_metrics(self.run_dir / "metrics.jsonl", step)
            self._writer = _Tensorboard(self.run_dir / "tensorboard", step)
            self.callback(self._writer.close)
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=self.total_steps, initial=step, unit="step", dynamic_ncols=True, leave=False
            )
            self.callback(self._bar.close)

    def _cut_metrics(self, path: Path, step: int) -> None:
        """Keep the complete lines of `path` up to `step` that were there at the last save, and open it to append."""
        with writing(path, "check its permissions"):
            if path.exists():
                lines = (
                    path.read_bytes()[: self._metrics_bytes]
                    .decode("utf-8", errors="replace")
                    .splitlines(True)
                )
                kept = [line for line in lines if line.endswith("\n") and _line_step(line) <= step]
                with replacing(path) as temporary:
                    temporary.write_text("".join(kept), encoding="utf-8")
            self._metrics = path.open("a", buffering=1, encoding="utf-8")
            self.callback(_close, self._metrics)

    def step(
        self,
        step: int,
        terms: Mapping[str, Tensor],
        *,
        epoch: int,
        lr: float,
        expected: Collection[str] | None = None,
    ) -> None:
        """Add the terms of the finished step `step` (1-based) and, at an interval, write their means.

        A collective at an interval: all ranks call it with the same `step` and the same names.

        Args:
            step: Number of the finished step.
            terms: Scalars on the device by the name they are logged under; names that begin with `loss_` appear
                on the console and sum up to `loss` unless that is given.
            epoch: Epoch the step belongs to.
            lr: Learning rate of the step.
            expected: Terms that should not be exactly 0 now; all terms if None.
        """
        self._step = step
        self._interval_steps += 1
        names = tuple(terms)
        values = torch.stack([value.detach().reshape(()).double() for value in terms.values()])
        row = torch.stack((values, (values == 0).double()))
        self._sums[names] = self._sums[names] + row if names in self._sums else row
        self._counts[names] = self._counts.get(names, 0) + 1
        for name in names if expected is None else expected:
            self._expected[name] = self._expected.get(name, 0) + 1
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        if step % self.interval == 0 or step == self.total_steps:
            self._flush(epoch, lr)

    def _flush(self, epoch: int, lr: float) -> None:
        """Bring the interval's means to the host in one transfer, write them, and begin a new interval."""
        groups = list(self._sums)
        rows = torch.cat([self._sums[names] for names in groups], dim=1)
        totals, zeros = mean_over_ranks(rows, self.dist).tolist()  # the only host synchronization of the loop
        steps: dict[str, int] = {}
        sums: dict[str, float] = {}
        zero_steps: dict[str, float] = {}
        columns = [(name, self._counts[names]) for names in groups for name in names]
        for (name, count), total, zero in zip(columns, totals, zeros, strict=True):
            steps[name] = steps.get(name, 0) + count
            sums[name] = sums.get(name, 0.0) + total
            zero_steps[name] = zero_steps.get(name, 0.0) + zero
        means = {name: float(f"{sums[name] / steps[name]:.7g}") for name in sums}
        losses = {name: value for name, value in means.items() if name.startswith("loss_")}
        means.setdefault("loss", float(f"{sum(losses.values()):.7g}"))
        self.last_means = means
        self._watch_zeros(steps, zero_steps)

        now = time.perf_counter()
        spent = max(now - self._interval_at - self._paused_s, 1e-9)
        rate = self.images_per_step * self._interval_steps / spent
        active = now - self._begun_at - self._paused_total_s
        done = max(self._step - self._first_step, 1)
        eta = duration(active / done * (self.total_steps - self._step))
        self._interval_at, self._interval_steps, self._paused_s = now, 0, 0.0
        self._sums, self._counts, self._expected = {}, {}, {}
        if not self.dist.is_main:
            return
        shown = " ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in losses.items())
        LOG.info(
            "step %s/%d ep %d lr %.2e %s %.1f img/s eta %s",
            str(self._step).rjust(len(str(self.total_steps))),
            self.total_steps,
            epoch,
            lr,
            shown or f"loss {means['loss']:.3f}",
            rate,
            eta,
        )
        self._write_line(
            {"step": self._step, "epoch": epoch, "lr": lr, **means, "images_per_s": round(rate, 2)}
        )
        if self._writer is not None:
            self._writer.scalars(self._step, {"lr": lr, "images_per_s": rate, **means})

    def _watch_zeros(self, steps: Mapping[str, int], zero_steps: Mapping[str, float]) -> None:
        """Warn once per stretch about an expected term that has been exactly 0 on all ranks for too long."""
        for name, count in steps.items():
            if self._expected.get(name, 0) < count or zero_steps[name] < count:
                self._zero_run[name] = 0
                continue
            before = self._zero_run.get(name, 0)
            self._zero_run[name] = before + count
            if before < ZERO_PATIENCE <= before + count and self.dist.is_main:
                LOG.warning(
                    "%s: exactly 0 for %d steps up to step %d; it does not train anything (threshold too strict, "
                    "no pseudo-labels, or weight 0)",
                    name,
                    before + count,
                    self._step,
                )

    def _write_line(self, entry: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl; `UserError` if the disk is full."""
        if self._metrics is None:
            return
        with writing(self._metrics.name, "free space and start again to resume"):
            self._metrics.write(json.dumps(jsonable(entry)) + "\n")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record figures that are not averages of steps, such as `miou` of an evaluation; first rank only."""
        self._write_line({"step": step, **values})
        if self._writer is not None:
            self._writer.scalars(step, values)

    def add_image(self, tag: str, step: int, image: np.ndarray[Any, Any]) -> None:
        """Put a picture, uint8 (H, W, 3) RGB, into tensorboard; first rank only."""
        if self._writer is not None:
            self._writer.image(step, tag, image)

    def info(self, message: str) -> None:
        """Write a line to the console and train.log; first rank only."""
        LOG.info(message)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context whose time (evaluation, saving) counts neither for images/s nor for the time to go."""
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            self._paused_s += spent
            self._paused_total_s += spent

    @property
    def elapsed_s(self) -> float:
        """Seconds of this run, over all its resumptions."""
        return self._seconds_before + time.perf_counter() - self._begun_at

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold so that an interval in progress continues; a collective, called by all ranks."""
        if self._metrics is not None:
            self._metrics.flush()
        return {
            "sums": [mean_over_ranks(row, self.dist).cpu() for row in self._sums.values()],
            "names": [list(names) for names in self._sums],
            "counts": list(self._counts.values()),
            "expected": dict(self._expected),
            "zero_run": dict(self._zero_run),
            "metrics_bytes": os.path.getsize(self._metrics.name) if self._metrics is not None else None,
            "seconds": self.elapsed_s,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the interval of `state`; call it before `begin`."""
        keys = [tuple(names) for names in state["names"]]
        self._sums = {key: row.to(self.dist.device) for key, row in zip(keys, state["sums"], strict=True)}
        self._counts = dict(zip(keys, state["counts"], strict=True))
        self._expected = dict(state["expected"])
        self._zero_run = dict(state["zero_run"])
        self._metrics_bytes = state["metrics_bytes"]
        self._seconds_before = state["seconds"]


def _line_step(line: str) -> float:
    """Step of a line of metrics.jsonl; infinity for a line that is not one."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
