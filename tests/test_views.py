"""Views of photos: their draws, and what becomes of a photo."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.views import (
    ColorDraw,
    WindowDraw,
    draw_colors,
    draw_window,
    long_side_size,
    place,
    split_views,
    strong_view,
)


def photo(height: int = 30, width: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


def test_long_side():
    assert long_side_size(30, 40, 20) == (15, 20)
    assert long_side_size(40, 30, 20) == (20, 15)
    assert long_side_size(30, 30, 7) == (7, 7)
    assert long_side_size(10, 40, 2) == (1, 2)  # half rounds up


def test_draws_stay_in_their_ranges_and_are_as_frequent_as_said():
    rng = random.Random(0)
    windows = [draw_window(rng, 30, 40, (33, 33), (0.5, 2.0), flip=True) for _ in range(2000)]
    sides = [draw.long_side for draw in windows]
    assert (min(sides), max(sides)) == (20, 80)
    for draw in windows:
        height, width = long_side_size(30, 40, draw.long_side)
        assert 0 <= draw.col <= max(width - 33, 0)
        assert 0 <= draw.row <= max(height - 33, 0)
    assert np.mean([draw.mirrored for draw in windows]) == pytest.approx(0.5, abs=0.04)
    found = [draw_colors(rng) for _ in range(2000)]
    assert np.mean([draw.gray for draw in found]) == pytest.approx(0.2, abs=0.04)
    radii = np.array([draw.blur_radius for draw in found])
    assert np.mean(radii > 0) == pytest.approx(0.5, abs=0.04)
    assert 0.1 <= radii[radii > 0].min() <= radii.max() <= 2.0
    jitters = [draw.jitter for draw in found if draw.jitter]
    assert len(jitters) / 2000 == pytest.approx(0.8, abs=0.04)
    assert len({tuple(k for k, _ in jitter) for jitter in jitters}) == 24
    factors = np.array([[factor for _, factor in sorted(jitter)] for jitter in jitters])
    assert factors.min(axis=0) == pytest.approx([0.5, 0.5, 0.5, -0.25], abs=0.01)
    assert factors.max(axis=0) == pytest.approx([1.5, 1.5, 1.5, 0.25], abs=0.01)
    assert not any(draw_window(rng, 30, 40, (33, 33), (0.5, 2.0), flip=False).mirrored for _ in range(20))


WHOLE, PLAIN = WindowDraw(40, 0, 0, False), ColorDraw((), False, 0.0)
SMOOTH = Image.Resampling.BILINEAR


def test_without_changes_the_views_are_the_photo():
    image = Image.fromarray(photo())
    weak = place(image, WHOLE, (30, 40), SMOOTH, 0)
    assert np.array_equal(np.asarray(weak), photo())
    assert np.array_equal(np.asarray(strong_view(weak, PLAIN)), photo())
    mirrored = place(image, WHOLE._replace(mirrored=True), (30, 40), SMOOTH, 0)
    assert np.array_equal(np.asarray(mirrored), photo()[:, ::-1])


def test_border_lies_right_and_below_black_and_labeled_254():
    image, label = Image.fromarray(photo()), Image.fromarray(np.full((30, 40), 7, np.uint8))
    weak, target = (
        np.asarray(place(image, WHOLE, (50, 60), SMOOTH, 0)),
        np.asarray(place(label, WHOLE, (50, 60), Image.Resampling.NEAREST, 254)),
    )
    assert np.array_equal(weak[:30, :40], photo())
    assert not weak[30:].any()
    assert not weak[:, 40:].any()
    assert (target[:30, :40] == 7).all()
    assert (target[30:] == 254).all()
    assert (target[:, 40:] == 254).all()


def test_gray_and_blur():
    weak = place(Image.fromarray(photo()), WHOLE, (30, 40), SMOOTH, 0)
    gray = np.asarray(strong_view(weak, PLAIN._replace(gray=True)))
    assert (gray == gray[..., :1]).all()
    blurred = np.asarray(strong_view(weak, PLAIN._replace(blur_radius=2.0))).astype(float)
    assert (
        np.abs(np.diff(blurred, axis=1)).mean() < 0.3 * np.abs(np.diff(photo().astype(float), axis=1)).mean()
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_split_views(layout):
    x = torch.randn(2, 9, 4, 5).contiguous(memory_format=layout)
    views = split_views(x, 3)
    assert torch.equal(torch.cat(views, dim=1), x)
    assert all(view.is_contiguous(memory_format=layout) for view in views)
