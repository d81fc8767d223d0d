"""Small settings for tests that go through the real loaders and the real training script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from common.config import build
from projects.brpg.config import Config


def tree(dataset: Path | str, split: str = "few", **sections: dict[str, Any]) -> dict[str, Any]:
    """Sections of a run of 4 epochs: supervised, mean teacher, collection, prototypes; `sections` update them."""
    base: dict[str, Any] = {
        "data": {"dataset": str(dataset), "split": split, "crop_size": [32, 32], "workers": 0},
        "optim": {"lr": 0.01, "epochs": 4, "batch_size": 2},
        "model": {"backbone": "resnet_tiny", "stem": "plain", "inner_planes": 16, "dilations": [1, 2, 3],
                  "output_stride": 16, "multi_grid": [1, 1, 1]},
        "method": {"collect_start": 2, "high_threshold": 0.4, "pseudo_threshold": 0.4, "pseudo_threshold_end": 0.5,
                   "queue_size": 60, "unsup_points": 40, "grid_steps": 4, "scarce_classes": "fewer"},
        "eval": {"during_training": "whole_image"},
        "run": {"log_interval": 1, "panels": False, "device": "cpu"},
    }  # fmt: skip
    return base | {name: base.get(name, {}) | values for name, values in sections.items()}


def config(dataset: Path | str, split: str = "few", **sections: dict[str, Any]) -> Config:
    """The same as a configuration."""
    return build(Config, tree(dataset, split, **sections))


def write_config(path: Path, dataset: Path | str, split: str = "few", **sections: dict[str, Any]) -> Path:
    """The same as a file."""
    path.write_text(yaml.safe_dump(tree(dataset, split, **sections)))
    return path
