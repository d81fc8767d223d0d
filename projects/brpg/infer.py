"""Predict the evaluation list, that of COCO too, by the original's command line; see `tools/infer_script.py`.

python infer.py --config configs/voc_classic_366_r101.yaml --model_path best.pt --save_folder viewer
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.errors import run_main
from projects.brpg.eval import PROJECT, load_network
from tools import infer_script


def main(argv: Sequence[str]) -> int:
    """Predict and write every photo of `data.val`."""
    return infer_script.main(PROJECT, load_network, argv)


if __name__ == "__main__":
    run_main(main)
