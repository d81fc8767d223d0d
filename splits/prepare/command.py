"""`python -m splits prepare DATASET --source DIR --out DIR [--download] [--check]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common.errors import UserError
from splits.prepare import ade20k, cityscapes, coco, pascal_context, voc
from splits.prepare.archives import Counts

DATASETS = {
    "voc": voc,
    "cityscapes": cityscapes,
    "coco": coco,
    "pascal_context": pascal_context,
    "ade20k": ade20k,
}
SHOWN_PROBLEMS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser what `prepare` needs."""
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--source", type=Path, help="folder with the official archives or what they hold")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to make; may be the unpacked one itself"
    )
    parser.add_argument("--download", action="store_true", help="first download to --source what anybody may")
    parser.add_argument("--check", action="store_true", help="check --out only")


def prepare(options: argparse.Namespace, expected: Counts | None = None) -> int:
    """Prepare a dataset and check the result, or only check; 1 if the folder is not as it should be.

    Finished files are kept, so that an interrupted run can be repeated.

    Args:
        options: What `add_arguments` describes.
        expected: Accepted numbers of photos per list; None takes the official ones.

    Raises:
        UserError: Sources are missing or damaged, or a folder to check is incomplete.
    """
    dataset = DATASETS[options.dataset]
    if not options.check:
        if options.source is None:
            raise UserError("--source: missing; give the folder with the official archives, or --check alone")
        if options.download:
            dataset.download(options.source)
        if not options.source.is_dir():
            raise UserError(
                f"--source {options.source}: no such folder; give the folder with the official archives"
            )
        dataset.prepare(options.source, options.out)
    problems = dataset.check(options.out, expected)
    for problem in problems[:SHOWN_PROBLEMS]:
        sys.stdout.write(f"PROBLEM {problem}\n")
    if len(problems) > SHOWN_PROBLEMS:
        sys.stdout.write(f"... and {len(problems) - SHOWN_PROBLEMS} more\n")
    sys.stdout.write(
        f"{options.out}: {len(problems)} problem(s)\n" if problems else f"{options.out}: complete\n"
    )
    return 1 if problems else 0
