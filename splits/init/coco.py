"""Annotations of COCO files: instances (polygons and run lengths) and panoptic ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.data.files import read_rgb
from common.errors import UserError
from splits.init.annotation import (
    VOID,
    Annotation,
    Canvas,
    Key,
    Note,
    Paint,
    Shape,
    noting,
    paint_shapes,
    require_size,
)  # fmt: skip
from splits.prepare.masks import decode_segmentation

Entries = Sequence[Mapping[str, Any]]


def read_coco(
    content: Mapping[str, Any], source: str, note: Note, picture: Callable[[str], Path | None]
) -> Iterator[Annotation]:
    """The annotations of a COCO file.

    Args:
        content: Of the file.
        source: Its name.
        note: Where remarks go.
        picture: File name -> the picture of a panoptic annotation, if it is there.
    """
    names = {category["id"]: str(category["name"]) for category in content.get("categories", ())}
    images = {image["id"]: image for image in content["images"]}
    by_image: dict[Any, list[Mapping[str, Any]]] = {}
    for entry in content["annotations"]:
        by_image.setdefault(entry.get("image_id"), []).append(entry)
    for number, entries in by_image.items():
        if number not in images:
            note(f"{source}: image {number} of {len(entries)} annotations is not among the images; left out")
            continue
        name = str(images[number]["file_name"])
        where = f"{source}: '{name}'"
        with noting(note, where):
            height, width = images[number].get("height"), images[number].get("width")
            size = (int(height), int(width)) if height and width else None
            if "segments_info" in entries[0]:
                file = str(entries[0]["file_name"])
                segments = _names(entries[0]["segments_info"], names, where, note)
                paint = _paint_panoptic(picture(file), file, segments, size)
            else:
                labels = _names(entries, names, where, note)
                order = sorted(
                    entries, key=lambda one: (not one.get("iscrowd", 0), -float(one.get("area") or 0))
                )
                shapes = [_shape(labels[one["id"]], one) for one in order]
                paint = paint_shapes(shapes, size)
            yield Annotation(name, where, paint)


def _names(entries: Entries, names: Mapping[int, str], where: str, note: Note) -> dict[int, str]:
    """The class of each annotation or segment by its id; those of an unknown category count nowhere."""
    for unknown in sorted({one["category_id"] for one in entries} - set(names)):
        note(f"{where}: category {unknown} is not among the categories; its pixels count nowhere")
    return {int(one["id"]): names.get(one["category_id"], VOID) for one in entries}


def _shape(label: str, entry: Mapping[str, Any]) -> Shape:
    segmentation = entry.get("segmentation")
    if isinstance(segmentation, Mapping):
        where = f"annotation {entry['id']}"
        return Shape(label, region=lambda h, w: decode_segmentation(segmentation, h, w, where))
    lines = [np.asarray(line, dtype=np.float64).reshape(-1, 2) for line in segmentation or ()]
    return Shape(label, tuple(lines), None if lines else lambda h, w: np.zeros((h, w), dtype=np.bool_))


def _paint_panoptic(
    path: Path | None, file: str, segments: Mapping[int, str], size: tuple[int, int] | None
) -> Paint:
    def paint(height: int, width: int, note: Note) -> tuple[Canvas, list[Key]]:
        require_size(size, height, width)
        if path is None:
            raise UserError(f"its picture {file} is not there; put it beside the JSON file")
        rgb = read_rgb(path, "mask").astype(np.int64)
        require_size(rgb.shape[:2], height, width)
        keys: list[Key] = list(dict.fromkeys([VOID, *segments.values()]))
        stored, place = np.unique(rgb @ np.array([1, 256, 65536]), return_inverse=True)
        for unknown in sorted(set(stored.tolist()) - {0, *segments})[:1]:
            note(f"segment {unknown} of its picture is not among the segments; its pixels count nowhere")
        numbers = np.array([keys.index(segments.get(int(one), VOID)) for one in stored], dtype=np.uint16)
        return numbers[place.reshape(height, width)], keys

    return paint
