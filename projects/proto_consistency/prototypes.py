"""How the prototypes move: each towards the mean of the features that are nearest to it within their own class.

Legend: K classes, P prototypes per class, D channels, N pixels. Nothing here loops over classes or waits for the
device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from common.distributed import Dist, sum_over_ranks
from common.numerics.losses import IGNORE


@torch.no_grad()
def group_sums(
    feats: Tensor, match: Tensor, target: Tensor, cond: Tensor, per_class: int
) -> tuple[Tensor, Tensor]:
    """Sums (K * P, D) and numbers (K * P,) of the features that belong to each prototype.

    A pixel belongs to the prototype of its target class that is most like it, even if another class is closer
    (QUIRK proto-8).

    Args:
        feats: (N, D), raw.
        match: (N, K) int64 in 0..P-1, what `PrototypeHead.match` found.
        target: (N,) int64, 255 is left out.
        cond: (N,) bool, what else is left out: pseudo-labels without confidence.
        per_class: P.

    Source: the update left in comments in the released model file, there a loop over classes and prototypes.
    """
    valid = (target != IGNORE) & cond
    k = target.where(valid, 0)
    cells = match.shape[1] * per_class
    cell = (k * per_class + match.gather(1, k.unsqueeze(1)).squeeze(1)).where(valid, cells)
    rows = torch.cat((feats, torch.ones_like(feats[:, :1])), dim=1)
    total = torch.zeros(cells + 1, rows.shape[1], dtype=feats.dtype, device=feats.device)
    # accumulating by index is reproducible on a GPU too; what is left out may even be not finite
    total = total.index_put_((cell,), rows.masked_fill(~valid.unsqueeze(1), 0.0), accumulate=True)
    return total[:-1, :-1], total[:-1, -1]


@torch.no_grad()
def apply_sums(prototypes: Tensor, sums: Tensor, counts: Tensor, momentum: float) -> Tensor:
    """Prototypes (K * P, D) moved by the means of `group_sums`: `m * p + (1 - m) * mean`, each once.

    Those without members keep their very bits. A mean that is not finite moves nothing: a step that will be
    cancelled must not leave a trace.
    """
    count = counts.unsqueeze(1)
    mean = (sums / count.clamp(min=1)).to(prototypes.dtype)
    moved = momentum * prototypes + (1 - momentum) * mean
    usable = (count > 0) & moved.isfinite().all(dim=1, keepdim=True)
    return torch.where(usable, moved, prototypes)


@torch.no_grad()
def update(
    prototypes: Tensor,
    feats: Tensor,
    match: Tensor,
    target: Tensor,
    cond: Tensor,
    momentum: float,
    dist: Dist | None = None,
) -> Tensor:
    """The prototypes (K * P, D) after one step of the features of one process, or of all.

    The means are of raw features, so long ones weigh more (QUIRK proto-7). Without any member nothing changes.

    Args:
        prototypes: (K * P, D).
        feats: (N, D).
        match: (N, K) int64.
        target: (N,) int64, 255 = ignore.
        cond: (N,) bool.
        momentum: share of the old prototype that stays.
        dist: pool the features of all processes; None moves by those of this one alone (QUIRK proto-11: the
            prototypes of the processes drift apart).
    """
    sums, counts = group_sums(feats, match, target, cond, len(prototypes) // match.shape[1])
    if dist is not None:
        pooled = sum_over_ranks(torch.cat((sums, counts.unsqueeze(1)), dim=1), dist)
        sums, counts = pooled[:, :-1], pooled[:, -1]
    return apply_sums(prototypes, sums, counts, momentum)


@torch.no_grad()
def effective_number(counts: Tensor) -> Tensor:
    """How many prototypes of each class are in use, (K,): the exponential of the entropy of their shares.

    Between 1 (one takes all) and P; 0 for a class without members.

    Args:
        counts: members per prototype, (K, P).
    """
    share = F.normalize(counts.float(), p=1.0, dim=1)
    spread = -torch.xlogy(share, share).sum(dim=1)
    return spread.exp() * (counts.sum(dim=1) > 0)
