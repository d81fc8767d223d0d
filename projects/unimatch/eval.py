"""Measure trained weights of UniMatch: mIoU by the configured protocol, per class, with pictures if asked.

    python eval.py --run runs/voc_classic_92_r101/seed2               best.pt and last.pt of a run
    python eval.py --config configs/voc_classic_92_r101.yaml          the same: the run of that configuration
    python eval.py --config configs/... --checkpoint FILE             one file, also one that convert.py made

See `tools/eval_script.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import dataclasses

from common.errors import run_main
from projects.unimatch.config import Config, method_name
from projects.unimatch.evaluate import protocol
from projects.unimatch.model import build_student
from projects.unimatch.state import PROJECT as NAME
from tools import eval_script
from tools.mean_teacher_scripts import network_loader, script_project


def reported_network(cfg: Config) -> str:
    """The network whose figures count: the teacher of V2, or the student."""
    return "teacher" if cfg.method.mode == "semi" and cfg.method.teacher else "student"


build: Any = build_student  # of networks with the same methods, not of the same class
PROJECT = dataclasses.replace(
    script_project(NAME, __file__, Config, network_loader(build), method_name),
    example="configs/voc_classic_92_r101.yaml",
    default_network=reported_network,
    protocol=protocol,
)


def main(argv: Sequence[str]) -> int:
    """Measure what the command line names; 1 if `--check` finds the figure outside the expected band."""
    return eval_script.main(PROJECT, argv)


if __name__ == "__main__":
    run_main(main)
