"""PASCAL-Context: masks of 60 classes, ordered by their id among the 459 original ones.

From the photos of VOC 2010 (or 2012) and one of: `trainval_merged.json` of PASCAL in Detail, which also fixes the
lists and their order; or the `.mat` masks of the original release (`trainval.tar.gz`), with the lists of VOC 2010.
"""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import loadmat

from common.data.dataset_yaml import load_spec
from common.data.files import Uint8
from common.data.lists import read_ids
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
    reading,
    write_index_mask,
    write_lines,
)
from splits.prepare.masks import decode_segmentation

EXPECTED: Counts = {"train": (4996, 4998), "val": (5104, 5105)}  # PASCAL in Detail lacks a few of the 10103
MASKS = "SegmentationClassContext"
ANNOTATION = "trainval_merged.json"
REMEDY = (
    f"put {ANNOTATION} (PASCAL in Detail) or trainval.tar.gz (https://www.cs.stanford.edu/~roozbeh/pascal-context) and "
    "VOCtrainval_03-May-2010.tar into --source"
)
# fmt: off
CONTEXT_IDS = (
    0, 2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115,
    144, 158, 159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349,
    354, 355, 360, 366, 368, 397, 415, 416, 420, 424, 427, 440, 445, 454, 458,
)
# fmt: on


def download(source: Path) -> None:
    """Download the photos (VOC 2010) to `source`; the annotation has no address with a checksum."""
    from torchvision.datasets.voc import DATASET_YEAR_DICT

    voc = DATASET_YEAR_DICT["2010"]
    download_files([Download(voc["url"], voc["filename"], voc["md5"])], source)


def prepare(source: Path, out: Path) -> None:
    """Make the layout of `splits/pascal_context/dataset.yaml` in `out`; what is done already is left alone.

    Raises:
        UserError: Sources are missing or damaged.
    """
    voc = find_source(
        source,
        "VOC photos",
        (".", "VOC2010", "VOCdevkit/VOC2010", "VOC2012", "VOCdevkit/VOC2012"),
        "JPEGImages",
        ("VOCtrainval_03-May-2010.tar", "VOCtrainval_11-May-2012.tar"),
        REMEDY,
    )
    detail = source / ANNOTATION
    lists = _from_detail(detail, out) if detail.is_file() else _from_mat(source, voc, out)
    wanted = {name for names in lists.values() for name in names}
    rule = by_pattern(r"JPEGImages/(\d{4}_\d{6})\.jpg", r"\1")

    def photo(name: str) -> str | None:
        found = rule(name)
        return f"JPEGImages/{found}.jpg" if found in wanted else None

    place(voc, out, photo, "photos")
    for name, ids in lists.items():
        write_lines(out / f"{name}.txt", ids)


def to_classes(ids: np.ndarray[Any, Any], *, rest_is_background: bool, where: str) -> Uint8:
    """Classes 0..59 of original ids, uint8 with the shape of `ids`: their position among the 60 ids in use.

    Args:
        ids: Original ids 0..459.
        rest_is_background: Whether other ids become class 0; else they are an error.
        where: For the error message.

    Raises:
        UserError: An id that is not in use.
    """
    place_of = np.searchsorted(CONTEXT_IDS, ids).clip(max=len(CONTEXT_IDS) - 1)
    known = np.take(CONTEXT_IDS, place_of) == ids
    if not rest_is_background and not known.all():
        raise UserError(
            f"{where}: original id {np.asarray(ids)[~known].flat[0]} is none of the 60 in use; get the file again"
        )
    return np.where(known, place_of, 0).astype(np.uint8)


def _from_detail(path: Path, out: Path) -> dict[str, list[str]]:
    """Masks and lists from the annotation of PASCAL in Detail; lists in its own order, which s4GAN's indices count."""
    try:
        detail: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); get it again") from None
    regions: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for annotation in detail["annos_segmentation"]:
        regions[annotation["image_id"]].append(annotation)

    def draw(image: Mapping[str, Any]) -> None:
        name = Path(image["file_name"]).stem
        target = out / MASKS / f"{name}.png"
        if not target.is_file():
            write_index_mask(target, detail_mask(image, regions.get(image["image_id"], ())))

    images = [image for image in detail["images"] if image["phase"] in EXPECTED]
    for_each(draw, images, "masks")
    return {
        phase: [Path(image["file_name"]).stem for image in images if image["phase"] == phase]
        for phase in EXPECTED
    }


def detail_mask(image: Mapping[str, Any], annotations: Any) -> Uint8:
    """The classes of a photo of PASCAL in Detail, uint8 (H, W): later regions lie upon earlier ones.

    Args:
        image: `height`, `width`, `file_name`.
        annotations: Its regions: `segmentation`, `category_id`.

    Raises:
        UserError: A region of another size, a category that is not in use.
    """
    mask = np.zeros((image["height"], image["width"]), dtype=np.int64)
    for annotation in annotations:
        where = f"{image['file_name']}: annotation {annotation.get('id')}"
        region = decode_segmentation(annotation["segmentation"], image["height"], image["width"], where)
        mask[region] = annotation["category_id"]
    return to_classes(mask, rest_is_background=False, where=str(image["file_name"]))


def _from_mat(source: Path, voc: Source, out: Path) -> dict[str, list[str]]:
    """Masks from the `.mat` files of the original release, lists from VOC 2010."""
    masks = find_source(
        source,
        "PASCAL-Context masks",
        (".", "trainval"),
        "*_*.mat",
        ("trainval.tar.gz", "trainval.tgz"),
        REMEDY,
    )
    rule = by_pattern(r"(\d{4}_\d{6})\.mat", r"\1")
    there = set()
    for found in reading(masks, rule, "masks"):
        name = str(rule(found.name))
        there.add(name)
        target = out / MASKS / f"{name}.png"
        if not target.is_file():
            write_index_mask(target, mat_mask(found.read(), f"{masks.path}: {found.name}"))
    official = by_pattern(r"(ImageSets/Main/(?:train|val)\.txt)", r"\1")
    place(voc, out, official, "lists")
    lists = {}
    for name in EXPECTED:
        path = out / f"ImageSets/Main/{name}.txt"
        if not path.is_file():
            raise UserError(
                f"{voc.path}: holds no ImageSets/Main/{name}.txt; the lists are those of VOC 2010: {REMEDY}"
            )
        lists[name] = [photo for photo in read_ids(path) if photo in there]
    return lists


def mat_mask(data: bytes, where: str) -> Uint8:
    """The classes 0..59 in a `.mat` file of the original release, uint8 (H, W); its other 400 ids are background.

    Raises:
        UserError: The file is damaged or holds something else.
    """
    try:
        ids = np.asarray(loadmat(io.BytesIO(data))["LabelMap"], dtype=np.int64)
    except Exception as error:  # scipy raises many kinds for damaged files
        raise UserError(
            f"{where}: not a PASCAL-Context mask ({type(error).__name__}); get the archive again"
        ) from None
    return to_classes(ids, rest_is_background=True, where=where)


def check(out: Path, expected: Counts | None = None) -> list[str]:
    """What is wrong with a prepared folder.

    Args:
        out: The folder.
        expected: Accepted numbers of photos; None takes the official ones.
    """
    lists = {name: out / f"{name}.txt" for name in EXPECTED}
    return check_folder(load_spec("pascal_context", out), lists, expected or EXPECTED, {})
