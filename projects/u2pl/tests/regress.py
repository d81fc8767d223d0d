"""Twenty steps of a small run, compared with recorded losses: has a change moved a number?

    python -m projects.u2pl.tests.regress [--update] [--device cpu|cuda]

The run goes through the real `train.main` on images of its own: burn-in, the shared epoch, averaging, mixed and
unmixed batches, queues that fill and overflow. A second run is that of the AEL variant, whose labeled list is gone
through several times an epoch and whose contrast begins in the third. `--update` records anew; say why in the
commit; see `tests/regression.py` for what is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common.errors import run_main
from projects.u2pl import train
from tests.regression import FAMILY_TREE, Steps, read, record_or_compare_all, run_losses

__all__ = ["AEL_TREE", "FOLDER", "TREE", "losses", "main", "read"]

FOLDER = Path(__file__).parent / "golden"
TREE: dict[str, dict[str, Any]] = FAMILY_TREE | {
    "method": {
        "sup_only_epochs": 1,
        "current_class_threshold": 0.2,
        "num_queries": 16,
        "num_negatives": 8,
        "low_entropy_threshold": 60.0,
        "queue_size": 12,
        "queue_size_first": 20,
    },
}
AEL_TREE: dict[str, dict[str, Any]] = TREE | {
    "method": TREE["method"]
    | {
        "sup_only_epochs": 0,
        "average_from_start": True,
        "ael": {"start_epoch": 2, "momentum": 0.9, "common_classes": [0], "area_thresh2": 0.03},
    },
    "quirks": {"shared_first_epoch": False},
}
TREES = {"ael_": AEL_TREE, "": TREE}
KEYS = ("loss", "loss_sup", "loss_unsup", "loss_contra", "kept", "negatives", "anchor_classes", "lr")


def losses(tree: dict[str, dict[str, Any]], device: str = "cpu") -> Steps:
    """What the run of a configuration logs at every step."""
    return run_losses(train, tree, KEYS, device)


def main(argv: Sequence[str]) -> int:
    """Compare or record; 1 if a number has moved."""
    runs = {name: partial(losses, tree) for name, tree in TREES.items()}
    return record_or_compare_all(argv, __doc__, FOLDER, "u2pl", runs)


if __name__ == "__main__":
    run_main(main)
