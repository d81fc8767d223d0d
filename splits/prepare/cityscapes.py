"""Cityscapes, fine annotations: label ids -> train ids.

From `leftImg8bit_trainvaltest.zip` and `gtFine_trainvaltest.zip`, or their unpacked folders. The licence asks every
user to sign up, so there is nothing to download here. Masks of the test photos are not public.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from common.data.dataset_yaml import load_spec
from common.data.spec import Item
from common.errors import UserError
from splits.prepare.archives import (
    Counts,
    by_pattern,
    check_folder,
    find_source,
    for_each,
    place,
    write_index_mask,
    write_lines,
)

EXPECTED: Counts = {"train": (2975,), "val": (500,), "test": (1525, 0)}
PUBLISHED = {name: f"cityscapes/{name}" for name in EXPECTED}
REMEDY = (
    "sign up at https://www.cityscapes-dataset.com, download leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip, "
    "and give their folder as --source"
)


def download(source: Path) -> None:
    """Say that the licence forbids it.

    Raises:
        UserError: Always.
    """
    raise UserError(f"{source}: Cityscapes cannot be downloaded for you; {REMEDY}")


def prepare(source: Path, out: Path) -> None:
    """Make the layout of `splits/cityscapes/dataset.yaml` in `out`; what is done already is left alone.

    Raises:
        UserError: Sources are missing or damaged.
    """
    images = find_source(
        source,
        "Cityscapes photos",
        (".", "leftImg8bit_trainvaltest"),
        "leftImg8bit",
        ("leftImg8bit_trainvaltest.zip",),
        REMEDY,
    )
    labels = find_source(
        source,
        "Cityscapes masks",
        (".", "gtFine_trainvaltest"),
        "gtFine",
        ("gtFine_trainvaltest.zip",),
        REMEDY,
    )
    photo = by_pattern(r"(leftImg8bit/(?:train|val|test)/[^/]+/[^/]+_leftImg8bit\.png)", r"\1")
    mask = by_pattern(r"(gtFine/(?:train|val)/[^/]+/[^/]+_gtFine_labelIds\.png)", r"\1")
    place(images, out, photo, "photos")
    place(labels, out, mask, "masks")
    spec = load_spec("cityscapes", out)

    def convert(path: Path) -> None:
        target = path.with_name(path.name.replace("_labelIds", "_labelTrainIds"))
        if not target.is_file():
            write_index_mask(target, spec.load_label(Item(path.stem, path, path, spec.lut_of(path))))

    for_each(convert, sorted(out.glob("gtFine/*/*/*_gtFine_labelIds.png")), "train ids")
    for name in EXPECTED:
        photos = sorted(
            path.relative_to(out).as_posix() for path in (out / "leftImg8bit" / name).glob("*/*.png")
        )
        if photos:
            write_lines(out / f"{name}.txt", photos)


def check(out: Path, expected: Counts | None = None) -> list[str]:
    """What is wrong with a prepared folder.

    Args:
        out: The folder.
        expected: Accepted numbers of photos; None takes the official ones.
    """
    lists = {name: out / f"{name}.txt" for name in EXPECTED if name != "test" or (out / "test.txt").is_file()}
    spec = load_spec("cityscapes", out)
    problems = check_folder(spec, lists, expected or EXPECTED, {} if expected else PUBLISHED)
    converted = list(out.glob("gtFine/*/*/*_gtFine_labelTrainIds.png"))
    for path in converted[:: max(1, len(converted) // 20)]:
        raw = path.with_name(path.name.replace("_labelTrainIds", "_labelIds"))
        if raw.is_file():
            ours, fresh = (
                spec.load_label(Item(path.stem, one, one, spec.lut_of(one))) for one in (path, raw)
            )
            if not np.array_equal(ours, fresh):
                problems.append(f"{path}: does not follow from {raw.name}; delete it and prepare again")
    return problems
