"""Losses, schedules and figures of the image-level branch, against plain loops and at their edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.distributed import Dist
from common.numerics.optim import cosine
from projects.s4gan_mlmt.mlmt.losses import (
    Share,
    accuracies,
    consistency_weight,
    cosine_consistency,
    count_correct,
    log_accuracies,
    mlmt_losses,
    multi_label_loss,
    roll_scores,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def vectors(*shape: int, seed: int = 1) -> Tensor:
    return (random(*shape, seed=seed) > 0.5).double()


# --- losses ----------------------------------------------------------------------------------------------------


def test_the_class_loss_is_the_mean_over_images_and_classes() -> None:
    logits, target = random(4, 5).requires_grad_(), vectors(4, 5)
    loss = multi_label_loss(logits, target)
    loss.backward()
    s = logits.detach().sigmoid()
    torch.testing.assert_close(loss, -(target * s.log() + (1 - target) * (1 - s).log()).mean())
    torch.testing.assert_close(logits.grad, (s - target) / target.numel())


def test_a_saturated_sigmoid_costs_a_hundred_and_teaches_nothing() -> None:
    """As the authors' sigmoid followed by BCE; a loss of logits would cost 105 and have a gradient."""
    logits = torch.tensor([[60.0, -150.0]], requires_grad=True)
    loss = multi_label_loss(logits, torch.tensor([[0.0, 1.0]]))
    loss.backward()
    assert float(loss.detach()) == 100.0
    assert not logits.grad.any()


def test_logits_that_are_not_numbers_give_a_loss_that_is_none() -> None:
    """The kernel of the loss would end the process instead."""
    logits = torch.tensor([[1.0, float("nan")]], requires_grad=True)
    assert multi_label_loss(logits, torch.ones(1, 2)).isnan()
    assert cosine_consistency(logits, torch.ones(1, 2)).isnan()


def test_the_consistency_is_one_minus_the_cosine() -> None:
    student, teacher = random(3, 6).requires_grad_(), random(3, 6, seed=2).requires_grad_()
    loss = cosine_consistency(student, teacher)
    loss.backward()
    torch.testing.assert_close(loss, (1 - F.cosine_similarity(student, teacher)).mean())
    assert student.grad.any()
    assert teacher.grad is None


def test_equal_logits_agree_and_opposite_ones_do_not() -> None:
    x = random(3, 6)
    assert float(cosine_consistency(x, 7 * x)) == pytest.approx(0, abs=1e-12)
    assert float(cosine_consistency(x, -x)) == pytest.approx(2)


def test_logits_of_zero_give_a_finite_loss_and_gradient() -> None:
    student = torch.zeros(2, 6, requires_grad=True)
    loss = cosine_consistency(student, torch.zeros(2, 6))
    loss.backward()
    assert float(loss.detach()) == 1.0
    assert student.grad.isfinite().all()


def test_empty_batches_cost_nothing_and_stay_in_the_graph() -> None:
    for loss_of in (multi_label_loss, cosine_consistency):
        empty = torch.zeros(0, 5, requires_grad=True)
        loss = loss_of(empty, torch.zeros(0, 5))
        loss.backward()
        assert float(loss.detach()) == 0
        assert empty.grad.shape == (0, 5)


def test_half_precision_is_widened() -> None:
    logits, target = random(4, 5).to(torch.bfloat16), vectors(4, 5)
    for loss in (multi_label_loss(logits, target), cosine_consistency(logits, logits)):
        assert loss.dtype == torch.float32


def test_the_total_is_the_weighted_sum_and_weight_zero_keeps_the_graph() -> None:
    logits, student = random(4, 5).requires_grad_(), random(3, 5, seed=3).requires_grad_()
    for weight in (0.0, 0.3):
        total, terms = mlmt_losses(logits, vectors(4, 5), student, random(3, 5, seed=4), weight)
        torch.testing.assert_close(total, terms["loss_class"] + weight * terms["loss_consistency"])
        (gradient,) = torch.autograd.grad(total, student)
        assert bool(gradient.any()) == (weight > 0)


@pytest.mark.parametrize("processes", [2, 3])
def test_shares_average_to_the_global_batch(processes: int) -> None:
    """Seven images on two or three processes: the last ones fill theirs up with what does not count."""
    logits, target = random(7, 5).requires_grad_(), vectors(7, 5)
    student, teacher = random(7, 5, seed=3).requires_grad_(), random(7, 5, seed=4)
    whole, _ = mlmt_losses(logits, target, student, teacher, 0.5)
    expected = torch.autograd.grad(whole, (logits, student))
    totals = []
    for rank in range(processes):
        own = list(range(rank, 7, processes))
        places = own + [0] * (math.ceil(7 / processes) - len(own))
        share = Share(len(own), 7, processes)
        parts = (logits[places], target[places], student[places], teacher[places])
        totals.append(mlmt_losses(*parts, 0.5, share, share).total)
    mean = torch.stack(totals).mean()
    torch.testing.assert_close(mean, whole)
    for found, wanted in zip(torch.autograd.grad(mean, (logits, student)), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_process_without_an_image_of_its_own_takes_part() -> None:
    logits = random(1, 5).requires_grad_()
    loss = multi_label_loss(logits, vectors(1, 5), Share(0, 1, 2))
    loss.backward()
    assert float(loss.detach()) == 0
    assert not logits.grad.any()


# --- schedules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epoch", "weight"), [(0, 0), (10, 0), (11, 0.02), (35, 0.5), (59, 0.98), (60, 1), (99, 1)]
)
def test_the_ramp(epoch: int, weight: float) -> None:
    assert consistency_weight(epoch, 10, 100, 1.0) == pytest.approx(weight)


def test_the_ramp_without_burn_in_begins_in_the_second_epoch() -> None:
    assert [consistency_weight(e, 0, 4, 0.8) for e in range(4)] == [0, 0.5, 0.8, 0.8]


def test_the_rate_falls_along_half_a_cosine() -> None:
    rates = [cosine(0.03, epoch, 100, 1e-4) for epoch in (0, 50, 99, 100)]
    np.testing.assert_allclose(rates, [0.03, 0.01505, 1.0737692253231e-4, 1e-4], rtol=1e-9)


# --- figures ---------------------------------------------------------------------------------------------------


def looped(outputs: np.ndarray, target: np.ndarray, threshold: float) -> tuple[float, float, float, float]:
    """Entry by entry, as the authors count."""
    right, entries = [0, 0], [0, 0]
    for row, wanted in zip(outputs.tolist(), target.tolist(), strict=True):
        for value, present in zip(row, wanted, strict=True):
            side = int(present)
            entries[side] += 1
            right[side] += (value >= threshold) == bool(present)
    zeros, ones = (100 * r / n for r, n in zip(right, entries, strict=True))
    return (zeros + ones) / 2, zeros, ones, 100 * sum(right) / sum(entries)


@pytest.mark.parametrize("threshold", [0.5, 0.2])
def test_accuracies_are_those_of_a_loop(threshold: float) -> None:
    outputs, target = random(6, 9).sigmoid(), vectors(6, 9)
    outputs[0, 0], target[0, 0] = threshold, 1  # exactly at the threshold counts as found
    found = accuracies(count_correct(outputs, target, threshold))
    np.testing.assert_allclose([float(v) for v in found], looped(outputs.numpy(), target.numpy(), threshold))


def test_counts_add_up_over_batches() -> None:
    outputs, target = random(6, 9).sigmoid(), vectors(6, 9)
    parts = sum(count_correct(o, t) for o, t in zip(outputs.split(2), target.split(2), strict=True))
    assert torch.equal(parts, count_correct(outputs, target))


def test_a_side_without_entries_is_left_out() -> None:
    none = accuracies(count_correct(torch.tensor([[0.1, 0.9]]), torch.zeros(1, 2)))
    assert [float(v) for v in none] == [50.0, 50.0, 0.0, 50.0]
    empty = accuracies(count_correct(torch.zeros(0, 2), torch.zeros(0, 2)))
    assert [float(v) for v in empty] == [0.0] * 4


def test_the_log_counts_own_images_only() -> None:
    good, target = torch.tensor([[9.0, -9.0], [9.0, -9.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = log_accuracies(good, -good, target, 0.5, Share(1, 1), Dist())
    assert {k: float(v) for k, v in found.items()} == {"accuracy": 100.0, "accuracy_teacher": 0.0}


# --- the roll --------------------------------------------------------------------------------------------------


def test_both_rolls_put_the_background_first_but_flat_takes_the_neighbours() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert roll_scores(scores, flat=True).tolist() == [[6, 1, 2], [3, 4, 5]]
    assert roll_scores(scores, flat=False).tolist() == [[3, 1, 2], [6, 4, 5]]
    assert roll_scores(scores[:1], flat=True).tolist() == roll_scores(scores[:1], flat=False).tolist()
    assert torch.equal(roll_scores(scores, flat=True), torch.from_numpy(np.roll(scores.numpy(), 1)))
