"""The image-level branch by itself: the flags of `train_mlmt.py` of the original, and this repository's beside them."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from common.config import from_tree, load_config
from common.data.dataset_yaml import load_spec
from common.errors import UserError
from projects.s4gan_mlmt.compat.flags import require_classes
from projects.s4gan_mlmt.config import Config
from projects.s4gan_mlmt.mlmt.train import dry_run, train
from tools import train_script

DATA_DIR = "./data/voc_dataset/"
PKL_FILE = "./checkpoints/voc_semi_0_125/train_voc_split.pkl"
LABELED_RATIO = 0.125
OUTPUT = "mlmt_output"
WEIGHTS = "resnet101-5d3b4d8f.pth"
FLAGS = {  # flag: key of the configuration, type, the original's default, what it is
    "--lr": ("mlmt.lr", float, 3e-2, "rate of the first epoch"),
    "--eta-min": ("mlmt.eta_min", float, 1e-4, "where the cosine annealing ends"),
    "--weight-decay": ("mlmt.weight_decay", float, 1e-5, "of the SGD"),
    "--workers": ("mlmt.workers", int, 4, "decoding processes of each stream"),
    "--batch-size-lab": ("mlmt.labeled_batch", int, 16, "labeled images per step"),
    "--batch-size-unlab": ("mlmt.unlabeled_batch", int, 80, "unlabeled images per step"),
    "--batch-size-val": ("mlmt.val_batch", int, 32, "images per validation batch"),
    "--num-epochs": ("mlmt.epochs", int, 100, "passes over the labeled images"),
    "--burn-in-epochs": ("mlmt.burn_in_epochs", int, 10, "epochs before the consistency begins"),
    "--evaluation-epochs": ("mlmt.evaluation_epochs", int, 5, "epochs between two validations"),
    "--w-cons": ("mlmt.w_cons", float, 1.0, "largest weight of the consistency"),
    "--ema-decay": ("mlmt.ema_decay", float, 0.999, "largest decay of the teacher"),
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The original's flags, and the configuration of this repository beside them."""
    result = argparse.ArgumentParser(
        prog="train_mlmt.py", description="Train the image-level branch (MLMT).", allow_abbrev=False
    )
    for flag, (key, kind, default, what) in FLAGS.items():
        result.add_argument(flag, dest=key, type=kind, metavar="N", help=f"{what} (as {key}; {default:g})")
    result.add_argument("--num-classes", type=int, metavar="N", help="checked against the dataset's (21)")
    result.add_argument("--exp-name", default="default", help=f"folder below {OUTPUT} (%(default)s)")
    result.add_argument("--cons-loss", help="cosine is the only one (the original ignores the flag)")
    result.add_argument("--data-dir", help=f"folder of the dataset ({DATA_DIR}, else SSS_DATA)")
    result.add_argument(
        "--pkl-file", help=f"permutation of the training images, as s4GAN saves it ({PKL_FILE})"
    )
    result.add_argument(
        "--labeled-ratio",
        type=float,
        metavar="N",
        help=f"labeled share of the images ({LABELED_RATIO}); 1 shows every image in both roles",
    )
    result.add_argument("--verbose", action="store_true", help="a log line for every step")
    result.add_argument("--config", type=Path, help="YAML file of this repository")
    result.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="values of the configuration"
    )
    return result


def overrides_of(args: argparse.Namespace) -> list[str]:
    """Overrides for the flags that were given, those of the command line last.

    Raises:
        UserError: a consistency loss other than cosine.
    """
    if args.cons_loss not in (None, "cosine"):
        raise UserError(f"--cons-loss {args.cons_loss}: unknown; cosine is the only one")
    values: dict[str, object] = {key: getattr(args, key) for key, *_ in FLAGS.values()}
    values["data.root"] = args.data_dir
    values["data.split_file"] = args.pkl_file
    values["data.labeled_ratio"] = args.labeled_ratio
    if args.labeled_ratio == 1:  # as s4GAN without a ratio: no permutation is needed
        values |= {"data.split": "full", "data.labeled_ratio": "null", "data.split_file": "null"}
    elif args.pkl_file is not None or args.labeled_ratio is not None:
        values["data.split"] = "full"
    if args.verbose:
        values["run.log_interval"] = 1
    given = [f"{key}={_text(value)}" for key, value in values.items() if value is not None]
    return [*given, *args.overrides]


def _text(value: object) -> str:
    """A value as an override spells it; paths are quoted, for one may look like a number."""
    return json.dumps(value) if isinstance(value, str) and value != "null" else str(value)


def original() -> dict[str, dict[str, object]]:
    """The original's settings where no file gives others: Pascal VOC and the split that s4GAN saved."""
    weights = Path("pretrained_models") / WEIGHTS
    return {
        "data": {
            "dataset": "voc",
            "split": "full",
            "root": DATA_DIR if Path(DATA_DIR).is_dir() else None,
            "labeled_ratio": LABELED_RATIO,
            "split_file": PKL_FILE,
        },
        "mlmt": {"weights": str(weights) if weights.is_file() else WEIGHTS},
        "method": {"name": "s4gan_mlmt"},
    }


def branch_config(args: argparse.Namespace) -> Config:
    """The configuration of the command line.

    Raises:
        UserError: a mistake in the file, a flag or an override; `--num-classes` is not the dataset's.
    """
    overrides = overrides_of(args)
    if args.config is None:
        cfg = from_tree(Config, original(), overrides, "command line")
    else:
        cfg = load_config(Config, args.config, overrides)
    spec = load_spec(cfg.data.dataset, cfg.data.root)
    require_classes(args.num_classes, spec)
    return cfg if any(o.startswith("mlmt.labels=") for o in overrides) else with_label_files(cfg, spec.root)


def with_label_files(cfg: Config, root: Path | None) -> Config:
    """The configuration with the label files of the data folder in place of the masks, if both are there."""
    files = [] if root is None else [root / name for name in (cfg.mlmt.train_labels, cfg.mlmt.val_labels)]
    if not files or not all(path.is_file() for path in files):
        return cfg
    return dataclasses.replace(cfg, mlmt=dataclasses.replace(cfg.mlmt, labels="files"))


def main(argv: Sequence[str]) -> int:
    """Read the command line, join the other processes, train."""
    args = parser().parse_intermixed_args(argv)
    cfg = branch_config(args)
    run_dir = Path(cfg.run.dir or Path(OUTPUT) / args.exp_name)
    return train_script.start(cfg, run_dir, train, dry_run)
