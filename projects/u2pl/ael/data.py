"""Images of the AEL variant: labeled ones with partners to paste from, unlabeled ones with partners chosen on the way.

Source: `u2pl/dataset/cityscapes_semi_cp.py` and the beginning of an iteration in `train.py`, branch `with_AEL`.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.config import BatchPlan
from common.data.loaders import (
    EpochSampler,
    Key,
    Loader,
    Sample,
    SegmentationDataset,
    make_train_loader,
    oversample,
)
from common.data.spec import DatasetSpec, Item
from common.data.split import Split
from common.data.streams import TrainingData
from common.data.transforms import TrainTransform
from common.distributed import Dist
from common.errors import UserError
from common.numerics.precision import synchronized
from projects.u2pl.config import Config, require_ael

LOG = logging.getLogger("semiseg")


def labeled_pass(epoch: int, step: int, steps_per_epoch: int, batches: int) -> tuple[int, int]:
    """Which pass over the labeled list, and which of its `batches`, serves a step of an epoch (all from 0).

    An epoch has as many steps as the unlabeled loader. It starts the labeled list anew, with the order of the last
    pass of the epoch before; every exhaustion within an epoch gives a new order.
    """
    restarts = -(-steps_per_epoch // batches) - 1
    return epoch * restarts + step // batches, step % batches


class PassSampler(EpochSampler):
    """Goes through a list as often as epochs of `epoch_steps` batches need it, see `labeled_pass`.

    Every sample has a slot of its own in its epoch, so that a photo is cut differently in every pass.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        epoch_steps: int,
        drop_last: bool = False,
    ) -> None:
        super().__init__(length, batch_size, rank, world_size, drop_last=drop_last)
        self.epoch_steps = epoch_steps

    @property
    def batches(self) -> int:
        """Batches of a pass on this rank."""
        return super().steps_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        """Batches of a whole epoch on this rank."""
        return self.epoch_steps

    def __iter__(self) -> Iterator[list[Key]]:
        own = range(self.rank, self.slots, self.world_size)
        current, order = -1, [0]
        for step in range(self.start_step, self.epoch_steps):
            number, batch = labeled_pass(self.epoch, step, self.epoch_steps, self.batches)
            if number != current:
                current, order = number, self._order(number)
            before = step // self.batches * self.slots
            slots = own[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [Key(self.epoch, before + slot, order[slot % self.length]) for slot in slots]


class PartnerDataset(SegmentationDataset):
    """For every labeled sample another labeled photo to paste from; zeros for a share `without` of the samples.

    Its draws are its own, so that a labeled photo is cut as it would be without a partner.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        items: Sequence[Item],
        transform: TrainTransform,
        seed: int,
        on_error: str,
        *,
        cache: bool,
        without: float,
    ) -> None:
        super().__init__(spec, items, transform, seed, "partner", on_error, cache=cache)
        self.without, self.size = without, transform.crop_size

    def __getitem__(self, key: Key) -> Sample:
        """The partner of the labeled sample with this key; raises as `SegmentationDataset` does."""
        rng = random.Random(f"{self.seed}-{self.role}-choice-{key.epoch}-{key.slot}")
        if rng.random() > self.without:
            return super().__getitem__(key._replace(position=rng.randrange(len(self))))
        return Sample(torch.zeros(3, *self.size), torch.zeros(self.size, dtype=torch.long), key.position, [])


@dataclass
class AelData(TrainingData):
    """Loaders `labeled`, `unlabeled` and `partner`, and the unlabeled images once more.

    Attributes:
        second: unlabeled images as the second of a pair. No loader can read them ahead, because only the middle of
            one step tells which the next one needs; threads decode them during the rest of it.
        workers: number of these threads; 0 decodes when an image is needed.
        replaced: broken files among them so far (`data.on_error=skip`).
    """

    second: SegmentationDataset
    workers: int = 0
    replaced: int = 0
    _threads: ThreadPoolExecutor | None = None
    _ahead: dict[Key, Future[Sample]] = field(default_factory=dict)

    @property
    def skipped(self) -> int:
        """How many samples were replaced so far because of broken files."""
        return super().skipped + self.replaced

    def second_images(
        self, positions: Sequence[int], epoch: int, forward: int, dist: Dist
    ) -> tuple[Tensor, list[int]]:
        """Images (P, 3, H, H) on the host at `positions` of the unlabeled list, and where they come from.

        Their augmentation depends on the seed, the epoch, the number of the forward in it, and the rank, so
        nothing has to be kept for a resumed run. The second value differs from `positions` where a broken file
        was replaced.
        """
        keys = _keys(positions, epoch, forward, dist)
        samples = [self._ahead.pop(key).result() if key in self._ahead else self.second[key] for key in keys]
        for line in (line for sample in samples for line in sample.skipped):
            self.replaced += 1
            LOG.warning("skipped: %s", line)
        return torch.stack([sample.image for sample in samples]), [sample.position for sample in samples]

    def decode_ahead(self, positions: Sequence[int], epoch: int, forward: int, dist: Dist) -> None:
        """Begin with what `second_images` will be asked for, in threads."""
        if self.workers:
            self._threads = self._threads or ThreadPoolExecutor(self.workers, "second")
            for key in _keys(positions, epoch, forward, dist):
                self._ahead[key] = self._threads.submit(self.second.__getitem__, key)

    def close(self) -> None:
        """End the decoding threads and processes."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        self._threads, self._ahead = None, {}
        super().close()


def _keys(positions: Sequence[int], epoch: int, forward: int, dist: Dist) -> list[Key]:
    """Those of the second images of a forward: all forwards and ranks of an epoch have slots of their own."""
    before = forward * len(positions)
    return [Key(epoch, (before + k) * dist.world_size + dist.rank, one) for k, one in enumerate(positions)]


def adaptive_data(
    cfg: Config, spec: DatasetSpec, split: Split, transform: TrainTransform, plan: BatchPlan, dist: Dist
) -> AelData:
    """Loaders for lists of their own lengths: an epoch is that of the unlabeled one.

    Raises:
        UserError: an odd or too small batch per process, or lists that do not fill one.
    """
    ael, data, seed, share = require_ael(cfg), cfg.data, cfg.run.seed, plan.per_forward
    require_pairs(cfg, share, dist)
    labeled, unlabeled = (oversample(items, len(items), seed) for items in (split.labeled, split.unlabeled))

    def dataset(items: Sequence[Item], role: str) -> SegmentationDataset:
        return SegmentationDataset(spec, items, transform, seed, role, data.on_error, cache=data.cache)

    others = make_train_loader(dataset(unlabeled, "unlabeled"), share, dist, workers=data.workers)
    one_left = math.ceil(len(labeled) / dist.world_size) % share == 1
    drop_last = one_left and not synchronized(cfg.model.sync_bn, dist)

    def passes(photos: SegmentationDataset) -> Loader:
        sampler = PassSampler(
            len(labeled),
            share,
            dist.rank,
            dist.world_size,
            epoch_steps=others.steps_per_epoch,
            drop_last=drop_last,
        )
        if not sampler.batches:
            raise UserError(
                f"data.split: {len(labeled)} labeled images give each of {dist.world_size} processes less than two, "
                "on which BatchNorm cannot train; label more or use fewer processes"
            )
        return Loader(photos, sampler, data.workers, pin_memory=dist.device.type == "cuda")

    resized = dataclasses.replace(transform, scale_range=ael.paste_resize)
    partners = PartnerDataset(
        spec, labeled, resized, seed, data.on_error, cache=data.cache, without=ael.paste_prob
    )
    loaders = {
        "labeled": passes(dataset(labeled, "labeled")),
        "unlabeled": others,
        "partner": passes(partners),
    }
    return AelData(spec, split, loaders, plan.accumulate, dataset(unlabeled, "second"), data.workers)


def require_pairs(cfg: Config, share: int, dist: Dist) -> None:
    """Refuse a forward of `share` unlabeled images that leaves half an image, or one on which BatchNorm cannot train.

    Raises:
        UserError: names the settings.
    """
    batch = f"optim.batch_size={cfg.optim.batch_size}, optim.device_batch={cfg.optim.device_batch}"
    if share % 2:
        raise UserError(
            f"{batch}: a forward takes {share} unlabeled images, and method.ael keeps one of every two; "
            "use an even number"
        )
    if share == 2 and not synchronized(cfg.model.sync_bn, dist):
        raise UserError(
            f"{batch}: method.ael leaves one mixed image per forward, on which BatchNorm cannot train; take 4 or "
            "more at once (optim.device_batch), or several GPUs with model.sync_bn=true"
        )
