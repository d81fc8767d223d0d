"""Turn a checkpoint of the authors into one of this project, with an account of every key.

    python convert.py ckpt_best.pth --config configs/voc_classic_366_r101.yaml --out voc_366.pt

The result works with eval.py, predict.py and `run.init`. The configuration must describe the network that the file
holds: `coco_*.yaml` for Xception-65, `*_sup.yaml` for supervised-only files (those of Cityscapes have the auxiliary
head). Only weights are taken: the authors' files hold neither queues nor prototypes, and training from such weights
makes its own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.data.spec import DatasetSpec
from common.errors import UserError, run_main
from projects.brpg.config import Config
from projects.brpg.model import XCEPTION, build_student
from projects.brpg.state import PROJECT
from tools import convert_script
from tools.mean_teacher_scripts import (
    AUXILIARY,
    OUTPUT_LAYER,
    REPRESENTATION,
    State,
    convert_networks,
    require_classes,
    require_head,
)

XCEPTION_LAYER = "encoder.block1.sepconv1.depthwise.weight"


def main(argv: Sequence[str]) -> int:
    """Convert what the command line names."""
    return convert_script.main(argv, PROJECT, Config, convert)


def convert(source: Path, cfg: Config, spec: DatasetSpec, config: str) -> convert_script.Converted:
    """State dicts of the networks in the authors' file, and what became of every key; see `convert_networks`."""
    return convert_networks(source, cfg, spec, config, build_student, require_same_network)


def require_same_network(state: State, place: str, cfg: Config, spec: DatasetSpec, config: str) -> None:
    """Refuse weights whose encoder or heads differ from the configuration's, with the one that would fit.

    Raises:
        UserError: another class count, Xception-65 or a representation or auxiliary head on one side only.
    """
    require_classes(state, place, spec, config)
    if OUTPUT_LAYER in state and (XCEPTION_LAYER in state) != (cfg.model.backbone == XCEPTION):
        held = "Xception-65" if XCEPTION_LAYER in state else "a ResNet"
        remedy = XCEPTION if XCEPTION_LAYER in state else "resnet101"
        raise UserError(
            f"{place}: has {held} as encoder, {config} has {cfg.model.backbone}; set model.backbone={remedy}"
        )
    require_head(state, place, REPRESENTATION, cfg.method.mode == "semi", config)
    require_head(state, place, AUXILIARY, cfg.model.aux_weight > 0, config)


if __name__ == "__main__":
    run_main(main)
