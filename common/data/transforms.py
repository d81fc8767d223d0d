"""Joint image and label transforms with explicit random draws (original: `dataset/augmentation.py` of U2PL).

Images enter as RGB uint8 (H, W, 3) and leave as normalized float32 (3, h, w); mean and std are on the scale 0..255.
Resizing is bilinear for images (half-pixel centres, no antialias) and, for labels, takes the source index
floor(target index * in / out). Where no rotation or blur stands in between, only the pixels that the crop keeps are
evaluated, at the coordinates that they have in the whole resized image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from common.data.spec import IGNORE

BLUR_SIGMA = 1.1
BLUR_SIZE = 5

Array = NDArray[Any]
Triple = tuple[float, float, float]


def to_normalized(image: Array, mean: Triple, std: Triple) -> Tensor:
    """Float32 tensor (3, H, W) of an RGB image uint8 (H, W, 3): (value - mean) / std, all on the scale 0..255."""
    planes = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float()
    return planes.sub_(_per_channel(mean)).div_(_per_channel(std))


def draw_scale(rng: Random, scale_range: tuple[float, float]) -> float:
    """Random resize factor: with probability one half below 1, else above (two draws: branch, then amount).

    `scale_range` is (low, high) with low <= 1 <= high.
    """
    low, high = scale_range
    shrink = rng.random() < 0.5
    amount = rng.random()
    return low + (1 - low) * amount if shrink else 1 + (high - 1) * amount


def rotate(image: Tensor, label: Tensor, degrees: float) -> tuple[Tensor, Tensor]:
    """Image (3, H, W) and label (H, W) turned by `degrees` in normalized coordinates, as the original does.

    Non-square images are therefore sheared. Outside the image: value 0 (mean colour) and label 255.
    """
    angle = math.radians(degrees)
    theta = torch.tensor([[math.cos(angle), math.sin(angle), 0.0], [-math.sin(angle), math.cos(angle), 0.0]])
    grid = F.affine_grid(theta[None], [1, 1, *label.shape], align_corners=False)
    turned = F.grid_sample(image[None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    shifted = (label - IGNORE).float()[None, None]  # zero then means "ignore", which is what lies outside
    nearest = F.grid_sample(shifted, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return turned[0], nearest[0, 0].to(label.dtype) + IGNORE


def blur(image: Tensor) -> Tensor:
    """Image (3, H, W) after the original's fixed 5x5 Gaussian kernel, zeros outside."""
    kernel = blur_kernel().to(image.dtype).expand(image.shape[0], 1, BLUR_SIZE, BLUR_SIZE)
    return F.conv2d(image[None], kernel, padding=BLUR_SIZE // 2, groups=image.shape[0])[0]


@lru_cache(maxsize=1)
def blur_kernel() -> Tensor:
    """The kernel (5, 5): a unit impulse filtered inside the 5x5 window with reflecting borders, so it sums to 1."""
    from scipy.ndimage import gaussian_filter

    impulse = np.zeros((BLUR_SIZE, BLUR_SIZE))
    impulse[BLUR_SIZE // 2, BLUR_SIZE // 2] = 1
    return torch.from_numpy(gaussian_filter(impulse, BLUR_SIGMA))


def pad_to(image: Tensor, label: Tensor, size: tuple[int, int], pad_label: int) -> tuple[Tensor, Tensor]:
    """Image and label padded to at least `size`, the image centred (an odd pixel goes right or bottom).

    The image is padded with 0, which is the mean colour; the label with `pad_label`.
    """
    (height, width), (target_h, target_w) = label.shape, size
    rows, cols = max(target_h - height, 0), max(target_w - width, 0)
    sides = (cols // 2, cols - cols // 2, rows // 2, rows - rows // 2)
    return F.pad(image, sides), F.pad(label, sides, value=pad_label)


def crop(
    image: Tensor, label: Tensor, offset: tuple[int, int], size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The window of `size` at `offset` (row, column) of image (3, H, W) and label (H, W)."""
    rows, cols = (slice(start, start + length) for start, length in zip(offset, size, strict=True))
    return image[:, rows, cols], label[rows, cols]


def draw_offset(rng: Random, size: tuple[int, int], crop_size: tuple[int, int]) -> tuple[int, int]:
    """Random crop position (row, column) in the image of `size` padded to `crop_size`; two draws, row first."""
    row = rng.randint(0, max(size[0] - crop_size[0], 0))
    return row, rng.randint(0, max(size[1] - crop_size[1], 0))


@dataclass(frozen=True)
class TrainTransform:
    """Random resize, rotation, blur, flip and crop of a training sample, drawn in the original's order.

    Attributes:
        mean: RGB mean on the scale 0..255.
        std: RGB standard deviation on the scale 0..255.
        crop_size: (rows, columns) of the result.
        scale_range: range of the random resize factor around 1; None leaves the size (and takes no draws).
        flip: mirror one half of the samples.
        pad_label: label of pixels added where the image is smaller than the crop.
        rotation: range of angles in degrees; None: no rotation, no draw.
        blur: blur one half of the samples.
        resize: fixed (rows, columns) before everything else; None: as stored.
    """

    mean: Triple
    std: Triple
    crop_size: tuple[int, int]
    scale_range: tuple[float, float] | None = (0.5, 2.0)
    flip: bool = True
    pad_label: int = IGNORE
    rotation: tuple[float, float] | None = None
    blur: bool = False
    resize: tuple[int, int] | None = None

    def __call__(self, image: Array, label: Array | None, rng: Random, /) -> tuple[Tensor, Tensor | None]:
        """Float32 image (3, h, w) and int64 label (h, w) of the crop size; None for a photo without mask.

        `image` is RGB uint8 (H, W, 3), `label` uint8 (H, W) train ids. Random, in order: resize branch and
        amount, angle, blur, flip, row, column.
        """
        if self.resize is not None:
            image, label = _resample(image, label, self.resize)
        height, width = image.shape[:2]
        size = (height, width)
        if self.scale_range is not None:
            scale = draw_scale(rng, self.scale_range)
            size = (int(height * scale), int(width * scale))
        if self.rotation is not None or self.blur:
            return self._turned_or_blurred(image, label, size, rng)
        mirrored = self.flip and rng.random() < 0.5
        window = _Window(size, draw_offset(rng, size, self.crop_size), self.crop_size, mirrored)
        y = None if label is None else _cut_label(label, (height, width), window, self.pad_label)
        return _cut_image(image, window, self.mean, self.std), y

    def _turned_or_blurred(
        self, image: Array, label: Array | None, size: tuple[int, int], rng: Random
    ) -> tuple[Tensor, Tensor | None]:
        """The rest of `__call__` where pixels outside the crop decide on those inside: on the whole resized image."""
        whole = _Window(size, (0, 0), size, mirrored=False)
        x = _cut_image(image, whole, self.mean, self.std)
        y = x[0] if label is None else _cut_label(label, label.shape, whole, self.pad_label)
        if self.rotation is not None:
            low, high = self.rotation
            x, y = rotate(x, y, low + (high - low) * rng.random())
        if self.blur and rng.random() < 0.5:
            x = blur(x)
        if self.flip and rng.random() < 0.5:
            x, y = x.flip(-1), y.flip(-1)
        x, y = crop(
            *pad_to(x, y, self.crop_size, self.pad_label),
            draw_offset(rng, size, self.crop_size),
            self.crop_size,
        )
        return x.contiguous(), None if label is None else y.contiguous()


@dataclass(frozen=True)
class EvalTransform:
    """Normalization of a whole image and, if asked, a fixed resize.

    Attributes:
        mean: RGB mean on the scale 0..255.
        std: RGB standard deviation on the scale 0..255.
        resize: fixed (rows, columns); None: as stored.
    """

    mean: Triple
    std: Triple
    resize: tuple[int, int] | None = None

    def __call__(
        self, image: Array, label: Array | None, _rng: Random | None = None, /
    ) -> tuple[Tensor, Tensor]:
        """Float32 image (3, h, w) and int64 label (h, w) of RGB uint8 (H, W, 3) and train ids uint8 (H, W).

        A photo without mask has the label 255 everywhere. Nothing is random; the third argument only makes the
        two transforms interchangeable.
        """
        if self.resize is not None:
            image, label = _resample(image, label, self.resize)
        x = to_normalized(image, self.mean, self.std)
        return x, torch.full(x.shape[1:], IGNORE) if label is None else torch.from_numpy(label).long()


class _Window(NamedTuple):
    """A crop of the resized, then mirrored, then padded image."""

    size: tuple[int, int]  # of the resized image
    offset: tuple[int, int]  # of the crop in the padded image
    crop_size: tuple[int, int]
    mirrored: bool

    def targets(self, axis: int) -> tuple[int, NDArray[np.int64]]:
        """First crop position that holds image (not padding) along `axis`, and the resized-image indices there."""
        length, crop_length = self.size[axis], self.crop_size[axis]
        start = self.offset[axis] - max(crop_length - length, 0) // 2
        first, last = max(start, 0), min(start + crop_length, length)
        indices = np.arange(first, last)
        if self.mirrored and axis == 1:
            indices = length - 1 - indices
        return first - start, indices


class _Taps(NamedTuple):
    """The two source indices and the weight of the second one, for each target index of an axis."""

    low: NDArray[np.int64]
    high: NDArray[np.int64]
    weight: NDArray[np.float32]


def _bilinear_taps(old: int, new: int, targets: NDArray[np.int64]) -> _Taps:
    scale = np.float64(np.float32(old) / np.float32(new))
    # one float32 rounding at the end, like the fused multiply-add of torch's kernel for three channels
    real = np.maximum((scale * (targets + 0.5) - 0.5).astype(np.float32), np.float32(0))
    low = real.astype(np.int64)
    return _Taps(low, np.minimum(low + 1, old - 1), real - low.astype(np.float32))


def _nearest_indices(old: int, new: int, targets: NDArray[np.int64]) -> NDArray[np.int64]:
    scale = np.float32(old) / np.float32(new)  # float32 throughout, as in torch: it decides ties
    indices: NDArray[np.int64] = np.minimum((targets.astype(np.float32) * scale).astype(np.int64), old - 1)
    return indices


def _interpolate(planes: Array, taps: _Taps, axis: int) -> NDArray[np.float32]:
    """Planes (3, H, W) sampled along `axis` (1 or 2), float32."""
    first = planes.take(taps.low, axis=axis, mode="clip").astype(np.float32, copy=False)
    result: NDArray[np.float32] = planes.take(taps.high, axis=axis, mode="clip").astype(
        np.float32, copy=False
    )
    result -= first
    result *= taps.weight if axis == 2 else taps.weight[:, None]
    result += first
    return result


def _cut_planes(image: Array, size: tuple[int, int], rows: Array, cols: Array) -> NDArray[np.float32]:
    """Pixels at `rows` and `cols` of the image (H, W, 3) as if resized to `size`: float32 (3, rows, cols)."""
    height, width = image.shape[:2]
    if size == (height, width):
        step = 1 if len(cols) < 2 or cols[0] < cols[-1] else -1
        part = image[rows[0] : rows[-1] + 1, min(cols[0], cols[-1]) : max(cols[0], cols[-1]) + 1][:, ::step]
        return np.ascontiguousarray(part.transpose(2, 0, 1)).astype(np.float32)
    vertical, horizontal = _bilinear_taps(height, size[0], rows), _bilinear_taps(width, size[1], cols)
    top, left = vertical.low.min(), horizontal.low.min()
    bottom, right = vertical.high.max() + 1, horizontal.high.max() + 1
    planes = np.ascontiguousarray(image[top:bottom, left:right].transpose(2, 0, 1))
    steps = [
        (1, _Taps(vertical.low - top, vertical.high - top, vertical.weight)),
        (2, _Taps(horizontal.low - left, horizontal.high - left, horizontal.weight)),
    ]
    if (bottom - top) * len(cols) < len(rows) * (
        right - left
    ):  # the axis that shrinks the data most goes first
        steps.reverse()
    for axis, taps in steps:
        planes = _interpolate(planes, taps, axis)
    return planes


def _cut_image(image: Array, window: _Window, mean: Triple, std: Triple) -> Tensor:
    """Normalized crop (3, h, w) of an image (H, W, 3), padded with 0."""
    (top, rows), (left, cols) = window.targets(0), window.targets(1)
    planes = torch.from_numpy(_cut_planes(image, window.size, rows, cols))
    planes.sub_(_per_channel(mean)).div_(_per_channel(std))
    if tuple(planes.shape[1:]) == window.crop_size:
        return planes
    padded = planes.new_zeros((3, *window.crop_size))
    padded[:, top : top + len(rows), left : left + len(cols)] = planes
    return padded


def _cut_label(label: Array, size: tuple[int, int], window: _Window, pad_label: int) -> Tensor:
    """Label crop int64 (h, w) of a label map stored at `size`, padded with `pad_label`."""
    (top, rows), (left, cols) = window.targets(0), window.targets(1)
    source = [
        _nearest_indices(old, new, targets)
        for old, new, targets in zip(size, window.size, (rows, cols), strict=True)
    ]
    part = torch.from_numpy(label.take(source[0], axis=0).take(source[1], axis=1))
    if tuple(part.shape) == window.crop_size:
        return part.long()
    padded = torch.full(window.crop_size, pad_label)
    padded[top : top + len(rows), left : left + len(cols)] = part
    return padded


def _resample(image: Array, label: Array | None, size: tuple[int, int]) -> tuple[Array, Array | None]:
    """Image (H, W, 3) as float32 on its scale and label (H, W), resized."""
    rows, cols = np.arange(size[0]), np.arange(size[1])
    resized = _cut_planes(image, size, rows, cols).transpose(1, 2, 0)
    if label is not None:
        height, width = label.shape
        label = label.take(_nearest_indices(height, size[0], rows), axis=0)
        label = label.take(_nearest_indices(width, size[1], cols), axis=1)
    return resized, label


def _per_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None, None]
