"""Weak and strong views of unlabeled photos, mixing of batches, copy-paste, and the random numbers of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms import functional as pil

from common.data.transforms import Triple, to_normalized
from common.mean_teacher.draws import StepDraws
from common.numerics.mixing import LABEL_VALUES, cut_out, mix_with_next

Array = NDArray[Any]
JITTER_PROBABILITY, GRAY_PROBABILITY, BLUR_PROBABILITY = 0.8, 0.2, 0.5
BRIGHTNESS = CONTRAST = SATURATION = (0.5, 1.5)
HUE = (-0.25, 0.25)
BLUR_RADIUS = (0.1, 2.0)
ADJUST = (pil.adjust_brightness, pil.adjust_contrast, pil.adjust_saturation, pil.adjust_hue)


# --- views of one photo ----------------------------------------------------------------------------------------


class Jitter(NamedTuple):
    """Factors of brightness, contrast, saturation and hue (0 to 3), and the order in which they are applied."""

    order: tuple[int, ...]
    factors: tuple[float, float, float, float]


class ViewDraw(NamedTuple):
    """The random choices for one photo, in the order in which they are made."""

    long_side: int  # pixels
    col: int
    row: int
    mirrored: bool
    jitter: Jitter | None
    gray: bool
    blur_radius: float  # pixels; 0: none


def long_side_size(height: int, width: int, long_side: int) -> tuple[int, int]:
    """Height and width of an image brought to a long side, the other rounded half up."""
    if height > width:
        return long_side, int(width * long_side / height + 0.5)
    return int(height * long_side / width + 0.5), long_side


def draw_view(
    rng: Random, height: int, width: int, crop: tuple[int, int], scale_range: tuple[float, float], flip: bool
) -> ViewDraw:
    """Choices for a photo of `height` x `width` pixels, cut to `crop` (rows, columns)."""
    longest = max(height, width)
    long_side = rng.randint(int(longest * scale_range[0]), int(longest * scale_range[1]))
    rows, cols = (max(n, c) for n, c in zip(long_side_size(height, width, long_side), crop, strict=True))
    col, row = rng.randint(0, cols - crop[1]), rng.randint(0, rows - crop[0])
    mirrored = flip and rng.random() < 0.5
    jitter = None
    if rng.random() < JITTER_PROBABILITY:
        order = [0, 1, 2, 3]
        rng.shuffle(order)
        ranges = (BRIGHTNESS, CONTRAST, SATURATION, HUE)
        first, second, third, fourth = (rng.uniform(low, high) for low, high in ranges)
        jitter = Jitter(tuple(order), (first, second, third, fourth))
    gray = rng.random() < GRAY_PROBABILITY
    blurred = rng.random() < BLUR_PROBABILITY
    return ViewDraw(
        long_side, col, row, mirrored, jitter, gray, rng.uniform(*BLUR_RADIUS) if blurred else 0.0
    )


def weak_view(
    photo: Image.Image, draw: ViewDraw, crop: tuple[int, int], fill: tuple[int, int, int] = (0, 0, 0)
) -> Image.Image:
    """The photo resized, padded at the right and bottom with `fill`, cropped to (rows, columns) and mirrored."""
    return place(photo, draw, crop, Image.Resampling.BILINEAR, fill)


def place(
    picture: Image.Image, draw: ViewDraw, crop: tuple[int, int], how: Image.Resampling, fill: Any
) -> Image.Image:
    """The window that a draw stands for, resized by `how` and padded with `fill`."""
    height, width = long_side_size(picture.height, picture.width, draw.long_side)
    picture = picture.resize((max(width, 1), max(height, 1)), how)
    border = (0, 0, max(crop[1] - picture.width, 0), max(crop[0] - picture.height, 0))
    if any(border):
        picture = ImageOps.expand(picture, border=border, fill=fill)
    picture = picture.crop((draw.col, draw.row, draw.col + crop[1], draw.row + crop[0]))
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.mirrored else picture


def strong_view(weak: Image.Image, draw: ViewDraw) -> Image.Image:
    """The weak view with its colours changed, grey or blurred; every operation rounds to 8 bits."""
    strong = weak
    if draw.jitter is not None:
        for operation in draw.jitter.order:
            strong = ADJUST[operation](strong, draw.jitter.factors[operation])
    if draw.gray:
        strong = pil.rgb_to_grayscale(strong, num_output_channels=3)
    if draw.blur_radius > 0:
        strong = strong.filter(ImageFilter.GaussianBlur(radius=draw.blur_radius))
    return strong


@dataclass(frozen=True)
class TwoViews:
    """Transform of an unlabeled photo into its weak and its strong view, stacked along the channels.

    Attributes:
        mean: RGB mean on the scale 0..255.
        std: RGB standard deviation on the scale 0..255.
        crop_size: (rows, columns) of the views.
        scale_range: range of the long side as a share of the photo's.
        flip: mirror one half of the photos.
        pad_black: the border is black (QUIRK quirks.pad_black); otherwise it has the mean colour, as that of labeled
            photos.
        resize: fixed (rows, columns) before everything else, as of labeled photos; None: as stored.

    Source: the unlabeled branch of `u2pl/dataset/pascal_voc.py`.
    """

    mean: Triple
    std: Triple
    crop_size: tuple[int, int]
    scale_range: tuple[float, float] = (0.5, 2.0)
    flip: bool = True
    pad_black: bool = True
    resize: tuple[int, int] | None = None

    def __call__(self, image: Array, label: Array | None, rng: Random, /) -> tuple[Tensor, None]:
        """Float32 views (6, h, w), weak first, and no label.

        `image` is RGB uint8 (H, W, 3); the label, which nothing may see, is not looked at.
        """
        del label
        if self.resize is not None:
            image = _resized(image, self.resize)
        draw = draw_view(rng, image.shape[0], image.shape[1], self.crop_size, self.scale_range, self.flip)
        red, green, blue = (round(v) for v in self.mean)
        fill = (0, 0, 0) if self.pad_black else (red, green, blue)
        weak = weak_view(Image.fromarray(image), draw, self.crop_size, fill)
        views = [
            to_normalized(np.asarray(view), self.mean, self.std) for view in (weak, strong_view(weak, draw))
        ]
        return torch.cat(views), None


def _resized(image: Array, size: tuple[int, int]) -> Array:
    """RGB uint8 (H, W, 3) at another size, bilinear as labeled photos and those of an evaluation are resized."""
    x = torch.from_numpy(image).movedim(-1, 0).float()[None]
    large = F.interpolate(x, size, mode="bilinear", align_corners=False)[0]
    return large.round().to(torch.uint8).movedim(0, -1).contiguous().numpy()


def split_views(x: Tensor) -> tuple[Tensor, Tensor]:
    """Weak and strong views (B, 3, H, W) of a batch (B, 6, H, W), in its memory layout."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    weak, strong = (part.contiguous(memory_format=layout) for part in x.chunk(2, dim=1))
    return weak, strong


# --- copy-paste of labeled images (an option, off as published) --------------------------------------------------


@dataclass(frozen=True)
class WithPaste:
    """Transform of a labeled photo together with a second one whose classes may be pasted into it.

    Attributes:
        own: transform of the photo.
        paste: transform of the second one.
        load: decoded photo uint8 (H, W, 3) and label uint8 (H, W) at a position of the labeled list.
        count: length of that list.
        skip: share of the photos without a second one.

    Source: `__getitem__` with `acp` in `u2pl/dataset/pascal_voc.py`.
    """

    own: Callable[[Array, Array | None, Any], tuple[Tensor, Any]]
    paste: Callable[[Array, Array | None, Any], tuple[Tensor, Any]]
    load: Callable[[int], tuple[Array, Array | None]]
    count: int
    skip: float

    def __call__(self, image: Array, label: Array | None, rng: Random, /) -> tuple[Tensor, Tensor]:
        """Float32 images (6, h, w) and int64 labels (2h, w), own first; zeros in place of no second photo."""
        second = None
        if rng.random() > self.skip:
            second = self.paste(*self.load(rng.randint(0, self.count - 1)), rng)
        x, y = self.own(image, label, rng)
        x_paste, y_paste = (torch.zeros_like(x), torch.zeros_like(y)) if second is None else second
        return torch.cat((x, x_paste)), torch.cat((y, y_paste))


def paste_probability(iteration: int, steps_per_epoch: int, delay: int, promote: int) -> float:
    """Share of the images into which is pasted: 0 in the first `delay` epochs, 1 after `promote` further ones."""
    if iteration < delay * steps_per_epoch:
        return 0.0
    if iteration >= (delay + promote) * steps_per_epoch:
        return 1.0
    return (iteration - delay * steps_per_epoch) / (promote * steps_per_epoch)


def draw_paste_classes(confidence: Tensor, ignored: tuple[int, ...], coins: Tensor) -> Tensor:
    """Label values (256,) bool to be pasted: one draw per coin, with replacement, that prefers unsure classes.

    Args:
        confidence: (K,) of the classes, in 0..1.
        ignored: classes never drawn.
        coins: (number of draws,) uniform numbers.
    """
    weights = (1.0 - confidence).clamp(min=0).sqrt().softmax(dim=0)
    for k in ignored:
        weights[k] = 0.0
    reached = weights.cumsum(0)
    drawn = torch.searchsorted(reached, coins.to(reached.dtype) * reached[-1], right=True)
    table = torch.zeros(LABEL_VALUES, dtype=torch.bool, device=confidence.device)
    return table.index_fill_(0, drawn.clamp(max=len(confidence) - 1), True)


def copy_paste(x: Tensor, y: Tensor, classes: Tensor, coins: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) and labels (B, H, W) with the drawn classes of the second images written over them.

    Args:
        x: (B, 6, H, W), own image first.
        y: (B, 2H, W), own label first.
        classes: (256,) bool, label values to paste.
        coins: (B,) uniform numbers; an image is changed if its number is below `share` and its second label is not
            zero everywhere.
        share: see `paste_probability`.

    Source: `dynamic_copy_paste` in `u2pl/utils/utils.py`.
    """
    (own, paste), (y_own, y_paste) = x.chunk(2, dim=1), y.chunk(2, dim=1)
    wanted = (y_paste.flatten(1).sum(dim=1) > 0) & (coins < share)
    mask = classes[y_paste] & wanted.view(-1, 1, 1)
    return torch.where(mask.unsqueeze(1), paste, own), torch.where(mask, y_paste, y_own)


# --- mixing and random numbers of a step -------------------------------------------------------------------------


class Draws(StepDraws):
    """The random numbers of training steps; permutations come from the generator of the device too."""

    def keys(self, count: int) -> Tensor:
        """Uniform numbers (count,) in [0, 1) whose ascending order is a random permutation."""
        return torch.rand(count, generator=self.generator, device=self.generator.device)


class Mixed(NamedTuple):
    """Images (B, 3, H, W), pseudo-labels and confidences (B, H, W) of a batch."""

    images: Tensor
    pseudo: Tensor
    conf: Tensor


def strong_mix(batch: Mixed, mode: str, draws: Draws) -> Mixed:
    """The batch mixed as `mode` says: images, pseudo-labels and confidences alike, all of them.

    `cutmix` fills a box of half the area from the next image; `cutout` blanks it and ignores its labels;
    `classmix` keeps half of the label values of an image and takes the rest from the next one.

    Source: `generate_unsup_data` in `u2pl/dataset/augmentation.py`.
    """
    keep = draws.keep(batch.pseudo, mode)
    if mode == "cutout":
        images, pseudo = cut_out(batch.images, batch.pseudo, keep)
        return Mixed(images, pseudo, batch.conf * keep)
    return Mixed(*(mix_with_next(part, keep) for part in batch))
