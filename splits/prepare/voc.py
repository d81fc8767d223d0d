"""PASCAL VOC 2012 with the masks of the Semantic Boundaries Dataset (SBD): 10582 training photos.

From `VOCtrainval_11-May-2012.tar` and `benchmark.tgz`, or their unpacked folders. `SegmentationClassAug` gets the
official masks of the 1464 training photos and SBD's masks of all other photos but the 1449 of the validation list.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from common.data.dataset_yaml import load_spec
from common.data.files import Uint8, read_index_mask
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

EXPECTED: Counts = {"train": (1464,), "val": (1449,), "train_aug": (10582,)}
PUBLISHED = {"val": "voc/val", "train_aug": "voc/train_aug"}
LISTS = "ImageSets/Segmentation"
REMEDY = "give --download, or the folder with the official files as --source"


def downloads() -> tuple[Download, Download]:
    """The two official archives, as torchvision knows them."""
    from torchvision.datasets.sbd import SBDataset
    from torchvision.datasets.voc import DATASET_YEAR_DICT

    voc = DATASET_YEAR_DICT["2012"]
    return (
        Download(voc["url"], voc["filename"], voc["md5"]),
        Download(SBDataset.url, SBDataset.filename, SBDataset.md5),
    )


def download(source: Path) -> None:
    """Download the official archives to `source`."""
    download_files(downloads(), source)


def prepare(source: Path, out: Path) -> None:
    """Make the layout of `splits/voc/dataset.yaml` in `out`; what is done already is left alone.

    Raises:
        UserError: Sources are missing or damaged.
    """
    voc = find_source(
        source,
        "VOC 2012",
        (".", "VOC2012", "VOCdevkit/VOC2012", "TrainVal/VOCdevkit/VOC2012"),
        "JPEGImages",
        ("VOCtrainval_11-May-2012.tar",),
        REMEDY,
    )
    sbd = find_source(
        source,
        "SBD masks",
        (".", "dataset", "benchmark_RELEASE/dataset", "sbd", "SBD", "sbd/benchmark_RELEASE/dataset"),
        "cls",
        ("benchmark.tgz", "benchmark_RELEASE.tgz"),
        REMEDY,
    )
    rules = (
        by_pattern(r"(JPEGImages/[^/]+\.jpg)", r"\1"),
        by_pattern(r"(SegmentationClass/[^/]+\.png)", r"\1"),
        by_pattern(r"(ImageSets/Segmentation/(?:train|val|trainval)\.txt)", r"\1"),
    )
    place(voc, out, lambda name: next((target for rule in rules if (target := rule(name))), None), "VOC 2012")
    train, val = (read_ids(out / LISTS / f"{name}.txt") for name in ("train", "val"))
    for_each(lambda name: _official(out, name), train, "official masks")
    extended = _extended(sbd, out, set(train) | set(val))
    write_lines(out / LISTS / "train_aug.txt", sorted({*train, *extended} - set(val)))


def _official(out: Path, name: str) -> None:
    target = out / f"SegmentationClassAug/{name}.png"
    if not target.is_file():
        write_index_mask(target, read_index_mask(out / f"SegmentationClass/{name}.png").astype(np.uint8))


def _extended(sbd: Source, out: Path, official: set[str]) -> list[str]:
    """Convert SBD's masks of photos that VOC has no own mask for; their ids."""
    rule = by_pattern(r"cls/(\d{4}_\d{6})\.mat", r"\1")
    names = []
    for found in reading(sbd, rule, "SBD masks"):
        name = str(rule(found.name))
        if name in official:
            continue
        names.append(name)
        target = out / f"SegmentationClassAug/{name}.png"
        if not target.is_file():
            write_index_mask(target, sbd_mask(found.read(), f"{sbd.path}: {found.name}"))
    return names


def sbd_mask(data: bytes, where: str) -> Uint8:
    """The class ids 0..20 in a `.mat` file of SBD's folder `cls`, uint8 (H, W).

    Raises:
        UserError: The file is damaged or holds something else.
    """
    try:
        mask = loadmat(io.BytesIO(data))["GTcls"]["Segmentation"][0, 0]
    except Exception as error:  # scipy raises many kinds for damaged files
        raise UserError(f"{where}: not an SBD mask ({type(error).__name__}); get the archive again") from None
    if mask.ndim != 2 or not set(np.unique(mask).tolist()) <= {*range(21), 255}:
        raise UserError(f"{where}: not an SBD mask (values beyond 0..20); get the archive again")
    return np.ascontiguousarray(mask, dtype=np.uint8)


def check(out: Path, expected: Counts | None = None) -> list[str]:
    """What is wrong with a prepared folder.

    Args:
        out: The folder.
        expected: Accepted numbers of photos; None takes the official ones.
    """
    lists = {name: out / LISTS / f"{name}.txt" for name in EXPECTED}
    return check_folder(load_spec("voc", out), lists, expected or EXPECTED, {} if expected else PUBLISHED)
