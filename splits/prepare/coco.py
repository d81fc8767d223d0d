"""COCO 2017: masks of 81 classes (background and the 80 things in order of category id) drawn from the instances.

From `train2017.zip`, `val2017.zip` and `annotations_trainval2017.zip`, or their unpacked folders. The masks that the
authors of the COCO settings used were made in advance by rules they do not state. Here: regions of crowds first, then
objects from large to small, so that a small object upon a large one stays visible; no pixel is ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.data.dataset_yaml import load_spec
from common.data.files import Uint8
from common.errors import UserError
from splits.prepare.archives import (
    Counts,
    Download,
    Source,
    by_pattern,
    check_folder,
    download_files,
    find_source,
    for_each,
    place,
    write_index_mask,
    write_lines,
)
from splits.prepare.masks import decode_segmentation

EXPECTED: Counts = {"train": (118287,), "val": (5000,)}
PUBLISHED = {name: f"coco/{name}" for name in EXPECTED}
REMEDY = "give --download, or the folder with the official files as --source"
DOWNLOADS = (
    Download(
        "http://images.cocodataset.org/zips/train2017.zip",
        "train2017.zip",
        "cced6f7f71b7629ddf16f17bbcfab6b2",
    ),
    Download(
        "http://images.cocodataset.org/zips/val2017.zip", "val2017.zip", "442b8da7639aecaf257c1dceb8ba8c80"
    ),
    Download(
        "http://images.cocodataset.org/annotations/annotations_trainval2017.zip",
        "annotations_trainval2017.zip",
        "f4bbac642086de4f52a3fdda2de5fa2c",
    ),
)


def download(source: Path) -> None:
    """Download the official archives (19 GiB) to `source`."""
    download_files(DOWNLOADS, source)


def prepare(source: Path, out: Path) -> None:
    """Make the layout of `splits/coco/dataset.yaml` in `out`; what is done already is left alone.

    Raises:
        UserError: Sources are missing or damaged.
    """
    annotations = find_source(
        source,
        "COCO annotations",
        (".",),
        "annotations/instances_train2017.json",
        ("annotations_trainval2017.zip",),
        REMEDY,
    )
    for name in EXPECTED:
        images = find_source(
            source, f"COCO {name} photos", (".", "images"), f"{name}2017", (f"{name}2017.zip",), REMEDY
        )
        place(images, out, by_pattern(rf"({name}2017/\d{{12}}\.jpg)", r"\1"), f"{name} photos")
        lines = _draw_masks(_instances(annotations, name), out, name)
        write_lines(out / f"{name}.txt", lines)


def _instances(annotations: Source, name: str) -> dict[str, Any]:
    wanted = by_pattern(rf"(annotations/instances_{name}2017\.json)", r"\1")
    for found in annotations.files(wanted):
        try:
            content: dict[str, Any] = json.loads(found.read())
            return content
        except ValueError as error:
            raise UserError(f"{annotations.path}: {found.name} is damaged ({error}); get it again") from None
    raise UserError(f"{annotations.path}: holds no annotations/instances_{name}2017.json; {REMEDY}")


def _draw_masks(instances: Mapping[str, Any], out: Path, name: str) -> list[str]:
    """Draw the masks of one part; its list lines, sorted by id."""
    index = class_index(instances["categories"])
    by_image: dict[int, list[dict[str, Any]]] = {}
    for annotation in instances["annotations"]:
        by_image.setdefault(annotation["image_id"], []).append(annotation)

    def draw(image: Mapping[str, Any]) -> None:
        target = out / f"masks/{image['id']:012d}.png"
        if not target.is_file():
            write_index_mask(
                target, semantic_mask(by_image.get(image["id"], ()), image["height"], image["width"], index)
            )

    images = sorted(instances["images"], key=lambda image: image["id"])
    for_each(draw, images, f"{name} masks")
    return [f"{name}2017/{image['id']:012d}.jpg masks/{image['id']:012d}.png" for image in images]


def class_index(categories: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """Class of each category id: 1, 2, ... in order of the ids, which have gaps; 0 is background."""
    return {number: place for place, number in enumerate(sorted(c["id"] for c in categories), start=1)}


def semantic_mask(
    annotations: Sequence[Mapping[str, Any]], height: int, width: int, index: Mapping[int, int]
) -> Uint8:
    """The classes of all instances of a photo, uint8 (H, W): crowds first, then objects from large to small.

    Args:
        annotations: Instances: `segmentation` (polygons or run lengths), `category_id`, `iscrowd`, `area`.
        height: Of the photo.
        width: Of the photo.
        index: Class of each category id.

    Raises:
        UserError: A region that does not fit the photo, or an unknown category.
    """
    mask = np.zeros((height, width), dtype=np.uint8)
    for annotation in sorted(annotations, key=lambda a: (not a.get("iscrowd", 0), -float(a["area"]))):
        where = f"annotation {annotation.get('id')}"
        if annotation["category_id"] not in index:
            raise UserError(
                f"{where}: category {annotation['category_id']} is not among the categories; get the file again"
            )
        region = decode_segmentation(annotation["segmentation"], height, width, where)
        mask[region] = index[annotation["category_id"]]
    return mask


def check(out: Path, expected: Counts | None = None) -> list[str]:
    """What is wrong with a prepared folder.

    Args:
        out: The folder.
        expected: Accepted numbers of photos; None takes the official ones.
    """
    lists = {name: out / f"{name}.txt" for name in EXPECTED}
    return check_folder(load_spec("coco", out), lists, expected or EXPECTED, {} if expected else PUBLISHED)
