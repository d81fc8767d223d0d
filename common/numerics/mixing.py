"""CutOut, CutMix and ClassMix of a batch on its device. Draws are arguments, never taken from a global generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

LABEL_VALUES = 256


class Box(NamedTuple):
    """Rectangle in pixels; the ends are exclusive."""

    row0: int
    col0: int
    row1: int
    col1: int


class BoxDraw(NamedTuple):
    """The three random numbers of one box, in the order in which they are drawn."""

    width: int
    col: int
    row: int


def half_area_width_range(width: int) -> tuple[int, int]:
    """Smallest and largest box width for an image of this width: always wider than its half."""
    return int(width / 2 + 1), width - 1


def draw_half_area_box(height: int, width: int, rng: np.random.RandomState) -> BoxDraw:
    """Width, column and row of a box of about half of an image (3 pixels wide or more), each by one call of `rng`."""
    low, high = half_area_width_range(width)
    box_width = int(rng.randint(low, high + 1))
    box_height = _half_area_height(height, width, box_width)
    col = int(rng.randint(0, width - box_width + 1))
    row = int(rng.randint(0, height - box_height + 1))
    return BoxDraw(box_width, col, row)


def half_area_box(height: int, width: int, draw: BoxDraw) -> Box:
    """The box that a draw stands for, as in `generate_cutout_mask` of `u2pl/dataset/augmentation.py` (ratio 2)."""
    end = draw.row + _half_area_height(height, width, draw.width)
    return Box(draw.row, draw.col, end, draw.col + draw.width)


def _half_area_height(height: int, width: int, box_width: int) -> int:
    return round(height * width / 2 / box_width)  # Python and NumPy both round halves to even


def half_of_classes(labels: Tensor, order: Tensor) -> Tensor:
    """Masks (B, H, W) that are true on `floor(n / 2)` of the n label values of each image; 255 counts as a value.

    Args:
        labels: (B, H, W) int64 in 0..255.
        order: (B, 256) random numbers; the present values with the smallest ones are taken.
    """
    batch = labels.shape[0]
    present = torch.zeros(batch, LABEL_VALUES, dtype=torch.bool, device=labels.device)
    present.scatter_(1, labels.flatten(1), True)
    place = order.masked_fill(~present, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
    chosen = present & (place < present.sum(dim=1, keepdim=True) // 2)
    return chosen.gather(1, labels.flatten(1)).view_as(labels)


def mix_with_next(batch: Tensor, keep: Tensor) -> Tensor:
    """Every image of (B, ...) with the pixels outside `keep` (B, H, W) taken from the next one (cyclic)."""
    keep = keep if batch.dim() == keep.dim() else keep.unsqueeze(1)
    return torch.where(keep, batch, batch.roll(-1, dims=0))


def fill_boxes(batch: Tensor, boxes: Sequence[Box], other: Sequence[Tensor] | Tensor | float) -> Tensor:
    """Copy of a batch (B, ..., H, W) with one box per image taken from the image of `other`, or set to that number."""
    out = batch.clone()
    for i, box in enumerate(boxes):
        inside = (..., slice(box.row0, box.row1), slice(box.col0, box.col1))
        if isinstance(other, (int, float)):
            out[i][inside].fill_(other)
        else:
            out[i][inside] = other[i][inside]
    return out
