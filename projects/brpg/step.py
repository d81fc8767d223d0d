"""The parts of an iteration after the supervised epochs: mean teacher, collection, clustering, prototypes."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from common.data.spec import IGNORE
from common.data.streams import Batches
from common.data.views import split_views
from common.distributed import mean_over_ranks
from common.models.deeplab import Outputs, upsample
from common.numerics.losses import Losses
from common.numerics.optim import linear_decay
from common.run.progress import Progress
from projects.brpg import contrast as extra
from projects.brpg.augment import (
    Mixed,
    copy_paste,
    draw_paste_classes,
    paste_probability,
    strong_mix,
)
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
from projects.brpg.memory import collect, gather, true_class_confidence
from projects.brpg.settings import MethodConfig
from projects.brpg.state import Run

Phase = Literal["supervised", "semi", "collect", "prototypes"]


class Seen(NamedTuple):
    """What the later parts of an iteration need of the mean-teacher part."""

    student: Outputs  # both halves, labeled first, at feature size
    weak: Outputs  # teacher in evaluation mode on weak views
    train: Outputs  # teacher in training mode on both halves
    teacher_large: Tensor  # (B, K, H, W) logits of the latter for the unlabeled half
    y_l: Tensor  # (B, H, W) labels, 255 = ignore
    pseudo: Tensor  # (B, H, W) after mixing, before any is dropped
    conf: Tensor  # (B, H, W) after mixing


def phase_of(epoch: int, method: MethodConfig) -> Phase:
    """What the epochs of a semi-supervised run do."""
    if epoch < method.sup_only_epochs:
        return "supervised"
    if epoch < method.collect_start or not method.prototypes:
        return "semi"
    return "collect" if epoch < method.prototype_start else "prototypes"


def clustering_due(at: Progress, run: Run) -> bool:
    """Whether this is the first step of the prototype phase."""
    waiting = run.state is not None and run.state.memory is not None
    return waiting and phase_of(at.epoch, run.cfg.method) == "prototypes"


def make_prototypes(at: Progress, run: Run) -> list[int] | None:
    """At the first step of the prototype phase: cluster the queues and free them. A collective; the host waits.

    Returns the number of prototypes per class, or None at any other step.

    Raises:
        UserError: a class has too few features.
    """
    if not clustering_due(at, run):
        return None
    state = run.require_state()
    assert state.memory is not None
    found = cluster(state.memory, run.cfg.method, run.data.spec.classes, run.dist)
    state.prototypes.set(found)
    state.memory = None
    return [len(own) for own in found]


def paste_classes(batch: Batches, at: Progress, run: Run) -> Batches:
    """The batch whose labeled images carry classes of their second images, where that is on."""
    method, state, draws = run.cfg.method, run.state, run.draws
    if state is None or state.paste_confidence is None:
        return batch
    labeled, *others = batch
    value = state.paste_confidence.value
    chosen = draw_paste_classes(value, method.paste_ignore, draws.keys(method.paste_classes))
    share = paste_probability(at.step, at.length, method.paste_delay, method.paste_promote)
    x, y = copy_paste(labeled.image, labeled.label, chosen, draws.keys(len(labeled.image)), share)
    return labeled._replace(image=x, label=y), *others


def follow_confidence(logits: Tensor, labels: Tensor, at: Progress, run: Run) -> None:
    """Update the classes' confidence from labeled logits (B, K, H, W), where something uses it."""
    method, state = run.cfg.method, run.state
    if state is None:
        return
    follow = state.confidence is not None and at.epoch >= method.collect_start
    paste = state.paste_confidence is not None and at.epoch >= method.paste_delay
    if not follow and not paste:
        return
    found = true_class_confidence(logits, labels)
    if state.confidence is not None and follow:
        state.confidence.update(found)
    if state.paste_confidence is not None and paste:
        state.paste_confidence.update(found)


def semi_step(batch: Batches, at: Progress, run: Run) -> tuple[Losses, Seen]:
    """Supervised and pseudo-label loss of an iteration with the mean teacher."""
    (x_l, y_l), (x_weak, x_strong) = batch[0][:2], split_views(batch[1].image)
    nets, method, draws = run.nets, run.cfg.method, run.draws
    size, n = y_l.shape[-2:], len(x_l)
    with torch.no_grad():
        weak = nets.teach(x_weak, train=False)
        conf, pseudo = upsample(weak.logits, size).softmax(dim=1).max(dim=1)
        mixed = Mixed(x_strong, pseudo, conf)
        if draws.coin() < method.augment_probability and method.strong_augmentation != "none":
            mixed = strong_mix(mixed, method.strong_augmentation, draws)
    x = torch.cat((x_l, mixed.images))
    out = nets.forward(x)  # before the teacher: the order of dropout draws is part of the trajectory
    # the parts are resized, not the whole cut: its gradient would be two maps of the full size
    logits_l, logits_u = (upsample(part, size) for part in out.logits.split([n, len(mixed.images)]))
    sup = nets.criterion(logits_l, y_l, None if out.aux is None else upsample(out.aux[:n], size))
    follow_confidence(logits_l.detach(), y_l, at, run)
    with torch.no_grad():
        seen = nets.teach(x, train=True)  # batch statistics and dropout; the running statistics learn here
        large = upsample(seen.logits[n:], size)
        percent = entropy_percentile(method.drop_percent, at.epoch, at.epochs)
        kept = keep_low_entropy(large, mixed.pseudo, percent)
    unsup = method.unsup_weight * pseudo_label_loss(logits_u, kept)
    terms = {"loss_sup": sup, "loss_unsup": unsup, "kept": (kept != IGNORE).mean(dtype=torch.float32)}
    return Losses(sup + unsup, terms), Seen(out, weak, seen, large, y_l, mixed.pseudo, mixed.conf)


def collect_step(seen: Seen, run: Run) -> dict[str, Tensor]:
    """Bring this step's features of all processes into the queues; their numbers by queue."""
    state, n = run.require_state(), len(seen.y_l)
    assert state.memory is not None, "the queues have been clustered already"
    assert seen.student.feats is not None, "the representation head is part of the method"
    labeled = Outputs(seen.student.logits[:n].detach(), seen.student.feats[:n].detach(), None)
    collected = collect(
        labeled,
        seen.y_l,
        seen.weak,
        run.cfg.method,
        run.draws.keys,
        confidence=None if state.confidence is None else state.confidence.value,
        as_half=run.cfg.quirks.half_confidence and run.nets.precision == "fp16",
    )
    counts = state.memory.push(collected, run.dist)
    return {f"collected_{name}": count.sum() for name, count in counts.items()}


def prototype_step(seen: Seen, at: Progress, run: Run) -> Losses:
    """Prototype loss, and the move of the prototypes that follows it.

    The total carries the gradient of one process; the term is the mean over processes.
    """
    method, quirks, prototypes = run.cfg.method, run.cfg.quirks, run.require_state().prototypes
    feats = seen.student.feats
    assert feats is not None, "the representation head is part of the method"
    ramp = RAMP_EPOCH if quirks.ramp_from_five else method.prototype_start
    threshold = pseudo_threshold(
        method.pseudo_threshold, method.pseudo_threshold_end, at.step, at.length, at.epochs, ramp
    )
    keys = run.draws.keys(seen.conf.numel())
    found = prototype_loss(
        feats, seen.y_l, seen.pseudo, seen.conf, prototypes, method, threshold=threshold, keys=keys
    )
    together = None if quirks.own_prototypes else run.dist
    prototypes.update(found.feats, found.labels, found.slot, method.prototype_decay, together)
    loss = method.proto_weight * (found.labeled + found.unlabeled)
    return Losses(share_of_gradient(loss, run), {"loss_proto": mean_over_ranks(loss.detach(), run.dist)})


def contrast_step(seen: Seen, at: Progress, run: Run) -> Losses:
    """The optional contrast with prototypes as positives."""
    method, quirks, state = run.cfg.method, run.cfg.quirks, run.require_state()
    assert state.negatives is not None, "there is no queue of negatives"
    assert seen.student.feats is not None
    alpha = method.low_entropy_threshold * linear_decay(at.epoch, at.epochs)
    inputs = extra.contrast_inputs(
        seen.student.feats, seen.train, seen.teacher_large, seen.y_l, seen.pseudo, alpha, quirks
    )
    state.negatives.append(gather(extra.negative_rows(inputs, method), run.dist))
    found = extra.candidates(inputs, state.negatives, method, quirks.slot_index)
    chosen = extra.draw_contrast(found, method, run.draws.keys)
    loss = extra.contrast(inputs, state.negatives, state.prototypes, found, chosen, method)
    loss = method.contra_weight * loss
    return Losses(share_of_gradient(loss, run), {"loss_contra": mean_over_ranks(loss.detach(), run.dist)})


def share_of_gradient(loss: Tensor, run: Run) -> Tensor:
    """A loss of the prototypes as it enters the total of this process, see `gradient_share`."""
    return gradient_share(loss, run.dist.world_size, run.cfg.quirks.proto_reduce == "sum_forward_only")
