"""Paints the annotations, numbers their classes, and writes photos, masks, `dataset.yaml` and lists."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from common.data.dataset_yaml import MAX_CLASSES
from common.data.files import Uint8, read_index_mask, voc_colormap, write_bytes
from common.data.spec import IGNORE
from common.errors import UserError
from splits.init.annotation import UNPAINTED, Canvas, Key, Note, noting
from splits.init.found import Found, find_photo
from splits.init.masks import Color
from splits.prepare.archives import for_each, link

BACKGROUND = "background"
NAMES_OF_BACKGROUND = {"background", "_background_", "__background__", "bg"}
NAMES_OF_NOTHING = {
    "ignore",
    "ignored",
    "__ignore__",
    "ignore_color",
    "void",
    "unlabeled",
    "unlabelled",
    "dontcare",
}
RECORD = "init.json"


@dataclass(frozen=True)
class Painted:
    """The painted annotation of a photo: packed numbers, what class each stands for, and its pixels."""

    source: str
    size: tuple[int, int]
    packed: bytes
    keys: list[Key]
    pixels: list[int]

    @property
    def canvas(self) -> Canvas:
        """The numbers (H, W)."""
        canvas: Canvas = np.frombuffer(zlib.decompress(self.packed), dtype=np.uint16).reshape(self.size)
        return canvas


def paint_all(found: Found, sizes: Mapping[str, tuple[int, int]], note: Note) -> dict[str, Painted]:
    """Paint the annotation of every photo that has one; what does not fit becomes a remark.

    Args:
        found: What was found.
        sizes: Height and width of the photos that can be read.
        note: Where remarks go.
    """
    by_name: dict[str, list[str]] = {}
    for number in found.photos:
        by_name.setdefault(number.rpartition("/")[2], []).append(number)
    chosen, painted = dict[str, Any](), dict[str, Painted]()
    for annotation in found.annotations:
        with noting(note, annotation.source):
            number = find_photo(annotation.photo, by_name)
            if number not in sizes:
                continue  # the photo cannot be read, which was said
            first = chosen.setdefault(number, annotation)
            if first is not annotation:
                raise UserError(
                    f"'{number}' has two annotations; that of {first.source} is used, this one left out"
                )

    def paint(pair: tuple[str, Any]) -> None:
        number, annotation = pair
        with noting(note, annotation.source):
            canvas, keys = annotation.paint(*sizes[number], lambda line: note(f"{annotation.source}: {line}"))
            pixels = np.bincount(canvas.ravel(), minlength=len(keys)).tolist()
            painted[number] = Painted(
                annotation.source, canvas.shape, zlib.compress(canvas.tobytes(), 1), keys, pixels
            )

    for_each(paint, list(chosen.items()), "annotations")
    return {number: painted[number] for number in chosen if number in painted}


class Meaning:
    """What names, stored values and colours mean, as far as a user, a file or their own set tells."""

    def __init__(self, keys: Iterable[Key], found: Found, given: Sequence[str], unpainted: str) -> None:
        self.colors, self.names, self.given, self.unpainted = (
            found.colors,
            given or found.names,
            given,
            unpainted,
        )
        painted = [key for key in keys if isinstance(key, tuple)]
        self.grey = not self.colors and all(
            len(set(color)) == 1 for color in painted
        )  # numbers in all channels
        self.values = {self._value(key) for key in keys} - {None}
        self.drawn = any(isinstance(key, str) for key in keys)

    def _value(self, key: Key) -> int | None:
        return key if isinstance(key, int) else key[0] if self.grey and isinstance(key, tuple) else None

    def name(self, key: Key) -> str | None:
        """The class of a key; None for pixels that count nowhere."""
        value = self._value(key)
        if self.is_nothing(key):
            return None
        if value is not None:
            name = self._name_of_value(value)
        elif isinstance(key, tuple):
            free = BACKGROUND if key == (0, 0, 0) else "color_{:02x}{:02x}{:02x}".format(*key)
            name = self.colors.get(key) if self.colors else free
        else:
            name = BACKGROUND if key == UNPAINTED else str(key).strip()
        name = BACKGROUND if name and name.lower() in NAMES_OF_BACKGROUND else name
        closed = self.given and value is None and name not in (*self.given, BACKGROUND)
        return None if closed else name

    def _name_of_value(self, value: int) -> str | None:
        if self.names:
            return self.names[value] if value < len(self.names) else None
        if self.values <= {0, IGNORE} and IGNORE in self.values:
            return "foreground" if value else BACKGROUND
        return BACKGROUND if self.drawn and value == 0 else f"class_{value}"

    def is_nothing(self, key: Key) -> bool:
        """Whether a key is known to mean that pixels count nowhere."""
        if key == UNPAINTED:
            return self.unpainted != BACKGROUND
        value = self._value(key)
        if value is not None:
            void = value in (IGNORE, 65535) and not self.values <= {0, IGNORE}
            named = self.names[value] if value < len(self.names) else ""
            return (void and not named) or named.lower() in NAMES_OF_NOTHING
        name = self.colors.get(key, "") if isinstance(key, tuple) else key
        return str(name).strip().lower() in NAMES_OF_NOTHING


class Classes:
    """The classes of a dataset in their order, and which of them every name, stored value and colour means.

    What was decided once is kept in `init.json`: names may be changed in `dataset.yaml`, and new classes come last.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.source = out, out / "dataset.yaml"
        self.names: list[str] = []
        self.numbers: dict[Key, int] = {}
        self.old: dict[str, Any] = {}
        self.colors: dict[Any, Color] = {}
        if self.source.is_file():
            if not (out / RECORD).is_file():
                raise UserError(f"{self.source}: was not made by init; give another folder as --out")
            self.old = yaml.safe_load(self.source.read_text(encoding="utf-8"))
            self.names = [str(name) for name in self.old["classes"]]
            known = json.loads((out / RECORD).read_text(encoding="utf-8"))
            self.numbers = {tuple(key) if isinstance(key, list) else key: number for key, number in known}

    def learn(
        self, painted: Mapping[str, Painted], found: Found, given: Sequence[str], unpainted: str, note: Note
    ) -> list[str]:
        """Number what the painted photos show; the names of classes that are new.

        Args:
            painted: The painted annotations of photos.
            found: Names of colours and numbers.
            given: Names of all classes in their order, where the user says them.
            unpainted: "background" or "ignore", for pixels that no shape covers.
            note: Where remarks on what is no class go.

        Raises:
            UserError: Fewer than two classes, or too many.
        """
        photos: dict[Key, list[str]] = {}
        for one in painted.values():
            for key, pixels in zip(one.keys, one.pixels, strict=True):
                if pixels:
                    photos.setdefault(key, []).append(one.source)
        read = [*given, *found.names, *found.colors.values()]
        order = {name: place for place, name in reversed(list(enumerate(read)))}
        meant = Meaning(photos.keys(), found, given, unpainted)
        new = {key: meant.name(key) for key in photos if key not in self.numbers}
        before = len(self.names)
        for key in sorted(new, key=lambda key: (order.get(new[key] or "", len(read)), new[key] != BACKGROUND,
                                                str(type(key)), key)):  # fmt: skip
            name = new[key]
            if name is None and not meant.is_nothing(key):
                some = f" ({len(photos[key])} photos)" if len(photos[key]) > 1 else ""
                note(f"{photos[key][0]}: {key!r} is none of the classes; its pixels count nowhere{some}")
            elif name is not None and name not in self.names:
                self.names.append(name)
            self.numbers[key] = IGNORE if name is None else self.names.index(name)
        self.colors = {**found.shown, **{key: key for key in self.numbers if isinstance(key, tuple)}}
        if not 1 < len(self.names) <= MAX_CLASSES:
            raise UserError(
                f"{len(self.names)} classes found ({', '.join(self.names[:5])}); training needs 2 to {MAX_CLASSES}: "
                "annotate more, or name the colours with --colors and the classes with --classes"
            )
        return self.names[before:]

    def palette(self) -> list[list[int]]:
        """One colour per class: that of the annotations where it is known, else of the VOC colour map."""
        colors = [list(map(int, row)) for row in voc_colormap(len(self.names))]
        for key, number in self.numbers.items():
            if key in self.colors and number != IGNORE:
                colors[number] = list(self.colors[key])
        old = self.old.get("palette", [])
        colors[: len(old)] = old
        return colors

    def mask(self, painted: Painted) -> Uint8:
        """The mask of a photo, classes and 255, uint8 (H, W)."""
        table = np.array([self.numbers.get(key, IGNORE) for key in painted.keys], dtype=np.uint8)
        result: Uint8 = table[painted.canvas]
        return result

    def shows(self, painted: Painted) -> dict[int, int]:
        """Pixels of a photo by class."""
        counts: dict[int, int] = {}
        for key, pixels in zip(painted.keys, painted.pixels, strict=True):
            if pixels and self.numbers[key] != IGNORE:
                counts[self.numbers[key]] = counts.get(self.numbers[key], 0) + pixels
        return counts

    def save(self, images: Iterable[str], reading: Mapping[str, Any]) -> None:
        """Write `init.json` and `dataset.yaml`; one without a new class or ending of photos is kept as `.before`."""
        content = {
            "name": self.out.name, "root": ".", "images": [], "labels": "mask/{id}.png", "ids": "path",
            "lists": {"train": "train.txt", "val": "val.txt"}, "ignore": IGNORE, **reading, **self.old,
            "classes": self.names, "palette": self.palette(),
        }  # fmt: skip
        content["images"] = list(dict.fromkeys([*content["images"], *images]))
        write_bytes(self.out / RECORD, json.dumps(list(self.numbers.items())).encode())
        if content != self.old:
            if self.old:
                shutil.copyfile(self.source, self.out / "dataset.yaml.before")
            write_bytes(self.source, to_yaml(content))


def to_yaml(content: Mapping[str, Any]) -> bytes:
    """The text of a YAML file."""
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)
    return text.encode()


def write_photos(photos: Mapping[str, Path], out: Path) -> dict[str, Path]:
    """Put photos into `out/img` as hard links, or copies on another disk; their places by id."""
    places = {number: out / "img" / f"{number}{_ending(path)}" for number, path in photos.items()}

    def put(number: str) -> None:
        if not places[number].exists():
            link(photos[number], places[number])

    for_each(put, list(photos), "photos")
    return places


def _ending(path: Path) -> str:
    """The ending that the photo's copy has: its own, or that of its format where it has none."""
    if path.suffix.lower() in Image.registered_extensions():
        return path.suffix
    with Image.open(path) as file:
        return f".{(file.format or 'png').lower()}"


def write_masks(painted: Mapping[str, Painted], classes: Classes, out: Path, note: Note) -> list[str]:
    """Write masks that are not there yet; the ids of the new ones. Annotations that have changed become remarks."""
    new = []
    palette = np.full((256, 3), 255, dtype=np.uint8)
    palette[: len(classes.names)] = classes.palette()

    def write(number: str) -> None:
        path, mask = out / "mask" / f"{number}.png", classes.mask(painted[number])
        if path.is_file():
            if not np.array_equal(read_index_mask(path), mask):
                note(
                    f"{painted[number].source}: differs from {path}, which is kept; remove that file to take it anew"
                )
            return
        picture, buffer = Image.fromarray(mask), io.BytesIO()
        picture.putpalette(palette.tobytes())
        picture.save(buffer, format="PNG")
        write_bytes(path, buffer.getvalue())
        new.append(number)

    for_each(write, list(painted), "masks")
    return sorted(new)


def unused(folder: Path, texts: Mapping[str, bytes]) -> Path:
    """The folder, or one with a number behind its name: the first in which no file of these has another content."""
    for number in itertools.count(1):
        place = folder if number == 1 else folder.with_name(f"{folder.name}_{number}")
        paths = {place / name: text for name, text in texts.items()}
        if all(not path.is_file() or path.read_bytes() == text for path, text in paths.items()):
            break
    return place


def extend_list(path: Path, ids: Iterable[str]) -> None:
    """Write a list of ids, or put those that are new at the end of one that is there."""
    before = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    new = [number for number in ids if number not in set(before)]
    if new:
        write_bytes(path, ("\n".join([*before, *new]) + "\n").encode())
