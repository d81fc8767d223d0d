"""Measure one checkpoint by the command line of the PaddleSeg port.

    python val.py --config configs/cityscapes_1488_r50_cps_cutmix.yaml --model_path best.pt
    python val.py --config ... --model_path best.pt --is_slide --crop_size 800 800 --stride 532 532

The flags of `eval.py` are understood as well. Without `--is_slide` the protocol of the configuration applies.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.errors import run_main
from projects.cps.compat.val import main

if __name__ == "__main__":
    run_main(main)
