"""Box masks of CPS + CutMix: boxes drawn on the host, masks painted on the device.

A mask is 1 where an odd number of boxes cover a pixel: overlaps cancel, so three boxes of together 25 to 50 %
of the area paint less than that.

Source: `BoxMaskGenerator` in `mask_gen.py` of the repository's CPS+CutMix experiments.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.run.rng import NumpyStream
from projects.cps.config import BoxMaskSettings

Floats = NDArray[np.float64]
Boxes = NDArray[np.int64]


def draw_boxes(settings: BoxMaskSettings, n: int, height: int, width: int, rng: Any) -> Boxes:
    """Boxes of `n` masks, int64 (n, n_boxes, 4): first row, first column, last row and last column (exclusive).

    All lie in 0..height and 0..width. What an end beyond the image means is that of array slices: a negative one
    counts from the other side, a larger one is the side itself; a box may therefore be empty.

    Args:
        settings: see `BoxMaskSettings`.
        n: number of masks.
        height: of the masks in pixels.
        width: likewise.
        rng: a `numpy.random.RandomState` (or the module); draws shares, forms and positions, in this order.
    """
    shape, image = (n, settings.n_boxes), np.array((height, width))
    sizes = np.round(_shares(settings, shape, rng) * image)
    place = rng.uniform(0.0, 1.0, size=sizes.shape)
    if settings.within_bounds:
        first = np.round((image - sizes) * place)
        last = first + sizes
    else:
        centres = np.round(image * place)
        first, last = centres - sizes * 0.5, centres + sizes * 0.5
    ends = np.stack((first, last), axis=2).astype(np.int64)  # cuts halves off towards zero
    ends = np.where(ends < 0, ends + image, ends)
    return np.clip(ends, 0, image).reshape(n, settings.n_boxes, 4)


def _shares(settings: BoxMaskSettings, shape: tuple[int, int], rng: Any) -> Floats:
    """Share of height and of width that each box has, (n, n_boxes, 2)."""
    low, high = settings.prop_range
    factor = np.sqrt(1.0 / settings.n_boxes)
    if not settings.random_aspect_ratio:
        shares = rng.uniform(low, high, size=shape)
        side = (np.sqrt(shares) if settings.prop_by_area else shares) * factor
        if settings.fixed_aspect_shrinks_twice:
            side = side * factor
        return np.stack((side, side), axis=2)
    if not settings.prop_by_area:
        return np.stack([rng.uniform(low, high, size=shape) for _ in range(2)], axis=2) * factor
    area, exponent = rng.uniform(low, high, size=shape), rng.uniform(0.0, 1.0, size=shape)
    with np.errstate(divide="ignore", invalid="ignore"):  # no area: a box without size, set below
        tall = np.exp(exponent * np.log(area))
        sides = np.stack((tall, area / tall), axis=2) * factor
    sides[area == 0.0] = 0.0
    return sides


def rasterize(
    boxes: Boxes, height: int, width: int, device: torch.device | str = "cpu", *, invert: bool = True
) -> Tensor:
    """Masks float32 (n, 1, H, W) of boxes (n, k, 4): `invert` where an odd number of them covers a pixel.

    Only the boxes' ends travel to the device; nothing waits for it.
    """
    ends = torch.from_numpy(np.ascontiguousarray(boxes))
    if torch.device(device).type == "cuda":
        ends = ends.pin_memory()  # a copy of pageable memory would make the host wait
    row0, col0, row1, col1 = ends.to(device, non_blocking=True).unsqueeze(-1).unbind(dim=2)
    rows, cols = torch.arange(height, device=device), torch.arange(width, device=device)
    in_rows = ((rows >= row0) & (rows < row1)).float()  # (n, k, H)
    in_cols = ((cols >= col0) & (cols < col1)).float()  # (n, k, W)
    odd = (in_rows.transpose(1, 2) @ in_cols).unsqueeze(1) % 2  # whole numbers, exact in any precision
    return odd if invert else 1 - odd


class MaskDraws(NumpyStream):
    """Random masks, from one NumPy stream per process.

    QUIRK repeated_masks, repaired: the authors' loader workers shared one NumPy state, so eight masks in a row were
    the same and every epoch repeated them; here every mask is a new one.

    Args:
        settings: how boxes are drawn.
        seed: of the run.
        rank: of this process.
    """

    def __init__(self, settings: BoxMaskSettings, seed: int, rank: int) -> None:
        super().__init__(seed + rank)
        self.settings = settings

    def masks(self, images: Tensor) -> Tensor:
        """A mask, float32 (B, 1, H, W) on their device, for each of the images (B, 3, H, W)."""
        height, width = images.shape[-2:]
        boxes = draw_boxes(self.settings, len(images), height, width, self.rng)
        return rasterize(boxes, height, width, images.device, invert=self.settings.invert)
