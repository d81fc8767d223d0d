"""Datasets and loaders of U2PL."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from common.config import BatchPlan
from common.data.datasets import DatasetSpec, Item, Split, load_spec, resolve_split
from common.data.loaders import (
    Batch,
    Loader,
    SegmentationDataset,
    make_eval_loader,
    make_train_loader,
    match_lengths,
    oversample,
    paired,
    prefetch,
)
from common.data.transforms import IGNORE, EvalTransform, TrainTransform
from common.distributed import Dist
from common.errors import UserError
from projects.u2pl.config import Config

Pair = tuple[Batch, Batch | None]


@dataclass
class TrainingData:
    """Loaders of a run.

    Attributes:
        spec: the dataset.
        split: labeled and unlabeled items with their hash.
        labeled, unlabeled: loaders of equal length; supervised-only runs have no unlabeled one.
        accumulate: forwards per optimiser step.
    """

    spec: DatasetSpec
    split: Split
    labeled: Loader
    unlabeled: Loader | None
    accumulate: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch; forwards left over at its end are dropped."""
        return self.labeled.steps_per_epoch // self.accumulate

    def epoch(self, epoch: int, start_step: int, dist: Dist, channels_last: bool) -> Iterator[list[Pair]]:
        """Groups of `accumulate` batch pairs from `start_step` of an epoch on, on the device."""
        for loader in (self.labeled, self.unlabeled):
            if loader is not None:
                loader.set_epoch(epoch, start_step * self.accumulate)
        pairs: Iterator[Pair]
        if self.unlabeled is None:
            batches = prefetch(self.labeled, dist.device, channels_last=channels_last)
            pairs = ((batch, None) for batch in batches)
        else:
            pairs = paired(self.labeled, self.unlabeled, dist.device, channels_last=channels_last)
        group: list[Pair] = []
        for pair in pairs:
            group.append(pair)
            if len(group) == self.accumulate:
                yield group
                group = []

    def close(self) -> None:
        """End the decoding processes."""
        for loader in (self.labeled, self.unlabeled):
            if loader is not None:
                loader.close()

    def names(self, group: list[Pair]) -> Callable[[], str]:
        """A function that lists the image ids of a group, for messages."""

        def listed() -> str:
            ids = []
            for batch_l, batch_u in group:
                ids += [self.labeled.dataset.items[i].id for i in batch_l.index.tolist()]
                if batch_u is not None and self.unlabeled is not None:
                    ids += [self.unlabeled.dataset.items[i].id for i in batch_u.index.tolist()]
            return ", ".join(ids)

        return listed


def synchronised(cfg: Config, dist: Dist) -> bool:
    """Whether BatchNorm statistics are taken over all processes."""
    return cfg.model.sync_bn and dist.world_size > 1 and dist.device.type == "cuda"


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

    Semi-supervised runs bring both lists to the length of the unlabeled one, once, from the run's seed
    (QUIRK u2pl-13); supervised-only ones take the labeled list in file order, or sampled as the original does
    for Cityscapes.

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
        lonely = share % plan.per_forward == 1 and not synchronised(
            cfg, dist
        )  # BatchNorm cannot train on one image
        training = TrainingData(
            spec, split, loader(items, "labeled", plan.accumulate > 1 or lonely), None, plan.accumulate
        )
    else:
        labeled, unlabeled = match_lengths(split.labeled, split.unlabeled, seed)
        training = TrainingData(
            spec,
            split,
            loader(labeled, "labeled", True),
            loader(unlabeled, "unlabeled", True),
            plan.accumulate,
        )
    if training.steps_per_epoch < 1:
        raise UserError(
            f"optim.batch_size={cfg.optim.batch_size}: larger than an epoch of {len(training.labeled.dataset)} "
            "images; lower it"
        )
    return training


def evaluation_samples(
    cfg: Config, spec: DatasetSpec, items: list[Item], dist: Dist
) -> Iterator[tuple[Tensor, Tensor, str]]:
    """This rank's share of the images to evaluate: normalised (1, 3, H, W), label (1, H, W) and id."""
    transform = EvalTransform(mean=cfg.data.mean, std=cfg.data.std, resize=cfg.data.resize)
    dataset = SegmentationDataset(spec, items, transform, 0, "val", "stop", cache=False)
    for batch in make_eval_loader(dataset, 1, dist, workers=cfg.data.workers):
        yield batch.image, batch.label, items[int(batch.index)].id
