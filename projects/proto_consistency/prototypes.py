"""How the prototypes move: each towards the mean of the features that are nearest to it within their own class.

Legend: K classes, P prototypes per class, D channels, N pixels. Nothing here loops over classes or waits for the
device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data.spec import IGNORE
from common.distributed import Dist, sum_over_ranks
from common.numerics.similarity import grouped_sums
from projects.proto_consistency.config import ProtoConfig
from projects.proto_consistency.head import PrototypeHead


@torch.no_grad()
def group_sums(
    feats: Tensor, match: Tensor, target: Tensor, cond: Tensor, per_class: int
) -> tuple[Tensor, Tensor]:
    """Sums (K * P, D) and numbers (K * P,) of the features that belong to each prototype.

    A pixel belongs to the prototype of its target class that is most like it, even if another class is closer
    (QUIRK target_class_only).

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
    cell = (k * per_class + match.gather(1, k.unsqueeze(1)).squeeze(1)).where(valid, -1)
    rows = torch.cat((feats, torch.ones_like(feats[:, :1])), dim=1)
    total = grouped_sums(rows, cell, match.shape[1] * per_class)
    return total[:, :-1], total[:, -1]


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


class Movement:
    """Where the prototypes of this process are going to move in the current optimizer step.

    Forwards of one step (accumulation) are pooled, so that a prototype moves once per step, as with the authors'
    processes of one forward each.

    Args:
        head: The student's, on its device.
        proto: How they move.

    Attributes:
        sums: (K*P, D) of the features assigned so far in this step.
        counts: (K*P,) their numbers.
        usage: (K*P,) float64, pixels assigned since `take_usage`.
    """

    def __init__(self, head: PrototypeHead, proto: ProtoConfig) -> None:
        self.head, self.proto = head, proto
        self.sums = torch.zeros_like(head.proto_list, requires_grad=False)
        self.counts = self.sums[:, 0].clone()
        self.usage = self.counts.double()

    def add(self, feats: Tensor, match: Tensor, target: Tensor, cond: Tensor) -> None:
        """Note the features (N, D) of a forward, by their nearest prototypes (N, K), labels (N,) and mask (N,)."""
        sums, counts = group_sums(feats, match, target, cond, self.head.per_class)
        self.sums, self.counts = self.sums + sums, self.counts + counts

    @torch.no_grad()
    def apply(self, dist: Dist, bad: Tensor) -> None:
        """Move the prototypes once and forget the sums; a collective with `sync: gather`.

        The means are of raw features, so long ones weigh more (QUIRK quirks.raw_update).

        Args:
            dist: With `sync: gather` the features of all processes count; otherwise each process moves its own by
                its own (QUIRK method.proto.sync: they drift apart).
            bad: 1 if the step is cancelled because a loss is not finite: then they stay.
        """
        sums, counts = self.sums, self.counts.masked_fill(bad > 0, 0.0)
        self.sums, self.counts = torch.zeros_like(sums), torch.zeros_like(counts)
        self.usage += counts
        if not self.proto.update:
            return
        if self.proto.sync == "gather":
            pooled = sum_over_ranks(torch.cat((sums, counts.unsqueeze(1)), dim=1), dist)
            sums, counts = pooled[:, :-1], pooled[:, -1]
        prototypes = self.head.proto_list
        prototypes.copy_(apply_sums(prototypes, sums, counts, self.proto.momentum))

    def take_usage(self, dist: Dist) -> Tensor:
        """Pixels per class and prototype (K, P) of all processes since the last call; a collective."""
        total = sum_over_ranks(self.usage, dist)
        self.usage = torch.zeros_like(self.usage)
        return total.view(-1, self.head.per_class)


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
