"""Exponential moving average of a network's parameters: the teacher of the mean-teacher family."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def warmup_decay(update: int, ceiling: float) -> float:
    """Decay of the `update`-th average (from 0): `min(1 - 1 / (update + 1), ceiling)`, so the first one copies."""
    return min(1.0 - 1.0 / (update + 1), ceiling)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """`teacher <- decay * teacher + (1 - decay) * student` for every parameter, in float32; buffers are left alone."""
    ours, theirs = _tensors(teacher), _tensors(student)
    torch._foreach_mul_(ours, decay)
    torch._foreach_add_(ours, theirs, alpha=1.0 - decay)


@torch.no_grad()
def copy_parameters(teacher: nn.Module, student: nn.Module) -> None:
    """Set every parameter of the teacher to the student's; buffers are left alone."""
    torch._foreach_copy_(_tensors(teacher), _tensors(student))


@torch.no_grad()
def copy_buffers(teacher: nn.Module, student: nn.Module) -> None:
    """Set every buffer of the teacher (BatchNorm statistics and counters) to the student's."""
    for ours, theirs in zip(teacher.buffers(), student.buffers(), strict=True):
        ours.copy_(theirs)


def _tensors(network: nn.Module) -> list[Tensor]:
    return list(network.parameters())
