"""Measure weights by the authors' protocol: the flags of `evaluate.py` of the original, what it prints and writes."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from common.config import from_tree, load_config
from common.data.dataset_yaml import load_spec
from common.data.spec import DatasetSpec
from common.distributed import Dist
from common.errors import UserError
from common.measure.evaluation import OnImage
from common.models.pretrained import read_weights
from common.run.checkpoint import load, require_own
from common.run.log import setup_console
from common.run.rng import configure
from projects.s4gan_mlmt.compat import flags
from projects.s4gan_mlmt.compat.metrics import printed_text, progress_line, write_result
from projects.s4gan_mlmt.compat.pictures import original_palette, prediction_writer
from projects.s4gan_mlmt.config import Config
from projects.s4gan_mlmt.evaluation import (
    evaluate_network,
    full_resolution,
    fusion_of,
    protocol,
    segmenter_of,
)
from projects.s4gan_mlmt.model import SEGMENTATION
from projects.s4gan_mlmt.state import PROJECT
from tools.eval_script import config_of
from tools.processes import start, stop

MLMT_FILE = "./mlmt_output/output_ema_p_1_0_voc_5.txt"
WIDE_KEY = "bot_fine.weight"  # of Wide-ResNet-38's DeepLabV3+


def parser() -> argparse.ArgumentParser:
    """The original's flags, and `section.key=value` beside them."""
    result = argparse.ArgumentParser(
        prog="evaluate.py", description="Measure weights by the authors' protocol.", allow_abbrev=False
    )
    flags.add_common(result, "./data/voc_list/val.txt")
    add = result.add_argument
    add("--ignore-label", type=float, help="accepted, without effect")
    add("--restore-from", default="", metavar="FILE", help="weights: VOC_30000.pth, best.pt ...")
    add("--with-mlmt", action="store_true", help="switch off the classes that the scores file does not see")
    add("--mlmt-file", default=MLMT_FILE, metavar="FILE", help="scores of train_mlmt.py (%(default)s)")
    add("--save-dir", default="results", metavar="DIR", help="folder of result.txt (%(default)s)")
    add("--save-output-images", action="store_true", help="write every prediction to the folder, too")
    return result


def read_source(args: argparse.Namespace) -> tuple[Config, Mapping[str, Tensor], str]:
    """Configuration and state dict of `--restore-from`, and its place.

    A checkpoint of this project carries its configuration; a bare state dict is of the run it lies in, else of what
    the flags say.

    Raises:
        UserError: no such file, or one of another project; flags and file contradict each other.
    """
    if not args.restore_from:
        raise UserError("--restore-from: names no file; give weights, such as checkpoints/.../VOC_30000.pth")
    if args.restore_from.startswith(("http://", "https://")):
        raise UserError(f"--restore-from {args.restore_from}: download the file first, and give its path")
    path = Path(args.restore_from)
    found = flags.dataset(args.dataset)
    listed = (
        flags.list_file(args.data_list, "./data/voc_list/val.txt") if found.name == "voc" else args.data_list
    )
    given = {"data.root": args.data_dir, "eval.list": listed}
    changes = [flags.override(key, value) for key, value in given.items() if value is not None]
    changes = [*changes, "eval.protocol=original", *flags.words(args.overrides)]
    saved = load(path)
    if isinstance(saved, Mapping) and "project" in saved:
        require_own(saved, PROJECT, str(path))
        cfg, weights, where = (
            config_of(Config, saved, changes, str(path)),
            saved["networks"][SEGMENTATION],
            str(path),
        )
    else:
        weights, where = read_weights(path)
        run = path.parent / "config.yaml"
        if run.is_file():
            cfg = load_config(Config, run, changes)
        else:
            network = "deeplabv3p_wrn38" if WIDE_KEY in weights else "deeplabv2"
            tree = {**evaluation_tree(args), "model": {"network": network}}
            cfg = from_tree(Config, tree, changes, "command line")
    if cfg.data.pipeline not in ("house", found.name):
        raise UserError(
            f"--dataset {args.dataset}: {path} was trained on '{cfg.data.dataset}'; give that dataset's name"
        )
    return cfg, weights, where


def evaluation_tree(args: argparse.Namespace) -> Mapping[str, Mapping[str, Any]]:
    """The configuration of `evaluate.py` for a file of the original, which says nothing about itself.

    Raises:
        UserError: unknown dataset.
    """
    found = flags.dataset(args.dataset)
    return {
        "data": {
            "dataset": found.name,
            "pipeline": found.name,
            "split": "full",
            "crop_size": found.crop,
            "root": flags.data_root(found, args.data_dir),
        },
    }


def notes(args: argparse.Namespace) -> list[str]:
    """What becomes of flags without effect."""
    given = {"--model": args.model, "--ignore-label": args.ignore_label}
    return [f"{flag} {value}: without effect" for flag, value in given.items() if value is not None]


def image_writer(folder: Path | None, spec: DatasetSpec, dist: Dist) -> OnImage:
    """A function that counts images aloud and, with a folder, saves their predictions.

    The colours are the authors' on Pascal VOC, the dataset's own elsewhere, where the authors write nothing.
    """
    palette = original_palette() if spec.name == "voc" else spec.palette
    write = None if folder is None else prediction_writer(folder, palette)
    counter = itertools.count(0, dist.world_size)

    def on_image(name: str, scores: Tensor, pred: Tensor) -> None:
        line = progress_line(next(counter))
        if line is not None and dist.is_main:
            sys.stdout.write(f"{line}\n")
        if write is not None:
            write(name, scores, pred)

    return on_image


def main(argv: Sequence[str]) -> int:
    """Measure what the command line names; prints and writes what the original does."""
    args = parser().parse_intermixed_args(argv)
    cfg, weights, where = read_source(args)
    flags.say(notes(args))
    flags.choose_gpu(args.gpu)
    dist = start(cfg.run.device)
    try:
        setup_console(dist)
        configure(cfg.run)
        spec = load_spec(cfg.data.dataset, cfg.data.root)
        flags.require_classes(args.num_classes, spec)
        segmenter = segmenter_of(cfg, weights, spec.num_classes, dist.device, where)
        images, refine = cfg.eval.list, None
        if args.with_mlmt:
            refine = fusion_of(cfg, Path(args.mlmt_file), spec, images, dist)
        folder = Path(args.save_dir)
        on_image = image_writer(folder if args.save_output_images else None, spec, dist)
        found = evaluate_network(
            cfg, segmenter, spec, images, protocol(cfg, "script"), dist, refine=refine, on_image=on_image
        )
        if dist.is_main:
            sys.stdout.write(printed_text(found, spec.classes))
            write_result(folder, found, spec.classes)
        whole = full_resolution(cfg)
        if whole is not None:
            found = evaluate_network(cfg, segmenter, spec, images, whole, dist, refine=refine)
            if dist.is_main:
                write_result(folder / "full_resolution", found, spec.classes)
                sys.stderr.write(
                    f"at full resolution: mIoU {found.miou:.4f} ({folder / 'full_resolution'})\n"
                )
    finally:
        stop()
    return 0
