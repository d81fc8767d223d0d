"""Turn a checkpoint of the authors into one of this project, with an account of every key.

    python convert.py epoch-last.pth --config configs/voc_1323_r50_cps.yaml --out voc_1323.pt

The result works with eval.py, val.py, predict.py and `run.init`. The configuration must describe the networks that
the file holds: `*_sup.yaml` for one network (or `--branch branch1`), `*_cct.yaml`, `*_gct.yaml` and
`*_mean_teacher.yaml` for those baselines. Of CCT the main decoder is taken and the auxiliary ones are not, of GCT the
two task networks and not the flaw detector. Only weights are taken; optimizers, epoch and iteration are not. Weights
of the PaddleSeg port belong to another head and are refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from torch import Tensor

from common.data.spec import DatasetSpec
from common.errors import UserError, run_main
from common.models.pretrained import LoadReport, load_state, read_weights
from projects.cps.compat.flags import read_own, refuse_port_weights
from projects.cps.config import Config
from projects.cps.evaluate import network_names
from projects.cps.model import BRANCHES, build_branch
from projects.cps.state import PROJECT
from tools import convert_script

PAIRS = (("branch1.", "branch2."), ("l_model.", "r_model."))  # CPS and the mean teacher; GCT
CCT_DECODER = "main_decoder."


@dataclass(frozen=True)
class Parts:
    """The networks of a file of the authors.

    Attributes:
        networks: tensors by this project's names, for each branch.
        unused: names in the file that belong to no branch.
    """

    networks: Mapping[str, Mapping[str, Tensor]]
    unused: tuple[str, ...]


def main(argv: Sequence[str]) -> int:
    """Convert what the command line names."""
    args = parser().parse_intermixed_args(argv)
    refuse_port_weights(args.source)
    cfg, spec = convert_script.read_arguments(args, Config, args.source, read=read_own)
    roles = [name for name in network_names(cfg) if name in BRANCHES]
    roles = roles if args.branch == "both" else [args.branch]
    networks, reports, unused = convert(args.source, cfg, spec, str(args.config), roles)
    convert_script.write_checkpoint(args, PROJECT, cfg, spec, networks, reports, unused)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = convert_script.parser()
    words = "networks to take; both: those that the configuration's method has"
    result.add_argument("--branch", choices=("both", "branch1"), default="both", help=words)
    return result


def convert(
    source: Path, cfg: Config, spec: DatasetSpec, config: str, roles: Sequence[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, LoadReport], tuple[str, ...]]:
    """State dicts of the networks in the authors' file, what became of their keys, and all other keys.

    Args:
        source: The file; read as data, without executing code.
        cfg: Describes the network.
        spec: The dataset, for the class count.
        config: Name of the configuration, for messages.
        roles: The branches to take.

    Raises:
        UserError: unreadable or unsafe file, weights of the port, a branch that the file lacks, another class count,
            or any tensor missing or of another shape.
    """
    state, place = read_weights(source, ("model", "state_dict"))
    parts = split_parts(state, place)
    networks: dict[str, dict[str, Tensor]] = {}
    reports: dict[str, LoadReport] = {}
    for role in roles:
        if role not in parts.networks:
            raise UserError(
                f"{place}: holds one network, {config} trains two; give --branch branch1 or a configuration *_sup.yaml"
            )
        weights = parts.networks[role]
        require_classes(weights, place, spec, config)
        network = build_branch(cfg, spec.num_classes)
        reports[role] = load_state(network, weights, source=f"{place}.{role}")
        networks[role] = network.state_dict()
    others = {role: keys for role, keys in parts.networks.items() if role not in roles}
    unused = [f"{role}.{key}" for role, keys in others.items() for key in keys]
    return networks, reports, (*unused, *parts.unused)


def split_parts(state: Mapping[str, Tensor], place: str) -> Parts:
    """Which tensors of a file belong to which branch.

    A file of CCT has one network whose classifier is the main decoder; one without prefixes is a network alone.

    Raises:
        UserError: the tensors are those of the port.
    """
    if any(key.startswith("backbone1.") or ".head.decoder." in key for key in state):
        raise UserError(
            f"{place}: weights of the PaddleSeg port, whose head has other layers; not convertible"
        )
    for prefixes in PAIRS:
        networks = {
            role: {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            for role, prefix in zip(BRANCHES, prefixes, strict=True)
        }
        networks = {role: found for role, found in networks.items() if found}
        if networks:
            return Parts(networks, tuple(key for key in state if not key.startswith(prefixes)))
    if any(key.startswith(CCT_DECODER) for key in state):
        network = {key: value for key, value in state.items() if key.startswith(("backbone.", "head."))}
        rest = [key for key in state if key not in network]
        decoder = [
            key for key in rest if key.startswith(CCT_DECODER)
        ]  # a single convolution, however it is nested
        network |= {f"classifier.{key.rpartition('.')[2]}": state[key] for key in decoder}
        return Parts({"branch1": network}, tuple(key for key in rest if key not in decoder))
    return Parts({"branch1": state}, ())


def require_classes(weights: Mapping[str, Tensor], place: str, spec: DatasetSpec, config: str) -> None:
    """Refuse weights of another class count; `UserError`."""
    classifier = weights.get("classifier.weight")
    if classifier is not None and len(classifier) != spec.num_classes:
        raise UserError(
            f"{place}: scores {len(classifier)} classes, dataset '{spec.name}' of {config} has {spec.num_classes}; "
            "give a configuration of the dataset it was trained on"
        )


if __name__ == "__main__":
    run_main(main)
