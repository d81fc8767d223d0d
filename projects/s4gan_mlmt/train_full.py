"""Train the supervised baseline by the original's command line.

    python train_full.py --dataset pascal_voc --checkpoint-dir ./checkpoints/voc_full --num-classes 21
    python train_full.py --dataset pascal_voc --labeled-ratio 0.125 --checkpoint-dir ./checkpoints/voc_sup_0_125

The folder is a run directory: the same command continues a stopped run. Weights come as `VOC_{t}.pth` too, and with a
ratio the permutation as `split.pkl`. `section.key=value` changes anything else, see `config.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.errors import run_main
from projects.s4gan_mlmt.compat import training


def main(argv: Sequence[str]) -> int:
    """Read the command line of the original and train."""
    return training.main(training.FULL, argv)


if __name__ == "__main__":
    run_main(main)
