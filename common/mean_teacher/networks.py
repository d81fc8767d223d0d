"""Student and mean teacher of one architecture, as the papers that descend from U2PL's code train them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.distributed import Dist, broadcast_buffers
from common.models.deeplab import Outputs, SegmentationNetwork
from common.models.pretrained import LoadReport, find_weights, load_pretrained
from common.numerics.precision import autocast, synchronised, widened
from common.run.log import RunLog

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
        teacher_burn_in: the teacher sees labeled images in the supervised epochs (QUIRK quirks.own_teacher_statistics).
        unsynchronised: parts in which each of several processes computes BatchNorm on its own batch.
    """

    student: Network
    teacher: Network | None
    wrapped: Callable[[Tensor], Outputs]
    criterion: Supervised
    precision: str = "fp32"
    teacher_burn_in: bool = True
    unsynchronised: tuple[nn.Module, ...] = ()

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
        for part in self.unsynchronised:
            broadcast_buffers(part, dist)


class Pair(NamedTuple, Generic[Network]):
    """Student and teacher on their device, and the parts in which each process has statistics of its own."""

    student: Network
    teacher: Network | None
    unsynchronised: tuple[nn.Module, ...]


def build_pair(
    build: Callable[[], Network],
    dist: Dist,
    *,
    with_teacher: bool,
    sync_bn: bool,
    channels_last: bool,
    sync_teacher_encoder: bool = True,
) -> Pair[Network]:
    """Student and, in a semi-supervised run, its teacher.

    The teacher is a second network with random numbers of its own outside the pretrained backbone, drawn after
    the student's, as in the original.

    Args:
        build: makes a network with fresh random numbers.
        dist: this process.
        with_teacher: whether there is one.
        sync_bn: BatchNorm takes its statistics over all processes where that is possible.
        channels_last: memory layout of the weights.
        sync_teacher_encoder: whether that concerns the teacher's encoder too.
    """
    together = synchronised(sync_bn, dist)
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def placed(sync_encoder: bool) -> Network:
        network = build()
        for name, part in list(network.named_children()):
            if together and (sync_encoder or name != "encoder"):
                setattr(network, name, nn.SyncBatchNorm.convert_sync_batchnorm(part))
        return network.to(device=dist.device).to(memory_format=layout)

    student = placed(sync_encoder=True)
    teacher = placed(sync_teacher_encoder).requires_grad_(False) if with_teacher else None
    parts: tuple[nn.Module, ...] = ()
    if dist.world_size > 1 and not together:
        parts = (student,) if teacher is None else (student, teacher)
    elif together and teacher is not None and not sync_teacher_encoder:
        parts = (teacher.encoder,)
    return Pair(student, teacher, parts)


def load_encoder(network: nn.Module, path: Path) -> LoadReport:
    """Give a network the weights of a file, which must have all of the encoder; raises as `load_backbone`."""
    heads = [f"{name}." for name, _ in network.named_children() if name != "encoder"]
    return load_pretrained(network, path, allow_missing=heads)


def load_backbone(
    weights: str,
    nets: StudentTeacher[Any, Any],
    log: RunLog,
    load: Callable[[Any, Path], LoadReport] = load_encoder,
) -> None:
    """Give both encoders the ImageNet weights that the configuration names, and say what was used.

    Args:
        weights: `none`, a name or a file.
        nets: student and teacher.
        log: where to say it.
        load: (network, file) -> what became of every key.

    Raises:
        UserError: the file is missing or does not fit.
    """
    if weights == "none":
        log.info("backbone: random numbers (model.weights=none)")
        return
    found = find_weights(weights)
    for network in (nets.student, nets.teacher):
        if network is not None:
            report = load(network, found)
    log.info(f"backbone: {report.summary()}")


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
