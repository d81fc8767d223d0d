"""Small networks, batches and settings for tests of the training step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from common.config import build
from common.data.loaders import Batch
from common.distributed import Dist
from common.numerics.losses import Losses
from common.numerics.optim import build_optimizer
from common.run.progress import Progress
from projects.unimatch import train
from projects.unimatch.augment import Draws
from projects.unimatch.config import Config
from projects.unimatch.deeplab import DeepLabV3Plus
from projects.unimatch.dpt import Dpt, Size
from projects.unimatch.model import Networks, Perturbed, parameter_groups
from projects.unimatch.state import Run

CPU = torch.device("cpu")
TINY_VIT = Size(12, 4, 2, (0, 1, 2, 3), 6, (4, 5, 6, 8))
V1: dict[str, Any] = {}
V2: dict[str, Any] = {"teacher": True, "fp_share": 0.0, "complementary_dropout": True}
VARIANTS = {
    "unimatch": V1,
    "unimatch_v2": V2,
    "fixmatch": {"strong_views": 1, "fp_share": 0.0},
    "fixmatch_v2": {"teacher": True, "strong_views": 1, "fp_share": 0.0},
    "sup_only": {"mode": "sup_only"},
}


class TinyBackbone(nn.Module):
    """Two layers of stride 2 in the place of a ResNet."""

    def __init__(self, planes: Sequence[int] = (6, 32)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, planes[0], 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes[0])
        self.conv2 = nn.Conv2d(planes[0], planes[1], 3, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes[1])

    def forward(self, x: Tensor) -> list[Tensor]:
        c1 = F.relu(self.bn1(self.conv1(x)))
        return [c1, F.relu(self.bn2(self.conv2(c1)))]


def tiny_deeplab(classes: int) -> DeepLabV3Plus:
    return DeepLabV3Plus(
        TinyBackbone(), (6, 32), classes, aspp_planes=4, low_planes=4, fuse_planes=8, dilations=(1, 2, 3)
    )


def tiny_dpt(classes: int) -> Dpt:
    return Dpt(TINY_VIT, classes, table_side=2)


def config(**sections: Mapping[str, Any]) -> Config:
    """A configuration for toy networks; sections add to or replace its values."""
    tree: dict[str, dict[str, Any]] = {
        "data": {"dataset": "shapes", "split": "none", "crop_size": [16, 16]},
        "optim": {"lr": 0.1, "epochs": 2, "batch_size": 2},
    }
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | dict(values)
    return build(Config, tree)


def networks(cfg: Config, student: Any, teacher: Any = None, wrapped: Any = None) -> Networks:
    method = cfg.method
    ohem = (method.ohem_thresh, method.ohem_min_kept) if method.criterion == "ohem" else None
    wrapped = wrapped or Perturbed(student)
    return Networks(student, teacher, wrapped, ohem, cfg.quirks.nan_without_pixels)


def run_of(cfg: Config, nets: Networks, draws: Any = None, length: int = 10) -> Run:
    """A run without loaders, whose epochs have `length` steps."""
    optimizer = build_optimizer(cfg.optim, parameter_groups(nets.student, cfg.optim))
    data: Any = SimpleNamespace(steps_per_epoch=length)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return Run(cfg, Dist(), data, nets, draws or Draws(0, 0, CPU), optimizer, scaler)


def unlabeled(views: Sequence[Tensor], padding: Tensor, boxes: Sequence[Tensor]) -> Batch:
    """What a loader of unlabeled images gives: views (B, 3, H, W), weak first, and maps (B, H, W)."""
    maps = torch.stack([part.bool() for part in (padding, *boxes)], dim=1).to(torch.uint8)
    return Batch(torch.cat(list(views), dim=1), maps, torch.arange(len(maps)))


def labeled(x: Tensor, y: Tensor) -> Batch:
    return Batch(x, y, torch.arange(len(x)))


def batch(seed: int, cfg: Config, classes: int = 3, count: int = 2, side: int = 16) -> tuple[Batch, ...]:
    """Random batches of every loader of a run."""
    generator = torch.Generator().manual_seed(seed)

    def images() -> Tensor:
        return torch.randn(count, 3, side, side, generator=generator)

    def coins(share: float) -> Tensor:
        return torch.rand(count, side, side, generator=generator) < share

    y = torch.randint(0, classes, (count, side, side), generator=generator)
    found = [labeled(images(), y.masked_fill(coins(0.1), 255))]
    if cfg.method.mode == "sup_only":
        return tuple(found)
    for _ in range(1 if cfg.method.teacher else 2):
        views = [images() for _ in range(1 + cfg.method.strong_views)]
        found.append(unlabeled(views, coins(0.1), [coins(0.3) for _ in range(cfg.method.strong_views)]))
    return tuple(found)


class Loop:
    """A session that hands given batches to the real `train_epoch`, and keeps what it is told."""

    def __init__(self, run: Run, batches: Sequence[tuple[Batch, ...]]) -> None:
        self.run, self.batches = run, batches
        self.losses: list[Losses] = []
        self.rates: list[list[float]] = []  # of each step
        self.guard = self

    def steps(self, epoch: int) -> Iterator[tuple[Progress, list[tuple[Batch, ...]]]]:
        for one in self.batches:
            yield Progress(self.run.step, self.run.data.steps_per_epoch, self.run.epochs), [one]

    def protect(self, *networks: Any) -> None:
        del networks

    def watch(self, at: Progress, losses: Losses, group: Any) -> Tensor:
        self.rates.append([group["lr"] for group in self.run.optimizer.param_groups])
        self.losses.append(losses)
        return torch.zeros(())

    def step(self, scaler: Any, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()

    def record(self, *told: Any) -> None:
        self.run.step += 1

    def save_or_stop(self) -> bool:
        return False


def go(run: Run, batches: Sequence[tuple[Batch, ...]]) -> Loop:
    """The steps of a run on given batches."""
    session = Loop(run, batches)
    assert not train.train_epoch(0, run, session)  # type: ignore[arg-type]
    return session


def write_config(path: Path, dataset: Path, split: str, **sections: dict[str, Any]) -> Path:
    """A configuration that trains in a second on the tiny dataset; sections update it."""
    tree: dict[str, dict[str, Any]] = {
        "data": {"dataset": str(dataset), "split": split, "crop_size": [32, 32], "workers": 0},
        "optim": {"lr": 0.01, "epochs": 2, "batch_size": 2},
        "model": {"backbone": "resnet_tiny", "width": 4, "inner_planes": 16, "low_planes": 4, "dilations": [1, 2, 3]},
        "method": {"threshold": 0.3},
        "run": {"panels": False, "log_interval": 1, "device": "cpu"},
    }  # fmt: skip
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | dict(values)
    path.write_text(yaml.safe_dump(tree))
    return path
