"""The contrast of U2PL: which pixels are anchors and negatives, and the loss between them.

Legend: B images, K classes, D feature channels, (H, W) label size, (h, w) feature size, Q anchors per class,
N negatives per anchor. Nothing here waits for the device or draws from a global generator.

The way of a pixel in a step: `contrast_inputs` -> `collect_negatives` -> the queues of `Memory` -> `contrast`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data.spec import IGNORE
from common.errors import UserError
from common.mean_teacher.contrast import (
    ContrastInputs,
    class_masks,
    compact,
    nearest,
    negative_masks,
    pixel_rows,
)
from common.mean_teacher.queues import ClassQueues
from projects.u2pl.config import Config, MethodConfig
from projects.u2pl.losses import EntropySplit


def rank_window(method: MethodConfig, num_classes: int) -> tuple[int, int]:
    """Ranks [low, high) at which a class counts as unlikely for a pixel.

    Raises:
        UserError: if the window holds no rank for this class count, which would make the loss always zero.
    """
    low, high = _window(method, num_classes)
    if not (0 <= low < high and low < num_classes):
        raise UserError(
            f"method.low_rank={low}, method.high_rank={high}: no rank of {num_classes} classes (0..{num_classes - 1}) "
            "lies in between, so the contrast would always be 0; set both to null to derive them"
        )
    return low, high


def _window(method: MethodConfig, num_classes: int) -> tuple[int, int]:
    low = max(1, round(3 * num_classes / 21)) if method.low_rank is None else method.low_rank
    return low, num_classes if method.high_rank is None else method.high_rank


def weighted_centres(method: MethodConfig) -> bool:
    """Whether the teacher's confidence weights the pixels of a class centre; averages over steps know no weights."""
    return method.ael is not None and method.ael.conf_weight and not method.anchor_ema


# --- inputs ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def contrast_inputs(
    feats: Tensor,
    feats_teacher: Tensor,
    logits_teacher: Tensor,
    y_l: Tensor,
    y_u: Tensor,
    split: EntropySplit,
    cfg: Config,
) -> ContrastInputs:
    """Bring labels and entropy masks to feature size and pick the images that can take part.

    Under QUIRK quirks.onehot_first_image only the first labeled and the first unlabeled image have class masks. As
    long as a negative must carry its label, only they are looked at: the same numbers for a fraction of the work.

    Args:
        feats: (B, D, h, w) of the student, labeled images first.
        feats_teacher: (B, D, h, w) of the train-mode teacher.
        logits_teacher: (B, K, h, w) of the train-mode teacher.
        y_l: (B_l, H, W) labels, 255 = ignore.
        y_u: (B_u, H, W) pseudo-labels before dropping, 255 = ignore.
        split: entropy masks of the unlabeled images.
        cfg: of the run.
    """
    num_classes, size = logits_teacher.shape[1], (logits_teacher.shape[2], logits_teacher.shape[3])
    first_only = cfg.quirks.onehot_first_image
    labels, n = nearest(torch.cat((y_l, y_u)), size), len(y_l)
    true, masks = labels[:n] != IGNORE, class_masks(labels, num_classes, first_only, (n, len(y_u)))
    if cfg.method.negative_high_entropy:
        unreliable = nearest(split.unreliable, size)
    else:
        unreliable = torch.ones_like(true[:1]).expand(len(y_u), -1, -1)
    reliable = torch.cat((true, nearest(split.reliable, size)))
    unreliable = torch.cat((true, unreliable))
    inputs: tuple[Tensor, ...] = (feats_teacher, logits_teacher, masks, reliable, unreliable)
    if first_only and cfg.quirks.own_label_negatives:
        with torch.enable_grad():
            feats = feats[: n + 1 : n]
        inputs = tuple(x[: n + 1 : n] for x in inputs)
        n = 1
    feats_teacher, logits_teacher, masks, reliable, unreliable = inputs
    return ContrastInputs(feats, feats_teacher, logits_teacher.softmax(dim=1), masks, reliable, unreliable, n)


# --- negatives -------------------------------------------------------------------------------------------------


class Negatives(NamedTuple):
    """Places (S,) class * P + pixel of negatives, K * P as padding, and the features (P, D) of the pixels.

    A pixel can be a negative of several classes.
    """

    places: Tensor
    feats: Tensor


@torch.no_grad()
def collect_negatives(inputs: ContrastInputs, cfg: Config, labels_per_pixel: int, exact: bool) -> Negatives:
    """All negatives of this process with finite features of the teacher, by class, then image, row, column.

    S is a fixed bound, so that nothing has to be counted on the host and all ranks agree; `exact` counts instead (one
    process on the CPU, where that is free).
    """
    method, own_label = cfg.method, cfg.quirks.own_label_negatives
    low, high = _window(method, inputs.probs.shape[1])
    masks = negative_masks(inputs, low, high, method.current_class_negative_threshold, own_label)
    images = inputs.feats_teacher[inputs.num_labeled if own_label else 0 :]
    feats = images.movedim(1, -1).flatten(0, 2)
    masks &= feats.abs().amax(dim=1) < torch.inf  # NaN if any is
    bound = min(len(masks), labels_per_pixel) * len(feats)
    return Negatives(compact(masks.flatten(), int(masks.sum()) if exact else bound), feats)


# --- the loss --------------------------------------------------------------------------------------------------


class ContrastDraws(NamedTuple):
    """Recorded choices: one row per contributing slot, anchors (S, Q) and negatives (S, Q * N), int64."""

    anchors: Tensor
    negatives: Tensor


class Contrast(NamedTuple):
    """Loss and the counters that tell whether it is alive."""

    loss: Tensor
    prototypes: Tensor | None  # (K, Q, 1, D), only with anchor_ema
    valid: Tensor  # (K,) bool, classes with reliable pixels
    candidates: Tensor  # (K,) anchor candidates


def contrast(
    inputs: ContrastInputs,
    queues: ClassQueues,
    cfg: Config,
    draws: ContrastDraws | torch.Generator | None = None,
    prototypes: Tensor | None = None,
    prototype_decay: float = 0.0,
) -> Contrast:
    """Contrast reliable anchors with their class centre and with queued negatives, section 3.3, eq. (7).

    The negatives of this step must have been pushed already. Slot s stands for the s-th class that has reliable
    pixels. With at most one such class the loss is zero.

    Args:
        inputs: feature maps and masks of this process.
        queues: negatives of all classes.
        cfg: of the run.
        draws: generator of the features' device for the choice of anchors and negatives, or a recorded choice.
        prototypes: (K, Q, 1, D) averaged centres (`method.anchor_ema`), all zero before their first use.
        prototype_decay: weight of the stored centre, `min(1 - 1/k, 0.999)` at the k-th update.

    Source: `compute_contra_memobank_loss` in `u2pl/utils/loss_helper.py`.
    """
    with torch.no_grad():
        low = inputs.masks & inputs.reliable.unsqueeze(1)
        sure = low & (inputs.probs > cfg.method.current_class_threshold)
        running = sure.transpose(0, 1).flatten(1).cumsum(dim=1)  # candidates of a class up to a pixel
        pixels_of, counts = low.sum(dim=(0, 2, 3)), running[:, -1]
        valid = pixels_of > 0
        num_valid = valid.sum()
        in_use, owner = valid.sort(
            descending=True, stable=True
        )  # slot -> class: valid classes first, ascending
        # QUIRK quirks.slot_index: anchors and centre of slot s are those of class s, its queue the owner's
        source = slice(None) if cfg.quirks.slot_index else owner
        num_anchors, num_negatives = counts[source], queues.lengths[owner]
        several = in_use[1]
        contributes = in_use & (torch.minimum(num_anchors, num_negatives) > 0) & several
        anchor_place, negative_place = _choose(cfg.method, contributes, num_anchors, num_negatives, draws)
        # the j-th candidate of a class is where the running count exceeds j
        pixels = torch.searchsorted(running[source], anchor_place, right=True).clamp(max=running.shape[1] - 1)
        weight = inputs.probs.amax(1) if weighted_centres(cfg.method) else None
        centres = _class_centres(inputs.feats_teacher, low, pixels_of, weight)
        positives = centres[source].unsqueeze(1)
        fresh = None
        if prototypes is not None:
            positives, fresh = _averaged(positives, prototypes, prototype_decay, owner, contributes, several)

    # a GPU computes every slot and masks it; on the host asking for the flags is free. The representation head is in
    # the graph even if there is none
    used = slice(None) if inputs.feats.is_cuda else contributes.nonzero().flatten()
    terms = InfoNce.apply(
        pixel_rows(inputs.feats, pixels[used]),
        F.normalize(positives[used], dim=-1, eps=1e-8),
        queues.rows,
        queues.slots(owner[used].unsqueeze(1), negative_place[used]),
        cfg.method.temperature,
    )
    total = terms.where(contributes[used], 0.0).sum()
    return Contrast(total / num_valid.clamp(min=1), fresh, valid, counts)


def _class_centres(feats: Tensor, masks: Tensor, counts: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean feature (K, D) of the pixels in masks (B, K, h, w), `counts` (K,) of them, weighted by `weight` (B, h, w).

    Zero for a class without any.
    """
    rows = masks.transpose(0, 1).to(feats.dtype, memory_format=torch.contiguous_format).flatten(2)
    mass = counts.clamp(min=1)
    if weight is not None:
        rows = rows * weight.flatten(1)
        mass = rows.sum(dim=(1, 2))
        mass = mass.where(mass > 0, 1)
    return torch.einsum("kbp,bdp->kd", rows, feats.flatten(2)) / mass.unsqueeze(1)


def _averaged(
    positives: Tensor, prototypes: Tensor, decay: float, owner: Tensor, contributes: Tensor, any_slot: Tensor
) -> tuple[Tensor, Tensor]:
    """Positives (K, 1, D) of the slots blended with the stored centres, and the centres (K, Q, 1, D) to store."""
    blended = (1.0 - decay) * positives + decay * prototypes.squeeze(2)[owner]
    positives = torch.where(prototypes.any(), blended, positives)
    # QUIRK method.anchor_ema: a class without a contribution is forgotten
    kept = positives * contributes.view(-1, 1, 1)
    fresh = torch.zeros_like(prototypes).index_copy_(0, owner, kept.unsqueeze(2))
    return positives, torch.where(any_slot, fresh, prototypes)


def _choose(
    method: MethodConfig,
    contributes: Tensor,
    num_anchors: Tensor,
    num_negatives: Tensor,
    draws: ContrastDraws | torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Index of each anchor among its candidates (K, Q) and of each negative in its queue (K, Q * N)."""
    if isinstance(draws, ContrastDraws):
        row = (contributes.long().cumsum(0) - 1).clamp(min=0, max=max(len(draws.anchors) - 1, 0))
        if not len(draws.anchors):
            zero = torch.zeros_like(row).unsqueeze(1)
            return zero.repeat(1, method.num_queries), zero.repeat(
                1, method.num_queries * method.num_negatives
            )
        return draws.anchors[row], draws.negatives[row]
    device, k = contributes.device, len(contributes)
    shapes = ((k, method.num_queries), (k, method.num_queries * method.num_negatives))
    # these numbers are further below 1 than a product is rounded, so an index lies below its limit
    uniform = [torch.rand(shape, device=device, generator=draws) for shape in shapes]
    first, second = (
        (u * n.unsqueeze(1)).long() for u, n in zip(uniform, (num_anchors, num_negatives), strict=True)
    )
    return first, second


class InfoNce(torch.autograd.Function):
    """Mean cross entropy of Q anchors against one positive and N negatives each, eq. (7), for every slot: (S,).

    Similarities are cosines; a length below 1e-8 counts as that. The gradient is taken along with the value: the Q * N
    rows of a slot are neither kept for the backward pass nor picked again in it.
    """

    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, positives: Tensor, rows: Tensor, negatives: Tensor, temperature: float
    ) -> Tensor:
        """Anchors (S, Q, D), unit positives (S, 1 or Q, D), negatives (S, Q * N) as indices of `rows` (R, D)."""
        reach = anchors.norm(dim=-1, keepdim=True).clamp(min=1e-8)
        unit = anchors / reach
        picked = rows[negatives].unflatten(1, (anchors.shape[1], -1))
        length = picked.norm(dim=-1).clamp(min=1e-8)
        positive = (unit * positives).sum(dim=-1, keepdim=True)
        negative = torch.einsum("sqd,sqnd->sqn", unit, picked) / length
        log_probs = (torch.cat((positive, negative), dim=-1) / temperature).log_softmax(dim=-1)
        slope = log_probs.exp() / (temperature * anchors.shape[1])
        away = torch.einsum("sqn,sqnd->sqd", slope[..., 1:] / length, picked)
        both = torch.addcmul(away, slope[..., :1] - 1 / (temperature * anchors.shape[1]), positives)
        # what would only make an anchor longer changes nothing
        along = (unit * both).sum(dim=-1, keepdim=True)
        ctx.save_for_backward(torch.addcmul(both, unit, along, value=-1) / reach)
        return -log_probs[..., 0].mean(dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        """The gradient of the anchors."""
        (slope,) = ctx.saved_tensors
        return grads[0].view(-1, 1, 1) * slope, None, None, None, None
