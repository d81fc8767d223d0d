"""Seeded, resumable loaders whose samples do not depend on workers, prefetching or the point of resume.

Every sample's random draws come from `random.Random("<seed>-<role>-<epoch>-<slot>")`, where the slot is the
sample's place in the epoch's order over all ranks. The order itself is that of torch's `DistributedSampler`,
which the original repositories use.
"""

from __future__ import annotations

import logging
import math
import os
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from common.data.spec import check_pair
from common.errors import UserError

if TYPE_CHECKING:
    from common.data.spec import DatasetSpec, Item
    from common.distributed import Dist

LOG = logging.getLogger("semiseg")
UNSEEN_LABELED = 0.01  # Cityscapes 1/2 is published with 1488 labeled and 1487 unlabeled images

T = TypeVar("T")
Uint8 = NDArray[np.uint8]


# decoded photo and label -> image float32 (3, h, w) and label int64 (h, w), None without a mask; with the same draws
Transform = Callable[[Uint8, Uint8 | None, random.Random], tuple[Tensor, Any]]


class Batch(NamedTuple):
    """Images float32 (B, 3, H, W), labels int64 (B, H, W) or None without masks, item positions int64 (B,)."""

    image: Tensor
    label: Any
    index: Tensor  # type: ignore[assignment]  # the contract's name; tuple.index is of no use here


class Key(NamedTuple):
    """One sample of an epoch: its epoch, its slot in the epoch's order over all ranks, its item's position."""

    epoch: int
    slot: int
    position: int


def oversample(items: Sequence[T], count: int, seed: int) -> list[T]:
    """`count` of `items` in random order: a sample without replacement of the list, repeated as often as needed.

    As the dataset constructors of the originals: python's `random.seed(seed)`, then `random.sample`.

    Raises:
        UserError: `items` is empty while some are wanted.
    """
    if not items and count:
        raise UserError("data: the list of images is empty; check the split's list file")
    repeats = 1 if len(items) >= count else math.ceil(count / len(items))
    return random.Random(seed).sample(list(items) * repeats, count)


def match_lengths(labeled: Sequence[T], unlabeled: Sequence[T], seed: int) -> tuple[list[T], list[T]]:
    """Both lists brought to the unlabeled count by `oversample` with the same seed.

    Raises:
        UserError: one is empty, or so many labeled images exceed the unlabeled ones that more than 1 % of
            them would never be seen.
    """
    counts = f"{len(labeled)} labeled and {len(unlabeled)} unlabeled images"
    if not labeled:
        raise UserError(f"data.split: {counts}; put at least one image into labeled.txt")
    if not unlabeled:
        raise UserError(f"data.split: {counts}; add unlabeled.txt or train with method.mode=sup_only")
    if len(labeled) - len(unlabeled) > UNSEEN_LABELED * len(labeled):
        raise UserError(
            f"data.split: {counts}, but an epoch is as long as the unlabeled list; move labeled images to "
            "unlabeled.txt, add unlabeled images, or train supervised only"
        )
    return oversample(labeled, len(unlabeled), seed), oversample(unlabeled, len(unlabeled), seed)


class EpochSampler(Sampler[list[Key]]):
    """Batches of keys of one epoch for one rank; `set_epoch` picks the epoch and the step to start from.

    With `shuffle` the order is a permutation from a generator seeded with `seed + epoch`, or, without `reshuffle`,
    with `seed` in every epoch. With `pad` it is extended by its own beginning to a multiple of the world size, so
    that all ranks have equally many. Rank r then takes every W-th slot from r on. `steps` ends the epoch after that
    many batches.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        seed: int = 0,
        shuffle: bool = True,
        reshuffle: bool = True,
        pad: bool = True,
        drop_last: bool = True,
        steps: int | None = None,
    ) -> None:
        self.length, self.batch_size = length, batch_size
        self.rank, self.world_size = rank, world_size
        self.seed, self.shuffle, self.reshuffle, self.drop_last = seed, shuffle, reshuffle, drop_last
        self.steps = steps
        self.slots = math.ceil(length / world_size) * world_size if pad else length
        self.epoch = self.start_step = 0

    @property
    def steps_per_epoch(self) -> int:
        """Batches of a whole epoch on this rank."""
        own = len(range(self.rank, self.slots, self.world_size))
        available = own // self.batch_size if self.drop_last else math.ceil(own / self.batch_size)
        return available if self.steps is None else min(self.steps, available)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose the epoch of the next iteration and how many of its batches are already done."""
        self.epoch, self.start_step = epoch, start_step

    def __len__(self) -> int:
        return max(self.steps_per_epoch - self.start_step, 0)

    def __iter__(self) -> Iterator[list[Key]]:
        order = self._order(self.epoch)
        own = range(self.rank, self.slots, self.world_size)
        for step in range(self.start_step, self.steps_per_epoch):
            slots = own[step * self.batch_size : (step + 1) * self.batch_size]
            yield [Key(self.epoch, slot, order[slot % self.length]) for slot in slots]

    def _order(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.length))
        generator = torch.Generator().manual_seed(self.seed + (epoch if self.reshuffle else 0))
        return torch.randperm(self.length, generator=generator).tolist()


class Sample(NamedTuple):
    """One transformed photo; `skipped` holds a line for each broken file that it stands in for."""

    image: Tensor
    label: Any
    position: int
    skipped: list[str]


class SegmentationDataset(Dataset[Sample]):
    """Decoded and transformed items of one role.

    Args:
        spec: Decodes images and labels.
        items: The items; an item may occur several times.
        transform: Applied to every decoded pair with the sample's own generator.
        seed: The run's seed.
        role: "labeled", "unlabeled", "val" ...: roles draw independently of each other.
        on_error: "stop" raises on a broken file; "skip" takes the next readable item instead and says so.
        cache: Keep decoded arrays in memory, in each worker process; for small datasets.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        items: Sequence[Item],
        transform: Transform,
        seed: int,
        role: str,
        on_error: str = "stop",
        *,
        cache: bool = False,
    ) -> None:
        self.spec, self.items, self.transform = spec, list(items), transform
        self.seed, self.role, self.on_error = seed, role, on_error
        self._cache: dict[str, tuple[Uint8, Uint8 | None]] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.items)

    def position(self, key: Key, rng: random.Random) -> int:
        """Which item a key stands for."""
        del rng
        return key.position

    def __getitem__(self, key: Key) -> Sample:
        """The sample of `key`.

        Raises:
            UserError: the file is broken or does not fit its label; with "skip", no item can be read at all.
        """
        rng = random.Random(f"{self.seed}-{self.role}-{key.epoch}-{key.slot}")
        skipped: list[str] = []
        first = self.position(key, rng)
        for shift in range(len(self.items)):
            position = (first + shift) % len(self.items)
            try:
                image, label = self._decoded(self.items[position])
            except UserError as error:
                if self.on_error == "stop":
                    raise UserError(f"{error}, or set data.on_error=skip to go on without it") from error
                skipped.append(str(error))
                continue
            x, y = self.transform(image, label, rng)
            return Sample(x, y, position, skipped)
        raise UserError(
            f"data: none of the {len(self.items)} {self.role} items can be read; first: {skipped[0]}"
        )

    def _decoded(self, item: Item) -> tuple[Uint8, Uint8 | None]:
        if self._cache is not None and item.id in self._cache:
            return self._cache[item.id]
        image = self.spec.load_image(item)
        label = None
        if item.label is not None:
            label = self.spec.load_label(item)
            check_pair(item, image, label)
        if self._cache is not None:
            self._cache[item.id] = image, label
        return image, label


class _Loaded(NamedTuple):
    """What a worker hands over: a batch, or the one-line reason why there is none."""

    batch: Batch | None
    error: str
    skipped: list[str]


class _BatchReader(Dataset[_Loaded]):
    """Reads whole batches, so that a user's mistake crosses the process boundary as a value, not a traceback."""

    def __init__(self, dataset: SegmentationDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, keys: list[Key]) -> _Loaded:
        try:
            samples = [self.dataset[key] for key in keys]
            sizes = {
                tuple(sample.image.shape[1:]): self.dataset.items[sample.position].id for sample in samples
            }
            if len(sizes) > 1:
                listed = ", ".join(f"'{name}' {size[1]}x{size[0]}" for size, name in sizes.items())
                raise UserError(
                    f"data: images of different sizes in one batch ({listed}); use batch size 1 or a crop"
                )
        except UserError as error:
            return _Loaded(None, str(error), [])
        labels = [sample.label for sample in samples]
        batch = Batch(
            default_collate([sample.image for sample in samples]),
            None if any(label is None for label in labels) else default_collate(labels),
            torch.tensor([sample.position for sample in samples]),
        )
        return _Loaded(batch, "", [line for sample in samples for line in sample.skipped])


class Loader:
    """Batches of one dataset for one rank, decoded in worker processes that live as long as the loader.

    Attributes:
        dataset: The dataset read.
        sampler: Decides the order; see `set_epoch`.
        skipped: How many samples were replaced so far because of broken files (`on_error` "skip").
    """

    def __init__(
        self, dataset: SegmentationDataset, sampler: EpochSampler, workers: int, *, pin_memory: bool
    ) -> None:
        self.dataset, self.sampler = dataset, sampler
        self.skipped = 0
        self._reported: set[str] = set()
        self._loader = DataLoader(
            _BatchReader(dataset),
            batch_size=None,
            sampler=sampler,
            num_workers=workers,
            collate_fn=_unchanged,
            pin_memory=pin_memory,
            worker_init_fn=_start_worker,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # the global one belongs to the networks; iterating must not advance it
        )

    @property
    def steps_per_epoch(self) -> int:
        """Batches of a whole epoch."""
        return self.sampler.steps_per_epoch

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose the epoch of the next iteration and how many of its batches are already done."""
        self.sampler.set_epoch(epoch, start_step)

    def close(self) -> None:
        """End the worker processes now; a later iteration would start new ones.

        Leaving it to the garbage collector can take torch five seconds per worker, when the loader is part
        of a reference cycle (as a caught exception's traceback makes one).
        """
        shut_down = getattr(self._loader._iterator, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()
        self._loader._iterator = None

    def __len__(self) -> int:
        """Batches that the next iteration will yield."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        """The batches from the chosen step to the end of the epoch, on the host.

        Raises:
            UserError: a file is broken, or a worker process was killed.
        """
        batches = iter(self._loader)
        while True:
            try:
                loaded = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                self.close()
                raise UserError(
                    f"data.workers={self._loader.num_workers}: a loader process died ({str(error).splitlines()[0]}); "
                    "most often memory or /dev/shm is full: lower data.workers, or set it to 0 to see the cause"
                ) from error
            if loaded.batch is None:
                self.close()
                raise UserError(loaded.error)
            for line in loaded.skipped:
                self.skipped += 1
                if line not in self._reported:
                    self._reported.add(line)
                    LOG.warning("skipped: %s", line)
            yield loaded.batch


def make_train_loader(
    dataset: SegmentationDataset,
    batch_size: int,
    dist: Dist,
    *,
    workers: int = 2,
    sampler_seed: int = 0,
    reshuffle: bool = True,
    drop_last: bool = True,
    steps: int | None = None,
) -> Loader:
    """Shuffled loader of this rank's share of `dataset`, `batch_size` images a step.

    The originals keep the sampler's seed at 0 whatever the run's seed, and give both loaders of a
    semi-supervised run the same one. Without `reshuffle` every epoch has the order of the first.
    `steps` ends an epoch after that many batches.

    Raises:
        UserError: the dataset is too small for one step.
    """
    sampler = EpochSampler(
        len(dataset),
        batch_size,
        dist.rank,
        dist.world_size,
        seed=sampler_seed,
        reshuffle=reshuffle,
        drop_last=drop_last,
        steps=steps,
    )
    if not sampler.steps_per_epoch:
        raise UserError(
            f"data: {len(dataset)} {dataset.role} images on {dist.world_size} processes do not fill one batch of "
            f"{batch_size}; lower the batch size or add images"
        )
    return Loader(dataset, sampler, workers, pin_memory=dist.device.type == "cuda")


def make_eval_loader(
    dataset: SegmentationDataset, batch_size: int, dist: Dist, *, workers: int = 2
) -> Loader:
    """Loader in list order of this rank's share of `dataset`; over all ranks every image comes exactly once.

    Ranks may differ by one batch, so nothing collective may happen inside the loop over it.
    """
    sampler = EpochSampler(
        len(dataset), batch_size, dist.rank, dist.world_size, shuffle=False, pad=False, drop_last=False
    )
    return Loader(dataset, sampler, workers, pin_memory=dist.device.type == "cuda")


def prefetch(
    batches: Iterable[Batch], device: torch.device, *, channels_last: bool = False
) -> Iterator[Batch]:
    """The same batches in the same order with image and label on `device`; `index` stays on the host.

    On a GPU the next batch is copied on a stream of its own while the current one is used.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    if device.type != "cuda":
        for batch in batches:
            yield _on_device(batch, device, layout)
        return
    stream = torch.cuda.Stream(device)
    source = iter(batches)
    upcoming = _copied_aside(source, device, layout, stream)
    while upcoming is not None:
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        batch = upcoming
        for tensor in batch[:2]:
            if tensor is not None:
                tensor.record_stream(current)  # its memory belongs to the copying stream
        upcoming = _copied_aside(source, device, layout, stream)
        yield batch


def _on_device(batch: Batch, device: torch.device, layout: torch.memory_format) -> Batch:
    image = batch.image.to(device, non_blocking=True).contiguous(memory_format=layout)
    label = None if batch.label is None else batch.label.to(device, non_blocking=True)
    return Batch(image, label, batch.index)


def _copied_aside(
    source: Iterator[Batch], device: torch.device, layout: torch.memory_format, stream: torch.cuda.Stream
) -> Batch | None:
    """The next batch, its copy to `device` enqueued on `stream`; None at the end."""
    batch = next(source, None)
    if batch is None:
        return None
    with torch.cuda.stream(stream):
        return _on_device(batch, device, layout)


def _unchanged(loaded: Any) -> Any:
    return loaded


def _start_worker(worker: int) -> None:
    """Make a loader process single-threaded, and let it ignore stop signals, which concern the training process.

    A launcher signals the whole process group. The training process then still needs its batches to finish
    the step and save, so a worker obeys SIGTERM from its parent only.
    """
    del worker
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_on_parents_signal, daemon=True).start()


def _end_on_parents_signal() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
