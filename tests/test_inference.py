"""Sliding windows, scales and flips against plain loops."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from common.measure.evaluation import Protocol
from common.measure.inference import (
    default_stride,
    flip_average,
    multi_scale,
    pad_to_crop,
    scaled_size,
    sliding_window,
    visit_counts,
    whole_image,
    window_starts,
    windows,
)
from common.models.deeplab import upsample
from tests.properties import few_examples


def position_dependent(x: torch.Tensor) -> torch.Tensor:
    """Scores that depend on content and on the place inside the window."""
    rows = torch.arange(x.shape[-2], dtype=x.dtype)[:, None]
    cols = torch.arange(x.shape[-1], dtype=x.dtype)[None, :]
    return torch.stack((x[:, 0] + rows, x[:, 1] * cols, x[:, 2] + x.mean((1, 2, 3))[:, None, None]), dim=1)


def test_cityscapes_windows_of_u2pl():
    assert windows((1024, 2048), (769, 769)) == [(r, c) for r in (0, 255) for c in (0, 513, 1026, 1279)]
    assert default_stride(769) == 513
    assert [default_stride(c) for c in (1, 2, 3, 512, 800)] == [1, 2, 2, 342, 534]


@few_examples
@given(st.integers(1, 12), st.data())
def test_windows_cover_the_side(crop, data):
    stride, side = data.draw(st.integers(1, crop)), data.draw(st.integers(crop, crop + 40))
    starts = window_starts(side, crop, stride)
    assert starts[0] == 0
    assert starts[-1] == side - crop
    assert all(0 < b - a <= stride for a, b in pairwise(starts))
    assert len(starts) == 1 or starts[-2] + crop < side  # no window more than needed


def test_padding_is_centred_with_the_odd_pixel_last():
    padded, before = pad_to_crop(torch.ones(1, 1, 4, 9), (7, 6))
    assert padded.shape[-2:] == (7, 9)
    assert before == (1, 0)
    assert padded[0, 0, :, 0].tolist() == [0, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("size", "crop", "stride"), [((20, 31), (9, 8), (6, 5)), ((5, 31), (9, 8), None), ((4, 3), (6, 6), None)]
)
def test_sliding_window_is_the_mean_over_covering_windows(size, crop, stride):
    torch.manual_seed(0)
    image = torch.randn(2, 3, *size, dtype=torch.double)
    padded, (top, left) = pad_to_crop(image, crop)
    total = torch.zeros(2, 3, *padded.shape[-2:], dtype=torch.double)
    count = torch.zeros(padded.shape[-2:], dtype=torch.double)
    for r, c in windows(size, crop, stride):
        total[..., r : r + crop[0], c : c + crop[1]] += position_dependent(
            padded[..., r : r + crop[0], c : c + crop[1]]
        )
        count[r : r + crop[0], c : c + crop[1]] += 1
    expected = (total / count)[..., top : top + size[0], left : left + size[1]]
    assert torch.equal(
        visit_counts(torch.zeros(1, 1, *count.shape), windows(size, crop, stride), crop).double(), count
    )
    for batch in (1, 2, 5, 100):
        actual = sliding_window(position_dependent, image, crop, stride, batch_size=batch)
        assert actual.dtype == torch.double
        torch.testing.assert_close(actual, expected, rtol=1e-14, atol=1e-14)


def test_batch_size_bounds_what_the_network_sees():
    seen = []

    def forward(x):
        seen.append(tuple(x.shape))
        return x

    sliding_window(forward, torch.zeros(1, 3, 20, 20), (8, 8), (6, 6), batch_size=4)
    assert seen == [(4, 3, 8, 8), (4, 3, 8, 8), (1, 3, 8, 8)]


def test_half_precision_scores_are_added_in_float32():
    image = torch.rand(1, 3, 12, 12)
    half = sliding_window(lambda x: x.bfloat16(), image, (8, 8), (2, 2))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, image.bfloat16().float())


def test_sizes_round_half_to_even():
    assert scaled_size((5, 7), 0.5) == (2, 4)
    assert scaled_size((5, 10), 1.0, 5) == (2, 5)
    assert scaled_size((10, 7), 1.0, 5) == (5, 4)
    assert scaled_size((10, 10), 0.5, 9) == (4, 4)
    with pytest.raises(UserError, match="use a larger scale"):
        scaled_size((3, 300), 0.1)
    with pytest.raises(UserError, match="use a larger scale"):
        scaled_size((300, 300), 0.001, 300)


def test_flip_average():
    image = torch.rand(1, 3, 4, 6)
    expected = (position_dependent(image) + position_dependent(image.flip(-1)).flip(-1)) / 2
    torch.testing.assert_close(flip_average(position_dependent)(image), expected)
    flipped = Protocol(kind="multi_scale_flip", flip=True)
    torch.testing.assert_close(flipped.scores(position_dependent, image), expected)


@pytest.mark.parametrize("align_corners", [True, False])
def test_scales_are_resized_back_and_averaged(align_corners):
    image = torch.rand(1, 3, 10, 20)
    sizes = []

    def forward(x):
        sizes.append(tuple(x.shape[-2:]))
        return position_dependent(x)

    actual = multi_scale(forward, image, (0.5, 1.0, 1.25), align_corners=align_corners)
    assert sizes == [(5, 10), (10, 20), (12, 25)]
    parts = [
        upsample(position_dependent(upsample(image, s, align_corners)), (10, 20), align_corners)
        for s in sizes
    ]
    torch.testing.assert_close(actual, sum(parts) / 3)


def test_base_size_and_windows_together():
    image = torch.rand(1, 3, 10, 20)
    sizes = set()

    def forward(x):
        sizes.add(tuple(x.shape[-2:]))
        return position_dependent(x)

    how = Protocol(kind="sliding_window", base_size=40, crop_size=(8, 12), batch_size=2)
    actual = how.scores(forward, image)
    assert sizes == {(8, 12)}
    expected = upsample(sliding_window(position_dependent, upsample(image, (20, 40)), (8, 12)), (10, 20))
    torch.testing.assert_close(actual, expected)


def test_a_forward_that_does_not_upsample_is_refused():
    with pytest.raises(UserError, match="must upsample"):
        whole_image(lambda x: x[..., ::4, ::4], torch.zeros(1, 3, 8, 8))


def test_steps_that_leave_pixels_out_are_refused():
    with pytest.raises(UserError, match="leave pixels out"):
        sliding_window(position_dependent, torch.zeros(1, 3, 9, 9), (8, 8), (8, 9))
