"""One iteration of s4GAN: the losses of the segmentation network, then those of the discriminator."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.data.loaders import Batch
from common.distributed import Dist
from common.models.deeplab import upsample
from common.numerics.losses import Losses
from common.numerics.precision import autocast, widened
from projects.s4gan_mlmt.config import MethodConfig, QuirkConfig
from projects.s4gan_mlmt.losses import (
    above_threshold,
    discriminator_loss,
    fake_maps,
    feature_matching,
    real_maps,
    segmentation_loss,
    self_training,
)

Segment = Callable[..., list[Tensor]]
Judge = Callable[..., "list[Judgement]"]


class Segmenter(nn.Module):
    """The segmentation network as the step calls it: all batches of an iteration in one call, one after the other.

    One call lets the gradients of all its forwards be reduced over processes at once. The running statistics of
    BatchNorm are moved by every batch, in their order (QUIRK separate_statistics).

    Args:
        network: maps images (B, 3, H, W) to logits (B, K, h, w).
        separate: every batch has BatchNorm statistics of its own; false joins them into one forward.
        precision: of the forward passes.
    """

    def __init__(self, network: nn.Module, separate: bool = True, precision: str = "fp32") -> None:
        super().__init__()
        self.network, self.separate, self.precision = network, separate, precision

    def forward(self, *batches: Tensor) -> list[Tensor]:
        """Logits (B, K, H, W) in float32 at the size of the images, for every batch."""
        if self.separate or len(batches) == 1:
            return [self.scores(x) for x in batches]
        return list(self.scores(torch.cat(batches)).split([len(x) for x in batches]))

    def scores(self, x: Tensor) -> Tensor:
        """Logits of one batch."""
        with autocast(x.device, self.precision):
            logits = self.network(x)
        return upsample(widened(logits), x.shape[-2:])

    def predict(self, x: Tensor) -> Tensor:
        """The same for evaluation, in the precision of its caller."""
        return upsample(widened(self.network(x)), x.shape[-2:])


class Judgement(NamedTuple):
    """What the discriminator says of maps: scores (B, 1) in 0..1, 1 for real, and features (B, D, 1, 1)."""

    scores: Tensor
    feats: Tensor


class Critic(nn.Module):
    """The discriminator as the step calls it.

    Args:
        discriminator: maps (B, K + 3, H, W) to scores and features.
        precision: of the forward passes.
    """

    def __init__(self, discriminator: nn.Module, precision: str = "fp32") -> None:
        super().__init__()
        self.discriminator, self.precision = discriminator, precision

    def forward(self, *maps: Tensor) -> list[Judgement]:
        """A judgement in float32 of every input, with dropout of its own."""
        return [self.judged(x) for x in maps]

    def judged(self, x: Tensor) -> Judgement:
        """The judgement of one input."""
        with autocast(x.device, self.precision):
            scores, feats = self.discriminator(x)
        return Judgement(widened(scores), widened(feats))


class CriticInputs(NamedTuple):
    """Fake and real maps of an iteration (B, K + 3, H, W), without gradient."""

    fake: Tensor
    real: Tensor


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """A module whose parameters take no gradient inside, though gradients pass through it."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


def supervised_losses(labeled: Batch, segment: Segment, dist: Dist) -> Losses:
    """Loss of the supervised baseline: cross entropy on labeled images.

    Args:
        labeled: images and labels.
        segment: a `Segmenter`, wrapped or not.
        dist: this process's place.

    Source: `train_full.py`.
    """
    (logits,) = segment(labeled.image)
    loss = segmentation_loss(logits, labeled.label, dist=dist)
    return Losses(loss, {"loss_sup": loss})


def accepted_images(
    fake: Tensor, scores: Tensor, critic: Critic, method: MethodConfig, quirks: QuirkConfig
) -> Tensor:
    """Which unlabeled images (B,) teach themselves.

    QUIRK gate_dropout: `scores` came under dropout, so the same image can pass or fail by chance; without the quirk
    the fake maps are judged once more without it.
    """
    if not quirks.gate_dropout:
        training = critic.training
        with torch.no_grad():
            scores = critic.eval().judged(fake.detach()).scores
        critic.train(training)
    return above_threshold(scores, method.st_threshold)


def segmentation_losses(
    batches: Sequence[Batch],
    iteration: int,
    segment: Segment,
    critic: Critic,
    method: MethodConfig,
    quirks: QuirkConfig,
    dist: Dist,
) -> tuple[Losses, CriticInputs]:
    """Losses of the segmentation network, and what the discriminator then learns from.

    The unlabeled images go through the network once, for both steps. The discriminator's parameters must be `frozen`.

    Args:
        batches: labeled, unlabeled and real images; labels of the unlabeled ones are not looked at.
        iteration: number of the step, from 0.
        segment: a `Segmenter`, wrapped or not.
        critic: the discriminator, not wrapped.
        method: weights and threshold.
        quirks: which of the authors' oddities hold.
        dist: this process's place.

    Returns:
        The sum of the weighted losses `loss_sup`, `loss_fm` and `loss_st`, and `kept`, the share of unlabeled images
        above the threshold; and the discriminator's inputs.

    Source: eq. (5) of the paper; `train_s4GAN.py`, steps 2 to 12 of its loop.
    """
    labeled, unlabeled, real = batches
    logits_l, logits_u = segment(labeled.image, unlabeled.image)
    loss_sup = segmentation_loss(logits_l, labeled.label, dist=dist)

    fake = fake_maps(logits_u, unlabeled.image, dist)
    (of_fake,) = critic(fake)
    accepted = accepted_images(fake, of_fake.scores, critic, method, quirks)
    divisor = labeled.image if quirks.real_range == "labeled" else None
    with torch.no_grad():
        maps = real_maps(real.label, real.image, logits_u.shape[1], divisor, dist)
        (of_real,) = critic(maps)

    loss_fm = method.fm_weight * feature_matching(of_real.feats, of_fake.feats, dist)
    total, loss_st = loss_sup + loss_fm, torch.zeros_like(loss_sup)
    if iteration >= method.st_start:
        loss_st = method.st_weight * self_training(logits_u, accepted, dist)
        total = total + loss_st
    terms = {"loss_sup": loss_sup, "loss_fm": loss_fm, "loss_st": loss_st, "kept": accepted.float().mean()}
    return Losses(total, terms), CriticInputs(fake.detach(), maps)


def critic_losses(inputs: CriticInputs, judge: Judge, dist: Dist) -> Losses:
    """Loss of the discriminator on predictions of the network that has not stepped yet.

    Args:
        inputs: fake and real maps.
        judge: a `Critic`, wrapped or not; its forwards draw fresh dropout.
        dist: this process's place.

    Source: eq. (2) of the paper; `train_s4GAN.py`, step 14 of its loop.
    """
    fake, real = judge(*inputs)
    loss = discriminator_loss(fake.scores, real.scores, dist)
    return Losses(loss.total, {"loss_d": loss.total})
