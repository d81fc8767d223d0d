"""Semi-supervised training by the original's command line.

    python train_semi.py --config configs/voc_classic_366_r101.yaml --seed 2 --port 29500

The original's flags are translated into this project's overrides; `train.py` does the rest.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.errors import run_main
from projects.brpg import train
from projects.brpg.config import Config
from tools.mode_scripts import ModeScripts

SCRIPTS = ModeScripts(Config, train.HERE, train.train, train.dry_run)


def main(argv: Sequence[str]) -> int:
    """Train with labeled and unlabeled images."""
    return SCRIPTS.run(argv, "semi")


if __name__ == "__main__":
    run_main(main)
