"""What an annotation is, whatever program made it: the name of its photo, and a way to paint its classes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from common.errors import UserError
from splits.prepare.masks import Bool, fill_polygon

Key = str | int | tuple[int, int, int]  # a class: by name, by stored value, by colour
Canvas = np.ndarray[Any, np.dtype[np.uint16]]
Points = np.ndarray[Any, np.dtype[np.float64]]
Pair = tuple[float, float] | Points  # x, y
Note = Callable[[str], None]
Paint = Callable[[int, int, Note], tuple[Canvas, list[Key]]]
Region = Callable[[int, int], Bool]
Fill = Callable[[Points, int, int], Bool]

UNPAINTED = ""  # the key of pixels that no shape covers
VOID = "void"  # a key of pixels that count nowhere
FAR = 4  # outlines may reach so many photos beyond the border; further ones are mistakes that take memory


@dataclass(frozen=True)
class Annotation:
    """What some file says of one photo.

    Attributes:
        photo: Name of the photo as the file gives it, with or without folders and ending.
        source: The file, and the place in it, for messages.
        paint: (height, width, where remarks go) -> numbers (H, W), and the class that each of them stands for. Raises
            `UserError` where the annotation does not fit a photo of that size.
    """

    photo: str
    source: str
    paint: Paint


@dataclass(frozen=True)
class Shape:
    """One object of a class: outlines, points (N, 2) as x, y, or a function from the photo's size to a region."""

    label: str
    outlines: tuple[Points, ...] = ()
    region: Region | None = None


def paint_shapes(
    shapes: Sequence[Shape], size: tuple[int, int] | None = None, fill: Fill | None = None
) -> Paint:
    """A function that paints shapes one over the other, in their order.

    Args:
        shapes: All of one photo.
        size: Height and width of the photo they were drawn on, where the file says it.
        fill: (points, height, width) -> region of an outline; None takes `fill_outline`.
    """

    def paint(height: int, width: int, note: Note) -> tuple[Canvas, list[Key]]:
        require_size(size, height, width)
        keys: list[Key] = list(dict.fromkeys([UNPAINTED, *(shape.label for shape in shapes)]))
        canvas: Canvas = np.zeros((height, width), dtype=np.uint16)
        for number, shape in enumerate(shapes, start=1):
            name, limits = f"shape {number} ('{shape.label}')", FAR * max(height, width)
            if any(len(line) < 3 or not (np.abs(line) <= limits).all() for line in shape.outlines):
                note(f"{name} is no outline of three or more points near the photo; left out")
                continue
            regions = [(fill or fill_outline)(line, height, width) for line in shape.outlines]
            region = shape.region(height, width) if shape.region else np.logical_or.reduce(regions)
            if not region.any():
                note(f"{name} covers no pixel of the photo ({width}x{height}); left out")
            elif any((line < -1).any() or (line > [width + 1, height + 1]).any() for line in shape.outlines):
                note(f"{name} reaches beyond the photo ({width}x{height}); cut at its border")
            canvas[region] = keys.index(shape.label)
        return canvas, keys

    return paint


def require_size(size: tuple[int, int] | None, height: int, width: int) -> None:
    """Refuse an annotation that was drawn on a photo of another size (H, W)."""
    if size is not None and size != (height, width):
        raise UserError(
            f"was drawn on a photo of {size[1]}x{size[0]} pixels, this one has {width}x{height}; "
            + ("give --orientation stored, or " if size == (width, height) else "")
            + "restore the photo it was drawn on"
        )


@contextlib.contextmanager
def noting(note: Note, where: str) -> Iterator[None]:
    """Turns what a damaged annotation raises into a remark, so that the others are read."""
    try:
        yield
    except UserError as error:
        note(f"{where}: {error}")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OSError) as error:
        reason = f"without {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        note(f"{where}: damaged ({reason}); left out")


def fill_outline(points: Points, height: int, width: int) -> Bool:
    """The pixels of an outline (N, 2), as COCO's tools fill it: those whose centre lies within, pixel 0 from 0 to 1.

    An outline that steps from pixel to pixel, as contours of masks do, includes the pixels it runs through, so that
    tracing a mask and filling the outline gives the mask.
    """
    whole = np.rint(points)
    steps = np.abs(np.diff(whole, axis=0, append=whole[:1]))
    traced = np.abs(points - whole).max() < 0.001 and len(points) > 4
    if traced and ((steps.min(axis=1) == 0) | (steps[:, 0] == steps[:, 1])).all():
        region = np.zeros((height, width), dtype=np.uint8)
        return cv2.fillPoly(region, [whole.astype(np.int32)], 1) > 0
    return fill_polygon(points, height, width)


def ellipse(middle: Pair, radii: Pair, degrees: float = 0.0) -> Points:
    """An outline of 90 points (90, 2), turned clockwise."""
    turn = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    points = np.stack([np.cos(turn), np.sin(turn)], axis=1) * radii + np.asarray(middle)
    return rotated(points, middle, degrees)


def rectangle(left: float, top: float, right: float, bottom: float) -> Points:
    """The corners (4, 2) of an upright rectangle."""
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom]], dtype=np.float64)


def rotated(points: Points, around: Pair, degrees: float) -> Points:
    """Points (N, 2) turned clockwise, as y points down."""
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    result: Points = (points - np.asarray(around)) @ turn + np.asarray(around)
    return result
