r"""Predict photos: a palette mask and an overlay for each file of a folder.

    python predict.py --run runs/voc_1323_r50_cps/seed2 --input photos --out masks
    python predict.py --checkpoint best.pt --network mean --input photo.jpg --out masks

Classes, colours and normalization come from the checkpoint; no dataset is needed. `photos/a/b.jpg` becomes
`masks/a/b.png` (class ids with a palette) and `masks/a/b_overlay.jpg`: see `tools/predict_script.py`.

    python predict.py --config configs/cityscapes_1488_r50_cps_cutmix.yaml --model_path best.pt \
        --image_path photos --save_dir result --is_slide --crop_size 800 800 --stride 532 532

The names of the PaddleSeg port write what it writes: `result/added_prediction/a/b.jpg`, 0.6 of the photo and 0.4 of
the colours, and `result/pseudo_color_prediction/a/b.png`, class ids with its palette. The configuration then counts,
not the one that the checkpoint carries; without `--is_slide` its protocol applies.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.errors import run_main
from projects.cps.compat.predict import main
from projects.cps.eval import PROJECT

__all__ = ["PROJECT", "main"]

if __name__ == "__main__":
    run_main(main)
