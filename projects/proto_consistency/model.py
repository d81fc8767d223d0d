"""Student and teacher, and how the prototypes of a process move."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.distributed import Dist, broadcast_object, sum_over_ranks
from common.mean_teacher.networks import StudentTeacher, wrap
from common.models.pretrained import find_weights, load_pretrained
from common.numerics.precision import synchronised
from common.run.log import RunLog
from projects.proto_consistency.config import Config, ProtoConfig
from projects.proto_consistency.head import PrototypeHead
from projects.proto_consistency.losses import Criterion
from projects.proto_consistency.network import ProtoNetwork, build_network
from projects.proto_consistency.prototypes import apply_sums, group_sums


class Movement:
    """Where the prototypes of this process are going to move in the current optimiser step.

    Forwards of one step (accumulation) are pooled, so that a prototype moves once per step, as with the authors'
    processes of one forward each.

    Args:
        head: The student's, on its device.

    Attributes:
        sums: (K*P, D) of the features assigned so far in this step.
        counts: (K*P,) their numbers.
        usage: (K*P,) float64, pixels assigned since `take_usage`.
    """

    def __init__(self, head: PrototypeHead) -> None:
        own = head.proto_list
        self.per_class = head.per_class
        self.sums = torch.zeros_like(own, requires_grad=False)
        self.counts = self.sums[:, 0].clone()
        self.usage = torch.zeros(len(own), dtype=torch.float64, device=own.device)

    def add(self, feats: Tensor, match: Tensor, target: Tensor, cond: Tensor) -> None:
        """Note the features (N, D) of a forward, by their nearest prototypes (N, K), labels (N,) and mask (N,)."""
        sums, counts = group_sums(feats, match, target, cond, self.per_class)
        self.sums, self.counts = self.sums + sums, self.counts + counts

    def apply(self, head: PrototypeHead, proto: ProtoConfig, dist: Dist, bad: Tensor | None = None) -> None:
        """Move the prototypes once and forget the sums; a collective with `sync: gather`.

        Args:
            head: The student's.
            proto: How they move.
            dist: With `sync: gather` the features of all processes count.
            bad: 1 if the step is cancelled because a loss is not finite: then they stay.
        """
        sums, counts = self.sums, self.counts
        self.sums, self.counts = torch.zeros_like(sums), torch.zeros_like(counts)
        if bad is not None:
            counts = counts.masked_fill(bad > 0, 0.0)
        self.usage += counts
        if not proto.update:
            return
        if proto.sync == "gather":
            pooled = sum_over_ranks(torch.cat((sums, counts.unsqueeze(1)), dim=1), dist)
            sums, counts = pooled[:, :-1], pooled[:, -1]
        with torch.no_grad():
            head.proto_list.copy_(apply_sums(head.proto_list, sums, counts, proto.momentum))

    def take_usage(self, dist: Dist) -> Tensor:
        """Pixels per class and prototype (K, P) of all processes since the last call; a collective."""
        total = sum_over_ranks(self.usage, dist)
        self.usage = torch.zeros_like(self.usage)
        return total.view(-1, self.per_class)


@dataclass
class Networks(StudentTeacher[ProtoNetwork, Criterion]):
    """The networks of a run.

    Attributes:
        movement: of the student's prototypes; None without a prototype head.
    """

    movement: Movement | None = None


@contextmanager
def prototypes_of_first(network: ProtoNetwork, dist: Dist) -> Iterator[None]:
    """Every process has the prototypes of the first one inside, for they are the ones that are published.

    A collective. With `sync: local` those of the processes differ.
    """
    head = network.proto_net
    if head is None or dist.world_size == 1:
        yield
        return
    own = head.proto_list.detach().clone()
    head.proto_list.data.copy_(broadcast_object(own.cpu(), dist))
    try:
        yield
    finally:
        head.proto_list.data.copy_(own)


def build_student(cfg: Config, num_classes: int) -> ProtoNetwork:
    """A network with fresh random numbers outside the backbone's weight file."""
    proto = cfg.prototypes
    return build_network(
        cfg.model,
        num_classes,
        None if proto is None else proto.per_class,
        0.1 if proto is None else proto.temperature,
    )


def build_criterion(cfg: Config) -> Criterion:
    """The supervised loss that the configuration names."""
    method = cfg.method
    return Criterion(
        ohem=method.criterion == "ohem",
        thresh=method.ohem_thresh,
        min_kept=method.ohem_min_kept,
        aux_weight=cfg.model.aux_weight,
    )


def build_networks(cfg: Config, num_classes: int, dist: Dist) -> Networks:
    """Student and teacher on their device, wrapped for this run.

    The teacher is a second network with random numbers of its own outside the pretrained backbone, drawn after
    the student's, as in the original.
    """
    synchronise = synchronised(cfg.model.sync_bn, dist)
    layout = torch.channels_last if cfg.run.channels_last else torch.contiguous_format

    def build() -> ProtoNetwork:
        network = build_student(cfg, num_classes)
        if synchronise:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return network.to(device=dist.device).to(memory_format=layout)

    student = build()
    teacher = build().requires_grad_(False) if cfg.method.mode == "semi" else None
    own: tuple[nn.Module, ...] = ()
    if dist.world_size > 1 and not synchronise:
        own = (student,) if teacher is None else (student, teacher)
    return Networks(
        student,
        teacher,
        wrap(student, cfg.run.compile, dist),
        build_criterion(cfg),
        cfg.run.precision,
        own_statistics=own,
        teacher_burn_in=cfg.quirks.own_teacher_statistics,
        movement=None if student.proto_net is None else Movement(student.proto_net),
    )


def load_backbone(cfg: Config, nets: Networks, log: RunLog) -> None:
    """Give both encoders the ImageNet weights that the configuration names, and say what was used.

    Raises:
        UserError: the file is missing or does not fit.
    """
    name = cfg.model.weights
    if name == "none":
        log.info("backbone: random numbers (model.weights=none)")
        return
    found = find_weights(name)
    for network in (nets.student, nets.teacher):
        if network is not None:
            report = load_pretrained(network, found, allow_missing=("decoder.", "auxor.", "proto_net."))
    log.info(f"backbone: {report.summary()}")
