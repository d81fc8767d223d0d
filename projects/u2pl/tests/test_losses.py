"""Supervised and pseudo-label loss, value and gradient, against plain renditions of the description and at edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.data.spec import IGNORE
from projects.u2pl.losses import (
    OHEM_CLASS_WEIGHTS,
    Criterion,
    pseudo_label_loss,
    split_by_entropy,
)
from projects.u2pl.tests import reference

TIGHT = {"rtol": 1e-9, "atol": 1e-12}


def uniform(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def labels_of(seed: int, num_classes: int, *shape: int, ignored: float = 0.2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    labels = torch.randint(0, num_classes, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < ignored] = IGNORE
    return labels


# --- pseudo-label loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [2, 21])
@pytest.mark.parametrize("percent", [0.0, 37.5, 80.0, 99.75, 100.0])
@pytest.mark.parametrize("seed", range(4))
def test_pseudo_label_loss_and_gradient(seed, percent, num_classes):
    shape = (2 + seed % 2, num_classes, 5, 7)
    logits = uniform(seed, *shape, scale=2.0).requires_grad_()
    teacher = uniform(seed + 50, *shape, scale=3.0)
    pseudo = labels_of(seed, num_classes, shape[0], 5, 7, ignored=(0.0, 0.2, 0.9, 1.0)[seed])
    split = split_by_entropy(teacher, pseudo, percent, 10.0)
    kept = reference.drop_uncertain(teacher, pseudo, percent)
    assert torch.equal(split.pseudo, kept)
    ours, plain = pseudo_label_loss(logits, split.pseudo), reference.unsupervised_loss(logits, kept)
    torch.testing.assert_close(ours, plain, **TIGHT)
    pairs = zip(torch.autograd.grad(ours, logits), torch.autograd.grad(plain, logits), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, **TIGHT)


def test_nothing_kept_is_a_finite_zero():
    logits = torch.randn(2, 3, 4, 4, dtype=torch.float16).mul(1e4).requires_grad_()
    loss = pseudo_label_loss(logits, torch.full((2, 4, 4), IGNORE))
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()


def test_the_factor_is_pixels_over_kept_pixels():
    logits = torch.zeros(1, 4, 2, 4, dtype=torch.float64)
    pseudo = torch.full((1, 2, 4), IGNORE)
    pseudo[0, 0, :2] = 1
    assert float(pseudo_label_loss(logits, pseudo)) == pytest.approx(8 / 2 * np.log(4), rel=1e-12)


# --- entropy split ---------------------------------------------------------------------------------------------


def ranked_teacher(count: int) -> torch.Tensor:
    """Logits (1, 2, 1, count) whose entropy falls from left to right."""
    margin = torch.arange(count, dtype=torch.float64)
    return torch.stack((margin, torch.zeros(count, dtype=torch.float64)))[None, :, None]


def test_boundary_pixels_are_dropped_and_belong_to_both_ends():
    pseudo = torch.zeros(1, 1, 5, dtype=torch.long)  # percentiles 0, 25, 50, 75, 100 are pixels
    split = split_by_entropy(ranked_teacher(5), pseudo, 75.0, 25.0)
    assert split.pseudo[0, 0].tolist() == [IGNORE, IGNORE, 0, 0, 0]
    assert split.reliable[0, 0].tolist() == [False, False, False, True, True]
    assert split.unreliable[0, 0].tolist() == [True, True, False, False, False]


def test_percent_100_still_drops_the_most_uncertain_pixels():
    teacher = ranked_teacher(4)[..., [0, 0, 2, 3]]
    split = split_by_entropy(teacher, torch.zeros(1, 1, 4, dtype=torch.long), 100.0, 0.0)
    assert split.pseudo[0, 0].tolist() == [IGNORE, IGNORE, 0, 0]
    assert split.reliable[0, 0].tolist() == [False, False, False, True]
    assert split.unreliable[0, 0].tolist() == [True, True, False, False]


def test_percentiles_are_those_of_the_labeled_pixels():
    pseudo = torch.tensor([[[IGNORE, IGNORE, 1, 1, 1, 1]]])
    split = split_by_entropy(ranked_teacher(6), pseudo, 50.0, 34.0)
    assert split.pseudo[0, 0].tolist() == [IGNORE, IGNORE, IGNORE, IGNORE, 1, 1]
    assert split.reliable[0, 0].tolist() == [False] * 4 + [True, True]
    assert split.unreliable[0, 0].tolist() == [False, False, True, True, False, False]


def test_no_pseudo_label_at_all():
    pseudo = torch.full((2, 3, 3), IGNORE)
    split = split_by_entropy(uniform(0, 2, 4, 3, 3), pseudo, 80.0, 20.0)
    assert torch.equal(split.pseudo, pseudo)
    assert not split.reliable.any()
    assert not split.unreliable.any()


@pytest.mark.parametrize("seed", range(5))
def test_random_splits(seed):
    teacher, pseudo = uniform(seed, 3, 5, 6, 7, scale=2), labels_of(seed, 5, 3, 6, 7)
    alpha = (0.0, 7.0, 20.0, 50.0, 100.0)[seed]
    split = split_by_entropy(teacher, pseudo, 80.0, alpha)
    values, valid = reference.entropies(teacher), pseudo != IGNORE
    low, high = (reference.percentile(values, pseudo, q) for q in (alpha, 100 - alpha))
    assert torch.equal(split.reliable, valid & (values <= low))
    assert torch.equal(split.unreliable, valid & (values >= high))
    assert not split.pseudo.requires_grad


# --- supervised criterion --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ohem", [False, True])
@pytest.mark.parametrize("class_weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_criterion_without_any_label(ohem, class_weights, dtype):
    rule = Criterion(ohem=ohem, min_kept=5, aux_weight=0.4, class_weights=class_weights)
    logits, aux = (torch.randn(1, 19, 3, 3).mul(1e4).to(dtype).requires_grad_() for _ in range(2))
    loss = rule(logits, torch.full((1, 3, 3), IGNORE), aux)
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()
    assert not aux.grad.any()


def test_criterion_weights_and_heads():
    logits, aux = uniform(0, 2, 19, 4, 4), uniform(1, 2, 19, 4, 4)
    target = labels_of(0, 19, 2, 4, 4)

    def mean(x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(x, target, weight=weight, ignore_index=IGNORE)

    hard = torch.zeros(19, dtype=torch.float64)
    hard[[3, 4, 5, 6, 9, 12, 14, 16, 17, 18]] = 1.0
    table = torch.tensor(OHEM_CLASS_WEIGHTS, dtype=torch.float64)
    assert len(table) == 19
    for rule, expected in (
        (Criterion(), mean(logits)),
        (Criterion(aux_weight=0.4), mean(logits) + 0.4 * mean(aux)),
        (Criterion(aux_weight=0.4, class_weights=True), mean(logits) + mean(logits, hard) + 0.4 * mean(aux)),
        (Criterion(ohem=True, min_kept=10**6), mean(logits)),
        (
            Criterion(ohem=True, min_kept=10**6, aux_weight=0.4, class_weights=True),
            mean(logits, table) + 0.4 * mean(aux),
        ),
    ):  # fmt: skip
        torch.testing.assert_close(rule(logits, target, aux), expected, **TIGHT)


def test_each_head_selects_its_own_hard_pixels():
    target = torch.zeros(1, 1, 2, dtype=torch.long)
    logits = torch.tensor([[[[5.0, 0.0]], [[0.0, 0.0]]]])  # the first pixel is easy
    rule = Criterion(ohem=True, thresh=0.7, min_kept=1, aux_weight=1.0)
    both = rule(logits, target, logits.flip(-1))
    assert float(both) == pytest.approx(2 * np.log(2), rel=1e-6)  # one hard pixel in either head
