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
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from common.errors import UserError, run_main
from common.mean_teacher.evaluation import protocol
from common.measure.inference import Forward
from projects.proto_consistency.compat import original
from projects.proto_consistency.config import Config, method_name
from projects.proto_consistency.evaluate import further_roles, predictor_of, reported_role
from projects.proto_consistency.model import build_student
from projects.proto_consistency.network import ProtoNetwork
from projects.proto_consistency.state import PROJECT as NAME
from tools import eval_script, mean_teacher_scripts
from tools.eval_script import Saved, ScriptProject


def main(argv: Sequence[str]) -> int:
    """Measure what the command line names; 1 if `--check` finds the figure outside the expected band."""
    return eval_script.main(PROJECT, argv, parser(), original_flags)


def parser() -> argparse.ArgumentParser:
    """The command line, with the flags of the original's `eval.py` as second names."""
    result = mean_teacher_scripts.parser(PROJECT)
    result.add_argument("--machine_name", help="accepted and not used: places are data.root and run.dir here")
    return result


def original_flags(args: argparse.Namespace, cfg: Config) -> list[str]:
    """Overrides for the original's `--base_size` and `--scales`; whole images (Pascal) have no base size."""
    return mean_teacher_scripts.original_flags(args, cfg, ("whole_image", "center_crop"))


def load_network(cfg: Config, saved: Saved, role: str, device: torch.device, where: str) -> ProtoNetwork:
    """One network of a checkpoint in evaluation mode on `device`; of a role such as `teacher_proto` the `teacher`.

    Raises:
        UserError: the checkpoint has no such network, or it is of another architecture.
    """
    if role.endswith("_proto") and cfg.prototypes is None:
        raise UserError(
            f"{where}: '{role}' asks for the prototype head, which this configuration has not; set method.mode=semi "
            "and method.proto, or use --network teacher or student"
        )
    load = mean_teacher_scripts.network_loader(build_student)
    return load(cfg, saved, role.removesuffix("_proto"), device, where)


def predictor(cfg: Config, saved: Saved, role: str, device: torch.device, where: str) -> Forward:
    """Scores at image size by one head of a network of a checkpoint; raises as `load_network`."""
    network = load_network(cfg, saved, role, device, where)
    return predictor_of(network, "proto" if role.endswith("_proto") else "linear")


PROJECT = ScriptProject(
    name=NAME,
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
