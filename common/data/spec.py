"""Datasets described by a `dataset.yaml`: where files lie, how stored label ids become train ids, which lists exist.

The built-in datasets and a user's own use the same file (see `splits/README.md`); no dataset has Python code of
its own except `shapes`, whose images are generated.
"""

from __future__ import annotations

import importlib
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from common.data.files import Range, Uint8, read_index_mask, read_rgb, remarks
from common.data.lists import Entry, id_of, read_entries, strip_suffix
from common.errors import UserError

IGNORE = 255
SPLITS = Path(__file__).resolve().parents[2] / "splits"
PREPARED = ("voc", "cityscapes", "coco", "pascal_context", "ade20k")  # by `python -m splits prepare`
BUILT_IN = (*PREPARED, "camvid", "shapes")
INVALID = 254  # never a train id: marks stored values that belong to no class while decoding


@dataclass(frozen=True)
class Item:
    """One photo: its id, its file, the file of its mask (None for a photo without one) and how that is decoded.

    Attributes:
        lut: Table of the pattern that found the mask; None where a list line names the mask itself.
    """

    id: str
    image: Path
    label: Path | None
    lut: Uint8 | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, eq=False)
class LabelPattern:
    """One place where a mask may lie, and the table (65536,) from its stored values to train ids."""

    pattern: str
    lut: Uint8


@dataclass(frozen=True, eq=False)
class DatasetSpec:
    """A dataset as its `dataset.yaml` describes it.

    Attributes:
        name: Short name; also the folder below `SSS_DATA` that is tried first.
        root: Folder of the files, whether it exists or not; None for a generated dataset.
        classes: Names in train id order.
        palette: Colours, uint8 (K, 3) RGB.
        label_map: Table uint8 (65536,) from stored values to train ids; 255 = ignore, 254 = an error. A pattern
            in `labels` may have its own.
        lists: Official lists ("train", "val", ...) and their files, whether they exist or not.
        ranges: The same for a generated dataset: indices instead of a file.
        splits_dir: Folder of the yaml, below which splits are looked up and made.
        source: The yaml itself.
        images: Patterns of image files relative to the root, tried in order.
        labels: Patterns of masks, tried in order.
        variables: Further names in patterns: alternatives to try, or a regular expression for a part of the id.
        label_format: "index" for class ids, "color" for masks painted in the palette.
        ignore_colors: With "color": colours that mean ignore.
        keep_folders: Whether an id keeps the folders of its list line (`ids: path`).
        generator: module of a generated dataset: `render(index)` makes image and label map, `draw` a random split;
            None for files.
        confirmed_0_255: Whether masks of 0 and 255 alone are meant as class 0 and ignore in a 2-class dataset.
        upright: Whether photos and masks are turned as their EXIF orientation says.
        value_range: Of photos of more than 8 bits, see `read_rgb`.
        searched: The roots that were tried.
    """

    name: str
    root: Path | None
    classes: tuple[str, ...]
    palette: Uint8
    label_map: Uint8
    lists: dict[str, Path]
    ranges: dict[str, range]
    splits_dir: Path
    source: Path
    images: tuple[str, ...] = ()
    labels: tuple[LabelPattern, ...] = ()
    variables: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    label_format: Literal["index", "color"] = "index"
    ignore_colors: tuple[tuple[int, int, int], ...] = ()
    keep_folders: bool = False
    generator: str | None = None
    confirmed_0_255: bool = False
    upright: bool = True
    value_range: Range | None = None
    searched: tuple[Path, ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return len(self.classes)

    @property
    def built_in(self) -> bool:
        """Whether this is a dataset of the papers, whose files and lists are known."""
        return self.name in BUILT_IN and self.splits_dir.parent == SPLITS

    @property
    def list_names(self) -> list[str]:
        """Names of the official lists."""
        return [*self.lists, *self.ranges]

    def require_root(self) -> Path:
        """The root, once it is sure that it exists and holds one of the image folders.

        Raises:
            UserError: It does not.
        """
        if self.root is None:
            raise UserError(f"dataset '{self.name}': generated in memory, it has no folder of files")
        remedy = f"; set SSS_DATA or data.root to the folder of dataset '{self.name}'"
        if self.built_in:
            remedy += f", or run '{self._prepare}'" if self.name in PREPARED else ""
        elif self.root in self.searched and len(self.searched) == 1:
            remedy = (
                f"; correct 'root' in {self.source}, or set data.root to the folder of dataset '{self.name}'"
            )
        if not self.root.is_dir():
            tried = ", ".join(str(path) for path in self.searched)
            raise UserError(f"data.root={self.root}: no such folder (tried {tried}){remedy}")
        expected = image_folders(self.images, self.variables)
        if expected and not any((self.root / folder).is_dir() for folder in expected):
            raise UserError(f"data.root={self.root}: expected folder '{expected[0]}' is missing{remedy}")
        return self.root

    def read_list(self, name_or_path: str | Path, labels: bool | None = None) -> list[Item]:
        """Items of an official list or of a list file, in file order.

        Args:
            name_or_path: "train", "val", ... for an official list; otherwise a file, looked up from the working
                directory, the folder of the yaml and the data root.
            labels: Whether a photo without a mask is an error; None asks for masks in "val" only.

        Raises:
            UserError: A missing data folder, list or file, or one id for two different files.
        """
        name = str(name_or_path)
        if name in self.ranges:
            return [self._generated(f"{index:06d}") for index in self.ranges[name]]
        if name in self.lists and not self.lists[name].is_file():
            self.require_root()  # the list may be among the files: their absence comes first
        path = self.list_file(name)
        need_labels = name == "val" if labels is None else labels
        return self.find_items(read_entries(path), path, need_labels)

    def find_items(
        self, entries: Sequence[Entry], where: Path, labels: bool, *, tolerant: bool = False
    ) -> list[Item]:
        """Items of list lines.

        Args:
            entries: The lines.
            where: The list file, for error messages.
            labels: Whether a photo without a mask is an error.
            tolerant: Leave out lines without a photo.

        Raises:
            UserError: As for `read_list`; names the first line and counts the others.
        """
        finder = None if self.generator else Finder(self)
        items, seen, wrong = [], dict[str, Path](), []
        for entry in entries:
            place = f"{where}:{entry.line}"
            try:
                item = (
                    finder.item(entry, place, labels=labels) if finder else self._generated(entry.id, place)
                )
            except UserError as error:
                wrong.append(str(error))
                continue
            if seen.setdefault(item.id, item.image) != item.image:
                wrong.append(
                    f"{place}: '{item.id}' names both {seen[item.id]} and {item.image}; set 'ids: path' "
                    f"in {self.source} so that ids keep their folders"
                )
            items.append(item)
        if wrong and not tolerant:
            raise UserError(wrong[0] + (f" ({len(wrong) - 1} more such lines)" if len(wrong) > 1 else ""))
        return items

    def id_of(self, image: str) -> str:
        """The id of an image field: normalized, or with its folders where the yaml says `ids: path`."""
        return strip_suffix(re.sub(r"^(\./|/)+", "", image)) if self.keep_folders else id_of(image)

    def lut_of(self, mask: Path) -> Uint8 | None:
        """The table of the pattern that a mask named by its path looks like; None for that of the dataset."""
        own = (label for label in self.labels if label.lut is not self.label_map)
        return next((label.lut for label in own if _matches(label.pattern, mask)), None)

    def load_image(self, item: Item) -> Uint8:
        """The photo as RGB, uint8 (H, W, 3), contiguous; see `read_rgb`.

        Raises:
            UserError: The file is absent, damaged or not an image.
        """
        if self.generator:
            return self._render(item)[0]
        return read_rgb(item.image, upright=self.upright, value_range=self.value_range)

    def load_label(self, item: Item) -> Uint8:
        """The mask as train ids 0..K-1 and 255 for ignored pixels, uint8 (H, W), contiguous.

        Raises:
            UserError: The photo has no mask; the file is absent or damaged; a stored value belongs to no class.
        """
        if item.label is None:
            raise UserError(f"{item.image}: has no mask; remove it from the labeled list, or add its mask")
        if self.generator:
            return self._render(item)[1]
        if self.label_format == "color":
            return self._decode_colors(read_rgb(item.label, "mask", upright=self.upright), item.label)
        return self._decode(read_index_mask(item.label, upright=self.upright), item)

    def _decode(self, stored: np.ndarray[Any, Any], item: Item) -> Uint8:
        lut, path = self.label_map if item.lut is None else item.lut, item.label
        if self.num_classes == 2 and lut[255] == IGNORE and not self.confirmed_0_255 and _is_0_255(stored):
            raise UserError(
                f"{path}: holds the values 0 and 255 only, and 255 is ignored, so no pixel is '{self.classes[1]}'; "
                f"set 'label_map: {{255: 1}}' in {self.source} (and 'ignore: none'), or 'confirm_0_255: true' if 255 "
                "does mean ignore"
            )
        decoded: Uint8 = lut[stored]
        if (decoded == INVALID).any():
            values, counts = np.unique(stored[decoded == INVALID], return_counts=True)
            others = f"; also {', '.join(map(str, values[1:6]))}" if len(values) > 1 else ""
            ignored = [str(value) for value in np.flatnonzero(lut == IGNORE)[:4]]
            raise UserError(
                f"{path}: label value {values[0]} ({counts[0]} pixels{others}) belongs to none of the "
                f"{self.num_classes} classes (0..{self.num_classes - 1}; ignored: {', '.join(ignored) or 'none'}); "
                f"correct the mask, or name the value in 'label_map' or 'ignore' of {self.source}"
            )
        return decoded

    def _decode_colors(self, rgb: Uint8, path: Path) -> Uint8:
        colors = np.concatenate([self.palette, np.array(self.ignore_colors, np.uint8).reshape(-1, 3)])
        targets = np.r_[np.arange(self.num_classes), np.full(len(self.ignore_colors), IGNORE)].astype(
            np.uint8
        )
        known = _color_codes(colors)
        order = np.argsort(known)
        codes = _color_codes(rgb)
        place = np.searchsorted(known[order], codes).clip(max=len(known) - 1)
        wrong = known[order][place] != codes
        if wrong.any():
            red, green, blue = rgb[wrong][0]
            raise UserError(
                f"{path}: colour ({red}, {green}, {blue}) of {int(wrong.sum())} pixels is not in the palette; store "
                f"masks without loss (PNG), or add the colour to 'palette' or 'ignore_colors' of {self.source}"
            )
        decoded: Uint8 = targets[order][place]
        return decoded

    def list_file(self, name: str) -> Path:
        """The file of an official list, or of one named by its path; `UserError` if it is missing."""
        if name in self.lists:
            if not self.lists[name].is_file():
                raise UserError(
                    f"{self.lists[name]}: the '{name}' list is missing; {self._list_remedy(name)}"
                )
            return self.lists[name]
        path = Path(name)
        places = [path, self.splits_dir / path, *([self.root / path] if self.root else [])]
        for place in places:
            if place.is_file():
                return place
        raise UserError(
            f"{name}: no such list; give a file or one of the lists of '{self.name}': "
            f"{', '.join(self.list_names) or 'none'}"
        )

    @property
    def _prepare(self) -> str:
        return f"python -m splits prepare {self.name} --source DIR --out DIR --download"

    def _list_remedy(self, name: str) -> str:
        if self.splits_dir.parent == SPLITS:
            published = f"{self.name}/{self.lists[name].stem}"
            if published in published_names():
                return f"run 'python -m splits get {published}'"
            if self.name in PREPARED:
                return f"run '{self._prepare}'"
        return f"write it, one id per line, or correct 'lists' in {self.source}"

    def _render(self, item: Item) -> tuple[Uint8, Uint8]:
        assert self.generator is not None
        image, label = importlib.import_module(self.generator).render(int(item.id))
        return np.ascontiguousarray(image), np.ascontiguousarray(label)

    def _generated(self, name: str, where: str = "list") -> Item:
        if not name.isdecimal():
            raise UserError(
                f"{where}: '{name}' is not an index; ids of '{self.name}' are numbers such as 000123"
            )
        path = Path(self.name) / name
        return Item(name, path, path)


def check_pair(item: Item, image: Uint8, label: Uint8) -> None:
    """Check that a photo (H, W, 3) and its mask (H, W) have one size.

    Raises:
        UserError: They differ.
    """
    if image.shape[:2] != label.shape[:2]:
        sizes = [f"{array.shape[1]}x{array.shape[0]}" for array in (label, image)]
        turned = next(
            (
                f", or see 'orientation' in dataset.yaml: {one}"
                for one in remarks(item.image)
                if "orientation" in one
            ),
            "",
        )
        raise UserError(
            f"{item.label}: mask is {sizes[0]} pixels but {item.image} is {sizes[1]}; replace the one that is wrong"
            f"{turned}"
        )


def _is_0_255(stored: np.ndarray[Any, Any]) -> bool:
    void = stored == 255
    zero = stored == 0
    return bool(void.any() and zero.any() and (void | zero).all())


def _color_codes(colors: Uint8) -> np.ndarray[Any, np.dtype[np.int32]]:
    wide = colors.astype(np.int32)
    return (wide[..., 0] << 16) | (wide[..., 1] << 8) | wide[..., 2]


def image_folders(images: Iterable[str], variables: Mapping[str, str | tuple[str, ...]]) -> list[str]:
    """The fixed leading folders of image patterns, each alternative of a leading variable on its own."""
    folders: list[str] = []
    for pattern in images:
        options = {name: value for name, value in variables.items() if isinstance(value, tuple)}
        for filled in _fill(pattern, options):
            head = filled.split("{", 1)[0]
            folders.append(head.rsplit("/", 1)[0] if "/" in head else "")
    return list(dict.fromkeys(folder for folder in folders if folder))


def _fill(pattern: str, options: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    used = [name for name in options if f"{{{name}}}" in pattern]
    for values in product(*(options[name] for name in used)):
        filled = pattern
        for name, value in zip(used, values, strict=True):
            filled = filled.replace(f"{{{name}}}", value)
        yield filled


class Finder:
    """Finds the files of list lines; each folder is listed once, which beats one request per file on network disks.

    A field that names a file below the root (or by its absolute path) is that file. Otherwise the patterns decide by
    the id; of an own dataset only a file of the name that stands in the field, as nothing else was meant.
    """

    def __init__(self, spec: DatasetSpec) -> None:
        self.spec, self.root = spec, spec.require_root().as_posix()
        self.folders: dict[str, dict[str, str]] = {}
        self.options = {name: value for name, value in spec.variables.items() if isinstance(value, tuple)}
        self.parts = {
            name: re.compile(value) for name, value in spec.variables.items() if isinstance(value, str)
        }
        self.image_patterns = [filled for pattern in spec.images for filled in _fill(pattern, self.options)]
        self.masks = {filled: label for label in spec.labels for filled in _fill(label.pattern, self.options)}
        self.ids = [] if spec.built_in else [_reversed(pattern) for pattern in self.image_patterns]

    def item(self, entry: Entry, where: str, *, labels: bool = False) -> Item:
        """The item of a list line, with label None where no mask is found; with `labels` that is an error."""
        readings = entry.readings
        for image, label in readings:
            keys = self._keys(image)
            photo, _ = self._first(self.image_patterns, keys, image, named="/" in image)
            if photo is None:
                continue
            mask_keys = self._mask_keys(photo, keys, label)
            mask, pattern = self._first(self.masks, mask_keys, label)
            if mask is None and label is not None and len(readings) > 2:
                continue  # of several ways to cut a line only one with both files is meant
            if mask is None and labels:
                raise UserError(self._missing("mask", image, where, self.masks, mask_keys, label))
            lut = None if mask is None else self.masks[pattern].lut if pattern else self.spec.lut_of(mask)
            return Item(self.spec.id_of(image), photo, mask, lut)
        keys = self._keys(entry.image)
        raise UserError(self._missing("image", entry.image, where, self.image_patterns, keys, entry.image))

    def _keys(self, image: str) -> list[str]:
        return list(dict.fromkeys((self.spec.id_of(image), strip_suffix(image.lstrip("./")))))

    def _mask_keys(self, photo: Path, keys: list[str], label: str | None) -> list[str]:
        """What may stand for `{id}` in the pattern of a mask: what does in that of the photo, or the mask's own name.

        A photo that no pattern describes has no mask by its name alone if that is another photo's.
        """
        if self.spec.built_in:
            return keys
        below = photo.as_posix().removeprefix(f"{self.root}/")
        known = [found["id"] for pattern in self.ids if (found := pattern.fullmatch(below))]
        if not known and self._first(self.image_patterns, keys, None)[0] in (None, photo):
            known = keys
        return known if label is None else [*known, strip_suffix(label)]

    def _missing(
        self, what: str, image: str, where: str, patterns: Iterable[str], keys: list[str], literal: str | None
    ) -> str:
        """The error message for a list line without a file."""
        tried = [path for path, _ in self._candidates(patterns, keys, literal)]
        more = f" and {len(tried) - 2} more" if len(tried) > 2 else ""
        return (
            f"{where}: no {what} for '{self.spec.id_of(image)}' (tried {', '.join(tried[:2])}{more}); "
            f"restore the file, remove the line, or correct the patterns in {self.spec.source}"
        )

    def _first(
        self, patterns: Iterable[str], keys: list[str], literal: str | None, *, named: bool = True
    ) -> tuple[Path | None, str | None]:
        """The first file that exists, and the pattern it was found by."""
        for path, pattern in self._candidates(patterns, keys, literal, named=named):
            folder, _, name = path.rpartition("/")
            if folder not in self.folders:
                self.folders[folder] = names_in(folder or "/")
            if name in self.folders[folder]:
                return Path(folder, self.folders[folder][name]), pattern
        return None, None

    def _candidates(
        self, patterns: Iterable[str], keys: list[str], literal: str | None, *, named: bool = True
    ) -> Iterator[tuple[str, str | None]]:
        """Paths as text, the likely ones first; `Path` objects would take most of the time for long lists."""
        if literal is not None and ("/" in literal or "." in literal):
            yield f"{self.root}/{literal.lstrip('/')}", None
            if literal.startswith("/"):
                yield literal, None
        ending = ""
        if literal is not None and named and not self.spec.built_in:
            ending = "/" + re.sub(r"^(\./|/)+", "", literal)
        for key in keys:
            values = {"id": key}
            for variable, part in self.parts.items():
                match = part.search(key.rsplit("/", 1)[-1])
                values[variable] = match.group(0) if match else ""
            for pattern in patterns:
                path = f"{self.root}/{pattern.format(**values)}"
                if path.endswith(ending) or strip_suffix(path).endswith(ending):
                    yield path, pattern


def _reversed(pattern: str) -> re.Pattern[str]:
    """What finds the id in a path below the root that a pattern describes."""
    parts = re.split(r"\{(\w+)\}", pattern)
    parts[::2] = map(re.escape, parts[::2])
    names = [r"(?P<id>.+)" if name == "id" else "[^/]+" for name in parts[1::2]]
    seen = parts[1::2].index("id")
    parts[1::2] = [r"(?P=id)" if i > seen and one != "[^/]+" else one for i, one in enumerate(names)]
    return re.compile("".join(parts))


def _matches(pattern: str, path: Path) -> bool:
    parts = re.split(r"\{\w+\}", pattern)
    return bool(re.search("(^|/)" + ".+".join(map(re.escape, parts)) + "$", path.as_posix()))


def names_in(folder: str) -> dict[str, str]:
    """Names in a folder, as they are and in Unicode's composed form (that of lists), and the files that they mean."""
    try:
        names = os.listdir(folder)
    except OSError:
        return {}
    return {unicodedata.normalize("NFC", name): name for name in names} | {name: name for name in names}


def published_names() -> set[str]:
    """Names in `splits/published.yaml`; empty where the file is absent."""
    path = SPLITS / "published.yaml"
    if not path.is_file():
        return set()
    return {entry["name"] for entry in yaml.safe_load(path.read_text(encoding="utf-8"))["lists"]}
