"""Pseudo-labels, pasting and the losses of UniMatch, V1 and V2.

Legend: B images, K classes, (H, W) image size. Nothing here waits for the device or draws random numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from common.data.spec import IGNORE
from common.numerics.losses import best_class, ohem_keep


class Pseudo(NamedTuple):
    """Labels (B, H, W) int64 and their probability of unlabeled images, and where an image is padding (bool)."""

    label: Tensor
    conf: Tensor
    padding: Tensor

    def mirrored(self) -> Pseudo:
        """Those of the images at the mirrored positions of the batch."""
        return Pseudo(*(part.flip(0) for part in self))


def pseudo_labels(logits: Tensor, padding: Tensor) -> Pseudo:
    """The best class of each pixel of logits (B, K, H, W), without a gradient."""
    logits = logits.detach()
    # the class by logits, as the authors take it: a softmax rounds neighbours to equal numbers
    return Pseudo(best_class(logits), logits.softmax(dim=1).max(dim=1).values, padding)


def paste(own: Tensor, other: Tensor, box: Tensor) -> Tensor:
    """`other` where the box (B, H, W) bool is, elsewhere `own`; images (B, C, H, W) or maps (B, H, W)."""
    return other.where(box if own.dim() == box.dim() else box.unsqueeze(1), own)


def pasted(own: Pseudo, other: Pseudo, box: Tensor) -> Pseudo:
    """Pseudo-labels of images into which the box of others is pasted."""
    return Pseudo(*(paste(a, b, box) for a, b in zip(own, other, strict=True)))


def kept_share(pseudo: Pseudo, threshold: float, empty_is_nan: bool = False) -> Tensor:
    """Share of the pixels that are no padding whose probability reaches the threshold: a scalar."""
    real = ~pseudo.padding
    return ((pseudo.conf >= threshold) & real).sum() / _count(real, empty_is_nan)


def consistency(logits: Tensor, pseudo: Pseudo, threshold: float, empty_is_nan: bool = False) -> Tensor:
    """Cross entropy with the pseudo-labels that reach the threshold, over all pixels that are no padding: a scalar.

    QUIRK all_pixels_count: the divisor counts unsure pixels too, so few sure ones make a small loss.

    Args:
        logits: (B, K, H, W) of another view.
        pseudo: of the same pixels.
        threshold: least probability that counts.
        empty_is_nan: QUIRK quirks.nan_without_pixels: nothing but padding gives NaN, as in the original, else 0.

    Source: `unimatch.py` of V1 and `unimatch_v2.py` of V2.
    """
    real = ~pseudo.padding
    target = pseudo.label.where((pseudo.conf >= threshold) & real, IGNORE)
    return _summed(logits, target) / _count(real, empty_is_nan)


def supervised(
    logits: Tensor, target: Tensor, ohem: tuple[float, int] | None = None, empty_is_nan: bool = False
) -> Tensor:
    """Mean cross entropy over pixels with a label, or over the hard ones: a scalar.

    Args:
        logits: (B, K, H, W).
        target: (B, H, W) int64, 255 = ignore.
        ohem: threshold and least number of kept pixels, see `common.numerics.losses.ohem_keep`; None keeps all.
        empty_is_nan: as of `consistency`, without any label.
    """
    target = target if ohem is None else ohem_keep(logits, target, *ohem)
    return _summed(logits, target) / _count(target != IGNORE, empty_is_nan)


def _summed(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")


def _count(mask: Tensor, may_be_zero: bool) -> Tensor:
    count = mask.sum()
    return count if may_be_zero else count.clamp(min=1)
