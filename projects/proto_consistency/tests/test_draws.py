"""The sampled pixels against the dense mask of the original, and their features against a dense resize."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from projects.proto_consistency.draws import gather_labels, gather_points, sample_points


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dense_mask(height: int, width: int, count: int, seed: int) -> Tensor:
    """One 1 in every patch, set strip by strip."""
    mask, draw = torch.zeros(height, width, dtype=torch.bool), generator(seed)
    ph, pw = height // count, width // count
    for strip in range(count):
        rows = torch.randint(ph, (count,), generator=draw)
        cols = torch.randint(pw, (count,), generator=draw)
        for j in range(count):
            mask[j * ph + rows[j], strip * pw + cols[j]] = True
    return mask


@pytest.mark.parametrize(("height", "width", "count"), [(33, 33, 4), (16, 16, 16), (20, 35, 5), (7, 9, 1)])
def test_positions_are_those_of_the_mask_in_its_order(height: int, width: int, count: int) -> None:
    for seed in range(3):
        rows, cols = sample_points(height, width, count, generator(seed))
        assert torch.equal(torch.stack((rows, cols), 1), dense_mask(height, width, count, seed).nonzero())


def test_one_pixel_per_patch_and_none_in_the_rest() -> None:
    draw = generator()
    counts = torch.zeros(4, 4)
    for _ in range(200):
        rows, cols = sample_points(33, 34, 4, draw)
        assert len(rows) == 16
        patches = (rows // 8) * 4 + cols // 8
        assert (
            len(patches.unique()) == 16
        )  # QUIRK quirks.border_never_sampled: row 32 and columns 32, 33 never
        counts += torch.bincount(rows % 8, minlength=8).view(2, 4).sum(0)
    assert counts.min() > 0


def test_all_pixels_where_patches_are_single_pixels() -> None:
    rows, cols = sample_points(3, 3, 3, generator())
    assert torch.equal(rows * 3 + cols, torch.arange(9))


@pytest.mark.parametrize(("height", "width", "count"), [(4, 9, 5), (9, 4, 5), (8, 8, 0)])
def test_more_patches_than_pixels_are_refused(height: int, width: int, count: int) -> None:
    with pytest.raises(UserError, match=f"granularity={count}: a crop of {height}x{width}"):
        sample_points(height, width, count, generator())


def dense_points(maps: Tensor, rows: Tensor, cols: Tensor, size: tuple[int, int]) -> Tensor:
    full = F.interpolate(maps, size, mode="bilinear", align_corners=True).permute(0, 2, 3, 1)
    picked = [full[i, r, c] for i, (r, c) in enumerate(zip(rows, cols, strict=True))]
    return torch.cat(picked)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(17, 21), (4, 5), (3, 2), (1, 7)])
def test_gathered_features_and_gradients_are_those_of_a_dense_resize(
    size: tuple[int, int], layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    maps = torch.randn(2, 6, 4, 5, dtype=torch.float64).to(memory_format=layout).requires_grad_(True)
    rows, cols = (torch.randint(side, (2, 10)) for side in size)
    weight = torch.randn(20, 6, dtype=torch.float64)
    gradients, values = [], []
    for look in (gather_points, dense_points):
        maps.grad = None
        values.append(look(maps, rows, cols, size))
        (values[-1] * weight).sum().backward()
        gradients.append(maps.grad)
    assert torch.allclose(*values, atol=1e-12)
    assert torch.allclose(*gradients, atol=1e-12)


def test_one_list_of_positions_serves_all_images() -> None:
    maps, rows, cols = torch.randn(3, 2, 4, 4), torch.tensor([0, 5, 8]), torch.tensor([8, 1, 0])
    single = gather_points(maps, rows, cols, (9, 9))
    assert single.shape == (9, 2)
    assert torch.equal(single, gather_points(maps, rows.expand(3, -1), cols.expand(3, -1), (9, 9)))
    assert torch.equal(single[3:6], gather_points(maps[1:2], rows, cols, (9, 9)))


def test_float32_is_as_close_as_the_dense_resize() -> None:
    torch.manual_seed(1)
    maps = torch.randn(1, 3, 129, 129)
    rows, cols = sample_points(513, 513, 32, generator())
    found = gather_points(maps, rows, cols, (513, 513))
    expected = dense_points(maps.double(), rows[None], cols[None], (513, 513))
    assert (found - expected).abs().max() < 2e-6


def test_labels_come_in_the_order_of_the_features() -> None:
    labels = torch.arange(2 * 5 * 6).view(2, 5, 6)
    maps = labels.unsqueeze(1).double()
    rows, cols = sample_points(5, 6, 2, generator())
    assert torch.equal(
        gather_labels(labels, rows, cols).double(), gather_points(maps, rows, cols, (5, 6))[:, 0]
    )
    every = torch.stack((rows, rows.flip(0))), torch.stack((cols, cols.flip(0)))
    assert torch.equal(gather_labels(labels, *every).double(), gather_points(maps, *every, (5, 6))[:, 0])
    assert gather_labels(labels > 7, rows, cols).dtype == torch.bool


def test_one_pixel() -> None:
    maps = torch.randn(2, 3, 1, 1)
    rows, cols = sample_points(1, 1, 1, generator())
    assert torch.equal(gather_points(maps, rows, cols, (1, 1)), maps.flatten(1))
