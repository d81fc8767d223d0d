"""The batches of one or several loaders side by side, in the groups of an optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.data.loaders import Batch, Loader, prefetch

if TYPE_CHECKING:
    from common.data.spec import DatasetSpec
    from common.data.split import Split
    from common.distributed import Dist

Batches = tuple[Batch, ...]


@dataclass
class TrainingData:
    """Loaders of a run.

    Attributes:
        spec: the dataset.
        split: labeled and unlabeled items with their hash.
        loaders: by role; their order is that of the batches in a group, "labeled" first. Supervised-only runs
            have no other.
        accumulate: forwards per optimizer step.
    """

    spec: DatasetSpec
    split: Split
    loaders: dict[str, Loader]
    accumulate: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; forwards left over at its end are dropped."""
        return next(iter(self.loaders.values())).steps_per_epoch // self.accumulate

    @property
    def skipped(self) -> int:
        """How many samples were replaced so far because of broken files."""
        return sum(loader.skipped for loader in self.loaders.values())

    def epoch(self, epoch: int, start_step: int, dist: Dist, channels_last: bool) -> Iterator[list[Batches]]:
        """Groups from the optimizer step `start_step` of an epoch on: `accumulate` times one batch per loader.

        Images and labels are on the device.
        """
        for loader in self.loaders.values():
            loader.set_epoch(epoch, start_step * self.accumulate)
        return self._groups(dist, channels_last)

    def _groups(self, dist: Dist, channels_last: bool) -> Iterator[list[Batches]]:
        """Groups of what the loaders are set to give."""
        streams = (
            prefetch(loader, dist.device, channels_last=channels_last) for loader in self.loaders.values()
        )
        group: list[Batches] = []
        for first, *others in zip(*streams, strict=True):
            group.append((first, *others))  # not zip's own tuple: it would keep these alive for a step
            if len(group) == self.accumulate:
                yield group
                group = []

    def names(self, group: list[Batches]) -> Callable[[], str]:
        """A function that lists the image ids of a group, for messages."""
        places = [
            batch.index for batches in group for batch in batches
        ]  # not the images: they would stay alive
        loaders = list(self.loaders.values())

        def listed() -> str:
            named = ((loaders[i % len(loaders)].dataset.items, index) for i, index in enumerate(places))
            return ", ".join(items[k].id for items, index in named for k in index.tolist())

        return listed

    def close(self) -> None:
        """End the decoding processes."""
        for loader in self.loaders.values():
            loader.close()
