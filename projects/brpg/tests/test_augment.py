"""Views of photos, mixing, copy-paste, and the random numbers of a step."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from common.numerics.mixing import fill_boxes, half_area_box, half_of_classes
from projects.brpg.augment import (
    Draws,
    Mixed,
    TwoViews,
    WithPaste,
    copy_paste,
    draw_paste_classes,
    paste_probability,
    strong_mix,
)

CPU = torch.device("cpu")
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def photo(height: int = 30, width: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


# --- views -----------------------------------------------------------------------------------------------------


def views(seed: int, **options):
    transform = TwoViews(mean=MEAN, std=STD, crop_size=(33, 35), **options)
    return transform(photo(), None, random.Random(seed))


def test_two_views_of_one_window():
    x, y = views(0)
    assert x.shape == (6, 33, 35)
    assert x.dtype == torch.float32
    assert y is None
    again, _ = views(0)
    assert torch.equal(x, again)
    assert not torch.equal(x, views(1)[0])


def test_a_label_is_never_looked_at():
    transform = TwoViews(mean=MEAN, std=STD, crop_size=(33, 33))
    for label in (None, np.zeros((30, 40), np.uint8)):
        assert transform(photo(), label, random.Random(0))[1] is None


@pytest.mark.parametrize("black", [True, False])
def test_colour_of_the_border(black):
    """QUIRK quirks.pad_black."""
    transform = TwoViews(mean=MEAN, std=STD, crop_size=(120, 120), flip=False, pad_black=black)
    corner = transform(photo(), None, random.Random(0))[0][:3, -1, -1]
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    expected = -mean / std if black else torch.zeros(3)
    assert torch.allclose(corner, expected, atol=0.0 if black else 0.01)


# --- copy-paste ------------------------------------------------------------------------------------------------


def with_paste(skip: float) -> tuple[torch.Tensor, torch.Tensor]:
    def own(image, label, rng):
        return torch.full((3, 2, 2), 1.0), torch.full((2, 2), 1)

    def paste(image, label, rng):
        return torch.full((3, 2, 2), float(image)), torch.full((2, 2), 2)

    transform = WithPaste(own, paste, lambda i: (i, None), 3, skip)
    return transform(photo(), None, random.Random(0))


def test_second_photo():
    x, y = with_paste(0.0)
    assert x.shape == (6, 2, 2)
    assert y.shape == (4, 2)
    assert (x[:3] == 1).all()
    assert x[3, 0, 0] in (0, 1, 2)
    assert y[:, 0].tolist() == [1, 1, 2, 2]
    x, y = with_paste(1.0)
    assert not x[3:].any()
    assert y[:, 0].tolist() == [1, 1, 0, 0]


def test_paste_probability():
    assert [paste_probability(i, 10, 2, 4) for i in (0, 19, 20, 30, 50, 60, 99)] == [
        0,
        0,
        0,
        0.25,
        0.75,
        1,
        1,
    ]
    assert paste_probability(0, 10, 0, 0) == 1.0


def test_unsure_classes_are_pasted_more_often():
    confidence = torch.tensor([0.0, 1.0, 0.5, 0.0]).double()
    generator = torch.Generator().manual_seed(0)
    hits = torch.zeros(256)
    for _ in range(3000):
        hits += draw_paste_classes(confidence, (3,), torch.rand(1, generator=generator))
    expected = (1 - confidence[:3]).sqrt().softmax(dim=0).float()
    assert torch.allclose(hits[:3] / 3000, expected, atol=0.03)
    assert not hits[3:].any()
    assert draw_paste_classes(confidence, (), torch.tensor([0.0, 0.999])).nonzero().flatten().tolist() == [
        0,
        3,
    ]


def test_pasting_needs_a_label_and_luck():
    x, y = torch.zeros(3, 6, 2, 2), torch.zeros(3, 4, 2, dtype=torch.long)
    x[:, 3:] = 5.0
    y[:2, 2:] = torch.tensor([[1, 255], [2, 1]])
    classes = torch.zeros(256, dtype=torch.bool)
    classes[1] = True
    images, labels = copy_paste(x, y, classes, torch.tensor([0.4, 0.6, 0.0]), 0.5)
    assert labels[0].tolist() == [[1, 0], [0, 1]]
    assert images[0, 0].tolist() == [[5.0, 0.0], [0.0, 5.0]]
    assert not images[1:].any()
    assert not labels[1:].any()


# --- mixing and random numbers -----------------------------------------------------------------------------------


def batch() -> Mixed:
    generator = torch.Generator().manual_seed(0)
    return Mixed(
        torch.randn(3, 3, 16, 16, generator=generator),
        torch.randint(0, 5, (3, 16, 16), generator=generator),
        torch.rand(3, 16, 16, generator=generator),
    )


@pytest.mark.parametrize("mode", ["cutmix", "classmix", "cutout"])
def test_mixing_treats_images_labels_and_confidences_alike(mode):
    before, draws = batch(), Draws(0, 0, CPU)
    if mode == "classmix":
        keep = half_of_classes(before.pseudo, Draws(0, 0, CPU).class_order(before.pseudo))
    else:
        boxes = [half_area_box(16, 16, box) for box in map(Draws(0, 0, CPU).box, [16] * 3, [16] * 3)]
        keep = fill_boxes(torch.ones(3, 16, 16, dtype=torch.bool), boxes, 0)
    mixed = strong_mix(before, mode, draws)
    assert 0.2 < keep.float().mean() < 0.8
    for b in range(3):
        other = (b + 1) % 3
        for name in Mixed._fields:
            now, own, next_one = (
                getattr(mixed, name)[b],
                getattr(before, name)[b],
                getattr(before, name)[other],
            )
            assert torch.equal(now[..., keep[b]], own[..., keep[b]])
            fill = {"images": 0.0, "pseudo": 255, "conf": 0.0}[name] if mode == "cutout" else None
            outside = now[..., ~keep[b]]
            assert (
                (outside == fill).all() if fill is not None else torch.equal(outside, next_one[..., ~keep[b]])
            )


def test_processes_cut_equal_boxes_but_permute_differently():
    """QUIRK shared_draws."""
    first, second = (Draws(3, rank, CPU) for rank in range(2))
    assert [first.coin() for _ in range(3)] == [second.coin() for _ in range(3)]
    assert first.box(33, 33) == second.box(33, 33)
    assert not torch.equal(first.keys(5), second.keys(5))


def test_draws_go_on_where_they_were_saved():
    draws = Draws(3, 1, CPU)
    draws.coin(), draws.keys(3)
    saved = draws.state_dict()
    expected = draws.coin(), draws.box(33, 33), draws.keys(4)
    other = Draws(9, 0, CPU)
    other.load_state_dict(saved)
    found = other.coin(), other.box(33, 33), other.keys(4)
    assert found[:2] == expected[:2]
    assert torch.equal(found[2], expected[2])
