"""Masks as pictures (numbers, palettes, colours), and the files that say what their colours and numbers mean."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from common.data.files import read_index_mask, read_rgb
from common.errors import UserError
from splits.init.annotation import Annotation, Canvas, Key, Note, require_size

Color = tuple[int, int, int]

FEW = 64  # a sample of a mask has at most so many values; a photo has more
SAMPLE = 256  # rows and columns of that sample
MOST = 1000  # values of a whole mask, beyond which it is none
MAX_BYTES = 100_000  # of a file that explains colours
PACK = np.array([65536, 256, 1], dtype=np.int32)  # a colour as one number
INDEX_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")


def has_few_values(path: Path) -> bool:
    """Whether a picture could be a mask: stored without loss, with few values or colours."""
    try:
        with Image.open(path) as file:
            if file.format in ("JPEG", "WEBP") or file.mode.startswith("F"):
                return False
            picture = file if file.mode in INDEX_MODES else file.convert("RGB")
            steps = [max(1, length // SAMPLE) for length in (file.height, file.width)]
            pixels = np.array(picture)[:: steps[0], :: steps[1]]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
    return len(np.unique(pixels.reshape(-1, *pixels.shape[2:]), axis=0)) <= FEW


def mask_annotation(path: Path, source: str, photo: str, colors: Mapping[Color, str]) -> Annotation:
    """The annotation that a picture is; its classes are the stored numbers, or colours where it is painted in them.

    A palette counts as paint where every colour in use is one of `colors`, else as numbers.
    """

    def paint(height: int, width: int, _: Note) -> tuple[Canvas, list[Key]]:
        with Image.open(path) as file:
            index, rows = file.mode in INDEX_MODES, file.getpalette("RGB") if file.mode == "P" else None
        stored: np.ndarray[Any, Any] = (
            read_index_mask(path) if index else read_rgb(path, "mask").astype(np.int32)
        )
        require_size(stored.shape[:2], height, width)
        values, place = np.unique(stored if index else stored @ PACK, return_inverse=True)
        if len(values) > MOST:
            raise UserError(
                f"holds {len(values)} {'values' if index else 'colours'}; a mask has one per class: save it as PNG, "
                "which loses nothing, with numbers of classes instead of objects"
            )
        found = [int(value) for value in values]
        keys: list[Key] = [v if index else (v >> 16, v >> 8 & 255, v & 255) for v in found]
        painted = [(*rows[3 * v : 3 * v + 3],) for v in found] if rows else []
        if painted and all(color in colors for color in painted):
            keys = list(painted)
        return place.reshape(height, width).astype(np.uint16), keys

    return Annotation(photo, source, paint)


def palette_of(path: Path) -> dict[int, Color]:
    """The colours of a palette picture by number; empty for other pictures."""
    with Image.open(path) as file:
        rows = np.array(file.getpalette("RGB") or [] if file.mode == "P" else []).reshape(-1, 3).tolist()
    return {number: (row[0], row[1], row[2]) for number, row in enumerate(rows)}


# Files that explain


def read_colors(path: Path) -> dict[Color, str]:
    """The names of colours that a file gives; empty where it is no such file.

    Read are lines of a name and three numbers in any order (tables of CamVid, CVAT's `labelmap.txt`, CSV), and YAML or
    JSON in which a name stands with a colour, as numbers or `#rrggbb`.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            return {}
        text = path.read_bytes().decode("utf-8-sig")
        if path.suffix.lower() in (".json", ".yaml", ".yml"):
            pairs = list(
                _from_tree(json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text))
            )
        else:
            pairs = _from_lines(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    colors: dict[Color, str] = {}
    for color, name in pairs:
        colors.setdefault(color, name)
    return colors if len(colors) > 1 else {}


def _from_lines(text: str) -> list[tuple[Color, str]]:
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    pairs = []
    for line in lines:
        parts = [part.strip() for part in re.split(r"[\s,;:]+", line) if part.strip()]
        runs = re.findall(r"(?:(?<= )|^)\d{1,3}(?: \d{1,3}){2,}(?= |$)", " ".join(parts))
        words = [part for part in parts if not part.isdecimal()]
        if not runs or not words:
            continue
        numbers = [int(number) for number in runs[0].split()]
        three = numbers[-3:] if parts[0].isdecimal() else numbers[:3]  # before them a number of the class
        if max(three) < 256:
            pairs.append(((three[0], three[1], three[2]), " ".join(words)))
    return pairs if len(pairs) >= len(lines) - 1 else []  # a heading is no colour


def _from_tree(tree: Any) -> Iterator[tuple[Color, str]]:
    if isinstance(tree, list):
        for entry in tree:
            yield from _from_tree(entry)
    elif isinstance(tree, dict):
        name, color = tree.get("name", tree.get("label")), to_color(tree.get("color", tree.get("colour")))
        if isinstance(name, str) and color:
            yield color, name
            return
        for key, value in tree.items():
            color = to_color(value)
            if color:
                yield color, str(key)
            else:
                yield from _from_tree(value)


def to_color(value: Any) -> Color | None:
    """A colour of three numbers or `#rrggbb`; None where it is neither."""
    if isinstance(value, str) and re.fullmatch(r"#[0-9a-fA-F]{6}", value):
        return int(value[1:3], 16), int(value[3:5], 16), int(value[5:7], 16)
    if isinstance(value, list) and len(value) == 3 and all(type(x) is int and 0 <= x < 256 for x in value):
        return value[0], value[1], value[2]
    return None


def read_names(path: Path) -> list[str]:
    """Names of classes 0, 1, ..., one per line; labelme's first line `__ignore__` counts as none."""
    try:
        lines = [line.strip() for line in path.read_bytes().decode("utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError):
        return []
    return lines[1:] if lines[:1] == ["__ignore__"] else lines
