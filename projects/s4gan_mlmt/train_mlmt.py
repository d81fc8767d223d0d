"""Train the image-level branch (MLMT) by itself, with the original's flags.

    python train_mlmt.py --data-dir DIR --pkl-file checkpoints/voc_semi_0_125/train_voc_split.pkl --exp-name NAME
    python train_mlmt.py --config configs/shapes_mlmt.yaml run.dir=runs/branch

Scores come to `mlmt_output/NAME/output_ema_raw_{epochs}.txt`, one line per validation image, and the state of the run
beside them, so that the same command goes on where it was stopped. Ids come from the dataset's lists or, where those
are missing, from `train_img.txt` and `val_img.txt` in DIR; images from `JPEGImages`; label vectors from
`train_label.txt` and `val_label.txt` in DIR if they are there, else from the masks.

With `--config` the file's values hold where no flag is given; `section.key=value` overrides everything.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.errors import run_main
from projects.s4gan_mlmt.compat.train_mlmt import main

if __name__ == "__main__":
    run_main(main)
