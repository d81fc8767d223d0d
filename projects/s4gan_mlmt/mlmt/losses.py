"""Losses, schedules and figures of the multi-label mean teacher, the image-level branch.

Scores are logits (B, K) or their sigmoids; the network's
columns are the classes 1..K-1 and then class 0, the background. Arithmetic is in float32 (float64 for float64 inputs)
and stays on the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.distributed import Dist, sum_over_ranks
from common.numerics.losses import Losses
from common.numerics.precision import widened

COSINE_EPSILON = 1e-12


class Share(NamedTuple):
    """Which part of a global batch lies on this process; numbers of the host.

    Attributes:
        own: images that count here, the first ones of the batch; those after them only fill it up.
        total: images that count on all processes.
        processes: their number, by which gradients are divided when they are averaged.
    """

    own: int
    total: int
    processes: int = 1

    def mean(self, per_image: Tensor) -> Tensor:
        """Mean of (B,) over the images of all processes, once it has been averaged over them; 0 for no image."""
        return per_image[: self.own].sum() * (self.processes / max(self.total, 1))


def whole(batch: Tensor) -> Share:
    """The share of a single process: every image (along the first axis) counts."""
    return Share(len(batch), len(batch))


def multi_label_loss(logits: Tensor, target: Tensor, share: Share | None = None) -> Tensor:
    """Binary cross entropy of the sigmoids, mean over images and classes; 0 for an empty batch.

    The logarithm of a saturated sigmoid is cut at -100 and has no gradient, as in the authors' code, which takes
    the sigmoid first.

    Args:
        logits: (B, K).
        target: (B, K), 1 where a class is present, else 0.
        share: part of the global batch; None: all of it.

    Source: `train_mlmt.py` of s4GAN.
    """
    outputs = widened(logits).sigmoid()
    lost = outputs.isnan()  # the kernel would abort the process on a GPU; the guard is to see them
    losses = F.binary_cross_entropy(outputs.nan_to_num(0.5), target.to(outputs.dtype), reduction="none")
    losses = losses.where(~lost, torch.nan)
    return (share or whole(logits)).mean(losses.mean(dim=1))


def cosine_consistency(student: Tensor, teacher: Tensor, share: Share | None = None) -> Tensor:
    """`1 - cos` of the two networks' logits, mean over images; 0 for an empty batch.

    Args:
        student: (B, K), logits of the augmented views.
        teacher: (B, K), logits of the clean views; constants.
        share: part of the global batch; None: all of it.

    Source: `train_mlmt.py` of s4GAN (cosine embedding loss with target 1).
    """
    a, b = widened(student), widened(teacher.detach())
    lengths = ((a * a).sum(dim=1) + COSINE_EPSILON) * ((b * b).sum(dim=1) + COSINE_EPSILON)
    return (share or whole(a)).mean(1.0 - (a * b).sum(dim=1) / lengths.sqrt())


def mlmt_losses(
    logits: Tensor,
    target: Tensor,
    student: Tensor,
    teacher: Tensor,
    weight: float,
    labeled: Share | None = None,
    unlabeled: Share | None = None,
) -> Losses:
    """`L_cls + w * L_cons` and its terms; the consistency in the terms is unweighted.

    With weight 0 the consistency stays in the graph: its forwards are needed for BatchNorm anyway.

    Args:
        logits: (B, K) of labeled images.
        target: (B, K), their label vectors.
        student: (B', K), the student on augmented views of unlabeled images.
        teacher: (B', K), the teacher on their clean views.
        weight: of the consistency, see `consistency_weight`.
        labeled: part of the global batch that `logits` are; None: all of it.
        unlabeled: the same for `student` and `teacher`.
    """
    classes = multi_label_loss(logits, target, labeled)
    consistency = cosine_consistency(student, teacher, unlabeled)
    return Losses(classes + weight * consistency, {"loss_class": classes, "loss_consistency": consistency})


def consistency_weight(epoch: int, burn_in: int, epochs: int, largest: float) -> float:
    """Weight of the consistency in an epoch (from 0): 0 up to `burn_in`, then `2 (epoch - burn_in) / epochs`.

    Args:
        epoch: number of the epoch, from 0.
        burn_in: last epoch without consistency.
        epochs: of the whole run.
        largest: where the weight stops rising.
    """
    return 0.0 if epoch <= burn_in else min(largest, 2.0 * (epoch - burn_in) / epochs)


class Accuracies(NamedTuple):
    """Shares of correct entries in percent; scalars on the device.

    Attributes:
        balanced: mean of `zeros` and `ones`, the authors' figure.
        zeros: of the absent classes.
        ones: of the present classes.
        total: of all entries.
    """

    balanced: Tensor
    zeros: Tensor
    ones: Tensor
    total: Tensor


def count_correct(outputs: Tensor, target: Tensor, threshold: float = 0.5) -> Tensor:
    """Numbers (2, 2): rows absent and present, columns correct entries and all entries; they add up over batches.

    Args:
        outputs: (B, K), sigmoids.
        target: (B, K), 0 or 1.
        threshold: a class counts as found from this value on.
    """
    present = target >= 0.5
    right = (outputs >= threshold) == present
    sides = torch.stack((~present, present))
    return torch.stack(((sides & right).sum(dim=(1, 2)), sides.sum(dim=(1, 2))), dim=1)


def accuracies(counts: Tensor) -> Accuracies:
    """What `count_correct` amounts to.

    A side without entries counts as 0 percent and is left out of the balanced figure, where the authors' code would
    divide by zero (their background is present in every image).
    """
    counts = counts.double()
    correct, entries = counts[:, 0], counts[:, 1]
    sides = 100.0 * correct / entries.clamp(min=1)
    balanced = sides.sum() / (entries > 0).sum().clamp(min=1)
    total = 100.0 * correct.sum() / entries.sum().clamp(min=1)
    return Accuracies(balanced, sides[0], sides[1], total)


def log_accuracies(
    student: Tensor, teacher: Tensor, target: Tensor, threshold: float, share: Share, dist: Dist
) -> dict[str, Tensor]:
    """The balanced accuracy of both networks on the labeled images of all processes, by the name in the log.

    Args:
        student: (B, K), logits.
        teacher: (B, K), logits.
        target: (B, K), label vectors.
        threshold: see `count_correct`.
        share: the images that count.
        dist: this process.
    """
    counts = [
        count_correct(widened(x[: share.own].detach()).sigmoid(), target[: share.own], threshold)
        for x in (student, teacher)
    ]
    own, taught = sum_over_ranks(torch.stack(counts), dist)
    return {"accuracy": accuracies(own).balanced, "accuracy_teacher": accuracies(taught).balanced}


def roll_scores(scores: Tensor, flat: bool) -> Tensor:
    """Scores (B, K) of a validation batch with the background moved from the last column to the first.

    QUIRK mlmt.flat_roll: with `flat` the whole batch is rolled as one row, so the first column holds the background
    score of the image before (the first image's that of the last). Otherwise every row is rolled by itself.
    """
    return torch.roll(scores, 1) if flat else torch.roll(scores, 1, dims=1)
