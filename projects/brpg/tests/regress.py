"""Twenty steps of a small run, compared with recorded losses: has a change moved a number?

    python -m projects.brpg.tests.regress [--update] [--device cpu|cuda]

The run goes through the real `train.main` on images of its own: burn-in, the mean teacher with mixed and unmixed
batches, queues that fill and overflow, clustering, prototypes. `--update` records anew; say why in the commit; see
`tests/regression.py` for what is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import run_main
from projects.brpg import train
from tests.regression import CLASSES, FAMILY_TREE, Steps, read, record_or_compare_all, run_losses

__all__ = ["CLASSES", "FOLDER", "TREE", "losses", "main", "read"]

FOLDER = Path(__file__).parent / "golden"
TREE: dict[str, dict[str, Any]] = FAMILY_TREE | {
    "method": {
        "sup_only_epochs": 1,
        "collect_start": 1,
        "high_threshold": 0.4,
        "pseudo_threshold": 0.35,
        "pseudo_threshold_end": 0.45,
        "ohem_min_kept": 2000,
        "queue_size": 30,
        "sample_per_image": 40,
        "scarce_classes": "fewer",
        "grid_steps": 8,
        "unsup_points": 50,
    },
}
KEYS = ("loss", "loss_sup", "loss_unsup", "loss_proto", "kept", "collected_high", "collected_low", "lr")


def losses(device: str = "cpu") -> Steps:
    """What the run logs at every step."""
    return run_losses(train, TREE, KEYS, device)


def main(argv: Sequence[str]) -> int:
    """Compare or record; 1 if a number has moved."""
    return record_or_compare_all(argv, __doc__, FOLDER, "brpg", {"": losses})


if __name__ == "__main__":
    run_main(main)
