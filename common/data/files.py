"""Files: photos as RGB, masks as the numbers stored in them, where weights lie; files replaced in one step."""

from __future__ import annotations

import contextlib
import functools
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from common.errors import UserError, writing

BUNDLED = Path(__file__).resolve().parents[1] / "models" / "weights"
Uint8 = np.ndarray[Any, np.dtype[np.uint8]]
Range = tuple[float, float]
ORIENTATION = 0x112  # EXIF: 1 upright, 2 to 8 turned or mirrored
_UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, struct.error, Image.DecompressionBombError)


def read_rgb(
    path: Path, what: str = "image", *, upright: bool = True, value_range: Range | None = None
) -> Uint8:
    """An image file as RGB, uint8 (H, W, 3), contiguous: the first page, without alpha and further bands.

    Args:
        path: The file.
        what: What messages call it.
        upright: Turn it as its EXIF orientation says, as every viewer does.
        value_range: Of a file of more than 8 bits per channel: the stored values that become 0 and 255, cut off
            beyond. None takes 0..65535 of whole numbers and 0..1 of others.

    Raises:
        UserError: The file is absent, damaged or not an image, or has values beyond the range that None takes.
    """
    try:
        with Image.open(path) as file:
            bits, tag = _bits(file), orientation(file)
            pixels = _stored(file, path) if bits > 8 else np.array(file.convert("RGB"), dtype=np.uint8)
            turned = tag != orientation(file)  # TIFF is turned while it is decoded
    except _UNREADABLE as error:
        raise _unreadable(path, what, error) from None
    if bits > 8:
        pixels = _to_8_bits(pixels, path, value_range)
    return np.ascontiguousarray(_turn(pixels, tag, upright, turned))


def read_index_mask(path: Path, *, upright: bool = True) -> np.ndarray[Any, np.dtype[np.uint8 | np.uint16]]:
    """The values stored in a palette or grey mask of 1 to 16 bits, (H, W), as they are in the file.

    Raises:
        UserError: The file is absent, damaged, or a colour image.
    """
    try:
        with Image.open(path) as file:
            mode, scale, tag = file.mode, _grey_scale(path), orientation(file)
            stored = np.array(file)
            turned = tag != orientation(file)
    except _UNREADABLE as error:
        raise _unreadable(path, "mask", error) from None
    stored = _turn(stored, tag, upright, turned)
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


def remarks(path: Path, *, upright: bool = True, value_range: Range | None = None) -> list[str]:
    """What `read_rgb` with these arguments changes in a photo or leaves out; empty for most, and for unreadable ones.

    Only a file of more than 8 bits per channel is decoded for it.
    """
    found = []
    try:
        with Image.open(path) as file:
            bits, tag, bands = _bits(file), orientation(file), file.getbands()
            pages, samples = getattr(file, "n_frames", 1), _tag(file, 277) or len(bands)
            alpha = "A" in bands or "a" in bands or "transparency" in file.info
            top = float(_stored(file, path).max()) if bits > 8 else 0.0
    except _UNREADABLE:
        return []
    if tag != 1:
        found.append(
            f"turned upright (EXIF orientation {tag})" if upright else f"EXIF orientation {tag} not applied"
        )
    if bits > 8:
        low, high = value_range or (0.0, _top(bits))
        found.append(f"{bits} bits per channel, of which {low:g}..{high:g} become 0..255")
        if value_range is None and top <= high / 8:
            found.append(
                "no value in the upper seven eighths of that range, so it is dark; see 'value_range'"
            )
    if alpha:
        found.append("alpha channel dropped")
    elif samples > 3 and "K" not in bands:
        found.append("bands beyond the third dropped")
    if pages > 1:
        found.append("pages beyond the first dropped")
    return found


def stored_limits(path: Path) -> Range | None:
    """The least and the largest value in a file of more than 8 bits per channel; None for any other."""
    try:
        with Image.open(path) as file:
            deep = _stored(file, path) if _bits(file) > 8 else None
            return None if deep is None else (float(deep.min()), float(deep.max()))
    except _UNREADABLE:
        return None


def orientation(file: Image.Image) -> int:
    """The EXIF orientation of an opened image, 1 to 8; 1 where there is none that makes sense."""
    try:
        tag = file.getexif().get(ORIENTATION, 1)
    except _UNREADABLE:
        return 1
    return tag if tag in range(1, 9) else 1


def _turn(pixels: Any, tag: int, upright: bool, turned: bool) -> Any:
    """Pixels (H, W, ...) as they are to be seen, or as stored; `turned`: the decoder has made them upright."""
    if upright == turned:
        return pixels
    if turned:
        tag = {6: 8, 8: 6}.get(tag, tag)  # back; the others are their own inverse
    if tag in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if tag in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels[::-1] if tag in (3, 4, 7, 8) else pixels


def _tag(file: Image.Image, number: int) -> int:
    """The (largest) value of a TIFF tag, 0 where there is none."""
    value = getattr(file, "tag_v2", {}).get(number, 0)
    return max(value) if isinstance(value, tuple) else value


def _bits(file: Image.Image) -> int:
    """Bits per channel, 32 for floating point, of an image that is not decoded yet."""
    if file.mode.startswith(("I", "F")):
        return 32 if file.mode == "F" else 16
    tiles = getattr(file, "tile", None)  # how it will be decoded: of deep colours PIL takes the upper byte
    return 16 if tiles and ";16" in str(tiles[0][3]) else 8


def _top(bits: int) -> float:
    return 1.0 if bits == 32 else 65535.0


def _stored(file: Image.Image, path: Path) -> Any:
    """The numbers of a deep image, (H, W) or (H, W, 3), as they are in the file."""
    if file.mode.startswith(("I", "F")):
        return np.array(file)
    import cv2  # PIL keeps only the upper byte of colours

    pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.ndim != 3:
        raise ValueError("16-bit colours that cannot be decoded")
    return pixels[..., 2::-1]


def _to_8_bits(stored: Any, path: Path, value_range: Range | None) -> Uint8:
    values = stored.astype(np.float64)
    low, high = value_range or (0.0, _top(32 if stored.dtype.kind == "f" else 16))
    if not np.isfinite(values).all() or (
        value_range is None and not low <= values.min() <= values.max() <= high
    ):
        raise UserError(
            f"{path}: stores values {np.nanmin(values):g}..{np.nanmax(values):g}, of which nothing says which are "
            "black and white; set 'value_range: [low, high]' in dataset.yaml, or save the photo with 8 bits"
        )
    scaled = np.rint((values - low) * (255 / (high - low))).clip(0, 255).astype(np.uint8)
    return scaled if scaled.ndim == 3 else np.repeat(scaled[..., None], 3, axis=2)


def find_weights(name: str, key: str = "model.weights") -> Path:
    """The weight file that `model.weights`, or another key of the configuration, names.

    Looked for in the working directory, in the folder `SSS_WEIGHTS`, and among the bundled files.

    Raises:
        UserError: it is in none of them.
    """
    folder = os.environ.get("SSS_WEIGHTS")
    places = [Path(name), *([Path(folder) / name] if folder else []), BUNDLED / name]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        get = f"run 'python -m tools.weights get {name}', " if name in published_weights() else ""
        raise UserError(
            f"{key}={name}: no such file ({', '.join(map(str, places))}); {get}put it there, set SSS_WEIGHTS to "
            f"its folder, or train from random numbers with {key}=none"
        )
    return found


@functools.cache
def published_weights() -> dict[str, dict[str, Any]]:
    """The weight files that configurations of the papers name, with what `tools.weights` has on record of them."""
    return yaml.safe_load((BUNDLED / "published.yaml").read_text(encoding="utf-8"))


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
    with writing(path, "check free space and permissions"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_bytes(data)


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
