"""The pictures that `evaluate.py` of the original saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from common.data.files import Uint8, voc_colormap
from common.measure.evaluation import OnImage
from tools.pictures import full_palette, save_palette_png

VOC_COLORS = 22


def original_palette() -> Uint8:
    """The authors' colours (256, 3): the first 22 of the VOC map, 255 white, all others black."""
    palette = full_palette(voc_colormap(VOC_COLORS), (0, 0, 0))
    palette[255] = 255
    return palette


def prediction_writer(folder: Path, palette: ArrayLike | None = None) -> OnImage:
    """A function that saves a prediction as `<id>.png`: class ids, shown in the colours of a palette.

    The authors save the colours alone, for VOC alone; a viewer shows the same picture.

    Args:
        folder: where; it is made.
        palette: colours (P, 3); None for `original_palette`.
    """
    colors = original_palette() if palette is None else palette

    def write(name: str, scores: Any, pred: Tensor) -> None:
        del scores
        save_palette_png(folder / f"{name}.png", pred.to(torch.uint8), colors)

    return write
