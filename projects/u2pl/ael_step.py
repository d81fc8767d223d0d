"""One training step of the AEL variant, and what it remembers between steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from common.data.loaders import Batch
from common.data.streams import TrainingData
from common.distributed import Dist, all_gather_padded, sum_over_ranks
from common.errors import UserError
from common.models.deeplab import Outputs, upsample
from common.numerics.ema import warmup_decay
from common.numerics.losses import IGNORE, Losses, cross_entropy_or_zero
from common.numerics.mixing import box_masks
from common.numerics.schedules import linear_decay
from projects.u2pl.ael import (
    AelConfig,
    AelDraws,
    Choice,
    TeacherTargets,
    batch_confidence,
    choose,
    class_totals,
    consistency_loss,
    copy_paste,
    covered_classes,
    moved_confidence,
    sampled_pixels,
    unlabeled_targets,
    write_columns,
)
from projects.u2pl.ael_data import AelData
from projects.u2pl.ael_masks import adaptive_box
from projects.u2pl.config import Config
from projects.u2pl.losses import Contrast, contrast, contrast_inputs, reverse_cross_entropy
from projects.u2pl.model import Memory, Networks
from projects.u2pl.state import State

REVERSE_WEIGHT = 0.1  # of the reverse cross entropy under `sym_ce_l` and `sym_ce_u`


class HostCopy:
    """Tensors on their way to the host; `read` waits for no more than what was enqueued before the copy."""

    def __init__(self, *tensors: Tensor) -> None:
        self._host = [
            tensor.to("cpu", non_blocking=True, copy=True) for tensor in tensors
        ]  # pinned for a GPU
        self._arrived = torch.cuda.Event() if tensors[0].is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> list[NDArray[Any]]:
        """The values as arrays."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [tensor.numpy() for tensor in self._host]


class AelMemory(Memory):
    """The contrastive memory, the class confidence (K,) and the CutMix bank (K, N) bool.

    The host chooses the images of a step from the state after the step before. That state is complete early in a
    step, so its copy (K numbers and K * N bytes) arrives while the GPU still works on the rest of that step.

    Args:
        cfg: for the contrastive part.
        ael: settings of the variant.
        num_classes: K.
        num_images: N, unlabeled images.
        dim: length of the representation.
        seed: of the random start.

    Raises:
        UserError: no class is left to paste.
    """

    class_confidence: Tensor
    cutmix_bank: Tensor

    def __init__(
        self, cfg: Config, ael: AelConfig, num_classes: int, num_images: int, dim: int, seed: int
    ) -> None:
        super().__init__(cfg, num_classes, dim)
        # the original's averaged centres know no weights
        weighted = ael.conf_weight and not cfg.method.anchor_ema
        self.settings = dataclasses.replace(self.settings, conf_weight=weighted)
        self.ael = ael
        self.targets = [k for k in range(num_classes) if k not in ael.common_classes]
        if not self.targets:
            raise UserError(
                f"method.ael.common_classes={list(ael.common_classes)}: leaves none of the {num_classes} classes "
                "to paste; shorten the list"
            )
        start = torch.zeros(num_classes)
        if ael.conf_init == "rand":
            start = torch.rand(num_classes, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("class_confidence", start)
        self.register_buffer("cutmix_bank", torch.zeros(num_classes, num_images, dtype=torch.bool))
        self._copy: HostCopy | None = None
        self.register_load_state_dict_post_hook(_forget_copy)

    @torch.no_grad()
    def learn(
        self, logits_l: Tensor, y_l: Tensor, found: Tensor, known: Tensor, ids: Sequence[int], dist: Dist
    ) -> None:
        """Take in one step, and send the result to the host. What is not finite leaves no trace.

        Args:
            logits_l: (B, K, H, W) of the student for labeled images.
            y_l: (B, H, W), 255 = ignore.
            found: (n, H, H) classes that the teacher sees in unlabeled images.
            known: (n,) bool, whether its logits there are finite.
            ids: their positions in the unlabeled list.
            dist: with shared banks every rank learns from all.
        """
        totals = class_totals(logits_l, y_l)
        columns = covered_classes(found, len(self.class_confidence), self.ael.area_thresh2)
        places = torch.cat([torch.full((1,), i, device=found.device) for i in ids])
        if self.ael.banks == "shared":
            totals = sum_over_ranks(totals, dist)
            columns, known, places = (
                all_gather_padded(x, dist).flatten(0, 1) for x in (columns, known, places)
            )
        state = moved_confidence(self.class_confidence, batch_confidence(totals), self.ael.momentum)
        self.class_confidence.copy_(state)
        write_columns(self.cutmix_bank, columns, places, known)
        self._copy = HostCopy(self.class_confidence, self.cutmix_bank)

    def own(self) -> dict[str, Tensor]:
        """Also class confidence and bank, which differ between processes unless they are shared."""
        banks = {"class_confidence": self.class_confidence, "cutmix_bank": self.cutmix_bank}
        return super().own() | banks

    def choose(self, draws: AelDraws, pairs: int = 1) -> Choice:
        """What the next step shall paste and mix; to be called once before each step."""
        self._copy = self._copy or HostCopy(self.class_confidence, self.cutmix_bank)
        confidence, bank = self._copy.read()
        return choose(confidence, bank, self.targets, self.ael.paste_number, draws, pairs)


def _forget_copy(memory: Any, _: object) -> None:
    memory._copy = None


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


def adaptive_step(
    batches: Sequence[Batch], epoch: int, i: int, cfg: Config, data: TrainingData, state: State, dist: Dist
) -> Losses:
    """Forward `i` of an optimiser step: choose what to mix, read it, and take `ael_step`.

    `batches` are those of the loaders of `AelData`, in their order.
    """
    ael, memory, draws = cfg.method.ael, state.memory, state.draws
    assert ael is not None
    assert isinstance(data, AelData)
    assert isinstance(memory, AelMemory)
    assert isinstance(draws, AelDraws)
    labeled, unlabeled, partner = batches
    choice = memory.choose(draws, len(unlabeled.image) // 2)
    forward = (state.step - epoch * data.steps_per_epoch) * data.accumulate + i
    seconds, found = data.second_images([pair.second for pair in choice.pairs], epoch, forward, dist)
    pairs = [pair._replace(second=place) for pair, place in zip(choice.pairs, found, strict=True)]
    batch = AelBatch(
        labeled.image, labeled.label, partner.image, partner.label,
        torch.cat([unlabeled.image[pair.first].unsqueeze(0) for pair in pairs]), as_batch(seconds, unlabeled.image),
        [place for pair in pairs for place in unlabeled.index[pair.first : pair.first + 1].tolist()],
    )  # fmt: skip
    update = state.step - ael.start_epoch * data.steps_per_epoch
    return ael_step(
        batch, choice._replace(pairs=pairs), epoch, update, cfg, ael, state.nets, memory, draws, dist
    )


def as_batch(images: Tensor, like: Tensor) -> Tensor:
    """Images of the host where and how `like` is; the host does not wait for a GPU."""
    last = like.is_contiguous(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    return (images.pin_memory() if like.is_cuda else images).to(like.device, like.dtype, non_blocking=True)


def ael_step(
    batch: AelBatch, choice: Choice, epoch: int, update: int,
    cfg: Config, ael: AelConfig, nets: Networks, memory: AelMemory, draws: AelDraws, dist: Dist,
) -> Losses:  # fmt: skip
    """All loss terms of one iteration, still on the device.

    The share of dropped pseudo-labels shrinks with `epoch` (from 0); `update` counts the iterations since the start
    of the contrast (only averaged centres need it). The class maps of the second images go to the host and back
    as boxes; the supervised loss is enqueued in between.
    """
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
        drop = low * linear_decay(epoch, cfg.optim.epochs)
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
    if epoch >= ael.start_epoch and cfg.method.contra_weight > 0:
        result, negatives = _contrast(
            out_l, out_u, seen_l, seen_u, (teacher_l, teacher_u), y_l, targets, update, cfg, memory, draws, dist
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
    y_l: Tensor, targets: TeacherTargets, update: int,
    cfg: Config, memory: AelMemory, draws: AelDraws, dist: Dist,
) -> tuple[Contrast, Tensor]:  # fmt: skip
    """The contrast of U2PL, and how many negatives were queued for it.

    Unlike there, classes are ranked by the full-size logits brought back to feature size, for the mixed image those
    of the eval-mode teacher.
    """
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
    negatives = memory.collect(inputs, len(targets.pseudo), dist).sum()
    result = contrast(
        inputs, memory.queues, memory.settings, draws.contrast, memory.prototypes,
        warmup_decay(update, 0.999), draws.generator,
    )  # fmt: skip
    memory.prototypes = result.prototypes
    return result, negatives
