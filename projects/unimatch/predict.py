"""Predict photos with UniMatch: a palette mask and an overlay for each; see `tools/predict_script.py`.

python predict.py --run runs/voc_classic_92_r101/seed2 --input photos --out masks
python predict.py --checkpoint best.pt --input photo.jpg --out masks eval.protocol=multi_scale_flip
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.errors import run_main
from projects.unimatch.eval import PROJECT
from tools import predict_script


def main(argv: Sequence[str]) -> int:
    """Predict what the command line names; 1 if any photo was skipped."""
    return predict_script.main(PROJECT, argv)


if __name__ == "__main__":
    run_main(main)
