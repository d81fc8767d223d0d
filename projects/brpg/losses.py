"""The equations of BRPG as functions of tensors: supervised criterion, pseudo-label loss, prototype loss.

Legend: B images, K classes, D feature channels, (H, W) label size, (h, w) feature size, S sampled features.
Nothing here waits for the device or draws from a global generator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data.spec import IGNORE
from common.numerics.losses import cross_entropy_or_zero, entropy, masked_percentiles, ohem_keep
from common.numerics.optim import linear_decay
from projects.brpg.memory import first_in_order
from projects.brpg.prototypes import Prototypes
from projects.brpg.settings import MethodConfig

RAMP_EPOCH = 5  # the epoch from which the original counts the rise of the threshold


# --- supervised ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Criterion:
    """Weighted sum of cross entropy and OHEM cross entropy on full-size logits, both with the auxiliary head.

    Attributes:
        ce_weight, ohem_weight: of the two criteria; one at 0 is not computed.
        thresh, min_kept: see `common.numerics.losses.ohem_keep`; each head selects its own pixels.
        aux_weight: weight of the auxiliary logits inside both; 0 ignores them.

    Source: `Criterion` and `CriterionOhem` in `u2pl/utils/loss_helper.py`, summed in `train_semi.py`.
    """

    ce_weight: float = 0.5
    ohem_weight: float = 0.5
    thresh: float = 0.7
    min_kept: int = 100000
    aux_weight: float = 0.0

    def __call__(self, logits: Tensor, target: Tensor, aux: Tensor | None = None) -> Tensor:
        """Loss of logits (B, K, H, W) and auxiliary logits (B, K, H, W) for labels (B, H, W), 255 = ignore."""
        total = torch.zeros((), device=logits.device)
        for weight, ohem in ((self.ce_weight, False), (self.ohem_weight, True)):
            if weight:
                total = total + weight * self.one(logits, target, aux, ohem)
        return total

    def one(self, logits: Tensor, target: Tensor, aux: Tensor | None, ohem: bool) -> Tensor:
        """One of the two criteria, before its weight."""
        loss = self._head(logits, target, ohem)
        if aux is not None and self.aux_weight > 0:
            loss = loss + self.aux_weight * self._head(aux, target, ohem)
        return loss

    def _head(self, logits: Tensor, target: Tensor, ohem: bool) -> Tensor:
        kept = ohem_keep(logits, target, self.thresh, self.min_kept) if ohem else target
        return cross_entropy_or_zero(logits, kept)


# --- pseudo-labels ---------------------------------------------------------------------------------------------


def entropy_percentile(drop_percent: float, epoch: float, epochs: float) -> float:
    """Percentile of the entropy above which pseudo-labels are dropped; rises from `drop_percent` to 100."""
    return 100.0 - (100.0 - drop_percent) * linear_decay(epoch, epochs)


@torch.no_grad()
def keep_low_entropy(logits_teacher: Tensor, pseudo: Tensor, percent: float) -> Tensor:
    """Pseudo-labels (B, H, W) with 255 where the teacher's entropy is at or above its percentile.

    Args:
        logits_teacher: (B, K, H, W), full size.
        pseudo: (B, H, W) int64 after mixing, 255 = ignore.
        percent: 0..100, over the pixels of this process that are not ignored.

    Source: `compute_unsupervised_loss` in `u2pl/utils/loss_helper.py`.
    """
    valid = pseudo != IGNORE
    values = entropy(logits_teacher.softmax(dim=1))
    limit = masked_percentiles(values, valid, (percent,))[0]
    return torch.where(values >= limit, IGNORE, pseudo)


def pseudo_label_loss(logits: Tensor, pseudo: Tensor) -> Tensor:
    """Cross entropy with the kept pseudo-labels, times pixels / kept pixels.

    Args:
        logits: (B, K, H, W) of the student.
        pseudo: (B, H, W) int64, 255 = ignored or dropped; none kept gives zero.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    total = F.cross_entropy(logits, pseudo, ignore_index=IGNORE, reduction="sum")
    kept = (pseudo != IGNORE).sum(dtype=total.dtype).clamp(min=1)
    return pseudo.numel() / kept * (total / kept)


# --- prototype loss --------------------------------------------------------------------------------------------


def pseudo_threshold(
    start: float, end: float, iteration: int, steps_per_epoch: int, epochs: int, ramp_epoch: int = RAMP_EPOCH
) -> float:
    """Least confidence of pseudo-labels in the prototype loss: `start` at `ramp_epoch`, `end` at the last step.

    Before `ramp_epoch` it lies below `start` (with the default, QUIRK quirks.ramp_from_five). A training that ends
    by then keeps `start`.
    """
    if epochs <= ramp_epoch:
        return start
    done = (iteration - ramp_epoch * steps_per_epoch) / ((epochs - ramp_epoch) * steps_per_epoch)
    return start + (end - start) * done


def grid_line(side: int, steps: int, device: torch.device) -> Tensor:
    """Rows (or columns) of the sampling grid, int64: `steps` equal intervals from 0, and the last pixel.

    The last interval is longer where `side - 1` is no multiple of `steps`; with fewer pixels than steps the line
    holds only its ends.
    """
    interval = (side - 1) // steps
    starts = torch.arange(steps if interval else min(1, side - 1), device=device) * interval
    return torch.cat((starts, torch.full((1,), side - 1, device=device)))


def grid_index(batch: int, size: tuple[int, int], steps: int, device: torch.device) -> Tensor:
    """Positions (S,) of the grid's pixels in (image, row, column) order.

    The original has one line for both axes and needs square crops; each axis has its own here.
    """
    rows, cols = (grid_line(side, steps, device) for side in size)
    images = torch.arange(batch, device=device).view(-1, 1, 1) * (size[0] * size[1])
    return (images + rows.view(-1, 1) * size[1] + cols).flatten()


def sample_bilinear(feats: Tensor, index: Tensor, size: tuple[int, int]) -> Tensor:
    """Features (S, D) at pixels `index` (S,) of maps (B, D, h, w) as if resized to `size` (H, W).

    Bilinear with aligned corners, without building the large maps; the gradient is the same. Positions count in
    (image, row, column) order at full size.
    """
    height, width = size
    h, w = feats.shape[-2:]
    image, row, col = index // (height * width), index // width % height, index % width
    (top, down, low), (left, right, near) = (
        _taps(position, side, full, feats.dtype)
        for position, side, full in ((row, h, height), (col, w, width))
    )
    corners = torch.stack([(image * h + y) * w + x for y in (top, down) for x in (left, right)])
    weights = torch.stack([(1 - low) * (1 - near), (1 - low) * near, low * (1 - near), low * near])
    rows = feats.movedim(1, -1).reshape(-1, feats.shape[1])  # (B*h*w, D); free where channels come last
    # one gather of all four corners: its gradient is one map
    return (rows[corners] * weights.unsqueeze(2)).sum(dim=0)


def _taps(position: Tensor, side: int, full: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Lower and upper source index and the weight of the upper one for positions of an axis."""
    scale = (side - 1) / (full - 1) if full > 1 else 0.0
    real = position.to(dtype) * scale
    first = real.long().clamp(max=side - 1)
    return first, (first + 1).clamp(max=side - 1), real - first.to(dtype)


@torch.no_grad()
def confident_index(conf: Tensor, threshold: float, keys: Tensor, size: int) -> Tensor:
    """Positions (min(size, N),) of at most `size` random pixels with enough confidence, ascending, -1 as padding.

    Args:
        conf: (B, H, W) teacher confidence after mixing, N pixels in all.
        threshold: least confidence.
        keys: (N,) random numbers.
        size: most pixels of this process.
    """
    place = first_in_order((conf >= threshold).flatten(), keys, size)
    ordered = place.where(place >= 0, conf.numel()).sort().values
    return ordered.where(ordered < conf.numel(), -1)


class PrototypeTerms(NamedTuple):
    """Prototype loss of labeled and unlabeled features, and what the prototypes learn from."""

    labeled: Tensor
    unlabeled: Tensor
    feats: Tensor  # (S, D), without graph
    labels: Tensor  # (S,), 255 where there is no feature
    slot: Tensor  # (S, K)


def prototype_loss(
    feats: Tensor,
    y_l: Tensor,
    pseudo: Tensor,
    conf: Tensor,
    prototypes: Prototypes,
    method: MethodConfig,
    *,
    threshold: float,
    keys: Tensor,
) -> PrototypeTerms:
    """Cosine classification of pixel features by the prototypes.

    Labeled features lie on a regular grid, unlabeled ones wherever the pseudo-label is sure enough. No sure
    pixel gives zero (the original: NaN on every process).

    Args:
        feats: (B_l + B_u, D, h, w) of the student, labeled images first.
        y_l: (B_l, H, W) labels, 255 = ignore.
        pseudo: (B_u, H, W) pseudo-labels after mixing, before any is dropped.
        conf: (B_u, H, W) the teacher's confidence after mixing.
        prototypes: as they are before this step.
        method: temperature, grid, and unlabeled features per image.
        threshold: see `pseudo_threshold`.
        keys: (B_u * H * W,) random numbers that choose among more.

    Source: the prototype stage of `train_semi.py`.
    """
    n, size = len(y_l), (y_l.shape[1], y_l.shape[2])
    place_l = grid_index(n, size, method.grid_steps, y_l.device)
    place_u = confident_index(conf, threshold, keys, method.unsup_points * len(conf))
    index_u = place_u.clamp(min=0)
    labels_l = y_l.flatten()[place_l]
    labels_u = pseudo.flatten()[index_u].where(place_u >= 0, IGNORE)
    rows = sample_bilinear(feats, torch.cat((place_l, index_u + y_l.numel())), size)
    labels = prototypes.labels(torch.cat((labels_l, labels_u)))
    found = prototypes.similarity(rows)
    sizes = [len(place_l), len(place_u)]
    logits = (found.value / method.temperature).split(sizes)
    labeled, unlabeled = (
        cross_entropy_or_zero(*part) for part in zip(logits, labels.split(sizes), strict=True)
    )
    return PrototypeTerms(
        labeled=labeled,
        unlabeled=unlabeled,
        feats=rows.detach(),
        labels=labels,
        slot=found.slot,
    )


def gradient_share(loss: Tensor, processes: int, forward_only: bool) -> Tensor:
    """The prototype loss as it enters the total of one process.

    The original sums it over the processes and divides by their number, but only the own share carries a
    gradient, which the data-parallel average divides once more (QUIRK quirks.proto_reduce); otherwise it is a plain
    mean.
    """
    return loss / processes if forward_only else loss
