"""Shared pixel losses and statistics against plain references, and at their edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.data.spec import IGNORE
from common.numerics.ema import update_teacher
from common.numerics.losses import (
    best_class,
    cross_entropy_or_zero,
    entropy,
    in_order,
    masked_percentiles,
    ohem_keep,
)
from projects.brpg import losses as brpg
from projects.cps import losses as cps
from projects.proto_consistency import losses as proto
from projects.s4gan_mlmt import losses as s4gan
from projects.u2pl import losses as u2pl
from projects.unimatch import losses as unimatch
from tests.properties import few_examples

SEEDS = st.integers(0, 2**16)
PERCENTS = (0.0, 1e-6, 0.3, 1.0, 20.0, 33.333333333, 50.0, 66.6, 80.0, 99.7, 99.999999, 100.0)


def maps(seed: int, b: int = 2, k: int = 4, h: int = 5, w: int = 6, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(b, k, h, w, generator=generator, dtype=dtype)
    target = torch.randint(0, k, (b, h, w), generator=generator)
    target[torch.rand(b, h, w, generator=generator) < 0.3] = IGNORE
    return logits, target


def test_the_best_class_is_the_first_of_equals_and_a_number_that_is_none_wins():
    logits = torch.tensor(
        [[1.0, 2.0, 2.0], [3.0, 3.0, 1.0], [math.nan, 0.0, math.inf], [math.inf, math.nan, math.nan]]
    )
    scores = logits.t().view(1, 3, 2, 2).requires_grad_(True)
    assert best_class(scores).tolist() == [[[1, 0], [0, 1]]]
    assert best_class(scores[0], dim=0).tolist() == [[1, 0], [0, 1]]
    random = torch.randint(4, (2, 5, 9, 9)).float()
    assert torch.equal(best_class(random), random.argmax(dim=1))
    assert not best_class(scores).requires_grad


@few_examples
@given(SEEDS)
def test_values_by_rank_are_those_of_a_sort(seed):
    generator = torch.Generator().manual_seed(seed)
    values = (
        torch.randint(9, (50,), generator=generator)
        .float()
        .masked_fill(torch.rand(50, generator=generator) < 0.1, torch.nan)
    )
    ranks = torch.randint(50, (6,), generator=generator)
    ordered, before = values.sort().values, values.clone()
    assert torch.equal(in_order(values, ranks).nan_to_num(99.0), ordered[ranks].nan_to_num(99.0))
    assert torch.equal(in_order(values, 7).nan_to_num(99.0), ordered[7].nan_to_num(99.0))
    assert torch.equal(values.nan_to_num(99.0), before.nan_to_num(99.0))


# --- percentiles -----------------------------------------------------------------------------------------------


@few_examples
@given(SEEDS)
def test_percentiles_are_those_of_numpy(seed):
    rng = np.random.RandomState(seed)
    shape = (rng.randint(1, 4), rng.randint(1, 40), rng.randint(1, 40))
    values = rng.gamma(1.0, size=shape)
    if seed % 3 == 0:
        values = np.round(values, 1)  # ties
    mask = rng.rand(*shape) < rng.choice([0.02, 0.5, 1.0])
    mask.flat[rng.randint(mask.size)] = True
    ours = masked_percentiles(torch.from_numpy(values), torch.from_numpy(mask), PERCENTS)
    np.testing.assert_allclose(ours.numpy(), np.percentile(values[mask], PERCENTS), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("count", [1_000_000, 1_052_676])
def test_percentiles_of_a_million_float32_values(count):
    """A position computed in float32 would be off by whole ranks here."""
    rng = np.random.RandomState(count % 1000)
    values = rng.rand(count).astype(np.float32)
    mask = rng.rand(count) < 0.9
    exact = np.percentile(values[mask].astype(np.float64), PERCENTS)
    ours = masked_percentiles(torch.from_numpy(values), torch.from_numpy(mask), PERCENTS)
    assert ours.dtype == torch.float32
    np.testing.assert_array_max_ulp(ours.numpy(), exact.astype(np.float32), maxulp=1)
    for percent, limit in zip(PERCENTS, ours.numpy(), strict=True):  # the same pixels are on either side
        assert (values[mask] >= limit).sum() == (
            values[mask] >= np.float32(exact[PERCENTS.index(percent)])
        ).sum()


def test_percentiles_of_one_value_and_of_none():
    values, none = torch.tensor([3.0, 7.0]), torch.tensor([False, False])
    assert masked_percentiles(values, torch.tensor([False, True]), PERCENTS).tolist() == [7.0] * len(PERCENTS)
    empty = masked_percentiles(values, none, PERCENTS)
    assert empty.isnan().all()
    assert not (values >= empty[0]).any()  # a comparison with it drops nothing


def test_percentile_ends_are_the_extremes():
    values = torch.randn(3, 50)
    low, high = masked_percentiles(values, torch.ones_like(values, dtype=torch.bool), (0.0, 100.0))
    assert (low, high) == (values.min(), values.max())


def test_values_outside_the_mask_do_not_matter():
    values, mask = torch.randn(200), torch.rand(200) < 0.5
    wild = values.where(mask, torch.tensor([math.inf, -math.inf, math.nan, 1e30]).repeat(50))
    expected = masked_percentiles(values, mask, PERCENTS)
    assert torch.equal(masked_percentiles(wild, mask, PERCENTS), expected)


# --- entropy ---------------------------------------------------------------------------------------------------


def test_entropy_of_known_distributions():
    probs = torch.tensor([[1.0, 0, 0, 0], [0.25] * 4, [0.5, 0.5, 0, 0]], dtype=torch.float64).T[None, :, None]
    found = entropy(probs).flatten()
    torch.testing.assert_close(
        found, torch.tensor([0.0, math.log(4), math.log(2)]).double(), atol=1e-8, rtol=0
    )
    assert entropy(torch.zeros(1, 2, 1, 1)).isfinite().all()


# --- cross entropy ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_is_the_mean_over_labeled_pixels(seed, weighted):
    logits, target = maps(seed)
    weight = torch.rand(4, dtype=torch.float64) if weighted else None
    logits.requires_grad_()
    ours = cross_entropy_or_zero(logits, target, weight)
    (gradient,) = torch.autograd.grad(ours, logits)
    total, mass = torch.zeros((), dtype=torch.float64), 0.0
    for b, i, j in (target != IGNORE).nonzero().tolist():  # the definition, pixel by pixel
        label = target[b, i, j]
        share = 1.0 if weight is None else float(weight[label])
        total = total - share * logits[b, :, i, j].log_softmax(0)[label]
        mass += share
    (expected,) = torch.autograd.grad(total / mass, logits)
    torch.testing.assert_close(ours, total / mass, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float16, 6e4), (torch.bfloat16, 3e38), (torch.float32, 1e30), (torch.float64, 1e300)],
)
def test_all_ignored_is_a_finite_zero_in_the_graph(dtype, scale, weighted):
    logits = torch.randn(2, 3, 4, 4).sign().double().mul(scale).to(dtype).requires_grad_()
    assert logits.isfinite().all()
    loss = cross_entropy_or_zero(logits, torch.full((2, 4, 4), IGNORE), torch.rand(3) if weighted else None)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad.isfinite().all()
    assert not logits.grad.any()


def test_no_weight_on_any_present_class_is_zero():
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = cross_entropy_or_zero(
        logits, torch.zeros(1, 2, 2, dtype=torch.long), torch.tensor([0.0, 1.0, 1.0])
    )
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    logits, target = maps(1, dtype=torch.float32)
    half = (logits * 8).to(dtype)
    assert cross_entropy_or_zero(half, target).dtype == torch.float32
    assert torch.equal(cross_entropy_or_zero(half, target), cross_entropy_or_zero(half.float(), target))
    assert torch.equal(ohem_keep(half, target, 0.5, 3), ohem_keep(half.float(), target, 0.5, 3))


# --- online hard example mining --------------------------------------------------------------------------------


def ohem_reference(logits, target, thresh, min_kept):
    """The rule of `OhemCrossEntropy2dTensor` of U2PL, in plain loops over the flattened batch."""
    probs = logits.double().softmax(1).movedim(1, -1).reshape(-1, logits.shape[1])
    labels = target.flatten().tolist()
    g = [1.0 if y == IGNORE else float(p[y]) for p, y in zip(probs, labels, strict=True)]
    valid = sum(y != IGNORE for y in labels)
    if min_kept > valid or not valid or min_kept == 0:
        return target
    tau = max(thresh, sorted(g)[min(len(g), min_kept) - 1])
    kept = [y if y != IGNORE and p <= tau else IGNORE for p, y in zip(g, labels, strict=True)]
    return torch.tensor(kept).view_as(target)


@few_examples
@given(SEEDS, st.sampled_from([0.0, 0.2, 0.7, 1.0]), st.data())
def test_ohem_follows_its_rule(seed, thresh, data):
    logits, target = maps(seed)
    labeled = int((target != IGNORE).sum())
    min_kept = data.draw(st.sampled_from([0, 1, 5, 30, labeled - 1, labeled, labeled + 1, 60, 10**6]))
    torch.testing.assert_close(
        ohem_keep(logits, target, thresh, min_kept), ohem_reference(logits, target, thresh, min_kept)
    )


def test_ohem_counts_from_the_number_of_labeled_pixels():
    """One pixel more to keep than there are labeled ones keeps all; as many leaves the ranking in force."""
    logits, target = maps(3)
    valid = int((target != IGNORE).sum())
    assert torch.equal(ohem_keep(logits, target, 0.1, valid + 1), target)
    # the valid-th smallest of all probabilities is the largest labeled one, so all stay as well
    assert torch.equal(ohem_keep(logits, target, 0.1, valid), target)
    assert int((ohem_keep(logits, target, 0.0, valid - 5) != IGNORE).sum()) == valid - 5


def test_ohem_without_labels_or_without_a_minimum():
    logits, target = maps(0)
    ignored = torch.full_like(target, IGNORE)
    for min_kept in (0, 1, 10**6):
        assert torch.equal(ohem_keep(logits, ignored, 0.7, min_kept), ignored)
    assert torch.equal(ohem_keep(logits, target, 0.0, 0), target)


def test_ohem_selection_carries_no_gradient_and_leaves_the_labels_alone():
    logits, target = maps(0)
    before = target.clone()
    kept = ohem_keep(logits.requires_grad_(), target, 0.2, 3)
    assert not kept.requires_grad
    assert torch.equal(target, before)
    assert (kept != target).any()


# --- the generator stays untouched -----------------------------------------------------------------------------


def test_losses_draw_nothing():
    logits, target = maps(0)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    cross_entropy_or_zero(logits, target)
    ohem_keep(logits, target, 0.5, 3)
    masked_percentiles(logits, logits > 0, PERCENTS)
    assert torch.equal(torch.get_rng_state(), before)


def brpg_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return brpg.pseudo_label_loss(logits, brpg.keep_low_entropy(logits.flip(0), target, 80.0))


def cps_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return cps.supervised(logits, target) + cps.cross_pseudo_supervision(logits, logits.flip(0))


def unimatch_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return unimatch.consistency(logits, unimatch.pseudo_labels(logits.flip(0), target == IGNORE), 0.4)


LOSSES = {
    "u2pl": lambda x, y: u2pl.pseudo_label_loss(x, u2pl.split_by_entropy(x.flip(0), y, 80.0, 20.0).pseudo),
    "brpg": brpg_loss,
    "proto_consistency": lambda x, y: proto.unsupervised_loss(x, y, y != 1),
    "cps": cps_loss,
    "s4gan_mlmt": lambda x, y: s4gan.self_training(x, y[:, 0, 0] != 1) + s4gan.segmentation_loss(x, y),
    "unimatch": unimatch_loss,
}


@pytest.mark.slow
@pytest.mark.parametrize("project", LOSSES)
def test_the_losses_of_every_paper_are_one_graph_for_torch_compile(project):
    logits, target = maps(0, dtype=torch.float32)
    found = []
    for loss in (LOSSES[project], torch.compile(LOSSES[project], fullgraph=True, backend="aot_eager")):
        x = logits.clone().requires_grad_(True)
        value = loss(x, target)
        value.backward()
        found.append((value.detach(), x.grad))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.slow
def test_the_moving_average_is_one_graph_for_torch_compile():
    teacher, student = torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
    torch.nn.init.zeros_(student.weight)
    torch.compile(update_teacher, fullgraph=True, backend="aot_eager")(teacher, student, 0.25)
    torch.testing.assert_close(teacher.weight.detach(), torch.full((3,), 0.25))
