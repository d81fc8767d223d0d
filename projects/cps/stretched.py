"""Lists brought to one length, whatever their number of images."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from common.data.loaders import Key, SegmentationDataset, Transform
from common.errors import UserError

if TYPE_CHECKING:
    from common.data.spec import DatasetSpec, Item


def item_at(position: int, count: int, length: int) -> int | None:
    """Which of `count` items stands at a position of their list brought to `length`; None: one at random.

    The list is repeated as often as it fits. The original tops it up with the beginning of a permutation that it
    draws anew for every sample, so each position there is an item drawn uniformly and independently.
    Of a list longer than `length` only the first `length` items are used.
    """
    repeated = max(length // count, 1) * count
    return position % count if position < repeated else None


class StretchedDataset(SegmentationDataset):
    """A dataset of `length` positions, see `item_at`.

    Raises:
        UserError: positions are wanted of no items.
    """

    def __init__(
        self, spec: DatasetSpec, items: Sequence[Item], transform: Transform, seed: int, role: str,
        on_error: str = "stop", *, length: int, cache: bool = False,
    ) -> None:  # fmt: skip
        if length and not items:
            raise UserError(f"data: the list of {role} images is empty; check the split's list file")
        super().__init__(spec, items, transform, seed, role, on_error, cache=cache)
        self.length = length

    def __len__(self) -> int:
        return self.length

    def position(self, key: Key, rng: random.Random) -> int:
        """Which item a key stands for."""
        found = item_at(key.position, len(self.items), self.length)
        return rng.randrange(len(self.items)) if found is None else found
