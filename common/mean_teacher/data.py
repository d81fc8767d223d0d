"""Loaders of labeled and unlabeled images as the papers that descend from U2PL's code pair them."""

from __future__ import annotations

import math
from typing import Any

from common.config import BatchPlan
from common.data.dataset_yaml import load_spec
from common.data.loaders import (
    Loader,
    SegmentationDataset,
    Transform,
    make_train_loader,
    match_lengths,
    oversample,
)
from common.data.spec import DatasetSpec, Item
from common.data.split import Split, resolve_split
from common.data.streams import TrainingData
from common.data.transforms import TrainTransform
from common.distributed import Dist
from common.errors import UserError
from common.mean_teacher.evaluation import pad_label
from common.numerics.precision import synchronized


def train_transform(cfg: Any) -> TrainTransform:
    """Random resize, flip and crop."""
    data = cfg.data
    return TrainTransform(
        mean=data.mean,
        std=data.std,
        crop_size=data.crop_size,
        scale_range=data.scale_range,
        flip=data.flip,
        pad_label=pad_label(cfg),
        rotation=data.rotation,
        blur=data.blur,
        resize=data.resize,
    )


def read_split(cfg: Any) -> tuple[DatasetSpec, Split]:
    """The dataset and the split that the configuration names.

    Raises:
        UserError: missing files or lists.
    """
    spec = load_spec(cfg.data.dataset, cfg.data.root)
    if not spec.generator:
        spec.require_root()  # before the lists, so that a missing folder is named first
    return spec, resolve_split(spec, cfg.data.split)


def build_loaders(
    cfg: Any,
    spec: DatasetSpec,
    split: Split,
    plan: BatchPlan,
    dist: Dist,
    labeled: Transform,
    unlabeled: Transform,
) -> TrainingData:
    """The loaders of a run, with these transforms.

    Semi-supervised runs bring both lists to the length of the unlabeled one, once, from the run's seed (QUIRK
    oversampled_once); supervised-only ones take the labeled list in file order, or sampled as the original does for
    Cityscapes.

    Raises:
        UserError: empty lists, a batch larger than the data.
    """
    data, seed = cfg.data, cfg.run.seed

    def loader(items: list[Item], role: str, transform: Transform, drop_last: bool = True) -> Loader:
        dataset = SegmentationDataset(spec, items, transform, seed, role, data.on_error, cache=data.cache)
        return make_train_loader(dataset, plan.per_forward, dist, workers=data.workers, drop_last=drop_last)

    if cfg.method.mode == "sup_only":
        items = split.labeled
        if cfg.method.sup_only_order == "sampled":
            items = oversample(items, len(items), seed)
        share = math.ceil(len(items) / dist.world_size)
        one_left = share % plan.per_forward == 1  # BatchNorm cannot train on one image
        drop_last = plan.accumulate > 1 or (one_left and not synchronized(cfg.model.sync_bn, dist))
        loaders = {"labeled": loader(items, "labeled", labeled, drop_last)}
    else:
        items_l, items_u = match_lengths(split.labeled, split.unlabeled, seed)
        loaders = {
            "labeled": loader(items_l, "labeled", labeled),
            "unlabeled": loader(items_u, "unlabeled", unlabeled),
        }
    training = TrainingData(spec, split, loaders, plan.accumulate)
    if training.steps_per_epoch < 1:
        raise UserError(
            f"optim.batch_size={cfg.optim.batch_size}: larger than an epoch of {len(loaders['labeled'].dataset)} "
            "images; lower it"
        )
    return training
