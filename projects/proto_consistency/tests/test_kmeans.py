"""K-means on clusters whose centres are known, and on too few or equal features."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from projects.proto_consistency import kmeans
from projects.proto_consistency.kmeans import cluster


def blobs(sizes=(50, 30, 20, 5), dim: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of well separated clusters in mixed order, and their means by descending size."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(len(sizes), dim, generator=draw, dtype=torch.float64) * 20
    parts = [
        c + torch.randn(n, dim, generator=draw, dtype=torch.float64)
        for c, n in zip(centres, sizes, strict=True)
    ]
    rows = torch.cat(parts)
    return rows[torch.randperm(len(rows), generator=draw)], torch.stack([p.mean(dim=0) for p in parts])


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_centres_are_the_means_by_descending_size(seed: int, dtype: torch.dtype) -> None:
    rows, means = blobs(seed=seed)
    found = cluster(rows.to(dtype), 4, seed)
    assert torch.allclose(found.centres.double(), means, rtol=1e-5, atol=1e-5)
    assert found.sizes.tolist() == [50, 30, 20, 5]
    assert found.distinct == 4
    assert found.centres.dtype == dtype


def test_far_from_zero_float32_finds_the_same() -> None:
    rows, means = blobs()
    found = cluster((rows + 3e4).float(), 4, 0)
    assert (found.centres.double() - 3e4 - means).abs().max() < 0.02
    assert found.sizes.tolist() == [50, 30, 20, 5]


def test_the_same_seed_gives_the_same_bits_and_rows_may_come_in_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, _ = blobs(sizes=(40, 40, 40))
    first = cluster(rows, 5, 3)
    assert torch.equal(cluster(rows, 5, 3).centres, first.centres)
    monkeypatch.setattr(kmeans, "CHUNK", 7)
    assert torch.allclose(cluster(rows, 5, 3).centres, first.centres)


def test_more_attempts_cost_no_more() -> None:
    rows, _ = blobs(sizes=(20,) * 8, dim=2, seed=4)

    def cost(n_init: int) -> float:
        centres = cluster(rows, 8, 0, n_init).centres
        return float((rows[:, None] - centres).square().sum(-1).amin(1).sum())

    assert cost(10) <= cost(1) + 1e-9


def test_centres_are_a_fixed_point_of_means_and_assignment() -> None:
    rows = torch.randn(200, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = cluster(rows, 7, 0)
    labels = (rows[:, None] - found.centres).square().sum(-1).argmin(1)
    assert torch.bincount(labels, minlength=7).tolist() == found.sizes.tolist()
    assert (found.sizes[:-1] >= found.sizes[1:]).all()
    for k in range(7):
        assert torch.allclose(rows[labels == k].mean(0), found.centres[k])


def test_fewer_different_rows_than_centres_are_repeated_in_turn() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([-3.0, 0.5])
    found = cluster(torch.stack([a, b, a, a, b]), 5, 0)
    assert torch.allclose(found.centres, torch.stack([a, b, a, b, a]))
    assert found.sizes.tolist() == [3, 2, 3, 2, 3]
    assert found.distinct == 2


def test_as_many_different_rows_as_centres() -> None:
    rows = torch.tensor([[0.0], [5.0], [9.0], [9.0]])
    found = cluster(rows, 3, 0)
    assert sorted(found.centres.flatten().tolist()) == pytest.approx([0, 5, 9])
    assert found.distinct == 3


def test_a_single_row_stands_for_all() -> None:
    found = cluster(torch.tensor([[7.0, 8.0]]), 3, 0)
    assert torch.allclose(found.centres, torch.tensor([[7.0, 8.0]] * 3))
    assert found.distinct == 1


def test_equal_rows_give_no_nan() -> None:
    found = cluster(torch.full((1000, 4), 0.1), 4, 0)
    assert torch.allclose(found.centres, torch.full((4, 4), 0.1))
    assert found.distinct == 1


@pytest.mark.parametrize(("rows", "count", "n_init"), [(0, 2, 1), (3, 0, 1), (3, 2, 0)])
def test_nothing_to_cluster_is_refused(rows: int, count: int, n_init: int) -> None:
    with pytest.raises(ValueError, match="cannot give"):
        cluster(torch.zeros(rows, 2), count, 0, n_init)
