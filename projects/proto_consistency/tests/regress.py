"""Twenty steps of small runs, compared with recorded losses: has a change moved a number?

    python -m projects.proto_consistency.tests.regress [--update] [--device cpu|cuda]

The recording is our own: there is no training code of the authors to record. The runs go through the real
`train.main` on images of their own. The first takes random prototypes and has epoch 0, the epoch in which teacher and
student are one, averaging, mixed and unmixed batches. The second clusters its prototypes at the end of the supervised
epoch and takes every second value of the switches. `--update` records anew; say why in the commit; see
`tests/regression.py` for what is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common.errors import run_main
from projects.proto_consistency import train
from tests.regression import FAMILY_TREE, Steps, read, record_or_compare_all, run_losses

__all__ = ["FOLDER", "OTHER_TREE", "TREE", "losses", "main", "read"]

FOLDER = Path(__file__).parent / "golden"
PROTO: dict[str, Any] = {"per_class": 2, "granularity": 8, "source": "random", "start_epoch": 0}
TREE: dict[str, dict[str, Any]] = FAMILY_TREE | {
    "method": {"sup_only_epochs": 1, "confid_thresh": 0.23, "ohem_min_kept": 1000, "proto": PROTO},
}
OTHER_TREE: dict[str, dict[str, Any]] = TREE | {
    "method": TREE["method"]
    | {
        "teacher_copy": "once",
        "average_from_start": True,
        "criterion": "ce",
        "select": "entropy",
        "norm": "u2pl",
        "strong_augmentation": "classmix",
        "proto": {
            "per_class": 3,
            "granularity": 8,
            "source": "warmup_end",
            "select": "none",
            "sync": "gather",
            "update_source": "teacher",
            "teacher_proto": "copy",
            "pixels_per_image": 64,
        },
    },
    "quirks": {"border_never_sampled": False, "one_mask": False, "raw_update": False},
}
TREES = {"": TREE, "other_": OTHER_TREE}
KEYS = (
    "loss", "loss_sup", "loss_unsup", "loss_proto_sup", "loss_proto_unsup", "confident", "lr",
)  # fmt: skip


def losses(tree: dict[str, dict[str, Any]], device: str = "cpu") -> Steps:
    """What the run of a configuration logs at every step."""
    return run_losses(train, tree, KEYS, device)


def main(argv: Sequence[str]) -> int:
    """Compare or record; 1 if a number has moved."""
    runs = {name: partial(losses, tree) for name, tree in TREES.items()}
    return record_or_compare_all(argv, __doc__, FOLDER, "proto_consistency", runs)


if __name__ == "__main__":
    run_main(main)
