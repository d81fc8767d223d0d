"""Datasets and loaders of U2PL."""

from __future__ import annotations

from common.config import BatchPlan
from common.data.streams import TrainingData
from common.distributed import Dist
from common.mean_teacher.data import build_loaders, read_split, train_transform
from projects.u2pl.ael.data import adaptive_data
from projects.u2pl.config import Config


def build_training_data(cfg: Config, dist: Dist, plan: BatchPlan) -> TrainingData:
    """Read the split and make the loaders; labeled and unlabeled images get the same resize, flip and crop.

    The AEL variant has loaders of its own, see `adaptive_data`.

    Raises:
        UserError: missing files or lists, empty lists, a batch larger than the data.
    """
    spec, split = read_split(cfg)
    transform = train_transform(cfg)
    if cfg.method.ael is not None:
        return adaptive_data(cfg, spec, split, transform, plan, dist)
    return build_loaders(cfg, spec, split, plan, dist, transform, transform)
