"""Student, teacher and the supervised loss."""

from __future__ import annotations

from common.distributed import Dist
from common.mean_teacher.networks import StudentTeacher, network_of, student_and_teacher
from common.models.deeplab import SegmentationNetwork
from projects.u2pl.config import Config
from projects.u2pl.losses import Criterion

Networks = StudentTeacher[SegmentationNetwork, Criterion]


def build_student(cfg: Config, num_classes: int) -> SegmentationNetwork:
    """A network with fresh random numbers outside the backbone's weight file."""
    return network_of(cfg.model, num_classes, rep_head=cfg.method.mode == "semi")


def build_criterion(cfg: Config) -> Criterion:
    """The supervised loss that the configuration names."""
    method = cfg.method
    return Criterion(
        ohem=method.criterion == "ohem",
        thresh=method.ohem_thresh,
        min_kept=method.ohem_min_kept,
        aux_weight=cfg.model.aux_weight,
        class_weights=method.class_weights,
    )


def build_networks(cfg: Config, num_classes: int, dist: Dist) -> Networks:
    """Student and teacher on their device, wrapped for this run."""
    return student_and_teacher(cfg, lambda: build_student(cfg, num_classes), build_criterion(cfg), dist)
