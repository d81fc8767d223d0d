"""Pictures of the report as data URIs that together stay within a given size."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from splits.pictures import colorize
from studies.pictures import IGNORED_COLOR, Gallery, Picture, Uint8

BUDGET = 1_300_000  # characters of all pictures of a page
SIDES = (512, 448, 384, 320, 256, 208, 160, 128)  # longest sides in pixels, tried until the budget holds
LOSSLESS_SIDE = 128  # photos up to this size are embedded without loss
WRONG_COLOR = (255, 96, 32, 255)  # RGBA; on a grey photo nobody takes it for part of the scene
UNCOUNTED_COLOR = (128, 128, 128, 170)


@dataclass(frozen=True)
class Tiles:
    """One evaluation image as data URIs.

    Attributes:
        width, height: of the pictures, in pixels.
        photo: the image.
        truth: its classes in their colours.
        predictions: the same by label of the method.
        errors: what to lay over the photo, by label: wrong pixels, those not counted, and nothing where it is right.
    """

    width: int
    height: int
    photo: str
    truth: str
    predictions: dict[str, str]
    errors: dict[str, str]

    @property
    def size(self) -> int:
        """Characters of all of it."""
        texts = [self.photo, self.truth, *self.predictions.values(), *self.errors.values()]
        return sum(len(text) for text in texts)


def data_uri(picture: Uint8, *, lossless: bool) -> str:
    """An RGB or RGBA picture (H, W, 3 or 4) as the data URI of a WebP file."""
    file = io.BytesIO()
    image = Image.fromarray(picture)
    if lossless:
        image.save(file, "WEBP", lossless=True, quality=100, method=4)
    else:
        image.save(file, "WEBP", quality=82, method=4)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def shrink(picture: Uint8, side: int, *, smooth: bool) -> Uint8:
    """The picture (H, W) or (H, W, C) with its longest side at most `side`; ids are picked, colours averaged."""
    height, width = picture.shape[:2]
    factor = side / max(height, width)
    if factor >= 1:
        return picture
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    method = cv2.INTER_AREA if smooth else cv2.INTER_NEAREST
    return np.asarray(cv2.resize(picture, size, interpolation=method), np.uint8)


def tiles_of(picture: Picture, palette: Uint8, side: int) -> Tiles:
    """One image with its longest side at most `side` pixels; `palette` (K, 3)."""

    def mask(ids: Uint8) -> str:
        return data_uri(colorize(shrink(ids, side, smooth=False), palette, IGNORED_COLOR), lossless=True)

    photo = shrink(picture.photo, side, smooth=True)
    colors = np.array([(0, 0, 0, 0), WRONG_COLOR, UNCOUNTED_COLOR], np.uint8)
    return Tiles(
        photo.shape[1],
        photo.shape[0],
        data_uri(photo, lossless=max(photo.shape[:2]) <= LOSSLESS_SIDE),
        mask(picture.truth),
        {label: mask(ids) for label, ids in picture.predictions.items()},
        {
            label: data_uri(colors[shrink(picture.errors(label), side, smooth=False)], lossless=True)
            for label in picture.predictions
        },
    )


def all_tiles(gallery: Gallery, budget: int = BUDGET, sides: Sequence[int] = SIDES) -> list[Tiles]:
    """Every picture of the gallery, as large as the budget allows; the smallest of `sides` is taken in any case."""
    for side in sides:
        found = []
        for picture in gallery.pictures:
            found.append(tiles_of(picture, gallery.palette, side))
            if sum(tiles.size for tiles in found) > budget and side != sides[-1]:
                break  # too much already
        else:
            return found
    return []
