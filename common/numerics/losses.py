"""Pixel losses and entropy statistics that several papers share.

Everything stays on the device of its inputs and waits for nothing: counts, thresholds and percentiles are
tensors. Logits may come in half precision; the arithmetic is in float32 (or float64 for float64 inputs).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.data.spec import IGNORE


class Losses(NamedTuple):
    """Total of one iteration, and its terms and figures by name; scalars on the device."""

    total: Tensor
    terms: dict[str, Tensor]


def mean_of(results: Sequence[Losses]) -> Losses:
    """Loss and terms of an optimizer step, averaged over its forwards, without their graphs."""
    total = torch.stack([r.total.detach() for r in results]).mean()
    terms = [{k: v.detach().to(total.dtype) for k, v in r.terms.items()} for r in results]
    return Losses(total, {k: torch.stack([own[k] for own in terms]).mean() for k in terms[0]})


def best_class(scores: Tensor, dim: int = 1) -> Tensor:
    """Class with the largest score along `dim`, (B, H, W) of (B, K, H, W), the first of equals; carries no gradient.

    `max` is up to four times as fast on a CPU; on a GPU only `argmax` promises the first of equals.
    """
    scores = scores.detach()
    return scores.argmax(dim) if scores.is_cuda else scores.max(dim).indices


def cross_entropy_or_zero(logits: Tensor, target: Tensor, class_weight: Tensor | None = None) -> Tensor:
    """Mean cross entropy over pixels that carry a label; exactly zero, not NaN, when there is none.

    Args:
        logits: (B, K, H, W).
        target: (B, H, W) int64, 255 = ignore.
        class_weight: (K,); the mean is then the weighted mean.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    class_weight = None if class_weight is None else class_weight.to(logits.dtype)
    total = F.cross_entropy(logits, target, weight=class_weight, ignore_index=IGNORE, reduction="sum")
    valid = target != IGNORE
    if class_weight is None:
        return total / valid.sum().clamp(min=1)
    mass = (class_weight[target.where(valid, 0)] * valid).sum()
    return total / mass.where(mass > 0, 1)


def ohem_keep(logits: Tensor, target: Tensor, thresh: float, min_kept: int) -> Tensor:
    """Labels with the easy pixels set to ignore, for online hard example mining: (B, H, W).

    A pixel stays if the probability of its label is at most `thresh`, or at most the `min_kept`-th smallest
    one if that is larger; ignored pixels take part in that ranking with probability 1. With fewer than
    `min_kept` labeled pixels, or with `min_kept` 0, all stay. The selection carries no gradient.

    Args:
        logits: (B, K, H, W).
        target: (B, H, W) int64, 255 = ignore.
        thresh: probability in 0..1.
        min_kept: number of pixels of the whole batch of this process.

    Source: `u2pl/utils/loss_helper.py` of U2PL (class OhemCrossEntropy2dTensor).
    """
    if min_kept == 0:
        return target
    with torch.no_grad():
        valid = target != IGNORE
        logits = logits if logits.dtype == torch.float64 else logits.float()
        # a probability that equals the threshold is kept, so it is rounded as the authors' softmax rounds it
        prob = logits.softmax(dim=1).gather(1, target.where(valid, 0).unsqueeze(1)).squeeze(1)
        prob = prob.masked_fill(~valid, 1.0).flatten()
        threshold = in_order(prob, min(len(prob), min_kept) - 1).clamp(min=thresh)
        few = valid.sum() < min_kept
        keep = few | (prob <= threshold).view_as(target)
        return target.where(valid & keep, IGNORE)


def entropy(probs: Tensor) -> Tensor:
    """Entropy in nats of constant class probabilities (B, K, H, W): (B, H, W), with 1e-10 inside the logarithm."""
    return (probs + 1e-10).log_().mul_(probs).sum(dim=1).neg_()


def in_order(values: Tensor, ranks: Tensor | int) -> Tensor:
    """The values (N,) without gradient that have these ranks (from 0) in ascending order, NaN last.

    On a CPU without sorting the others. On a GPU a sort fills the device, where `kthvalue` takes one block.
    """
    if values.is_cuda or torch.compiler.is_compiling():
        return values.sort().values[ranks]
    return torch.from_numpy(np.partition(values.numpy(), np.asarray(ranks)))[ranks]


def masked_percentiles(values: Tensor, valid: Tensor, percents: Sequence[float]) -> Tensor:
    """Percentiles (0-100) of `values[valid]` by linear interpolation, on the device: (len(percents),).

    NaN where nothing is valid. Agrees with `numpy.percentile`, whose position is computed in float64 and whose
    interpolation starts from the nearer end.
    """
    count = valid.sum()
    last = (count - 1).clamp(min=0).double()  # float32 misplaces ranks beyond 1e5
    position = torch.stack([last * (percent / 100.0) for percent in percents])
    ranks = torch.stack((position.floor(), position.ceil())).long()
    low, high = (
        in_order(values.masked_fill(~valid, torch.inf).flatten(), ranks.flatten()).view_as(ranks).double()
    )
    result = torch.lerp(low, high, position - position.floor())
    return result.where(count > 0, torch.nan).to(values.dtype)
