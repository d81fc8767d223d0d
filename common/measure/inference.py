"""Scores for a whole image: at once, in sliding windows, at several scales, mirrored.

A `Forward` maps normalized images (B, 3, h, w) to class scores (B, K, h, w) of the same size; it upsamples
by itself. Everything here is built from such functions and returns scores at the size of the image it got.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import UserError
from common.models.deeplab import upsample

Forward = Callable[[Tensor], Tensor]
Size = tuple[int, int]


def scaled_size(size: Sequence[int], scale: float, base_size: int | None = None) -> Size:
    """Both sides (H, W) times `scale`, rounded half to even; with `base_size` the long side is `base_size * scale`.

    The second is U2PL's rule for Cityscapes; the proportion is formed in double precision before the product.

    Raises:
        UserError: nothing is left at this scale.
    """
    height, width = int(size[0]), int(size[1])
    if base_size is None:
        result = round(height * scale), round(width * scale)
    else:
        long = round(scale * base_size)
        result = (
            (long, round(long / height * width)) if height > width else (round(long / width * height), long)
        )
    if min(result) < 1:
        raise UserError(
            f"inference: scale {scale} makes an image of {result[0]}x{result[1]}; use a larger scale"
        )
    return result


def default_stride(crop: int) -> int:
    """Two thirds of a window's side, rounded up."""
    return -(-2 * crop // 3)


def window_starts(size: int, crop: int, stride: int) -> list[int]:
    """First positions of the windows along one side of `size` >= `crop` pixels; the last is moved inside."""
    count = max(0, -(-(size - crop) // stride)) + 1
    return [min(i * stride + crop, size) - crop for i in range(count)]


def pad_to_crop(image: Tensor, crop: Size) -> tuple[Tensor, Size]:
    """Image (B, C, H, W) padded with zeros to at least `crop`, centred; and the rows and columns put before it."""
    rows = max(crop[0] - image.shape[-2], 0)
    cols = max(crop[1] - image.shape[-1], 0)
    before = (rows // 2, cols // 2)
    if rows == 0 and cols == 0:
        return image, before
    return F.pad(image, (before[1], cols - before[1], before[0], rows - before[0])), before


def windows(size: Sequence[int], crop: Size, stride: Size | None = None) -> list[Size]:
    """Starts (row, column) of all windows (H', W') in an image of `size` (H, W) that is padded to them, row by row.

    `stride` has the steps down and across; None for two thirds of the window, rounded up.

    Raises:
        UserError: If a step is larger than the window.
    """
    step = stride or (default_stride(crop[0]), default_stride(crop[1]))
    if step[0] > crop[0] or step[1] > crop[1]:
        raise UserError(
            f"inference: stride {step} is larger than the window {crop} and would leave pixels out; "
            "use a stride of at most the window's size"
        )
    rows, cols = (
        window_starts(max(int(side), length), length, by)
        for side, length, by in zip(size, crop, step, strict=True)
    )
    return [(row, col) for row in rows for col in cols]


def visit_counts(like: Tensor, starts: Sequence[Size], crop: Size) -> Tensor:
    """How many windows (first row and column of each) cover each pixel of scores (B, K, H, W): (H, W)."""
    counts = torch.zeros_like(like[0, 0])
    for row, col in starts:
        counts[row : row + crop[0], col : col + crop[1]] += 1
    return counts


def whole_image(forward: Forward, image: Tensor) -> Tensor:
    """Scores (B, K, H, W) of images (B, 3, H, W) in one pass, in float32 or better.

    Raises:
        UserError: If `forward` does not return scores of the image's size.
    """
    scores = forward(image)
    if scores.ndim != 4 or scores.shape[0] != image.shape[0] or scores.shape[-2:] != image.shape[-2:]:
        raise UserError(
            f"inference: the network gave {tuple(scores.shape)} for images {tuple(image.shape)}; "
            "the forward function must upsample its scores to its input's size"
        )
    return scores if scores.dtype == torch.float64 else scores.float()


def sum_windows(
    forward: Forward, image: Tensor, starts: Sequence[Size], crop: Size, *, batch_size: int = 1
) -> Tensor:
    """Scores (B, K, H, W), each pixel's added up over the windows that cover it and lie inside the image.

    Windows (at least one, given by first row and column) are added in their order whatever the batch size, which
    therefore changes no more than rounding.
    """
    total: Tensor | None = None
    for first in range(0, len(starts), batch_size):
        chunk = starts[first : first + batch_size]
        views = [image[..., row : row + crop[0], col : col + crop[1]] for row, col in chunk]
        scores = whole_image(forward, torch.cat(views) if len(views) > 1 else views[0].contiguous())
        if total is None:
            total = scores.new_zeros((image.shape[0], scores.shape[1], *image.shape[-2:]))
        for (row, col), part in zip(chunk, torch.split(scores, image.shape[0]), strict=True):
            total[..., row : row + crop[0], col : col + crop[1]] += part
    assert total is not None
    return total


def sliding_window(
    forward: Forward, image: Tensor, crop: Size, stride: Size | None = None, *, batch_size: int = 1
) -> Tensor:
    """Scores (B, K, H, W), each pixel averaged over the windows that cover it.

    Images smaller than a window are padded with zeros, centred, and the margin is cut off again. See `windows` for
    `crop`, `stride` and what raises; `batch_size` windows go into a call of `forward` (for each image of the batch).
    """
    height, width = image.shape[-2:]
    starts = windows((height, width), crop, stride)
    padded, (top, left) = pad_to_crop(image, crop)
    total = sum_windows(forward, padded, starts, crop, batch_size=batch_size)
    if len(starts) > 1:
        total /= visit_counts(total, starts, crop)
    return total[..., top : top + height, left : left + width]


def flip_average(forward: Forward) -> Forward:
    """A forward that averages the scores of its input and of the mirrored input, mirrored back."""

    def forward_both(image: Tensor) -> Tensor:
        return (forward(image) + forward(image.flip(-1)).flip(-1)) / 2

    return forward_both


def multi_scale(
    score: Forward,
    image: Tensor,
    scales: Sequence[float],
    base_size: int | None = None,
    align_corners: bool = True,
) -> Tensor:
    """Scores (B, K, H, W) averaged over scales.

    At every scale (a factor of the size; with `base_size` the long side at scale 1) the normalized images (B, 3, H, W)
    are resized, scored whole or in windows, and the scores resized back, both with `align_corners`. With one scale this
    is U2PL's Cityscapes evaluation (`base_size` 2048, windows) or its Pascal evaluation (neither); where U2PL adds
    scales up, the mean taken here has the same best class.

    Raises:
        UserError: nothing is left at one of the scales.
    """
    size = image.shape[-2:]
    total: Tensor | None = None
    for scale in scales:
        x = upsample(image, scaled_size(size, scale, base_size), align_corners)
        scores = upsample(score(x), size, align_corners)
        total = scores if total is None else total + scores
    assert total is not None
    return total / len(scales) if len(scales) > 1 else total
