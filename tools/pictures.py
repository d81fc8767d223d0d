"""What the scripts write of a prediction: overlays and palette PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from common.errors import UserError
from splits.pictures import BLACK, Picture, class_ids, colorize, full_palette, save_picture

__all__ = [
    "full_palette",
    "heatmap",
    "overlay",
    "save_palette_png",
    "save_picture",
]  # projects take them from here


def overlay(
    image: Picture,
    label: NDArray[Any] | Tensor,
    palette: ArrayLike,
    alpha: float = 0.5,
) -> Picture:
    """The RGB image (H, W, 3) under the colours of a label map (H, W).

    Args:
        image: uint8.
        label: Class ids.
        palette: Colours (P, 3).
        alpha: Share of the colours, 0..1; the sum is rounded. The authors' CPS port uses 0.4.

    Raises:
        UserError: If image and label differ in size.
    """
    colors = colorize(label, palette)
    if colors.shape != image.shape:
        raise UserError(
            f"overlay: image {image.shape[:2]} and label {colors.shape[:2]} differ in size; resize one of them"
        )
    return np.asarray(cv2.addWeighted(image, 1 - alpha, colors, alpha, 0), dtype=np.uint8)


def save_palette_png(path: str | Path, label: NDArray[Any] | Tensor, palette: ArrayLike) -> None:
    """Write a label map (H, W) as a PNG that holds the class ids and shows their colours.

    Reading the file without conversion gives the ids back.

    Raises:
        UserError: If an id is outside 0..255 or the file cannot be written.
    """
    picture = Image.fromarray(class_ids(label))
    picture.putpalette(full_palette(palette).flatten().tolist())
    save_picture(path, picture)


def heatmap(values: NDArray[Any] | Tensor) -> Picture:
    """The RGB picture (H, W, 3) of a map (H, W), dark blue at 0 to yellow at 1; undefined values black."""
    numbers = np.asarray(values, np.float64)
    undefined = np.isnan(numbers)
    levels = np.where(undefined, 0.0, numbers) * 255
    bgr = cv2.applyColorMap(levels.round().clip(0, 255).astype(np.uint8), cv2.COLORMAP_VIRIDIS)
    picture = np.ascontiguousarray(bgr[..., ::-1], dtype=np.uint8)
    picture[undefined] = BLACK
    return picture
