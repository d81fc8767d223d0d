"""Lists brought to one length: which item stands at which position."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from common.data import loaders as L
from common.data.transforms import TrainTransform
from common.distributed import Dist
from common.errors import UserError
from projects.cps.stretched import StretchedDataset, item_at
from tests.test_loaders import MEAN, STD, FakeSpec, assert_same, collected, items
from tests.test_loaders import dataset as plain


def dataset(count: int, spec: FakeSpec | None = None, role: str = "labeled", *, length: int, **options):
    transform = TrainTransform(MEAN, STD, (12, 12))
    return StretchedDataset(spec or FakeSpec(), items(count), transform, 3, role, length=length, **options)


def chosen(data: StretchedDataset, epoch: int = 0) -> list[int]:
    """The item behind every position of `data` in an epoch in list order."""
    return [data[L.Key(epoch, position, position)].position for position in range(len(data))]


def test_list_is_repeated_and_topped_up_with_random_items() -> None:
    data = dataset(5, length=5 * 300 + 4)  # the remainder is drawn over and over, epoch by epoch
    assert len(data) == 1504
    assert chosen(data)[:1500] == list(range(5)) * 300
    tails = [[data[L.Key(epoch, slot, slot)].position for slot in range(1500, 1504)] for epoch in range(300)]
    counts = Counter(i for tail in tails for i in tail)
    assert set(counts) == set(range(5))
    assert all(abs(count - 240) < 60 for count in counts.values())  # 4.3 standard deviations
    assert any(len(set(tail)) < 4 for tail in tails)  # drawn independently, so one may come twice
    assert chosen(data)[1500:] == tails[0]


def test_item_at_a_position_of_a_stretched_list() -> None:
    for count, length in ((7, 26), (5, 5), (10, 4), (3, 100), (1, 1)):
        whole = list(range(count)) * (length // count) or list(range(length))
        tail = [None] * (length - len(whole))
        assert [item_at(i, count, length) for i in range(length)] == whole + tail


def test_length_of_a_multiple_draws_nothing_and_a_short_one_takes_the_first_items() -> None:
    key = L.Key(1, 3, 2)
    for length in (4, 12):
        data = dataset(4, length=length)
        assert torch.equal(data[key].image, plain(4)[key].image)
        assert chosen(data) == list(range(4)) * (length // 4)
    assert chosen(dataset(9, length=3)) == [0, 1, 2]
    seen = collected(L.make_train_loader(dataset(9, length=3), 3, Dist(), workers=0), 0)
    assert sorted(int(i) for batch in seen for i in batch.index) == [0, 1, 2]


@pytest.mark.parametrize("options", [{"workers": 0}, {"workers": 2}], ids=str)
def test_random_positions_depend_on_neither_workers_nor_resume(options: dict) -> None:
    reference = L.make_train_loader(dataset(5, length=9), 3, Dist(), workers=1)
    loader = L.make_train_loader(dataset(5, length=9), 3, Dist(), **options)
    for epoch in (0, 1):
        assert_same(collected(reference, epoch), collected(loader, epoch))
        for step in (1, 2):
            assert_same(collected(reference, epoch)[step:], collected(loader, epoch, start=step))


def test_no_items_cannot_be_stretched() -> None:
    with pytest.raises(UserError, match="list of unlabeled images is empty"):
        dataset(0, role="unlabeled", length=4)


def test_skip_works_behind_the_list() -> None:
    data = dataset(3, FakeSpec(broken=("0", "2")), on_error="skip", length=11)
    assert set(chosen(data)) == {1}
