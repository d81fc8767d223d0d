"""Confusion matrix, IoU and accuracy against plain NumPy counting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from common.distributed import Dist
from common.errors import UserError
from common.measure.metrics import ConfusionMatrix, class_iou, mean_iou


def example(classes: int = 5, absent: int | None = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    values = [k for k in range(classes) if k != absent]
    label = rng.choice(values, (3, 11, 13))
    pred = np.where(rng.random(label.shape) < 0.6, label, rng.choice(values, label.shape))
    label = np.where(rng.random(label.shape) < 0.1, 255, label)
    return torch.from_numpy(pred), torch.from_numpy(label)


def counted(pred: torch.Tensor, label: torch.Tensor, classes: int) -> np.ndarray:
    matrix = np.zeros((classes, classes), dtype=np.int64)
    for p, y in zip(pred.flatten().tolist(), label.flatten().tolist(), strict=True):
        if y != 255:
            matrix[y, p] += 1
    return matrix


def test_counts_accumulate_over_batches_and_types():
    pred, label = example()
    matrix = ConfusionMatrix(5)
    matrix.update(pred[:1].to(torch.uint8), label[:1].to(torch.uint8))
    matrix.update(pred[1:], label[1:].to(torch.int32))
    assert np.array_equal(matrix.counts.numpy(), counted(pred, label, 5))


def test_measures():
    pred, label = example()
    matrix = ConfusionMatrix(5)
    matrix.update(pred, label)
    counts = counted(pred, label, 5)
    inter = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - inter
    iou = inter[:4] / union[:4]
    assert class_iou(*matrix.intersection_union()).numpy() == pytest.approx([*iou, 0.0], rel=1e-9)
    assert mean_iou(*matrix.intersection_union()) == pytest.approx(iou.sum() / 5, rel=1e-9)
    assert mean_iou(*matrix.intersection_union(), "skip") == pytest.approx(iou.mean(), rel=1e-9)
    assert mean_iou(*matrix.intersection_union(), "zero", 0) == pytest.approx(iou.sum() / 5, rel=1e-15)
    assert math.isnan(class_iou(*matrix.intersection_union(), 0)[4])
    assert matrix.pixel_accuracy() == pytest.approx(inter.sum() / counts.sum(), rel=1e-15)


def test_a_class_that_is_only_predicted_counts_as_zero_in_both_means():
    inter, union = torch.tensor([6, 0]), torch.tensor([8, 2])
    assert mean_iou(inter, union, "skip") == mean_iou(inter, union, "zero") == pytest.approx(0.375)


def test_everything_ignored():
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([[7, 0]]), torch.tensor([[255, 255]]))
    assert matrix.counts.sum() == 0
    assert mean_iou(*matrix.intersection_union()) == 0.0
    assert math.isnan(mean_iou(*matrix.intersection_union(), "skip"))
    assert math.isnan(matrix.pixel_accuracy())


@pytest.mark.parametrize(("pred", "label"), [(0, 3), (3, 0), (0, -1), (0, 254)])
def test_values_outside_the_classes_are_reported(pred, label):
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([0, pred]), torch.tensor([0, label]))
    with pytest.raises(UserError, match=r"1 pixels have a label or prediction outside 0\.\.2"):
        matrix.intersection_union()


def test_ignored_pixels_do_not_count():
    matrix = ConfusionMatrix(2)
    matrix.update(torch.tensor([1, 1, 0]), torch.tensor([1, 255, 1]))
    assert matrix.counts.tolist() == [[0, 0], [1, 1]]


def test_reduce_sums_once(monkeypatch):
    matrix = ConfusionMatrix(2)
    matrix.update(torch.tensor([0, 1]), torch.tensor([0, 0]))
    calls = []
    monkeypatch.setattr("common.measure.metrics.sum_over_ranks", lambda t, dist: calls.append(dist) or 2 * t)
    dist = Dist(world_size=2)
    matrix.reduce(dist)
    assert matrix.counts.tolist() == [[2, 2], [0, 0]]
    assert calls == [dist]


def test_class_iou_is_in_double_precision():
    inter, union = torch.tensor([2**40 + 1]), torch.tensor([2**41])
    assert class_iou(inter, union, 0).item() == (2**40 + 1) / 2**41


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_update_does_not_wait_for_the_device():
    pred, label = (t.cuda() for t in example())
    matrix = ConfusionMatrix(5, device="cuda")
    matrix.update(pred, label)
    torch.cuda.set_sync_debug_mode("error")
    try:
        matrix.update(pred, label)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert np.array_equal(matrix.counts.numpy(), 2 * counted(pred.cpu(), label.cpu(), 5))
