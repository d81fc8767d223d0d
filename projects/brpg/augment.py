"""Weak and strong views of unlabeled photos, mixing of batches, copy-paste, and the random numbers of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from common.data.spec import IGNORE
from common.data.transforms import Triple, to_normalized
from common.data.views import draw_colors, draw_window, place, resized_photo, strong_view
from common.mean_teacher.draws import StepDraws
from common.numerics.mixing import LABEL_VALUES

Array = NDArray[Any]


# --- views of one photo ----------------------------------------------------------------------------------------


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
            image = resized_photo(image, self.resize)
        window = draw_window(rng, image.shape[0], image.shape[1], self.crop_size, self.scale_range, self.flip)
        red, green, blue = (round(v) for v in self.mean)
        fill = (0, 0, 0) if self.pad_black else (red, green, blue)
        weak = place(Image.fromarray(image), window, self.crop_size, Image.Resampling.BILINEAR, fill)
        pair = (weak, strong_view(weak, draw_colors(rng)))
        return torch.cat([to_normalized(np.asarray(view), self.mean, self.std) for view in pair]), None


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
    """The batch augmented, see `StepDraws.mix`: blanks are ignored and have no confidence."""
    return Mixed(*draws.mix(mode, batch.pseudo, *zip(batch, (0.0, IGNORE, 0.0), strict=True)))
