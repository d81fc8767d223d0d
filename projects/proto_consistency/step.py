"""One iteration: the losses, and what happens to teacher and prototypes before and after the optimiser step.

Legend: B images of a half (labeled, unlabeled), K classes, P prototypes per class, D feature channels, (H, W) crop,
(h, w) feature size, n drawn places per image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.distributed import Dist
from common.models.deeplab import upsample
from common.numerics.ema import copy_buffers, copy_parameters, update_teacher, warmup_decay
from common.numerics.losses import Losses
from common.numerics.schedules import linear_decay
from projects.proto_consistency.augment import Draws, strong_augment
from projects.proto_consistency.config import Config, ProtoConfig, QuirkConfig, proto_start
from projects.proto_consistency.draws import gather_labels, gather_points
from projects.proto_consistency.losses import (
    prototype_losses,
    pseudo_labels,
    select_pixels,
    unsupervised_loss,
)
from projects.proto_consistency.model import Networks


def active_prototypes(epoch: int, cfg: Config) -> ProtoConfig | None:
    """The prototype head's settings if its losses and updates are on in this epoch (from 0)."""
    proto = cfg.prototypes
    return proto if proto is not None and epoch >= proto_start(cfg.method) else None


class Sampled(NamedTuple):
    """The drawn places of a forward.

    Attributes:
        rows: (n,) for all images, or (B, n).
        cols: alike.
        feats: (B*n, D) of the student, image by image.
        scores: (B*n, K) of the prototype head.
        match: (B*n, K), the nearest prototype of every class.
    """

    rows: Tensor
    cols: Tensor
    feats: Tensor
    scores: Tensor
    match: Tensor

    def at(self, maps: Tensor) -> Tensor:
        """Entries of maps (B, H, W) there, in the order of the features: (B*n,)."""
        return gather_labels(maps, self.rows, self.cols)


def look(
    feats: Tensor,
    size: tuple[int, int],
    proto: ProtoConfig,
    quirks: QuirkConfig,
    nets: Networks,
    draws: Draws,
) -> Sampled:
    """Compare the features (B, D, h, w) of drawn pixels of the crop (H, W) with the student's prototypes."""
    rows, cols = draws.points(size, proto.granularity, len(feats), quirks)
    picked = gather_points(feats, rows, cols, size)
    return Sampled(rows, cols, picked, *nets.student.require_prototypes().match(picked))


def note_movement(
    seen: Sampled, target: Tensor, cond: Tensor, teacher: Tensor | None, size: tuple[int, int],
    proto: ProtoConfig, quirks: QuirkConfig, nets: Networks,
) -> None:  # fmt: skip
    """Remember for the end of the step where the prototypes are drawn to by pixels with `target` and `cond` (B*n,).

    `teacher` (B, D, h, w) are its features of the same images. With `update_source: teacher` they take the student's
    place altogether: they move the prototypes of the student that are nearest to them (11.8).
    """
    assert nets.movement is not None
    feats, match = seen.feats.detach(), seen.match
    if proto.update_source == "teacher" and teacher is not None:
        feats = gather_points(teacher, seen.rows, seen.cols, size)
        match = nets.student.require_prototypes().match(feats).nearest
    if not quirks.raw_update:  # QUIRK proto-7
        feats = F.normalize(feats, dim=1)
    nets.movement.add(feats, match, target, cond)


def supervised_step(
    x_l: Tensor, y_l: Tensor, epoch: int, cfg: Config, nets: Networks, draws: Draws
) -> Losses:
    """Loss of labeled images alone: the baseline, and the epochs before the teacher is used (spec 1.4).

    Labeled images `x_l` (B, 3, H, W) with labels `y_l` (B, H, W). The prototypes learn from labeled pixels where
    they are active in `epoch`.
    """
    out = nets.forward(x_l)
    size = (y_l.shape[-2], y_l.shape[-1])
    aux = None if out.aux is None else upsample(out.aux, size)
    sup = nets.criterion(upsample(out.logits, size), y_l, aux)
    total, terms = sup, {"loss_sup": sup}
    teacher = None
    if nets.teacher is not None and nets.teacher_burn_in:
        # QUIRK u2pl-6: only the teacher's BatchNorm statistics learn here
        teacher = nets.teach(x_l, train=True).feats
    proto = active_prototypes(epoch, cfg)
    if proto is not None:
        assert out.feats is not None
        seen = look(out.feats, size, proto, cfg.quirks, nets, draws)
        target = seen.at(y_l)
        everything = torch.ones_like(target, dtype=torch.bool)
        found = prototype_losses(seen.scores, target, everything, len(target))
        if proto.supervised:
            terms["loss_proto_sup"] = proto.weight * found.sup
            total = total + terms["loss_proto_sup"]
        note_movement(seen, target, everything, teacher, size, proto, cfg.quirks, nets)
    return Losses(total, terms)


def train_step(
    x_l: Tensor, y_l: Tensor, x_u: Tensor, epoch: int, update: int, cfg: Config, nets: Networks, draws: Draws,
    dist: Dist,
) -> Losses:  # fmt: skip
    """All loss terms of one iteration after the supervised-only epochs, still on the device (spec 1.3).

    Labeled images `x_l` (B, 3, H, W) with labels `y_l` (B, H, W), unlabeled images `x_u` (B, 3, H, W). `epoch`
    counts from 0, `update` the iterations since the teacher came into use. The prototypes move in `after_step`.
    """
    del update, dist  # no term depends on them
    method = cfg.method
    size, n = (y_l.shape[-2], y_l.shape[-1]), len(x_l)
    with torch.no_grad():
        conf, pseudo = pseudo_labels(nets.teach(x_u, train=False).logits, size)
        mixed = draws.coin() < method.cutmix_probability and method.strong_augmentation != "none"
        if mixed:
            x_u, pseudo, conf = strong_augment(x_u, pseudo, conf, method.strong_augmentation, draws)
    x = torch.cat((x_l, x_u))
    out = nets.forward(x)  # before the teacher: the order of dropout draws is part of the trajectory
    logits = upsample(out.logits, size)
    aux = None if out.aux is None else upsample(out.aux[:n], size)
    sup = nets.criterion(logits[:n], y_l, aux)
    taught = nets.teach(x, train=True)  # for its BatchNorm statistics, and the percentile of the entropy
    with torch.no_grad():
        by_entropy = upsample(taught.logits[n:], size) if method.select == "entropy" else None
        drop = 100.0 - (100.0 - method.drop_percent) * linear_decay(epoch, cfg.optim.epochs)
        sure = select_pixels(
            conf, pseudo, select=method.select, confid_thresh=method.confid_thresh, logits_teacher=by_entropy,
            drop_percent=drop,
        )  # fmt: skip
    unsup = method.unsup_weight * unsupervised_loss(logits[n:], pseudo, sure, method.norm)
    total, terms = sup + unsup, {"loss_sup": sup, "loss_unsup": unsup}
    proto = active_prototypes(epoch, cfg)
    if proto is not None:
        assert out.feats is not None
        seen = look(out.feats, size, proto, cfg.quirks, nets, draws)
        every = torch.ones_like(y_l, dtype=torch.bool)
        target, drawn_sure = seen.at(torch.cat((y_l, pseudo))), seen.at(torch.cat((every, sure)))
        counted = drawn_sure if proto.select == "same" else torch.ones_like(drawn_sure)
        labeled = seen.feats.shape[0] * n // len(x)
        found = prototype_losses(seen.scores, target, counted, labeled)
        if proto.supervised:
            terms["loss_proto_sup"] = proto.weight * found.sup
            total = total + terms["loss_proto_sup"]
        if proto.unsupervised:
            terms["loss_proto_unsup"] = proto.weight * found.unsup
            total = total + terms["loss_proto_unsup"]
        moves = drawn_sure
        if not proto.update_unlabeled:
            moves = drawn_sure & (torch.arange(len(target), device=target.device) < labeled)
        note_movement(seen, target, moves, taught.feats, size, proto, cfg.quirks, nets)
    terms["confident"] = sure.float().mean()
    return Losses(total, terms)


def before_step(epoch: int, update: int, cfg: Config, nets: Networks) -> None:
    """Bring the teacher into use at `update` 0: as the student, all through its first epoch or once."""
    if nets.teacher is None or update < 0:
        return
    method = cfg.method
    shared = method.teacher_copy == "epoch" and epoch == method.sup_only_epochs
    if shared or (update == 0 and not method.average_from_start):
        copy_parameters(nets.teacher, nets.student)
    if update == 0 and not nets.teacher_burn_in:
        copy_buffers(nets.teacher, nets.student)


def after_step(
    epoch: int, update: int, cfg: Config, nets: Networks, dist: Dist, bad: Tensor | None = None
) -> None:
    """Move prototypes and teacher after the optimiser step; `update` counts the teacher's averages from 0.

    The prototypes come first, because the teacher's are averages of the student's. `bad` is 1 where the step was
    cancelled. A collective with `sync: gather`.
    """
    proto = cfg.prototypes
    if proto is not None and nets.movement is not None:
        nets.movement.apply(nets.student.require_prototypes(), proto, dist, bad)
    if nets.teacher is None or update < 0:
        return
    if epoch == cfg.method.sup_only_epochs and cfg.method.teacher_copy == "epoch":
        copy_parameters(nets.teacher, nets.student)
    update_teacher(nets.teacher, nets.student, warmup_decay(update, cfg.method.ema_decay))
    if proto is not None and proto.teacher_proto == "copy":
        with torch.no_grad():
            own = nets.teacher.require_prototypes().proto_list
            own.copy_(nets.student.require_prototypes().proto_list)
