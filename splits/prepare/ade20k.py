"""ADE20K (SceneParse150): masks of 150 classes from the official ones, whose numbers are one higher.

From `ADEChallengeData2016.zip` or its unpacked folder. There 0 is everything that is no class; here that is 255.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from common.data.dataset_yaml import load_spec
from common.data.files import Uint8
from common.errors import UserError
from splits.prepare.archives import (
    Counts,
    Download,
    by_pattern,
    check_folder,
    download_files,
    find_source,
    place,
    reading,
    write_index_mask,
    write_lines,
)

EXPECTED: Counts = {"train": (20210,), "val": (2000,)}
PUBLISHED = {name: f"ade20k/{name}" for name in EXPECTED}
PARTS = {"train": "training", "val": "validation"}
DOWNLOADS = (
    Download(
        "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
        "ADEChallengeData2016.zip",
        "7328b3957e407ddae1d3cbf487f149ef",
    ),
)


def download(source: Path) -> None:
    """Download the official archive (1 GiB) to `source`."""
    download_files(DOWNLOADS, source)


def prepare(source: Path, out: Path) -> None:
    """Make the layout of `splits/ade20k/dataset.yaml` in `out`; what is done already is left alone.

    Raises:
        UserError: Sources are missing or damaged, or `out` is the source, whose masks would count as done.
    """
    official = find_source(
        source,
        "ADE20K",
        (".", "ADEChallengeData2016"),
        "annotations/training",
        ("ADEChallengeData2016.zip",),
        "give --download, or the folder with the official files as --source",
    )
    if official.path.resolve() == out.resolve():
        raise UserError(
            f"--out {out}: holds the official masks, whose numbers are one higher; choose another folder"
        )
    place(official, out, by_pattern(r"(images/(?:training|validation)/ADE_\w+\.jpg)", r"\1"), "photos")
    masks = by_pattern(r"(annotations/(?:training|validation)/ADE_\w+\.png)", r"\1")
    lines: dict[str, list[str]] = {part: [] for part in PARTS.values()}
    for found in reading(official, masks, "masks"):
        target = out / str(masks(found.name))
        if not target.is_file():
            with Image.open(io.BytesIO(found.read())) as mask:
                write_index_mask(target, shifted(np.array(mask)))
        part, name = target.parent.name, target.stem
        lines[part].append(f"images/{part}/{name}.jpg annotations/{part}/{name}.png")
    for name, part in PARTS.items():
        write_lines(out / f"{name}.txt", sorted(lines[part]))


def shifted(mask: Uint8) -> Uint8:
    """Official numbers (H, W), 1 to 150 and 0 for the rest, as classes 0 to 149 and 255."""
    return (mask - np.uint8(1)).astype(np.uint8)  # 0 becomes 255


def check(out: Path, expected: Counts | None = None) -> list[str]:
    """What is wrong with a prepared folder.

    Args:
        out: The folder.
        expected: Accepted numbers of photos; None takes the official ones.
    """
    lists = {name: out / f"{name}.txt" for name in EXPECTED}
    return check_folder(load_spec("ade20k", out), lists, expected or EXPECTED, {} if expected else PUBLISHED)
