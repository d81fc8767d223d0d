"""Each method as the training loop sees it: modules, phases with their optimisers, random draws."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from common.data.loaders import Batch
from common.distributed import Dist
from common.numerics.losses import Losses
from common.numerics.optim import build_optimizer
from projects.cps.cct import (
    AuxDecoders,
    CctModel,
    annealed_threshold,
    annealing_steps,
    cct_losses,
)
from projects.cps.config import Config, loss_groups
from projects.cps.draws import CctDraws, MaskDraws
from projects.cps.gct import (
    FlawDetector,
    detector_optimizer,
    gct_detector_losses,
    gct_task_losses,
    sigmoid_ramp,
)
from projects.cps.losses import OhemSettings, supervised
from projects.cps.masks import draw_boxes, rasterise
from projects.cps.mean_teacher import mean_teacher_losses
from projects.cps.model import Branches, build_branch, placed, segment, wrapped
from projects.cps.network import parameter_groups
from projects.cps.recipes import cps_cutmix_losses, cps_losses, supervised_losses


class Progress(NamedTuple):
    """Where a run stands.

    Attributes:
        step: optimiser steps done.
        steps_per_epoch: of them.
        epochs: of the whole run.
        forward: number of the forward within its optimiser step, from 0.
    """

    step: int
    steps_per_epoch: int
    epochs: int
    forward: int = 0


class Draws(Protocol):
    """Random numbers of a method, saved with its checkpoints."""

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""


@dataclass
class Phase:
    """One backward pass and the optimisers that step after it.

    Attributes:
        losses: of one forward's batches, in the order of the loaders.
        optimizers: by the name of the module they train.
        module: what is called with gradients; it may reduce them over processes.
        scheduled: whether the optimisers follow the schedule.
    """

    losses: Callable[[Sequence[Batch], Progress], Losses]
    optimizers: dict[str, torch.optim.Optimizer]
    module: nn.Module
    scheduled: bool = True


@dataclass
class Method:
    """What a run trains.

    Attributes:
        modules: all modules by their name in checkpoints; `branch1` is the one the authors evaluate.
        phases: of an optimiser step, in their order.
        draws: random numbers, if the method draws any in a step.
        late_rate: the schedule reaches the optimisers one step late (GCT).
    """

    modules: Mapping[str, nn.Module]
    phases: tuple[Phase, ...]
    draws: Draws | None = None
    late_rate: bool = False

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """All optimisers by the name of the module they train."""
        return {name: one for phase in self.phases for name, one in phase.optimizers.items()}


def supervised_loss(cfg: Config) -> Callable[[Tensor, Tensor], Tensor]:
    """Loss of logits (B, K, H, W) and labels (B, H, W) as the configuration names it."""

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        groups = loss_groups(cfg, len(target))
        kept = cfg.method.ohem_min_kept * (len(target) // groups)
        ohem = OhemSettings(cfg.method.ohem_thresh, kept) if cfg.method.criterion == "ohem" else None
        return supervised(
            logits, target, groups=groups, ohem=ohem, empty_is_nan=cfg.quirks.nan_without_labels
        )

    return loss


def sgd(cfg: Config, network: nn.Module) -> torch.optim.Optimizer:
    """The authors' optimiser: decay on convolution weights only, one rate for all."""
    return build_optimizer(cfg.optim, parameter_groups(network, cfg.optim.weight_decay))


def build_supervised(cfg: Config, num_classes: int, dist: Dist) -> Method:
    """One network on labeled images."""
    network = placed(build_branch(cfg, num_classes), cfg, dist)
    forward = wrapped(Branches([network], precision=cfg.run.precision), cfg, dist)
    loss = supervised_loss(cfg)

    def losses(batches: Sequence[Batch], progress: Progress) -> Losses:
        del progress
        return supervised_losses(batches[0].image, batches[0].label, forward, loss)

    return Method({"branch1": network}, (Phase(losses, {"branch1": sgd(cfg, network)}, forward),))


def build_cps(cfg: Config, num_classes: int, dist: Dist) -> Method:
    """Two networks teach each other, with or without CutMix."""
    networks = [placed(build_branch(cfg, num_classes), cfg, dist) for _ in range(2)]
    branches = Branches(networks, cfg.quirks.separate_statistics, cfg.run.precision)
    forward = wrapped(branches, cfg, dist)
    loss, method = supervised_loss(cfg), cfg.method
    draws = MaskDraws(cfg.run.seed, dist.rank)

    def teach(*batches: Tensor) -> list[list[Tensor]]:
        with evaluating(networks, not cfg.quirks.train_mode_labels):
            return [[segment(network, x, cfg.run.precision) for x in batches] for network in networks]

    def plain(batches: Sequence[Batch], progress: Progress) -> Losses:
        del progress
        labeled, unlabeled = batches
        return cps_losses(labeled.image, labeled.label, unlabeled.image, forward, loss, method.cps_weight)

    def mixed(batches: Sequence[Batch], progress: Progress) -> Losses:
        del progress
        labeled, first, second = batches
        height, width = first.image.shape[-2:]
        boxes = draw_boxes(method.cutmix, len(first.image), height, width, draws.rng)
        mask = rasterise(boxes, height, width, first.image.device, invert=method.cutmix.invert)
        return cps_cutmix_losses(
            labeled.image, labeled.label, first.image, second.image, mask, forward, teach, loss,
            method.cps_weight,
        )  # fmt: skip

    cutmix = method.name == "cps_cutmix"
    names = ("branch1", "branch2")
    optimizers = {name: sgd(cfg, network) for name, network in zip(names, networks, strict=True)}
    phase = Phase(mixed if cutmix else plain, optimizers, forward)
    return Method(dict(zip(names, networks, strict=True)), (phase,), draws if cutmix else None)


@contextlib.contextmanager
def evaluating(networks: Sequence[nn.Module], wanted: bool) -> Iterator[None]:
    """Networks in evaluation mode inside, if `wanted`, and back in train mode after it."""
    for network in networks if wanted else ():
        network.eval()
    try:
        yield
    finally:
        for network in networks if wanted else ():
            network.train()


def build_mean_teacher(cfg: Config, num_classes: int, dist: Dist) -> Method:
    """A student and its average."""
    student, teacher = (placed(build_branch(cfg, num_classes), cfg, dist) for _ in range(2))
    teacher.requires_grad_(False)
    branches = Branches([student], cfg.quirks.separate_statistics, cfg.run.precision)
    forward = wrapped(branches, cfg, dist)
    loss = supervised_loss(cfg)

    def losses(batches: Sequence[Batch], progress: Progress) -> Losses:
        labeled, unlabeled = batches
        return mean_teacher_losses(
            labeled.image, labeled.label, unlabeled.image, progress.step, student, teacher, forward,
            partial(segment, teacher, precision=cfg.run.precision), cfg.method.mean_teacher, loss,
            first=progress.forward == 0,
        )  # fmt: skip

    phase = Phase(losses, {"branch1": sgd(cfg, student)}, forward)
    return Method({"branch1": student, "branch2": teacher}, (phase,))


def build_cct(cfg: Config, num_classes: int, dist: Dist) -> Method:
    """One network whose features are perturbed for auxiliary decoders."""
    settings = cfg.method.cct
    network = placed(build_branch(cfg, num_classes), cfg, dist)
    auxiliary = placed(AuxDecoders(cfg.model.inner_planes, num_classes, len(settings.decoders)), cfg, dist)
    model = CctModel(network, auxiliary, settings, cfg.quirks.separate_statistics, cfg.run.precision)
    forward = wrapped(model, cfg, dist)
    draws = CctDraws(cfg.run.seed, dist.rank, dist.device)

    def losses(batches: Sequence[Batch], progress: Progress) -> Losses:
        labeled, unlabeled = batches
        ramp = annealing_steps(progress.epochs, progress.steps_per_epoch, settings.ramp_share)
        threshold = annealed_threshold(progress.step, ramp, num_classes, settings.ramp_end)
        return cct_losses(
            labeled.image, labeled.label, unlabeled.image, threshold, forward, draws, settings,
            groups=loss_groups(cfg, len(labeled.image)),
        )  # fmt: skip

    groups = [
        group for part in (network, auxiliary) for group in parameter_groups(part, cfg.optim.weight_decay)
    ]
    phase = Phase(losses, {"branch1": build_optimizer(cfg.optim, groups)}, forward)
    return Method({"branch1": network, "auxiliary": auxiliary}, (phase,), draws)


def build_gct(cfg: Config, num_classes: int, dist: Dist) -> Method:
    """Two networks guided by a detector of their errors, which learns in a second phase."""
    settings, precision = cfg.method.gct, cfg.run.precision
    networks = [placed(build_branch(cfg, num_classes), cfg, dist) for _ in range(2)]
    forward = wrapped(Branches(networks, cfg.quirks.separate_statistics, precision), cfg, dist)
    detector = FlawDetector(
        num_classes, settings.detector_planes, settings.detector_strides, precision=precision
    )
    detector = placed(detector, cfg, dist)
    detect = wrapped(detector, cfg, dist)
    loss = supervised_loss(cfg)

    def teach(*batches: Tensor) -> list[list[Tensor]]:
        return [[segment(network, x, precision) for x in batches] for network in networks]

    def tasks(batches: Sequence[Batch], progress: Progress) -> Losses:
        labeled, unlabeled = batches
        ramp = sigmoid_ramp(progress.step, settings.dc_ramp_epochs * progress.steps_per_epoch)
        return gct_task_losses(
            labeled.image, labeled.label, unlabeled.image, ramp, forward, teach, detector, settings, loss
        )

    def flaws(batches: Sequence[Batch], progress: Progress) -> Losses:
        del progress
        labeled, unlabeled = batches
        return gct_detector_losses(labeled.image, labeled.label, unlabeled.image, teach, detect, settings)

    names = ("branch1", "branch2")
    optimizers = {name: sgd(cfg, network) for name, network in zip(names, networks, strict=True)}
    optimizer = detector_optimizer(detector, settings)
    modules: dict[str, nn.Module] = {**dict(zip(names, networks, strict=True)), "detector": detector}
    phases = (
        Phase(tasks, optimizers, forward),
        Phase(flaws, {"detector": optimizer}, detect, not settings.constant_detector_rate),
    )
    return Method(modules, phases, late_rate=settings.late_rate)


def build_method(cfg: Config, num_classes: int, dist: Dist) -> Method:
    """The method that the configuration names, on its device."""
    builders = {
        "sup_only": build_supervised,
        "cps": build_cps,
        "cps_cutmix": build_cps,
        "mean_teacher": build_mean_teacher,
        "cct": build_cct,
        "gct": build_gct,
    }
    return builders[cfg.method.name](cfg, num_classes, dist)
