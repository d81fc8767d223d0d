"""What the configured method trains: its networks on their device, their optimizers, its random draws."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from common.distributed import Dist
from common.models.placing import placed, unsynchronized, wrapped
from common.numerics.optim import build_optimizer, encoder_and_heads
from common.numerics.precision import synchronized
from projects.cps.baselines.cct import AuxDecoders, CctModel
from projects.cps.baselines.draws import CctDraws
from projects.cps.baselines.gct import FlawDetector, detector_optimizer
from projects.cps.config import Config, loss_groups
from projects.cps.losses import OhemSettings, compiled, supervised
from projects.cps.masks import MaskDraws
from projects.cps.model import BRANCHES, Branches, Networks, Supervised, build_branch
from projects.cps.network import parameter_groups

M = TypeVar("M", bound=nn.Module)


def build_criterion(cfg: Config) -> Supervised:
    """Loss of logits (B, K, H, W) and labels (B, H, W) as the configuration names it, compiled if it says so."""

    def criterion(logits: Tensor, target: Tensor) -> Tensor:
        groups = loss_groups(cfg, len(target))
        kept = cfg.method.ohem_min_kept * (len(target) // groups)
        ohem = OhemSettings(cfg.method.ohem_thresh, kept) if cfg.method.criterion == "ohem" else None
        return supervised(
            logits, target, groups=groups, ohem=ohem, empty_is_nan=cfg.quirks.nan_without_labels
        )

    return compiled(criterion, cfg.run.compile)


def build_networks(cfg: Config, num_classes: int, dist: Dist) -> Networks:
    """Networks with fresh random numbers on their device, wrapped for this run.

    All draw from one stream, the second branch after the first and what a baseline adds after both.
    """
    method, separate, precision = cfg.method, cfg.quirks.separate_statistics, cfg.run.precision
    synchronize = synchronized(cfg.model.sync_bn, dist)

    def place(module: M) -> M:
        return placed(module, dist, synchronize=synchronize, channels_last=cfg.run.channels_last)

    def wrap(module: nn.Module) -> nn.Module:
        return wrapped(module, dist, compiled=cfg.run.compile)

    names = BRANCHES[:1] if method.name in ("sup_only", "cct") else BRANCHES
    branches = [place(build_branch(cfg, num_classes)) for _ in names]
    modules: dict[str, nn.Module] = dict(zip(names, branches, strict=True))
    learning: nn.Module = Branches(branches, separate, precision)
    detector = None
    if method.name == "mean_teacher":
        branches[1].requires_grad_(False)
        learning = Branches(branches[:1], separate, precision)
    elif method.name == "cct":
        auxiliary = place(AuxDecoders(cfg.model.inner_planes, num_classes, len(method.cct.decoders)))
        modules["auxiliary"] = auxiliary
        learning = CctModel(branches[0], auxiliary, method.cct, separate, precision)
    elif method.name == "gct":
        planes, strides = method.gct.detector_planes, method.gct.detector_strides
        detector = place(FlawDetector(num_classes, planes, strides, precision=precision))
        modules["detector"] = detector
    return Networks(
        modules,
        wrap(learning),
        build_criterion(cfg),
        precision,
        None if detector is None else wrap(detector),
        unsynchronized(modules.values(), dist, synchronize=synchronize),
    )


def build_optimizers(cfg: Config, nets: Networks) -> dict[str, torch.optim.Optimizer]:
    """An optimizer for every network that learns, by its name; CCT's decoders learn with the network they belong to.

    They are the authors': decay on convolution weights only, one rate for all; Adam for the flaw detector. The generic
    network has those that it has in every project.
    """
    found: dict[str, torch.optim.Optimizer] = {}
    for name, module in nets.modules.items():
        if name == "detector":
            found[name] = detector_optimizer(module, cfg.method.gct)
        elif name in BRANCHES and any(p.requires_grad for p in module.parameters()):
            parts = (module, *(nets.modules[key] for key in ("auxiliary",) if key in nets.modules))
            if cfg.model.network == "generic":
                encoder, *heads = (child for part in parts for child in part.children())
                groups = encoder_and_heads(encoder, heads, cfg.optim)
            else:
                groups = [group for part in parts for group in parameter_groups(part, cfg.optim.weight_decay)]
            found[name] = build_optimizer(cfg.optim, groups)
    return found


def build_draws(cfg: Config, dist: Dist) -> Any:
    """Random numbers that the method draws in a step; None if it draws none."""
    if cfg.method.name == "cps_cutmix":
        return MaskDraws(cfg.method.cutmix, cfg.run.seed, dist.rank)
    return CctDraws(cfg.run.seed, dist.rank, dist.device) if cfg.method.name == "cct" else None
