"""Steps of a small run of every method, compared with recorded losses: has a change moved a number?

    python -m projects.cps.tests.regress [--update] [--device cpu|cuda]

The runs go through the real `train.main` on images of their own, over the end of an epoch; the authors' two processes
share a batch, so that groups and the division of the loss count. `--update` records anew; say why in the commit; see
`tests/regression.py` for what is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common.errors import run_main
from projects.cps import train
from projects.cps.tests.toys import METHODS
from tests.regression import Steps, arguments, record_or_compare, run_losses

FOLDER = Path(__file__).parent / "golden"
STEPS = 12
TREE: dict[str, dict[str, Any]] = {
    "data": {"crop_size": [32, 32], "workers": 0},
    "optim": {"lr": 0.02, "epochs": 4, "batch_size": 4, "paper_processes": 2},
    "model": {
        "backbone": "resnet_tiny",
        "stem": "plain",
        "width": 8,
        "inner_planes": 16,
        "low_planes": 8,
        "dilations": [1, 2, 3],
    },
    "method": {"gct": {"detector_planes": 4, "detector_strides": [2, 2, 1, 1, 1, 1, 1, 1]}},
    "eval": {"every_epochs": 0, "protocol": "whole_image"},
    "run": {"seed": 7, "log_interval": 1, "deterministic": True, "panels": False, "max_steps": STEPS},
}
KEYS = (
    "loss", "loss_sup", "loss_sup_2", "loss_cps", "loss_unsup", "loss_fc", "loss_dc", "loss_d", "agreement",
    "sup_teacher", "both_wrong", "lr",
)  # fmt: skip


def losses(method: str, device: str = "cpu") -> Steps:
    """What the run of a method logs at every step."""
    criterion = "ohem" if method == "cps" else "ce"  # once
    values = TREE["method"] | {"name": method, "criterion": criterion, "ohem_min_kept": 300}
    return run_losses(train, TREE | {"method": values}, KEYS, device)


def main(argv: Sequence[str]) -> int:
    """Compare or record; 1 if a number has moved."""
    args = arguments(argv, __doc__)
    codes = [
        record_or_compare(
            args, FOLDER / f"losses_{method}_{args.device}.txt", f"cps: {method}", partial(losses, method)
        )
        for method in METHODS
    ]
    return max(codes)


if __name__ == "__main__":
    run_main(main)
