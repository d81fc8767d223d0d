"""Datasets and loaders of prototype consistency: those of U2PL."""

from __future__ import annotations

import math

from common.config import BatchPlan
from common.data.dataset_yaml import load_spec
from common.data.loaders import Loader, SegmentationDataset, make_train_loader, match_lengths, oversample
from common.data.spec import Item
from common.data.split import resolve_split
from common.data.streams import TrainingData
from common.data.transforms import IGNORE, TrainTransform
from common.distributed import Dist
from common.errors import UserError
from common.numerics.precision import synchronised
from projects.proto_consistency.config import Config


def pad_label(cfg: Config) -> int:
    """Label of the border that a crop adds: 0 as the original (QUIRK u2pl-4), or ignore."""
    return 0 if cfg.quirks.pad_label_zero else IGNORE


def train_transform(cfg: Config) -> TrainTransform:
    """Random resize, flip and crop of both labeled and unlabeled images."""
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


def build_training_data(cfg: Config, dist: Dist, plan: BatchPlan) -> TrainingData:
    """Read the split and make the loaders.

    Semi-supervised runs bring both lists to the length of the unlabeled one, once, from the run's seed;
    supervised-only ones take the labeled list in file order, or sampled as the original does for Cityscapes.

    Raises:
        UserError: missing files or lists, empty lists, a batch larger than the data.
    """
    data, seed = cfg.data, cfg.run.seed
    spec = load_spec(data.dataset, data.root)
    if not spec.generator:
        spec.require_root()  # before the lists, so that a missing folder is named first
    split = resolve_split(spec, data.split)

    def loader(items: list[Item], role: str, drop_last: bool) -> Loader:
        dataset = SegmentationDataset(
            spec, items, train_transform(cfg), seed, role, data.on_error, cache=data.cache
        )
        return make_train_loader(dataset, plan.per_forward, dist, workers=data.workers, drop_last=drop_last)

    if cfg.method.mode == "sup_only":
        items = split.labeled
        if cfg.method.sup_only_order == "sampled":
            items = oversample(items, len(items), seed)
        share = math.ceil(len(items) / dist.world_size)
        # BatchNorm cannot train on one image
        lonely = share % plan.per_forward == 1 and not synchronised(cfg.model.sync_bn, dist)
        loaders = {"labeled": loader(items, "labeled", plan.accumulate > 1 or lonely)}
    else:
        labeled, unlabeled = match_lengths(split.labeled, split.unlabeled, seed)
        loaders = {
            "labeled": loader(labeled, "labeled", True),
            "unlabeled": loader(unlabeled, "unlabeled", True),
        }
    training = TrainingData(spec, split, loaders, plan.accumulate)
    if training.steps_per_epoch < 1:
        raise UserError(
            f"optim.batch_size={cfg.optim.batch_size}: larger than an epoch of {len(loaders['labeled'].dataset)} "
            "images; lower it"
        )
    return training
