"""Student and mean teacher of one architecture, as the papers that descend from U2PL's code train them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from common.data.files import find_weights
from common.distributed import Dist
from common.models import placing
from common.models.deeplab import Outputs, SegmentationNetwork, build_network
from common.models.generic import build_generic
from common.models.pretrained import LoadReport, load_pretrained
from common.numerics.precision import autocast, synchronized, widened
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
        teacher_burn_in: the teacher sees labeled images in the supervised epochs, for its BatchNorm statistics
            (QUIRK quirks.own_teacher_statistics).
        unsynchronized: parts in which each of several processes computes BatchNorm on its own batch.
    """

    student: Network
    teacher: Network | None
    wrapped: Callable[[Tensor], Outputs]
    criterion: Supervised
    precision: str = "fp32"
    teacher_burn_in: bool = True
    unsynchronized: tuple[nn.Module, ...] = ()

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

    @property
    def encoders(self) -> list[nn.Module]:
        """Those of both networks."""
        return [network.encoder for network in (self.student, self.teacher) if network is not None]

    def require_teacher(self) -> Network:
        """The teacher of a semi-supervised run."""
        assert self.teacher is not None, "a supervised-only run has no teacher"
        return self.teacher

    def share_statistics(self, dist: Dist) -> None:
        """Give all processes the first one's statistics where each has its own; at the start of a step."""
        placing.share_statistics(self.unsynchronized, dist)


def student_and_teacher(
    cfg: Any,
    build: Callable[[], Network],
    criterion: Supervised,
    dist: Dist,
    *,
    sync_teacher_encoder: bool = True,
) -> StudentTeacher[Network, Supervised]:
    """Student and, in a semi-supervised run, its teacher on their device, wrapped for this run.

    The teacher is a second network with random numbers of its own (from `build`) outside the pretrained backbone, drawn
    after the student's, as in the original. With `sync_teacher_encoder`, `model.sync_bn` concerns its encoder too.
    """
    together = synchronized(cfg.model.sync_bn, dist)

    def place(sync_encoder: bool) -> Network:
        network = build()
        for name, part in list(network.named_children()):
            if together and (sync_encoder or name != "encoder"):
                setattr(network, name, placing.with_sync_bn(part))
        return placing.placed(network, dist, synchronize=False, channels_last=cfg.run.channels_last)

    student = place(sync_encoder=True)
    teacher = place(sync_teacher_encoder).requires_grad_(False) if cfg.method.mode == "semi" else None
    networks = (student,) if teacher is None else (student, teacher)
    apart = placing.unsynchronized(networks, dist, synchronize=together)
    if together and teacher is not None and not sync_teacher_encoder:
        apart = (teacher.encoder,)
    return StudentTeacher(
        student,
        teacher,
        placing.wrapped(student, dist, compiled=cfg.run.compile),
        criterion,
        cfg.run.precision,
        cfg.quirks.own_teacher_statistics,
        apart,
    )


def network_of(
    model: Any, num_classes: int, *, rep_head: bool = False, return_concat: bool = False
) -> SegmentationNetwork:
    """The ResNet with DeepLabV3+, or the generic network, that a section `model` describes, with fresh random numbers.

    See `common.models.deeplab.build_network` for the other arguments; with `return_concat` the generic network returns
    the features that its classifier reads.
    """
    if model.network == "generic":
        return build_generic(model, num_classes, rep_head=rep_head, return_feats=return_concat)
    return build_network(
        model,
        num_classes,
        zero_init_residual=model.zero_init_residual,
        rep_head=rep_head,
        return_concat=return_concat,
        aux_head=model.aux_weight > 0,
    )


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
    """Give both encoders the ImageNet weights that the configuration names (`none`, a name or a file), and say so.

    `load` puts a file into a network and says what became of every key.

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
