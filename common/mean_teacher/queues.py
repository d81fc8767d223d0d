"""Class-wise queues of features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def starts_of(ordered: Tensor, num_classes: int) -> Tensor:
    """Where each class begins in ascending classes (S,), and where the last one ends: (K + 1,)."""
    return torch.searchsorted(ordered, torch.arange(num_classes + 1, device=ordered.device))


class ClassQueues(nn.Module):
    """One first-in first-out feature queue per class, kept on the device and saved with the checkpoint.

    All queues share one buffer of rows; its last row takes what is not to be kept, so that a push has a fixed
    shape and the host never waits for a count.

    Args:
        sizes: capacity of each class.
        dim: D, length of a feature.
        dtype: of the stored features; None for the default.
        name: of their buffer.
        also: buffers of numbers that are stored beside each feature.

    Source: `dequeue_and_enqueue` in `u2pl/utils/utils.py` (there: lists of host tensors, one pickled gather per
    class and step).
    """

    written: Tensor
    offsets: Tensor
    capacity: Tensor

    def __init__(
        self,
        sizes: Sequence[int],
        dim: int,
        dtype: torch.dtype | None = None,
        *,
        name: str = "rows",
        also: Sequence[str] = (),
    ) -> None:
        super().__init__()
        capacity = torch.tensor(list(sizes))
        self.columns = (name, *also)
        self.register_buffer(name, torch.zeros(sum(sizes) + 1, dim, dtype=dtype))
        for other in also:
            self.register_buffer(other, torch.zeros(sum(sizes) + 1))
        self.register_buffer("written", torch.zeros(len(sizes), dtype=torch.long))
        self.register_buffer("capacity", capacity, persistent=False)
        self.register_buffer("offsets", capacity.cumsum(0) - capacity, persistent=False)

    @property
    def lengths(self) -> Tensor:
        """Number of features held per class (K,)."""
        return torch.minimum(self.written, self.capacity)

    @torch.no_grad()
    def push(self, classes: Tensor, keys: Tensor, *also: Tensor) -> Tensor:
        """Append `keys` (S, D) to the queues of `classes` (S,), oldest first; class -1 or K marks padding.

        Rows beyond a queue's capacity replace its oldest ones; rows that are not finite (a step that will be
        cancelled) are left out. Returns the number of rows per class (K,).
        """
        slots, counts = self.take_slots(finite_rows(classes, keys, *also))
        self.write(slots, keys, *also)
        return counts

    def take_slots(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Slots of the next features of `classes` (S,), the last one for what is not kept; features per class (K,)."""
        ordered, order = classes.sort(stable=True)
        starts = starts_of(ordered, len(self.written))
        known = (starts[1:] - self.capacity, self.written - starts[:-1], self.capacity, self.offsets)
        # one column more, which is also that of class -1, whose first row to be kept would come after all
        known_of = F.pad(torch.stack(known), (0, 1), value=max(1, len(classes)))[:, ordered]
        first, before, capacity, offset = known_of
        place = torch.arange(len(order), device=order.device)
        slots = (offset + (before + place) % capacity).where(place >= first, len(self.buffer(0)) - 1)
        counts = starts.diff()
        self.written += counts
        return torch.empty_like(order).scatter_(0, order, slots), counts

    def write(self, slots: Tensor, *values: Tensor) -> None:
        """Put a row of every column into each of the slots (S,)."""
        for column, value in enumerate(values):
            buffer = self.buffer(column)
            buffer.index_copy_(0, slots, value.to(buffer.dtype))

    def slots(self, k: int | Tensor, index: Tensor) -> Tensor:
        """Slots of the `index`-th oldest features of class `k`, of the shape of the index."""
        oldest = (self.written - self.lengths)[k]
        return self.offsets[k] + (oldest + index) % self.capacity[k]

    def contents(self, k: int) -> Tensor:
        """All features of class `k`, oldest first (n, D). Reads the length, so the host waits."""
        return self.buffer(0)[self.slots(k, torch.arange(int(self.lengths[k]), device=self.written.device))]

    def buffer(self, column: int) -> Tensor:
        """The features (column 0), or the numbers beside them."""
        return self.get_buffer(self.columns[column])


def finite_rows(classes: Tensor, keys: Tensor, *also: Tensor) -> Tensor:
    """Classes (S,) with -1 where a feature (S, D), or a number (S,) beside it, is not finite."""
    finite = keys.abs().amax(dim=1) < torch.inf  # NaN if any is
    for numbers in also:
        finite &= numbers.abs() < torch.inf
    return classes.where(finite, -1)
