"""The evaluations of the authors and of the PaddleSeg port: scores of a whole image from windows.

Source: `furnace/engine/evaluator.py`; `infer.py` of the port's framework.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from common.config import IMAGENET_MEAN, IMAGENET_STD
from common.data.files import Uint8
from common.data.transforms import to_normalized
from common.distributed import to_device
from common.measure.evaluation import Protocol
from common.measure.inference import (
    Forward,
    Size,
    flip_average,
    multi_scale,
    pad_to_crop,
    scaled_size,
    sum_windows,
    visit_counts,
    whole_image,
    windows,
)
from common.models.deeplab import upsample

Triple = tuple[float, float, float]


def original_windows(
    forward: Forward,
    image: Tensor,
    crop: Size,
    stride: Size | None = None,
    *,
    black: Sequence[float],
    batch_size: int = 1,
) -> Tensor:
    """Scores (B, K, H, W) as the authors compute them at one scale.

    An image inside the window is padded to it with the mean colour. Any other is padded with black where one side is
    shorter than the window (QUIRK window_padding: before normalization, hence not the mean), and the windows' scores
    are summed, not averaged, which no best class depends on.

    Args:
        forward: scores of a batch of windows.
        image: normalized images (B, 3, H, W).
        crop: height and width of the windows.
        stride: steps down and across; None for two thirds of the window, rounded up.
        black: value of a black pixel in each channel of a normalized image.
        batch_size: windows per call of `forward`.

    Raises:
        UserError: a window, a step or the batch size makes no sense.
    """
    height, width = image.shape[-2:]
    starts = windows((height, width), crop, stride)
    if max(height, width) <= min(crop):
        padded, (top, left) = pad_to_crop(image, crop)
        scores = whole_image(forward, padded)
    else:
        padded, (top, left) = pad_to_crop(image, crop)
        inside, _ = pad_to_crop(torch.ones_like(image[:1, :1]), crop)
        level = to_device(torch.tensor(black, dtype=image.dtype), image.device).view(1, -1, 1, 1)
        padded = torch.where(inside > 0, padded, level)
        scores = sum_windows(forward, padded, starts, crop, batch_size=batch_size)
    return scores[..., top : top + height, left : left + width]


def flip_sum(forward: Forward) -> Forward:
    """A forward that adds the scores of its input and of the mirrored input, mirrored back."""

    def forward_both(image: Tensor) -> Tensor:
        return forward(image) + forward(image.flip(-1)).flip(-1)

    return forward_both


def original_scores(
    forward: Forward,
    image: Tensor,
    crop: Size,
    stride: Size | None = None,
    *,
    mean: Triple,
    std: Triple,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    batch_size: int = 1,
) -> Tensor:
    """Scores (B, K, H, W) of the authors' whole evaluation, summed over scales (float64 if they are not just 1).

    At scales other than 1 the 8-bit image is resized by OpenCV on the host, with the factor and not a size, whose
    positions and rounding are part of the result.

    Args:
        forward: scores of a batch of windows.
        image: normalized images (B, 3, H, W) at their own size.
        crop: height and width of the windows.
        stride: steps down and across; None for two thirds of the window, rounded up.
        mean: that the image is normalized with, of the three channels on the scale 0..255.
        std: likewise.
        scales: factors of the image's size.
        flip: add the scores of the mirrored windows.
        batch_size: windows per call of `forward`.

    Raises:
        UserError: a window, a step, a scale or the batch size makes no sense.
    """
    black = [-m / s for m, s in zip(mean, std, strict=True)]
    score = flip_sum(forward) if flip else forward
    total: Tensor | None = None
    for scale in scales:
        x = scaled_by_opencv(image, scale, mean, std)
        scores = original_windows(score, x, crop, stride, black=black, batch_size=batch_size)
        if len(scales) > 1 or scale != 1.0:
            scores = scores.double()  # float32 would misplace the sampled positions where scores are steep
        scores = upsample(scores, image.shape[-2:], align_corners=False)
        total = scores if total is None else total + scores
    assert total is not None
    return total


def scaled_by_opencv(image: Tensor, scale: float, mean: Triple, std: Triple) -> Tensor:
    """Normalized images (B, 3, h, w) whose 8-bit pictures are scaled by a factor; themselves at factor 1.

    Raises:
        UserError: nothing is left at this scale.
    """
    if scale == 1.0:
        return image
    scaled_size(image.shape[-2:], scale)  # OpenCV's rounding of the sides; refuses an empty image
    parts = []
    for one in image:
        picture = cv2.resize(
            unnormalized(one, mean, std), None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR
        )
        parts.append(to_normalized(picture, mean, std))
    return to_device(torch.stack(parts).to(image.dtype), image.device)


def unnormalized(image: Tensor, mean: Triple, std: Triple) -> Uint8:
    """The RGB picture (H, W, 3) uint8 of a normalized image (3, H, W); inverse of `to_normalized`."""
    values = image.detach().double().cpu().numpy().transpose(1, 2, 0)
    values = values * np.asarray(std) + np.asarray(mean)
    return np.ascontiguousarray(values.round().clip(0, 255).astype(np.uint8))


def port_geometry(size: Size, crop: Size, stride: Size | None = None) -> tuple[list[Size], Size]:
    """Starts (row, column) of the port's windows, row by row, and their size, at most that of the image.

    Args:
        size: height and width of the image, which is not padded.
        crop: height and width of the windows.
        stride: steps down and across; None for two thirds of the window, rounded up.

    Raises:
        UserError: a window or a step is not positive, or a step is larger than the window and leaves pixels out.
    """
    windows(crop, crop, stride)  # checks both
    inside = (min(size[0], crop[0]), min(size[1], crop[1]))
    step = None if stride is None else (min(stride[0], inside[0]), min(stride[1], inside[1]))
    return windows(size, inside, step), inside


def port_windows(
    forward: Forward, image: Tensor, crop: Size, stride: Size | None = None, *, batch_size: int = 1
) -> Tensor:
    """Scores (B, K, H, W) as the port computes them: nothing padded, averaged over the windows of each pixel.

    Args:
        forward: scores of a batch of windows.
        image: normalized images (B, 3, H, W).
        crop: height and width of the windows.
        stride: steps down and across; None for two thirds of the window, rounded up.
        batch_size: windows per call of `forward`.

    Raises:
        UserError: as `port_geometry`, or the batch size makes no sense.
    """
    size = (image.shape[-2], image.shape[-1])
    starts, inside = port_geometry(size, crop, stride)
    total = sum_windows(forward, image, starts, inside, batch_size=batch_size)
    return total / visit_counts(total, starts, inside)


@dataclass(frozen=True, kw_only=True)
class OriginalProtocol(Protocol):
    """The authors' evaluation; see `original_scores`.

    Attributes:
        mean, std: with which images are normalized, on the scale 0..255.
    """

    kind: str = "original"  # type: ignore[assignment]
    epsilon: float = 0.0
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD

    def scores(self, forward: Forward, image: Tensor) -> Tensor:
        """Scores (B, K, H, W) of normalized images (B, 3, H, W)."""
        assert self.crop_size is not None
        return original_scores(
            forward,
            image,
            self.crop_size,
            self.stride,
            mean=self.mean,
            std=self.std,
            scales=self.scales,
            flip=self.flip,
            batch_size=self.batch_size,
        )


@dataclass(frozen=True, kw_only=True)
class PortProtocol(Protocol):
    """The port's windows; several scales and the mirrored image are averaged as everywhere here."""

    kind: str = "port"  # type: ignore[assignment]
    epsilon: float = 0.0

    def scores(self, forward: Forward, image: Tensor) -> Tensor:
        """Scores (B, K, H, W) of normalized images (B, 3, H, W)."""

        def slide(x: Tensor) -> Tensor:
            assert self.crop_size is not None
            return port_windows(forward, x, self.crop_size, self.stride, batch_size=self.batch_size)

        score = flip_average(slide) if self.flip else slide
        return multi_scale(score, image, self.scales, align_corners=False)
