"""The prototypes of all classes: similarity of features to them, and their moving average.

Legend: K classes, P slots per class, D channels, S features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.data.spec import IGNORE
from common.distributed import Dist, sum_over_ranks
from common.numerics.similarity import cosines, grouped_sums

NOWHERE = -1e4  # similarity to a slot without a prototype; finite, so that no gradient becomes NaN


class Similarity(NamedTuple):
    """Best cosine similarity to the prototypes of each class (S, K), and the slot that has it (S, K) int64."""

    value: Tensor
    slot: Tensor


class Prototypes(nn.Module):
    """Up to P prototypes per class; the numbers are fixed when they are set, the prototypes move.

    The original fills the slots of classes with fewer prototypes by repeating the last one, which changes no
    similarity; here such slots are left out.

    Args:
        num_classes: K.
        slots: P.
        dim: D.
    """

    centres: Tensor  # (K, P, D)
    real: Tensor  # (K, P) bool, slots that hold a prototype

    def __init__(self, num_classes: int, slots: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("centres", torch.zeros(num_classes, slots, dim))
        self.register_buffer("real", torch.zeros(num_classes, slots, dtype=torch.bool))

    @torch.no_grad()
    def set(self, prototypes: Sequence[Tensor]) -> None:
        """Take the prototypes of each class, (P_k, D) with P_k at most P; a class may have none."""
        self.centres.zero_()
        self.real.fill_(False)
        for k, own in enumerate(prototypes):
            self.centres[k, : len(own)] = own.to(self.centres)
            self.real[k, : len(own)] = True

    @property
    def usable(self) -> Tensor:
        """Classes that have a prototype (K,) bool."""
        return self.real.any(dim=1)

    def labels(self, labels: Tensor) -> Tensor:
        """Labels (S,) with 255 in place of classes without prototypes."""
        known = self.usable.gather(0, labels.where(labels != IGNORE, 0))
        return labels.where(known, IGNORE)

    def similarity(self, feats: Tensor) -> Similarity:
        """Cosine similarity of features (S, D), whose gradient it carries, to the nearest prototypes of all classes.

        Source: the prototype stage of `train_semi.py`, there by broadcasting.
        """
        num_classes, slots, dim = self.centres.shape
        products = cosines(feats, self.centres.view(-1, dim), eps=1e-8)
        every = products.view(-1, num_classes, slots).masked_fill(~self.real, NOWHERE)
        value, slot = every.max(dim=2)
        return Similarity(value, slot)

    @torch.no_grad()
    def update(
        self, feats: Tensor, labels: Tensor, slot: Tensor, decay: float, dist: Dist | None = None
    ) -> None:
        """Move every prototype towards the mean of the features that are nearest to it within their own class.

        Args:
            feats: (S, D).
            labels: (S,) int64; 255 is left out.
            slot: (S, K) of `similarity`.
            decay: of the average.
            dist: average over the features of all processes; None moves them by those of this process
                (QUIRK quirks.own_prototypes: the prototypes of the processes drift apart).

        Source: the end of the prototype stage in `train_semi.py`.
        """
        num_classes, slots, dim = self.centres.shape
        valid = labels != IGNORE
        k = labels.where(valid, 0)
        cell = (k * slots + slot.gather(1, k.unsqueeze(1)).squeeze(1)).where(valid, -1)
        rows = torch.cat((feats, torch.ones_like(feats[:, :1])), dim=1)
        total = grouped_sums(rows, cell, num_classes * slots)
        if dist is not None:
            total = sum_over_ranks(total, dist)
        count = total[:, dim:]
        mean = total[:, :dim] / count.clamp(min=1)
        moved = decay * self.centres.view(-1, dim) + (1 - decay) * mean
        finite = moved.isfinite().all(
            dim=1, keepdim=True
        )  # a step that will be cancelled must not leave a trace
        self.centres.copy_(
            torch.where((count > 0) & finite, moved, self.centres.view(-1, dim)).view_as(self.centres)
        )
