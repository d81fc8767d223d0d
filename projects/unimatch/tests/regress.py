"""Twenty steps of small runs, compared with recorded losses: has a change moved a number?

    python -m projects.unimatch.tests.regress [--update] [--device cpu|cuda]

The runs go through the real `train.main` on images of their own: V1 with all streams, and V2 on a small transformer.
`--update` records anew; say why in the commit; see `tests/regression.py` for what is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common.errors import run_main
from projects.unimatch import train
from tests.regression import FAMILY_TREE, Steps, read, record_or_compare_all, run_losses

__all__ = ["FOLDER", "TREE", "V2_TREE", "losses", "main", "read"]

FOLDER = Path(__file__).parent / "golden"
SMALL = {"width": 8, "inner_planes": 16, "low_planes": 8, "dilations": [1, 2, 3]}
TREE: dict[str, dict[str, Any]] = FAMILY_TREE | {
    "data": FAMILY_TREE["data"] | {"crop_size": [28, 28]},
    "model": {"backbone": "resnet_tiny"} | SMALL,
    "method": {"threshold": 0.3, "criterion": "ohem", "ohem_min_kept": 500},
}
V2_TREE: dict[str, dict[str, Any]] = TREE | {
    "optim": TREE["optim"] | {"optimizer": "adamw", "lr": 0.002, "weight_decay": 0.01},
    "model": {"backbone": "dinov2_tiny"},
    "method": {"threshold": 0.4, "teacher": True, "fp_share": 0.0, "complementary_dropout": True},
}
TREES = {"": TREE, "v2_": V2_TREE}
KEYS = ("loss", "loss_sup", "loss_strong_1", "loss_strong_2", "loss_fp", "kept", "lr")


def losses(tree: dict[str, dict[str, Any]], device: str = "cpu") -> Steps:
    """What the run of a configuration logs at every step."""
    return run_losses(train, tree, KEYS, device)


def main(argv: Sequence[str]) -> int:
    """Compare or record; 1 if a number has moved."""
    runs = {name: partial(losses, tree) for name, tree in TREES.items()}
    return record_or_compare_all(argv, __doc__, FOLDER, "unimatch", runs)


if __name__ == "__main__":
    run_main(main)
