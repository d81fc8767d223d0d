"""Datasets and loaders of s4GAN: three streams of batches, each of which starts over on its own.

A run counts steps. Every stream goes through its images in an order of its own, drawn anew for every pass, and is
resumed at any step without replaying the steps before it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.config import BatchPlan
from common.data.loaders import EpochSampler, Key, Loader, SegmentationDataset, Transform
from common.data.spec import IGNORE, Item
from common.data.streams import Batches, TrainingData
from common.data.transforms import TrainTransform
from common.distributed import Dist
from common.errors import UserError
from common.numerics.precision import synchronized
from projects.s4gan_mlmt.config import CONTEXT, Config, Statistics
from projects.s4gan_mlmt.training_split import TrainingSplit, dataset_of, training_split
from projects.s4gan_mlmt.transforms import (
    CityscapesTransform,
    ContextTransform,
    VocTransform,
)


def train_transform(cfg: Config) -> Transform:
    """What `data.pipeline` makes of a training image and its label, labeled or not.

    QUIRK quirks.context_mean: s4GAN is trained on PASCAL-Context with the mean's channels in reverse, its supervised
    twin and the evaluation are not.

    Raises:
        UserError: the configuration asks for an augmentation that the authors' pipelines do not have.
    """
    data, quirks = cfg.data, cfg.quirks
    if data.pipeline == "house":
        return TrainTransform(
            mean=data.mean,
            std=data.std,
            crop_size=data.crop_size,
            scale_range=data.scale_range,
            flip=data.flip,
            rotation=data.rotation,
            blur=data.blur,
            resize=data.resize,
        )
    if data.rotation is not None or data.blur or data.resize is not None:
        raise UserError(
            f"data.rotation, data.blur, data.resize: pipeline {data.pipeline} has none of them; set data.pipeline=house"
        )
    if data.pipeline != "voc" and (data.random_scale or data.random_mirror):
        raise UserError(
            f"data.random_scale, data.random_mirror: are of pipeline voc; {data.pipeline} has its own, leave them out"
        )
    if data.pipeline == "voc":
        return VocTransform(data.crop_size, data.random_scale, data.random_mirror)
    if data.pipeline == "cityscapes":
        return CityscapesTransform(data.crop_size)
    mean = (CONTEXT.mean[2], CONTEXT.mean[1], CONTEXT.mean[0])
    reverse = quirks.context_mean == "reversed" and cfg.method.adversarial
    return ContextTransform(
        data.crop_size,
        statistics=Statistics(mean, CONTEXT.std) if reverse else CONTEXT,
        pad_label=0 if quirks.context_padding == "background" else IGNORE,
    )


class CyclingSampler(EpochSampler):
    """Batches of keys for one rank, pass after pass without an end; `set_range` picks the batches to yield.

    Every pass has an order of its own. Over all ranks a batch holds the images that one process would take. The last
    one of a pass is short unless `drop_last`; where it has fewer images than there are ranks, it is filled up with the
    first images of the pass, so that no rank is left without one.

    Args:
        length: number of images.
        batch_size: images per batch and rank.
        rank: this process.
        world_size: number of processes.
        seed: of the orders.
        drop_last: leave out the short last batch of a pass.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(length, batch_size, rank, world_size, seed=seed, pad=False, drop_last=drop_last)
        self.start = self.stop = 0

    @property
    def steps_per_epoch(self) -> int:
        """Batches of a whole pass."""
        whole = self.batch_size * self.world_size
        return self.length // whole if self.drop_last else math.ceil(self.length / whole)

    @property
    def smallest(self) -> int:
        """Images of the smallest batch that any rank gets."""
        whole = self.batch_size * self.world_size
        rest = 0 if self.drop_last else self.length % whole
        return max(rest // self.world_size, 1) if rest else self.batch_size

    def set_range(self, start: int, stop: int) -> None:
        """Choose the batches `start` (from 0, over all passes) to `stop` - 1 for the next iteration."""
        self.start, self.stop = start, stop

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose the rest of one pass."""
        first = epoch * self.steps_per_epoch
        self.set_range(first + start_step, first + self.steps_per_epoch)

    def __len__(self) -> int:
        return max(self.stop - self.start, 0)

    def __iter__(self) -> Iterator[list[Key]]:
        whole = self.batch_size * self.world_size
        current, order = -1, list[int]()
        for number in range(self.start, self.stop):
            done, place = divmod(number, self.steps_per_epoch)
            if done != current:
                current, order = done, self._order(done)
            first = place * whole
            last = max(min(first + whole, self.length), first + self.world_size)
            slots = range(first, last)[self.rank :: self.world_size]
            yield [Key(done, slot, order[slot % self.length]) for slot in slots]


def order_seed(seed: int, role: str) -> int:
    """Seed of the orders of one role: roles draw independently of each other, and so do runs of other seeds.

    The authors set no seed at all.
    """
    digest = hashlib.sha256(f"{seed}-{role}-order".encode()).digest()
    return int.from_bytes(digest[:6], "little")


@dataclass
class TrainingStreams(TrainingData):
    """Loaders of a run that counts steps; batches come in the order labeled, unlabeled, real.

    Attributes:
        training_split: the split with its permutation.
        method: name of the method, for the name of the file that the permutation is saved in.
        steps_per_round: steps between two saves, which the shared code takes for an epoch.
    """

    training_split: TrainingSplit
    method: str
    steps_per_round: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of a round."""
        return self.steps_per_round

    def steps(self, start: int, stop: int, dist: Dist, channels_last: bool) -> Iterator[list[Batches]]:
        """Groups of the optimizer steps `start` (from 0) to `stop` - 1: `accumulate` times one batch per loader.

        Images and labels are on the device, the next ones on their way. Step `start` gets the very batches it would
        get after all steps before it.
        """
        for loader in self.loaders.values():
            assert isinstance(loader.sampler, CyclingSampler)
            loader.sampler.set_range(start * self.accumulate, stop * self.accumulate)
        return self._groups(dist, channels_last)

    def epoch(self, epoch: int, start_step: int, dist: Dist, channels_last: bool) -> Iterator[list[Batches]]:
        """Groups from the step `start_step` of a round on; see `steps`."""
        first = epoch * self.steps_per_round
        return self.steps(first + start_step, first + self.steps_per_round, dist, channels_last)

    def save_split(self, run_dir: Path, dist: Dist) -> Path | None:
        """Write the permutation to the run directory, as the authors do; None where lists name the images."""
        return self.training_split.save(run_dir, self.method, dist)


def build_training_data(cfg: Config, dist: Dist, plan: BatchPlan) -> TrainingStreams:
    """Read the split and make the loaders `labeled` and, for an adversarial method, `unlabeled` and `real`.

    `real` shows the labeled images in an order and with draws of its own. Masks of unlabeled images are never read. A
    list that is shorter than one batch is repeated to fill it, each time with other draws.

    Args:
        cfg: the run's configuration.
        dist: this process.
        plan: labeled images per forward and forwards per step.

    Raises:
        UserError: missing files or lists; a batch that cannot be shared, or is never full; a last batch of one image
            with a network that cannot learn from it.
    """
    data, optim = cfg.data, cfg.optim
    transform = train_transform(cfg)
    spec = dataset_of(data)
    found = training_split(cfg, spec, masks=True)
    share = dist.world_size * plan.accumulate
    if cfg.method.adversarial and optim.unlabeled % share:
        raise UserError(
            f"optim.unlabeled_batch_size={optim.unlabeled}: cannot be shared by {dist.world_size} processes x "
            f"{plan.accumulate} forwards; use a multiple of {share}"
        )

    def loader(items: list[Item], role: str, batch_size: int) -> Loader:
        whole = batch_size * dist.world_size
        if 0 < len(items) < whole:
            items = (items * whole)[:whole]
        dataset = SegmentationDataset(
            spec, items, transform, cfg.run.seed, role, data.on_error, cache=data.cache
        )
        sampler = CyclingSampler(
            len(items),
            batch_size,
            dist.rank,
            dist.world_size,
            seed=order_seed(cfg.run.seed, role),
            drop_last=data.drop_last,
        )
        require_batches(cfg, sampler, role, dist)
        return Loader(dataset, sampler, data.workers, pin_memory=dist.device.type == "cuda")

    loaders = {"labeled": loader(found.split.labeled, "labeled", plan.per_forward)}
    if cfg.method.adversarial:
        loaders["unlabeled"] = loader(found.split.unlabeled, "unlabeled", optim.unlabeled // share)
        loaders["real"] = loader(found.split.labeled, "real", plan.per_forward)
    return TrainingStreams(
        spec, found.split, loaders, plan.accumulate, found, cfg.method.name, optim.steps_per_round
    )


def require_batches(cfg: Config, sampler: CyclingSampler, role: str, dist: Dist) -> None:
    """Refuse a stream without a full batch, or with one that BatchNorm of a pooled map cannot train on.

    Raises:
        UserError: says what to change.
    """
    if not sampler.steps_per_epoch:
        raise UserError(
            f"data: {sampler.length} {role} images do not fill one batch of {sampler.batch_size} on "
            f"{sampler.world_size} processes; lower the batch size, add images, or set data.drop_last=false"
        )
    pools = cfg.model.network == "deeplabv3p_wrn38" or (
        cfg.model.network in ("deeplabv3plus", "generic") and not synchronized(cfg.model.sync_bn, dist)
    )
    if sampler.smallest == 1 and pools and role != "real":
        larger = "unlabeled_batch_size" if role == "unlabeled" else "batch_size"
        alone = sampler.batch_size == 1
        remedy = f"raise optim.{larger} or optim.device_batch" if alone else "set data.drop_last=true"
        raise UserError(
            f"optim.batch_size: leaves a process one of {sampler.length} {role} images in some forwards, and the image "
            f"pooling of {cfg.model.network} cannot train on a single one; {remedy}, or use fewer processes"
        )
