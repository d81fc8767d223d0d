"""Student and mean teacher of one architecture, as the papers that descend from U2PL's code train them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.distributed import Dist, broadcast_buffers
from common.models.deeplab import Outputs, SegmentationNetwork
from common.numerics.precision import autocast, widened

Network = TypeVar("Network", bound=SegmentationNetwork)
Supervised = TypeVar("Supervised")


@dataclass
class StudentTeacher(Generic[Network, Supervised]):
    """The networks of a run.

    Attributes:
        student: bare network that is trained.
        teacher: its average, never trained by gradients; None in supervised-only runs.
        wrapped: the student as the loop calls it (distributed, compiled).
        criterion: supervised loss.
        precision: of the forward passes; losses are always float32.
        teacher_burn_in: the teacher sees labeled images in the supervised epochs (QUIRK u2pl-6, brpg-8).
        own_statistics: parts in which each of several processes computes BatchNorm on its own batch.
    """

    student: Network
    teacher: Network | None
    wrapped: Callable[[Tensor], Outputs]
    criterion: Supervised
    precision: str = "fp32"
    teacher_burn_in: bool = True
    own_statistics: tuple[nn.Module, ...] = ()

    def forward(self, x: Tensor) -> Outputs:
        """Student outputs at feature size, in float32."""
        with autocast(x.device, self.precision):
            return in_float32(self.wrapped(x))

    def teach(self, x: Tensor, train: bool) -> Outputs:
        """Teacher outputs without a graph; `train` uses batch statistics and dropout."""
        teacher = self.require_teacher()
        teacher.train(train)
        with torch.no_grad(), autocast(x.device, self.precision):
            return in_float32(teacher(x))

    def require_teacher(self) -> Network:
        """The teacher of a semi-supervised run."""
        assert self.teacher is not None, "a supervised-only run has no teacher"
        return self.teacher

    def share_statistics(self, dist: Dist) -> None:
        """Where processes have statistics of their own, the first one's serve all at the start of a step."""
        for part in self.own_statistics:
            broadcast_buffers(part, dist)


def in_float32(out: Outputs) -> Outputs:
    """The same outputs with half precision widened."""
    rest = (None if x is None else widened(x) for x in out[1:])
    return Outputs(widened(out.logits), *rest)


def wrap(student: nn.Module, compiled: bool, dist: Dist) -> nn.Module:
    """The student as the loop calls it; buffers are not broadcast at a forward, `share_statistics` does it."""
    wrapped: nn.Module = torch.compile(student) if compiled else student  # type: ignore[assignment]
    if dist.world_size == 1:
        return wrapped
    ids = [dist.local_rank] if dist.device.type == "cuda" else None
    return DistributedDataParallel(wrapped, device_ids=ids, broadcast_buffers=False)
