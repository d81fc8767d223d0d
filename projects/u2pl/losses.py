"""The equations of U2PL as functions of tensors: pseudo-label loss, entropy split, contrast with unreliable pixels.

Legend: B images, K classes, D feature channels, (H, W) label size, (h, w) feature size, Q anchors per class,
N negatives per anchor. Nothing here waits for the device or draws from a global generator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from common.numerics.losses import IGNORE, cross_entropy_or_zero, entropy, masked_percentiles, ohem_keep
from projects.u2pl.memory import ClassQueues

# Cityscapes train ids that the option `class_weights` counts a second time
HARD_CLASSES = (3, 4, 5, 6, 9, 12, 14, 16, 17, 18)
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
            return cross_entropy_or_zero(logits, kept, logits.new_tensor(OHEM_CLASS_WEIGHTS))
        if self.aux_weight <= 0:
            return cross_entropy_or_zero(logits, kept)
        hard = torch.zeros(logits.shape[1], dtype=logits.dtype, device=logits.device)
        hard[list(HARD_CLASSES)] = 1.0
        return cross_entropy_or_zero(logits, kept) + cross_entropy_or_zero(logits, kept, hard)

    def _select(self, logits: Tensor, target: Tensor) -> Tensor:
        return ohem_keep(logits, target, self.thresh, self.min_kept) if self.ohem else target


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
    # the boundary pixel itself is dropped (QUIRK u2pl-10)
    return EntropySplit(
        pseudo=pseudo.where(valid & ~(values >= drop), IGNORE),
        reliable=valid & (values <= low),
        unreliable=valid & (values >= high),
    )


def pseudo_label_loss(logits: Tensor, pseudo: Tensor) -> Tensor:
    """Cross entropy with the kept pseudo-labels, times pixels / kept pixels (QUIRK u2pl-9), eq. (3).

    Args:
        logits: (B, K, H, W) of the student.
        pseudo: (B, H, W) int64, 255 = ignored or dropped; none kept gives zero.
    """
    loss = cross_entropy_or_zero(logits, pseudo)
    kept = (pseudo != IGNORE).sum().clamp(min=1).to(loss.dtype)
    return pseudo.numel() / kept * loss


def class_masks(labels: Tensor, num_classes: int, first_image_only: bool = True) -> Tensor:
    """Class masks (B, K, H, W) bool of label maps (B, H, W), 255 = ignore.

    With `first_image_only` (QUIRK u2pl-0) they are what the original's one-hot makes of a batch: image 0 carries
    the union of all images' labels, where 255 of another image counts as class 0 and 255 of image 0 clears
    everything; the other images are empty. Otherwise each image has its own ordinary one-hot.

    Source: `label_onehot` in `u2pl/utils/utils.py`.
    """
    classes = torch.arange(num_classes, device=labels.device).view(-1, 1, 1)
    if not first_image_only:
        return labels.unsqueeze(1) == classes
    index = labels.where(labels != IGNORE, 0)
    first = torch.zeros(num_classes, *labels.shape[1:], dtype=torch.bool, device=labels.device)
    first.scatter_(0, index, True)
    first &= labels[0] != IGNORE
    masks = torch.zeros(len(labels), *first.shape, dtype=torch.bool, device=labels.device)
    masks[0] = first
    return masks


def nearest(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Boolean masks or label maps (B, H, W) at `size` (h, w): source index floor(target * in / out)."""
    small = F.interpolate(maps.unsqueeze(1).to(torch.uint8), size=size, mode="nearest").squeeze(1)
    return small.to(maps.dtype)


@dataclass(frozen=True, slots=True)
class ContrastSettings:
    """Numbers of the contrastive loss; see `MethodConfig` and `QuirkConfig` for their meaning.

    `conf_weight` (AEL variant) weights the pixels of a class centre by the teacher's largest probability.
    """

    num_queries: int
    num_negatives: int
    temperature: float
    low_rank: int
    high_rank: int
    current_class_threshold: float
    current_class_negative_threshold: float
    slot_index: bool = True
    own_label_negatives: bool = True
    conf_weight: bool = False


class ContrastInputs(NamedTuple):
    """Everything the contrast looks at, at feature size; labeled images first.

    feats, feats_teacher (B, D, h, w) float; probs (B, K, h, w) of the train-mode teacher; masks (B, K, h, w),
    reliable and unreliable (B, h, w) bool; num_labeled of the B images carry true labels.
    """

    feats: Tensor
    feats_teacher: Tensor
    probs: Tensor
    masks: Tensor
    reliable: Tensor
    unreliable: Tensor
    num_labeled: int


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


@torch.no_grad()
def contrast_inputs(
    feats: Tensor,
    feats_teacher: Tensor,
    logits_teacher: Tensor,
    y_l: Tensor,
    y_u: Tensor,
    split: EntropySplit,
    *,
    negative_high_entropy: bool = True,
    onehot_first_image: bool = True,
    every_image: bool = False,
) -> ContrastInputs:
    """Bring labels and entropy masks to feature size and pick the images that can take part.

    Under QUIRK u2pl-0 only the first labeled and the first unlabeled image have class masks, so only they are
    looked at (the same numbers for a fraction of the work, as long as a negative must carry its label);
    `every_image` keeps the empty ones too.

    Args:
        feats: (B, D, h, w) of the student, labeled images first.
        feats_teacher: (B, D, h, w) of the train-mode teacher.
        logits_teacher: (B, K, h, w) of the train-mode teacher.
        y_l: (B_l, H, W) labels, 255 = ignore.
        y_u: (B_u, H, W) pseudo-labels before dropping, 255 = ignore.
        split: entropy masks of the unlabeled images.
        negative_high_entropy: otherwise every unlabeled pixel may be a negative.
        onehot_first_image: QUIRK u2pl-0.
        every_image: do not leave out images without class masks.
    """
    num_classes, size = logits_teacher.shape[1], (logits_teacher.shape[2], logits_teacher.shape[3])
    true = nearest(y_l != IGNORE, size)
    unreliable = nearest(split.unreliable, size) if negative_high_entropy else torch.ones_like(true[:1])
    masks = torch.cat([class_masks(nearest(y, size), num_classes, onehot_first_image) for y in (y_l, y_u)])
    reliable = torch.cat((true, nearest(split.reliable, size)))
    unreliable = torch.cat((true, unreliable.expand(len(y_u), -1, -1)))
    inputs: tuple[Tensor, ...] = (feats_teacher, logits_teacher, masks, reliable, unreliable)
    n = len(y_l)
    if onehot_first_image and not every_image:
        with torch.enable_grad():
            feats = torch.stack((feats[0], feats[n]))
        inputs = tuple(torch.stack((x[0], x[n])) for x in inputs)
        n = 1
    feats_teacher, logits_teacher, masks, reliable, unreliable = inputs
    return ContrastInputs(feats, feats_teacher, logits_teacher.softmax(dim=1), masks, reliable, unreliable, n)


@torch.no_grad()
def negative_masks(inputs: ContrastInputs, cfg: ContrastSettings) -> Tensor:
    """Pixels that are negatives of a class, (K, B * h * w) bool, eq. (10) to (12) of the paper.

    A pixel qualifies if it is unreliable, not sure of the class, and the teacher ranks the class in
    [low_rank, high_rank) (unlabeled) or in [0, low_rank) while the label says otherwise (labeled).
    """
    order = inputs.probs.sort(dim=1, descending=True, stable=True).indices
    positions = torch.arange(order.shape[1], device=order.device).view(1, -1, 1, 1).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, positions)
    n = inputs.num_labeled
    likely = (rank[:n] < cfg.low_rank) & ~inputs.masks[:n]
    unlikely = (rank[n:] >= cfg.low_rank) & (rank[n:] < cfg.high_rank)
    unsure = inputs.unreliable.unsqueeze(1) & (inputs.probs < cfg.current_class_negative_threshold)
    chosen = torch.cat((likely, unlikely)) & unsure
    if cfg.own_label_negatives:  # QUIRK u2pl-2, u2pl-3: label c is demanded, so labeled pixels never qualify
        chosen &= inputs.masks
    return chosen.transpose(0, 1).flatten(1)


def pixel_rows(feats: Tensor, index: Tensor) -> Tensor:
    """Rows (..., D) of a feature map (B, D, h, w) at positions `index` (...) in (image, row, column) order."""
    area = feats.shape[-2] * feats.shape[-1]
    return feats.flatten(2)[index // area, :, index % area]


@torch.no_grad()
def compact(mask: Tensor, size: int) -> Tensor:
    """Positions of the true entries of a flat mask in order, padded with -1 to `size`; no host wait."""
    place = (mask.cumsum(0) - 1).where(mask, size).clamp(max=size)
    found = torch.full((size + 1,), -1, dtype=torch.long, device=mask.device)
    found.scatter_(0, place, torch.arange(len(mask), device=mask.device))
    return found[:size]


@torch.no_grad()
def collect_negatives(
    inputs: ContrastInputs, cfg: ContrastSettings, labels_per_pixel: int, exact: bool
) -> tuple[Tensor, Tensor]:
    """Classes (S,) and teacher features (S, D) of all negatives, by class, then image, row, column.

    S is a fixed bound, padded with class -1, so that nothing has to be counted on the host and all ranks agree;
    `exact` counts instead (one process on the CPU, where that is free).
    """
    masks = negative_masks(inputs, cfg)
    pixels = masks.shape[1]
    bound = min(len(masks), labels_per_pixel) * pixels
    flat = masks.flatten()
    size = int(flat.sum()) if exact else bound
    place = compact(flat, size)
    classes = (place // pixels).where(place >= 0, -1)
    return classes, pixel_rows(inputs.feats_teacher, place.clamp(min=0) % pixels)


def _info_nce(
    anchors: Tensor, positives: Tensor, queues: ClassQueues, k: Tensor, index: Tensor, temperature: float
) -> Tensor:
    """Mean cross entropy of Q anchors (Q, D) with their positives (Q, D) against N negatives each, eq. (7)."""
    with torch.no_grad():
        negatives = F.normalize(queues.gather(k, index), dim=-1, eps=1e-8).view(
            len(anchors), -1, anchors.shape[1]
        )
    unit = F.normalize(anchors, dim=-1, eps=1e-8)
    positive = (unit * F.normalize(positives, dim=-1, eps=1e-8)).sum(dim=-1, keepdim=True)
    logits = torch.cat((positive, torch.einsum("qd,qnd->qn", unit, negatives)), dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(anchors), dtype=torch.long, device=anchors.device))


def contrast(
    inputs: ContrastInputs,
    queues: ClassQueues,
    cfg: ContrastSettings,
    draws: ContrastDraws | None = None,
    prototypes: Tensor | None = None,
    prototype_decay: float = 0.0,
    generator: torch.Generator | None = None,
) -> Contrast:
    """Contrast reliable anchors with their class centre and with queued negatives, section 3.3, eq. (7).

    The negatives of this step must have been pushed already. Slot s stands for the s-th class that has reliable
    pixels; QUIRK u2pl-1: its anchors and centre are those of class s, its queue that of the s-th valid class.
    With at most one valid class the loss is zero.

    Args:
        inputs: feature maps and masks of this process.
        queues: negatives of all classes.
        cfg: thresholds and sizes.
        draws: recorded choices (tests); otherwise they are drawn from `generator` on the device.
        prototypes: (K, Q, 1, D) averaged centres (the `anchor_ema` variant), all zero before their first use.
        prototype_decay: weight of the stored centre, `min(1 - 1/k, 0.999)` at the k-th update.
        generator: generator of the features' device.

    Source: `compute_contra_memobank_loss` in `u2pl/utils/loss_helper.py`.
    """
    num_classes = inputs.probs.shape[1]
    device = inputs.feats.device
    with torch.no_grad():
        low = inputs.masks & inputs.reliable.unsqueeze(1)
        sure = low & (inputs.probs > cfg.current_class_threshold)
        low, sure = (m.transpose(0, 1).flatten(1) for m in (low, sure))  # (K, B*h*w)
        valid = low.any(dim=1)
        num_valid = valid.sum()
        slots = torch.arange(num_classes, device=device)
        owner = (~valid).long().argsort(stable=True)  # slot -> class: valid classes first, ascending
        source = slots if cfg.slot_index else owner
        counts = sure.sum(dim=1)
        lengths = queues.lengths
        centres = _class_centres(inputs.feats_teacher, low, inputs.probs.amax(1) if cfg.conf_weight else None)
        contributes = (slots < num_valid) & (counts[source] > 0) & (lengths[owner] > 0) & (num_valid > 1)
        anchor_place, negative_place = _choose(
            cfg, contributes, counts[source], lengths[owner], draws, generator
        )
        # the j-th candidate of a class is where the running count reaches j + 1
        running = sure.cumsum(dim=1)[source]
        pixels = torch.searchsorted(running, anchor_place + 1).clamp(max=running.shape[1] - 1)
        positives = centres[source].unsqueeze(1).expand(-1, cfg.num_queries, -1)
        fresh = None
        if prototypes is not None:
            stored = prototypes.squeeze(2)[owner]
            blended = (1.0 - prototype_decay) * positives + prototype_decay * stored
            positives = torch.where(prototypes.any(), blended, positives)
            kept = positives * contributes.view(
                -1, 1, 1
            )  # QUIRK u2pl-18: classes without a slot are forgotten
            fresh = torch.zeros_like(prototypes).index_copy_(0, owner, kept.unsqueeze(2))
            fresh = torch.where(num_valid > 1, fresh, prototypes)

    total = inputs.feats.sum() * 0.0  # keeps the representation head in the graph when nothing contributes
    for s in range(num_classes):
        if device.type != "cuda" and not contributes[s]:
            continue  # on the host reading a flag is free; a GPU computes every slot and masks it
        anchors = pixel_rows(inputs.feats, pixels[s])
        term = checkpoint(  # recomputing the gather is cheaper than keeping Q * N rows per class for backward
            _info_nce, anchors, positives[s], queues, owner[s], negative_place[s], cfg.temperature,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
        total = total + torch.where(contributes[s], term, 0.0)
    return Contrast(total / num_valid.clamp(min=1), fresh, valid, counts)


def _class_centres(feats: Tensor, masks: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean feature (K, D) of the pixels of every class, weighted by `weight` (B, h, w); zero without any pixel."""
    rows = masks.view(len(masks), len(feats), -1).to(feats.dtype)
    mass = masks.sum(dim=1)
    if weight is not None:
        rows = rows * weight.flatten(1)
        mass = rows.sum(dim=(1, 2))
    total = torch.einsum("kbp,bdp->kd", rows, feats.flatten(2))
    return total / mass.where(mass > 0, 1).unsqueeze(1)


def _choose(
    cfg: ContrastSettings,
    contributes: Tensor,
    num_anchors: Tensor,
    num_negatives: Tensor,
    draws: ContrastDraws | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Index of each anchor among its candidates (K, Q) and of each negative in its queue (K, Q * N)."""
    if draws is not None:
        row = (contributes.long().cumsum(0) - 1).clamp(min=0, max=max(len(draws.anchors) - 1, 0))
        if not len(draws.anchors):
            zero = torch.zeros_like(row).unsqueeze(1)
            return zero.expand(-1, cfg.num_queries), zero.expand(-1, cfg.num_queries * cfg.num_negatives)
        return draws.anchors[row], draws.negatives[row]
    device, k = contributes.device, len(contributes)
    shapes = ((k, cfg.num_queries), (k, cfg.num_queries * cfg.num_negatives))
    uniform = [torch.rand(shape, device=device, generator=generator) for shape in shapes]
    limits = (num_anchors, num_negatives)
    first, second = (
        (u * n.unsqueeze(1)).long().clamp(max=(n - 1).clamp(min=0).unsqueeze(1))
        for u, n in zip(uniform, limits, strict=True)
    )
    return first, second


def reverse_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over labeled pixels of `-sum_c p_c log(clamp(onehot_c, 1e-4, 1))`, a noise-tolerant partner of CE.

    Args:
        logits: (B, K, H, W).
        target: (B, H, W) int64, 255 = ignore.

    Source: `compute_rce_loss` of U2PL.
    """
    valid = target != IGNORE
    probs = logits.softmax(dim=1)
    onehot = F.one_hot(target.where(valid, 0), logits.shape[1]).movedim(-1, 1).to(probs.dtype)
    per_pixel = -(probs * onehot.clamp(min=1e-4).log()).sum(dim=1)
    return (per_pixel * valid).sum() / valid.sum().clamp(min=1)
