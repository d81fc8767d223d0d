"""Counts of an epoch and learning rates of the original, as tables."""

from __future__ import annotations

import math

import pytest

from common.numerics.optim import poly
from projects.cps.arithmetic import TRAIN_IMAGES, epoch_arithmetic, warmup_poly

PUBLISHED = [  # dataset, ratio, labeled, unlabeled, images, steps of an epoch, epochs, steps in total
    ("voc", 16, 661, 9921, 9921, 1240, 32, 39680),
    ("voc", 8, 1322, 9260, 9260, 1157, 34, 39338),
    ("voc", 4, 2645, 7937, 7937, 992, 40, 39680),
    ("voc", 2, 5291, 5291, 5291, 661, 60, 39660),
    ("cityscapes", 16, 185, 2790, 2790, 348, 128, 44544),
    ("cityscapes", 8, 371, 2604, 2604, 325, 137, 44525),
    ("cityscapes", 4, 743, 2232, 2232, 279, 160, 44640),
    ("cityscapes", 2, 1487, 1488, 1488, 186, 240, 44640),
]


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row[0]}-{row[1]}")
def test_epochs_of_the_published_settings(row: tuple[str, int, int, int, int, int, int, int]) -> None:
    dataset, ratio, labeled, unlabeled, longer, steps, epochs, total = row
    sizes = epoch_arithmetic(TRAIN_IMAGES[dataset], ratio, 8)
    assert sizes == (labeled, unlabeled, longer, steps)
    assert sizes.iterations * epochs == total


def test_counts_come_from_the_ratio_not_from_the_lists() -> None:
    # QUIRK data.epoch_images: the lists of VOC 1/8 hold 1323 and 9259 images
    sizes = epoch_arithmetic(10582, 8, 8)
    assert (sizes.labeled, sizes.unlabeled) == (1322, 9260)
    assert max(1323, 9259) // 8 == sizes.iterations  # here both give as many steps
    assert epoch_arithmetic(10582, 8, 20).iterations == 463
    assert max(1323, 9259) // 20 == 462


def test_more_labeled_than_unlabeled_images() -> None:
    assert epoch_arithmetic(10, 1, 4) == (10, 0, 10, 2)
    assert epoch_arithmetic(3, 2, 8).iterations == 0


def test_the_rate_without_warmup_is_the_shared_poly_rate() -> None:
    for step in (0, 1, 500, 999):
        assert warmup_poly(0.01, step, 1000, 0.9) == poly(0.01, step, 1000, 0.9)


def test_after_the_warmup_the_rate_is_not_shifted() -> None:
    rates = [warmup_poly(0.01, step, 1000, 0.9, 100) for step in (0, 50, 99, 100, 999)]
    expected = [0.0, 0.005, 0.0099, 0.01 * 0.9**0.9, 0.01 * 0.001**0.9]
    assert all(math.isclose(a, b, rel_tol=1e-12) for a, b in zip(rates, expected, strict=True))
