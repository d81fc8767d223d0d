"""CutOut, CutMix and ClassMix against loops over pixels, with draws injected."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.data.spec import IGNORE
from common.numerics.mixing import (
    LABEL_VALUES,
    Box,
    BoxDraw,
    draw_half_area_box,
    fill_boxes,
    half_area_box,
    half_area_width_range,
    half_of_classes,
    mix_with_next,
)
from tests.properties import few_examples

SIZES = [(3, 3), (4, 4), (7, 5), (33, 33), (64, 48), (48, 64), (513, 513), (769, 769), (100, 3)]
CPU = torch.device("cpu")


# --- boxes -----------------------------------------------------------------------------------------------------


@few_examples
@given(st.sampled_from(SIZES), st.integers(0, 2**16))
def test_boxes_follow_the_draws_of_the_original(size, seed):
    """As U2PL, written out with the calls of a RandomState in its order: width, column, row."""
    height, width = size
    rng = np.random.RandomState(seed)
    w = rng.randint(int(width / 2 + 1), width)
    h = np.round((height * width / 2) / w)
    col = rng.randint(0, width - w + 1)
    row = rng.randint(0, height - h + 1)
    after = rng.rand()

    ours = np.random.RandomState(seed)
    draw = draw_half_area_box(height, width, ours)
    assert draw == BoxDraw(w, col, row)
    assert half_area_box(height, width, draw) == Box(row, col, int(row + h), int(col + w))
    assert ours.rand() == after  # exactly three draws


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_boxes_lie_inside_and_cover_half(height, width):
    rng = np.random.RandomState(0)
    widths = set()
    for _ in range(200):
        draw = draw_half_area_box(height, width, rng)
        box = half_area_box(height, width, draw)
        assert 0 <= box.row0 < box.row1 <= height
        assert 0 <= box.col0 < box.col1 <= width
        assert 2 * draw.width > width
        area = (box.row1 - box.row0) * (box.col1 - box.col0)
        assert abs(area - height * width / 2) <= draw.width / 2  # rounding of the height
        widths.add(draw.width)
    low, high = half_area_width_range(width)
    assert (min(widths), max(widths)) == (low, high) or width > 200


@pytest.mark.parametrize("shape", [(3, 4, 6), (3, 2, 4, 6)])
@pytest.mark.parametrize("kind", ["number", "batch", "images"])
def test_boxes_are_filled(kind, shape):
    batch, other = torch.randn(2, *shape)
    boxes = [Box(1, 2, 3, 5), Box(0, 0, 4, 6), Box(3, 5, 4, 6)]
    before = batch.clone()
    out = fill_boxes(batch, boxes, {"number": 255, "batch": other, "images": list(other)}[kind])
    for b, box in enumerate(boxes):
        for i in range(4):
            for j in range(6):
                inside = box.row0 <= i < box.row1 and box.col0 <= j < box.col1
                filled = torch.tensor(255.0) if kind == "number" else other[b, ..., i, j]
                assert (out[b, ..., i, j] == (filled if inside else batch[b, ..., i, j])).all()
    assert torch.equal(batch, before)


# --- classes ---------------------------------------------------------------------------------------------------


def half_reference(label, order):
    """Which values of one map are taken: the first half of those present, sorted by their random number."""
    present = sorted(set(label.flatten().tolist()), key=lambda value: float(order[value]))
    chosen = present[: len(present) // 2]
    return torch.tensor([[value in chosen for value in row] for row in label.tolist()])


@few_examples
@given(st.integers(0, 2**16), st.sampled_from([1, 2, 3, 5, 21]))
def test_half_of_the_classes(seed, values):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, values, (3, 6, 7), generator=generator)
    labels[1] = labels[1, 0, 0]  # one value only
    labels[2, :2] = IGNORE
    order = torch.rand(3, LABEL_VALUES, generator=generator)
    masks = half_of_classes(labels, order)
    for mask, label, row in zip(masks, labels, order, strict=True):
        assert torch.equal(mask, half_reference(label, row))
    assert not masks[1].any()  # half of one is none


def test_the_void_value_counts_as_a_class():
    labels = torch.tensor([[[0, IGNORE]]])
    order = torch.arange(LABEL_VALUES).float()[None]
    assert half_of_classes(labels, order).tolist() == [[[True, False]]]
    assert half_of_classes(labels, -order).tolist() == [[[False, True]]]


def test_every_class_is_taken_about_equally_often():
    labels = torch.arange(6).view(1, 2, 3).expand(4000, -1, -1)
    order = torch.rand(4000, LABEL_VALUES, generator=torch.Generator().manual_seed(0))
    share = half_of_classes(labels, order).float().mean(dim=0)
    assert (half_of_classes(labels, order).sum(dim=(1, 2)) == 3).all()
    assert ((share - 0.5).abs() < 0.04).all()


# --- mixing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_the_partner_is_the_next_original_image(batch):
    images, labels = torch.randn(batch, 3, 4, 5), torch.randint(0, 9, (batch, 4, 5))
    keep = torch.rand(batch, 4, 5) < 0.5
    before = images.clone(), labels.clone()
    mixed, mixed_labels = mix_with_next(images, keep), mix_with_next(labels, keep)
    for j in range(batch):
        k = (j + 1) % batch
        for row in range(4):
            for col in range(5):
                source = j if keep[j, row, col] else k
                assert torch.equal(mixed[j, :, row, col], before[0][source, :, row, col])
                assert mixed_labels[j, row, col] == before[1][source, row, col]
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])
    assert mixed_labels.dtype == torch.int64


def test_mixing_draws_nothing():
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    labels = torch.zeros(2, 5, 5, dtype=torch.long)
    keep = half_of_classes(labels, torch.zeros(2, LABEL_VALUES))
    mix_with_next(labels, keep)
    draw_half_area_box(9, 9, np.random.RandomState(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002
