"""COCO's ways of writing a region, decoded pixel for pixel as its own tools do: polygons, run lengths, packed ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.errors import UserError

Bool = np.ndarray[Any, np.dtype[np.bool_]]
Ints = np.ndarray[Any, np.dtype[np.int64]]

_SCALE = 5  # boundaries are followed on a grid five times as fine as the pixels


def decode_segmentation(segmentation: Any, height: int, width: int, where: str) -> Bool:
    """The region of a COCO `segmentation`, bool (H, W).

    Args:
        segmentation: A list of polygons (x0, y0, x1, y1, ...), whose union is meant; or run lengths
            `{"size": [H, W], "counts": list or packed text}`.
        height: Of the photo.
        width: Of the photo.
        where: For the error message.

    Raises:
        UserError: Run lengths of another size, or something else.
    """
    if isinstance(segmentation, Mapping):
        counts = segmentation["counts"]
        if list(segmentation["size"]) != [height, width]:
            raise UserError(
                f"{where}: region of size {segmentation['size']} for a photo of {[height, width]}"
            )
        runs = (
            unpack_counts(counts) if isinstance(counts, str | bytes) else np.asarray(counts, dtype=np.int64)
        )
        return decode_runs(runs, height, width, where)
    if not isinstance(segmentation, Sequence) or any(
        len(polygon) < 6 or len(polygon) % 2 for polygon in segmentation
    ):
        raise UserError(
            f"{where}: neither polygons of three or more points nor run lengths; get the file again"
        )
    region = np.zeros((height, width), dtype=np.bool_)
    for polygon in segmentation:
        region |= fill_polygon(np.asarray(polygon, dtype=np.float64).reshape(-1, 2), height, width)
    return region


def decode_runs(counts: Ints, height: int, width: int, where: str) -> Bool:
    """The region of run lengths, bool (H, W): outside and inside in turn, column by column.

    Raises:
        UserError: The runs do not fill the photo.
    """
    if (counts < 0).any() or counts.sum() != height * width:
        raise UserError(
            f"{where}: run lengths add up to {counts.sum()} of {height * width} pixels; get the file again"
        )
    inside = np.arange(len(counts)) % 2 == 1
    region: Bool = np.repeat(inside, counts).reshape(width, height).T
    return region


def unpack_counts(packed: str | bytes) -> Ints:
    """Run lengths of COCO's packed text.

    Each character holds 5 bits of a number, lowest first, and a sixth that says whether more follow; from the fourth
    number on, differences to the last but one number are stored.
    """
    codes = packed.encode("ascii") if isinstance(packed, str) else packed
    counts: list[int] = []
    value = shift = 0
    for code in codes:
        bits = code - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    return np.array(counts, dtype=np.int64)


def fill_polygon(points: np.ndarray[Any, np.dtype[np.float64]], height: int, width: int) -> Bool:
    """The pixels of a closed polygon, points float64 (N, 2) as x, y; bool (H, W), as COCO's mask tools fill it.

    The boundary is followed on a fine grid; where it crosses the centre line of a pixel column, the column changes
    between outside and inside.
    """
    xs, ys = _boundary(np.trunc(_SCALE * points + 0.5).astype(np.int64))
    steps = np.flatnonzero(xs[1:] != xs[:-1])
    left = np.where(xs[steps + 1] < xs[steps], xs[steps + 1], xs[steps + 1] - 1)
    column = (left + 0.5) / _SCALE - 0.5
    centred = (column == np.floor(column)) & (column >= 0) & (column <= width - 1)
    row = (np.minimum(ys[steps], ys[steps + 1]) + 0.5) / _SCALE - 0.5
    row = np.ceil(row.clip(0, height)).astype(np.int64)
    crossings = np.sort(column[centred].astype(np.int64) * height + row[centred])
    return decode_runs(np.diff(crossings, prepend=0, append=height * width), height, width, "polygon")


def _boundary(corners: Ints) -> tuple[Ints, Ints]:
    """All grid points along the closed line through `corners` (N, 2), ends of edges included."""
    xs, ys = [], []
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        dx, dy = abs(int(x1 - x0)), abs(int(y1 - y0))
        along, length = (0, dx) if dx >= dy else (1, dy)
        start, end = np.array([x0, y0]), np.array([x1, y1])
        backwards = start[along] > end[along]
        if backwards:  # edges are always walked upwards, so that neighbours share their rounding
            start, end = end, start
        t = np.arange(length + 1)
        t = t[::-1] if backwards else t
        slope = (end[1 - along] - start[1 - along]) / length if length else 0.0
        line = [start[along] + t, np.trunc(start[1 - along] + slope * t + 0.5).astype(np.int64)]
        xs.append(line[along])
        ys.append(line[1 - along])
    return np.concatenate(xs), np.concatenate(ys)
