"""Supervised and pseudo-label loss of U2PL, and the entropy split that the contrast uses too.

Legend: B images, K classes, (H, W) label size. Nothing here waits for the device or draws random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data.spec import IGNORE
from common.distributed import to_device
from common.numerics.losses import cross_entropy_or_zero, entropy, masked_percentiles, ohem_keep

# classes of Cityscapes that the option `class_weights` counts a second time, 1
HARD_CLASS_WEIGHTS = (0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 0, 0, 1, 0, 1, 0, 1, 1, 1)
# class weights of the OHEM criterion under the same option
OHEM_CLASS_WEIGHTS = (
    0.8373, 0.918, 0.866, 1.0345, 1.0166, 0.9969, 0.9754, 1.0489, 0.8786, 1.0023,
    0.9539, 0.9843, 1.1116, 0.9037, 1.0865, 1.0955, 1.0865, 1.1529, 1.0507,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Criterion:
    """Supervised loss on full-size logits: cross entropy or OHEM, plus the weighted auxiliary head.

    Attributes:
        ohem: keep only hard pixels (each head selects its own).
        thresh, min_kept: see `common.numerics.losses.ohem_keep`.
        aux_weight: weight of the auxiliary logits; 0 ignores them.
        class_weights: the original's `use_weight`, for 19 classes only.

    Source: `Criterion` and `CriterionOhem` in `u2pl/utils/loss_helper.py`.
    """

    ohem: bool = False
    thresh: float = 0.7
    min_kept: int = 100000
    aux_weight: float = 0.0
    class_weights: bool = False

    def __call__(self, logits: Tensor, target: Tensor, aux: Tensor | None = None) -> Tensor:
        """Loss of logits (B, K, H, W) and auxiliary logits (B, K, H, W) for labels (B, H, W), 255 = ignore."""
        loss = self._main(logits, target)
        if aux is not None and self.aux_weight > 0:
            loss = loss + self.aux_weight * cross_entropy_or_zero(aux, self._select(aux, target))
        return loss

    def _main(self, logits: Tensor, target: Tensor) -> Tensor:
        kept = self._select(logits, target)
        if not self.class_weights:
            return cross_entropy_or_zero(logits, kept)
        if self.ohem:
            return cross_entropy_or_zero(logits, kept, _like(logits, OHEM_CLASS_WEIGHTS))
        if self.aux_weight <= 0:
            return cross_entropy_or_zero(logits, kept)
        again = cross_entropy_or_zero(logits, kept, _like(logits, HARD_CLASS_WEIGHTS))
        return cross_entropy_or_zero(logits, kept) + again

    def _select(self, logits: Tensor, target: Tensor) -> Tensor:
        return ohem_keep(logits, target, self.thresh, self.min_kept) if self.ohem else target


def _like(logits: Tensor, weights: Sequence[float]) -> Tensor:
    return to_device(torch.tensor(weights, dtype=logits.dtype), logits.device)


class EntropySplit(NamedTuple):
    """What the teacher's entropy says about the unlabeled pixels, each (B, H, W)."""

    pseudo: Tensor  # labels with the dropped pixels set to ignore
    reliable: Tensor  # bool, lowest entropies: anchors and centres
    unreliable: Tensor  # bool, highest entropies: negatives


@torch.no_grad()
def split_by_entropy(
    logits_teacher: Tensor, pseudo: Tensor, drop_percent: float, alpha: float
) -> EntropySplit:
    """Sort the unlabeled pixels by the teacher's entropy; one softmax and one sort serve all three uses.

    Args:
        logits_teacher: (B, K, H, W), full size.
        pseudo: (B, H, W) int64 labels after the strong augmentation, 255 = ignore.
        drop_percent: percentile at and above which a pseudo-label is dropped, eq. (4) and (5).
        alpha: percent taken from each end for the contrast.

    Source: section 3.2 of the paper; `compute_unsupervised_loss` and the mask part of `train_semi.py`.
    """
    valid = pseudo != IGNORE
    values = entropy(logits_teacher.softmax(dim=1))
    drop, low, high = masked_percentiles(values, valid, (drop_percent, alpha, 100.0 - alpha))
    # QUIRK percentile_boundary: the pixel at the percentile is dropped, and every process has its own percentiles
    return EntropySplit(
        pseudo=torch.where(values >= drop, IGNORE, pseudo),
        reliable=valid & (values <= low),
        unreliable=valid & (values >= high),
    )


def pseudo_label_loss(logits: Tensor, pseudo: Tensor) -> Tensor:
    """Cross entropy with the kept pseudo-labels, times pixels / kept pixels (QUIRK scaled_pseudo_loss), eq. (3).

    Args:
        logits: (B, K, H, W) of the student.
        pseudo: (B, H, W) int64, 255 = ignored or dropped; none kept gives zero.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    total = F.cross_entropy(logits, pseudo, ignore_index=IGNORE, reduction="sum")
    kept = (pseudo != IGNORE).sum(dtype=total.dtype).clamp(min=1)
    return pseudo.numel() / kept * (total / kept)
