"""Views of a photo with their CutMix boxes, as the loaders make them, and the random numbers of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from common.data.loaders import Batch
from common.data.spec import IGNORE
from common.data.transforms import Triple, to_normalized
from common.data.views import (
    WindowDraw,
    draw_colors,
    draw_window,
    place,
    resized_photo,
    split_views,
    strong_view,
)
from common.numerics.mixing import Box
from common.run.rng import Streams
from projects.unimatch.config import BoxSettings

Array = NDArray[Any]


def draw_box(rng: Random, height: int, width: int, settings: BoxSettings) -> Box:
    """A box inside an image of this size; an empty one where none is drawn.

    Ratio and place are drawn anew until the box lies inside, which prefers small ones near the origin.

    Source: `obtain_cutmix_box` in `dataset/transform.py`.
    """
    if rng.random() > settings.probability:
        return Box(0, 0, 0, 0)
    area = rng.uniform(*settings.area) * height * width
    while True:
        ratio = rng.uniform(*settings.ratio) * (height / width)
        cols, rows = int(math.sqrt(area / ratio)), int(math.sqrt(area * ratio))
        col, row = rng.randint(0, width - 1), rng.randint(0, height - 1)
        if col + cols <= width and row + rows <= height:
            return Box(row, col, row + rows, col + cols)


@dataclass(frozen=True)
class Views:
    """Transform of a photo into its weak view and, of unlabeled ones, strong views of the same window.

    Attributes:
        mean: RGB mean on the scale 0..255.
        std: RGB standard deviation on the scale 0..255.
        crop_size: (rows, columns) of the views.
        scale_range: range of the long side as a share of the photo's.
        flip: mirror one half of the photos.
        resize: fixed (rows, columns) before everything else; None: as stored.
        strong: number of strong views; 0 is the transform of labeled photos.
        box: how boxes are drawn, one for each strong view.

    Source: `dataset/semi.py` and `dataset/transform.py`.
    """

    mean: Triple
    std: Triple
    crop_size: tuple[int, int]
    scale_range: tuple[float, float] = (0.5, 2.0)
    flip: bool = True
    resize: tuple[int, int] | None = None
    strong: int = 0
    box: BoxSettings = field(default_factory=BoxSettings)

    def __call__(self, image: Array, label: Array | None, rng: Random, /) -> tuple[Tensor, Tensor | None]:
        """Float32 views (3 * (1 + strong), h, w), and the label int64 (h, w) or maps uint8 (1 + strong, h, w).

        The maps are 1 where the views are padding and where each box lies. A label of unlabeled photos is not looked
        at. `image` is RGB uint8 (H, W, 3), `label` uint8 (H, W) train ids.
        """
        if self.resize is not None:
            image = resized_photo(image, self.resize)
            if label is not None:
                label = F.interpolate(torch.from_numpy(label)[None, None], self.resize)[0, 0].numpy()
        height, width = image.shape[:2]
        window = draw_window(rng, height, width, self.crop_size, self.scale_range, self.flip)
        weak = place(Image.fromarray(image), window, self.crop_size, Image.Resampling.BILINEAR, 0)
        if not self.strong:
            y = None if label is None else torch.from_numpy(self._cut(label, window)).long()
            return self._normalized(weak), y
        views, maps = [weak], [self._cut(np.zeros((height, width), np.uint8), window) == IGNORE]
        for _ in range(self.strong):
            views.append(strong_view(weak, draw_colors(rng)))
            box, inside = draw_box(rng, *self.crop_size, self.box), np.zeros(self.crop_size, bool)
            inside[box.row0 : box.row1, box.col0 : box.col1] = True
            maps.append(inside)
        return torch.cat([self._normalized(v) for v in views]), torch.from_numpy(
            np.stack(maps).astype(np.uint8)
        )

    def _cut(self, label: Array, window: WindowDraw) -> Array:
        """The window of a label map, padded with 255."""
        return np.array(
            place(Image.fromarray(label), window, self.crop_size, Image.Resampling.NEAREST, IGNORE)
        )

    def _normalized(self, view: Image.Image) -> Tensor:
        return to_normalized(np.asarray(view), self.mean, self.std)


class Unlabeled(NamedTuple):
    """Views (B, 3, H, W) of unlabeled images, and maps (B, H, W) bool of padding and boxes."""

    weak: Tensor
    strong: list[Tensor]
    padding: Tensor
    boxes: list[Tensor]


def unlabeled_of(batch: Batch) -> Unlabeled:
    """What a loader of `Views` gives, apart."""
    padding, *boxes = batch.label.bool().unbind(dim=1)
    weak, *strong = split_views(batch.image, 1 + len(boxes))
    return Unlabeled(weak, strong, padding, boxes)


def complementary(coins: Tensor, keys: Tensor, untouched: float) -> Tensor:
    """Factors (2n, C) of feature channels: what is dropped in the first view of a pair is doubled in the second.

    Args:
        coins: (n, C) bool: the channel stays in the first view.
        keys: (n,) numbers whose ascending order is a random permutation of the pairs.
        untouched: share of the pairs that keep all channels, rounded down.
    """
    first = 2.0 * coins
    whole = keys.argsort().argsort() < int(len(keys) * untouched)
    factors = (part.masked_fill(whole.unsqueeze(1), 1.0) for part in (first, 2.0 - first))
    return torch.cat(list(factors))


class Draws(Streams):
    """The random numbers of training steps, from a generator of the device, one per rank; saved with a checkpoint."""

    def __init__(self, seed: int, rank: int, device: torch.device) -> None:
        super().__init__(seed, seed + rank, device)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, device=self.generator.device)

    def dropped(self, images: int, planes: tuple[int, ...], probability: float) -> list[Tensor]:
        """Factors (images, C) of the channels of every level: 0, or what makes up for it."""
        return [(self._uniform(images, n) >= probability) / (1.0 - probability) for n in planes]

    def complementary(self, pairs: int, planes: tuple[int, ...], untouched: float, one: bool) -> list[Tensor]:
        """Factors (2 * pairs, C) of the channels of every level; with `one` the same for all, see `complementary`."""
        keys = self._uniform(pairs)
        coins = [self._uniform(pairs, n) < 0.5 for n in (planes[:1] if one else planes)]
        found = [complementary(some, keys, untouched) for some in coins]
        return found * len(planes) if one else found
