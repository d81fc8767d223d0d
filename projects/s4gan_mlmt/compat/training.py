"""The training scripts of the original: their flags, translated into this project's configuration.

A configuration is built of nothing but the flags and `section.key=value`. A flag without effect is accepted and said to
have none.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import from_tree
from common.data.dataset_yaml import load_spec
from common.errors import UserError
from projects.s4gan_mlmt import train
from projects.s4gan_mlmt.compat.flags import (
    Dataset,
    add_common,
    choose_gpu,
    data_root,
    dataset,
    list_file,
    require_classes,
    say,
    words,
)
from projects.s4gan_mlmt.config import Config
from tools import train_script

PRETRAINED = "pretrained_models"
RESNET101 = "resnet101-5d3b4d8f.pth"
WIDE_RESNET38 = "wider_resnet38.pth.tar"
SEED = 1234


@dataclass(frozen=True, kw_only=True)
class Script:
    """A training script of the original.

    Attributes:
        name: of the file.
        what: it trains.
        adversarial: with discriminator and unlabeled images.
        wide: with DeepLabV3+ and Wide-ResNet-38.
        batch_size: default of `--batch-size`.
        save_every: default of `--save-pred-every`.
        folder: default of `--checkpoint-dir`.
    """

    name: str
    what: str
    adversarial: bool = True
    wide: bool = False
    batch_size: int = 8
    save_every: int = 5000
    folder: str = "./checkpoints/voc_semi_0_125/"


FULL = Script(
    name="train_full.py",
    what="the supervised baseline",
    adversarial=False,
    batch_size=10,
    folder="./checkpoints/voc_full/",
)
S4GAN = Script(name="train_s4GAN.py", what="s4GAN")
WRN38 = Script(name="train_s4GAN_wrn38.py", what="s4GAN with Wide-ResNet-38", wide=True, save_every=1000)


def parser(script: Script) -> argparse.ArgumentParser:
    """The command line of a training script of the original."""
    result = argparse.ArgumentParser(
        prog=script.name, description=f"Train {script.what} by the original's flags.", allow_abbrev=False
    )
    add_common(result, "./data/voc_list/train_aug.txt")
    add = result.add_argument
    add("--batch-size", type=int, default=script.batch_size, help="labeled images per step (%(default)s)")
    add("--num-workers", type=int, help="decoding processes per loader (as data.workers)")
    add("--split-id", help="permutation of the training images (without one it is drawn)")
    add("--input-size", help="'height, width' of the crops (the dataset's)")
    add("--ignore-label", type=float, help="accepted: what the dataset ignores is known")
    add("--labeled-ratio", type=float, help="share of labeled images (all)")
    add("--learning-rate", type=float, default=2.5e-4, help="of the backbone (%(default)s)")
    add("--momentum", type=float, default=0.9, help="(%(default)s)")
    add("--num-steps", type=int, default=40000, help="(%(default)s)")
    add("--power", type=float, default=0.9, help="of the schedule (%(default)s)")
    add("--weight-decay", type=float, default=5e-4, help="(%(default)s)")
    add("--random-mirror", action="store_true", help="Pascal VOC: mirror half of the samples")
    add("--random-scale", action="store_true", help="Pascal VOC: resize samples")
    add("--random-seed", type=int, default=SEED, help="of everything random (%(default)s)")
    add("--restore-from", metavar="FILE", help=f"weights to start from, or none ({PRETRAINED}/{RESNET101})")
    add("--save-pred-every", type=int, default=script.save_every, help="steps between files (%(default)s)")
    add("--checkpoint-dir", default=script.folder, help="run directory (%(default)s)")
    if script.adversarial:
        add("--learning-rate-D", type=float, default=1e-4, help="of the discriminator (%(default)s)")
        add("--lambda-fm", type=float, default=0.1, help="weight of feature matching (%(default)s)")
        add("--lambda-st", type=float, default=1.0, help="weight of self-training (%(default)s)")
        add("--threshold-st", type=float, default=0.6, help="score from which images count (%(default)s)")
        add("--restore-from-D", metavar="FILE", help="weights of the discriminator")
    if script.wide:
        add("--batch-size-unlab", type=int, default=8, help="unlabeled images per step (%(default)s)")
        add("--eta-min-factor", type=float, help="accepted, without effect")
        add("--out", help="accepted, without effect")
    return result


def crop_size(text: str | None, found: Dataset) -> tuple[int, int]:
    """Height and width of `--input-size`, such as '321, 321'; without it those of the dataset.

    Raises:
        UserError: not two positive numbers.
    """
    if text is None:
        return found.crop
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--input-size '{text}': give height and width, such as '321, 321'")
    return int(parts[0]), int(parts[1])


def split_file(script: Script, args: argparse.Namespace, found: Dataset) -> str | None:
    """The permutation: none without a ratio; train_full.py takes the published one by default.

    That one is the dataset's own; the original takes Pascal VOC's for all of them (`one_permutation` of the README).
    """
    if args.labeled_ratio is None:
        return None
    given: str | None = args.split_id
    return given or (None if script.adversarial else found.split)


def weights_file(given: str | None, default: str) -> str:
    """`model.weights` for a file of `pretrained_models`: the path given, else the default's where it can be found."""
    if given is not None:
        return given
    usual = Path(PRETRAINED) / default
    return str(usual) if usual.is_file() else default


def rounds(steps: int, save_every: int) -> int:
    """Rounds that end where files are saved, if the steps can be divided so; else one."""
    return steps // save_every if save_every > 0 and steps % save_every == 0 else 1


def training_tree(script: Script, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The configuration that the flags stand for, as a nested mapping.

    Raises:
        UserError: a flag that cannot be met.
    """
    found = dataset(args.dataset)
    root = data_root(found, args.data_dir)
    require_classes(args.num_classes, load_spec(found.name, root))
    if args.save_pred_every < 1:
        raise UserError(f"--save-pred-every {args.save_pred_every}: give 1 or more")
    voc = found.name == "voc"
    lists = list_file(args.data_list, "./data/voc_list/train_aug.txt") if voc else None
    tree: dict[str, dict[str, Any]] = {
        "data": {
            "dataset": found.name,
            "pipeline": found.name,
            "split": "full",
            "root": root,
            "train_list": lists,
            "crop_size": crop_size(args.input_size, found),
            "random_scale": voc and args.random_scale,
            "random_mirror": voc and args.random_mirror,
            "labeled_ratio": args.labeled_ratio,
            "split_file": split_file(script, args, found),
            "drop_last": script.wide,
            "workers": 4 if args.num_workers is None else args.num_workers,
        },
        "model": {
            "network": "deeplabv3p_wrn38" if script.wide else "deeplabv2",
            "weights": weights_file(None, WIDE_RESNET38)
            if script.wide
            else weights_file(args.restore_from, RESNET101),
        },
        "optim": {
            "lr": args.learning_rate,
            "momentum": args.momentum,
            "weight_decay": args.weight_decay,
            "power": args.power,
            "steps": args.num_steps,
            "epochs": rounds(args.num_steps, args.save_pred_every),
            "batch_size": args.batch_size,
        },
        "method": {"name": "s4gan" if script.adversarial else "sup_only"},
        "eval": {"every_epochs": 1 if script.wide else 0},
        "keep": {"original_every": args.save_pred_every},
        "run": {"dir": args.checkpoint_dir, "seed": args.random_seed, "save_interval": args.save_pred_every},
    }
    val = "./data/voc_list/val.txt"
    if voc and Path(val).is_file():
        tree["eval"]["list"] = tree["data"]["val"] = val
    if script.adversarial:
        tree["model"]["weights_d"] = args.restore_from_D or "none"
        tree["optim"]["lr_d"] = args.learning_rate_D
        tree["method"] |= {
            "fm_weight": args.lambda_fm,
            "st_weight": args.lambda_st,
            "st_threshold": args.threshold_st,
        }
    if script.wide:
        tree["optim"]["unlabeled_batch_size"] = args.batch_size_unlab
    return tree


def training_notes(script: Script, args: argparse.Namespace) -> list[str]:
    """What becomes of flags that the original, or this project, does not use."""
    found, notes = dataset(args.dataset), []
    if args.model is not None:
        notes.append(f"--model {args.model}: without effect, {script.name} has one network")
    if args.ignore_label not in (None, found.ignore):
        notes.append(
            f"--ignore-label {args.ignore_label:g}: without effect, the void labels of {args.dataset} are ignored"
        )
    if found.name != "voc":
        given = {"--random-mirror": args.random_mirror, "--random-scale": args.random_scale}
        given["--data-list"] = args.data_list is not None
        notes += [f"{flag}: without effect on {args.dataset}" for flag, value in given.items() if value]
    if script.wide and args.restore_from is not None:
        notes.append(
            f"--restore-from {args.restore_from}: without effect, the weights are {PRETRAINED}/{WIDE_RESNET38} "
            "(model.weights=FILE names others)"
        )
    if script.wide and args.eta_min_factor is not None:
        notes.append("--eta-min-factor: without effect, the schedule is polynomial")
    if script.wide and args.out is not None:
        notes.append(f"--out {args.out}: without effect, everything is written to {args.checkpoint_dir}")
    return notes


def training_config(script: Script, argv: Sequence[str]) -> Config:
    """The configuration that a command line of the original stands for; overrides come last.

    Raises:
        UserError: a flag or an override that cannot be met.
    """
    args = parser(script).parse_intermixed_args(argv)
    cfg = from_tree(Config, training_tree(script, args), words(args.overrides), "command line")
    say(training_notes(script, args))
    choose_gpu(args.gpu)
    return cfg


def main(script: Script, argv: Sequence[str]) -> int:
    """Read the command line of the original, join the other processes, train."""
    cfg = training_config(script, argv)
    return train_script.start(cfg, Path(str(cfg.run.dir)), train.train, train.dry_run)
