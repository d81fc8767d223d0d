"""How far the runs of a study are, in one line."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from common.run.log import duration

STEP = re.compile(r"\bstep +(\d+)/(\d+)\b")  # in the lines of a run


class Progress:
    """Runs that have ended, the share of all training that is done, and the time left at the speed so far.

    Args:
        total: Runs of the study.
        before: Those of them that had finished before.
        clock: Gives seconds.
    """

    def __init__(self, total: int, before: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.ended, self.clock, self.began = total, before, clock, clock()
        self.active: dict[str, tuple[float, float]] = {}  # share at the first line and now
        self.done = 0.0  # runs' worth of training since the beginning, of runs that have ended

    def read(self, name: str, line: str) -> None:
        """Learn from a line that a run has written."""
        found = STEP.search(line)
        if found and int(found[2]):
            share = int(found[1]) / int(found[2])
            self.active[name] = (self.active.get(name, (share, share))[0], share)

    def end(self, name: str, *, finished: bool) -> None:
        """A run has ended."""
        first, now = self.active.pop(name, (0.0, 0.0))
        self.done += (1.0 if finished else now) - first
        self.ended += 1

    @property
    def text(self) -> str:
        """As `3 of 12 runs, 28 %, 1h20 left`; without a time before the first steps."""
        share = (self.ended + sum(now for _, now in self.active.values())) / max(1, self.total)
        done = self.done + sum(now - first for first, now in self.active.values())
        text = f"{self.ended} of {self.total} runs, {100 * share:.0f} %"
        if done <= 0 or self.ended == self.total:
            return text
        return f"{text}, {duration((self.clock() - self.began) * self.total * (1 - share) / done)} left"
