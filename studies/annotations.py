"""Predictions as annotations that labelme, CVAT and the readers of COCO open, so that correcting replaces drawing.

`python -m splits init PHOTOS --annotations FOLDER --out mydata` reads what was corrected. Pixels of a class named
`background` are left unpainted where the programs take unpainted for background.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from common.data.files import write_bytes

Kind = Literal["labelme", "coco", "cvat"]
Uint8 = NDArray[np.uint8]

BACKGROUND = "background"
LEAST = 2e-4  # share of a photo below which a region is noise that nobody wants to correct
LEAST_PIXELS = 16
NEAR = 0.71  # pixels that an outline may move when points are left out: half a step to the diagonal neighbour


def write_annotations(
    kind: Kind, photos: Mapping[str, tuple[Path, Uint8]], classes: Sequence[str], palette: Uint8, out: Path
) -> Path:
    """Write what was predicted of photos as annotations, and return the folder or file.

    Args:
        kind: Program or format: a file per photo for labelme, one file for the others.
        photos: Photo and class ids (H, W) by name, with folders and ending.
        classes: Names.
        palette: Their colours (K, 3).
        out: Folder.

    Raises:
        UserError: the folder cannot be written.
    """
    cleaned = {name: (path, without_specks(ids)) for name, (path, ids) in photos.items()}
    if kind == "labelme":
        folder = out / "labelme"
        for name, (path, ids) in cleaned.items():
            target = folder / Path(name).with_suffix(".json")
            image = os.path.relpath(path.resolve(), target.resolve().parent)
            _write_json(target, labelme(Path(image).as_posix(), ids, classes))
        return folder
    if kind == "coco":
        file = out / "coco.json"
        _write_json(file, coco({name: ids for name, (_, ids) in cleaned.items()}, classes))
        return file
    file = out / "cvat.xml"
    root = cvat({name: ids for name, (_, ids) in cleaned.items()}, classes, palette)
    write_bytes(file, ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))
    return file


def without_specks(ids: Uint8) -> Uint8:
    """Class ids (H, W) where small regions belong to the class that is nearest to each of their pixels."""
    least = max(LEAST_PIXELS, LEAST * ids.size)
    small = np.zeros(ids.shape, dtype=bool)
    for k in np.unique(ids):
        _, part, stats, _ = cv2.connectedComponentsWithStats((ids == k).astype(np.uint8), connectivity=8)
        small |= (ids == k) & (stats[:, cv2.CC_STAT_AREA] < least)[part]
    if not small.any() or small.all():
        return ids
    rows, columns = distance_transform_edt(small, return_distances=False, return_indices=True)
    kept: Uint8 = ids[rows, columns]
    return kept


def labelme(image: str, ids: Uint8, classes: Sequence[str]) -> dict[str, Any]:
    """The content of a labelme file: an outline per region, the larger first, so that what lies within is on top."""
    found = []
    for k, name in _painted(ids, classes, everywhere=True):
        outlines, tree = cv2.findContours((ids == k).astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        for outline, (_, _, _, parent) in zip(outlines, tree[0], strict=True):
            hole = parent >= 0
            if not hole and not (name == BACKGROUND and _touches_border(outline, ids.shape)):
                found.append((cv2.contourArea(outline), name, _fewer_points(outline)))
    found.sort(key=lambda one: -one[0])
    shapes = [
        {"label": name, "points": points.tolist(), "group_id": None, "shape_type": "polygon", "flags": {}}
        for _, name, points in found
        if len(points) > 2
    ]
    height, width = ids.shape
    size = {"imageHeight": height, "imageWidth": width}
    return {
        "version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": image, "imageData": None, **size
    }  # fmt: skip


def coco(photos: Mapping[str, Uint8], classes: Sequence[str]) -> dict[str, Any]:
    """The content of a COCO file: of every photo a region per class, as run lengths."""
    images: list[dict[str, Any]] = []
    entries: list[dict[str, Any]] = []
    for number, (name, ids) in enumerate(photos.items(), start=1):
        height, width = ids.shape
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        for k, _ in _painted(ids, classes):
            region = ids == k
            left, top, across, down = cv2.boundingRect(region.astype(np.uint8))
            entries.append({
                "id": len(entries) + 1, "image_id": number, "category_id": k + 1, "iscrowd": 0,
                "area": int(region.sum()), "bbox": [left, top, across, down],
                "segmentation": {"size": [height, width], "counts": runs(region.T)},
            })  # fmt: skip
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(classes)]
    return {"images": images, "annotations": entries, "categories": categories}


def cvat(photos: Mapping[str, Uint8], classes: Sequence[str], palette: Uint8) -> ElementTree.Element:
    """The content of a file "CVAT for images 1.1": of every photo a mask per class."""
    root = ElementTree.Element("annotations")
    ElementTree.SubElement(root, "version").text = "1.1"
    labels = ElementTree.SubElement(
        ElementTree.SubElement(ElementTree.SubElement(root, "meta"), "job"), "labels"
    )
    for name, color in zip(classes, palette, strict=True):
        label = ElementTree.SubElement(labels, "label")
        ElementTree.SubElement(label, "name").text = name
        ElementTree.SubElement(label, "color").text = "#" + bytes(color).hex()
    for number, (name, ids) in enumerate(photos.items()):
        size = {"width": str(ids.shape[1]), "height": str(ids.shape[0])}
        image = ElementTree.SubElement(root, "image", {"id": str(number), "name": name, **size})
        for k, label_name in _painted(ids, classes):
            left, top, width, height = cv2.boundingRect((ids == k).astype(np.uint8))
            part = ids[top : top + height, left : left + width] == k
            box = {"left": left, "top": top, "width": width, "height": height}
            ElementTree.SubElement(image, "mask", {
                "label": label_name, "source": "auto", "occluded": "0", "z_order": "0",
                "rle": ", ".join(map(str, runs(part))), **{key: str(value) for key, value in box.items()},
            })  # fmt: skip
    return root


def runs(region: NDArray[np.bool_]) -> list[int]:
    """Lengths of what lies outside and inside a region in turn, row by row, beginning with outside."""
    flat = np.concatenate(([False], region.ravel()))
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return [int(length) for length in np.diff(np.concatenate(([0], changes, [region.size])))]


def _painted(ids: Uint8, classes: Sequence[str], *, everywhere: bool = False) -> Iterator[tuple[int, str]]:
    """Classes of a photo, without the background unless `everywhere`."""
    for k in np.unique(ids):
        if k < len(classes) and (everywhere or classes[k] != BACKGROUND):
            yield int(k), classes[k]


def _touches_border(outline: NDArray[Any], shape: tuple[int, ...]) -> bool:
    """Whether a region reaches the border, so that it lies within no other."""
    points = outline[:, 0]
    return bool((points == 0).any() or (points == [shape[1] - 1, shape[0] - 1]).any())


def _fewer_points(outline: NDArray[Any]) -> NDArray[Any]:
    """An outline (N, 2) without the points that hardly matter, as long as it has an area then."""
    fewer = cv2.approxPolyDP(outline, NEAR, closed=True)
    return (fewer if len(fewer) > 2 else outline)[:, 0]


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_bytes(path, json.dumps(content, indent=1).encode())
