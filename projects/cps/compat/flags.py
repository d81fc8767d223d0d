"""The command line names of the original and of the PaddleSeg port, translated into this project's configuration.

A flag that is not given leaves the value of the YAML file, whereas the port's defaults replace it (so that its
`--labeled_ratio 2` always won). Sizes are given as width and height, as the port takes them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.config import from_tree, read_config
from common.errors import UserError
from projects.cps.arithmetic import TRAIN_IMAGES, epoch_arithmetic
from projects.cps.config import Config, loss_divisor
from tools.train_script import run_directory

PORT_SECTIONS = {
    "_base_",
    "_inherited_",
    "batch_size",
    "nepochs",
    "labeled_ratio",
    "train_dataset",
    "val_dataset",
    "test_config",
    "unsupervised_train_dataset",
    "batch_transforms",
    "optimizer_l",
    "optimizer_r",
    "lr_scheduler_l",
    "lr_scheduler_r",
    "loss",
}
PORT_EQUIVALENT = "configs/cityscapes_1488_r50_cps_cutmix.yaml"
PORT_WEIGHTS = (".pdparams", ".pdopt", ".pdiparams", ".pdmodel")
DEVICES = {"gpu": "cuda", "cuda": "cuda", "cpu": "cpu", "auto": "auto"}

# images with labels in the lists of a ratio (by dataset and folder of splits), and the epochs that fill the budget
LABELED = {
    ("voc", "cps"): {16: 662, 8: 1323, 4: 2646, 2: 5291},
    ("voc", "cps_few"): {16: 92, 8: 183, 4: 366, 2: 732},
    ("cityscapes", "cps"): {16: 186, 8: 372, 4: 744, 2: 1488},
}
EPOCHS = {
    "voc": {16: 32, 8: 34, 4: 40, 2: 60},
    "cityscapes": {16: 128, 8: 137, 4: 160, 2: 240},
}


def override(key: str, value: object) -> str:
    """`section.key=value` whose value YAML reads back as it is."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def overrides_of(values: Mapping[str, object]) -> list[str]:
    """`override` of every entry."""
    return [override(key, value) for key, value in values.items()]


def say(notes: Sequence[str]) -> None:
    """Notes on the command line, on stderr, by the first process only."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        for note in notes:
            sys.stderr.write(f"note: {note}\n")


def read_own(config: Path) -> dict[str, Any]:
    """The sections of a YAML file that is none of the port, by its name or its sections.

    Raises:
        UserError: it is one; names the file that stands for it.
    """
    tree = {} if config.stem.startswith("deeplabv3p_") and not config.is_file() else read_config(config)
    if not tree or PORT_SECTIONS & set(tree):
        raise UserError(
            f"--config {config}: is written for the PaddleSeg port; use one of this project's folder 'configs', for "
            f"the port's setting {PORT_EQUIVALENT}"
        )
    return tree


def refuse_port_weights(path: Path | str | None) -> None:
    """Refuse weights of the port, whose head is another one.

    Raises:
        UserError: the file, or a file of the folder, is in PaddlePaddle's format.
    """
    if path is None:
        return
    place = Path(path)
    if place.suffix in PORT_WEIGHTS or any((place / f"model{ending}").exists() for ending in PORT_WEIGHTS):
        raise UserError(
            f"{place}: PaddlePaddle weights of the port, whose head has other layers; use a checkpoint of this "
            "project, or one of the original's that convert.py has converted"
        )


def device(name: str) -> str:
    """`run.device` for the port's name of a device.

    Raises:
        UserError: a device that nothing here runs on.
    """
    if name not in DEVICES:
        raise UserError(f"--device {name}: not supported; use gpu, cpu or auto")
    return DEVICES[name]


def add_device(parser: argparse.ArgumentParser) -> None:
    """`--device` of the port."""
    parser.add_argument("--device", help="gpu, cpu or auto (as run.device)")


def add_opts(parser: argparse.ArgumentParser) -> None:
    """`--opts` of the port, the last flag of a command line."""
    words = "changes to the configuration, the same as without --opts"
    parser.add_argument("--opts", nargs="+", default=[], metavar="section.key=value", help=words)


def add_unused_format(parser: argparse.ArgumentParser) -> None:
    """`--data_format` of the port, which is accepted."""
    parser.add_argument(
        "--data_format", choices=("NCHW", "NHWC"), help="accepted, without effect (see run.channels_last)"
    )


# --- train.py --------------------------------------------------------------------------------------------------


def train_parser() -> argparse.ArgumentParser:
    """The command line of train.py: this project's form, and the flags of the port and of the original."""
    result = argparse.ArgumentParser(
        prog="train.py", description="Train CPS or a method shipped with it.", allow_abbrev=False
    )
    result.add_argument("--config", type=Path, required=True, help="YAML file, see the folder 'configs'")
    add_device(result)
    result.add_argument("--save_dir", help="run directory (as run.dir)")
    result.add_argument("--num_workers", type=int, help="decoding processes per loader (as data.workers)")
    result.add_argument(
        "--do_eval", action="store_true", help="measure while training, whenever weights are kept"
    )
    resume = result.add_argument("-c", "--continue", "--resume_model", dest="resume_model")
    resume.metavar, resume.help = "CHECKPOINT", "checkpoint or run directory to continue from (as run.resume)"
    result.add_argument("--nepochs", type=int, help="as optim.epochs")
    result.add_argument(
        "--batch_size", type=int, help="labeled images per step over all processes (as optim.batch_size)"
    )
    result.add_argument(
        "--labeled_ratio", type=int, help="16, 8, 4 or 2: the split and the epochs of that ratio"
    )
    result.add_argument("--learning_rate", type=float, help="as optim.lr")
    result.add_argument("--save_epoch", type=int, help="epochs between kept weights (as keep.every_epochs)")
    result.add_argument("--log_iters", type=int, help="steps between log lines (as run.log_interval)")
    result.add_argument(
        "--keep_checkpoint_max", type=int, help="kept weights at most, 0 for all (as keep.newest)"
    )
    result.add_argument("--seed", type=int, help="as run.seed")
    result.add_argument("--use_vdl", action="store_true", help="accepted, without effect")
    result.add_argument("--profiler_options", help="accepted, without effect")
    add_unused_format(result)
    result.add_argument("-p", "--port", type=int, help="port of a Slurm run")
    result.add_argument("-d", "--devices", help="accepted, without effect")
    result.add_argument("--local_rank", "--local-rank", type=int, help="accepted, without effect")
    add_opts(result)
    result.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="changes to the configuration"
    )
    return result


def read_train(argv: Sequence[str], folder: Path) -> tuple[Config, Path]:
    """The configuration that a command line of train.py stands for, and the run directory.

    Args:
        argv: in this project's form, or with flags of the port or of the original.
        folder: of the project, where runs lie.

    Raises:
        UserError: as `train_config`.
    """
    args = train_parser().parse_intermixed_args(argv)
    cfg = train_config(args)
    return cfg, run_directory(cfg, args.config, folder)


def train_config(args: argparse.Namespace) -> Config:
    """The configuration that a parsed command line of train.py stands for; overrides win over flags.

    Raises:
        UserError: a file of the port, a flag that cannot be met, or what `from_tree` raises.
    """
    tree, where = read_own(args.config), str(args.config)
    refuse_port_weights(args.resume_model)
    changes = [*args.overrides, *args.opts]
    cfg = from_tree(Config, tree, changes, where)
    say(train_notes(args, cfg))
    if args.port is not None and "RANK" not in os.environ:
        os.environ["MASTER_PORT"] = str(args.port)
    return from_tree(Config, tree, [*train_overrides(args, cfg), *changes], where)


def train_overrides(args: argparse.Namespace, cfg: Config) -> list[str]:
    """Overrides for the flags that were given.

    A batch that the authors' processes cannot share is taken as one for the supervised loss; what the loss is divided
    by (QUIRK quirks.loss_world_size) stays theirs, because the published rates rest on it. Other epochs move the first
    weights that are kept in proportion.

    Args:
        args: parsed by `train_parser`.
        cfg: the YAML file's values.

    Raises:
        UserError: an unknown device, or a ratio that there are no lists of.
    """
    named = {
        "run.dir": args.save_dir,
        "data.workers": args.num_workers,
        "run.resume": args.resume_model,
        "optim.batch_size": args.batch_size,
        "optim.lr": args.learning_rate,
        "keep.every_epochs": args.save_epoch,
        "run.log_interval": args.log_iters,
        "run.seed": args.seed,
        "run.device": None if args.device is None else device(args.device),
    }
    values: dict[str, object] = {key: value for key, value in named.items() if value is not None}
    if args.do_eval:
        values["eval.every_epochs"] = args.save_epoch or cfg.eval.every_epochs or cfg.keep.every_epochs or 1
    if args.keep_checkpoint_max is not None:
        values["keep.newest"] = args.keep_checkpoint_max or None
    if unshared(args, cfg):
        values |= {"optim.paper_processes": None, "quirks.loss_world_size": loss_divisor(cfg)}
    if args.labeled_ratio is not None:
        values |= ratio_values(cfg, args.labeled_ratio)
    if args.nepochs is not None:
        values["optim.epochs"] = args.nepochs
    epochs = values.get("optim.epochs")
    if isinstance(epochs, int) and epochs > 0:
        values["keep.after_epoch"] = cfg.keep.after_epoch * epochs // cfg.optim.epochs
    return overrides_of(values)


def unshared(args: argparse.Namespace, cfg: Config) -> bool:
    """Whether `--batch_size` is one that the authors' processes cannot share evenly."""
    return bool(args.batch_size and cfg.optim.paper_processes and args.batch_size % cfg.optim.paper_processes)


def ratio_values(cfg: Config, ratio: int) -> dict[str, object]:
    """Split, images of an epoch and epochs of one of `ratio` images labeled.

    Few-supervision settings have one budget, so that only their split changes. A figure published for another
    ratio is dropped.

    Raises:
        UserError: there are no lists of this ratio for the configuration's dataset and kind of split.
    """
    dataset, folder = cfg.data.dataset, cfg.data.split.rpartition("/")[0]
    counts = LABELED.get((dataset, folder))
    if counts is None:
        raise UserError(
            f"--labeled_ratio {ratio}: data.dataset={dataset} with data.split={cfg.data.split} has no lists by ratio; "
            "leave the flag out, or start from a configuration of a ratio such as voc_1323_r50_cps.yaml"
        )
    if ratio not in counts:
        raise UserError(
            f"--labeled_ratio {ratio}: no published lists; use {', '.join(map(str, counts))}, or set data.split"
        )
    split = f"{folder}/{counts[ratio]}"
    values: dict[str, object] = {"data.split": split}
    if split != cfg.data.split:
        values |= {"expect.miou": None, "expect.source": "none published"}
    if folder == "cps":
        images = epoch_arithmetic(TRAIN_IMAGES[dataset], ratio, cfg.optim.batch_size).max_samples
        values |= {"data.epoch_images": images, "optim.epochs": EPOCHS[dataset][ratio]}
    return values


def train_notes(args: argparse.Namespace, cfg: Config) -> list[str]:
    """What the user should know of the flags that were given."""
    reasons = {
        "use_vdl": "TensorBoard files are always written",
        "profiler_options": "the log has the time of each part of a step",
        "data_format": "run.channels_last chooses the memory layout",
        "devices": "train.sh and CUDA_VISIBLE_DEVICES choose the GPUs",
    }
    given = {key: reason for key, reason in reasons.items() if getattr(args, key)}
    notes = [f"--{key}: accepted, without effect: {reason}" for key, reason in given.items()]
    if unshared(args, cfg):
        notes.append(
            f"--batch_size {args.batch_size}: not a multiple of the authors' {cfg.optim.paper_processes} processes; "
            f"the supervised loss is taken over all of its images, and divided by {loss_divisor(cfg)} as theirs"
        )
    return notes


# --- val.py and predict.py -------------------------------------------------------------------------------------


def add_protocol(parser: argparse.ArgumentParser, aug: str) -> None:
    """The port's flags that say how scores are computed; `aug` is its name for several scales, `--aug_...`."""
    parser.add_argument(
        aug, dest="aug", action="store_true", help="several scales and mirrored images, see below"
    )
    parser.add_argument(
        "--scales", type=float, nargs="+", help=f"with {aug}: factors of the image's size (as eval.scales)"
    )
    parser.add_argument("--flip_horizontal", action="store_true", help=f"with {aug}: as eval.flip=true")
    parser.add_argument("--flip_vertical", action="store_true", help="refused: not part of any protocol")
    parser.add_argument("--is_slide", action="store_true", help="the port's windows (eval.protocol=port)")
    parser.add_argument(
        "--crop_size", type=int, nargs=2, metavar=("W", "H"), help="with --is_slide: size of the windows"
    )
    parser.add_argument(
        "--stride", type=int, nargs=2, metavar=("W", "H"), help="with --is_slide: steps of the windows"
    )
    parser.set_defaults(aug_name=aug)


def protocol_overrides(args: argparse.Namespace, cfg: Config) -> list[str]:
    """Overrides for the flags of `add_protocol` and `--device`; without any, the configuration's protocol stays.

    Args:
        args: the parsed command line.
        cfg: values that are changed.

    Raises:
        UserError: a flag without the one it belongs to, `--flip_vertical`, a window or step that makes no sense.
    """
    if args.flip_vertical:
        raise UserError("--flip_vertical: not part of any protocol here; use --flip_horizontal")
    for name, given in {"--crop_size": args.crop_size, "--stride": args.stride}.items():
        if given is not None and not args.is_slide:
            raise UserError(f"{name} {given[0]} {given[1]}: has no meaning without --is_slide; add it")
        if given is not None and min(given) < 1:
            raise UserError(f"{name} {given[0]} {given[1]}: give two positive numbers, width and height")
    for name, used in {"--scales": args.scales, "--flip_horizontal": args.flip_horizontal}.items():
        if used and not args.aug:
            raise UserError(f"{name}: has no meaning without {args.aug_name}; add it")
    values: dict[str, object] = {}
    if args.device is not None:
        values["run.device"] = device(args.device)
    kind: str = cfg.eval.protocol
    crop = cfg.eval.crop_size or cfg.data.crop_size
    if args.is_slide:
        kind = "port"
        crop = tuple(reversed(args.crop_size)) if args.crop_size else crop
        step = tuple(reversed(args.stride)) if args.stride else None
        if step and (step[0] > crop[0] or step[1] > crop[1]):
            raise UserError(
                f"--stride {step[1]} {step[0]}: larger than the window {crop[1]} {crop[0]}, which would leave pixels "
                "out; use a stride of at most --crop_size"
            )
        values |= {"eval.protocol": kind, "eval.crop_size": crop, "eval.stride": step}
    if args.aug:
        values |= {"eval.scales": args.scales or [1.0], "eval.flip": args.flip_horizontal}
        if kind not in ("original", "port"):
            values["eval.protocol"] = "multi_scale_flip"
            values["eval.crop_size"] = crop if kind == "sliding_window" else cfg.eval.crop_size
    return overrides_of(values)
