"""Train U2PL, or its supervised-only baseline."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from common.config import plan_batch
from common.data.spec import IGNORE
from common.data.streams import Batches
from common.distributed import Dist, delayed_reduction
from common.errors import run_main
from common.mean_teacher.evaluation import evaluate_in_use
from common.mean_teacher.run import parameter_groups
from common.models.deeplab import upsample
from common.numerics.ema import copy_buffers, copy_parameters, update_teacher, warmup_decay
from common.numerics.losses import Losses, best_class, mean_of
from common.numerics.optim import build_optimizer, linear_decay, set_learning_rate
from common.numerics.precision import grad_scaler
from common.run.progress import Progress
from common.run.rng import configure
from common.run.session import Session
from projects.u2pl.ael.step import adaptive_state, adaptive_step
from projects.u2pl.augment import Draws, strong_augment
from projects.u2pl.config import Config, method_name
from projects.u2pl.contrast import contrast_inputs
from projects.u2pl.data import build_training_data
from projects.u2pl.losses import pseudo_label_loss, split_by_entropy
from projects.u2pl.memory import Memory
from projects.u2pl.model import build_networks
from projects.u2pl.reporting import deviations, show_panels
from projects.u2pl.state import PROJECT, Run
from tools import train_script
from tools.mean_teacher_scripts import finish
from tools.training import announce, forecast

HERE = Path(__file__).resolve().parent


def supervised_step(batch: Batches, at: Progress, run: Run) -> Losses:
    """Loss of labeled images alone: the baseline, and the epochs before the teacher is used."""
    nets, x_l, y_l = run.nets, batch[0].image, batch[0].label
    out = nets.forward(x_l)
    size = y_l.shape[-2:]
    aux = None if out.aux is None else upsample(out.aux, size)
    sup = nets.criterion(upsample(out.logits, size), y_l, aux)
    total = sup
    if out.feats is not None:
        total = total + 0.0 * out.feats.sum()  # zero gradients, not none: weight decay reaches the head
    if nets.teacher is not None and nets.teacher_burn_in:
        # QUIRK quirks.own_teacher_statistics: only the teacher's BatchNorm statistics learn here
        nets.teach(x_l, train=True)
    return Losses(total, {"loss_sup": sup})


def train_step(batch: Batches, at: Progress, run: Run) -> Losses:
    """All loss terms of one forward on labeled and unlabeled images, still on the device.

    The entropy percentiles shrink with the epoch.
    """
    if at.epoch < run.sup_only_epochs:
        return supervised_step(batch, at, run)
    if run.cfg.method.ael is not None:
        return adaptive_step(batch, at, run)
    (x_l, y_l), x_u = batch[0][:2], batch[1].image
    nets, memory, draws, method = run.nets, run.require_memory(), run.draws, run.cfg.method
    size, n = y_l.shape[-2:], len(x_l)
    left = linear_decay(at.epoch, at.epochs)

    with torch.no_grad():
        pseudo = best_class(upsample(nets.teach(x_u, train=False).logits, size))
        mixed = draws.coin() < method.augment_probability and method.strong_augmentation != "none"
        if mixed:
            x_u, pseudo = strong_augment(x_u, pseudo, method.strong_augmentation, draws)
    x = torch.cat((x_l, x_u))
    out = nets.forward(x)  # before the teacher: the order of dropout draws is part of the trajectory
    # the parts are resized, not the whole cut: its gradient would be two maps of the full size
    logits_l, logits_u = (upsample(part, size) for part in out.logits.split([n, len(x_u)]))
    aux = None if out.aux is None else upsample(out.aux[:n], size)
    with torch.no_grad():
        seen = nets.teach(x, train=True)  # QUIRK train_mode_teacher: batch statistics and dropout
        keep = 100.0 - (100.0 - method.drop_percent) * left
        alpha = method.low_entropy_threshold * left
        split = split_by_entropy(upsample(seen.logits[n:], size), pseudo, keep, alpha)

    sup = nets.criterion(logits_l, y_l, aux)
    unsup = method.unsup_weight * pseudo_label_loss(logits_u, split.pseudo)
    terms = {"loss_sup": sup, "loss_unsup": unsup}
    total = sup + unsup
    if method.contra_weight > 0:
        assert out.feats is not None, "the representation head is part of the method"
        assert seen.feats is not None
        inputs = contrast_inputs(out.feats, seen.feats, seen.logits, y_l, pseudo, split, run.cfg)
        negatives = memory.collect(inputs, len(x_u), run.dist).sum()
        result = memory.contrast(inputs, draws, at.since(run.sup_only_epochs))
        contra = method.contra_weight * result.loss
        # QUIRK quirks.contra_reduce: summed over ranks and divided by their number, with the own share's gradient only
        share = run.dist.world_size if run.cfg.quirks.contra_reduce == "sum_forward_only" else 1
        total = total + contra / share
        terms |= {"loss_contra": contra, "negatives": negatives, "anchor_classes": result.valid.sum()}
    elif out.feats is not None:
        total = total + 0.0 * out.feats.sum()
    terms["kept"] = (split.pseudo != IGNORE).mean(dtype=torch.float32)
    return Losses(total, terms)


def before_step(at: Progress, run: Run) -> None:
    """Bring the teacher into use: as the student (QUIRK quirks.shared_first_epoch: all through its first epoch)."""
    nets, update = run.nets, at.since(run.sup_only_epochs)
    if nets.teacher is None or update < 0:
        return
    shared = run.cfg.quirks.shared_first_epoch and at.epoch == run.sup_only_epochs
    if shared or (update == 0 and not run.cfg.method.average_from_start):
        copy_parameters(nets.teacher, nets.student)
    if update == 0 and not nets.teacher_burn_in:
        copy_buffers(nets.teacher, nets.student)


def after_step(at: Progress, run: Run) -> None:
    """Move the teacher after the optimizer step."""
    nets, method = run.nets, run.cfg.method
    update = at.step if method.average_from_start else at.since(run.sup_only_epochs)
    if nets.teacher is None or update < 0:
        return
    if at.epoch == run.sup_only_epochs and run.cfg.quirks.shared_first_epoch:
        copy_parameters(nets.teacher, nets.student)
    update_teacher(nets.teacher, nets.student, warmup_decay(update, method.ema_decay))


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
        after_step(at, run)
        session.record(epoch, losses, bad, rates[0])
        if session.save_or_stop():
            return True
    return False


def evaluate(epoch: int, run: Run, session: Session) -> None:
    """Measure the network in use after `epoch` (from 0), keep the best weights, show what it labels."""
    with session.log.paused():
        evaluate_in_use(epoch, run, session, f"epoch {epoch + 1}")
        if run.cfg.run.panels and run.dist.is_main:
            show_panels(epoch, run, session.log)


def set_up(cfg: Config, dist: Dist) -> Run:
    """Data, networks, memory and optimizer of a run, before any checkpoint is read."""
    configure(cfg.run)
    data = build_training_data(cfg, dist, plan_batch(cfg.optim, dist.world_size))
    classes = data.spec.num_classes
    nets = build_networks(cfg, classes, dist)
    memory = None
    if cfg.method.mode == "semi":
        memory = Memory(cfg, classes, cfg.model.inner_planes).to(dist.device)
    draws = Draws(cfg.run.seed, dist.rank, dist.device)
    if cfg.method.ael is not None:
        memory, draws = adaptive_state(cfg, data, dist)
    optimizer = build_optimizer(cfg.optim, parameter_groups(nets.student, cfg.optim))
    return Run(cfg, dist, data, nets, draws, optimizer, grad_scaler(cfg.run.precision, dist), memory)


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
        finish(run, session, method_name(cfg))


def dry_run(cfg: Config, dist: Dist) -> None:
    """Build everything, run steps of the heaviest phase, print the forecast; leaves nothing behind."""
    run = set_up(cfg, dist)
    run.draws.coin = lambda: 0.0  # type: ignore[method-assign]  # always the strong augmentation
    heaviest = cfg.method.sup_only_epochs if cfg.method.mode == "semi" else 0
    if cfg.method.ael is not None:  # the contrast begins later
        heaviest = min(max(heaviest, cfg.method.ael.start_epoch), cfg.optim.epochs - 1)
    run.step = heaviest * run.data.steps_per_epoch
    with Session(run, PROJECT, None) as session:
        forecast(session, [lambda: train_epoch(heaviest, run, session)] * 3)


def main(argv: Sequence[str]) -> int:
    """Read the command line, join the other processes, train."""
    cfg, run_dir = train_script.read(argv, Config, HERE, "Train U2PL or its supervised-only baseline.")
    return train_script.start(cfg, run_dir, train, dry_run)


if __name__ == "__main__":
    run_main(main)
