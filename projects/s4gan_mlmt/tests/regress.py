"""Steps of a small run of every method and of the image-level branch, compared with recorded losses.

    python -m projects.s4gan_mlmt.tests.regress [--update] [--device cpu|cuda]

The recordings are this project's own, not the authors': they say that a change has moved a number, not that it was
right. The runs go through the real `main` on images of their own, over the end of a round and of passes over the
images of every loader. `--update` records anew; say why in the commit; see `tests/regression.py` for what is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common.data.streams import Batches
from common.errors import run_main
from projects.s4gan_mlmt import train
from projects.s4gan_mlmt.compat import train_mlmt
from projects.s4gan_mlmt.data import TrainingStreams
from projects.s4gan_mlmt.mlmt import train as branch
from projects.s4gan_mlmt.mlmt.data import MlmtData
from tests.regression import Steps, arguments, float64, record_or_compare, run_losses, wide_group

FOLDER = Path(__file__).parent / "golden"
METHODS = ("sup_only", "s4gan", "mlmt")
STEPS = 20
TREE: dict[str, dict[str, Any]] = {
    "data": {"pipeline": "house", "crop_size": [32, 32], "workers": 0},
    "optim": {"lr": 0.002, "steps": 2 * STEPS, "epochs": 5, "batch_size": 4, "unlabeled_batch_size": 6},
    "model": {"network": "deeplabv2", "layers": [1, 1, 1, 1], "width": 4, "d_width": 4},
    "method": {"st_threshold": 0.51},
    "mlmt": {"backbone": "resnet_tiny", "size": 40, "labeled_batch": 4, "unlabeled_batch": 6, "workers": 0,
             "epochs": STEPS, "burn_in_epochs": 2, "evaluation_epochs": STEPS},
    "eval": {"every_epochs": 0, "protocol": "whole_image"},
    "run": {"seed": 7, "log_interval": 1, "deterministic": True, "panels": False, "max_steps": STEPS},
}  # fmt: skip
KEYS = (
    "loss", "loss_sup", "loss_fm", "loss_st", "loss_d", "kept", "loss_class", "loss_consistency", "accuracy",
    "accuracy_teacher", "lr",
)  # fmt: skip


def wide_vectors(group: list[Batches]) -> list[Batches]:
    """A group of the image-level branch whose images and label vectors are float64."""
    ((labeled, unlabeled),) = wide_group(group)
    return [(labeled._replace(label=labeled.label.double()), unlabeled)]


def losses(method: str, device: str = "cpu") -> Steps:
    """What the run of a method logs at every step."""
    if method == "mlmt":
        tree = TREE | {"method": {"name": "s4gan_mlmt"}}
        return run_losses(train_mlmt, tree, KEYS, device, float64(branch, MlmtData, "epoch", wide_vectors))
    tree = TREE | {"method": TREE["method"] | {"name": method}}
    return run_losses(train, tree, KEYS, device, float64(train, TrainingStreams, "steps"))


def main(argv: Sequence[str]) -> int:
    """Compare or record; 1 if a number has moved."""
    args = arguments(argv, __doc__)
    codes = [
        record_or_compare(
            args,
            FOLDER / f"losses_{method}_{args.device}.txt",
            f"s4gan_mlmt: {method}",
            partial(losses, method),
        )
        for method in METHODS
    ]
    return max(codes)


if __name__ == "__main__":
    run_main(main)
