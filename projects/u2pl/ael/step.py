"""One training step of the AEL variant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from common.data.streams import Batches, TrainingData
from common.distributed import Dist
from common.models.deeplab import Outputs, upsample
from common.numerics.ema import warmup_decay
from common.numerics.losses import IGNORE, Losses, cross_entropy_or_zero, reverse_cross_entropy
from common.numerics.mixing import box_masks
from common.numerics.schedules import linear_decay
from common.run.progress import Progress
from projects.u2pl.ael.boxes import adaptive_box
from projects.u2pl.ael.config import AelConfig
from projects.u2pl.ael.data import AelData
from projects.u2pl.ael.draws import AelDraws
from projects.u2pl.ael.losses import TeacherTargets, consistency_loss, sampled_pixels, unlabeled_targets
from projects.u2pl.ael.memory import AelMemory, Choice, HostCopy
from projects.u2pl.config import Config
from projects.u2pl.losses import Contrast, contrast, contrast_inputs
from projects.u2pl.state import Run

REVERSE_WEIGHT = 0.1  # of the reverse cross entropy under `sym_ce_l` and `sym_ce_u`


class AelBatch(NamedTuple):
    """Images of one step on the device.

    x_l (B, 3, H, H) with y_l (B, H, H); x_paste, y_paste: their partners, labels all zero where an image has none;
    x_u (P, 3, H, H): the unlabeled images that stay, at the positions `ids` of their list; x_second: the partners
    of the choice.
    """

    x_l: Tensor
    y_l: Tensor
    x_paste: Tensor
    y_paste: Tensor
    x_u: Tensor
    x_second: Tensor
    ids: Sequence[int]


def adaptive_state(cfg: Config, ael: AelConfig, data: TrainingData, dist: Dist) -> tuple[AelMemory, AelDraws]:
    """Memory and random numbers of a run of the variant."""
    images, seed = len(data.loaders["unlabeled"].dataset), cfg.run.seed
    memory = AelMemory(cfg, ael, data.spec.num_classes, images, cfg.model.inner_planes, seed)
    return memory.to(dist.device), AelDraws(seed, dist.rank, dist.device, apart=ael.banks == "shared")


def adaptive_step(batches: Batches, at: Progress, run: Run) -> Losses:
    """One forward: choose what to mix, read it, and take `ael_step`.

    `batches` are those of the loaders of `AelData`, in their order.
    """
    data, memory, draws = run.data, run.memory, run.draws
    assert isinstance(data, AelData)
    assert isinstance(memory, AelMemory)
    assert isinstance(draws, AelDraws)
    labeled, unlabeled, partner = batches
    choice = memory.choose(draws, len(unlabeled.image) // 2)
    forward = at.since(at.epoch) * data.accumulate + at.forward
    seconds, found = data.second_images([pair.second for pair in choice.pairs], at.epoch, forward, run.dist)
    pairs = [pair._replace(second=place) for pair, place in zip(choice.pairs, found, strict=True)]
    batch = AelBatch(
        labeled.image, labeled.label, partner.image, partner.label,
        torch.cat([unlabeled.image[pair.first].unsqueeze(0) for pair in pairs]), as_batch(seconds, unlabeled.image),
        [place for pair in pairs for place in unlabeled.index[pair.first : pair.first + 1].tolist()],
    )  # fmt: skip
    return ael_step(batch, choice._replace(pairs=pairs), at, run)


def as_batch(images: Tensor, like: Tensor) -> Tensor:
    """Images of the host where and how `like` is; the host does not wait for a GPU."""
    last = like.is_contiguous(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    return (images.pin_memory() if like.is_cuda else images).to(like.device, like.dtype, non_blocking=True)


def copy_paste(
    images: Tensor, labels: Tensor, other: Tensor, other_labels: Tensor, classes: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) and labels (B, H, W) with the objects of `classes` of their partners on top.

    A partner whose labels are all 0 stands for "none" and pastes nothing, whatever the classes.

    Source: `dynamic_copy_paste` in `u2pl/utils/utils.py`, branch `with_AEL`.
    """
    pasted = torch.zeros_like(labels, dtype=torch.bool)
    for k in classes:  # a handful of host numbers: comparing with each copies nothing
        pasted |= other_labels == k
    pasted &= (other_labels != 0).flatten(1).any(dim=1).view(-1, 1, 1)
    return torch.where(pasted.unsqueeze(1), other, images), torch.where(pasted, other_labels, labels)


def ael_step(batch: AelBatch, choice: Choice, at: Progress, run: Run) -> Losses:
    """All loss terms of one forward, still on the device.

    The share of dropped pseudo-labels shrinks with the epoch. The class maps of the second images go to the host and
    back as boxes; the supervised loss is enqueued in between.
    """
    cfg, ael, nets, memory, draws, dist = (
        run.cfg,
        run.cfg.method.ael,
        run.nets,
        run.memory,
        run.draws,
        run.dist,
    )
    assert ael is not None
    assert isinstance(memory, AelMemory)
    assert isinstance(draws, AelDraws)
    size, pairs = batch.y_l.shape[-2:], len(batch.x_u)
    x_l, y_l = copy_paste(batch.x_l, batch.y_l, batch.x_paste, batch.y_paste, choice.paste_classes)
    out_l = nets.forward(x_l)
    logits_l = upsample(out_l.logits, size)
    with torch.no_grad():
        seen_l = nets.teach(x_l, train=True)
        teacher_l = upsample(seen_l.logits, size)
        both = torch.cat((batch.x_u, batch.x_second))
        weak = nets.teach(both, train=False).logits
        teacher_both = upsample(weak, size)
        found, known = teacher_both.argmax(dim=1), weak.isfinite().flatten(1).all(dim=1)
        ids = [*batch.ids, *(p.second for p in choice.pairs)]
        memory.learn(logits_l.detach(), y_l, found, known, ids, dist)
        second = HostCopy(found[pairs:].to(torch.uint8))

    sup = nets.criterion(logits_l, y_l, None if out_l.aux is None else upsample(out_l.aux, size))
    if ael.sym_ce_l:
        sup = sup + REVERSE_WEIGHT * reverse_cross_entropy(logits_l, y_l)
    with torch.no_grad():
        confidence_l, pseudo_l = teacher_l.softmax(dim=1).amax(dim=1), teacher_l.argmax(dim=1)
        pseudo_l = pseudo_l.where(confidence_l >= ael.threshold, IGNORE)
        boxes = [
            adaptive_box(labels, p.k, ael.area_thresh, draws, no_pad=ael.no_pad, no_slim=ael.no_slim)
            for labels, p in zip(second.read()[0], choice.pairs, strict=True)
        ]
        outside = box_masks(boxes, size[0], size[1], found.device).unsqueeze(1)
        x_u = torch.where(outside, batch.x_u, batch.x_second)
        teacher_u = torch.where(outside, teacher_both[:pairs], teacher_both[pairs:])
        low, high = cfg.method.low_entropy_threshold, ael.high_entropy_threshold
        drop = low * linear_decay(at.epoch, at.epochs)
        targets = unlabeled_targets(teacher_u, drop, low, high, ael.drop_low_entropy)
        seen_u = nets.teach(x_u, train=True)
    out_u = nets.forward(x_u)
    logits_u = upsample(out_u.logits, size)

    cons = _consistency(logits_l, pseudo_l, confidence_l, ael, memory, draws)
    cons = cons + _consistency(logits_u, targets.pseudo, targets.confidence, ael, memory, draws)
    cons = ael.consist_weight * cons
    terms = {"loss_sup": sup, "loss_unsup": cons, "kept": (targets.pseudo != IGNORE).float().mean()}
    # every process divides its losses by their number, and averaging the gradients does so once more
    share = dist.world_size if ael.divide_by_ranks else 1
    total = (sup + cons) / share
    if at.epoch >= ael.start_epoch and cfg.method.contra_weight > 0:
        result, negatives = _contrast(
            out_l, out_u, seen_l, seen_u, (teacher_l, teacher_u), y_l, targets, at.since(ael.start_epoch), run
        )  # fmt: skip
        contra = cfg.method.contra_weight * result.loss
        # QUIRK u2pl-8: summed over ranks and divided by their number, but only the own share has a gradient
        once_more = dist.world_size if cfg.quirks.contra_reduce == "sum_forward_only" else 1
        total = total + contra / (share * once_more)
        terms |= {"loss_contra": contra, "negatives": negatives, "anchor_classes": result.valid.sum()}
    elif out_l.feats is not None:
        total = total + 0.0 * out_l.feats.sum()  # zero gradients, not none: weight decay reaches the head
    return Losses(total, terms)


def _consistency(
    logits: Tensor, target: Tensor, confidence: Tensor, ael: AelConfig, memory: AelMemory, draws: AelDraws
) -> Tensor:
    """Loss of student logits (B, K, H, W) for the teacher's labels (B, H, W) with their confidence (B, H, W)."""
    if ael.cons:
        keep = None
        if ael.cons_sample:
            uniform = draws.class_maps(*logits.shape[1:])
            keep = sampled_pixels(logits, memory.class_confidence, uniform, ael.cons_gamma2)
        loss = consistency_loss(logits, confidence, target, ael.cons_gamma, keep)
    else:
        loss = cross_entropy_or_zero(logits, target)
    return loss + REVERSE_WEIGHT * reverse_cross_entropy(logits, target) if ael.sym_ce_u else loss


def _contrast(
    out_l: Outputs, out_u: Outputs, seen_l: Outputs, seen_u: Outputs, teacher: tuple[Tensor, Tensor],
    y_l: Tensor, targets: TeacherTargets, update: int, run: Run,
) -> tuple[Contrast, Tensor]:  # fmt: skip
    """The contrast of U2PL, and how many negatives were queued for it.

    Unlike there, classes are ranked by the full-size logits brought back to feature size, for the mixed image those
    of the eval-mode teacher. `update` counts the steps since its start (only averaged centres need it).
    """
    cfg, memory, draws = run.cfg, run.require_memory(), run.draws
    assert out_l.feats is not None, "the representation head is part of the method"
    assert out_u.feats is not None
    assert seen_l.feats is not None
    assert seen_u.feats is not None
    small = out_l.logits.shape[-2:]
    inputs = contrast_inputs(
        torch.cat((out_l.feats, out_u.feats)), torch.cat((seen_l.feats, seen_u.feats)),
        torch.cat([upsample(x, small) for x in teacher]), y_l, targets.split.pseudo, targets.split,
        negative_high_entropy=cfg.method.negative_high_entropy,
        onehot_first_image=cfg.quirks.onehot_first_image,
        every_image=not cfg.quirks.own_label_negatives,
    )  # fmt: skip
    negatives = memory.collect(inputs, len(targets.pseudo), run.dist).sum()
    result = contrast(
        inputs, memory.queues, memory.settings, draws.contrast, memory.prototypes,
        warmup_decay(update, 0.999), draws.generator,
    )  # fmt: skip
    memory.prototypes = result.prototypes
    return result, negatives
