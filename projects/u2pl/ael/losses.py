"""The losses of AEL and the targets of its consistency; they wait for nothing.

Legend as in `projects/u2pl/losses.py`; P pairs of unlabeled images in a forward.

Source: branch `with_AEL` of U2PL; AEL is Hu et al., NeurIPS 2021.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data.spec import IGNORE
from common.numerics.losses import best_class, entropy, masked_percentiles
from projects.u2pl.losses import EntropySplit


@torch.no_grad()
def sampled_pixels(logits: Tensor, class_confidence: Tensor, uniform: Tensor, gamma2: float = 1.0) -> Tensor:
    """Pixels (B, H, W) bool that the consistency keeps: the less confident their predicted class, the more likely.

    Args:
        logits: (B, K, H, W) of the student.
        class_confidence: (K,) in 0..1.
        uniform: (K, H, W) numbers in [0, 1), one map per class for the whole batch.
        gamma2: exponent of the rates.
    """
    rate = 1.0 - class_confidence
    rate = (rate / (rate.max() + 1e-12)).pow(gamma2)
    predicted = best_class(logits)
    return uniform.gather(0, predicted) > (1.0 - rate)[predicted]


def consistency_loss(
    logits: Tensor, confidence: Tensor, target: Tensor, gamma: float, keep: Tensor | None = None
) -> Tensor:
    """Cross entropy with the teacher's labels, each pixel weighted by `confidence^gamma` over the sum of weights.

    Ignored pixels add no loss but count among the weights; no pixel kept gives zero.

    Args:
        logits: (B, K, H, W) of the student.
        confidence: (B, H, W), largest probability of the teacher, without gradient.
        target: (B, H, W) int64, 255 = ignore.
        gamma: exponent.
        keep: (B, H, W) bool, see `sampled_pixels`; None keeps all.

    Source: `Criterion_cons` in `u2pl/utils/loss_helper.py`, branch `with_AEL`.
    """
    loss = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")
    weight = confidence.pow(gamma)
    if keep is not None:
        weight = weight * keep
    return (weight / (weight.sum() + 1e-12) * loss).sum()


def reverse_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over labeled pixels of `-sum_c p_c log(clamp(onehot_c, 1e-4, 1))`, a noise-tolerant partner of CE.

    Args:
        logits: (B, K, H, W).
        target: (B, H, W) int64, 255 = ignore.

    Source: `compute_rce_loss` of U2PL.
    """
    valid = target != IGNORE
    probs = logits.softmax(dim=1)
    onehot = F.one_hot(target.where(valid, 0), logits.shape[1]).movedim(-1, 1).to(probs.dtype)
    per_pixel = -(probs * onehot.clamp(min=1e-4).log()).sum(dim=1)
    return (per_pixel * valid).sum() / valid.sum().clamp(min=1)


class TeacherTargets(NamedTuple):
    """What the student shall reproduce on the mixed images, each (P, H, W)."""

    pseudo: Tensor  # int64, 255 = dropped
    confidence: Tensor  # largest probability
    split: EntropySplit  # for the contrast; its labels may hold the dropped ones too


@torch.no_grad()
def unlabeled_targets(
    logits: Tensor,
    drop_percent: float,
    low_percent: float,
    high_percent: float,
    drop_low_entropy: bool = True,
) -> TeacherTargets:
    """Pseudo-labels of the mixed teacher logits (P, K, H, W) without the `drop_percent` that are to be ignored.

    Percentiles are over all pixels of this process. QUIRK method.ael.drop_low_entropy: the original drops the pixels
    with the LOWEST entropy, and takes them out of the contrast too, whose reliable pixels thus shrink to a band;
    otherwise the highest ones are dropped, from the consistency only.

    Args:
        logits: mixed logits of the eval-mode teacher.
        drop_percent: share of the pixels to drop.
        low_percent: percentile up to which a pixel is reliable.
        high_percent: percentile from which on a pixel is unreliable.
        drop_low_entropy: which end is dropped.
    """
    probs = logits.softmax(dim=1)
    values = entropy(probs)
    everywhere = torch.ones_like(values, dtype=torch.bool)
    bottom, top, low, high = masked_percentiles(
        values, everywhere, (drop_percent, 100.0 - drop_percent, low_percent, high_percent)
    )
    labels = best_class(logits)
    pseudo = labels.where(~(values < bottom if drop_low_entropy else values >= top), IGNORE)
    seen = pseudo if drop_low_entropy else labels
    valid = seen != IGNORE
    split = EntropySplit(seen, valid & (values <= low), valid & (values >= high))
    return TeacherTargets(pseudo, probs.amax(dim=1), split)
