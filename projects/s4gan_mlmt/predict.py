"""Predict photos: a palette mask and an overlay for each file of a folder.

    python predict.py --run runs/voc_1322_r101/seed2 --input photos --out masks
    python predict.py --checkpoint best.pt --input photo.jpg --out masks eval.protocol=whole_image

Classes, colours and normalization come from the checkpoint; no dataset is needed. `photos/a/b.jpg` becomes
`masks/a/b.png` (class ids with a palette) and `masks/a/b_overlay.jpg`: see `tools/predict_script.py`. It is the
segmentation network that predicts; the image-level branch takes part in figures alone, through the scores of a list.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.errors import run_main
from projects.s4gan_mlmt import eval as evaluation
from projects.s4gan_mlmt.model import SEGMENTATION
from tools import predict_script

PROJECT = dataclasses.replace(
    evaluation.PROJECT,
    networks=(SEGMENTATION,),
    default_network=evaluation.segmentation_network,
)


def main(argv: Sequence[str]) -> int:
    """Predict what the command line names; 1 if any photo was skipped."""
    return predict_script.main(PROJECT, argv)


if __name__ == "__main__":
    run_main(main)
