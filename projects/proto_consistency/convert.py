"""Turn a checkpoint of the authors into one of this project, with an account of every key.

    python convert.py best.ckpt --config configs/voc_classic_1464_r101.yaml --out voc_1464.pt

Read are the released MindSpore files (`.ckpt`, the container itself, without MindSpore), the same exported to `.npz`,
and PyTorch files with U2PL's names. An export is made where MindSpore is installed by

    numpy.savez("best.npz", **{k: v.asnumpy() for k, v in mindspore.load_checkpoint("best.ckpt").items()})

The result works with eval.py, predict.py, `run.init` and, for its prototypes, `method.proto.init_path`. The released
files hold one network, the teacher by what their evaluation code says; it becomes student and teacher. The
configuration must describe it: `cityscapes_*.yaml` has the auxiliary head and 3 prototypes per class. MindSpore's
names gamma, beta, moving_mean and moving_variance become weight, bias, running_mean and running_var; nothing is
transposed. The first convolution of the auxiliary head has no bias there and gets zeros.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from common.data.spec import DatasetSpec
from common.errors import UserError, run_main
from common.models.pretrained import bare_keys, read_weights
from projects.proto_consistency.compat.mindspore_file import is_mindspore, read_mindspore
from projects.proto_consistency.config import Config
from projects.proto_consistency.initial import read_npz
from projects.proto_consistency.model import build_student
from projects.proto_consistency.state import PROJECT, PROTOTYPES
from tools import convert_script
from tools.mean_teacher_scripts import (
    AUXILIARY,
    OUTPUT_LAYER,
    State,
    convert_networks,
    require_classes,
    require_head,
)

AUX_BIAS = "auxor.aux.0.bias"  # a layer that MindSpore builds without bias
BATCH_NORM = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def main(argv: Sequence[str]) -> int:
    """Convert what the command line names."""
    return convert_script.main(argv, PROJECT, Config, convert)


def our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under PyTorch's names: `module.` removed, MindSpore's four names of BatchNorm replaced.

    Raises:
        UserError: two tensors would get the same name.
    """
    named: dict[str, Tensor] = {}
    for key, value in bare_keys(state).items():
        layer, dot, last = key.rpartition(".")
        name = f"{layer}{dot}{BATCH_NORM.get(last, last)}"
        if name in named:
            raise UserError(
                f"weights: two tensors are named '{name}' after renaming '{key}'; keep one of them"
            )
        named[name] = value
    return named


def read_source(path: Path, entries: Sequence[str]) -> tuple[dict[str, Tensor], str]:
    """The named tensors of a file of any of the kinds above with PyTorch's names, and the part they come from.

    Raises:
        UserError: the file is absent, damaged, unsafe, or holds no network.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    if is_mindspore(path):
        return our_names(read_mindspore(path)), str(path)
    if path.suffix == ".npz":
        arrays = read_npz(path)
        if OUTPUT_LAYER not in our_names({key: torch.empty(0) for key in arrays}):
            raise UserError(
                f"{path}: holds {', '.join(list(arrays)[:4])}, no network; export the whole checkpoint"
            )
        return our_names({key: torch.from_numpy(value) for key, value in arrays.items()}), str(path)
    state, place = read_weights(path, entries)
    return our_names(state), place


def convert(source: Path, cfg: Config, spec: DatasetSpec, config: str) -> convert_script.Converted:
    """State dicts of the networks in the authors' file with our keys, and what became of every key.

    A file of one network gives it to student and teacher.

    Raises:
        UserError: see `convert_networks`.
    """
    networks, reports = convert_networks(
        source, cfg, spec, config, build_student, require_same_network, read_source, (AUX_BIAS,)
    )
    for role, report in reports.items():
        if AUX_BIAS in report.missing:
            networks[role][AUX_BIAS].zero_()
    return networks, reports


def require_same_network(state: State, place: str, cfg: Config, spec: DatasetSpec, config: str) -> None:
    """Refuse weights whose heads differ from the configuration's, with the configuration that would fit.

    Raises:
        UserError: another class count or number of prototypes, a prototype or auxiliary head on one side only.
    """
    require_classes(state, place, spec, config)
    if OUTPUT_LAYER not in state:
        return  # no network of this kind; `load_state` says what it is
    classes, proto, prototypes = spec.num_classes, cfg.prototypes, state.get(PROTOTYPES)
    if prototypes is not None and proto is None:
        raise UserError(
            f"{place}: has prototypes, {config} has not; set method.mode=semi and method.proto={{}}"
        )
    if prototypes is None and proto is not None:
        raise UserError(f"{place}: lacks the prototypes that {config} has; set method.proto=null")
    if prototypes is not None and proto is not None and len(prototypes) != classes * proto.per_class:
        raise UserError(
            f"{place}: has {len(prototypes)} prototypes of {classes} classes, {config} has {proto.per_class} per "
            f"class; set method.proto.per_class={len(prototypes) / classes:g}"
        )
    require_head(state, place, AUXILIARY, cfg.model.aux_weight > 0, config)


if __name__ == "__main__":
    run_main(main)
