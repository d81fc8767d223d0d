"""The equations of s4GAN as functions of tensors; with several processes they are those of one global batch.

Legend: B images, K classes, (H, W) image size. Where `dist` has several processes, sums and counts run over the
images of all of them; each process returns a share whose average over processes, like that of its gradients, is the
loss of the global batch. Nothing here asks the device for a value.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data.spec import IGNORE
from common.distributed import Dist, max_over_ranks, sum_over_ranks
from common.numerics.losses import best_class
from common.numerics.precision import widened

ALONE = Dist()


class SumOverRanks(torch.autograd.Function):
    """Sum of a tensor over the processes, for losses that every process computes alike from it.

    The gradient is multiplied by the number of processes, which the averaging of the gradients divides by.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dist: Dist) -> Tensor:
        """`x` (any shape, equal on all processes) summed."""
        ctx.processes = dist.world_size
        return sum_over_ranks(x, dist)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradient of this process's `x`, and none of `dist`."""
        return grads[0] * ctx.processes, None


def batch_mean(x: Tensor, dist: Dist = ALONE) -> Tensor:
    """Mean of (B, ...) over the images of all processes, which may hold different numbers: (...), equal on all."""
    if dist.world_size == 1:
        return x.mean(dim=0)
    count = sum_over_ranks(torch.full((), len(x), dtype=torch.float32, device=x.device), dist)
    total: Tensor = SumOverRanks.apply(x.sum(dim=0), dist)
    return total / count


def share_of_mean(total: Tensor, count: Tensor, dist: Dist = ALONE) -> Tensor:
    """A process's share of a mean: its `total` by the average count of the processes; 0 where there is nothing."""
    return total * dist.world_size / sum_over_ranks(count, dist).clamp(min=1)


def segmentation_loss(logits: Tensor, target: Tensor, ignore: int = IGNORE, dist: Dist = ALONE) -> Tensor:
    """Mean cross entropy over all labeled pixels of the batch, unweighted: a scalar.

    Without any labeled pixel it is a zero that is connected to the graph. That is a deviation: the original means to
    return zero too, but its test never holds, and the mean of nothing is not a number.

    Args:
        logits: (B, K, H, W).
        target: (B, H, W) int64; negative labels and `ignore` do not count.
        ignore: the label of ignored pixels; the authors' are 255 (VOC), -1 (Context) and 250 (Cityscapes).
        dist: this process's place.

    Source: `CrossEntropy2d` in `utils/loss.py`.
    """
    valid = (target >= 0) & (target != ignore)
    labels = target.where(valid, IGNORE)
    total = F.cross_entropy(widened(logits), labels, ignore_index=IGNORE, reduction="sum")
    return share_of_mean(total, valid.sum(), dist)


def one_hot(target: Tensor, num_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Class channels (B, K, H, W) of labels (B, H, W) int64; pixels of no class are zero in all of them.

    Source: `one_hot` in `train_s4GAN.py`.
    """
    valid = (target >= 0) & (target < num_classes)
    channels = torch.zeros((*target.shape, num_classes), dtype=dtype, device=target.device)
    channels.scatter_(-1, target.where(valid, 0).unsqueeze(-1), valid.unsqueeze(-1).to(dtype))
    return channels.movedim(-1, 1)  # in memory the channels come last, as those of the images behind them


class Maps(NamedTuple):
    """What the discriminator learns from: fake and real maps (B, K + 3, H, W), without gradient."""

    fake: Tensor
    real: Tensor


class Range(NamedTuple):
    """Smallest and largest value of a batch; scalars on the device."""

    low: Tensor
    high: Tensor


def value_range(images: Tensor, dist: Dist = ALONE) -> Range:
    """Range over all channels and images of the batches (B, 3, H, W) of all processes."""
    low, high = images.detach().aminmax()
    negated, high = max_over_ranks(torch.stack((-low, high)), dist)
    return Range(-negated, high)


def to_unit_range(images: Tensor, own: Range, span: Range) -> Tensor:
    """`(images - low of own) / (high - low of span)`; zero for a batch of one single value.

    With a `span` that is not its own the result leaves 0..1, see `real_maps`.
    """
    width = span.high - span.low
    return (images - own.low) / width.where(width > 0, 1)


def fake_maps(logits: Tensor, images: Tensor, dist: Dist = ALONE) -> Tensor:
    """What the discriminator shall call fake: class probabilities, then the image in 0..1: (B, K + 3, H, W).

    Args:
        logits: of the unlabeled images (B, K, H, W); their gradient passes.
        images: those images (B, 3, H, W), scaled with the range of the whole batch.
        dist: this process's place.
    """
    own = value_range(images, dist)
    probs = widened(logits).softmax(dim=1)
    return torch.cat((probs, to_unit_range(images, own, own).to(probs.dtype)), dim=1)


def real_maps(
    target: Tensor, images: Tensor, num_classes: int, labeled: Tensor | None = None, dist: Dist = ALONE
) -> Tensor:
    """What it shall call real: class channels of the labels, then the image: (B, K + 3, H, W).

    QUIRK quirks.real_range: the image is scaled by the range of the other labeled batch, so it need not end at 1.

    Args:
        target: labels (B, H, W) int64.
        images: their images (B, 3, H, W).
        num_classes: K.
        labeled: the batch of the supervised loss, whose range divides; None for the range of `images`.
        dist: this process's place.
    """
    own = value_range(images, dist)
    span = own if labeled is None else value_range(labeled, dist)
    return torch.cat((one_hot(target, num_classes, images.dtype), to_unit_range(images, own, span)), dim=1)


def feature_matching(real: Tensor, fake: Tensor, dist: Dist = ALONE) -> Tensor:
    """Mean distance of the batch means of the discriminator's features, unweighted: a scalar.

    The mean over images comes first, so batches of different sizes match. No gradient reaches `real`.

    Args:
        real: (B', D, 1, 1) of the real maps.
        fake: (B, D, 1, 1) of the fake ones.
        dist: this process's place.

    Source: eq. (3) of the paper; `train_s4GAN.py`.
    """
    return (batch_mean(widened(real).detach(), dist) - batch_mean(widened(fake), dist)).abs().mean()


def above_threshold(scores: Tensor, threshold: float) -> Tensor:
    """Which images (B,) the discriminator finds real enough, by its scores (B, 1); equal is not enough.

    Compared in float32, as the authors do: a score of 0.6 does not exceed the threshold 0.6.
    """
    return scores.detach().float().flatten() > threshold


def pseudo_labels(logits: Tensor, accepted: Tensor) -> Tensor:
    """Best classes (B, H, W), the first one of equals; images that are not accepted (B,) are ignored entirely."""
    return best_class(logits).where(accepted.view(-1, 1, 1), IGNORE)


def self_training(logits: Tensor, accepted: Tensor, dist: Dist = ALONE) -> Tensor:
    """Mean cross entropy of the accepted images with their own best classes, unweighted: a scalar.

    Zero where no image is accepted. The logits keep their gradient, the labels have none.

    Args:
        logits: of the unlabeled images (B, K, H, W).
        accepted: (B,) bool.
        dist: this process's place.

    Source: eq. (4) of the paper; `train_s4GAN.py`.
    """
    return segmentation_loss(logits, pseudo_labels(logits, accepted), IGNORE, dist)


def score_loss(scores: Tensor, label: float, dist: Dist = ALONE) -> Tensor:
    """Binary cross entropy of scores (B, 1) in 0..1 with one label for all images: a scalar.

    A score that is not a number makes the loss one that is not (rather than an error of the device).
    """
    scores = widened(scores)
    finite = scores.nan_to_num(nan=0.5)
    total = F.binary_cross_entropy(finite, torch.full_like(finite, label), reduction="sum")
    count = torch.full((), scores.numel(), dtype=scores.dtype, device=scores.device)
    return share_of_mean(total + 0.0 * scores.sum(), count, dist)


class DiscriminatorLoss(NamedTuple):
    """Half the sum of both parts, and the parts; scalars."""

    total: Tensor
    fake: Tensor
    real: Tensor


def discriminator_loss(fake: Tensor, real: Tensor, dist: Dist = ALONE) -> DiscriminatorLoss:
    """Binary cross entropies of scores of fake maps (B, 1) with 0 and of real ones (B', 1) with 1, and half their sum.

    Source: eq. (2) of the paper; `train_s4GAN.py`.
    """
    parts = score_loss(fake, 0.0, dist), score_loss(real, 1.0, dist)
    return DiscriminatorLoss((parts[0] + parts[1]) / 2, *parts)
