"""Where a training stands."""

from __future__ import annotations

from typing import NamedTuple


class Progress(NamedTuple):
    """Place of a forward in the training; everything counts from 0.

    Attributes:
        step: optimizer steps done before this one.
        length: optimizer steps per epoch.
        epochs: of the whole run.
        forward: forwards of this optimizer step done before this one.
    """

    step: int
    length: int
    epochs: int
    forward: int = 0

    @property
    def epoch(self) -> int:
        """The epoch that the step belongs to."""
        return self.step // self.length

    def since(self, epoch: int) -> int:
        """Optimizer steps done since the start of `epoch`; negative before it."""
        return self.step - epoch * self.length
