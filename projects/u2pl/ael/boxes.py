"""Where the adaptive CutMix of AEL cuts: a box around one object of a class, in host numbers.

The class map comes to the host. Labelling its components there with OpenCV takes 1 to 3 ms at 769; spreading the
smallest label by tensor operations took 30 to 280 times as long on the same CPU, and on a GPU it would have to ask
the device every few rounds whether it has ended.

Source: `generate_cutmix_mask` and its helpers in `u2pl/utils/utils.py`, branch `with_AEL`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from common.numerics.mixing import Box
from projects.u2pl.ael.config import AelConfig
from projects.u2pl.ael.draws import AelDraws, BoxUniforms


def random_box(size: int, draw: BoxUniforms) -> Box:
    """A box of half the area of a square of `size` pixels, with a random aspect ratio and place."""
    tall = math.exp(draw.aspect * math.log(0.5))
    height, width = round(tall * size), round(0.5 / tall * size)
    row, col = round((size - height) * draw.row), round((size - width) * draw.col)
    return Box(row, col, row + height, col + width)


def grow_box(box: Box, size: int, draw: float) -> Box:
    """`box` brought to about half the area of the square, the added strips shared by its distance to the borders.

    The drawn height or the width that follows may be smaller than that of the box, which then shrinks there.
    """
    height = int(size * math.exp(draw * math.log(0.5)))
    more_rows = height - (box.row1 - box.row0)
    more_cols = int(0.5 * size**2 / height) - (box.col1 - box.col0)
    row0, row1 = _grow_side(box.row0, box.row1, more_rows, size)
    col0, col1 = _grow_side(box.col0, box.col1, more_cols, size)
    return Box(row0, col0, row1, col1)


def _grow_side(start: int, end: int, more: int, size: int) -> tuple[int, int]:
    ratio = start / (size - end + 1)
    # int() cuts towards zero for negative numbers too, and a reciprocal is not a division: both move numbers
    return max(start - int(more * (ratio / (1 + ratio))), 0), min(end + int(more * (1 / (1 + ratio))), size)


def shrink_box(box: Box, size: int, rng: random.Random) -> Box:
    """A part of `box` (at least half the square) with about half the area of the square."""
    area = 0.5 * size**2
    height, width = box.row1 - box.row0, box.col1 - box.col0
    least = int(area / width)
    new_height = height if least > height else rng.randint(least, height)
    new_width = int(area / new_height)
    new_width = width - 1 if new_width > width else new_width
    row0, row1 = _shrink_side(box.row0, box.row1, new_height, rng)
    col0, col1 = _shrink_side(box.col0, box.col1, new_width, rng)
    return Box(row0, col0, row1, col1)


def _shrink_side(start: int, end: int, length: int, rng: random.Random) -> tuple[int, int]:
    less = end - start - length
    if rng.random() > 0.5:
        end = max(rng.randint(end - less, end), start)
        return max(end - length, start), end
    start = min(rng.randint(start, start + less), end)
    return start, min(start + length, end)


def components(mask: NDArray[np.bool_]) -> tuple[list[Box], list[int]]:
    """Bounding boxes and pixel counts of the 8-connected components of `mask` (H, W), by their first pixel.

    Wu's algorithm goes pixel by pixel, so its numbers are in raster order; OpenCV's default one goes by blocks of
    2x2 pixels and numbers otherwise, which would change what a shuffled number stands for.
    """
    _, _, stats, _ = cv2.connectedComponentsWithStatsWithAlgorithm(
        np.ascontiguousarray(mask).view(np.uint8), 8, cv2.CV_32S, cv2.CCL_WU
    )
    rows = stats[1:].tolist()  # the first is the background
    return [Box(y, x, y + h, x + w) for x, y, w, h, _ in rows], [row[4] for row in rows]


def adaptive_boxes(
    maps: NDArray[np.uint8], classes: Sequence[int], ael: AelConfig, draws: AelDraws
) -> list[Box]:
    """The boxes of class maps (P, H, H), each around an object of its class; see `adaptive_box`."""
    return [
        adaptive_box(labels, k, ael.area_thresh, draws, no_pad=ael.no_pad, no_slim=ael.no_slim)
        for labels, k in zip(maps, classes, strict=True)
    ]


def adaptive_box(
    labels: NDArray[np.uint8], k: int, area_thresh: float, draws: AelDraws, *, no_pad: bool, no_slim: bool
) -> Box:
    """The box of a component of class `k`, drawn among those above `area_thresh` of the image; else a random one.

    Args:
        labels: class map (H, H) of the image that gives the patch.
        k: the class whose object is wanted.
        area_thresh: fraction of the image that a component must exceed, in 0..1.
        draws: one shuffle of the components; three uniform numbers for a random box.
        no_pad: leave a box below half the image as it is; otherwise `grow_box`.
        no_slim: leave a box of half the image or more as it is; otherwise `shrink_box`.
    """
    size = labels.shape[0]
    mask = labels == k
    boxes, pixels = components(mask)
    # a class that fills the map counts as without components, as in the original: its box would replace everything
    order = draws.component_order(len(boxes)) if boxes and not mask.all() else []
    chosen = next((boxes[i - 1] for i in order if pixels[i - 1] > area_thresh * size**2), None)
    if chosen is None:
        return random_box(size, draws.box_uniforms())
    large = (chosen.row1 - chosen.row0) * (chosen.col1 - chosen.col0) >= 0.5 * size**2
    if large:
        return chosen if no_slim else shrink_box(chosen, size, draws.python)
    return chosen if no_pad else grow_box(chosen, size, draws.growth())
