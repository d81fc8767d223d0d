"""Looks at folders: which files are photos, which are annotations of which kind, and what is neither."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from common.errors import UserError
from splits.init.annotation import Annotation, Note, noting
from splits.init.coco import read_coco
from splits.init.masks import (
    Color,
    has_few_values,
    mask_annotation,
    palette_of,
    read_colors,
    read_names,
    to_color,
)  # fmt: skip
from splits.init.polygons import read_cvat, read_label_studio, read_labelme
from splits.prepare.archives import Source, for_each, place, progress

NAMES = {"classes.txt", "labels.txt", "class_names.txt", "label_names.txt", "classes.names", "obj.names"}
MASKS = re.compile(r"mask|label|annot|segmentation|ground.?truth|(^|[^a-z])(gt|seg)([^a-z]|$)", re.IGNORECASE)
AFFIX = re.compile(
    r"^(mask|label|seg|gt)s?[_-]+|[_-]+(masks?|labels?|labelids|seg(mentation)?|annotation|gt|l|colou?r)$",
    re.IGNORECASE,
)
TEXTS = {".json", ".xml", ".txt", ".csv", ".yaml", ".yml", ".names", ".md"}


@dataclass
class Found:
    """What folders hold.

    Attributes:
        photos: Files by id: the path below the folder, without ending.
        annotations: As their files tell, photos by name.
        kinds: How many annotations of which kind.
        colors: Names of colours that masks are painted in.
        names: Names of the numbers 0, 1, ... that masks store.
        shown: Colours of classes by name or number, to show them in.
        left: Files that are neither, by the reason.
    """

    photos: dict[str, Path] = field(default_factory=dict)
    annotations: list[Annotation] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)
    colors: dict[Color, str] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    shown: dict[str | int, Color] = field(default_factory=dict)
    left: dict[str, list[str]] = field(default_factory=dict)

    def leave(self, reason: str, name: str) -> None:
        """Remember a file that is left out."""
        self.left.setdefault(reason, []).append(name)

    def add(self, kind: str, annotations: Iterator[Annotation] | Sequence[Annotation]) -> None:
        """Add annotations of a kind."""
        new = list(annotations)
        self.annotations += new
        self.kinds[kind] = self.kinds.get(kind, 0) + len(new)


def look(folder: Path, beside: Sequence[Path], out: Path, colors: Path | None, note: Note) -> Found:
    """Sort the files of a folder, of others beside it that hold annotations, and of archives in them.

    Args:
        folder: Of the photos, with or without annotations.
        beside: Further folders or files; pictures in them are photos only where the folder lacks them.
        out: The folder that is made, which is not looked into; archives are unpacked there.
        colors: A file that names colours; those that are found come after it.
        note: Where remarks go.

    Raises:
        UserError: A folder or file is not there.
    """
    found, files, pictures = Found(), [], []
    for place_ in (folder, *beside):
        if not place_.exists():
            raise UserError(f"{place_}: no such folder or file; give the folder of the photos")
        files += [(path, name, place_ is folder) for path, name in _files(place_, out, found, note)]
    for path, name, first in progress(files, "files", len(files)):
        if _is_picture(path):
            pictures.append((path, name, first))
        elif path.suffix.lower() not in TEXTS:
            reason = (
                "empty"
                if path.stat().st_size == 0
                else "neither a picture that Pillow reads nor an annotation"
            )
            found.leave(reason, name)
    if colors is not None:
        found.colors = read_colors(colors)
        if not found.colors:
            raise UserError(
                f"{colors}: names no colours; write a line such as 'leaf 60 180 75' for each class"
            )
    for path, _, _ in files:
        if path.name.lower() in NAMES and not read_colors(path):
            found.names = found.names or read_names(path)
        elif path.suffix.lower() in TEXTS - {".xml"}:
            found.colors = {**read_colors(path), **found.colors}
    found.shown |= {name: color for color, name in found.colors.items()}
    panoptic = _read_texts(files, pictures, found, note)
    _sort_pictures([one for one in pictures if one[0] not in panoptic], found, note)
    return found


def _files(place_: Path, out: Path, found: Found, note: Note) -> Iterator[tuple[Path, str]]:
    """All files below a folder, or a single one, with their names below it; archives of annotations are unpacked."""
    if place_.is_file():
        places = [(place_, place_.name)]
    else:
        places = [(path, path.relative_to(place_).as_posix()) for path in _walk(place_, out)]
    for path, name in places:
        if path.suffix.lower() != ".zip":
            yield path, name
            continue
        unpacked = out / "unpacked" / re.sub(r"\W+", "_", name)
        with noting(note, name):
            if not _holds_annotations(path):
                found.leave("an archive without annotations; unpack it if it holds photos", name)
                continue
            place(Source(path), unpacked, lambda inside: None if inside.endswith("/") else inside, path.name)
            yield from (
                (inner, f"{name}/{inner.relative_to(unpacked).as_posix()}") for inner in _walk(unpacked, None)
            )


def _walk(folder: Path, out: Path | None) -> Iterator[Path]:
    """The files below a folder, links followed once; neither hidden ones nor those of the folder that is made."""
    seen = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen or (out is not None and real == os.path.realpath(out)):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        yield from (Path(here, name) for name in sorted(names) if not name.startswith("."))


def _holds_annotations(archive: Path) -> bool:
    try:
        with zipfile.ZipFile(archive) as file:
            return any(
                re.search(r"\.(json|xml)$|labelmap\.txt$|SegmentationClass/", name)
                for name in file.namelist()
            )
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"damaged archive ({error}); get it again") from None


def _is_picture(path: Path) -> bool:
    if path.suffix.lower() in TEXTS:
        return False
    try:
        with Image.open(path):
            return True
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


Files = list[tuple[Path, str, bool]]


def _read_texts(files: Files, pictures: Files, found: Found, note: Note) -> set[Path]:
    """Read JSON and XML; the pictures that panoptic annotations name."""
    used: set[Path] = set()

    def picture(file: str) -> Path | None:
        fitting = [
            path for path, name, _ in pictures if path.suffix == ".png" and f"/{name}".endswith(f"/{file}")
        ]
        fitting += [path for path, _, _ in pictures if path.name == Path(file).name and path.suffix == ".png"]
        used.update(fitting[:1])
        return fitting[0] if fitting else None

    for path, name, _ in files:
        if path.suffix.lower() not in (".json", ".xml"):
            continue
        with noting(note, name):
            text = path.read_bytes().decode("utf-8-sig")
            if not text.strip():
                raise UserError("empty; annotate again, or remove it")
            if path.suffix.lower() == ".xml":
                annotations, colors = read_cvat(text, name, note)
                found.add("CVAT XML", annotations)
                found.shown |= {label: color for label, hexa in colors.items() if (color := to_color(hexa))}
                continue
            content = json.loads(text)
            kind = _kind(content)
            if kind == "labelme":
                found.add(kind, read_labelme(content, name, note))
            elif kind == "COCO":
                found.add(kind, read_coco(content, name, note, picture))
            elif kind == "Label Studio":
                found.add(kind, read_label_studio(content, name, note))
            elif not read_colors(path):
                found.leave("JSON of another kind than labelme, COCO and Label Studio", name)
    return used


def _kind(content: Any) -> str | None:
    if isinstance(content, dict):
        if isinstance(content.get("shapes"), list):
            return "labelme"
        return "COCO" if {"images", "annotations"} <= content.keys() else None
    tasks = content if isinstance(content, list) else []
    if tasks and all(
        isinstance(task, dict) and {"annotations", "image", "data"} & task.keys() for task in tasks
    ):
        return "Label Studio"
    return None


def _sort_pictures(pictures: Files, found: Found, note: Note) -> None:
    """Tell masks from photos: a mask has few values, and the name of a photo or of a folder of masks."""
    few: dict[Path, bool] = {}

    def examine(one: tuple[Path, str, bool]) -> None:
        few[one[0]] = has_few_values(one[0])

    for_each(examine, pictures, "pictures")
    stems: dict[str, list[Path]] = {}
    for path, _, _ in pictures:
        stems.setdefault(stem(path.name), []).append(path)
    photos, masks = [], []
    folders = {
        path: bool(MASKS.search(name.rpartition("/")[0])) or not first for path, name, first in pictures
    }
    for path, name, first in pictures:
        others = {*stems[stem(path.name)], *stems.get(bare(path.name), ())} - {path}
        named = folders[path] or bare(path.name) != stem(path.name)
        if "SegmentationObject/" in name:
            found.leave("numbers of objects, not of classes", name)
        elif few[path] and (named or any(not few[other] for other in others)):
            masks.append((path, name))
        elif folders[path] and any(not folders[other] for other in others):
            found.leave(
                "a mask saved with loss, or a copy of a photo" if first else "a copy of a photo", name
            )
        else:
            photos.append((path, name))
    for path, name in photos:
        number = name[: -len(path.suffix)] if path.suffix else name
        number = f"{number}_{path.suffix[1:]}" if number in found.photos else number
        if re.search(r"[\t\r\n{}]", number) or number in found.photos:
            note(f"{name!r}: a name that lists cannot hold, or that is there twice; rename the photo")
        else:
            found.photos[number] = path
    for path, name in masks:
        found.add("masks", [mask_annotation(path, name, name, found.colors)])
    found.shown |= {number: color for path, _ in masks[:1] for number, color in palette_of(path).items()}


def masks_among(pictures: Sequence[Path]) -> set[Path]:
    """Those that are masks of others: they have few values, and the name of a picture with many."""
    groups: dict[str, list[Path]] = {}
    for path in pictures:
        groups.setdefault(bare(path.name), []).append(path)
    found = set()
    for group in groups.values():
        few = {path for path in group if len(group) > 1 and has_few_values(path)}
        found |= few if len(few) < len(group) else set()
    return found


def stem(name: str) -> str:
    """The last part of a path without its ending."""
    last = name.rpartition("/")[2]
    return last.rpartition(".")[0] or last


def bare(name: str) -> str:
    """The same without what marks a mask, such as `_mask` or `_labelIds`."""
    return AFFIX.sub("", stem(name)) or stem(name)


def find_photo(name: str, photos: dict[str, list[str]]) -> str:
    """The id of the photo that an annotation names.

    Args:
        name: As the annotation gives it.
        photos: Ids by their last part.

    Raises:
        UserError: There is none, or several fit equally well.
    """
    studio = re.sub(r"^[0-9a-f]{8}-", "", stem(name))  # Label Studio puts this before uploaded files
    key = next((key for key in (stem(name), bare(name), studio) if key in photos), None)
    if key is None:
        raise UserError(
            f"its photo '{name.rpartition('/')[2]}' is not there; add it, or remove the annotation"
        )
    folders = name.split("/")[:-1]

    def alike(number: str) -> int:
        own = number.split("/")[:-1]
        return next((i for i, (a, b) in enumerate(zip(own[::-1], folders[::-1], strict=False)) if a != b),
                    min(len(own), len(folders)))  # fmt: skip

    ranked = sorted(photos[key], key=alike, reverse=True)
    if len(ranked) > 1 and alike(ranked[0]) == alike(ranked[1]):
        raise UserError(f"could belong to {ranked[0]} or {ranked[1]}; give the photos different names")
    return ranked[0]
