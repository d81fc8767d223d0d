"""Views of photos, mixing, copy-paste, and the random numbers of a step."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from projects.brpg.augment import (
    Draws,
    Mixed,
    TwoViews,
    ViewDraw,
    WithPaste,
    copy_paste,
    draw_paste_classes,
    draw_view,
    long_side_size,
    paste_probability,
    place,
    split_views,
    strong_mix,
    strong_view,
    weak_view,
)

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def photo(height: int = 30, width: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


# --- views -----------------------------------------------------------------------------------------------------


def test_long_side():
    assert long_side_size(30, 40, 20) == (15, 20)
    assert long_side_size(40, 30, 20) == (20, 15)
    assert long_side_size(30, 30, 7) == (7, 7)
    assert long_side_size(10, 40, 2) == (1, 2)  # half rounds up


def test_draws_stay_in_their_ranges_and_are_as_frequent_as_said():
    rng = random.Random(0)
    found = [draw_view(rng, 30, 40, (33, 33), (0.5, 2.0), flip=True) for _ in range(2000)]
    sides = [draw.long_side for draw in found]
    assert (min(sides), max(sides)) == (20, 80)
    for draw in found:
        height, width = long_side_size(30, 40, draw.long_side)
        assert 0 <= draw.col <= max(width - 33, 0)
        assert 0 <= draw.row <= max(height - 33, 0)
    assert np.mean([draw.mirrored for draw in found]) == pytest.approx(0.5, abs=0.04)
    assert np.mean([draw.gray for draw in found]) == pytest.approx(0.2, abs=0.04)
    radii = np.array([draw.blur_radius for draw in found])
    assert np.mean(radii > 0) == pytest.approx(0.5, abs=0.04)
    assert 0.1 <= radii[radii > 0].min() <= radii.max() <= 2.0
    jitters = [draw.jitter for draw in found if draw.jitter is not None]
    assert len(jitters) / 2000 == pytest.approx(0.8, abs=0.04)
    assert len({jitter.order for jitter in jitters}) == 24
    factors = np.array([jitter.factors for jitter in jitters])
    assert factors.min(axis=0) == pytest.approx([0.5, 0.5, 0.5, -0.25], abs=0.01)
    assert factors.max(axis=0) == pytest.approx([1.5, 1.5, 1.5, 0.25], abs=0.01)
    assert not any(draw_view(rng, 30, 40, (33, 33), (0.5, 2.0), flip=False).mirrored for _ in range(20))


PLAIN = ViewDraw(40, 0, 0, False, None, False, 0.0)


def test_without_changes_the_views_are_the_photo():
    image = Image.fromarray(photo())
    weak = weak_view(image, PLAIN, (30, 40))
    assert np.array_equal(np.asarray(weak), photo())
    assert np.array_equal(np.asarray(strong_view(weak, PLAIN)), photo())
    mirrored = weak_view(image, PLAIN._replace(mirrored=True), (30, 40))
    assert np.array_equal(np.asarray(mirrored), photo()[:, ::-1])


def test_border_lies_right_and_below_black_and_labeled_254():
    image, label = Image.fromarray(photo()), Image.fromarray(np.full((30, 40), 7, np.uint8))
    weak, target = (
        np.asarray(weak_view(image, PLAIN, (50, 60))),
        np.asarray(place(label, PLAIN, (50, 60), Image.Resampling.NEAREST, 254)),
    )
    assert np.array_equal(weak[:30, :40], photo())
    assert not weak[30:].any()
    assert not weak[:, 40:].any()
    assert (target[:30, :40] == 7).all()
    assert (target[30:] == 254).all()
    assert (target[:, 40:] == 254).all()


def test_gray_and_blur():
    weak = weak_view(Image.fromarray(photo()), PLAIN, (30, 40))
    gray = np.asarray(strong_view(weak, PLAIN._replace(gray=True)))
    assert (gray == gray[..., :1]).all()
    blurred = np.asarray(strong_view(weak, PLAIN._replace(blur_radius=2.0))).astype(float)
    assert (
        np.abs(np.diff(blurred, axis=1)).mean() < 0.3 * np.abs(np.diff(photo().astype(float), axis=1)).mean()
    )


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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_split_views(layout):
    x = torch.randn(2, 6, 4, 5).contiguous(memory_format=layout)
    weak, strong = split_views(x)
    assert torch.equal(torch.cat((weak, strong), dim=1), x)
    assert weak.is_contiguous(memory_format=layout)
    assert strong.is_contiguous(memory_format=layout)


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
    before, draws = batch(), Draws(0, 0, torch.device("cpu"))
    keep = Draws(0, 0, torch.device("cpu")).keep(before.pseudo, mode)
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
    first, second = (Draws(3, rank, torch.device("cpu")) for rank in range(2))
    assert [first.coin() for _ in range(3)] == [second.coin() for _ in range(3)]
    assert first.box(33, 33) == second.box(33, 33)
    assert not torch.equal(first.keys(5), second.keys(5))


def test_draws_go_on_where_they_were_saved():
    draws = Draws(3, 1, torch.device("cpu"))
    draws.coin(), draws.keys(3)
    saved = draws.state_dict()
    expected = draws.coin(), draws.box(33, 33), draws.keys(4)
    other = Draws(9, 0, torch.device("cpu"))
    other.load_state_dict(saved)
    found = other.coin(), other.box(33, 33), other.keys(4)
    assert found[:2] == expected[:2]
    assert torch.equal(found[2], expected[2])
