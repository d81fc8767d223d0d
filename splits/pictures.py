"""Pictures of label maps, predictions and confidences: palettes and panels."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from common.data.files import write_bytes
from common.errors import UserError

Picture = NDArray[np.uint8]
WHITE = (255, 255, 255)
BLACK = (0, 0, 0)
GAP = 6  # pixels between and around the pictures of a panel


def full_palette(colors: ArrayLike, fill: tuple[int, int, int] = WHITE) -> Picture:
    """A palette of 256 rows (256, 3) that begins with `colors` (P, 3) and continues with `fill`.

    Raises:
        UserError: If the colours are not up to 256 RGB triples of 0..255.
    """
    given = np.asarray(colors)
    if given.ndim != 2 or given.shape[1] != 3 or len(given) > 256 or given.min() < 0 or given.max() > 255:
        raise UserError(
            f"palette: shape {given.shape} is not usable; give up to 256 rows of red, green and blue in 0..255"
        )
    palette = np.empty((256, 3), dtype=np.uint8)
    palette[:] = fill
    palette[: len(given)] = given
    return palette


def colorize(label: NDArray[Any] | Tensor, palette: ArrayLike, fill: tuple[int, int, int] = WHITE) -> Picture:
    """The colours (H, W, 3) of a label map (H, W); ids beyond the palette, such as 255, get `fill`.

    Raises:
        UserError: If an id is outside 0..255.
    """
    colors: Picture = full_palette(palette, fill)[class_ids(label)]
    return colors


def save_picture(path: str | Path, picture: Picture | Image.Image) -> None:
    """Write an RGB picture (H, W, 3) uint8, or an image of any kind, in the format of the file's suffix; atomically.

    Raises:
        UserError: If the file cannot be written.
    """
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    kind, data = Image.registered_extensions().get(Path(path).suffix.lower()), io.BytesIO()
    if kind is None:
        raise UserError(f"{path}: cannot be written; the suffix names no kind of picture")
    image.save(data, format=kind)
    write_bytes(Path(path), data.getvalue())


def panel(
    pictures: Sequence[Picture], titles: Sequence[str] | None = None, height: int | None = None
) -> Picture:
    """Pictures side by side on white, each with a small caption above it.

    Args:
        pictures: RGB pictures (H, W, 3) uint8, of any sizes; all are drawn as high as the highest.
        titles: One caption each, cut to the width of its picture; None for none.
        height: Common height of the pictures in pixels; None for the largest one's.

    Returns:
        One RGB picture uint8.
    """
    rows = height or max(picture.shape[0] for picture in pictures)
    scaled = [_with_height(picture, rows) for picture in pictures]
    caption = 0 if titles is None else 16
    width = sum(picture.shape[1] for picture in scaled) + GAP * (len(scaled) + 1)
    canvas = Image.new("RGB", (width, rows + caption + 2 * GAP), WHITE)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default()
    left = GAP
    for i, picture in enumerate(scaled):
        canvas.paste(Image.fromarray(picture), (left, GAP + caption))
        if titles is not None:
            draw.text((left, GAP), _fitting(titles[i], picture.shape[1], draw, font), fill=BLACK, font=font)
        left += picture.shape[1] + GAP
    joined: Picture = np.asarray(canvas)
    return joined


def _fitting(title: str, width: int, draw: Any, font: Any) -> str:
    """The longest beginning of `title` that is not wider than `width` pixels; the font knows ASCII only."""
    text = title.encode("ascii", "replace").decode()
    while text and draw.textlength(text, font=font) > width:
        text = text[:-1]
    return text


def _with_height(picture: Picture, height: int) -> Picture:
    if picture.shape[0] == height:
        return picture
    width = max(1, round(picture.shape[1] * height / picture.shape[0]))
    enlarge = height > picture.shape[0]
    method = cv2.INTER_NEAREST if enlarge else cv2.INTER_AREA
    return np.asarray(cv2.resize(picture, (width, height), interpolation=method), dtype=np.uint8)


def _array(values: NDArray[Any] | Tensor) -> NDArray[Any]:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values


def class_ids(label: NDArray[Any] | Tensor) -> Picture:
    """A label map (H, W) as uint8.

    Raises:
        UserError: If an id is outside 0..255.
    """
    ids = _array(label)
    if ids.size and (ids.min() < 0 or ids.max() > 255):
        raise UserError(
            f"label map: ids {ids.min()}..{ids.max()} do not fit into 0..255; map ignored pixels to 255"
        )
    return np.ascontiguousarray(ids.astype(np.uint8))
