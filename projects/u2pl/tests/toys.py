"""Small networks, batches and settings for tests of the training step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from common.config import build
from common.distributed import Dist
from common.numerics.losses import Losses
from common.numerics.optim import Group, build_optimizer
from common.run.progress import Progress
from projects.u2pl import train
from projects.u2pl.augment import Draws
from projects.u2pl.config import Config
from projects.u2pl.memory import Memory
from projects.u2pl.model import Networks, build_criterion
from projects.u2pl.state import Run
from projects.u2pl.tests.golden_adapters import ToyNetwork
from tests.steps import batches, random_batch

__all__ = ["batches"]

CPU = torch.device("cpu")
CLASSES, DIM, SIZE = 5, 6, (16, 16)


def config(**sections: Mapping[str, Any]) -> Config:
    """A configuration for toy networks; sections add to or replace its values."""
    tree: dict[str, dict[str, Any]] = {
        "data": {"dataset": "shapes", "split": "none", "crop_size": [16, 16]},
        "optim": {"lr": 0.1, "epochs": 10, "batch_size": 2},
        "method": {
            "sup_only_epochs": 1,
            "low_rank": 1,
            "current_class_threshold": 0.1,
            "num_queries": 8,
            "num_negatives": 4,
            "queue_size": 40,
            "queue_size_first": 60,
        },
    }
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | dict(values)
    return build(Config, tree)


def toy(seed: int, aux: bool = False, classes: int = CLASSES) -> ToyNetwork:
    torch.manual_seed(seed)
    return ToyNetwork(5, classes, DIM, aux).double()


def networks(cfg: Config, seed: int = 0, classes: int = CLASSES) -> Networks:
    """Student and teacher in float64, both random."""
    aux = cfg.model.aux_weight > 0
    student, teacher = toy(seed, aux, classes), toy(seed + 1, aux, classes).requires_grad_(False)
    own = cfg.quirks.own_teacher_statistics
    return Networks(student, teacher, student, build_criterion(cfg), teacher_burn_in=own)


def memory(cfg: Config, classes: int = CLASSES) -> Memory:
    return Memory(cfg, classes, DIM).double()


def batch(
    seed: int, labeled: int = 2, unlabeled: int = 2, classes: int = CLASSES
) -> tuple[Tensor, Tensor, Tensor]:
    """Labeled images, their labels, unlabeled images; some labels are ignored."""
    return random_batch(seed, SIZE, classes, labeled, unlabeled)


def run_of(
    cfg: Config, nets: Networks, memory: Memory | None, draws: Any = None, dist: Dist | None = None
) -> Run:
    """A run without loaders."""
    parts = [
        part for part in (nets.student.encoder, nets.student.auxor, nets.student.decoder) if part is not None
    ]
    optimizer = build_optimizer(cfg.optim, [Group(part.parameters()) for part in parts])
    data: Any = None
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return Run(cfg, dist or Dist(), data, nets, draws or Draws(0, 0, CPU), optimizer, scaler, memory)


def at(cfg: Config, epoch: int, step: int = 0, length: int = 10) -> Progress:
    """The place of a step of an epoch."""
    return Progress(epoch * length + step, length, cfg.optim.epochs)


class Loop:
    """A loop over toy steps with everything that `train_epoch` does to the networks."""

    def __init__(
        self, cfg: Config, seed: int = 0, steps_per_epoch: int = 3, absent: int | None = None
    ) -> None:
        self.cfg, self.length, self.absent = cfg, steps_per_epoch, absent
        self.nets, self.memory = networks(cfg, seed), memory(cfg)
        self.draws = Draws(seed, 0, CPU)
        self.run = run_of(cfg, self.nets, self.memory, self.draws)
        self.optimizer = self.run.optimizer
        self.step = 0

    def advance(self) -> Losses:
        place = Progress(self.step, self.length, self.cfg.optim.epochs)
        x_l, y_l, x_u = batch(self.step)
        if self.absent is not None:  # an ignored pixel may count as class 0
            y_l[(y_l == self.absent) | (y_l == 255)] = CLASSES - 1
        self.nets.student.train()
        train.before_step(place, self.run)
        self.before = {key: value.clone() for key, value in self.nets.teacher.state_dict().items()}
        self.optimizer.zero_grad()
        result = train.train_step(batches(x_l, y_l, x_u), place, self.run)
        result.total.backward()
        self.optimizer.step()
        train.after_step(place, self.run)
        self.step += 1
        return result
