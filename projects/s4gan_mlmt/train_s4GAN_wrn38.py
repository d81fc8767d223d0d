r"""Train s4GAN with DeepLabV3+ and Wide-ResNet-38 by the original's command line.

    python train_s4GAN_wrn38.py --dataset cityscapes --labeled-ratio 0.10 --split-id ./splits/city/split_0.pkl \
        --checkpoint-dir ./checkpoints/city_semi_wrn38 --input-size '256,512' --ignore-label 250 --num-classes 19 \
        --learning-rate 1e-3 --learning-rate-D 1e-5 --threshold-st 0.55

The original cannot be started as it is shipped (`wide_script` of the README); its schedule, losses and
data are kept, and all images of the validation list are measured. Otherwise as `train_s4GAN.py`.
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
    return training.main(training.WRN38, argv)


if __name__ == "__main__":
    run_main(main)
