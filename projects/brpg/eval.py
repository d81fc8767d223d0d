"""Measure trained weights of BRPG: mIoU by the configured protocol, per class, with pictures if asked.

    python eval.py --run runs/voc_classic_366_r101/seed2              best.pt and last.pt of a run
    python eval.py --config configs/voc_classic_366_r101.yaml         the same: the run of that configuration
    python eval.py --config configs/... --checkpoint FILE             one file, also one that convert.py made

See `tools/eval_script.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.errors import run_main
from projects.brpg.config import Config, method_name
from projects.brpg.model import build_student
from projects.brpg.state import PROJECT as NAME
from tools.mean_teacher_scripts import evaluate, network_loader, script_project

load_network = network_loader(build_student)
PROJECT = script_project(NAME, __file__, Config, load_network, method_name)


def main(argv: Sequence[str]) -> int:
    """Measure what the command line names; 1 if `--check` finds the figure outside the expected band."""
    return evaluate(PROJECT, argv)


if __name__ == "__main__":
    run_main(main)
