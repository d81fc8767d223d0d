"""Datasets and loaders of BRPG."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
from common.data.spec import DatasetSpec, Item, check_pair
from common.data.split import resolve_split
from common.data.streams import TrainingData
from common.data.transforms import IGNORE, TrainTransform
from common.distributed import Dist
from common.errors import UserError
from common.numerics.precision import synchronised
from projects.brpg.augment import TwoViews, WithPaste
from projects.brpg.config import Config

Array = NDArray[np.uint8]


def pad_label(cfg: Config) -> int:
    """Label of the border that a crop adds: 0 as the original (QUIRK brpg-3), or ignore."""
    return 0 if cfg.quirks.pad_label_zero else IGNORE


def train_transform(cfg: Config) -> TrainTransform:
    """Random resize, flip and crop of labeled images."""
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


def unlabeled_transform(cfg: Config) -> TwoViews:
    """Weak and strong view of unlabeled images.

    Raises:
        UserError: an augmentation that only labeled images would get.
    """
    data = cfg.data
    if data.rotation is not None or data.blur:
        raise UserError(
            "data.rotation, data.blur: unlabeled images have views of their own (colour, grey, blur); set them to "
            "null and false, or method.mode=sup_only"
        )
    return TwoViews(
        mean=data.mean,
        std=data.std,
        crop_size=data.crop_size,
        scale_range=data.scale_range,
        flip=data.flip,
        pad_black=cfg.quirks.pad_black,
        resize=data.resize,
    )


@dataclass(frozen=True)
class Photos:
    """Decoded pairs of a list, for the second photo of copy-paste.

    Attributes:
        spec: decodes images and labels.
        items: labeled ones.
        skip: take the next readable pair instead of a broken one.
    """

    spec: DatasetSpec
    items: list[Item]
    skip: bool

    def __call__(self, position: int) -> tuple[Array, Array | None]:
        """Photo (H, W, 3) and label (H, W).

        Raises:
            UserError: the files are broken.
        """
        for shift in range(len(self.items)):
            item = self.items[(position + shift) % len(self.items)]
            try:
                image, label = self.spec.load_image(item), self.spec.load_label(item)
                check_pair(item, image, label)
            except UserError:
                if not self.skip or shift + 1 == len(self.items):
                    raise
                continue
            return image, label
        raise AssertionError("a list of labeled images is never empty")


def labeled_transform(cfg: Config, spec: DatasetSpec, items: list[Item]) -> Transform:
    """That of labeled images, with a second one at their side where its classes are pasted."""
    own, method = train_transform(cfg), cfg.method
    if not method.copy_paste:
        return own
    paste = dataclasses.replace(own, scale_range=method.paste_scale_range)
    photos: Any = Photos(spec, items, cfg.data.on_error == "skip")
    return WithPaste(own, paste, photos, len(items), method.paste_skip)


def build_training_data(cfg: Config, dist: Dist, plan: BatchPlan) -> TrainingData:
    """Read the split and make the loaders.

    Semi-supervised runs bring both lists to the length of the unlabeled one, once, from the run's seed (as
    QUIRK u2pl-13); supervised-only ones take the labeled list in file order, or sampled as the original does
    for Cityscapes.

    Raises:
        UserError: missing files or lists, empty lists, a batch larger than the data.
    """
    data, seed = cfg.data, cfg.run.seed
    spec = load_spec(data.dataset, data.root)
    if not spec.generator:
        spec.require_root()  # before the lists, so that a missing folder is named first
    split = resolve_split(spec, data.split)

    def loader(items: list[Item], role: str, transform: Transform, drop_last: bool = True) -> Loader:
        dataset = SegmentationDataset(spec, items, transform, seed, role, data.on_error, cache=data.cache)
        return make_train_loader(dataset, plan.per_forward, dist, workers=data.workers, drop_last=drop_last)

    if cfg.method.mode == "sup_only":
        items = split.labeled
        if cfg.method.sup_only_order == "sampled":
            items = oversample(items, len(items), seed)
        share = math.ceil(len(items) / dist.world_size)
        # BatchNorm cannot train on one image
        lonely = share % plan.per_forward == 1 and not synchronised(cfg.model.sync_bn, dist)
        loaders = {"labeled": loader(items, "labeled", train_transform(cfg), plan.accumulate > 1 or lonely)}
    else:
        labeled, unlabeled = match_lengths(split.labeled, split.unlabeled, seed)
        loaders = {
            "labeled": loader(labeled, "labeled", labeled_transform(cfg, spec, split.labeled)),
            "unlabeled": loader(unlabeled, "unlabeled", unlabeled_transform(cfg)),
        }
    training = TrainingData(spec, split, loaders, plan.accumulate)
    if training.steps_per_epoch < 1:
        raise UserError(
            f"optim.batch_size={cfg.optim.batch_size}: larger than an epoch of {len(loaders['labeled'].dataset)} "
            "images; lower it"
        )
    return training
