"""Train BRPG, its mean teacher without prototypes, or its supervised-only baseline."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from common.config import plan_batch
from common.data.streams import Batches
from common.distributed import Dist, delayed_reduction
from common.errors import run_main
from common.mean_teacher.evaluation import evaluate_in_use
from common.mean_teacher.run import parameter_groups
from common.models.deeplab import upsample
from common.numerics.ema import copy_buffers, copy_parameters, update_teacher, warmup_decay
from common.numerics.losses import Losses, mean_of
from common.numerics.optim import build_optimizer, set_learning_rate
from common.numerics.precision import grad_scaler
from common.run.progress import Progress
from common.run.rng import configure
from common.run.session import Session
from projects.brpg.augment import Draws
from projects.brpg.config import Config, method_name, require_classes
from projects.brpg.data import build_training_data
from projects.brpg.model import build_networks
from projects.brpg.reporting import deviations, show_panels
from projects.brpg.state import PROJECT, MethodState, Run
from projects.brpg.step import (
    clustering_due,
    collect_step,
    contrast_step,
    follow_confidence,
    make_prototypes,
    paste_classes,
    phase_of,
    prototype_step,
    semi_step,
)
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
    logits = upsample(out.logits, size)
    sup = nets.criterion(logits, y_l, aux)
    total = sup
    if out.feats is not None:
        total = total + 0.0 * out.feats.sum()  # zero gradients, not none: weight decay reaches the head
    if nets.teacher is not None and nets.teacher_burn_in:
        # QUIRK quirks.own_teacher_statistics: only the teacher's BatchNorm statistics learn here
        nets.teach(x_l, train=True)
    follow_confidence(logits.detach(), y_l, at, run)
    return Losses(total, {"loss_sup": sup})


def train_step(batch: Batches, at: Progress, run: Run) -> Losses:
    """All loss terms of one forward on labeled and unlabeled images, still on the device.

    What is added to the mean teacher depends on the phase.
    """
    batch = paste_classes(batch, at, run)
    if at.epoch < run.sup_only_epochs:
        return supervised_step(batch, at, run)
    (total, terms), seen = semi_step(batch, at, run)
    phase = phase_of(at.epoch, run.cfg.method)
    if phase == "collect":
        terms |= collect_step(seen, run)
    if phase == "prototypes":
        parts = [prototype_step(seen, at, run)]
        if run.cfg.method.contra_weight > 0:
            parts.append(contrast_step(seen, at, run))
        for part in parts:
            total = total + part.total
            terms |= part.terms
    elif seen.student.feats is not None:
        total = total + 0.0 * seen.student.feats.sum()
    return Losses(total, terms)


def before_step(at: Progress, run: Run) -> None:
    """Bring the teacher into use, once: as a copy of the student, or as its average so far."""
    nets = run.nets
    if nets.teacher is None or at.since(run.sup_only_epochs) != 0:
        return
    if not run.cfg.method.average_from_start:
        copy_parameters(nets.teacher, nets.student)
    if not nets.teacher_burn_in:
        copy_buffers(nets.teacher, nets.student)


def cluster_once(at: Progress, run: Run, session: Session) -> None:
    """At the first step of the prototype phase: make the prototypes and say how many each class has."""
    if not clustering_due(at, run):
        return
    with session.log.paused():
        numbers = make_prototypes(at, run)
    listed = ", ".join(f"{name} {n}" for name, n in zip(run.data.spec.classes, numbers or (), strict=True))
    session.log.info(f"prototypes from epoch {at.epoch + 1} on: {listed}")


def after_step(at: Progress, run: Run) -> None:
    """Move the teacher after the optimizer step."""
    nets, method = run.nets, run.cfg.method
    update = at.step if method.average_from_start else at.since(run.sup_only_epochs)
    if nets.teacher is not None and update >= 0:
        update_teacher(nets.teacher, nets.student, warmup_decay(update, method.ema_decay))


def train_epoch(epoch: int, run: Run, session: Session) -> bool:
    """The rest of an epoch; True if the run was asked to stop (and has been saved)."""
    nets, optim, every = run.nets, run.cfg.optim, run.cfg.eval.every_steps
    for at, group in session.steps(epoch):
        rates = set_learning_rate(run.optimizer, optim, run.step, run.total_steps)
        nets.student.train()
        nets.share_statistics(run.dist)
        before_step(at, run)
        cluster_once(at, run, session)
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
        if every and at.step and at.step % every == 0 and session.run_dir is not None:
            session.guard.check()
            with session.log.paused():
                evaluate_in_use(epoch, run, session, f"epoch {epoch + 1}, step {run.step}")
        if session.save_or_stop():
            return True
    return False


def evaluate(epoch: int, run: Run, session: Session) -> None:
    """Measure the network in use after `epoch` (from 0), keep the best weights, show what it labels."""
    with session.log.paused():
        evaluate_in_use(epoch, run, session, f"epoch {epoch + 1}, step {run.step}")
        if run.cfg.run.panels and run.dist.is_main:
            show_panels(epoch, run, session.log)


def set_up(cfg: Config, dist: Dist) -> Run:
    """Data, networks, memory and optimizer of a run, before any checkpoint is read."""
    configure(cfg.run)
    data = build_training_data(cfg, dist, plan_batch(cfg.optim, dist.world_size))
    classes = data.spec.num_classes
    require_classes(cfg.method, classes)
    nets = build_networks(cfg, classes, dist)
    state = None
    if cfg.method.mode == "semi":
        state = MethodState(cfg.method, classes, cfg.model.inner_planes).to(dist.device)
    draws = Draws(cfg.run.seed, dist.rank, dist.device)
    optimizer = build_optimizer(cfg.optim, parameter_groups(nets.student, cfg.optim))
    return Run(cfg, dist, data, nets, draws, optimizer, grad_scaler(cfg.run.precision, dist), state)


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
    """Build everything, run steps of the heaviest phases, print the forecast; leaves nothing behind.

    The queues of the collection stay allocated while the prototypes, here random ones, are used: together they
    need the most memory that any step can.
    """
    run = set_up(cfg, dist)
    run.draws.coin = lambda: 0.0  # type: ignore[method-assign]  # always the strong augmentation
    state, queues = run.state, None if run.state is None else run.state.memory
    with Session(run, PROJECT, None) as session:

        def step_of(epoch: int) -> None:
            run.step = epoch * run.data.steps_per_epoch
            train_epoch(epoch, run, session)

        steps = [lambda: step_of(cfg.method.sup_only_epochs if state is not None else 0)] * 3
        if state is not None and queues is not None:

            def use_prototypes() -> None:
                state.memory = None
                state.prototypes.set(torch.randn_like(state.prototypes.centres).unbind())
                step_of(cfg.method.prototype_start)

            steps = [lambda: step_of(cfg.method.collect_start), use_prototypes, use_prototypes]
        forecast(session, steps)
    del queues  # so long they have been held


def main(argv: Sequence[str]) -> int:
    """Read the command line, join the other processes, train."""
    cfg, run_dir = train_script.read(
        argv, Config, HERE, "Train BRPG, its mean teacher alone, or its supervised-only baseline."
    )
    return train_script.start(cfg, run_dir, train, dry_run)


if __name__ == "__main__":
    run_main(main)
