"""Image and mask files: photos as RGB, masks as the numbers stored in them; files replaced in one step."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.errors import UserError

Uint8 = np.ndarray[Any, np.dtype[np.uint8]]
_UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


def read_rgb(path: Path, what: str = "image") -> Uint8:
    """An image file as RGB, uint8 (H, W, 3), contiguous.

    Raises:
        UserError: The file is absent, damaged or not an image.
    """
    try:
        with Image.open(path) as file:
            return np.ascontiguousarray(np.array(file.convert("RGB"), dtype=np.uint8))
    except _UNREADABLE as error:
        raise _unreadable(path, what, error) from None


def read_index_mask(path: Path) -> np.ndarray[Any, np.dtype[np.uint8 | np.uint16]]:
    """The values stored in a palette or grey mask of 1 to 16 bits, (H, W), as they are in the file.

    Raises:
        UserError: The file is absent, damaged, or a colour image.
    """
    try:
        with Image.open(path) as file:
            mode, scale = file.mode, _grey_scale(path)
            stored = np.array(file)
    except _UNREADABLE as error:
        raise _unreadable(path, "mask", error) from None
    if mode == "1":
        return stored.astype(np.uint8)
    if mode in {"L", "P"}:
        return stored if scale == 1 else stored // np.uint8(scale)
    if mode.startswith("I") and stored.ndim == 2:
        low, high = int(stored.min()), int(stored.max())
        if low < -1 or high > 65535:
            raise UserError(
                f"{path}: label values {low}..{high} do not fit 16 bits; save the mask as 8 or 16 bit PNG"
            )
        return stored.astype(np.int64).astype(np.uint16)  # -1 becomes 65535
    raise UserError(
        f"{path}: is no index mask (mode {mode}), expected one class id per pixel; for masks painted in colours set "
        "'label_format: color' and the palette in dataset.yaml, otherwise save it as a grey or palette PNG"
    )


def voc_colormap(count: int = 256) -> Uint8:
    """The first `count` colours of the VOC colour map, uint8 (count, 3): index bits dealt to R, G, B from the top."""
    index = np.arange(count, dtype=np.uint32)
    colors = np.zeros((count, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= (((index >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return colors


@contextlib.contextmanager
def replacing(path: Path, put: Callable[[Path, Path], object] = os.replace) -> Iterator[Path]:
    """A place beside `path` for what takes its place in one step, by `put`; after an error `path` is as it was."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield partial
        put(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the folder itself may be what is wrong
            partial.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: `path` is whole or as it was before. Its folder is made.

    Raises:
        UserError: The folder cannot be written or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_bytes(data)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); check free space and permissions"
        ) from None


def _unreadable(path: Path, what: str, error: Exception) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path}: no such {what}; restore it or remove it from the list")
    reason = (
        getattr(error, "strerror", None) or str(error).splitlines()[0] if str(error) else type(error).__name__
    )
    return UserError(f"{path}: {what} cannot be read ({reason}); restore the file or set data.on_error=skip")


def _grey_scale(path: Path) -> int:
    """Factor by which the decoder stretches grey PNGs of 2 and 4 bits to 8 (85 and 17); 1 for other files."""
    with path.open("rb") as file:
        head = file.read(26)
    is_grey_png = head[:8] == b"\x89PNG\r\n\x1a\n" and head[25:26] == b"\0"
    return {2: 85, 4: 17}.get(head[24], 1) if is_grey_png else 1
