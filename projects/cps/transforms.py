"""The training transform of CPS.

It differs from the shared one in order and arithmetic: mirrored before scaled, 8-bit values resized by OpenCV, and
padded after the crop, so that the border lies around what the crop kept.

Source: `dataloader.py` of the experiments and `furnace/utils/img_utils.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.data.spec import IGNORE
from common.data.transforms import Triple, draw_scale, pad_to, to_normalized

Array = NDArray[Any]
Size = tuple[int, int]


@dataclass(frozen=True)
class CpsTransform:
    """Mirror, scale, crop, normalize and pad a training sample, labeled or unlabeled.

    Attributes:
        mean: RGB mean on the scale 0..255.
        std: RGB standard deviation on the scale 0..255.
        crop_size: (rows, columns) of the result.
        scales: factors of the resize, one of which is drawn; None draws from `scale_range`.
        scale_range: range around 1 of a continuous factor, drawn as by `common.data.transforms.draw_scale`; with
            `scales` None too, the size stays (and nothing is drawn).
        flip: mirror one half of the samples.
        inclusive_crop: QUIRK quirks.inclusive_crop: the last crop position lies one pixel too far, so one crop in
            (side - crop + 2) is a row (column) short and gets a padded one at its end.
        resize: fixed (rows, columns) before everything else; None: as stored.
    """

    mean: Triple
    std: Triple
    crop_size: Size
    scales: Sequence[float] | None = (0.5, 0.75, 1.0, 1.5, 1.75, 2.0)
    scale_range: tuple[float, float] | None = None
    flip: bool = True
    inclusive_crop: bool = True
    resize: Size | None = None

    def __call__(self, image: Array, label: Array | None, rng: Random, /) -> tuple[Tensor, Tensor | None]:
        """Float32 image (3, h, w) and int64 label (h, w) of the crop size; None for a photo without mask.

        `image` is RGB uint8 (H, W, 3), `label` uint8 (H, W) train ids. Random, in order: mirror, factor, row,
        column; the last two only where the image is larger than the crop.
        """
        mirror = self.flip and rng.random() >= 0.5
        scale = self._draw_scale(rng)
        size = scaled(self.resize or (image.shape[0], image.shape[1]), scale)
        row, col = (
            self._draw_start(rng, length, crop) for length, crop in zip(size, self.crop_size, strict=True)
        )
        return self.apply(image, label, mirror, scale, row, col)

    def apply(
        self, image: Array, label: Array | None, mirror: bool, scale: float, row: int, col: int
    ) -> tuple[Tensor, Tensor | None]:
        """The result of given draws: `row` and `col` are the crop's first pixel in the scaled image.

        The image is padded with 0 after normalization, which is the mean colour, and the label with 255, what the
        crop kept in the centre (an odd pixel goes right or bottom).
        """
        rows, cols = (
            slice(start, start + crop) for start, crop in zip((row, col), self.crop_size, strict=True)
        )

        def cut(values: Array, interpolation: int) -> Array:
            if self.resize is not None:
                values = _resized(values, self.resize, interpolation)
            if mirror:
                values = cv2.flip(values, 1)
            size = scaled((values.shape[0], values.shape[1]), scale)
            return _resized(values, size, interpolation)[rows, cols]

        x = to_normalized(cut(image, cv2.INTER_LINEAR), self.mean, self.std)
        if label is None:
            return pad_to(x, x[0], self.crop_size, IGNORE)[0], None
        y = torch.from_numpy(np.ascontiguousarray(cut(label, cv2.INTER_NEAREST))).long()
        return pad_to(x, y, self.crop_size, IGNORE)

    def _draw_scale(self, rng: Random) -> float:
        if self.scales is not None:
            return rng.choice(self.scales)
        return 1.0 if self.scale_range is None else draw_scale(rng, self.scale_range)

    def _draw_start(self, rng: Random, length: int, crop: int) -> int:
        if length <= crop:
            return 0
        last = length - crop + self.inclusive_crop
        return rng.randint(0, min(last, length - 1))  # a crop of one pixel would otherwise miss the image


def scaled(size: Size, scale: float) -> Size:
    """(rows, columns) of an image after scaling: truncated, at least one pixel."""
    return max(int(size[0] * scale), 1), max(int(size[1] * scale), 1)


def _resized(values: Array, size: Size, interpolation: int) -> Array:
    if size == values.shape[:2]:
        return values
    return cv2.resize(values, size[::-1], interpolation=interpolation)
