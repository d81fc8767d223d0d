"""Datasets and loaders of UniMatch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from common.config import BatchPlan
from common.data.loaders import Loader, SegmentationDataset, make_train_loader, match_lengths
from common.data.spec import Item
from common.data.streams import TrainingData
from common.distributed import Dist
from common.errors import UserError
from common.mean_teacher.data import read_split
from common.numerics.precision import synchronized
from projects.unimatch.augment import Views
from projects.unimatch.config import Config

T = TypeVar("T")
APART = 1_000_000  # a sampler seed that differs from the others by more than any number of epochs


def repeated(items: Sequence[T], count: int, cut: bool = True) -> list[T]:
    """A list repeated in its order to `count` entries.

    QUIRK cut_labeled_list: V1 also cuts a longer one (`cut`): Cityscapes 1/2 has 1488 labeled and 1487 unlabeled
    images. V2 leaves it.
    """
    if not cut and len(items) >= count:
        return list(items)
    return (list(items) * math.ceil(count / len(items)))[:count]


def views(cfg: Config, strong: int) -> Views:
    """The transform of labeled (`strong` 0) and unlabeled images.

    Raises:
        UserError: the configuration asks for an augmentation that UniMatch does not have.
    """
    data = cfg.data
    if data.rotation is not None or data.blur:
        raise UserError("data.rotation, data.blur: UniMatch has neither; set them to null and false")
    return Views(
        mean=data.mean,
        std=data.std,
        crop_size=data.crop_size,
        scale_range=data.scale_range,
        flip=data.flip,
        resize=data.resize,
        strong=strong,
        box=cfg.method.cutmix,
    )


def roles(cfg: Config) -> dict[str, int]:
    """The loaders of a run, and how far the seed of their order is from that of the labeled one.

    V1 takes the boxes from a second loader of the unlabeled images: QUIRK quirks.same_photo: in the same order, with
    draws of its own. QUIRK quirks.paired_lists: labeled and unlabeled images are in the same order too.
    """
    if cfg.method.mode == "sup_only":
        return {"labeled": 0}
    first = 0 if cfg.quirks.paired_lists else APART
    found = {"labeled": 0, "unlabeled": first}
    return found if cfg.method.teacher else found | {"partner": first if cfg.quirks.same_photo else 2 * APART}


def smallest_forward(cfg: Config, images: int) -> int:
    """Images of the smallest forward that a step makes of `images` labeled and as many unlabeled ones."""
    method = cfg.method
    return images * method.strong_views if method.mode == "semi" and not method.teacher else images


def build_training_data(cfg: Config, dist: Dist, plan: BatchPlan) -> TrainingData:
    """Read the split and make the loaders; the labeled list is brought to the length of the unlabeled one.

    An epoch is a pass over the unlabeled images, in a supervised-only run over the labeled ones or
    `data.epoch_images`.

    Raises:
        UserError: missing files or lists, empty lists, a batch larger than the data, or a batch of one image without
            synchronized BatchNorm.
    """
    data, semi = cfg.data, cfg.method.mode == "semi"
    spec, split = read_split(cfg)
    if semi:
        match_lengths(split.labeled, split.unlabeled, 0)  # refuses lists that do not make an epoch
    alone = smallest_forward(cfg, plan.per_forward) == 1 and not synchronized(cfg.model.sync_bn, dist)
    if alone and not cfg.model.is_dpt:
        raise UserError(
            f"optim.batch_size={cfg.optim.batch_size}: one image per process and forward, on which BatchNorm cannot "
            "train; raise it or optim.device_batch, use fewer processes, or several GPUs with model.sync_bn=true"
        )
    length = len(split.unlabeled) if semi else data.epoch_images or len(split.labeled)
    labeled = repeated(split.labeled, length, cut=semi and not cfg.method.teacher)
    steps = math.ceil(min(length, len(labeled)) / dist.world_size) // plan.per_forward

    def loader(role: str, seed: int) -> Loader:
        items: list[Item] = labeled if role == "labeled" else split.unlabeled
        transform = views(cfg, 0 if role == "labeled" else cfg.method.strong_views)
        dataset = SegmentationDataset(
            spec, items, transform, cfg.run.seed, role, data.on_error, cache=data.cache
        )
        return make_train_loader(
            dataset, plan.per_forward, dist, workers=data.workers, sampler_seed=seed, steps=steps
        )

    loaders = {role: loader(role, seed) for role, seed in roles(cfg).items()}
    training = TrainingData(spec, split, loaders, plan.accumulate)
    if training.steps_per_epoch < 1:
        raise UserError(
            f"optim.batch_size={cfg.optim.batch_size}: larger than an epoch of {length} images; lower it"
        )
    return training
