"""What the original's command lines have in common: datasets, flags, places."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.data.spec import DatasetSpec
from common.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What the original fixes about a dataset.

    Attributes:
        name: ours, also of the pipeline.
        folder: where the original looks for it.
        split: the permutation of the published split.
        crop: height and width of a training crop.
        ignore: `--ignore-label` of the documented commands.
    """

    name: str
    folder: str
    split: str
    crop: tuple[int, int]
    ignore: float


DATASETS = {
    "pascal_voc": Dataset(
        name="voc", folder="./data/voc_dataset/", split="./splits/voc/split_0.pkl", crop=(321, 321), ignore=255
    ),
    "pascal_context": Dataset(
        name="pascal_context", folder="./data/pcontext_dataset/", split="./splits/pc/split_0.pkl",
        crop=(321, 321), ignore=-1,
    ),
    "cityscapes": Dataset(
        name="cityscapes", folder="./data/city_dataset/", split="./splits/city/split_0.pkl", crop=(256, 512),
        ignore=250,
    ),
}  # fmt: skip


def say(notes: Iterable[str]) -> None:
    """Notes on the command line, on stderr, by the first process only."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        for note in notes:
            sys.stderr.write(f"note: {note}\n")


def add_common(parser: argparse.ArgumentParser, data_list: str) -> None:
    """Dataset, classes and device; `data_list` is the default of `--data-list`."""
    parser.add_argument(
        "--dataset", default="pascal_voc", metavar="NAME", help=f"{', '.join(DATASETS)} (%(default)s)"
    )
    parser.add_argument(
        "--data-dir", help="folder of the dataset (the original's if it exists, else SSS_DATA)"
    )
    parser.add_argument(
        "--data-list", help=f"list of image ids ({data_list} if it exists, else the dataset's own)"
    )
    parser.add_argument("--num-classes", type=int, metavar="K", help="checked against the dataset's")
    parser.add_argument("--model", help="accepted, without effect")
    parser.add_argument("--gpu", type=int, help="number of the GPU, where no launcher has chosen one (0)")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="values of the configuration"
    )


def dataset(name: str) -> Dataset:
    """What the original fixes about the dataset of this name.

    Raises:
        UserError: there is none.
    """
    if name == "ade20k":
        raise UserError(
            "--dataset ade20k: its loader is not part of the original; train on a dataset.yaml with train.py"
        )
    if name not in DATASETS:
        raise UserError(f"--dataset {name}: unknown; use {', '.join(DATASETS)}")
    return DATASETS[name]


def data_root(found: Dataset, given: str | None) -> str | None:
    """Folder of the files: the one given, the original's if it exists, else None for `SSS_DATA`."""
    return given or (found.folder if Path(found.folder).is_dir() else None)


def list_file(given: str | None, default: str) -> str | None:
    """The list given, the original's if it exists, else None for the dataset's own.

    Raises:
        UserError: the list given does not exist.
    """
    if given is not None and not Path(given).is_file():
        raise UserError(f"--data-list {given}: no such file; leave it out to use the dataset's own list")
    return given or (default if Path(default).is_file() else None)


def require_classes(num_classes: int | None, spec: DatasetSpec) -> None:
    """Refuse a `--num-classes` that is not the dataset's; `UserError`."""
    if num_classes not in (None, spec.num_classes):
        raise UserError(
            f"--num-classes {num_classes}: dataset '{spec.name}' has {spec.num_classes}; leave the flag out or choose "
            "another dataset"
        )


def choose_gpu(number: int | None) -> None:
    """Make `--gpu` the only visible one, unless a launcher or the caller has chosen."""
    if number is not None and "RANK" not in os.environ:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", str(number))


def words(overrides: Sequence[str]) -> list[str]:
    """Overrides without blank words: a blank behind a line's backslash, as in the original's README, makes one."""
    return [word for word in overrides if word.strip()]


def override(key: str, value: object) -> str:
    """`section.key=value` whose value YAML reads back as it is."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"
