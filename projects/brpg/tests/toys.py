"""Small settings for tests that go through the real loaders and the real training script."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from torch import Tensor

from common.config import build
from common.data.loaders import Batch
from common.distributed import Dist
from common.numerics.optim import Group, build_optimizer
from common.run.progress import Progress
from projects.brpg.augment import Draws
from projects.brpg.config import Config
from projects.brpg.model import Networks
from projects.brpg.settings import MethodConfig, QuirkConfig
from projects.brpg.state import MethodState, Run


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


# --- steps without loaders ---------------------------------------------------------------------------------------


def settings(
    method: MethodConfig, quirks: QuirkConfig | None = None, epochs: int = 8, **optim: Any
) -> Config:
    """A configuration with these numbers of the method."""
    base = config("shapes", "none", optim={"lr": 0.02, "epochs": epochs, "batch_size": 2} | optim)
    return dataclasses.replace(base, method=method, quirks=quirks or QuirkConfig())


def batches(x_l: Tensor, y_l: Tensor, weak: Tensor, strong: Tensor) -> tuple[Batch, ...]:
    """What the loaders would give."""
    views = torch.cat((weak, strong), dim=1)
    index = torch.arange(len(x_l))
    return Batch(x_l, y_l, index), Batch(views, y_l, index)


def run_of(
    cfg: Config, nets: Networks, state: MethodState | None, names: Sequence[str] = ("a", "b", "c"),
    draws: Any = None, optimizer: torch.optim.Optimizer | None = None, dist: Dist | None = None,
) -> Run:  # fmt: skip
    """A run without loaders."""
    data: Any = SimpleNamespace(spec=SimpleNamespace(classes=list(names)))
    draws = draws or Draws(0, 0, torch.device("cpu"))
    optimizer = optimizer or build_optimizer(cfg.optim, [Group(nets.student.parameters())])
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return Run(cfg, dist or Dist(), data, nets, draws, optimizer, scaler, state)


def at(epoch: int, step: int = 0, length: int = 2, epochs: int = 8) -> Progress:
    """The place of a step of an epoch."""
    return Progress(epoch * length + step, length, epochs)
