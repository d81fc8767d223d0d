"""Losses of CPS against plain references, value and gradient, and their edge cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from common.data.spec import IGNORE
from common.numerics.losses import Losses, best_class, mean_of
from projects.cps.losses import OhemSettings, cross_pseudo_supervision, mix, supervised

B, K, H, W = 4, 5, 6, 9


def logits_of(seed: int, dtype: torch.dtype = torch.float64, batch: int = B) -> Tensor:
    return (3 * torch.randn(batch, K, H, W, generator=torch.Generator().manual_seed(seed))).to(dtype)


def target_of(seed: int, ignored: float = 0.2, batch: int = B) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, K, (batch, H, W), generator=generator)
    return target.masked_fill(torch.rand(target.shape, generator=generator) < ignored, IGNORE)


def pixel_losses(logits: Tensor, target: Tensor) -> list[tuple[float, Tensor]]:
    """Probability of the label and its negative logarithm, pixel by pixel, void pixels left out."""
    found = []
    for b in range(target.shape[0]):
        for y in range(target.shape[1]):
            for x in range(target.shape[2]):
                label = int(target[b, y, x])
                if label != IGNORE:
                    prob = logits[b, :, y, x].softmax(dim=0)[label]
                    found.append((float(prob.detach()), -prob.log()))
    return found


def naive_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return torch.stack([loss for _, loss in pixel_losses(logits, target)]).mean()


def naive_ohem(logits: Tensor, target: Tensor, thresh: float, min_kept: int) -> Tensor:
    pixels = pixel_losses(logits, target)
    if min_kept == 0 or min_kept > len(pixels):
        return torch.stack([loss for _, loss in pixels]).mean()
    limit = max(thresh, sorted(prob for prob, _ in pixels)[min_kept - 1])
    return torch.stack([loss for prob, loss in pixels if prob <= limit]).mean()


def with_gradient(function, *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.clone().requires_grad_(True) for x in inputs]
    value = function(*leaves)
    return value.detach(), list(torch.autograd.grad(value, leaves))


def assert_same(ours, theirs) -> None:
    torch.testing.assert_close(ours[0], theirs[0].to(ours[0].dtype))
    for mine, other in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(mine, other.to(mine.dtype))


# --- cross pseudo supervision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cross_pseudo_supervision_is_the_cross_entropy_with_the_others_labels(dtype: torch.dtype) -> None:
    one, two = logits_of(0, dtype), logits_of(1, dtype)

    def naive(a: Tensor, b: Tensor) -> Tensor:
        return naive_cross_entropy(a, b.argmax(dim=1)) + naive_cross_entropy(b, a.argmax(dim=1))

    ours = with_gradient(cross_pseudo_supervision, one, two)
    assert ours[0].dtype == dtype
    assert_same(ours, with_gradient(naive, one.double(), two.double()))


def test_given_labels_take_the_place_of_the_networks_own() -> None:
    one, two, labels_1, labels_2 = logits_of(0), logits_of(1), target_of(2, 0.0), target_of(3, 0.0)
    ours = with_gradient(lambda a, b: cross_pseudo_supervision(a, b, labels_1, labels_2), one, two)
    theirs = with_gradient(
        lambda a, b: naive_cross_entropy(a, labels_2) + naive_cross_entropy(b, labels_1), one, two
    )
    assert_same(ours, theirs)


def test_no_gradient_flows_through_the_labels() -> None:
    one, two = logits_of(0), logits_of(1)
    free = with_gradient(cross_pseudo_supervision, one, two)
    fixed = with_gradient(
        lambda a, b: cross_pseudo_supervision(a, b, best_class(one), best_class(two)), one, two
    )
    assert all(torch.equal(a, b) for a, b in zip(free[1], fixed[1], strict=True))
    assert not best_class(one.requires_grad_(True)).requires_grad


def test_every_pixel_takes_part_also_padding_and_void() -> None:
    _, gradients = with_gradient(cross_pseudo_supervision, logits_of(0), logits_of(1))
    assert all((gradient.abs().sum(dim=1) > 0).all() for gradient in gradients)


def test_identical_networks_still_sharpen_each_other() -> None:
    one = logits_of(0)
    value = cross_pseudo_supervision(one, one.clone())
    torch.testing.assert_close(value, 2 * -one.log_softmax(dim=1).max(dim=1).values.mean())


def test_the_first_of_equal_classes_is_the_label() -> None:
    logits = torch.zeros(1, K, 2, 3)
    logits[0, :, 0, 0] = torch.tensor([0.0, 2.0, 1.0, 2.0, 2.0])
    assert best_class(logits).tolist() == [[[1, 0, 0], [0, 0, 0]]]


# --- mixing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mix_takes_the_second_image_where_the_mask_is_one(dtype: torch.dtype) -> None:
    a, b = logits_of(0, dtype), logits_of(1, dtype)
    mask = (torch.rand(B, 1, H, W, generator=torch.Generator().manual_seed(2)) < 0.4).to(dtype)
    mixed = mix(a, b, mask)
    assert mixed.dtype == dtype
    assert torch.equal(mixed, torch.where(mask.bool(), b, a))


def test_mix_is_a_sum_of_products() -> None:
    a, b = torch.full((1, 1, 1, 2), torch.inf), torch.ones(1, 1, 1, 2)
    mixed = mix(a, b, torch.tensor([[[[0.0, 1.0]]]]))
    assert mixed[0, 0, 0, 0] == torch.inf
    assert mixed[0, 0, 0, 1].isnan()  # QUIRK: infinity times zero, where a selection would give 1
    assert float(mix(torch.zeros(1), torch.ones(1), torch.full((1,), 0.25))) == 0.25


# --- supervised loss -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_supervised_is_the_mean_of_the_means_of_the_groups(groups: int, dtype: torch.dtype) -> None:
    logits, target = logits_of(0, dtype), target_of(1)

    def naive(x: Tensor) -> Tensor:
        parts = zip(x.chunk(groups), target.chunk(groups), strict=True)
        return torch.stack([naive_cross_entropy(a, b) for a, b in parts]).mean()

    ours = with_gradient(lambda x: supervised(x, target, groups=groups), logits)
    assert ours[0].dtype == dtype
    assert_same(ours, with_gradient(naive, logits.double()))


def test_groups_weigh_pixels_by_how_few_their_group_has() -> None:
    logits, target = logits_of(0), target_of(1, 0.0)
    target[2:, 1:] = IGNORE  # the second process sees one row per image
    together, apart = (supervised(logits, target, groups=n) for n in (1, 2))
    halves = [supervised(logits[part], target[part]) for part in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(apart, (halves[0] + halves[1]) / 2)
    torch.testing.assert_close(together, (halves[0] * H + halves[1]) / (H + 1))
    assert abs(float(together - apart)) > 1e-3


@pytest.mark.parametrize("ohem", [None, OhemSettings(0.7, 0), OhemSettings(0.7, 10)])
def test_a_batch_without_labels_is_zero_or_undefined(ohem: OhemSettings | None) -> None:
    logits, target = logits_of(0), torch.full((B, H, W), IGNORE)
    value, (gradient,) = with_gradient(lambda x: supervised(x, target, ohem=ohem), logits)
    assert float(value) == 0
    assert not gradient.any()
    assert supervised(logits, target, ohem=ohem, empty_is_nan=True).isnan()


def test_one_group_without_labels_counts_as_zero_or_spoils_the_mean() -> None:
    logits, target = logits_of(0), target_of(1)
    target[:2] = IGNORE
    value = supervised(logits, target, groups=2)
    torch.testing.assert_close(value, naive_cross_entropy(logits[2:], target[2:]) / 2)
    assert supervised(logits, target, groups=2, empty_is_nan=True).isnan()
    assert supervised(logits, target, groups=1, empty_is_nan=True).isfinite()


def test_groups_must_divide_the_batch() -> None:
    with pytest.raises(RuntimeError):
        supervised(logits_of(0), target_of(1), groups=3)


def test_half_precision_is_computed_in_single() -> None:
    logits, target = logits_of(0, torch.float16), target_of(1)
    value = supervised(logits, target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, supervised(logits.float(), target))


# --- hard pixels -----------------------------------------------------------------------------------------------

VALID = int((target_of(1) != IGNORE).sum())


@pytest.mark.parametrize("thresh", [0.0, 0.05, 0.7, 1.0])
@pytest.mark.parametrize("min_kept", [0, 1, 50, VALID - 1, VALID, VALID + 1, B * H * W, B * H * W + 7])
def test_ohem_keeps_the_hard_pixels(min_kept: int, thresh: float) -> None:
    logits, target = logits_of(0), target_of(1)
    ours = with_gradient(lambda x: supervised(x, target, ohem=OhemSettings(thresh, min_kept)), logits)
    assert_same(ours, with_gradient(lambda x: naive_ohem(x, target, thresh, min_kept), logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ohem_selects_in_each_group(dtype: torch.dtype) -> None:
    logits, target = logits_of(0, dtype), target_of(1)
    logits[:2] *= 4  # easier and harder pixels than in the second half
    ours = with_gradient(lambda x: supervised(x, target, groups=2, ohem=OhemSettings(0.1, 60)), logits)

    def naive(x: Tensor) -> Tensor:
        return (naive_ohem(x[:2], target[:2], 0.1, 60) + naive_ohem(x[2:], target[2:], 0.1, 60)) / 2

    assert_same(ours, with_gradient(naive, logits.double()))
    together = supervised(logits, target, ohem=OhemSettings(0.1, 120))
    assert abs(float(ours[0] - together)) > 1e-3


def kept_pixels(logits: Tensor, target: Tensor, ohem: OhemSettings) -> int:
    _, (gradient,) = with_gradient(lambda x: supervised(x, target, ohem=ohem), logits)
    return int((gradient.abs().sum(dim=1) > 0).sum())


def test_pixels_at_the_threshold_are_kept() -> None:
    # two equal scores have the probability one half exactly, whatever they are
    score = torch.randn(1, 1, 40, 50, generator=torch.Generator().manual_seed(0))
    logits = torch.cat((score, score), dim=1)
    target = torch.zeros(1, 40, 50, dtype=torch.long)
    assert kept_pixels(logits, target, OhemSettings(0.5, 1)) == 2000
    assert kept_pixels(logits, target, OhemSettings(0.4, 1)) == 2000  # the smallest probability is the limit


def test_equal_probabilities_at_the_limit_are_all_kept() -> None:
    logits = torch.zeros(1, 2, 1, 10)
    logits[0, 0] = torch.tensor([[0.0, 1.0, 2.0, 2.0, 2.0, 2.0, 3.0, 3.0, 4.0, 5.0]])
    target = torch.zeros(1, 1, 10, dtype=torch.long)
    assert kept_pixels(logits, target, OhemSettings(0.1, 3)) == 6
    assert kept_pixels(logits, target, OhemSettings(0.1, 2)) == 2


def test_void_pixels_are_never_kept() -> None:
    logits, target = logits_of(0), target_of(1, 0.9)
    valid = int((target != IGNORE).sum())
    for min_kept in (1, valid, valid + 1, B * H * W):
        assert kept_pixels(logits, target, OhemSettings(1.0, min_kept)) == valid


def test_mean_of_averages_forwards_without_their_graphs() -> None:
    parts = [
        Losses(torch.tensor(v, requires_grad=True), {"loss_sup": torch.tensor(v + 1)}) for v in (1.0, 4.0)
    ]
    total, terms = mean_of(parts)
    assert not total.requires_grad
    assert math.isclose(float(total), 2.5)
    assert math.isclose(float(terms["loss_sup"]), 3.5)
