"""Class-wise queues of negative features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ClassQueues(nn.Module):
    """One first-in first-out feature queue per class, kept on the device and saved with the checkpoint.

    All queues share one buffer of rows; its last row takes what is not to be kept, so that a push has a fixed
    shape and the host never waits for a count.

    Source: `dequeue_and_enqueue` in `u2pl/utils/utils.py` (there: lists of host tensors, one pickled gather per
    class and step).
    """

    rows: Tensor
    written: Tensor
    offsets: Tensor
    capacity: Tensor

    def __init__(self, sizes: Sequence[int], dim: int) -> None:
        super().__init__()
        capacity = torch.tensor(list(sizes))
        self.register_buffer("rows", torch.zeros(int(capacity.sum()) + 1, dim))
        self.register_buffer("written", torch.zeros(len(sizes), dtype=torch.long))
        self.register_buffer("capacity", capacity, persistent=False)
        self.register_buffer("offsets", capacity.cumsum(0) - capacity, persistent=False)

    @property
    def lengths(self) -> Tensor:
        """Number of features held per class (K,)."""
        return torch.minimum(self.written, self.capacity)

    @torch.no_grad()
    def push(self, classes: Tensor, keys: Tensor) -> Tensor:
        """Append `keys` (S, D) to the queues of `classes` (S,), oldest first; class -1 marks padding.

        Rows beyond a queue's capacity replace its oldest ones; rows that are not finite (a step that will be
        cancelled) are left out. Returns the number of rows per class (K,).
        """
        classes = classes.where(keys.isfinite().all(dim=1), -1)
        member = classes.unsqueeze(0) == torch.arange(len(self.written), device=classes.device).unsqueeze(1)
        counts = member.sum(dim=1)
        real = classes >= 0
        k = classes.clamp(min=0)
        place = member.cumsum(dim=1).gather(0, k.unsqueeze(0)).squeeze(0) - 1  # order within the class
        kept = real & (place >= counts[k] - self.capacity[k])
        slot = self.offsets[k] + (self.written[k] + place) % self.capacity[k]
        trash = len(self.rows) - 1
        self.rows.index_copy_(0, slot.where(kept, trash), keys.to(self.rows.dtype))
        self.written += counts
        return counts

    def gather(self, k: int | Tensor, index: Tensor) -> Tensor:
        """The `index`-th oldest features of class `k`: (..., D) for an index of shape (...)."""
        oldest = self.written[k] - self.lengths[k]
        return self.rows[self.offsets[k] + (oldest + index) % self.capacity[k]]

    def contents(self, k: int) -> Tensor:
        """All features of class `k`, oldest first (n, D). Reads the length, so the host waits."""
        return self.gather(k, torch.arange(int(self.lengths[k]), device=self.rows.device))
