"""Twenty steps of a small run, compared with recorded losses: has a change moved a number?

    python -m projects.u2pl.tests.regress [--update] [--device cpu|cuda]

The run goes through the real `train.main` on images of its own: burn-in, the shared epoch, averaging, mixed and
unmixed batches, queues that fill and overflow. A second run is that of the AEL variant, whose labeled list is gone
through several times an epoch and whose contrast begins in the third. `--update` records anew; say why in the
commit; see `tests/regression.py` for what is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import run_main
from projects.u2pl import train
from tests.regression import Steps, arguments, read, record_or_compare, run_losses

__all__ = ["AEL_TREE", "FOLDER", "TREE", "losses", "main", "read"]

FOLDER = Path(__file__).parent / "golden"
STEPS = 20
TREE: dict[str, dict[str, Any]] = {
    "data": {"crop_size": [33, 33], "workers": 0},
    "optim": {"lr": 0.005, "head_lr_factor": 4.0, "epochs": 4, "batch_size": 4},
    "model": {
        "backbone": "resnet_tiny",
        "width": 8,
        "inner_planes": 16,
        "dilations": [1, 2, 3],
        "aux_weight": 0.4,
    },
    "method": {
        "sup_only_epochs": 1,
        "current_class_threshold": 0.2,
        "num_queries": 16,
        "num_negatives": 8,
        "low_entropy_threshold": 60.0,
        "queue_size": 12,
        "queue_size_first": 20,
    },
    "eval": {"every_epochs": 0},
    "run": {"seed": 7, "log_interval": 1, "deterministic": True, "panels": False, "max_steps": STEPS},
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
    args = arguments(argv, __doc__)
    codes = [
        record_or_compare(
            args,
            FOLDER / f"losses_{name}{args.device}.txt",
            "u2pl",
            lambda device, tree=tree: losses(tree, device),
        )
        for name, tree in TREES.items()
    ]
    return max(codes)


if __name__ == "__main__":
    run_main(main)
