"""Stop requests: a first signal ends the run after the current step, a second one at once."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from types import FrameType, TracebackType
from typing import Any

import torch

from common.distributed import Dist, max_over_ranks
from common.errors import UserError, reason

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Context in which SIGTERM, SIGINT and SIGUSR1 ask for a stop instead of ending the process.

    The first signal only sets `requested`; the loop finishes its step, saves and leaves. A second signal
    exits at once with 128 + its number. Handlers are installed in the main thread only (elsewhere Python
    forbids it) and the former ones are put back at the end.

    Attributes:
        requested: True once a signal has come to this process.
        signal: Number of the first signal, or None.
    """

    def __init__(self) -> None:
        self.requested = False
        self.signal: int | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._former[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal; leave at once on the second, without clean-up that could hang."""
        del frame
        if self.requested:
            os._exit(128 + number)
        self.requested = True
        self.signal = int(number)

    def agree(self, dist: Dist) -> bool:
        """True on all ranks if any rank has been asked to stop, so that all leave after the same step.

        Also takes over the signal's number. Must be called by every rank at the same place. The message
        goes through the CPU group and does not wait for the device.
        """
        highest = int(max_over_ranks(torch.tensor(self.signal or 0), dist))
        if highest:
            self.requested = True
            self.signal = self.signal or highest
        return self.requested

    def requeue(self, dist: Dist) -> bool:
        """Put the Slurm job back into the queue if SIGUSR1 was the reason; call it after the save.

        Returns:
            True if this process has asked for it: first rank, SIGUSR1, inside a Slurm job.

        Raises:
            UserError: `scontrol` is missing or refuses.
        """
        job = os.environ.get("SLURM_JOB_ID")
        if not dist.is_main or self.signal != signal.SIGUSR1 or not job:
            return False
        array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
        name = f"{array}_{task}" if array and task else job
        try:
            subprocess.run(["scontrol", "requeue", name], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            why = " ".join(getattr(error, "stderr", "scontrol is not on PATH").split()) or reason(error)
            raise UserError(
                f"slurm job {name}: requeue refused ({why}); submit the same command again to resume"
            ) from error
        return True
