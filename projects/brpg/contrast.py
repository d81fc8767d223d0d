"""An option of the original that no published setting uses: contrast of pixels with prototypes as positives.

Anchors, negatives and their queue are those of U2PL; the positive of an anchor is the most similar prototype of
its slot's class instead of the class's mean feature.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data.spec import IGNORE
from common.mean_teacher.contrast import (
    ContrastInputs,
    class_masks,
    compact,
    nearest,
    negative_masks,
    pixel_rows,
)
from common.models.deeplab import Outputs
from common.numerics.losses import entropy, masked_percentiles
from projects.brpg.memory import FeatureQueues, Keys, Rows
from projects.brpg.prototypes import Prototypes
from projects.brpg.settings import MethodConfig, QuirkConfig


class ContrastDraws(NamedTuple):
    """Indices among the candidates: anchors (K, Q) and negatives (K, Q * N), a row per slot."""

    anchors: Tensor
    negatives: Tensor


class Candidates(NamedTuple):
    """What the slots draw from: slot s stands for the s-th class that has reliable pixels.

    sure (K, B*h*w) bool, anchor candidates by class; owner (K,) class of a slot; source (K,) class its anchors
    come from; contributes (K,) bool; anchors, negatives (K,) numbers of candidates per slot; valid, scalar
    number of slots in use.
    """

    sure: Tensor
    owner: Tensor
    source: Tensor
    contributes: Tensor
    anchors: Tensor
    negatives: Tensor
    valid: Tensor


@torch.no_grad()
def contrast_inputs(
    feats: Tensor,
    seen: Outputs,
    large_teacher: Tensor,
    y_l: Tensor,
    pseudo: Tensor,
    alpha: float,
    quirks: QuirkConfig,
) -> ContrastInputs:
    """Bring labels and entropy masks to feature size.

    Args:
        feats: (B, D, h, w) of the student, labeled images first.
        seen: of the train-mode teacher on the same images.
        large_teacher: (B_u, K, H, W) the same of the unlabeled images at full size.
        y_l: (B_l, H, W) labels, 255 = ignore.
        pseudo: (B_u, H, W) pseudo-labels after mixing, 255 = ignore.
        alpha: percent taken from each end of the entropy ranking.
        quirks: `onehot_first_image`.
    """
    assert seen.feats is not None, "the representation head is part of the method"
    num_classes, size = seen.logits.shape[1], (seen.logits.shape[2], seen.logits.shape[3])
    valid = pseudo != IGNORE
    values = entropy(large_teacher.softmax(dim=1))
    low, high = masked_percentiles(values, valid, (alpha, 100.0 - alpha))
    labels, n = nearest(torch.cat((y_l, pseudo)), size), len(y_l)
    masks = class_masks(labels, num_classes, quirks.onehot_first_image, (n, len(pseudo)))
    true = labels[:n] != IGNORE
    reliable = torch.cat((true, nearest(valid & (values <= low), size)))
    unreliable = torch.cat((true, nearest(valid & (values >= high), size)))
    probs = seen.logits.softmax(dim=1)
    return ContrastInputs(feats, seen.feats, probs, masks, reliable, unreliable, n)


@torch.no_grad()
def negative_rows(inputs: ContrastInputs, method: MethodConfig) -> Rows:
    """Teacher features of all negatives, by class, then image, row, column; padded to one per class and pixel."""
    masks = negative_masks(inputs, method.low_rank, method.high_rank, method.current_class_negative_threshold)
    pixels, images = masks.shape[1], inputs.feats_teacher[inputs.num_labeled :]
    most = min(len(masks), len(images)) * pixels  # a pixel carries one label per image of a batch
    place = compact(masks.flatten(), most)
    feats = pixel_rows(images, place % pixels)
    return Rows(feats, torch.zeros_like(feats[:, 0]), place // pixels)


@torch.no_grad()
def candidates(
    inputs: ContrastInputs, queues: FeatureQueues, method: MethodConfig, slot_index: bool
) -> Candidates:
    """Anchors and negatives that every slot can draw from, after this step's negatives have been pushed.

    With `slot_index` (QUIRK quirks.slot_index) the anchors of slot s are those of class s, its queue that of the
    s-th valid class.
    """
    low = inputs.masks & inputs.reliable.unsqueeze(1)
    sure = (low & (inputs.probs > method.current_class_threshold)).transpose(0, 1).flatten(1)
    valid = low.transpose(0, 1).flatten(1).any(dim=1)
    slots = torch.arange(len(valid), device=valid.device)
    owner = (~valid).long().argsort(stable=True)
    source = slots if slot_index else owner
    anchors, negatives = sure.sum(dim=1)[source], queues.lengths[owner]
    count = valid.sum()
    contributes = (slots < count) & (anchors > 0) & (negatives > 0) & (count > 1)
    return Candidates(sure, owner, source, contributes, anchors, negatives, count)


def draw_contrast(found: Candidates, method: MethodConfig, keys: Keys) -> ContrastDraws:
    """Random indices with replacement for every slot."""
    k, q, n = len(found.owner), method.num_queries, method.num_negatives

    def below(limits: Tensor, width: int) -> Tensor:
        uniform = keys(k * width).view(k, width)
        most = (limits - 1).clamp(min=0).unsqueeze(1)
        return torch.minimum((uniform * limits.unsqueeze(1)).long(), most)

    return ContrastDraws(below(found.anchors, q), below(found.negatives, q * n))


def contrast(
    inputs: ContrastInputs,
    queues: FeatureQueues,
    prototypes: Prototypes,
    found: Candidates,
    draws: ContrastDraws,
    method: MethodConfig,
) -> Tensor:
    """Mean InfoNCE over the valid classes; zero where nothing contributes.

    Source: `compute_contra_memobank_prototype_loss` in `u2pl/utils/loss_helper.py`.
    """
    total = inputs.feats.sum() * 0.0
    running = found.sure.cumsum(dim=1)[found.source]
    pixels = torch.searchsorted(running, draws.anchors + 1).clamp(max=running.shape[1] - 1)
    with torch.no_grad():
        centres = F.normalize(prototypes.centres[found.owner], dim=2, eps=1e-8)
        real = prototypes.real[found.owner]
        rows = queues.slots(found.owner.unsqueeze(1), draws.negatives)
    for s in range(len(found.owner)):
        unit = F.normalize(pixel_rows(inputs.feats, pixels[s]), dim=1, eps=1e-8)
        with torch.no_grad():
            best = (unit @ centres[s].t()).masked_fill(~real[s], -torch.inf).argmax(dim=1)
            negatives = F.normalize(queues.feats[rows[s]].to(unit.dtype), dim=1, eps=1e-8)
            negatives = negatives.view(len(unit), -1, unit.shape[1])
        positive = (unit * centres[s][best]).sum(dim=1, keepdim=True)
        logits = torch.cat((positive, torch.einsum("qd,qnd->qn", unit, negatives)), dim=1)
        target = torch.zeros(len(unit), dtype=torch.long, device=unit.device)
        term = F.cross_entropy(logits / method.contra_temperature, target)
        total = total + torch.where(found.contributes[s], term, 0.0)
    return total / found.valid.clamp(min=1)
