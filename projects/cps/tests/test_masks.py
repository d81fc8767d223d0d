"""Box masks against a drawing one box at a time, draw by draw."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.config import build
from projects.cps.masks import BoxMaskSettings, draw_boxes, rasterize
from tests.properties import few_examples


def drawn_by_hand(cfg: BoxMaskSettings, n: int, height: int, width: int, rng: Any) -> np.ndarray:
    """Masks (n, 1, H, W) of boxes painted one after the other, as the specification words it."""
    k, (low, high) = cfg.n_boxes, cfg.prop_range
    first = rng.uniform(low, high, size=(n, k))
    second = None
    if cfg.random_aspect_ratio:
        second = rng.uniform(0, 1, size=(n, k)) if cfg.prop_by_area else rng.uniform(low, high, size=(n, k))
    places = rng.uniform(0, 1, size=(n, k, 2))
    masks = np.full((n, 1, height, width), 0 if cfg.invert else 1)
    for i, j in product(range(n), range(k)):
        sides = shares(cfg, first[i, j], None if second is None else second[i, j])
        size = [np.round(side * length) for side, length in zip(sides, (height, width), strict=True)]
        ends = []
        for length, extent, place in zip((height, width), size, places[i, j], strict=True):
            if cfg.within_bounds:
                start = np.round((length - extent) * place)
                ends.append((start, start + extent))
            else:
                centre = np.round(length * place)
                ends.append((centre - extent / 2, centre + extent / 2))
        rows, cols = (slice(int(a), int(b)) for a, b in ends)
        masks[i, 0, rows, cols] = 1 - masks[i, 0, rows, cols]
    return masks


def shares(cfg: BoxMaskSettings, first: float, second: float | None) -> tuple[float, float]:
    factor = np.sqrt(1 / cfg.n_boxes)
    if second is None:
        times = 2 if cfg.fixed_aspect_shrinks_twice else 1
        side = np.sqrt(first) if cfg.prop_by_area else first
        for _ in range(times):
            side = side * factor
        return side, side
    if not cfg.prop_by_area:
        return first * factor, second * factor
    if first == 0:
        return 0.0, 0.0
    tall = np.exp(second * np.log(first))
    return tall * factor, first / tall * factor


VARIANTS = st.builds(
    BoxMaskSettings,
    n_boxes=st.integers(1, 4),
    random_aspect_ratio=st.booleans(),
    prop_by_area=st.booleans(),
    within_bounds=st.booleans(),
    invert=st.booleans(),
)


def box_masks(settings: BoxMaskSettings, n: int, height: int, width: int, rng: Any) -> torch.Tensor:
    return rasterize(draw_boxes(settings, n, height, width, rng), height, width, invert=settings.invert)


@few_examples
@given(VARIANTS, st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**16))
def test_masks_are_those_of_boxes_drawn_one_by_one(
    settings: BoxMaskSettings, height: int, width: int, seed: int
) -> None:
    ours = box_masks(settings, 7, height, width, np.random.RandomState(seed))
    assert ours.dtype == torch.float32
    theirs = drawn_by_hand(settings, 7, height, width, np.random.RandomState(seed))
    assert np.array_equal(ours.numpy(), theirs)


class Recorded:
    """Uniform draws that return given arrays and note what was asked for."""

    def __init__(self, *draws: Any) -> None:
        self.draws = [np.array(draw, dtype=float) for draw in draws]
        self.asked: list[tuple[float, float]] = []

    def uniform(self, low: float, high: float, size: tuple[int, ...]) -> np.ndarray:
        self.asked.append((low, high))
        draw = self.draws.pop(0)
        assert draw.shape == tuple(size)
        return draw


def test_area_form_and_position_are_drawn_in_this_order() -> None:
    rng = Recorded([[0.5]], [[1.0]], [[[0.0, 1.0]]])
    boxes = draw_boxes(BoxMaskSettings(n_boxes=1), 1, 10, 20, rng)
    assert rng.asked == [(0.25, 0.5), (0.0, 1.0), (0.0, 1.0)]
    assert boxes.tolist() == [[[0, 0, 5, 20]]]  # exponent 1: half as high, full width


def test_halves_are_rounded_to_even() -> None:
    settings = BoxMaskSettings(n_boxes=1, prop_by_area=False)
    rng = Recorded([[0.25]], [[0.35]], [[[0.5, 0.5]]])
    # sides 2.5 and 3.5 become 2 and 4, positions (10 - 2) / 2 and (10 - 4) / 2
    assert draw_boxes(settings, 1, 10, 10, rng).tolist() == [[[4, 3, 6, 7]]]


def test_ends_beyond_the_image_are_those_of_slices() -> None:
    settings = BoxMaskSettings(n_boxes=3, prop_by_area=False, within_bounds=False)
    scale = np.sqrt(3)  # undoes the factor for three boxes
    sides = np.array([[0.4, 0.3, 0.6]]) * scale
    rng = Recorded(sides, sides, [[[0.0, 0.0], [0.1, 0.5], [1.0, 1.0]]])
    boxes = draw_boxes(settings, 1, 10, 10, rng)
    # -2:2 counts from the end and is empty; 1 - 1.5 = -0.5 is cut to 0; 13 is the side
    assert boxes.tolist() == [[[8, 8, 2, 2], [0, 3, 2, 6], [7, 7, 10, 10]]]
    mask = rasterize(boxes, 10, 10)[0, 0]
    expected = torch.zeros(10, 10)
    expected[0:2, 3:6] = 1
    expected[7:10, 7:10] = 1
    assert torch.equal(mask, expected)


def test_a_box_far_outside_starts_at_the_first_row() -> None:
    settings = BoxMaskSettings(n_boxes=1, prop_by_area=False, within_bounds=False, prop_range=(0.0, 1.0))
    rng = Recorded([[3.0]], [[1.0]], [[[0.0, 0.5]]])  # rows -15:15, of which -15 lies before the first
    assert draw_boxes(settings, 1, 10, 10, rng).tolist() == [[[0, 0, 10, 10]]]


def test_boxes_that_cover_the_same_pixels_cancel() -> None:
    boxes = np.array([[[0, 0, 4, 4], [2, 2, 6, 6], [2, 2, 4, 4]], [[1, 1, 3, 3]] * 3])
    masks = rasterize(boxes, 6, 7)
    first = torch.zeros(6, 7)
    first[0:4, 0:4] = 1
    first[2:6, 2:6] = 1  # covered twice in the overlap and once more by the third box
    assert torch.equal(masks[0, 0], first)
    assert float(masks[1].sum()) == 4
    pair = rasterize(boxes[1:, :2], 6, 7)
    assert not pair.any()


def test_many_boxes_stay_exact() -> None:
    boxes = np.array([[[0, 0, 3, 5]] * 301, [[0, 0, 3, 5]] * 300 + [[1, 1, 1, 4]]])
    masks = rasterize(boxes, 3, 5)
    assert masks[0].eq(1).all()
    assert masks[1].eq(0).all()


def test_invert_decides_what_the_boxes_are() -> None:
    boxes = np.array([[[1, 2, 3, 4]]])
    plain, inverted = (rasterize(boxes, 4, 6, invert=invert) for invert in (False, True))
    assert float(inverted.sum()) == 4
    assert torch.equal(plain, 1 - inverted)


def test_a_fixed_form_shrinks_twice_or_once() -> None:
    def sides(twice: bool) -> list[int]:
        settings = BoxMaskSettings(
            n_boxes=4, random_aspect_ratio=False, prop_by_area=False, fixed_aspect_shrinks_twice=twice
        )
        box = draw_boxes(settings, 1, 100, 200, Recorded([[0.4] * 4], np.zeros((1, 4, 2))))[0, 0]
        return (box[2:] - box[:2]).tolist()

    assert sides(True) == [10, 20]
    assert sides(False) == [20, 40]


def test_boxes_without_area_paint_nothing() -> None:
    settings = BoxMaskSettings(prop_range=(0.0, 0.0))
    with np.errstate(all="raise", under="ignore", divide="ignore", invalid="ignore"):
        masks = box_masks(settings, 3, 8, 9, np.random.RandomState(0))
    assert not masks.any()


def test_boxes_within_bounds_cover_less_than_their_areas_together() -> None:
    boxes = draw_boxes(BoxMaskSettings(), 400, 64, 96, np.random.RandomState(0))
    assert boxes.min() >= 0
    assert (boxes[..., 2] <= 64).all()
    assert (boxes[..., 3] <= 96).all()
    assert (boxes[..., :2] <= boxes[..., 2:]).all()
    sizes = boxes[..., 2:] - boxes[..., :2]
    together = sizes.prod(axis=-1).sum(axis=-1).mean() / (64 * 96)
    covered = float(rasterize(boxes, 64, 96).mean())
    assert 0.2 < covered < together  # overlaps cancel
    assert abs(together - 0.375) < 0.01  # the mean of the published range


def test_the_generator_goes_on_where_the_last_batch_ended() -> None:
    rng = np.random.RandomState(5)
    twice = [draw_boxes(BoxMaskSettings(), 2, 30, 40, rng) for _ in range(2)]
    assert not np.array_equal(*twice)
    rng = np.random.RandomState(5)
    for shape in ((2, 3), (2, 3), (2, 3, 2)):
        rng.uniform(size=shape)
    assert np.array_equal(twice[1], draw_boxes(BoxMaskSettings(), 2, 30, 40, rng))


@pytest.mark.parametrize("bad", [(-0.1, 0.5), (0.5, 0.25), (0.5, 1.5), (float("nan"), 0.5)])
def test_shares_outside_of_0_to_1_are_refused(bad: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"'prop_range' is .*expected (numbers from 0 to 1|low <= high)"):
        build(BoxMaskSettings, {"prop_range": bad})


def test_a_mask_needs_a_box() -> None:
    with pytest.raises(ValueError, match="'n_boxes' is 0; expected 1 or more"):
        build(BoxMaskSettings, {"n_boxes": 0})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_masks_on_a_gpu_are_the_same_and_wait_for_nothing() -> None:
    boxes = draw_boxes(BoxMaskSettings(), 8, 200, 300, np.random.RandomState(0))
    rasterize(boxes, 200, 300, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        masks = rasterize(boxes, 200, 300, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(masks.cpu(), rasterize(boxes, 200, 300))
