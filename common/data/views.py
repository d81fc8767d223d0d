"""Weak and strong views of unlabeled photos, made in 8 bits with PIL; choices are drawn first, then applied."""

from __future__ import annotations

from random import Random
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms import functional as pil

Array = NDArray[Any]
ADJUST = (pil.adjust_brightness, pil.adjust_contrast, pil.adjust_saturation, pil.adjust_hue)
FACTORS = (*3 * ((0.5, 1.5),), (-0.25, 0.25))  # their ranges
JITTER_PROBABILITY, GRAY_PROBABILITY, BLUR_PROBABILITY = 0.8, 0.2, 0.5
BLUR_RADIUS = (0.1, 2.0)


class WindowDraw(NamedTuple):
    """Size and place of a view in pixels, in the order in which they are drawn."""

    long_side: int
    col: int
    row: int
    mirrored: bool


class ColorDraw(NamedTuple):
    """Places in `ADJUST` with their factors, as they are applied; grey or not; radius of the blur, 0 for none."""

    jitter: tuple[tuple[int, float], ...]
    gray: bool
    blur_radius: float


def long_side_size(height: int, width: int, long_side: int) -> tuple[int, int]:
    """Height and width of an image brought to a long side, the other rounded half up."""
    if height > width:
        return long_side, int(width * long_side / height + 0.5)
    return int(height * long_side / width + 0.5), long_side


def draw_window(
    rng: Random, height: int, width: int, crop: tuple[int, int], scale_range: tuple[float, float], flip: bool
) -> WindowDraw:
    """Choices for a photo of `height` x `width` pixels, cut to `crop` (rows, columns)."""
    longest = max(height, width)
    long_side = rng.randint(int(longest * scale_range[0]), int(longest * scale_range[1]))
    rows, cols = (max(n, c) for n, c in zip(long_side_size(height, width, long_side), crop, strict=True))
    col, row = rng.randint(0, cols - crop[1]), rng.randint(0, rows - crop[0])
    return WindowDraw(long_side, col, row, flip and rng.random() < 0.5)


def draw_colors(rng: Random) -> ColorDraw:
    """Choices for the colours of one strong view."""
    jitter: list[tuple[int, float]] = []
    if rng.random() < JITTER_PROBABILITY:
        order = [0, 1, 2, 3]
        rng.shuffle(order)
        factors = [rng.uniform(low, high) for low, high in FACTORS]
        jitter = [(k, factors[k]) for k in order]
    gray, blurred = rng.random() < GRAY_PROBABILITY, rng.random() < BLUR_PROBABILITY
    return ColorDraw(tuple(jitter), gray, rng.uniform(*BLUR_RADIUS) if blurred else 0.0)


def place(
    picture: Image.Image, draw: WindowDraw, crop: tuple[int, int], how: Image.Resampling, fill: Any
) -> Image.Image:
    """The window that a draw stands for: resized by `how`, padded right and below with `fill`, cropped, mirrored."""
    height, width = long_side_size(picture.height, picture.width, draw.long_side)
    picture = picture.resize((max(width, 1), max(height, 1)), how)
    border = (0, 0, max(crop[1] - picture.width, 0), max(crop[0] - picture.height, 0))
    if any(border):
        picture = ImageOps.expand(picture, border=border, fill=fill)
    picture = picture.crop((draw.col, draw.row, draw.col + crop[1], draw.row + crop[0]))
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.mirrored else picture


def strong_view(weak: Image.Image, draw: ColorDraw) -> Image.Image:
    """The weak view with its colours changed, grey or blurred; every operation rounds to 8 bits."""
    strong = weak
    for operation, factor in draw.jitter:
        strong = ADJUST[operation](strong, factor)
    if draw.gray:
        strong = pil.rgb_to_grayscale(strong, num_output_channels=3)
    if draw.blur_radius > 0:
        strong = strong.filter(ImageFilter.GaussianBlur(radius=draw.blur_radius))
    return strong


def resized_photo(image: Array, size: tuple[int, int]) -> Array:
    """RGB uint8 (H, W, 3) at another size, bilinear as labeled photos and those of an evaluation are resized."""
    x = torch.from_numpy(image).movedim(-1, 0).float()[None]
    large = F.interpolate(x, size, mode="bilinear", align_corners=False)[0]
    return large.round().to(torch.uint8).movedim(0, -1).contiguous().numpy()


def split_views(x: Tensor, count: int = 2) -> list[Tensor]:
    """The views (B, 3, H, W) that are stacked in a batch (B, 3 * count, H, W), in its memory layout."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    return [view.contiguous(memory_format=layout) for view in x.chunk(count, dim=1)]
