"""Small networks, batches and settings for tests of the training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from common.config import build
from common.distributed import Dist
from common.models.deeplab import AuxHead
from common.numerics.losses import Losses
from common.numerics.optim import Group, build_optimizer
from common.run.progress import Progress
from projects.proto_consistency import train
from projects.proto_consistency.augment import Draws
from projects.proto_consistency.config import Config, ProtoConfig
from projects.proto_consistency.head import PrototypeHead
from projects.proto_consistency.model import Networks, build_criterion
from projects.proto_consistency.network import ProtoNetwork
from projects.proto_consistency.prototypes import Movement
from projects.proto_consistency.state import Run
from tests.steps import batches, random_batch

__all__ = ["batches"]

CPU = torch.device("cpu")
CLASSES, DIM, SIZE = 5, 6, torch.Size((17, 17))
GOOD = torch.zeros(())  # the step was not cancelled


def config(**sections: Mapping[str, Any]) -> Config:
    """A configuration for toy networks; sections add to or replace its values, `proto` those of `method.proto`."""
    tree: dict[str, dict[str, Any]] = {
        "data": {"dataset": "shapes", "split": "none", "crop_size": list(SIZE)},
        "optim": {"lr": 0.1, "epochs": 10, "batch_size": 2},
        "method": {"sup_only_epochs": 1, "confid_thresh": 0.5},
    }
    proto: dict[str, Any] = {"per_class": 3, "granularity": 8, "source": "file", "momentum": 0.9}
    proto |= dict(sections.pop("proto", {}))
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | dict(values)
    if tree["method"].get("proto", proto) is not None:
        tree["method"]["proto"] = proto
    return build(Config, tree)


class ToyEncoder(nn.Module):
    """Four stages that are one: (B, 3, H, W) -> (B, DIM, ceil(H / 2), ceil(W / 2))."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Sequential(nn.Conv2d(3, DIM, 3, stride=2, padding=1), nn.BatchNorm2d(DIM), nn.ReLU())

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.stage(x)] * 4


class ToyDecoder(nn.Module):
    """Features that are a convolution of the stage, and a linear classifier of them."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.feature, self.classifier = nn.Conv2d(DIM, DIM, 3, padding=1), nn.Conv2d(DIM, classes, 1)
        self.classifier.weight.data.mul_(6.0)  # so that some pixels are sure and others are not

    def forward(self, features: Sequence[Tensor], with_feats: bool = True) -> tuple[Tensor, Tensor | None]:
        feats = self.feature(features[-1])
        return self.classifier(feats), feats if with_feats else None


def toy(seed: int, cfg: Config, classes: int = CLASSES) -> ProtoNetwork:
    torch.manual_seed(seed)
    encoder, decoder = ToyEncoder(), ToyDecoder(classes)  # first, so that they do not depend on the rest
    aux = AuxHead(DIM, classes, inner_planes=4, dropout=0.0) if cfg.model.aux_weight > 0 else None
    proto = cfg.prototypes
    head = None if proto is None else PrototypeHead(classes, proto.per_class, DIM, proto.temperature)
    return ProtoNetwork(encoder, decoder, aux, head).double()  # type: ignore[arg-type]


def networks(cfg: Config, seed: int = 0, classes: int = CLASSES) -> Networks:
    """Student and teacher in float64, both random but for the prototypes, which they share."""
    student, teacher = toy(seed, cfg, classes), toy(seed + 1, cfg, classes).requires_grad_(False)
    if student.proto_net is not None:
        teacher.require_prototypes().set(student.proto_net.proto_list)
    own = cfg.quirks.own_teacher_statistics
    return Networks(student, teacher, student, build_criterion(cfg), teacher_burn_in=own)


def batch(
    seed: int, labeled: int = 2, unlabeled: int = 2, classes: int = CLASSES
) -> tuple[Tensor, Tensor, Tensor]:
    """Labeled images, their labels, unlabeled images; some labels are ignored."""
    return random_batch(seed, SIZE, classes, labeled, unlabeled)


def run_of(cfg: Config, nets: Networks | None = None, draws: Any = None) -> Run:
    """A run without loaders."""
    nets = nets or networks(cfg)
    optimizer = build_optimizer(
        cfg.optim, [Group(part.parameters()) for part in (nets.student.encoder, nets.student.decoder)]
    )
    movement = None
    if cfg.prototypes is not None:
        movement = Movement(nets.student.require_prototypes(), cfg.prototypes)
    data: Any = None
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return Run(cfg, Dist(), data, nets, draws or Draws(0, 0, CPU), optimizer, scaler, movement)


def at(cfg: Config, epoch: int, step: int = 0, length: int = 10) -> Progress:
    """The place of a step of an epoch."""
    return Progress(epoch * length + step, length, cfg.optim.epochs)


def moved(
    old: Tensor,
    feats: Tensor,
    match: Tensor,
    target: Tensor,
    cond: Tensor,
    momentum: float,
    dist: Dist | None = None,
) -> Tensor:
    """Prototypes (K * P, D) after one step; of the features of all processes if there is a `dist`."""
    classes = match.shape[1]
    sync: Any = "local" if dist is None else "gather"
    proto = ProtoConfig(per_class=len(old) // classes, momentum=momentum, sync=sync)
    head = PrototypeHead(classes, proto.per_class, old.shape[1]).to(old.dtype)
    head.set(old)
    movement = Movement(head, proto)
    movement.add(feats, match, target, cond)
    movement.apply(dist or Dist(), GOOD)
    return head.proto_list.data


class Loop:
    """A loop over toy steps with everything that `train_epoch` does to the networks.

    Attributes:
        before: state of the teacher as it entered the last step.
        old: the student's prototypes as they entered it.
    """

    def __init__(self, cfg: Config, seed: int = 0, steps_per_epoch: int = 3) -> None:
        self.cfg, self.length = cfg, steps_per_epoch
        self.nets = networks(cfg, seed)
        self.draws = Draws(seed, 0, CPU)
        self.run = run_of(cfg, self.nets, self.draws)
        self.optimizer = self.run.optimizer
        self.step = 0

    def advance(self) -> Losses:
        place = Progress(self.step, self.length, self.cfg.optim.epochs)
        self.nets.student.train()
        train.before_step(place, self.run)
        teacher, head = self.nets.require_teacher(), self.nets.student.proto_net
        self.before = {key: value.clone() for key, value in teacher.state_dict().items()}
        self.old = None if head is None else head.proto_list.detach().clone()
        self.optimizer.zero_grad()
        result = train.train_step(batches(*batch(self.step)), place, self.run)
        result.total.backward()
        self.optimizer.step()
        train.after_step(place, self.run, GOOD)
        self.step += 1
        return result


def write_config(path: Path, dataset: Path, split: str = "few", **sections: Mapping[str, Any]) -> Path:
    """A configuration that trains in a second on the tiny dataset; sections update it, `proto` that of the method."""
    proto: dict[str, Any] = {"per_class": 2, "granularity": 8, "source": "warmup_end", "pixels_per_image": 32}
    tree: dict[str, Any] = {
        "data": {"dataset": str(dataset), "split": split, "crop_size": [32, 32], "workers": 0},
        "optim": {"lr": 0.01, "epochs": 3, "batch_size": 2},
        "model": {"backbone": "resnet_tiny", "stem": "plain", "inner_planes": 16, "dilations": [1, 2, 3],
                  "output_stride": 16, "multi_grid": [1, 1, 1]},
        "method": {"confid_thresh": 0.4, "proto": proto | dict(sections.pop("proto", {}))},
        "eval": {"during_training": "whole_image"},
        "run": {"log_interval": 1, "panels": False},
    }  # fmt: skip
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | dict(values)
    path.write_text(yaml.safe_dump(tree))
    return path
