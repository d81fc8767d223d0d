"""Turn a checkpoint of the authors into one of this project, with an account of every key.

    python convert.py ckpt_best.pth --config configs/voc_classic_366_r101.yaml --out voc_366.pt

The result works with eval.py, predict.py and `run.init`. The configuration must describe the network that the file
holds: `coco_*.yaml` for Xception-65, `*_sup.yaml` for supervised-only files (those of Cityscapes have the auxiliary
head). Only weights are taken: the authors' files hold neither queues nor prototypes, and training from such weights
makes its own.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from torch import Tensor

from common.data.spec import DatasetSpec
from common.errors import UserError, run_main
from common.models.pretrained import LoadReport, load_state, read_weights
from projects.brpg.config import Config
from projects.brpg.model import XCEPTION, build_student
from projects.brpg.state import PROJECT
from tools import convert_script

ENTRIES = {"student": ("model_state", "teacher_state"), "teacher": ("teacher_state", "model_state")}
OUTPUT_LAYER = "decoder.classifier.8.weight"
XCEPTION_LAYER = "encoder.block1.sepconv1.depthwise.weight"


def main(argv: Sequence[str]) -> int:
    """Convert what the command line names."""
    args = convert_script.parser().parse_intermixed_args(argv)
    cfg, spec = convert_script.read_arguments(args, Config, args.source)
    networks, reports = convert(args.source, cfg, spec, str(args.config))
    convert_script.write_checkpoint(args, PROJECT, cfg, spec, networks, reports)
    return 0


def convert(
    source: Path, cfg: Config, spec: DatasetSpec, config: str
) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, LoadReport]]:
    """State dicts of the networks in the authors' file with our keys, and what became of every key.

    A file without a teacher (supervised-only training, bare weights) gives a student; a configuration with a
    teacher then gets it as both.

    Args:
        source: The file; read as data, without executing code.
        cfg: Describes the network.
        spec: The dataset, for the class count.
        config: Name of the configuration, for messages.

    Raises:
        UserError: unreadable or unsafe file, another encoder or class count, or any tensor missing or of another
            shape.
    """
    networks: dict[str, Mapping[str, Tensor]] = {}
    reports: dict[str, LoadReport] = {}
    for role in ("student", "teacher") if cfg.method.mode == "semi" else ("student",):
        state, place = read_weights(source, ENTRIES[role])
        require_same_network(state, place, cfg, spec, config)
        network = build_student(cfg, spec.num_classes)
        reports[role] = load_state(network, state, source=place)
        networks[role] = network.state_dict()
    return networks, reports


def require_same_network(
    state: Mapping[str, Tensor], place: str, cfg: Config, spec: DatasetSpec, config: str
) -> None:
    """Refuse weights whose encoder or heads differ from the configuration's, with the one that would fit.

    Raises:
        UserError: another class count, Xception-65 or a representation or auxiliary head on one side only.
    """
    if OUTPUT_LAYER not in state:
        return  # no network of this kind; `load_state` says what it is
    classes = len(state[OUTPUT_LAYER])
    if classes != spec.num_classes:
        raise UserError(
            f"{place}: scores {classes} classes, dataset '{spec.name}' of {config} has {spec.num_classes}; give a "
            "configuration of the dataset it was trained on"
        )
    if (XCEPTION_LAYER in state) != (cfg.model.backbone == XCEPTION):
        held = "Xception-65" if XCEPTION_LAYER in state else "a ResNet"
        remedy = XCEPTION if XCEPTION_LAYER in state else "resnet101"
        raise UserError(
            f"{place}: has {held} as encoder, {config} has {cfg.model.backbone}; set model.backbone={remedy}"
        )
    heads = {
        "decoder.representation.": ("representation", cfg.method.mode == "semi", "method.mode", "semi", "sup_only"),
        "auxor.": ("auxiliary", cfg.model.aux_weight > 0, "model.aux_weight", "0.4", "0"),
    }  # fmt: skip
    for prefix, (name, wanted, key, with_head, without) in heads.items():
        present = any(tensor.startswith(prefix) for tensor in state)
        if present and not wanted:
            raise UserError(f"{place}: has the {name} head, {config} has not; set {key}={with_head}")
        if wanted and not present:
            raise UserError(f"{place}: lacks the {name} head that {config} has; set {key}={without}")


if __name__ == "__main__":
    run_main(main)
