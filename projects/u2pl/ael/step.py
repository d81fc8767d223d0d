"""One training step of the AEL variant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from common.data.spec import IGNORE
from common.data.streams import Batches, TrainingData
from common.distributed import Dist, to_device
from common.models.deeplab import Outputs, upsample
from common.numerics.losses import Losses, best_class, cross_entropy_or_zero
from common.numerics.mixing import fill_boxes
from common.numerics.optim import linear_decay
from common.run.progress import Progress
from projects.u2pl.ael.boxes import adaptive_boxes
from projects.u2pl.ael.config import AelConfig
from projects.u2pl.ael.data import AelData
from projects.u2pl.ael.draws import AelDraws
from projects.u2pl.ael.losses import (
    consistency_loss,
    reverse_cross_entropy,
    sampled_pixels,
    unlabeled_targets,
)
from projects.u2pl.ael.memory import AelMemory, Choice
from projects.u2pl.config import Config, require_ael
from projects.u2pl.contrast import Contrast, contrast_inputs
from projects.u2pl.losses import EntropySplit
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


def adaptive_state(cfg: Config, data: TrainingData, dist: Dist) -> tuple[AelMemory, AelDraws]:
    """Memory and random numbers of a run of the variant."""
    images, seed = len(data.loaders["unlabeled"].dataset), cfg.run.seed
    memory = AelMemory(cfg, data.spec.num_classes, images, cfg.model.inner_planes, seed)
    apart = require_ael(cfg).banks == "shared"
    return memory.to(dist.device), AelDraws(seed, dist.rank, dist.device, apart=apart)


def adaptive_step(batch: Batches, at: Progress, run: Run) -> Losses:
    """One forward: take what was chosen to be mixed, and `ael_step`, in which the next is chosen and decoding begins.

    That does not reach over the end of an epoch: nothing is decoded while an evaluation starts its processes.
    `batch` has those of the loaders of `AelData`, in their order.
    """
    data = run.data
    assert isinstance(data, AelData)
    memory, draws = _memory_and_draws(run)
    labeled, unlabeled, partner = batch
    count = len(unlabeled.image) // 2
    choice = memory.choose(draws, count)
    forward = at.since(at.epoch) * data.accumulate + at.forward
    second, places = data.second_images([pair.second for pair in choice.pairs], at.epoch, forward, run.dist)
    pairs = [pair._replace(second=place) for pair, place in zip(choice.pairs, places, strict=True)]
    images = AelBatch(
        labeled.image,
        labeled.label,
        partner.image,
        partner.label,
        torch.cat([unlabeled.image[pair.first].unsqueeze(0) for pair in pairs]),
        as_batch(second, unlabeled.image),
        [place for pair in pairs for place in unlabeled.index[pair.first : pair.first + 1].tolist()],
    )

    def look_ahead() -> None:
        if forward + 1 < at.length * data.accumulate:
            upcoming = [pair.second for pair in memory.choose_ahead(draws, count).pairs]
            data.decode_ahead(upcoming, at.epoch, forward + 1, run.dist)

    return ael_step(images, choice._replace(pairs=pairs), at, run, look_ahead)


def _memory_and_draws(run: Run) -> tuple[AelMemory, AelDraws]:
    memory, draws = run.memory, run.draws
    assert isinstance(memory, AelMemory)
    assert isinstance(draws, AelDraws)
    return memory, draws


def as_batch(images: Tensor, like: Tensor) -> Tensor:
    """Images of the host where and how `like` is; the host does not wait for a GPU."""
    last = like.is_contiguous(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    return to_device(images.to(like.dtype), like.device)


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


def ael_step(
    batch: AelBatch, choice: Choice, at: Progress, run: Run, boxes_cut: Callable[[], object] = lambda: None
) -> Losses:
    """All loss terms of one forward, still on the device.

    The share of dropped pseudo-labels shrinks with the epoch. The class maps of the second images go to the host and
    back as boxes, the one wait of a forward; the losses of labeled images are enqueued in between. `boxes_cut` is
    called once the host knows what the next choice needs and has drawn its last number.
    """
    cfg, ael, nets = run.cfg, require_ael(run.cfg), run.nets
    memory, draws = _memory_and_draws(run)
    size, pairs = batch.y_l.shape[-2:], len(batch.x_u)
    x_l, y_l = copy_paste(batch.x_l, batch.y_l, batch.x_paste, batch.y_paste, choice.paste_classes)
    out_l = nets.forward(x_l)
    logits_l = upsample(out_l.logits, size)
    with torch.no_grad():
        seen_l = nets.teach(x_l, train=True)
        teacher_l = upsample(seen_l.logits, size)
        weak = nets.teach(torch.cat((batch.x_u, batch.x_second)), train=False).logits
        teacher_both = upsample(weak, size)
        found, known = best_class(teacher_both), weak.isfinite().flatten(1).all(dim=1)
        ids = [*batch.ids, *(pair.second for pair in choice.pairs)]
        on_host = memory.learn(logits_l.detach(), y_l, found, known, ids, run.dist)

    sup = nets.criterion(logits_l, y_l, None if out_l.aux is None else upsample(out_l.aux, size))
    if ael.sym_ce_l:
        sup = sup + REVERSE_WEIGHT * reverse_cross_entropy(logits_l, y_l)
    with torch.no_grad():
        confidence_l = teacher_l.softmax(dim=1).amax(dim=1)
        pseudo_l = best_class(teacher_l).where(confidence_l >= ael.threshold, IGNORE)
    cons = _consistency(logits_l, pseudo_l, confidence_l, ael, memory, draws)
    with torch.no_grad():
        maps = on_host.read()[-1][pairs:]
        boxes = adaptive_boxes(maps, [pair.k for pair in choice.pairs], ael, draws)
        boxes_cut()
        x_u = fill_boxes(batch.x_u, boxes, batch.x_second)
        teacher_u = fill_boxes(teacher_both[:pairs], boxes, teacher_both[pairs:])
        low, high = cfg.method.low_entropy_threshold, ael.high_entropy_threshold
        drop = low * linear_decay(at.epoch, at.epochs)
        targets = unlabeled_targets(teacher_u, drop, low, high, ael.drop_low_entropy)
        seen_u = nets.teach(x_u, train=True)
    out_u = nets.forward(x_u)
    logits_u = upsample(out_u.logits, size)

    cons = cons + _consistency(logits_u, targets.pseudo, targets.confidence, ael, memory, draws)
    cons = ael.consist_weight * cons
    terms = {"loss_sup": sup, "loss_unsup": cons, "kept": (targets.pseudo != IGNORE).float().mean()}
    # QUIRK method.ael.divide_by_ranks: averaging the gradients divides once more
    share = run.dist.world_size if ael.divide_by_ranks else 1
    total = (sup + cons) / share
    if at.epoch >= ael.start_epoch and cfg.method.contra_weight > 0:
        result, negatives = _contrast(
            (out_l, out_u),
            (seen_l, seen_u),
            (teacher_l, teacher_u),
            y_l,
            targets.split,
            at.since(ael.start_epoch),
            run,
        )
        contra = cfg.method.contra_weight * result.loss
        # QUIRK quirks.contra_reduce: summed over ranks and divided by their number, with the own share's gradient only
        once_more = run.dist.world_size if cfg.quirks.contra_reduce == "sum_forward_only" else 1
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
    outs: Sequence[Outputs],
    seen: Sequence[Outputs],
    teacher: Sequence[Tensor],
    y_l: Tensor,
    split: EntropySplit,
    update: int,
    run: Run,
) -> tuple[Contrast, Tensor]:
    """The contrast of U2PL, and how many negatives were queued for it.

    Unlike there, classes are ranked by the full-size logits brought back to feature size, for the mixed images those
    of the eval-mode teacher.

    Args:
        outs: of the student, for labeled and for mixed images.
        seen: of the train-mode teacher.
        teacher: logits (B, K, H, W) that rank the classes.
        y_l: (B, H, W) labels, 255 = ignore.
        split: of the mixed images.
        update: steps since the first contrast.
        run: has the memory and the draws.
    """
    memory = run.require_memory()
    feats, feats_teacher = ([x.feats for x in pair if x.feats is not None] for pair in (outs, seen))
    assert len(feats) == len(feats_teacher) == 2, "the representation head is part of the method"
    small = outs[0].logits.shape[-2:]
    inputs = contrast_inputs(
        torch.cat(feats),
        torch.cat(feats_teacher),
        torch.cat([upsample(x, small) for x in teacher]),
        y_l,
        split.pseudo,
        split,
        run.cfg,
    )
    negatives = memory.collect(inputs, len(split.pseudo), run.dist).sum()
    return memory.contrast(inputs, run.draws, update), negatives
