"""Losses against plain versions, and their degenerate cases."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.numerics.losses import Losses, mean_of
from projects.brpg.losses import (
    Criterion,
    confident_index,
    entropy_percentile,
    gradient_share,
    grid_index,
    grid_line,
    keep_low_entropy,
    prototype_loss,
    pseudo_label_loss,
    pseudo_threshold,
    sample_bilinear,
)
from projects.brpg.prototypes import Prototypes
from projects.brpg.settings import MethodConfig

CPU = torch.device("cpu")


def randn(*shape: int, seed: int = 0, requires_grad: bool = False) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(requires_grad)


# --- supervised ------------------------------------------------------------------------------------------------


def labels_of(classes: int, *shape: int, seed: int = 0) -> Tensor:
    y = torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(seed))
    y.flatten()[::5] = 255
    return y


@pytest.mark.parametrize(("ce", "ohem"), [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.2, 0.7)])
@pytest.mark.parametrize("aux", [0.0, 0.4])
def test_criterion_is_the_weighted_sum(ce, ohem, aux):
    rule = Criterion(ce, ohem, min_kept=20, aux_weight=aux)
    logits, extra, y = randn(2, 4, 6, 6), randn(2, 4, 6, 6, seed=1), labels_of(4, 2, 6, 6)
    parts = [rule.one(logits, y, extra, ohem=flag) for flag in (False, True)]
    assert rule(logits, y, extra).item() == pytest.approx((ce * parts[0] + ohem * parts[1]).item())
    plain = F.cross_entropy(logits, y, ignore_index=255) + aux * F.cross_entropy(extra, y, ignore_index=255)
    assert parts[0].item() == pytest.approx(plain.item())
    assert rule.one(logits, y, None, ohem=False).item() == pytest.approx(
        F.cross_entropy(logits, y, ignore_index=255).item()
    )


def test_nothing_labeled_is_zero():
    logits = randn(2, 4, 6, 6, requires_grad=True)
    loss = Criterion(min_kept=5)(logits, torch.full((2, 6, 6), 255))
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()


# --- pseudo-labels ---------------------------------------------------------------------------------------------


def test_percentile_rises_to_a_hundred():
    assert [entropy_percentile(80.0, e, 10) for e in (0, 5, 10)] == [80.0, 90.0, 100.0]


def test_entropy_at_the_threshold_is_dropped():
    logits, pseudo = randn(2, 4, 5, 5), labels_of(4, 2, 5, 5)
    probs = logits.softmax(dim=1)
    values = -(probs * (probs + 1e-10).log()).sum(dim=1)
    for percent in (0.0, 50.0, 80.0, 100.0):
        kept = keep_low_entropy(logits, pseudo, percent)
        valid = pseudo != 255
        limit = np.percentile(values[valid].numpy(), percent)
        assert torch.equal(kept != 255, valid & ~(values >= float(limit)))
        assert torch.equal(kept[kept != 255], pseudo[kept != 255])


def test_pseudo_label_loss_weighs_up_what_is_left():
    logits, pseudo = randn(2, 4, 5, 5), labels_of(4, 2, 5, 5)
    kept = int((pseudo != 255).sum())
    expected = 50 / kept * F.cross_entropy(logits, pseudo, ignore_index=255)
    assert pseudo_label_loss(logits, pseudo).item() == pytest.approx(expected.item())


def test_no_pseudo_label_is_zero():
    logits = randn(2, 4, 5, 5, requires_grad=True)
    nothing = torch.full((2, 5, 5), 255)
    assert torch.equal(keep_low_entropy(logits, nothing, 80.0), nothing)
    loss = pseudo_label_loss(logits, nothing)
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()


def test_equal_entropies_leave_nothing():
    """All are at the percentile, so all are dropped."""
    assert (keep_low_entropy(torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4).long(), 90.0) == 255).all()


# --- prototype loss --------------------------------------------------------------------------------------------


def test_threshold_rises_from_epoch_five_or_from_the_start_of_the_loss():
    """QUIRK quirks.ramp_from_five: at epoch 2 of 80 the original's threshold lies below its start value."""
    assert pseudo_threshold(0.8, 0.95, 2 * 638, 638, 80) == pytest.approx(0.794)
    assert pseudo_threshold(0.8, 0.95, 5 * 638, 638, 80) == 0.8
    assert pseudo_threshold(0.8, 0.95, 80 * 638, 638, 80) == pytest.approx(0.95)
    assert pseudo_threshold(0.8, 0.95, 2 * 638, 638, 80, ramp_epoch=2) == 0.8
    assert pseudo_threshold(0.8, 0.95, 80 * 638, 638, 80, ramp_epoch=2) == pytest.approx(0.95)


@pytest.mark.parametrize("epochs", [3, 5])
def test_threshold_of_a_short_training_stays(epochs):
    assert pseudo_threshold(0.8, 0.95, 7, 3, epochs) == 0.8


@pytest.mark.parametrize(
    ("side", "steps", "line"),
    [
        (17, 4, [0, 4, 8, 12, 16]),
        (19, 4, [0, 4, 8, 12, 18]),
        (5, 4, [0, 1, 2, 3, 4]),
        (4, 4, [0, 3]),
        (1, 4, [0]),
    ],
)
def test_grid_lines(side, steps, line):
    assert grid_line(side, steps, CPU).tolist() == line


def test_grid_counts_images_rows_and_columns():
    index = grid_index(2, (5, 9), 2, CPU)
    expected = [b * 45 + r * 9 + c for b in range(2) for r in (0, 2, 4) for c in (0, 4, 8)]
    assert index.tolist() == expected


@pytest.mark.parametrize("size", [(17, 17), (13, 22), (5, 7), (3, 4), (1, 1), (1, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sampling_is_that_of_the_resized_map(size, dtype):
    feats = randn(2, 3, 5, 7).to(dtype).detach().requires_grad_(True)
    index = torch.arange(2 * size[0] * size[1])
    weight = torch.randn(len(index), 3, dtype=dtype)
    large = F.interpolate(feats, size=size, mode="bilinear", align_corners=True)
    plain = large.permute(0, 2, 3, 1).flatten(0, 2)
    (expected,) = torch.autograd.grad((plain * weight).sum(), feats)
    found = sample_bilinear(feats, index, size)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert torch.allclose(found, plain, atol=tolerance)
    (gradient,) = torch.autograd.grad((found * weight).sum(), feats)
    assert torch.allclose(gradient, expected, atol=20 * tolerance)


def test_sampling_in_channels_last_layout():
    feats = randn(2, 3, 5, 7)
    index = torch.randint(0, 2 * 17 * 19, (50,), generator=torch.Generator().manual_seed(0))
    last = feats.contiguous(memory_format=torch.channels_last)
    assert torch.equal(sample_bilinear(last, index, (17, 19)), sample_bilinear(feats, index, (17, 19)))


def test_confident_pixels():
    conf = torch.tensor([[[0.9, 0.8], [0.79, 1.0]], [[0.1, 0.95], [0.2, 0.81]]])
    keys = torch.tensor([0.5, 0.9, 0.0, 0.4, 0.0, 0.1, 0.0, 0.2])
    assert confident_index(conf, 0.8, keys, 3).tolist() == [3, 5, 7]
    assert confident_index(conf, 0.8, keys, 5).tolist() == [0, 1, 3, 5, 7]
    assert confident_index(conf, 0.8, keys, 6).tolist() == [0, 1, 3, 5, 7, -1]
    assert confident_index(conf, 1.1, keys, 2).tolist() == [-1, -1]


def setting(seed: int = 0):
    feats = randn(4, 6, 5, 5, seed=seed, requires_grad=True)
    y, pseudo = labels_of(3, 2, 17, 17, seed=seed), labels_of(3, 2, 17, 17, seed=seed + 1).clamp(max=2)
    conf = torch.rand(2, 17, 17, generator=torch.Generator().manual_seed(seed))
    prototypes = Prototypes(3, 3, 6)
    prototypes.set([randn(n, 6, seed=n) for n in (3, 2, 1)])
    return feats, y, pseudo, conf, prototypes


METHOD = MethodConfig(temperature=0.1, grid_steps=4, unsup_points=1000)
KEYS = torch.arange(578.0)


@pytest.mark.parametrize("points", [1000, 7])
def test_prototype_loss_over_whole_maps(points):
    feats, y, pseudo, conf, prototypes = setting()
    method = dataclasses.replace(METHOD, unsup_points=points)
    found = prototype_loss(feats, y, pseudo, conf, prototypes, method, threshold=0.6, keys=KEYS)
    large = F.interpolate(feats, size=(17, 17), mode="bilinear", align_corners=True).permute(0, 2, 3, 1)
    line = [0, 4, 8, 12, 16]
    rows_l, labels_l = large[:2][:, line][:, :, line].flatten(0, 2), y[:, line][:, :, line].flatten()
    sure = conf >= 0.6
    rows_u, labels_u = large[2:][sure][: 2 * points], pseudo[sure][: 2 * points]
    for rows, labels, ours in ((rows_l, labels_l, found.labeled), (rows_u, labels_u, found.unlabeled)):
        logits = prototypes.similarity(rows).value / 0.1
        expected = F.cross_entropy(logits, labels, ignore_index=255)
        assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(found.feats[: len(rows_l)], rows_l, atol=1e-5)
    used = found.labels[len(rows_l) :] != 255
    assert torch.allclose(found.feats[len(rows_l) :][used], rows_u, atol=1e-5)
    assert not found.feats.requires_grad


def test_no_sure_pixel_is_zero_and_the_rest_as_usual():
    feats, y, pseudo, conf, prototypes = setting()
    found = prototype_loss(feats, y, pseudo, conf, prototypes, METHOD, threshold=2.0, keys=KEYS)
    assert found.unlabeled.item() == 0.0
    (found.labeled + found.unlabeled).backward()
    assert feats.grad.isfinite().all()
    assert not feats.grad[2:].any()
    assert feats.grad[:2].any()


def test_nothing_at_all_is_zero_and_moves_nothing():
    feats, y, pseudo, conf, prototypes = setting()
    before = prototypes.centres.clone()
    found = prototype_loss(
        feats, torch.full_like(y, 255), pseudo, conf, prototypes, METHOD, threshold=2.0, keys=KEYS
    )
    (found.labeled + found.unlabeled).backward()
    prototypes.update(found.feats, found.labels, found.slot, 0.99)
    assert found.labeled.item() == found.unlabeled.item() == 0.0
    assert not feats.grad.any()
    assert torch.equal(prototypes.centres, before)


def test_no_prototypes_at_all_is_zero():
    feats, y, pseudo, conf, _ = setting()
    found = prototype_loss(feats, y, pseudo, conf, Prototypes(3, 3, 6), METHOD, threshold=0.5, keys=KEYS)
    (found.labeled + found.unlabeled).backward()
    assert found.labeled.item() == found.unlabeled.item() == 0.0
    assert not feats.grad.any()


def test_one_labeled_image_and_ignored_pseudo_labels():
    feats, y, pseudo, conf, prototypes = setting()
    found = prototype_loss(
        feats[:2],
        y[:1],
        torch.full_like(pseudo[:1], 255),
        conf[:1],
        prototypes,
        METHOD,
        threshold=0.5,
        keys=torch.arange(289.0),
    )
    assert found.unlabeled.item() == 0.0
    assert found.labeled.item() > 0.0


@pytest.mark.parametrize("forward_only", [True, False])
def test_gradient_share(forward_only):
    """QUIRK quirks.proto_reduce."""
    loss = torch.tensor(6.0, requires_grad=True)
    gradient_share(loss, 4, forward_only).backward()
    assert loss.grad.item() == (0.25 if forward_only else 1.0)
    assert gradient_share(loss, 1, forward_only).item() == 6.0


def test_mean_of_forwards():
    results = [Losses(torch.tensor(v), {"a": torch.tensor(2 * v)}) for v in (1.0, 3.0)]
    total, terms = mean_of(results)
    assert (total.item(), terms["a"].item()) == (2.0, 4.0)
