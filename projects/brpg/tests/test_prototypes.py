"""Similarity and moving average of the prototypes against plain loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.numerics.similarity import Products, grouped_sums
from projects.brpg.prototypes import NOWHERE, Prototypes

NUMBERS = [(2, 3), (3, 2), (2, 2), (1, 1)]


def made(numbers=NUMBERS, dim: int = 6, seed: int = 0) -> tuple[Prototypes, list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    kinds = [tuple(torch.randn(n, dim, generator=generator) for n in pair) for pair in numbers]
    prototypes = Prototypes(len(numbers), max(map(sum, numbers)), dim)
    prototypes.set([torch.cat(pair) for pair in kinds])
    return prototypes, kinds


def padded(kinds, most: int) -> Tensor:
    """As the original: classes with fewer prototypes repeat their last one, (K, 2 * most, D)."""

    def fill(rows: Tensor) -> Tensor:
        return torch.cat((rows, rows[-1:].expand(most - len(rows), -1)))

    return torch.stack([torch.cat([fill(rows) for rows in pair]) for pair in kinds])


def test_similarity_and_gradient_are_those_of_padding_and_broadcasting():
    prototypes, kinds = made()
    feats = torch.randn(50, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    table = padded(kinds, 3)
    plain = F.cosine_similarity(feats[:, None], table.flatten(0, 1)[None], dim=2).view(50, 4, 6).amax(dim=2)
    weight = torch.randn(50, 4, generator=torch.Generator().manual_seed(2))
    (expected,) = torch.autograd.grad((plain * weight).sum(), feats)
    found = prototypes.similarity(feats)
    assert torch.allclose(found.value, plain, atol=1e-6)
    (gradient,) = torch.autograd.grad((found.value * weight).sum(), feats)
    assert torch.allclose(gradient, expected, atol=1e-6)


def test_products_have_the_gradient_of_a_matrix_product():
    rows = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    columns = torch.randn(4, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: Products.apply(x, columns), rows)


@pytest.mark.parametrize("places", [None, 1, 3, 64])
def test_grouped_sums_are_those_of_a_loop(places):
    rows = torch.randn(50, 3, dtype=torch.float64)
    group = torch.randint(-1, 4, (50,))
    rows[group == -1] = torch.nan
    rows[(group == 2).nonzero()[0]] = torch.inf
    found = grouped_sums(rows, group, 6, places)
    expected = torch.stack([rows[group == k].sum(dim=0) for k in range(6)])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not found[4:].any()


def test_the_setting_of_matrix_products_is_restored():
    before = torch.backends.cuda.matmul.allow_tf32
    for value in (True, False):
        torch.backends.cuda.matmul.allow_tf32 = value
        made()[0].similarity(torch.randn(2, 6, requires_grad=True)).value.sum().backward()
        assert torch.backends.cuda.matmul.allow_tf32 is value
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("seed", range(4))
def test_update_is_that_of_loops_over_classes_and_prototypes(seed):
    prototypes, kinds = made(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    feats = torch.randn(80, 6, generator=generator)
    labels = torch.randint(0, 4, (80,), generator=generator)
    labels[::7] = 255
    labels[labels == 2] = 0  # class 2 has no feature
    found = prototypes.similarity(feats)
    prototypes.update(feats, labels, found.slot, 0.99)
    for k, pair in enumerate(kinds):
        own, rows = torch.cat(pair), feats[labels == k]
        nearest = F.cosine_similarity(rows[:, None], own[None], dim=2).argmax(dim=1)
        for p in range(len(own)):
            mine = rows[nearest == p]
            expected = own[p] if not len(mine) else 0.99 * own[p] + 0.01 * mine.mean(dim=0)
            assert torch.allclose(prototypes.centres[k, p], expected, atol=1e-6)
        assert not prototypes.centres[k, len(own) :].any()


def test_features_go_to_their_own_class_even_if_another_is_nearer():
    prototypes = Prototypes(2, 1, 2)
    prototypes.set([torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])])
    feats = torch.tensor([[0.0, 5.0]])
    prototypes.update(feats, torch.tensor([0]), prototypes.similarity(feats).slot, 0.5)
    assert prototypes.centres[:, 0].tolist() == [[0.5, 2.5], [0.0, 1.0]]


def test_nothing_to_learn_from_changes_nothing():
    prototypes, _ = made()
    before = prototypes.centres.clone()
    feats = torch.randn(5, 6)
    prototypes.update(feats, torch.full((5,), 255), prototypes.similarity(feats).slot, 0.99)
    empty = feats[:0]
    prototypes.update(empty, torch.zeros(0, dtype=torch.long), prototypes.similarity(empty).slot, 0.99)
    assert torch.equal(prototypes.centres, before)


def test_features_that_are_not_finite_leave_no_trace():
    prototypes, _ = made()
    before = prototypes.centres.clone()
    feats = torch.full((4, 6), torch.nan)
    labels = torch.tensor([0, 1, 255, 2])
    prototypes.update(feats, labels, prototypes.similarity(feats).slot, 0.99)
    assert torch.equal(prototypes.centres, before)


def test_a_class_without_prototypes_is_out_of_reach_and_its_labels_are_ignored():
    prototypes, _ = made([(1, 1), (0, 0), (2, 0)])
    feats = torch.randn(7, 6, requires_grad=True)
    found = prototypes.similarity(feats)
    assert (found.value[:, 1] == NOWHERE).all()
    assert prototypes.usable.tolist() == [True, False, True]
    assert prototypes.labels(torch.tensor([0, 1, 2, 255])).tolist() == [0, 255, 2, 255]
    F.cross_entropy(found.value / 0.1, torch.tensor([0, 2, 0, 2, 0, 2, 0])).backward()
    assert feats.grad.isfinite().all()
    assert feats.grad.any()


def test_a_zero_feature_is_no_nan():
    prototypes, _ = made()
    feats = torch.zeros(2, 6, requires_grad=True)
    value = prototypes.similarity(feats).value
    value.sum().backward()
    assert (value == 0).all()
    assert feats.grad.isfinite().all()


def test_prototypes_keep_no_graph_and_round_trip():
    prototypes, _ = made()
    feats = torch.randn(5, 6, requires_grad=True)
    found = prototypes.similarity(feats)
    prototypes.update(feats, torch.zeros(5, dtype=torch.long), found.slot, 0.99)
    assert not prototypes.centres.requires_grad
    found.value.sum().backward()  # the move in between did not touch what the gradient needs
    other = Prototypes(4, 5, 6)
    other.load_state_dict(prototypes.state_dict())
    assert torch.equal(other.similarity(feats).value, prototypes.similarity(feats).value)


def test_setting_again_forgets_the_old_ones():
    prototypes, _ = made()
    prototypes.set([torch.ones(1, 6)] * 4)
    assert prototypes.real.sum(dim=1).tolist() == [1, 1, 1, 1]
    assert torch.equal(prototypes.centres.sum(dim=(1, 2)), torch.full((4,), 6.0))
