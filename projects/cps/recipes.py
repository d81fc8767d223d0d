"""CPS and CPS + CutMix: the losses of one step.

Two networks of one architecture start from different random heads. Each learns the hard label map that the other
predicts, without a threshold, a warm-up or a stop-gradient: the integer labels carry none. Both learn the labeled
images.

Source: `train.py` of `voc8.res50v3+.CPS` and `voc8.res50v3+.CPS+CutMix` in TorchSemiSeg; equations 1 to 4 of the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common.numerics.losses import Losses
from projects.cps.losses import cross_pseudo_supervision, hard_labels, mix

Forward = Callable[..., list[list[Tensor]]]
Supervised = Callable[[Tensor, Tensor], Tensor]


def supervised_losses(x_l: Tensor, y_l: Tensor, forward: Forward, supervised: Supervised) -> Losses:
    """One network and labeled images alone: the baseline.

    Args:
        x_l: images (B, 3, H, W).
        y_l: labels (B, H, W), 255 = ignore.
        forward: maps batches of images to logits per network and batch.
        supervised: loss of logits and labels.
    """
    ((logits,),) = forward(x_l)
    sup = supervised(logits, y_l)
    return Losses(sup, {"loss_sup": sup})


def cps_losses(
    x_l: Tensor, y_l: Tensor, x_u: Tensor, forward: Forward, supervised: Supervised, weight: float
) -> Losses:  # fmt: skip
    """Both networks on labeled and unlabeled images; each is taught the other's labels on all of them."""
    (labeled_1, unlabeled_1), (labeled_2, unlabeled_2) = forward(x_l, x_u)
    all_1, all_2 = torch.cat((labeled_1, unlabeled_1)), torch.cat((labeled_2, unlabeled_2))
    cps = weight * cross_pseudo_supervision(all_1, all_2)
    return joined(supervised(labeled_1, y_l), supervised(labeled_2, y_l), cps, unlabeled_1, unlabeled_2)


def cps_cutmix_losses(
    x_l: Tensor, y_l: Tensor, x_0: Tensor, x_1: Tensor, mask: Tensor, forward: Forward,
    teach: Callable[[Tensor, Tensor], Sequence[Sequence[Tensor]]], supervised: Supervised, weight: float,
) -> Losses:  # fmt: skip
    """As `cps_losses` on unlabeled images mixed in pairs; labeled ones are not in the cross supervision.

    Args:
        x_l: labeled images (B, 3, H, W).
        y_l: their labels (B, H, W), 255 = ignore.
        x_0: unlabeled images (B, 3, H, W).
        x_1: those that are mixed into them, pair by pair.
        mask: (B, 1, H, W), 1 where the pixel of `x_1` is taken.
        forward: with gradients, as in `supervised_losses`.
        teach: the same without gradients, in the mode that makes the pseudo-labels.
        supervised: loss of logits and labels.
        weight: of the cross supervision.
    """
    with torch.no_grad():
        pseudo_1, pseudo_2 = (hard_labels(mix(u_0, u_1, mask)) for u_0, u_1 in teach(x_0, x_1))
    (mixed_1, labeled_1), (mixed_2, labeled_2) = forward(mix(x_0, x_1, mask), x_l)
    cps = weight * cross_pseudo_supervision(mixed_1, mixed_2, pseudo_1, pseudo_2)
    return joined(supervised(labeled_1, y_l), supervised(labeled_2, y_l), cps, mixed_1, mixed_2)


def joined(sup_1: Tensor, sup_2: Tensor, cps: Tensor, logits_1: Tensor, logits_2: Tensor) -> Losses:
    """Sum of the three terms, and how often both networks name the same class on the unlabeled images."""
    with torch.no_grad():
        agreement = (hard_labels(logits_1) == hard_labels(logits_2)).float().mean()
    terms = {"loss_sup": sup_1, "loss_sup_2": sup_2, "loss_cps": cps, "agreement": agreement}
    return Losses(sup_1 + sup_2 + cps, terms)
