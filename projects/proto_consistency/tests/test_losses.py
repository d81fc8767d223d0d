"""Selection of pseudo-labels and the loss terms against plain arithmetic, and where nothing counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from projects.proto_consistency.losses import (
    Criterion,
    prototype_losses,
    pseudo_labels,
    select_pixels,
    unsupervised_loss,
)

NORMS = ("all", "valid", "u2pl")


def case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (2, 4, 5, 6), labels with some 255, confidences."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 4, 5, 6, generator=draw, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(4, (2, 5, 6), generator=draw)
    labels[torch.rand(labels.shape, generator=draw) < 0.15] = 255
    return logits, labels, torch.rand(labels.shape, generator=draw)


def test_pseudo_labels_are_taken_after_the_resize() -> None:
    logits = torch.randn(2, 3, 4, 5)
    conf, labels = pseudo_labels(logits.requires_grad_(True), (9, 7))
    full = F.interpolate(logits, (9, 7), mode="bilinear", align_corners=True).softmax(1)
    assert torch.equal(labels, full.argmax(1))
    assert torch.equal(conf, full.amax(1))
    assert not conf.requires_grad


def test_confidence_selects_from_the_threshold_on() -> None:
    conf = torch.tensor([[[0.8, 0.79, 0.9, 0.95]]])
    labels = torch.tensor([[[1, 1, 255, 0]]])
    kept = select_pixels(conf, labels, select="confidence", confid_thresh=0.8)
    assert kept.tolist() == [[[True, False, False, True]]]


def test_none_selects_all_with_a_label() -> None:
    _, labels, conf = case()
    assert torch.equal(select_pixels(conf * 0, labels, select="none", confid_thresh=0.9), labels != 255)


@pytest.mark.parametrize("percent", [20.0, 80.0, 100.0])
def test_entropy_drops_from_the_percentile_on(percent: float) -> None:
    logits, labels, conf = case()
    kept = select_pixels(conf, labels, select="entropy", logits_teacher=logits, drop_percent=percent)
    p = logits.detach().softmax(1).numpy()
    values = -(p * np.log(p + 1e-10)).sum(1)
    valid = labels.numpy() != 255
    limit = np.percentile(values[valid], percent)
    assert np.array_equal(kept.numpy(), valid & (values < limit))


def test_entropy_of_nothing_selects_nothing() -> None:
    logits, labels, conf = case()
    every = torch.full_like(labels, 255)
    assert not select_pixels(conf, every, select="entropy", logits_teacher=logits, drop_percent=80).any()


def test_norms_divide_as_they_say() -> None:
    logits, labels, conf = case()
    valid = (conf > 0.5) & (labels != 255)
    each = F.cross_entropy(logits, labels.where(valid, 255), ignore_index=255, reduction="none").sum()
    n, total = int(valid.sum()), labels.numel()
    expected = {"all": each / total, "valid": each / n, "u2pl": each / n * total / n}
    for norm in NORMS:
        assert torch.allclose(unsupervised_loss(logits, labels, conf > 0.5, norm), expected[norm])


def test_selection_never_brings_back_ignored_pixels() -> None:
    logits, labels, _ = case()
    assert torch.equal(
        unsupervised_loss(logits, labels, torch.ones_like(labels, dtype=torch.bool)),
        unsupervised_loss(logits, labels, labels != 255),
    )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("why", ["nothing confident", "all ignored"])
def test_no_pixel_gives_a_true_zero(norm, why: str) -> None:
    logits, labels, conf = case()
    if why == "all ignored":
        labels = torch.full_like(labels, 255)
    loss = unsupervised_loss(logits, labels, conf > (2 if why == "nothing confident" else -1), norm)
    loss.backward()
    assert loss == 0
    assert logits.grad.eq(0).all()


@pytest.mark.parametrize("norm", NORMS)
def test_gradient_of_the_unsupervised_loss(norm) -> None:
    logits, labels, conf = case()
    assert torch.autograd.gradcheck(lambda x: unsupervised_loss(x, labels, conf > 0.5, norm), logits)


def sampled() -> tuple[Tensor, Tensor, Tensor]:
    logits, labels, conf = case()
    return (
        logits.permute(0, 2, 3, 1).flatten(0, 2).detach().requires_grad_(True),
        labels.flatten(),
        conf.flatten(),
    )


def test_prototype_losses_have_different_divisors() -> None:
    scores, labels, conf = sampled()
    sup, unsup = prototype_losses(scores, labels, conf > 0.5, 30)
    assert torch.allclose(sup, F.cross_entropy(scores[:30], labels[:30], ignore_index=255))
    kept = labels[30:].where(conf[30:] > 0.5, 255)
    total = F.cross_entropy(scores[30:], kept, ignore_index=255, reduction="sum")
    assert torch.allclose(unsup, total / 30)


def test_the_selection_does_not_touch_labeled_pixels() -> None:
    scores, labels, conf = sampled()
    none = torch.zeros_like(conf, dtype=torch.bool)
    assert torch.equal(
        prototype_losses(scores, labels, none, 30).sup, prototype_losses(scores, labels, ~none, 30).sup
    )


@pytest.mark.parametrize("num_labeled", [0, 30, 60])
def test_prototype_losses_of_nothing_are_zero_and_connected(num_labeled: int) -> None:
    scores, labels, _ = sampled()
    sup, unsup = prototype_losses(scores, torch.full_like(labels, 255), labels == -1, num_labeled)
    (sup + unsup).backward()
    assert sup == unsup == 0
    assert scores.grad.eq(0).all()


def test_one_pixel() -> None:
    scores = torch.tensor([[2.0, 0.0]], requires_grad=True)
    sup, unsup = prototype_losses(scores, torch.tensor([1]), torch.tensor([True]), 0)
    assert sup == 0
    assert torch.allclose(unsup, F.cross_entropy(scores, torch.tensor([1])))


def test_half_precision_is_computed_in_float32() -> None:
    logits, labels, conf = case()
    half = logits.detach().bfloat16()
    assert unsupervised_loss(half, labels, conf > 0.5).dtype == torch.float32
    exact = unsupervised_loss(half.double(), labels, conf > 0.5)
    assert torch.allclose(unsupervised_loss(half, labels, conf > 0.5).double(), exact, rtol=1e-6)


def test_ohem_keeps_hard_pixels_of_each_head() -> None:
    logits, labels, _ = case()
    rule = Criterion(ohem=True, thresh=0.3, min_kept=5, aux_weight=0.4)
    aux = logits.detach().flip(1)
    parts = []
    for scores in (logits, aux):
        p = (
            scores.softmax(1)
            .gather(1, labels.where(labels != 255, 0)[:, None])[:, 0]
            .where(labels != 255, 1.0)
        )
        limit = p.detach().flatten().sort().values[4].clamp(min=0.3)
        hard = labels.where((p <= limit) & (labels != 255), 255)
        parts.append(F.cross_entropy(scores, hard, ignore_index=255))
    assert torch.allclose(rule(logits, labels, aux), parts[0] + 0.4 * parts[1])
    assert torch.allclose(rule(logits, labels), parts[0])


def test_ohem_is_inactive_at_few_pixels_so_it_is_plain_cross_entropy() -> None:
    logits, labels, _ = case()
    plain = F.cross_entropy(logits, labels, ignore_index=255)
    assert torch.allclose(Criterion()(logits, labels), plain)
    assert torch.allclose(Criterion(ohem=False, min_kept=1)(logits, labels), plain)


def test_criterion_of_ignored_labels_is_zero() -> None:
    logits, labels, _ = case()
    assert Criterion()(logits, torch.full_like(labels, 255), logits) == 0
