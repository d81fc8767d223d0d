"""Supervised-only training by the original's command line.

python train_sup.py --config configs/voc_classic_366_r101_sup.yaml --seed 2 --port 29500
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.errors import run_main
from projects.brpg.train_semi import SCRIPTS


def main(argv: Sequence[str]) -> int:
    """Train with labeled images alone."""
    return SCRIPTS.run(argv, "sup_only")


if __name__ == "__main__":
    run_main(main)
