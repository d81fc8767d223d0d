"""One training iteration of each phase, as the loop calls it: supervised, mean teacher, collection, prototypes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from common.distributed import Dist, mean_over_ranks
from common.models.deeplab import Outputs, upsample
from common.numerics.ema import copy_buffers, copy_parameters, update_teacher, warmup_decay
from common.numerics.losses import IGNORE, Losses
from common.numerics.schedules import linear_decay
from projects.brpg import contrast as extra
from projects.brpg.augment import Draws, Mixed, copy_paste, draw_paste_classes, paste_probability, strong_mix
from projects.brpg.clustering import cluster
from projects.brpg.losses import (
    RAMP_EPOCH,
    entropy_percentile,
    gradient_share,
    keep_low_entropy,
    prototype_loss,
    pseudo_label_loss,
    pseudo_threshold,
)
from projects.brpg.memory import (
    ClassConfidence,
    ClassQueues,
    FeatureMemory,
    collect,
    gather,
    true_class_confidence,
)
from projects.brpg.model import Networks
from projects.brpg.prototypes import Prototypes
from projects.brpg.settings import MethodConfig, QuirkConfig

Phase = Literal["supervised", "semi", "collect", "prototypes"]


class Progress(NamedTuple):
    """Where the training stands; everything counts from 0."""

    epoch: int
    step: int  # in the epoch
    length: int  # steps per epoch
    epochs: int

    @property
    def iteration(self) -> int:
        """Steps done before this one."""
        return self.epoch * self.length + self.step

    def update(self, method: MethodConfig) -> int:
        """Steps done since the teacher came into use; negative before."""
        return self.iteration - method.sup_only_epochs * self.length


class MethodState(nn.Module):
    """What the method remembers between steps, besides the networks; saved with a checkpoint.

    Attributes:
        memory: queues of features, from the start until they are clustered; None afterwards, and in runs without
            prototypes.
        prototypes: without any until then. Each process has its own (QUIRK brpg-2).
        confidence: of the classes; None unless thresholds follow it.
        paste_confidence: of the classes, for copy-paste; None without it.
        negatives: queues of the optional contrast; None without it.
    """

    def __init__(self, method: MethodConfig, num_classes: int, dim: int) -> None:
        super().__init__()
        self.memory = FeatureMemory(method, num_classes, dim) if method.prototypes else None
        self.prototypes = Prototypes(num_classes, method.num_slots, dim)
        csp = method.threshold_type == "csp"
        self.confidence = ClassConfidence(num_classes, method.conf_decay, method.conf_init) if csp else None
        self.paste_confidence = (
            ClassConfidence(num_classes, method.paste_momentum, None) if method.copy_paste else None
        )
        sizes = [method.contra_queue_first] + [method.contra_queue] * (num_classes - 1)
        self.negatives = ClassQueues(sizes, dim) if method.contra_weight > 0 else None


class Batch(NamedTuple):
    """One batch on the device: labeled images and labels, weak and strong views of unlabeled images.

    Images (B, 3, H, W), labels (B, H, W) with 255 = ignore.
    """

    x_l: Tensor
    y_l: Tensor
    x_u_w: Tensor
    x_u_s: Tensor


class Seen(NamedTuple):
    """What the later parts of an iteration need of the mean-teacher part."""

    student: Outputs  # both halves, labeled first, at feature size
    weak: Outputs  # teacher in evaluation mode on weak views
    train: Outputs  # teacher in training mode on both halves
    teacher_large: Tensor  # (B, K, H, W) logits of the latter for the unlabeled half
    pseudo: Tensor  # (B, H, W) after mixing, before any is dropped
    conf: Tensor  # (B, H, W) after mixing


def phase_of(epoch: int, method: MethodConfig) -> Phase:
    """What the epochs of a semi-supervised run do."""
    if epoch < method.sup_only_epochs:
        return "supervised"
    if epoch < method.collect_start or not method.prototypes:
        return "semi"
    return "collect" if epoch < method.prototype_start else "prototypes"


# --- before the losses -----------------------------------------------------------------------------------------


def before_step(at: Progress, method: MethodConfig, nets: Networks) -> None:
    """Bring the teacher into use, once: as a copy of the student, or as its average so far.

    Its BatchNorm statistics stay its own (QUIRK brpg-8).
    """
    if nets.teacher is None or at.update(method) != 0:
        return
    if not method.average_from_start:
        copy_parameters(nets.teacher, nets.student)
    if not nets.teacher_burn_in:
        copy_buffers(nets.teacher, nets.student)


def clustering_due(at: Progress, method: MethodConfig, state: MethodState) -> bool:
    """Whether this is the first step of the prototype phase."""
    return state.memory is not None and phase_of(at.epoch, method) == "prototypes"


def make_prototypes(
    at: Progress, method: MethodConfig, state: MethodState, names: Sequence[str], dist: Dist
) -> list[int] | None:
    """At the first step of the prototype phase: cluster the queues and free them. A collective; the host waits.

    Returns the number of prototypes per class, or None at any other step.

    Raises:
        UserError: a class has too few features.
    """
    if state.memory is None or not clustering_due(at, method, state):
        return None
    found = cluster(state.memory, method, names, dist)
    state.prototypes.set(found)
    state.memory = None
    return [len(own) for own in found]


def paste_classes(
    x: Tensor, y: Tensor, at: Progress, method: MethodConfig, state: MethodState, draws: Draws
) -> tuple[Tensor, Tensor]:
    """Labeled images (B, 3, H, W) and labels (B, H, W), with classes of their second images where that is on."""
    if state.paste_confidence is None:
        return x, y
    value = state.paste_confidence.value
    chosen = draw_paste_classes(value, method.paste_ignore, draws.keys(method.paste_classes))
    share = paste_probability(at.iteration, at.length, method.paste_delay, method.paste_promote)
    return copy_paste(x, y, chosen, draws.keys(len(x)), share)


def follow_confidence(
    logits: Tensor, labels: Tensor, at: Progress, method: MethodConfig, state: MethodState
) -> None:
    """Update the classes' confidence from labeled logits (B, K, H, W), where something uses it."""
    follow = state.confidence is not None and at.epoch >= method.collect_start
    paste = state.paste_confidence is not None and at.epoch >= method.paste_delay
    if not follow and not paste:
        return
    found = true_class_confidence(logits, labels)
    if state.confidence is not None and follow:
        state.confidence.update(found)
    if state.paste_confidence is not None and paste:
        state.paste_confidence.update(found)


# --- phases ----------------------------------------------------------------------------------------------------


def supervised_step(
    x_l: Tensor, y_l: Tensor, at: Progress, method: MethodConfig, nets: Networks, state: MethodState | None
) -> Losses:
    """Loss of labeled images alone: the baseline, and the epochs before the teacher is used."""
    out = nets.forward(x_l)
    size = y_l.shape[-2:]
    logits = upsample(out.logits, size)
    sup = nets.criterion(logits, y_l, None if out.aux is None else upsample(out.aux, size))
    total = sup
    if out.feats is not None:
        total = total + 0.0 * out.feats.sum()  # zero gradients, not none: weight decay reaches the head
    if nets.teacher is not None and nets.teacher_burn_in:
        nets.teach(x_l, train=True)  # QUIRK brpg-8: only the teacher's BatchNorm statistics learn here
    if state is not None:
        follow_confidence(logits.detach(), y_l, at, method, state)
    return Losses(total, {"loss_sup": sup})


def semi_step(
    batch: Batch, at: Progress, method: MethodConfig, nets: Networks, state: MethodState, draws: Draws
) -> tuple[Losses, Seen]:
    """Supervised and pseudo-label loss of an iteration with the mean teacher."""
    size, n = (batch.y_l.shape[1], batch.y_l.shape[2]), len(batch.x_l)
    with torch.no_grad():
        weak = nets.teach(batch.x_u_w, train=False)
        conf, pseudo = upsample(weak.logits, size).softmax(dim=1).max(dim=1)
        mixed = Mixed(batch.x_u_s, pseudo, conf)
        if draws.coin() < method.augment_probability and method.strong_augmentation != "none":
            mixed = strong_mix(mixed, method.strong_augmentation, draws)
    x = torch.cat((batch.x_l, mixed.images))
    out = nets.forward(x)  # before the teacher: the order of dropout draws is part of the trajectory
    logits = upsample(out.logits, size)
    sup = nets.criterion(logits[:n], batch.y_l, None if out.aux is None else upsample(out.aux[:n], size))
    follow_confidence(logits[:n].detach(), batch.y_l, at, method, state)
    with torch.no_grad():
        seen = nets.teach(x, train=True)  # batch statistics and dropout; the running statistics learn here
        large = upsample(seen.logits[n:], size)
        kept = keep_low_entropy(
            large, mixed.pseudo, entropy_percentile(method.drop_percent, at.epoch, at.epochs)
        )
    unsup = method.unsup_weight * pseudo_label_loss(logits[n:], kept)
    terms = {"loss_sup": sup, "loss_unsup": unsup, "kept": (kept != IGNORE).float().mean()}
    return Losses(sup + unsup, terms), Seen(out, weak, seen, large, mixed.pseudo, mixed.conf)


def collect_step(
    seen: Seen, y_l: Tensor, method: MethodConfig, quirks: QuirkConfig, nets: Networks, state: MethodState,
    draws: Draws, dist: Dist,
) -> dict[str, Tensor]:  # fmt: skip
    """Bring this step's features of all processes into the queues; their numbers by queue."""
    assert state.memory is not None, "the queues have been clustered already"
    assert seen.student.feats is not None, "the representation head is part of the method"
    assert seen.weak.feats is not None
    n = len(y_l)
    collected = collect(
        seen.student.feats[:n].detach(), seen.student.logits[:n].detach(), y_l, seen.weak.feats, seen.weak.logits,
        method, draws.keys,
        confidence=None if state.confidence is None else state.confidence.value,
        as_half=quirks.half_confidence and nets.precision == "fp16",
    )  # fmt: skip
    return {f"collected_{name}": count.sum() for name, count in state.memory.push(collected, dist).items()}


def prototype_step(
    seen: Seen, y_l: Tensor, at: Progress, method: MethodConfig, quirks: QuirkConfig, state: MethodState,
    draws: Draws, dist: Dist,
) -> Losses:  # fmt: skip
    """Prototype loss, and the move of the prototypes that follows it.

    The total carries the gradient of one process; the term is the mean over processes.
    """
    feats = seen.student.feats
    assert feats is not None, "the representation head is part of the method"
    ramp = RAMP_EPOCH if quirks.ramp_from_five else method.prototype_start
    threshold = pseudo_threshold(
        method.pseudo_threshold, method.pseudo_threshold_end, at.iteration, at.length, at.epochs, ramp
    )
    found = prototype_loss(
        feats, y_l, seen.pseudo, seen.conf, state.prototypes,
        threshold=threshold, temperature=method.temperature, grid_steps=method.grid_steps,
        points=method.unsup_points, keys=draws.keys(seen.conf.numel()),
    )  # fmt: skip
    state.prototypes.update(
        found.feats, found.labels, found.slot, method.prototype_decay, None if quirks.own_prototypes else dist
    )
    loss = method.proto_weight * (found.labeled + found.unlabeled)
    total = gradient_share(loss, dist.world_size, quirks.proto_reduce == "sum_forward_only")
    return Losses(total, {"loss_proto": mean_over_ranks(loss.detach(), dist)})


def contrast_step(
    seen: Seen, y_l: Tensor, at: Progress, method: MethodConfig, quirks: QuirkConfig, state: MethodState,
    draws: Draws, dist: Dist,
) -> Losses:  # fmt: skip
    """The optional contrast with prototypes as positives."""
    assert state.negatives is not None, "there is no queue of negatives"
    assert seen.student.feats is not None
    assert seen.train.feats is not None
    alpha = method.low_entropy_threshold * linear_decay(at.epoch, at.epochs)
    inputs = extra.contrast_inputs(
        seen.student.feats, seen.train.feats, seen.train.logits, seen.teacher_large, y_l, seen.pseudo, alpha, quirks
    )  # fmt: skip
    state.negatives.push(gather(extra.negative_rows(inputs, method), dist))
    found = extra.candidates(inputs, state.negatives, method, quirks.slot_index)
    chosen = extra.draw_contrast(found, method, draws.keys)
    loss = method.contra_weight * extra.contrast(
        inputs, state.negatives, state.prototypes, found, chosen, method
    )
    total = gradient_share(loss, dist.world_size, quirks.proto_reduce == "sum_forward_only")
    return Losses(total, {"loss_contra": mean_over_ranks(loss.detach(), dist)})


def train_step(
    batch: Batch, at: Progress, method: MethodConfig, quirks: QuirkConfig, nets: Networks, state: MethodState,
    draws: Draws, dist: Dist,
) -> Losses:  # fmt: skip
    """All loss terms of one iteration after the supervised epochs, still on the device."""
    losses, seen = semi_step(batch, at, method, nets, state, draws)
    total, terms = losses
    phase = phase_of(at.epoch, method)
    if phase == "collect":
        terms |= collect_step(seen, batch.y_l, method, quirks, nets, state, draws, dist)
    if phase == "prototypes":
        parts = [prototype_step(seen, batch.y_l, at, method, quirks, state, draws, dist)]
        if state.negatives is not None:
            parts.append(contrast_step(seen, batch.y_l, at, method, quirks, state, draws, dist))
        for part in parts:
            total = total + part.total
            terms |= part.terms
    elif seen.student.feats is not None:
        total = total + 0.0 * seen.student.feats.sum()
    return Losses(total, terms)


def after_step(at: Progress, method: MethodConfig, nets: Networks) -> None:
    """Move the teacher after the optimiser step."""
    update = at.iteration if method.average_from_start else at.update(method)
    if nets.teacher is not None and update >= 0:
        update_teacher(nets.teacher, nets.student, warmup_decay(update, method.ema_decay))
