"""The loss terms: which pseudo-labels count, and cross entropy of both predictors with them.

Legend: B images, K classes, (H, W) crop, N sampled pixels. Losses are float32 (float64 for float64 inputs), zero
and connected to the graph where no pixel counts, and never wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data.spec import IGNORE
from common.models.deeplab import upsample
from common.numerics.losses import cross_entropy_or_zero, entropy, masked_percentiles, ohem_keep

Select = Literal["confidence", "entropy", "none"]
Norm = Literal["all", "valid", "u2pl"]


class PseudoLabels(NamedTuple):
    """What the teacher says about unlabeled images: its largest probability (B, H, W) and the class (B, H, W)."""

    conf: Tensor
    labels: Tensor


@torch.no_grad()
def pseudo_labels(logits_teacher: Tensor, size: Sequence[int]) -> PseudoLabels:
    """Confidence and label of every pixel, from the teacher's logits (B, K, h, w) resized to `size` (H, W)."""
    return PseudoLabels(*upsample(logits_teacher, size).softmax(dim=1).max(dim=1))


@torch.no_grad()
def select_pixels(
    conf: Tensor,
    labels: Tensor,
    select: Select,
    confid_thresh: float = 0.0,
    logits_teacher: Tensor | None = None,
    drop_percent: float = 100.0,
) -> Tensor:
    """Mask (B, H, W) bool of the pseudo-labels that count.

    `confidence`: at least `confid_thresh`. `entropy`: below the percentile `drop_percent` of the teacher's entropy
    over the pixels that carry a label, the selection of U2PL. `none`: all that carry a label.

    Args:
        conf: (B, H, W), mixed along with the images.
        labels: (B, H, W) int64, 255 = ignore.
        select: the rule.
        confid_thresh: probability.
        logits_teacher: (B, K, H, W) of the mixed images; for `entropy`.
        drop_percent: 0-100; for `entropy`.

    Source: the key `confid_thresh` of the authors' configurations (our reading, see the README);
    `compute_unsupervised_loss` in `u2pl/utils/loss_helper.py` of U2PL for `entropy`.
    """
    labeled = labels != IGNORE
    if select == "confidence":
        return labeled & (conf >= confid_thresh)
    if select == "none":
        return labeled
    assert logits_teacher is not None, "the selection by entropy needs the teacher's logits"
    values = entropy(logits_teacher.softmax(dim=1))
    return labeled & ~(values >= masked_percentiles(values, labeled, (drop_percent,)))


def unsupervised_loss(logits: Tensor, labels: Tensor, selected: Tensor, norm: Norm = "all") -> Tensor:
    """Cross entropy of the linear head with the selected pseudo-labels.

    Args:
        logits: (B, K, H, W) of the student.
        labels: (B, H, W) int64, 255 = ignore.
        selected: (B, H, W) bool.
        norm: the sum is divided by the number of `all` pixels or of the `valid` (selected) ones; `u2pl` is the mean
            over the valid ones times all / valid.
    """
    total, count = _selected_sum(logits, labels, selected)
    if norm == "all":
        return total / labels.numel()
    count = count.clamp(min=1).to(total.dtype)
    if norm == "valid":
        return total / count
    return labels.numel() / count * (total / count)


class PrototypeLosses(NamedTuple):
    """Terms of the prototype head: labeled and unlabeled pixels."""

    sup: Tensor
    unsup: Tensor


def prototype_losses(scores: Tensor, labels: Tensor, selected: Tensor, num_labeled: int) -> PrototypeLosses:
    """Cross entropy of the prototype head at the sampled pixels, with the targets of the linear head.

    Labeled pixels: the mean over those with a label. Unlabeled pixels: the sum over the selected ones, divided by
    the number of all of them.

    Args:
        scores: (N, K), labeled images first.
        labels: (N,) int64, 255 = ignore.
        selected: (N,) bool; looked at for unlabeled pixels only.
        num_labeled: how many of the N pixels are of labeled images; the others may be none.
    """
    n = num_labeled
    sup = cross_entropy_or_zero(scores[:n], labels[:n])
    unsup, _ = _selected_sum(scores[n:], labels[n:], selected[n:])
    return PrototypeLosses(sup, unsup / max(1, len(labels) - n))


def _selected_sum(logits: Tensor, labels: Tensor, selected: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross entropy over pixels that are selected and carry a label, and their number."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    target = labels.where(selected, IGNORE)
    total = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
    return total, (target != IGNORE).sum()


class Criterion(NamedTuple):
    """Supervised loss of the linear head on full-size logits: cross entropy or OHEM, plus the auxiliary head.

    Attributes:
        ohem: keep only hard pixels (each head selects its own).
        thresh: see `common.numerics.losses.ohem_keep`.
        min_kept: alike.
        aux_weight: weight of the auxiliary logits; 0 ignores them.

    Source: `CriterionOhem` in `u2pl/utils/loss_helper.py` of U2PL.
    """

    ohem: bool = True
    thresh: float = 0.7
    min_kept: int = 100000
    aux_weight: float = 0.0

    def __call__(self, logits: Tensor, target: Tensor, aux: Tensor | None = None) -> Tensor:
        """Loss of logits (B, K, H, W) and auxiliary logits (B, K, H, W) for labels (B, H, W), 255 = ignore."""
        loss = cross_entropy_or_zero(logits, self._select(logits, target))
        if aux is not None and self.aux_weight > 0:
            loss = loss + self.aux_weight * cross_entropy_or_zero(aux, self._select(aux, target))
        return loss

    def _select(self, logits: Tensor, target: Tensor) -> Tensor:
        return ohem_keep(logits, target, self.thresh, self.min_kept) if self.ohem else target
