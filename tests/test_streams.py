"""Batches of several loaders side by side."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.data.dataset_yaml import load_spec
from common.data.loaders import Loader, SegmentationDataset, make_train_loader
from common.data.spec import DatasetSpec
from common.data.split import Split, resolve_split
from common.data.streams import TrainingData
from common.data.transforms import TrainTransform
from common.distributed import Dist
from tests.tiny import write_dataset

ROLES = ("labeled", "unlabeled", "unlabeled_1")


@pytest.fixture
def farm(tmp_path: Path) -> tuple[DatasetSpec, Split]:
    spec = load_spec(str(write_dataset(tmp_path / "farm")))
    return spec, resolve_split(spec, "few")


def loader(farm: tuple[DatasetSpec, Split], role: str, count: int = 10, batch_size: int = 2) -> Loader:
    spec, split = farm
    transform = TrainTransform(
        mean=(0, 0, 0), std=(255, 255, 255), crop_size=(16, 16), scale_range=(0.5, 2.0), flip=True
    )
    dataset = SegmentationDataset(spec, split.unlabeled[:count], transform, 0, role, "skip")
    return make_train_loader(dataset, batch_size, Dist(), workers=0)


def stream(farm: tuple[DatasetSpec, Split], roles: int, accumulate: int = 1) -> TrainingData:
    return TrainingData(*farm, {role: loader(farm, role) for role in ROLES[:roles]}, accumulate)


@pytest.mark.parametrize("roles", [1, 2, 3])
def test_batches_go_side_by_side(farm: tuple[DatasetSpec, Split], roles: int) -> None:
    data = stream(farm, roles)
    groups = list(data.epoch(0, 0, Dist(), False))
    assert data.steps_per_epoch == len(groups) == 5
    alone = {role: list(loader(farm, role)) for role in ROLES[:roles]}
    for step, group in enumerate(groups):
        assert len(group) == 1
        assert len(group[0]) == roles
        for batch, role in zip(group[0], ROLES, strict=False):
            torch.testing.assert_close(batch, alone[role][step], rtol=0, atol=0)
        # all samplers draw the same permutation, as in the originals, and crops of their own
        assert all(torch.equal(batch.index, group[0][0].index) for batch in group[0])
        assert not any(torch.equal(batch.image, group[0][0].image) for batch in group[0][1:])


def test_groups_hold_the_forwards_of_a_step_and_drop_the_rest(farm: tuple[DatasetSpec, Split]) -> None:
    data, single = stream(farm, 2, accumulate=2), stream(farm, 2)
    batches = [group[0] for group in single.epoch(1, 0, Dist(), False)]
    groups = list(data.epoch(1, 0, Dist(), False))
    assert data.steps_per_epoch == 2
    assert [len(group) for group in groups] == [2, 2]
    for i, batch in enumerate(batch for group in groups for batch in group):
        assert torch.equal(batch[1].image, batches[i][1].image)
    resumed = list(data.epoch(1, 1, Dist(), False))
    assert len(resumed) == 1
    for mine, theirs in zip(resumed[0], groups[1], strict=True):
        assert all(torch.equal(a.image, b.image) for a, b in zip(mine, theirs, strict=True))


def test_memory_layout(farm: tuple[DatasetSpec, Split]) -> None:
    for batch in next(stream(farm, 2).epoch(0, 0, Dist(), True))[0]:
        assert batch.image.is_contiguous(memory_format=torch.channels_last)


def test_names_are_those_of_the_group_in_order(farm: tuple[DatasetSpec, Split]) -> None:
    data = stream(farm, 2, accumulate=2)
    items = farm[1].unlabeled
    group = next(data.epoch(0, 0, Dist(), False))
    expected = [items[i].id for batches in group for batch in batches for i in batch.index.tolist()]
    assert len(expected) == 8
    assert data.names(group)() == ", ".join(expected)


def test_replaced_samples_are_counted_over_all_loaders(farm: tuple[DatasetSpec, Split]) -> None:
    farm[1].unlabeled[3].image.write_bytes(b"")
    data = stream(farm, 3)
    list(data.epoch(0, 0, Dist(), False))
    assert [part.skipped for part in data.loaders.values()] == [1, 1, 1]
    assert data.skipped == 3


def test_close_ends_every_loader(farm: tuple[DatasetSpec, Split], monkeypatch: pytest.MonkeyPatch) -> None:
    data, closed = stream(farm, 3), []
    monkeypatch.setattr(Loader, "close", lambda self: closed.append(self.dataset.role))
    data.close()
    assert closed == list(ROLES)
