"""Train prototype consistency, the mean teacher below it, or the supervised stage before it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from common.config import plan_batch
from common.data.streams import Batches
from common.distributed import Dist, delayed_reduction
from common.errors import UserError, run_main
from common.mean_teacher.run import parameter_groups
from common.models.deeplab import upsample
from common.numerics.ema import copy_buffers, copy_parameters, update_teacher, warmup_decay
from common.numerics.losses import Losses, mean_of
from common.numerics.optim import build_optimizer, linear_decay, set_learning_rate
from common.numerics.precision import grad_scaler
from common.run.progress import Progress
from common.run.rng import configure
from common.run.session import Session
from projects.proto_consistency.augment import Draws, strong_augment
from projects.proto_consistency.compat import original
from projects.proto_consistency.config import Config, prototypes_active
from projects.proto_consistency.data import build_training_data
from projects.proto_consistency.evaluate import evaluate_in_use, finish
from projects.proto_consistency.initial import place_prototypes
from projects.proto_consistency.losses import pseudo_labels, select_pixels, unsupervised_loss
from projects.proto_consistency.model import build_networks
from projects.proto_consistency.prototypes import Movement
from projects.proto_consistency.reporting import deviations, report_usage, resolved_switches, show_panels
from projects.proto_consistency.state import PROJECT, Run
from projects.proto_consistency.step import prototype_terms
from tools import train_script
from tools.training import announce, forecast

HERE = Path(__file__).resolve().parent


def supervised_step(batch: Batches, at: Progress, run: Run) -> Losses:
    """Loss of labeled images alone: the baseline, and the epochs before the teacher is used.

    The prototypes learn from labeled pixels where they are active.
    """
    nets, x_l, y_l = run.nets, batch[0].image, batch[0].label
    out = nets.forward(x_l)
    size = y_l.shape[-2:]
    aux = None if out.aux is None else upsample(out.aux, size)
    sup = nets.criterion(upsample(out.logits, size), y_l, aux)
    total, terms, teacher = sup, {"loss_sup": sup}, None
    if nets.teacher is not None and nets.teacher_burn_in:
        # QUIRK quirks.own_teacher_statistics: only the teacher's BatchNorm statistics learn here
        teacher = nets.teach(x_l, train=True).feats
    if prototypes_active(at.epoch, run.cfg):
        assert out.feats is not None
        every = torch.ones_like(y_l, dtype=torch.bool)
        for name, loss in prototype_terms(out.feats, teacher, y_l, every, len(y_l), run).items():
            total, terms[name] = total + loss, loss
    return Losses(total, terms)


def train_step(batch: Batches, at: Progress, run: Run) -> Losses:
    """All loss terms of one forward on labeled and unlabeled images, still on the device.

    The prototypes move in `after_step`.
    """
    if at.epoch < run.sup_only_epochs:
        return supervised_step(batch, at, run)
    (x_l, y_l), x_u = batch[0][:2], batch[1].image
    nets, draws, method = run.nets, run.draws, run.cfg.method
    size, n = y_l.shape[-2:], len(x_l)

    with torch.no_grad():
        conf, pseudo = pseudo_labels(nets.teach(x_u, train=False).logits, size)
        mixed = draws.coin() < method.cutmix_probability and method.strong_augmentation != "none"
        if mixed:
            x_u, pseudo, conf = strong_augment(x_u, pseudo, conf, method.strong_augmentation, draws)
    x = torch.cat((x_l, x_u))
    out = nets.forward(x)  # before the teacher: the order of dropout draws is part of the trajectory
    # the parts are resized, not the whole cut: its gradient would be two maps of the full size
    logits_l, logits_u = upsample(out.logits[:n], size), upsample(out.logits[n:], size)
    aux = None if out.aux is None else upsample(out.aux[:n], size)
    with torch.no_grad():
        taught = nets.teach(x, train=True)  # for its BatchNorm statistics, and the percentile of the entropy
        by_entropy = upsample(taught.logits[n:], size) if method.select == "entropy" else None
        drop = 100.0 - (100.0 - method.drop_percent) * linear_decay(at.epoch, at.epochs)
        sure = select_pixels(conf, pseudo, method.select, method.confid_thresh, by_entropy, drop)

    sup = nets.criterion(logits_l, y_l, aux)
    unsup = method.unsup_weight * unsupervised_loss(logits_u, pseudo, sure, method.norm)
    terms = {"loss_sup": sup, "loss_unsup": unsup}
    total = sup + unsup
    if prototypes_active(at.epoch, run.cfg):
        assert out.feats is not None
        labels, counted = torch.cat((y_l, pseudo)), torch.cat((torch.ones_like(y_l, dtype=torch.bool), sure))
        for name, loss in prototype_terms(out.feats, taught.feats, labels, counted, n, run).items():
            total, terms[name] = total + loss, loss
    terms["confident"] = sure.float().mean()
    return Losses(total, terms)


def before_step(at: Progress, run: Run) -> None:
    """Bring the teacher into use: as the student, once or all through its first epoch (QUIRK method.teacher_copy)."""
    nets, method, update = run.nets, run.cfg.method, at.since(run.sup_only_epochs)
    if nets.teacher is None or update < 0:
        return
    shared = method.teacher_copy == "epoch" and at.epoch == run.sup_only_epochs
    if shared or (update == 0 and not method.average_from_start):
        copy_parameters(nets.teacher, nets.student)
    if update == 0 and not nets.teacher_burn_in:
        copy_buffers(nets.teacher, nets.student)


def after_step(at: Progress, run: Run, bad: Tensor) -> None:
    """Move prototypes and teacher after the optimizer step; a collective with `method.proto.sync: gather`.

    The prototypes come first, because the teacher's are averages of the student's. They stay where `bad` is 1: the
    step was cancelled.
    """
    nets, method = run.nets, run.cfg.method
    if run.movement is not None:
        run.movement.apply(run.dist, bad)
    update = at.step if method.average_from_start else at.since(run.sup_only_epochs)
    if nets.teacher is None or update < 0:
        return
    if at.epoch == run.sup_only_epochs and method.teacher_copy == "epoch":
        copy_parameters(nets.teacher, nets.student)
    update_teacher(nets.teacher, nets.student, warmup_decay(update, method.ema_decay))
    if method.proto is not None and method.proto.teacher_proto == "copy":
        nets.teacher.require_prototypes().set(nets.student.require_prototypes().proto_list)


def train_epoch(epoch: int, run: Run, session: Session) -> bool:
    """The rest of an epoch; True if the run was asked to stop (and has been saved)."""
    nets, optim = run.nets, run.cfg.optim
    for at, group in session.steps(epoch):
        rates = set_learning_rate(run.optimizer, optim, run.step, run.total_steps)
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
        after_step(at, run, bad)
        session.record(epoch, losses, bad, rates[0])
        if session.save_or_stop():
            return True
    return False


def evaluate(epoch: int, run: Run, session: Session) -> None:
    """Measure the network in use after `epoch` (from 0), keep the best weights, show what it labels."""
    with session.log.paused():
        evaluate_in_use(epoch, run, session)
        report_usage(epoch, run, session.log)
        if run.cfg.run.panels and run.dist.is_main:
            show_panels(epoch, run, session.log)


def set_up(cfg: Config, dist: Dist) -> Run:
    """Data, networks, prototypes and optimizer of a run, before any checkpoint is read.

    Raises:
        UserError: `model.maxpool` is that of the released evaluation code.
    """
    if cfg.model.maxpool != "ceil":
        raise UserError(
            f"model.maxpool={cfg.model.maxpool}: only evaluation may pool so; train with model.maxpool=ceil"
        )
    configure(cfg.run)
    data = build_training_data(cfg, dist, plan_batch(cfg.optim, dist.world_size))
    nets = build_networks(cfg, data.spec.num_classes, dist)
    movement = None
    if cfg.prototypes is not None:
        movement = Movement(nets.student.require_prototypes(), cfg.prototypes)
    draws = Draws(cfg.run.seed, dist.rank, dist.device)
    optimizer = build_optimizer(cfg.optim, parameter_groups(nets.student, cfg.optim))
    return Run(cfg, dist, data, nets, draws, optimizer, grad_scaler(cfg.run.precision, dist), movement)


def train(cfg: Config, run_dir: Path, dist: Dist) -> None:
    """Train from wherever the run directory stands to the end, then measure the best and the last weights."""
    run = set_up(cfg, dist)
    with Session(run, PROJECT, run_dir) as session:
        session.start()
        apart = run.nets.student in run.nets.unsynchronized
        announce(session, deviations(cfg, dist.world_size), unsynchronized=apart)
        for name, choice in resolved_switches(cfg).items():
            session.log.info(f"switch {name}: {choice}")
        for epoch in session.epochs():
            place_prototypes(epoch, run, session.log)
            if train_epoch(epoch, run, session):
                return
            if session.evaluation_due(epoch):
                evaluate(epoch, run, session)
            session.end_epoch(epoch)
        finish(run, session)


def dry_run(cfg: Config, dist: Dist) -> None:
    """Build everything, run steps of the heaviest phase, print the forecast; leaves nothing behind.

    The prototypes are random numbers: none are read, and nothing is clustered.
    """
    run = set_up(cfg, dist)
    run.draws.coin = lambda: 0.0  # type: ignore[method-assign]  # always the strong augmentation
    heaviest = cfg.method.sup_only_epochs if cfg.method.mode == "semi" else 0
    if cfg.prototypes is not None and cfg.prototypes.start_epoch is not None:
        heaviest = min(max(heaviest, cfg.prototypes.start_epoch), cfg.optim.epochs - 1)
    run.step = heaviest * run.data.steps_per_epoch
    with Session(run, PROJECT, None) as session:
        forecast(session, [lambda: train_epoch(heaviest, run, session)] * 3)


def main(argv: Sequence[str]) -> int:
    """Read the command line, join the other processes, train."""
    description = "Train prototype consistency, or the supervised stage before it."
    cfg, run_dir = train_script.read(argv, Config, HERE, description, original.read_own)
    return train_script.start(cfg, run_dir, train, dry_run)


if __name__ == "__main__":
    run_main(main)
