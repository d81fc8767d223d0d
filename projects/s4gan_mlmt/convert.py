"""Turn checkpoints of the authors into one of this project, with an account of every key.

    python convert.py VOC_30000.pth --discriminator VOC_30000_D.pth --config CONFIG.yaml --out voc.pt

The result works with eval.py, evaluate.py, predict.py and `run.init`. Files of every training script of the original
are read, with and without the prefix of data parallelism. The configuration must describe the network that the file
holds. Without `--discriminator` the result has the segmentation network alone: enough to evaluate, and a run that
begins with it draws a discriminator anew. The image-level branch of the original saves no weights. Optimizers and
iteration are in none of these files.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from torch import Tensor

from common.data.spec import DatasetSpec
from common.errors import UserError, run_main
from common.models.pretrained import LoadReport, load_state, read_weights
from projects.s4gan_mlmt.config import Config
from projects.s4gan_mlmt.model import (
    DISCRIMINATOR,
    IMAGE_CHANNELS,
    SEGMENTATION,
    build_discriminator,
    build_segmentation,
    load_discriminator,
)
from projects.s4gan_mlmt.state import PROJECT
from tools import convert_script

OUTPUT_LAYERS = ("layer5.conv2d_list.0.weight", "final.6.weight")  # of the authors' two networks
DISCRIMINATOR_KEY = "conv4.weight"


def main(argv: Sequence[str]) -> int:
    """Convert what the command line names."""
    args = parser().parse_intermixed_args(argv)
    sources = [path for path in (args.source, args.discriminator) if path is not None]
    cfg, spec = convert_script.read_arguments(args, Config, *sources)
    networks, reports = convert(args.source, cfg, spec, str(args.config), args.discriminator)
    convert_script.write_checkpoint(args, PROJECT, cfg, spec, networks, reports)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = convert_script.parser()
    result.add_argument(
        "--discriminator", type=Path, metavar="FILE", help="the discriminator beside it (VOC_..._D.pth)"
    )
    return result


def convert(
    source: Path, cfg: Config, spec: DatasetSpec, config: str, discriminator: Path | None = None
) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, LoadReport]]:
    """State dicts of the networks in the authors' files with our keys, and what became of every key.

    Args:
        source: File of the segmentation network; read as data, without executing code.
        cfg: Describes the networks.
        spec: The dataset, for the class count.
        config: Name of the configuration, for messages.
        discriminator: File of the discriminator, or None.

    Raises:
        UserError: unreadable or unsafe file, another class count, or any tensor missing, too many or of another shape.
    """
    state, place = read_weights(source)
    require_segmentation(state, place, spec, config)
    segmentation = build_segmentation(cfg, spec.num_classes)
    reports = {SEGMENTATION: load_state(segmentation, state, source=place)}
    networks: dict[str, Mapping[str, Tensor]] = {SEGMENTATION: segmentation.state_dict()}
    if discriminator is not None:
        require_discriminator(discriminator, spec, config)
        network = build_discriminator(cfg, spec.num_classes)
        reports[DISCRIMINATOR] = load_discriminator(network, discriminator)
        networks[DISCRIMINATOR] = network.state_dict()
    return networks, reports


def require_segmentation(state: Mapping[str, Tensor], place: str, spec: DatasetSpec, config: str) -> None:
    """Refuse a discriminator, an ImageNet file, and another class count; `UserError`."""
    if DISCRIMINATOR_KEY in state:
        raise UserError(
            f"{place}: is a discriminator; give the segmentation network's file, and this one with --discriminator"
        )
    if "fc.weight" in state:
        raise UserError(
            f"{place}: is a classifier such as ImageNet's; set model.weights to it, and convert files of training runs"
        )
    classes = next((len(state[key]) for key in OUTPUT_LAYERS if key in state), spec.num_classes)
    require_classes(classes, place, spec, config)


def require_discriminator(path: Path, spec: DatasetSpec, config: str) -> None:
    """Refuse a discriminator of maps with another class count; `UserError`."""
    state, place = read_weights(path)
    first = state.get("conv1.weight")
    if DISCRIMINATOR_KEY in state and first is not None and first.ndim == 4:
        require_classes(first.shape[1] - IMAGE_CHANNELS, place, spec, config)


def require_classes(classes: int, place: str, spec: DatasetSpec, config: str) -> None:
    """Refuse weights of another class count; `UserError`."""
    if classes != spec.num_classes:
        raise UserError(
            f"{place}: is of {classes} classes, dataset '{spec.name}' of {config} has {spec.num_classes}; give a "
            "configuration of the dataset it was trained on"
        )


if __name__ == "__main__":
    run_main(main)
