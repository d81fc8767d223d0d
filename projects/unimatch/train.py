"""Train UniMatch V1 or V2, FixMatch, or the supervised-only baseline."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from common.config import plan_batch
from common.data.streams import Batches
from common.distributed import Dist, delayed_reduction
from common.errors import run_main
from common.mean_teacher.evaluation import evaluate_network
from common.measure.pseudo_quality import log_pseudo_quality
from common.numerics.ema import copy_buffers, copy_parameters, update_teacher, warmup_decay
from common.numerics.losses import Losses, mean_of
from common.numerics.optim import build_optimizer, set_learning_rate
from common.numerics.precision import grad_scaler
from common.run.progress import Progress
from common.run.rng import configure
from common.run.session import Session
from projects.unimatch.augment import Draws, unlabeled_of
from projects.unimatch.config import Config
from projects.unimatch.data import build_training_data
from projects.unimatch.evaluate import finish, protocol
from projects.unimatch.losses import Pseudo, consistency, kept_share, paste, pasted, pseudo_labels
from projects.unimatch.model import average_buffers, build_networks, parameter_groups
from projects.unimatch.reporting import deviations, show_panels
from projects.unimatch.state import PROJECT, Run
from tools import train_script
from tools.training import announce, forecast

HERE = Path(__file__).resolve().parent


def supervised_step(batch: Batches, at: Progress, run: Run) -> Losses:
    """Loss of labeled images alone: the baseline."""
    x_l, y_l = batch[0][:2]
    sup = run.nets.criterion(run.nets.forward(x_l), y_l)
    return Losses(sup, {"loss_sup": sup})


def train_step(batch: Batches, at: Progress, run: Run) -> Losses:
    """All loss terms of one forward on labeled and unlabeled images, still on the device.

    The weak view's labels teach the strong views, into each of which a box of other images is pasted with their
    labels, and in V1 the weak view with channels dropped. The versions differ in who labels and whose the boxes are.

    Source: `unimatch.py` and `fixmatch.py` of V1, `unimatch_v2.py` and `fixmatch.py` of V2.
    """
    method, nets = run.cfg.method, run.nets
    if method.mode == "sup_only":
        return supervised_step(batch, at, run)
    (x_l, y_l), own = batch[0][:2], unlabeled_of(batch[1])
    if method.teacher:
        ours = pseudo_labels(nets.label(own.weak), own.padding)
        theirs, others = ours.mirrored(), [view.flip(0) for view in own.strong]
    else:  # QUIRK quirks.same_photo; QUIRK partner_in_eval_mode: labels in a box are not predicted as those outside
        other = unlabeled_of(batch[2])
        theirs, others = pseudo_labels(nets.label(other.weak), other.padding), other.strong
    strong = torch.cat([paste(*views) for views in zip(own.strong, others, own.boxes, strict=True)])
    if method.teacher:
        logits_l, logits_s = teacher_forwards(x_l, strong, run)
    else:
        logits_l, logits_w, logits_fp, logits_s = student_forwards(x_l, own.weak, strong, run)
        ours = pseudo_labels(logits_w, own.padding)

    def unsup(logits: Tensor, pseudo: Pseudo) -> Tensor:
        return consistency(logits, pseudo, method.threshold, nets.empty_is_nan)

    sup = nets.criterion(logits_l, y_l)
    parts = zip(logits_s.chunk(method.strong_views), own.boxes, strict=True)
    streams = [unsup(logits, pasted(ours, theirs, box)) for logits, box in parts]
    terms = {"loss_sup": sup} | {f"loss_strong_{i}": loss for i, loss in enumerate(streams, start=1)}
    total = (1 - method.fp_share) * torch.stack(streams).mean()
    if method.fp_share:
        terms["loss_fp"] = unsup(logits_fp, ours)
        total = total + method.fp_share * terms["loss_fp"]
    terms["kept"] = kept_share(ours, method.threshold, nets.empty_is_nan)
    return Losses((sup + method.unsup_weight * total) * method.loss_weight, terms)


def student_forwards(x_l: Tensor, weak: Tensor, strong: Tensor, run: Run) -> list[Tensor]:
    """V1: logits of labeled images, of weak views, of those with channels dropped (or none), and of strong views.

    Labeled images and weak views pass together, then the strong ones, and dropped features pass the decoder beside the
    untouched ones: that decides on BatchNorm's statistics.
    """
    method, nets, x = run.cfg.method, run.nets, torch.cat((x_l, weak))
    factors = (
        run.draws.dropped(len(x), nets.student.level_planes, method.dropout) if method.fp_share else None
    )
    logits = nets.forward(x, factors, beside=factors is not None)
    # what is dropped of the labeled images is computed too, for the statistics, and not used
    parts = logits.split([len(x_l), len(weak)] * (len(logits) // len(x)))
    return [parts[0], parts[1], parts[-1], nets.forward(strong)]


def teacher_forwards(x_l: Tensor, strong: Tensor, run: Run) -> tuple[Tensor, Tensor]:
    """V2: logits of labeled images and of strong views; in one forward where nothing is dropped, as FixMatch does."""
    method, nets = run.cfg.method, run.nets
    if not method.complementary_dropout:
        logits_l, logits_s = nets.forward(torch.cat((x_l, strong))).split([len(x_l), len(strong)])
        return logits_l, logits_s
    network = nets.student
    factors = run.draws.complementary(
        len(strong) // 2, network.level_planes, method.untouched, network.one_factor
    )
    return nets.forward(x_l), nets.forward(strong, factors)


def before_step(at: Progress, run: Run) -> None:
    """Begin with the teacher as a copy of the student, pretrained weights included."""
    if run.nets.teacher is not None and at.step == 0:
        copy_parameters(run.nets.teacher, run.nets.student)
        copy_buffers(run.nets.teacher, run.nets.student)


def after_step(at: Progress, run: Run) -> None:
    """Move the teacher after the optimizer step; the first one makes it the student."""
    if run.nets.teacher is None:
        return
    decay = warmup_decay(at.step, run.cfg.method.ema_decay)
    update_teacher(run.nets.teacher, run.nets.student, decay)
    average_buffers(run.nets.teacher, run.nets.student, decay)


def set_rates(at: Progress, run: Run) -> float:
    """Give the optimizer its rates of this step; the backbone's is returned."""
    # QUIRK quirks.late_rate: those of the step before
    step = max(at.step - 1, 0) if run.cfg.quirks.late_rate else at.step
    return set_learning_rate(run.optimizer, run.cfg.optim, step, at.epochs * at.length)[0]


def train_epoch(epoch: int, run: Run, session: Session) -> bool:
    """The rest of an epoch; True if the run was asked to stop (and has been saved)."""
    nets = run.nets
    for at, group in session.steps(epoch):
        rate = set_rates(at, run)
        nets.student.train()
        nets.share_statistics(run.dist)
        before_step(at, run)
        session.guard.protect(nets.student, nets.teacher)
        run.optimizer.zero_grad(set_to_none=True)
        results = []
        for i, batch in enumerate(group):
            with delayed_reduction(nets.wrapped, i + 1 < len(group)):
                losses = train_step(batch, at._replace(forward=i), run)
                run.scaler.scale(losses.total / len(group)).backward()
            results.append(losses)
        losses = mean_of(results)
        bad = session.watch(at, losses, group)
        session.guard.step(run.scaler, run.optimizer)
        after_step(at, run)
        session.record(epoch, losses, bad, rate)
        if session.save_or_stop():
            return True
    return False


def evaluate(epoch: int, run: Run, session: Session) -> None:
    """Measure the networks after `epoch` (from 0), keep the best weights, show what the labeling one labels."""
    cfg, nets, how = run.cfg, run.nets, protocol(run.cfg, "training")
    nets.share_statistics(run.dist)
    with session.log.paused():
        networks = [getattr(nets, role) for role in dict.fromkeys((run.reported, "student"))]
        found, *others = [
            evaluate_network(cfg, one, run.data.spec, cfg.data.val, how, run.dist) for one in networks
        ]
        figures: dict[str, Any] = {"miou_student": others[0].miou} if others else {}
        best = session.note(epoch, found, **figures)
        session.log.info(f"epoch {epoch + 1}: {run.reported} mIoU {100 * found.miou:.2f}{best}")
        log_pseudo_quality(cfg, networks[:1], run.data, session.log, run.step, epoch, run.dist)
        if cfg.run.panels and run.dist.is_main:
            show_panels(run, session.log)


def set_up(cfg: Config, dist: Dist) -> Run:
    """Data, networks and optimizer of a run, before any checkpoint is read."""
    configure(cfg.run)
    data = build_training_data(cfg, dist, plan_batch(cfg.optim, dist.world_size))
    nets = build_networks(cfg, data.spec.num_classes, dist)
    optimizer = build_optimizer(cfg.optim, parameter_groups(nets.student, cfg.optim))
    draws = Draws(cfg.run.seed, dist.rank, dist.device)
    return Run(cfg, dist, data, nets, draws, optimizer, grad_scaler(cfg.run.precision, dist))


def train(cfg: Config, run_dir: Path, dist: Dist) -> None:
    """Train from wherever the run directory stands to the end, then measure the best and the last weights."""
    run = set_up(cfg, dist)
    with Session(run, PROJECT, run_dir) as session:
        session.start()
        apart = run.nets.student in run.nets.unsynchronized
        announce(session, deviations(cfg, dist.world_size), unsynchronized=apart)
        for epoch in session.epochs():
            if train_epoch(epoch, run, session):
                return
            if session.evaluation_due(epoch):
                evaluate(epoch, run, session)
            session.end_epoch(epoch)
        finish(run, session)


def dry_run(cfg: Config, dist: Dist) -> None:
    """Build everything, run steps, print the forecast; leaves nothing behind."""
    run = set_up(cfg, dist)
    with Session(run, PROJECT, None) as session:
        forecast(session, [lambda: train_epoch(0, run, session)] * 3)


def main(argv: Sequence[str]) -> int:
    """Read the command line, join the other processes, train."""
    description = "Train UniMatch V1 or V2, FixMatch, or their supervised-only baseline."
    cfg, run_dir = train_script.read(argv, Config, HERE, description)
    return train_script.start(cfg, run_dir, train, dry_run)


if __name__ == "__main__":
    run_main(main)
