"""Turn a checkpoint of the authors into one of this project, with an account of every key.

    python convert.py ckpt_best.pth --config configs/voc_classic_1464_r101.yaml --out voc_1464.pt

The result works with eval.py, predict.py and `run.init`. The configuration must describe the network that the file
holds: `*_sup.yaml` for supervised-only files, `cityscapes_*.yaml` for those with the auxiliary head, among them
`cityscapes_*_ael.yaml` for the files of the AEL branch. Only weights are taken; optimizer, queues, epoch, and the class
confidence and bank of AEL, which belong to one process of a run on that very list, are not.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.data.spec import DatasetSpec
from common.errors import run_main
from projects.u2pl.config import Config
from projects.u2pl.model import build_student
from projects.u2pl.state import PROJECT
from tools import convert_script
from tools.mean_teacher_scripts import (
    AUXILIARY,
    REPRESENTATION,
    State,
    convert_networks,
    require_classes,
    require_head,
)


def main(argv: Sequence[str]) -> int:
    """Convert what the command line names."""
    return convert_script.main(argv, PROJECT, Config, convert)


def convert(source: Path, cfg: Config, spec: DatasetSpec, config: str) -> convert_script.Converted:
    """State dicts of the networks in the authors' file, and what became of every key; see `convert_networks`."""
    return convert_networks(source, cfg, spec, config, build_student, require_same_network)


def require_same_network(state: State, place: str, cfg: Config, spec: DatasetSpec, config: str) -> None:
    """Refuse weights of other classes or heads than the configuration's, with the one that would fit.

    Raises:
        UserError: another class count, a representation or auxiliary head on one side only.
    """
    require_classes(state, place, spec, config)
    require_head(state, place, REPRESENTATION, cfg.method.mode == "semi", config)
    require_head(state, place, AUXILIARY, cfg.model.aux_weight > 0, config)


if __name__ == "__main__":
    run_main(main)
