"""Student and teacher."""

from __future__ import annotations

from common.distributed import Dist
from common.mean_teacher.networks import StudentTeacher, student_and_teacher
from projects.proto_consistency.config import Config
from projects.proto_consistency.losses import Criterion
from projects.proto_consistency.network import ProtoNetwork, build_network

Networks = StudentTeacher[ProtoNetwork, Criterion]


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
    """Student and teacher on their device, wrapped for this run."""
    return student_and_teacher(cfg, lambda: build_student(cfg, num_classes), build_criterion(cfg), dist)
