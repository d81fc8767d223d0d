"""Properties of the losses that no recorded case pins: edges, gradients, precision."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from projects.s4gan_mlmt.losses import (
    IGNORE,
    above_threshold,
    batch_mean,
    discriminator_loss,
    fake_maps,
    feature_matching,
    one_hot,
    pseudo_labels,
    real_maps,
    score_loss,
    segmentation_loss,
    self_training,
    to_unit_range,
    value_range,
)

K = 5


def logits_of(seed: int = 0, images: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, K, 4, 6, generator=generator, requires_grad=True)


def labels_of(seed: int = 1, images: int = 3) -> Tensor:
    return torch.randint(0, K, (images, 4, 6), generator=torch.Generator().manual_seed(seed))


def zero_gradient(loss: Tensor, logits: Tensor) -> bool:
    loss.backward()
    return logits.grad is not None and not logits.grad.any()


# --- cross entropy ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ignore", [255, 250, -1])
def test_the_ignored_label_and_negative_ones_do_not_count(ignore: int) -> None:
    logits, target = logits_of(), labels_of()
    target[0, :2], target[1, 0] = ignore, -7
    valid = (target >= 0) & (target != ignore)
    pixels = F.cross_entropy(logits, target.where(valid, 0), reduction="none")
    torch.testing.assert_close(segmentation_loss(logits, target, ignore), pixels[valid].mean())


def test_the_mean_is_over_pixels_and_not_over_images() -> None:
    logits, target = logits_of(images=2), labels_of(images=2)
    target[1, 1:] = IGNORE
    parts = [segmentation_loss(logits[i : i + 1], target[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(segmentation_loss(logits, target), (24 * parts[0] + 6 * parts[1]) / 30)


def test_without_labels_it_is_a_zero_with_a_zero_gradient() -> None:
    logits = logits_of()
    loss = segmentation_loss(logits, torch.full((3, 4, 6), IGNORE))
    assert loss == 0
    assert zero_gradient(loss, logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(dtype: torch.dtype) -> None:
    logits, target = logits_of().detach().to(dtype), labels_of()
    accepted = torch.tensor([True, False, True])
    assert segmentation_loss(logits, target).dtype == self_training(logits, accepted).dtype == torch.float32
    torch.testing.assert_close(segmentation_loss(logits, target), segmentation_loss(logits.float(), target))
    assert fake_maps(logits, torch.rand(3, 3, 4, 6)).dtype == torch.float32


# --- inputs of the discriminator -------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_real_maps_have_the_layout_of_their_images(layout: torch.memory_format) -> None:
    images, target = torch.randn(2, 3, 5, 6), torch.randint(0, 4, (2, 5, 6))
    maps = real_maps(target, images.contiguous(memory_format=layout), 4)
    assert maps.is_contiguous(memory_format=layout)
    assert torch.equal(maps, real_maps(target, images, 4))


def test_one_hot_of_ignored_and_foreign_labels_is_zero() -> None:
    target = torch.tensor([[[0, 4, 255, 5, -1, 2]]])
    channels = one_hot(target, K)
    assert channels.sum(dim=1).tolist() == [[[1, 1, 0, 0, 0, 1]]]
    assert channels.argmax(dim=1)[0, 0, [0, 1, 5]].tolist() == [0, 4, 2]


def test_the_range_is_that_of_the_whole_batch() -> None:
    images = torch.zeros(2, 3, 2, 2)
    images[0, 0, 0, 0], images[1, 2, 1, 1] = -3.0, 5.0
    found = value_range(images)
    assert (found.low, found.high) == (-3, 5)
    assert to_unit_range(images, found, found).aminmax() == (0, 1)


def test_a_constant_batch_becomes_zero() -> None:
    images = torch.full((2, 3, 4, 6), -0.7)
    assert not fake_maps(logits_of(images=2), images)[:, K:].any()
    assert not real_maps(labels_of(images=2), images, K)[:, K:].any()
    assert real_maps(labels_of(images=2), torch.rand(2, 3, 4, 6), K, images).isfinite().all()


def test_gradients_pass_through_the_probabilities_alone() -> None:
    logits, images = logits_of(), torch.rand(3, 3, 4, 6, requires_grad=True)
    fake_maps(logits, images)[:, 0].sum().backward()
    assert logits.grad is not None
    assert logits.grad.any()
    assert not value_range(images).low.requires_grad


def test_real_range_is_a_choice() -> None:
    images, labeled = torch.rand(3, 3, 4, 6) + 1, 4 * torch.rand(3, 3, 4, 6)
    own, quirk = (real_maps(labels_of(), images, K, x)[:, K:] for x in (None, labeled))
    span = value_range(images), value_range(labeled)
    assert own.aminmax() == (0, 1)
    torch.testing.assert_close(quirk * (span[1].high - span[1].low), own * (span[0].high - span[0].low))


# --- feature matching ------------------------------------------------------------------------------------------


def test_batches_of_different_sizes_match() -> None:
    real, fake = torch.randn(5, 8, 1, 1, requires_grad=True), torch.randn(2, 8, 1, 1, requires_grad=True)
    loss = feature_matching(real, fake)
    torch.testing.assert_close(loss, F.l1_loss(fake.mean(0), real.mean(0)))
    loss.backward()
    assert real.grad is None
    torch.testing.assert_close(
        fake.grad, (fake.mean(0) - real.mean(0)).sign().expand(2, 8, 1, 1).detach() / 16
    )
    torch.testing.assert_close(batch_mean(real), real.mean(0))


def test_the_mean_over_images_comes_first() -> None:
    real = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    assert feature_matching(real, -real) == 0


# --- self-training ---------------------------------------------------------------------------------------------


def test_a_score_that_equals_the_threshold_fails_in_every_precision() -> None:
    scores = torch.tensor([[0.6], [0.6 + 1e-7], [0.5], [math.nan]])
    for dtype in (torch.float32, torch.float64):
        assert above_threshold(scores.to(dtype), 0.6).tolist() == [False, True, False, False]


def test_images_that_fail_get_no_gradient_and_do_not_dilute() -> None:
    logits, accepted = logits_of(), torch.tensor([False, True, False])
    loss = self_training(logits, accepted)
    torch.testing.assert_close(loss, F.cross_entropy(logits[1:2], logits[1:2].argmax(dim=1)))
    loss.backward()
    assert logits.grad is not None
    assert [bool(g.any()) for g in logits.grad] == accepted.tolist()


def test_no_accepted_image_is_a_zero_with_a_zero_gradient() -> None:
    logits = logits_of()
    loss = self_training(logits, torch.zeros(3, dtype=torch.bool))
    assert loss == 0
    assert zero_gradient(loss, logits)


def test_the_first_of_equal_classes_is_the_label() -> None:
    logits = torch.zeros(1, K, 2, 2)
    logits[0, 2:4] = 1
    assert (pseudo_labels(logits, torch.tensor([True])) == 2).all()
    assert (pseudo_labels(logits, torch.tensor([False])) == IGNORE).all()


# --- discriminator ---------------------------------------------------------------------------------------------


def test_parts_and_their_half_sum() -> None:
    fake, real = torch.tensor([[0.2], [0.4]]), torch.tensor([[0.9]])
    loss = discriminator_loss(fake, real)
    expected = -(math.log(0.8) + math.log(0.6)) / 2, -math.log(0.9)
    assert [float(x) for x in loss] == pytest.approx([sum(expected) / 2, *expected], rel=1e-6)


def test_saturated_scores_are_finite() -> None:
    inputs = torch.tensor([[200.0], [-200.0]], requires_grad=True)
    for label in (0.0, 1.0):
        loss = score_loss(inputs.sigmoid(), label)
        assert loss.isfinite()
        (gradient,) = torch.autograd.grad(loss, inputs)
        assert gradient.isfinite().all()


def test_a_score_that_is_not_a_number_is_not_hidden() -> None:
    """The framework's own function ends the process on it, where the guard can no longer say what was wrong."""
    assert score_loss(torch.tensor([[0.5], [math.nan]]), 1.0).isnan()
