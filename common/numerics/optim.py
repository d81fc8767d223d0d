"""Optimizer, learning rate, and schedules as plain functions of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from common.config import OptimConfig


def poly(base: float, step: int, total_steps: int, power: float) -> float:
    """`base * (1 - step / total)^power`."""
    return base * (1.0 - step / total_steps) ** power


def cosine(base: float, step: int, total_steps: int, target: float) -> float:
    """Half a cosine from `base` at step 0 to `target` at `total_steps`."""
    return target + (base - target) * (1.0 + math.cos(math.pi * step / total_steps)) / 2.0


def linear_decay(epoch: float, total_epochs: float) -> float:
    """Share of the schedule that is left: 1 at epoch 0, 0 at the end."""
    return 1.0 - epoch / total_epochs


class Group(NamedTuple):
    """Parameters that learn with `lr * lr_factor`; `weight_decay` None takes that of the configuration."""

    parameters: Iterable[nn.Parameter]
    lr_factor: float = 1.0
    weight_decay: float | None = None


def encoder_and_heads(encoder: nn.Module, heads: Iterable[nn.Module], optim: OptimConfig) -> list[Group]:
    """The encoder with the rate of the configuration (layer by layer under `layer_decay`), the heads with theirs."""
    layers = [Group(encoder.parameters())]
    if optim.layer_decay is not None:
        layers = encoder.layers(optim.layer_decay)  # type: ignore[operator]  # of the generic network's encoder
    return [*layers, *(Group(head.parameters(), optim.head_lr_factor) for head in heads)]


def build_optimizer(
    optim: OptimConfig, groups: Sequence[Group], *, nesterov: bool = False
) -> torch.optim.Optimizer:
    """SGD (with `nesterov`, its momentum looks ahead), Adam or AdamW over the parameters of groups that learn.

    The step is fused, so that it can be cancelled on the device by `FiniteGuard`.
    """
    named: list[dict[str, Any]] = [
        {
            "params": [p for p in group.parameters if p.requires_grad],
            "lr": optim.lr * group.lr_factor,
            "initial_lr": optim.lr * group.lr_factor,
            "weight_decay": optim.weight_decay if group.weight_decay is None else group.weight_decay,
        }
        for group in groups
    ]
    if optim.optimizer != "sgd":
        adaptive = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optim.optimizer]
        return adaptive(named, lr=optim.lr, weight_decay=optim.weight_decay, fused=True)
    sgd = torch.optim.SGD(
        named,
        lr=optim.lr,
        momentum=optim.momentum,
        weight_decay=optim.weight_decay,
        nesterov=nesterov,
        fused=True,
    )
    if optim.momentum:
        for group in sgd.param_groups:  # a fused first step that is cancelled would leave them uninitialized
            for p in group["params"]:
                sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return sgd


def set_learning_rate(
    optimizer: torch.optim.Optimizer, optim: OptimConfig, step: int, total_steps: int
) -> list[float]:
    """Give every group its rate of this step (from 0) and return the rates."""
    for group in optimizer.param_groups:
        if optim.schedule == "poly":
            group["lr"] = poly(group["initial_lr"], step, total_steps, optim.power)
        else:
            group["lr"] = cosine(group["initial_lr"], step, total_steps, optim.target_lr)
        if step < optim.warmup_steps:
            group["lr"] *= (step + 1) / optim.warmup_steps
    return [group["lr"] for group in optimizer.param_groups]
