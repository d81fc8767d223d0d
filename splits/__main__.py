"""`python -m splits`: a dataset of own photos; get, recognize, make and check split lists, and prepare datasets.

init FOLDER             own photos and their annotations, of whatever program -> masks, lists and a study
get NAME ...            download published lists and verify them
list                    print the names of all published lists
verify DIR              recognize the lists in a folder, or tell which published list they contradict
make DATASET            draw a random split: nested, covering the classes, from a seed
check DATASET [SPLIT]   open every file of a dataset or split and report what is wrong with it
prepare DATASET         official archives or folders -> the layout that splits/<dataset>/dataset.yaml describes
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from common.data.dataset_yaml import load_spec
from common.data.spec import SPLITS
from common.errors import run_main
from splits.check import check
from splits.get import get, print_names
from splits.init import command as beginning
from splits.make import make
from splits.prepare import command as preparing
from splits.published import (
    BASE_URL,
)
from splits.verify import verify


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m splits", description="Split lists.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("init", help="own photos and their annotations -> masks, lists and a study")
    beginning.add_arguments(one)
    one = commands.add_parser("get", help="download published lists and verify them")
    one.add_argument("names", nargs="+", metavar="NAME", help="such as voc/classic/366, voc/val, voc/classic")
    one.add_argument("--out", type=Path, default=SPLITS, help="folder of splits to write to")
    one.add_argument("--base-url", default=BASE_URL, help="where raw files are served as GitHub does")
    one.add_argument("--order", type=Path, help="list that the indices of an s4GAN permutation count")
    one.add_argument("--force", action="store_true", help="replace other lists that are in the way")
    one = commands.add_parser("list", help="print the names of all published lists")
    one.add_argument("--out", type=Path, default=SPLITS, help="folder of splits to look in")
    one = commands.add_parser("verify", help="recognize the lists in a folder")
    one.add_argument("folder", type=Path, metavar="DIR")
    one = commands.add_parser("make", help="draw a random split: nested, covering the classes")
    one.add_argument("dataset", metavar="DATASET_OR_YAML")
    one.add_argument("--fraction", required=True, help="1/8 of the photos with masks, or a number of them")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--root", help="data folder; default: SSS_DATA, then the dataset's own")
    one.add_argument("--out", type=Path, help="folder to make it in; default: beside the dataset.yaml")
    one.add_argument("--force", action="store_true", help="replace a split that differs")
    one = commands.add_parser("check", help="open every file and report what is wrong")
    one.add_argument("dataset", metavar="DATASET_OR_YAML")
    one.add_argument("split", nargs="?", help="default: the official lists")
    one.add_argument("--root", help="data folder; default: SSS_DATA, then the dataset's own")
    one = commands.add_parser("prepare", help="official archives or folders -> the layout that is trained on")
    preparing.add_arguments(one)
    return parser


def main(argv: Sequence[str]) -> int | None:
    """Run one command; the exit status is 1 where `verify`, `check` or `prepare` found something wrong."""
    options = _parser().parse_args(argv)
    match options.command:
        case "init":
            return beginning.init(options)
        case "get":
            get(options.names, options.out, options.base_url, options.order, force=options.force)
        case "list":
            print_names(options.out)
        case "verify":
            return verify(options.folder)
        case "make":
            spec = load_spec(options.dataset, options.root)
            make(spec, options.fraction, options.seed, options.out, force=options.force)
        case "check":
            return check(load_spec(options.dataset, options.root), options.split)
        case "prepare":
            return preparing.prepare(options)
    return None


if __name__ == "__main__":
    run_main(main)
