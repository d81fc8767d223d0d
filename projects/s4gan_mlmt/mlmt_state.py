"""The two classifiers of the image-level branch, and everything it must keep to go on exactly where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.config import OptimConfig
from common.data.spec import DatasetSpec
from common.distributed import Dist, gather_objects
from common.errors import UserError
from common.numerics.optim import Group, build_optimizer
from common.numerics.precision import autocast, synchronised, widened
from common.run.checkpoint import (
    bare_state_dict,
    describe,
    load_weights,
    require_own,
    save,
)
from common.run.log import RunLog
from common.run.rng import capture_rng, restore_rng
from projects.s4gan_mlmt.classifier import build_classifier
from projects.s4gan_mlmt.config import Config
from projects.s4gan_mlmt.mlmt_config import MlmtConfig
from projects.s4gan_mlmt.state import PROJECT

BRANCH = "mlmt"
NUM_SUMS = 5


class TwoForwards(nn.Module):
    """A classifier on the labeled and on the unlabeled batch of a step, one after the other.

    Each batch has BatchNorm statistics of its own, and the running ones move twice. Both forwards are one call, so
    that their gradients are reduced over processes together.

    Args:
        network: maps images (B, 3, H, W) to logits (B, K).
        precision: of the forward passes.
    """

    def __init__(self, network: nn.Module, precision: str = "fp32") -> None:
        super().__init__()
        self.network, self.precision = network, precision

    def forward(self, labeled: Tensor, unlabeled: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, K) and (B', K) in float32 or wider."""
        with autocast(labeled.device, self.precision):
            return widened(self.network(labeled)), widened(self.network(unlabeled))


@dataclass
class MlmtState:
    """Networks, optimiser and counters.

    Attributes:
        student: the classifier that learns.
        teacher: its average; never receives gradients.
        learn: the student as the step calls it: labeled and augmented images to logits, with gradients that are
            averaged over processes.
        teach: the teacher likewise: labeled and clean images to logits.
        optimizer: of the student.
        scaler: of the loss in half precision.
        sums: of the losses and accuracies of the epoch so far, on the device, for its summary.
        step: optimiser steps done, which is also the number of averages.
        evaluated: epochs whose end (summary, scores if due) is done.
        last: mean losses and accuracies of the last epoch.
        figures: what the newest validation found.
        scored: the list it was about.
        seen: latest checkpoint written, for messages.
    """

    student: nn.Module
    teacher: nn.Module
    learn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    teach: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    sums: Tensor
    step: int = 0
    evaluated: int = 0
    last: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    scored: str = ""
    seen: Path | None = None

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Bare networks by their name in checkpoints."""
        return {"student": self.student, "teacher": self.teacher}


def build_optimizer_of(mlmt: MlmtConfig, network: nn.Module) -> torch.optim.Optimizer:
    """SGD on every parameter of the student alike, its momentum looking ahead."""
    optim = OptimConfig(
        lr=mlmt.lr, momentum=mlmt.momentum, weight_decay=mlmt.weight_decay, epochs=mlmt.epochs,
        batch_size=mlmt.labeled_batch,
    )  # fmt: skip
    return build_optimizer(optim, [Group(network.parameters())], nesterov=mlmt.nesterov)


def state_of(cfg: Config, student: nn.Module, teacher: nn.Module, dist: Dist) -> MlmtState:
    """The state around two networks that are on their device already."""
    teacher.requires_grad_(False)
    learn: nn.Module = TwoForwards(student, cfg.run.precision)
    if cfg.run.compile:
        learn = torch.compile(learn)  # type: ignore[assignment]
    if dist.world_size > 1:
        ids = [dist.local_rank] if dist.device.type == "cuda" else None
        learn = DistributedDataParallel(learn, device_ids=ids, broadcast_buffers=False)
    return MlmtState(
        student,
        teacher,
        learn,
        TwoForwards(teacher, cfg.run.precision),
        build_optimizer_of(cfg.mlmt, student),
        torch.amp.GradScaler(dist.device.type, enabled=cfg.run.precision == "fp16"),
        torch.zeros(NUM_SUMS, dtype=torch.float64, device=dist.device),
    )


def build_state(
    cfg: Config, num_classes: int, dist: Dist, say: Callable[[str], object] | None = None
) -> MlmtState:
    """Two classifiers with the configured weights on their device, and the student's optimiser.

    QUIRK 10.23: the teacher is no copy of the student. Its last layer (without a weight file, all of it) has random
    numbers of its own, which stay in the average with weight 1 / (steps + 1).

    Args:
        cfg: the run.
        num_classes: K.
        dist: this process; all begin with the same weights.
        say: told, in one line per network, what of the weight file was used.

    Raises:
        UserError: the weight file is missing or does not fit.
    """
    mlmt = cfg.mlmt
    networks = []
    for _ in ("student", "teacher"):
        network: nn.Module = build_classifier(mlmt.backbone, num_classes, mlmt.weights, say)
        if synchronised(mlmt.sync_bn, dist):
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        layout = torch.channels_last if cfg.run.channels_last else torch.contiguous_format
        networks.append(network.to(device=dist.device).to(memory_format=layout))
    student, teacher = networks
    if mlmt.copy_teacher:
        teacher.load_state_dict(student.state_dict())
    return state_of(cfg, student, teacher, dist)


def save_last(path: Path, cfg: Config, spec: DatasetSpec, state: MlmtState, log: RunLog, dist: Dist) -> None:
    """Write the whole state; a collective. Only the first rank writes."""
    rng = capture_rng(dist)
    sums = gather_objects(state.sums.cpu(), dist)
    record = log.state_dict()
    if dist.is_main:
        networks = {name: bare_state_dict(network) for name, network in state.networks.items()}
        contents = describe(PROJECT, cfg, spec, state.step, networks) | {
            "branch": BRANCH,
            "optimizer": state.optimizer.state_dict(),
            "scaler": state.scaler.state_dict(),
            "rng": rng,
            "log": record,
            "sums": sums,
            "evaluated": state.evaluated,
            "last": state.last,
            "figures": state.figures,
            "scored": state.scored,
        }
        save(path, contents)
    state.seen = path


def require_branch(saved: Mapping[str, Any], where: str) -> None:
    """Refuse a checkpoint of the segmentation branch, or of another project.

    Raises:
        UserError: names what it is.
    """
    require_own(saved, PROJECT, where)
    if saved.get("branch") != BRANCH:
        raise UserError(
            f"{where}: holds the segmentation branch; give a last.pt that train_mlmt.py wrote (in a run of both "
            "branches it lies in the folder 'mlmt')"
        )


def restore(state: MlmtState, saved: Mapping[str, Any], where: str, log: RunLog, dist: Dist) -> None:
    """Continue from the contents of a checkpoint that `save_last` wrote.

    Raises:
        UserError: another architecture, or another number of processes.
    """
    load_networks(state, saved, where)
    state.optimizer.load_state_dict(saved["optimizer"])
    state.scaler.load_state_dict(saved["scaler"])
    restore_rng(saved["rng"], dist)
    state.sums.copy_(saved["sums"][dist.rank])
    state.step, state.evaluated = saved["step"], saved["evaluated"]
    state.last, state.figures = dict(saved["last"]), dict(saved["figures"])
    state.scored = saved["scored"]
    log.load_state_dict(saved["log"])
    state.seen = Path(where)


def load_networks(state: MlmtState, saved: Mapping[str, Any], where: str) -> None:
    """Give both networks the weights of a checkpoint.

    Raises:
        UserError: another architecture.
    """
    for name, network in state.networks.items():
        load_weights(network, saved["networks"][name], where)
