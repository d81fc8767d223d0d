"""Measure trained weights: mIoU by the configured protocol, per class, with pictures of the predictions if asked.

    python eval.py --run runs/voc_classic_366_r101/seed2              best.pt and last.pt of a run
    python eval.py --config configs/voc_classic_366_r101.yaml         the same: the run of that configuration
    python eval.py --config configs/... --checkpoint FILE             one file, also one that convert.py made

`eval.head` says which predictor is measured: `linear`, `proto`, or `both` one after the other. The code is that of
training, so the same weights, list and protocol give the same number to the last digit. Behind torchrun, which takes
`--run` for an option of its own, write `--run-dir`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from common.errors import UserError, run_main
from common.measure.inference import Forward
from common.run.checkpoint import load_weights
from projects.proto_consistency import original
from projects.proto_consistency.config import Config
from projects.proto_consistency.evaluate import (
    further_roles,
    method_name,
    predictor_of,
    protocol,
    reported_role,
)
from projects.proto_consistency.model import build_student
from projects.proto_consistency.network import ProtoNetwork
from tools import eval_script


def main(argv: Sequence[str]) -> int:
    """Measure what the command line names; 1 if `--check` finds the figure outside the expected band."""
    return eval_script.main(PROJECT, argv, parser(), original_flags)


def parser() -> argparse.ArgumentParser:
    """The command line, with the flags of the original's `eval.py` as second names."""
    result = eval_script.parser(PROJECT, {"--checkpoint": ("--model_path",), "--save": ("--save_folder",)})
    result.add_argument("--base_size", type=int, help="long side at scale 1 (as eval.base_size)")
    result.add_argument(
        "--scales", type=float, nargs="+", help="scales whose scores are summed (as eval.scales)"
    )
    result.add_argument("--names_path", help="accepted and not used, as in the original")
    result.add_argument("--crop", action="store_true", help="accepted and not used, as in the original")
    result.add_argument("--machine_name", help="accepted and not used: places are data.root and run.dir here")
    return result


def original_flags(args: argparse.Namespace, cfg: Config) -> list[str]:
    """Overrides for the original's `--base_size` and `--scales`.

    Whole images (Pascal) are taken at these scales and have no base size, as in the original.
    """
    overrides = []
    whole = cfg.eval.protocol in ("whole_image", "center_crop")
    if args.scales is not None:
        overrides.append(f"eval.scales={args.scales}")
        if cfg.eval.protocol == "center_crop":
            overrides.append("eval.protocol=whole_image")
    if args.base_size is not None and not whole:
        overrides.append(f"eval.base_size={args.base_size}")
    return overrides


def load_network(
    cfg: Config, saved: Mapping[str, Any], role: str, device: torch.device, where: str
) -> ProtoNetwork:
    """One network of a checkpoint in evaluation mode on `device`; of a role such as `teacher_proto` the `teacher`.

    Raises:
        UserError: the checkpoint has no such network, or it is of another architecture.
    """
    weights = eval_script.network_of(saved, role.removesuffix("_proto"), where)
    network = build_student(cfg, len(saved["classes"]))
    if role.endswith("_proto") and network.proto_net is None:
        raise UserError(
            f"{where}: '{role}' asks for the prototype head, which this configuration has not; set method.mode=semi "
            "and method.proto, or use --network teacher or student"
        )
    load_weights(network, weights, where)
    layout = torch.channels_last if cfg.run.channels_last else torch.contiguous_format
    return network.to(device, memory_format=layout).eval()  # type: ignore[call-overload]


def predictor(cfg: Config, saved: Mapping[str, Any], role: str, device: torch.device, where: str) -> Forward:
    """Scores at image size by one head of a network of a checkpoint; raises as `load_network`."""
    network = load_network(cfg, saved, role, device, where)
    return predictor_of(network, "proto" if role.endswith("_proto") else "linear")


PROJECT = eval_script.ScriptProject(
    name="proto_consistency",
    folder=Path(__file__).resolve().parent,
    config=Config,
    example="configs/voc_classic_366_r101.yaml",
    networks=("teacher", "student", "teacher_proto", "student_proto"),
    default_network=reported_role,
    predictor=predictor,
    protocol=protocol,
    method=method_name,
    further_networks=further_roles,
    read=original.read_own,
)

if __name__ == "__main__":
    run_main(main)
