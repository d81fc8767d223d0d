"""Turn a checkpoint of the authors into one of this project, with an account of every key.

    python convert.py best.pth --config configs/voc_classic_92_dinov2_base.yaml --out voc_92.pt

The result works with eval.py, predict.py and `run.init`. The configuration must describe the network that the file
holds. Only weights are taken: of V1 the student, of V2 the student and the teacher, whose figures are the published
ones.
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
from projects.unimatch.config import Config
from projects.unimatch.eval import reported_network
from projects.unimatch.model import build_student
from projects.unimatch.state import PROJECT
from tools import convert_script

ENTRIES = {"student": ("model", "state_dict"), "teacher": ("model_ema", "model")}
OUTPUT_LAYERS = ("classifier.weight", "head.scratch.output_conv.2.weight")


def main(argv: Sequence[str]) -> int:
    """Convert what the command line names."""
    return convert_script.main(argv, PROJECT, Config, convert)


def convert(source: Path, cfg: Config, spec: DatasetSpec, config: str) -> convert_script.Converted:
    """State dicts of the networks in the authors' file, and what became of every key.

    A file without a teacher (a supervised-only run of V2) gives its network as both.

    Raises:
        UserError: unreadable or unsafe file, another class count, or any tensor missing or of another shape.
    """
    networks: dict[str, Mapping[str, Tensor]] = {}
    reports: dict[str, LoadReport] = {}
    for role in ("student", "teacher") if reported_network(cfg) == "teacher" else ("student",):
        state, place = read_weights(source, ENTRIES[role])
        for name in OUTPUT_LAYERS:
            if name in state and len(state[name]) != spec.num_classes:
                raise UserError(
                    f"{place}: scores {len(state[name])} classes, dataset '{spec.name}' of {config} has "
                    f"{spec.num_classes}; give a configuration of the dataset it was trained on"
                )
        network = build_student(cfg, spec.num_classes)
        reports[role] = load_state(network, state, source=place)
        networks[role] = network.state_dict()
    return networks, reports


if __name__ == "__main__":
    run_main(main)
