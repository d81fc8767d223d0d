"""Colours and numbers in which the original and the PaddleSeg port save predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.data.files import Uint8, voc_colormap
from common.errors import UserError
from tools.pictures import overlay

# QUIRK shifted_palette: the original saves VOC predictions with the colours one class too far, background as aeroplane
LEGACY_VOC_PALETTE = voc_colormap(21)[1:]

PORT_ALPHA = 0.4


def port_palette(custom: Sequence[int] = ()) -> Uint8:
    """Colours (256, 3) of the port: the VOC colour map without its first entry, so class 0 is dark red.

    Args:
        custom: red, green and blue of the first classes, 0..255, one after the other.

    Raises:
        UserError: the numbers are not whole triples of 0..255, or too many.
    """
    palette = voc_colormap(257)[1:]
    if len(custom) % 3 or len(custom) > palette.size or any(not 0 <= value <= 255 for value in custom):
        raise UserError(
            f"--custom_color: {len(custom)} numbers from {list(custom[:3])} on; "
            "give red, green and blue in 0..255 for each class"
        )
    palette[: len(custom) // 3] = np.array(custom, dtype=np.uint8).reshape(-1, 3)
    return palette


def port_overlay(image: Uint8, pred: NDArray[Any], palette: Uint8) -> Uint8:
    """RGB image (H, W, 3) blended with the colours of its classes (H, W) as the port does: 0.6 image, 0.4 colour."""
    return overlay(image, pred, palette, PORT_ALPHA)
