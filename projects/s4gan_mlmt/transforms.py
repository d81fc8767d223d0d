"""The authors' three pipelines: what they make of an image and its label for training and for evaluation.

Images enter as RGB uint8 (H, W, 3), label maps as uint8 (H, W) train ids with 255 for ignored pixels. All draws come
from the sample's own generator, in the authors' order.

Source: `data/voc_dataset.py`, `data/pascal_context_loader.py`, `data/city_loader.py` and `data/city_utils.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any, Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from common.data.spec import IGNORE
from common.data.transforms import to_normalized
from common.errors import UserError
from projects.s4gan_mlmt.config import CITYSCAPES, CONTEXT, VOC, Statistics

Array = NDArray[Any]
Size = tuple[int, int]
Order = Literal["rgb", "bgr"]


CONTEXT_BASE = 505
VOC_EVALUATION: Size = (505, 505)
CONTEXT_EVALUATION = 512
CITYSCAPES_EVALUATION: Size = (512, 1024)


@dataclass(frozen=True)
class VocTransform:
    """Training sample of Pascal VOC: a random crop; scaling and mirroring are options that are off by default.

    Attributes:
        crop_size: (rows, columns) of the result. Smaller images are padded below and on the right: with 0 after the
            mean is subtracted, and with label 255.
        random_scale: resize by one of 0.5, 0.6 ... 1.6, the 8-bit values by OpenCV.
        random_mirror: mirror one half of the samples.
        statistics: subtracted mean and standard deviation.
    """

    crop_size: Size
    random_scale: bool = False
    random_mirror: bool = False
    statistics: Statistics = VOC

    def __call__(self, image: Array, label: Array | None, rng: Random, /) -> tuple[Tensor, Tensor | None]:
        """Float32 image (3, h, w), RGB, and int64 label (h, w); None for a photo without mask.

        Random, in order: factor (0..11), row, column, mirror (0 does).
        """
        if self.random_scale:
            factor = 0.5 + rng.randint(0, 11) / 10.0
            image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR)
            if label is not None:
                label = cv2.resize(label, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
        (height, width), (crop_h, crop_w) = image.shape[:2], self.crop_size
        row = rng.randint(0, max(height - crop_h, 0))
        col = rng.randint(0, max(width - crop_w, 0))
        window = (slice(row, row + crop_h), slice(col, col + crop_w))
        x = padded(to_normalized(image[window], *self.statistics), self.crop_size)
        y = None if label is None else _labels(label[window], self.crop_size)
        if self.random_mirror and rng.randint(0, 1) == 0:
            x, y = x.flip(-1), None if y is None else y.flip(-1)
        return x.contiguous(), None if y is None else y.contiguous()


@dataclass(frozen=True)
class ContextTransform:
    """Training sample of PASCAL-Context: mirrored, resized, cropped, perhaps blurred; 8-bit values by Pillow.

    Attributes:
        crop_size: (rows, columns) of the result. Smaller images are padded below and on the right with black.
        base_size: the short side is drawn between its half and its double.
        statistics: mean and standard deviation.
        pad_label: label of the padding. QUIRK quirks.context_padding: class 0, which counts in the loss; 255 would
            leave it out.
    """

    crop_size: Size
    base_size: int = CONTEXT_BASE
    statistics: Statistics = CONTEXT
    pad_label: int = 0

    def __call__(self, image: Array, label: Array | None, rng: Random, /) -> tuple[Tensor, Tensor | None]:
        """Float32 image (3, h, w) and int64 label (h, w); None for a photo without mask.

        Random, in order: mirror (below a half does), short side, column, row, blur (below a half does), its radius.
        """
        rgb, mask = self.picture(image, label, rng)
        x = to_normalized(np.asarray(rgb), *self.statistics)
        return x, None if mask is None else _labels(np.asarray(mask), self.crop_size)

    def picture(
        self, image: Array, label: Array | None, rng: Random, /
    ) -> tuple[Image.Image, Image.Image | None]:
        """The same before normalization: pictures of 8 bits of the crop size."""
        parts = [Image.fromarray(image), *([] if label is None else [Image.fromarray(label)])]
        if rng.random() < 0.5:
            parts = [part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for part in parts]
        short = rng.randint(int(self.base_size * 0.5), int(self.base_size * 2.0))
        size = with_short_side(parts[0].size, short, width_is_long=parts[0].height <= parts[0].width)
        parts = _resized(parts, size)
        (width, height), (crop_h, crop_w) = size, self.crop_size
        if width < crop_w or height < crop_h:
            border = (0, 0, max(crop_w - width, 0), max(crop_h - height, 0))
            fills = (0, self.pad_label)
            parts = [ImageOps.expand(part, border, fill) for part, fill in zip(parts, fills, strict=False)]
            width, height = parts[0].size
        left, top = rng.randint(0, width - crop_w), rng.randint(0, height - crop_h)
        parts = [part.crop((left, top, left + crop_w, top + crop_h)) for part in parts]
        rgb = parts[0]
        if rng.random() < 0.5:
            rgb = rgb.filter(ImageFilter.GaussianBlur(radius=rng.random()))
        return rgb, parts[1] if len(parts) > 1 else None


@dataclass(frozen=True)
class CityscapesTransform:
    """Training sample of Cityscapes: half the size, cropped, mirrored.

    Attributes:
        crop_size: (rows, columns) of the result.
        statistics: mean and standard deviation of R, G and B.
        order: of the channels of the result; the authors' networks learn from B, G, R.
    """

    crop_size: Size
    statistics: Statistics = CITYSCAPES
    order: Order = "bgr"

    def __call__(self, image: Array, label: Array | None, rng: Random, /) -> tuple[Tensor, Tensor | None]:
        """Float32 image (3, h, w) and int64 label (h, w); None for a photo without mask.

        Random, in order: column, row, mirror (below a half does).

        Raises:
            UserError: half the image is smaller than the crop.
        """
        (height, width), (crop_h, crop_w) = (side // 2 for side in image.shape[:2]), self.crop_size
        if height < crop_h or width < crop_w:
            raise UserError(
                f"data.crop_size=[{crop_h}, {crop_w}]: larger than half an image of {image.shape[0]}x"
                f"{image.shape[1]}; lower it, or set data.pipeline=house"
            )
        left, top = rng.randint(0, width - crop_w), rng.randint(0, height - crop_h)
        parts = [Image.fromarray(image), *([] if label is None else [Image.fromarray(label)])]
        parts = _halved(parts, (left, top, left + crop_w, top + crop_h))
        if rng.random() < 0.5:
            parts = [part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for part in parts]
        x = _ordered(to_normalized(np.asarray(parts[0]), *self.statistics), self.order)
        return x, _labels(np.asarray(parts[1]), self.crop_size) if len(parts) > 1 else None


@dataclass(frozen=True)
class ContextEvaluation:
    """Evaluation sample of PASCAL-Context: the short side resized to `size`, the centre square cut out.

    Attributes:
        size: side of the square.
        statistics: mean and standard deviation.
    """

    size: int = CONTEXT_EVALUATION
    statistics: Statistics = CONTEXT

    def __call__(
        self, image: Array, label: Array | None, _rng: Random | None = None, /
    ) -> tuple[Tensor, Tensor]:
        """Float32 image (3, size, size) and int64 label (size, size); 255 everywhere for a photo without mask."""
        rgb, mask = self.picture(image, label)
        x = to_normalized(np.asarray(rgb), *self.statistics)
        return x, _labels(None if mask is None else np.asarray(mask), (self.size, self.size))

    def picture(self, image: Array, label: Array | None) -> tuple[Image.Image, Image.Image | None]:
        """The same before normalization."""
        parts = [Image.fromarray(image), *([] if label is None else [Image.fromarray(label)])]
        size = with_short_side(parts[0].size, self.size, width_is_long=parts[0].width > parts[0].height)
        left, top = (round((side - self.size) / 2.0) for side in size)  # half to even, as the original rounds
        box = (left, top, left + self.size, top + self.size)
        parts = [part.crop(box) for part in _resized(parts, size)]
        return parts[0], parts[1] if len(parts) > 1 else None


@dataclass(frozen=True)
class CityscapesEvaluation:
    """Evaluation sample of Cityscapes: image and label resized to a fixed size, half the original one.

    Attributes:
        size: (rows, columns) of the result.
        statistics: mean and standard deviation of R, G and B.
        order: of the channels of the result.
    """

    size: Size = CITYSCAPES_EVALUATION
    statistics: Statistics = CITYSCAPES
    order: Order = "bgr"

    def __call__(
        self, image: Array, label: Array | None, _rng: Random | None = None, /
    ) -> tuple[Tensor, Tensor]:
        """Float32 image (3, h, w) and int64 label (h, w); 255 everywhere for a photo without mask."""
        parts = [Image.fromarray(image), *([] if label is None else [Image.fromarray(label)])]
        parts = _resized(parts, (self.size[1], self.size[0]))
        x = _ordered(to_normalized(np.asarray(parts[0]), *self.statistics), self.order)
        return x, _labels(np.asarray(parts[1]) if len(parts) > 1 else None, self.size)


def with_short_side(size: Size, short: int, *, width_is_long: bool) -> Size:
    """(width, height) of an image scaled so that its short side is `short`; the other one is truncated.

    Args:
        size: (width, height) of the image.
        short: length of its short side afterwards.
        width_is_long: which side the other one is.
    """
    width, height = size
    if width_is_long:
        return int(1.0 * width * short / height), short
    return short, int(1.0 * height * short / width)


def padded(image: Tensor, size: Size) -> Tensor:
    """Images (..., H, W) padded with 0 below and on the right to at least `size`."""
    height, width = image.shape[-2:]
    below, right = max(size[0] - height, 0), max(size[1] - width, 0)
    return torch.nn.functional.pad(image, (0, right, 0, below)) if below or right else image


def _labels(label: Array | None, size: Size) -> Tensor:
    """Int64 labels of `size`, 255 below and on the right of a smaller map and everywhere without one."""
    target = torch.full(size, IGNORE)
    if label is not None:
        target.numpy()[: label.shape[0], : label.shape[1]] = label
    return target


def _resized(parts: list[Image.Image], size: Size) -> list[Image.Image]:
    """Picture and mask at (width, height): bilinear with Pillow's averaging of what shrinks, and nearest."""
    methods = (Image.Resampling.BILINEAR, Image.Resampling.NEAREST)
    return [part.resize(size, method) for part, method in zip(parts, methods, strict=False)]


def _halved(parts: list[Image.Image], box: tuple[int, int, int, int]) -> list[Image.Image]:
    """The part `box` (left, top, right, bottom) of picture and mask at half their size.

    Of images with even sides only the pixels that matter are resized: the weights are those of the whole image.
    """
    width, height = parts[0].size
    if width % 2 or height % 2:
        return [part.crop(box) for part in _resized(parts, (width // 2, height // 2))]
    left, top, right, bottom = box
    source, size = (2 * left, 2 * top, 2 * right, 2 * bottom), (right - left, bottom - top)
    methods = (Image.Resampling.BILINEAR, Image.Resampling.NEAREST)
    return [part.resize(size, method, source) for part, method in zip(parts, methods, strict=False)]


def _ordered(image: Tensor, order: Order) -> Tensor:
    return image.flip(0) if order == "bgr" else image
