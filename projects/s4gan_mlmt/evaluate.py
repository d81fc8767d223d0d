r"""Measure the segmentation network of a run; the same code while training, in `eval.py` and as the original's command.

    python evaluate.py --dataset pascal_voc --num-classes 21 --restore-from ./checkpoints/voc_semi_0_125/VOC_30000.pth \
        [--with-mlmt --mlmt-file ./mlmt_output/voc_semi_0_125_MLMT/output_ema_raw_100.txt] \
        [--save-dir results] [--save-output-images]

`--restore-from` takes files of the original, with and without the prefix of data parallelism, and every checkpoint of
this project. Beside a `config.yaml`, as `train_s4GAN.py` writes it, the file is of that configuration's network. The
protocol is the authors'; `eval.py` has the others. `section.key=value` changes anything else.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.errors import run_main
from projects.s4gan_mlmt.compat.evaluate import main

if __name__ == "__main__":
    run_main(main)
