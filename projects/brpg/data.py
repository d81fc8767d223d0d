"""Datasets and loaders of BRPG."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.config import BatchPlan
from common.data.loaders import Transform
from common.data.spec import DatasetSpec, Item, check_pair
from common.data.streams import TrainingData
from common.distributed import Dist
from common.errors import UserError
from common.mean_teacher.data import build_loaders, read_split, train_transform
from projects.brpg.augment import TwoViews, WithPaste
from projects.brpg.config import Config

Array = NDArray[np.uint8]


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
    if method.mode == "sup_only" or not method.copy_paste:
        return own
    paste = dataclasses.replace(own, scale_range=method.paste_scale_range)
    photos: Any = Photos(spec, items, cfg.data.on_error == "skip")
    return WithPaste(own, paste, photos, len(items), method.paste_skip)


def build_training_data(cfg: Config, dist: Dist, plan: BatchPlan) -> TrainingData:
    """Read the split and make the loaders.

    Raises:
        UserError: missing files or lists, empty lists, a batch larger than the data, or an augmentation that only
            labeled images would get.
    """
    spec, split = read_split(cfg)
    labeled = labeled_transform(cfg, spec, split.labeled)
    unlabeled = labeled if cfg.method.mode == "sup_only" else unlabeled_transform(cfg)
    return build_loaders(cfg, spec, split, plan, dist, labeled, unlabeled)
