r"""Measure the segmentation network of a run; the same code while training, in `eval.py` and as the original's command.

    python evaluate.py --dataset pascal_voc --num-classes 21 --restore-from ./checkpoints/voc_semi_0_125/VOC_30000.pth \
        [--with-mlmt --mlmt-file ./mlmt_output/voc_semi_0_125_MLMT/output_ema_raw_100.txt] \
        [--save-dir results] [--save-output-images]

`--restore-from` takes files of the original, with and without the prefix of data parallelism, and every checkpoint of
this project. Beside a `config.yaml`, as `train_s4GAN.py` writes it, the file is of that configuration's network. The
protocol is the authors'; `eval.py` has the others. `section.key=value` changes anything else.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor, nn

from common.config import from_tree, load_config
from common.data.dataset_yaml import load_spec
from common.data.spec import DatasetSpec
from common.distributed import Dist, start, stop
from common.errors import UserError, run_main
from common.measure.evaluation import Evaluation, OnImage, Protocol, Refine, When, evaluate_list, protocol_of
from common.measure.inference import Forward
from common.models.pretrained import read_weights
from common.run.backend import configure
from common.run.checkpoint import load, load_weights, require_own
from common.run.log import setup_console
from projects.s4gan_mlmt import flags
from projects.s4gan_mlmt.config import Config, Pipeline
from projects.s4gan_mlmt.fusion import Fusion, read_scores
from projects.s4gan_mlmt.inference import (
    network_input,
    original_palette,
    original_protocol,
    prediction_writer,
)
from projects.s4gan_mlmt.metrics import printed_text, progress_line, write_result
from projects.s4gan_mlmt.model import build_segmentation
from projects.s4gan_mlmt.state import PROJECT, SEGMENTATION
from projects.s4gan_mlmt.step import Segmenter
from tools.eval_script import config_of

MLMT_FILE = "./mlmt_output/output_ema_p_1_0_voc_5.txt"
WIDE_KEY = "bot_fine.weight"  # of Wide-ResNet-38's DeepLabV3+


def protocol(cfg: Config, when: When) -> Protocol:
    """The protocol that the configuration names for this occasion.

    Raises:
        UserError: the settings contradict each other.
    """
    settings = cfg.eval
    kind = settings.during_training if when == "training" else settings.protocol
    return original_protocol(cfg) if kind == "original" else protocol_of(settings, cfg.data, when)


def full_resolution(cfg: Config) -> Protocol | None:
    """A protocol beside the authors' where theirs measures at a size of its own; None where it does not.

    The network sees the size that it learned from, and its scores are brought to that of the labels.
    """
    if cfg.eval.protocol != "original" or cfg.data.pipeline not in ("pascal_context", "cityscapes"):
        return None
    return Protocol(kind="whole_image", scales=(0.5,) if cfg.data.pipeline == "cityscapes" else (1.0,))


def fusion_of(cfg: Config, scores: Path, spec: DatasetSpec, images: str, dist: Dist) -> Fusion:
    """What switches off the classes that a scores file does not see in the images of a list.

    Raises:
        UserError: the file is missing, malformed, or of other images or classes.
    """
    ids = [item.id for item in spec.read_list(images)]
    rows = read_scores(scores, len(ids), spec.num_classes)
    return Fusion(ids, rows, cfg.quirks.fusion, cfg.mlmt.keep_threshold, dist.device)


class Measured(nn.Module):
    """A segmentation network for code that hands out images as every project prepares them: R, G, B.

    Args:
        segmenter: the network, not wrapped.
        pipeline: `data.pipeline`, by which it learned.
    """

    def __init__(self, segmenter: Segmenter, pipeline: Pipeline) -> None:
        super().__init__()
        self.segmenter = segmenter
        self._forward: Forward = network_input(segmenter.predict, pipeline)

    def predict(self, x: Tensor) -> Tensor:
        """Logits (B, K, H, W) at the size of the images (B, 3, H, W)."""
        return self._forward(x)


def evaluate_network(
    cfg: Config,
    segmenter: Segmenter,
    spec: DatasetSpec,
    images: str,
    how: Protocol,
    dist: Dist,
    *,
    refine: Refine | None = None,
    on_image: OnImage | None = None,
) -> Evaluation:
    """MIoU on the list `images`; a collective. Leaves the network in evaluation mode.

    Args:
        cfg: the run's configuration.
        segmenter: the segmentation network, not wrapped.
        spec: the dataset.
        images: name of the list, or its path.
        how: protocol.
        dist: this process.
        refine: changes scores before the best class is taken, as a `Fusion`.
        on_image: see `common.measure.evaluation.evaluate`.

    Raises:
        UserError: list or files missing or broken; scores of another list or other classes.
    """
    forward = Measured(segmenter, cfg.data.pipeline).eval().predict
    return evaluate_list(
        forward, cfg.data, spec, images, how, dist,
        precision=cfg.run.precision, refine=refine, on_image=on_image,
    )  # fmt: skip


def segmenter_of(
    cfg: Config, weights: Mapping[str, Tensor], num_classes: int, device: torch.device, where: str
) -> Segmenter:
    """The segmentation network with these weights, on its device and in evaluation mode.

    Args:
        cfg: describes the network.
        weights: its state dict, with bare keys.
        num_classes: K.
        device: where it goes.
        where: place of the weights, for messages.

    Raises:
        UserError: they are of another architecture or other classes.
    """
    network = build_segmentation(cfg, num_classes)
    load_weights(network, weights, where)
    layout = torch.channels_last if cfg.run.channels_last else torch.contiguous_format
    network = network.to(device, memory_format=layout)  # type: ignore[call-overload]
    return Segmenter(network, precision=cfg.run.precision).eval()


# --- the original's command ------------------------------------------------------------------------------------


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
            tree = {**flags.evaluation_tree(args), "model": {"network": network}}
            cfg = from_tree(Config, tree, changes, "command line")
    if cfg.data.pipeline not in ("house", found.name):
        raise UserError(
            f"--dataset {args.dataset}: {path} was trained on '{cfg.data.dataset}'; give that dataset's name"
        )
    return cfg, weights, where


def require_classes(num_classes: int | None, spec: DatasetSpec) -> None:
    """Refuse a `--num-classes` that is not the dataset's; `UserError`."""
    if num_classes not in (None, spec.num_classes):
        raise UserError(
            f"--num-classes {num_classes}: dataset '{spec.name}' has {spec.num_classes}; leave the flag out or choose "
            "another dataset"
        )


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
        require_classes(args.num_classes, spec)
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


if __name__ == "__main__":
    run_main(main)
