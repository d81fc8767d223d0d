"""The equations of CPS as functions of tensors: supervised loss, mixing, cross pseudo supervision.

Legend: B images, K classes, (H, W) image size. Nothing here waits for the device or draws random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data.spec import IGNORE
from common.numerics.losses import best_class, ohem_keep

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function, on: bool) -> Function:
    """The function, and if `on` (`run.compile`) as one graph of torch.compile for every shape of its arguments."""
    return _compiled(function) if on else function


@cache  # a step asks for the same one again
def _compiled(function: Any) -> Any:
    return torch.compile(function, fullgraph=True, dynamic=False)


class OhemSettings(NamedTuple):
    """Selection of hard pixels; see `common.numerics.losses.ohem_keep`.

    Attributes:
        thresh: probability of the label up to which a pixel counts as hard.
        min_kept: pixels of a group that are kept at least, where it has as many; 0 switches the selection off.
    """

    thresh: float = 0.7
    min_kept: int = 50000


def mix(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """`a` where `mask` is 0 and `b` where it is 1: images or logits (B, C, H, W), mask (B, 1, H, W).

    Written as the sum of products of the authors, so a value that is not finite spoils both.
    """
    return a * (1 - mask) + b * mask


def cross_pseudo_supervision(
    logits_1: Tensor, logits_2: Tensor, labels_1: Tensor | None = None, labels_2: Tensor | None = None
) -> Tensor:
    """Cross entropy of each network with the hard labels of the other, unweighted: a scalar.

    The mean is over all pixels: padding and pixels without a label take part (QUIRK padding_taught).

    Args:
        logits_1: of the first network (B, K, H, W).
        logits_2: of the second network on the same images.
        labels_1: hard labels (B, H, W) int64 of the first network, which teach the second; None takes its logits'.
        labels_2: likewise of the second.

    Source: eq. (2) to (4) of the paper; `train.py` of the repository's CPS and CPS+CutMix.
    """
    labels_1 = best_class(logits_1) if labels_1 is None else labels_1
    labels_2 = best_class(logits_2) if labels_2 is None else labels_2
    return F.cross_entropy(logits_1, labels_2) + F.cross_entropy(logits_2, labels_1)


def mutual_losses(
    criterion: Callable[[Tensor, Tensor], Tensor],
    labeled: Sequence[Tensor],
    unlabeled: Sequence[Tensor],
    y_l: Tensor,
    pseudo: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Supervised losses of two networks, and what they teach each other: three scalars.

    Args:
        criterion: supervised loss of logits and labels.
        labeled: logits (B, K, H, W) of each network on labeled images.
        unlabeled: on unlabeled images (B', K, H, W).
        y_l: labels (B, H, W).
        pseudo: hard labels (B', H, W) by each network for the unlabeled images, of which alone the networks then
            teach each other; None takes those of their logits, of all images.
    """
    taught = unlabeled
    if pseudo is None:
        taught = [torch.cat(scores) for scores in zip(labeled, unlabeled, strict=True)]
    cps = cross_pseudo_supervision(*taught, *(pseudo or ()))
    return criterion(labeled[0], y_l), criterion(labeled[1], y_l), cps


def supervised(
    logits: Tensor,
    target: Tensor,
    *,
    groups: int = 1,
    ohem: OhemSettings | None = None,
    empty_is_nan: bool = False,
) -> Tensor:
    """Mean over groups of the mean cross entropy over each group's pixels with a label: a scalar.

    QUIRK quirks.loss_per_process: the authors average over the images of each process first and over processes then,
    which is not the mean over all pixels where the groups differ in labeled pixels; one group gives that mean.

    Args:
        logits: (B, K, H, W).
        target: (B, H, W) int64, 255 = ignore.
        groups: number of runs of consecutive images that stand for the authors' processes; divides B.
        ohem: keep only the hard pixels of each group; None keeps all.
        empty_is_nan: QUIRK quirks.nan_without_labels: a group without labels gives NaN, as in the original, else 0.

    Source: eq. (1) of the paper; `ProbOhemCrossEntropy2d` in `furnace/seg_opr/loss_opr.py`.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if ohem is not None:
        parts = zip(logits.unflatten(0, (groups, -1)), target.unflatten(0, (groups, -1)), strict=True)
        target = torch.cat([ohem_keep(some, labels, ohem.thresh, ohem.min_kept) for some, labels in parts])
    pixels = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")
    total = pixels.unflatten(0, (groups, -1)).flatten(1).sum(dim=1)
    count = (target != IGNORE).unflatten(0, (groups, -1)).flatten(1).sum(dim=1)
    return (total / (count if empty_is_nan else count.clamp(min=1))).mean()
