"""Train s4GAN, its supervised-only twin, or s4GAN with the image-level branch MLMT."""

from __future__ import annotations

import dataclasses
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
from common.measure.pseudo_quality import log_pseudo_quality
from common.models.placing import share_statistics
from common.numerics.losses import Losses, mean_of
from common.numerics.optim import set_learning_rate
from common.numerics.precision import grad_scaler
from common.run.progress import Progress
from common.run.rng import configure
from common.run.session import Session
from projects.s4gan_mlmt.config import Config
from projects.s4gan_mlmt.data import build_training_data
from projects.s4gan_mlmt.evaluation import Measured, evaluate_network, protocol
from projects.s4gan_mlmt.losses import (
    Maps,
    above_threshold,
    discriminator_loss,
    fake_maps,
    feature_matching,
    real_maps,
    segmentation_loss,
    self_training,
)
from projects.s4gan_mlmt.mlmt.state import BRANCH
from projects.s4gan_mlmt.mlmt.train import train as train_branch
from projects.s4gan_mlmt.model import build_networks, frozen
from projects.s4gan_mlmt.optimizer import build_optimizers
from projects.s4gan_mlmt.reporting import deviations, finish, show_panels
from projects.s4gan_mlmt.state import FREE, PROJECT, Run, keep_weights, require_after_steps
from tools import train_script
from tools.training import announce, forecast

HERE = Path(__file__).resolve().parent
OWN_DRAWS = 1_000_003  # between the seeds of two processes' dropout


def supervised_step(batch: Batches, at: Progress, run: Run) -> Losses:
    """Loss of labeled images alone: the baseline.

    Source: `train_full.py`.
    """
    (logits,) = run.nets.segment(batch[0].image)
    sup = segmentation_loss(logits, batch[0].label, dist=run.dist)
    return Losses(sup, {"loss_sup": sup})


def train_step(batch: Batches, at: Progress, run: Run) -> tuple[Losses, Maps | None]:
    """All loss terms of the segmentation network on one forward, and what the discriminator then learns from.

    The unlabeled images go through the network once, for both steps. The discriminator's parameters are frozen.

    Source: eq. (5) of the paper; `train_s4GAN.py`, steps 2 to 12 of its loop.
    """
    nets, dist, method, quirks = run.nets, run.dist, run.cfg.method, run.cfg.quirks
    if nets.critic is None:
        return supervised_step(batch, at, run), None
    (x_l, y_l), x_u, (x_real, y_real) = batch[0][:2], batch[1].image, batch[2][:2]
    logits_l, logits_u = nets.segment(x_l, x_u)

    fake = fake_maps(logits_u, x_u, dist)
    (of_fake,) = nets.critic(fake)
    # QUIRK quirks.gate_dropout: these scores came under dropout, so the same image can pass or fail by chance
    scores = of_fake.scores if quirks.gate_dropout else nets.critic.scores_without_dropout(fake)
    accepted = above_threshold(scores, method.st_threshold)
    with torch.no_grad():
        divisor = x_l if quirks.real_range == "labeled" else None
        real = real_maps(y_real, x_real, logits_u.shape[1], divisor, dist)
        (of_real,) = nets.critic(real)

    sup = segmentation_loss(logits_l, y_l, dist=dist)
    matching = method.fm_weight * feature_matching(of_real.feats, of_fake.feats, dist)
    total, taught = sup + matching, torch.zeros_like(sup)
    if at.step >= method.st_start:
        taught = method.st_weight * self_training(logits_u, accepted, dist)
        total = total + taught
    terms = {"loss_sup": sup, "loss_fm": matching, "loss_st": taught, "kept": accepted.float().mean()}
    return Losses(total, terms), Maps(fake.detach(), real)


def discriminator_step(maps: Maps, at: Progress, run: Run) -> Losses:
    """Loss of the discriminator on predictions of the network that has not stepped yet, with fresh dropout.

    Source: eq. (2) of the paper; `train_s4GAN.py`, step 14 of its loop.
    """
    assert run.nets.judge is not None, "a supervised-only run has no discriminator"
    fake, real = run.nets.judge(*maps)
    loss = discriminator_loss(fake.scores, real.scores, run.dist).total
    return Losses(loss, {"loss_d": loss})


def train_epoch(epoch: int, run: Run, session: Session) -> bool:
    """The rest of a round; True if the run was asked to stop (and has been saved)."""
    nets, optimizers = run.nets, run.optimizers.values()
    for at, group in session.steps(epoch):
        rates = [set_learning_rate(one, run.cfg.optim, run.step, run.total_steps) for one in optimizers]
        for network in nets.bare.values():
            network.train()
        share_statistics(nets.unsynchronized, run.dist)
        session.guard.protect(*nets.bare.values())
        for one in optimizers:
            one.zero_grad(set_to_none=True)
        results = []
        for i, batch in enumerate(group):
            place, more = at._replace(forward=i), i + 1 < len(group)
            with frozen(nets.critic), delayed_reduction(nets.segment, more):
                losses, maps = train_step(batch, place, run)
                run.scaler.scale(losses.total / len(group)).backward()
            if maps is not None:  # the discriminator learns from what the network said before its step
                with delayed_reduction(nets.judge, more):
                    judged = discriminator_step(maps, place, run)
                    run.scaler.scale(judged.total / len(group)).backward()
                losses = Losses(losses.total.detach() + judged.total.detach(), losses.terms | judged.terms)
            results.append(losses)
        losses = mean_of(results)
        bad = session.watch(at, losses, group)
        session.guard.step(run.scaler, *optimizers)
        session.record(epoch, losses, bad, rates[0][0])
        keep_weights(run, session)
        if session.save_or_stop():
            return True
    return False


def evaluate(epoch: int, run: Run, session: Session) -> None:
    """Measure the segmentation network after round `epoch` (from 0), keep the best weights, show what it labels."""
    cfg, data, log, nets = run.cfg, run.data, session.log, run.nets
    share_statistics(nets.unsynchronized, run.dist)
    with log.paused():
        how = protocol(cfg, "training")
        found = evaluate_network(cfg, nets.segmenter, data.spec, cfg.data.val, how, run.dist)
        best = session.note(epoch, found)
        log.info(f"step {run.step}: mIoU {100 * found.miou:.2f}{best}")
        network = Measured(nets.segmenter, cfg.data.pipeline)
        log_pseudo_quality(cfg, [network], data, log, run.step, epoch, run.dist)
        if cfg.run.panels and run.dist.is_main:
            show_panels(run, log)


def set_up(cfg: Config, dist: Dist) -> Run:
    """Data, networks and optimizers of a run, before any checkpoint is read."""
    configure(cfg.run)
    data = build_training_data(cfg, dist, plan_batch(cfg.optim, dist.world_size))
    nets = build_networks(cfg, data.spec.num_classes, dist)
    torch.manual_seed(cfg.run.seed + OWN_DRAWS * dist.rank)  # what dropout draws is each process's own
    return Run(cfg, dist, data, nets, build_optimizers(cfg, nets.bare), grad_scaler(cfg.run.precision, dist))


def train(cfg: Config, run_dir: Path, dist: Dist) -> None:
    """Train from wherever the run directory stands to the end, then measure the last weights and those that count."""
    run = set_up(cfg, dist)
    with Session(run, PROJECT, run_dir, may_change=FREE) as session:
        session.start()
        require_after_steps(run, run_dir)
        announce(session, deviations(cfg, dist), unsynchronized=bool(run.nets.unsynchronized))
        run.data.save_split(run_dir, dist)
        for epoch in session.epochs():
            if train_epoch(epoch, run, session):
                return
            if cfg.eval.every_epochs and session.evaluation_due(epoch):
                evaluate(epoch, run, session)
            session.end_epoch(epoch)
        scores = None
        if cfg.method.name == "s4gan_mlmt":
            with session.log.paused():
                scores = train_branch(branch_config(cfg), run_dir / BRANCH, dist, session.request)
            if scores is None:
                return
        finish(run, session, scores)


def branch_config(cfg: Config) -> Config:
    """The configuration of the image-level branch, whose steps come after those of the segmentation branch."""
    limit = cfg.run.max_steps
    if limit is None:
        return cfg
    run = dataclasses.replace(cfg.run, max_steps=max(limit - cfg.optim.steps, 1))
    return dataclasses.replace(cfg, run=run)


def dry_run(cfg: Config, dist: Dist) -> None:
    """Build everything, run steps of the segmentation branch, print the forecast; leaves nothing behind."""
    run = set_up(cfg, dist)
    with Session(run, PROJECT, None) as session:
        forecast(session, [lambda: train_epoch(0, run, session)] * 3)


def main(argv: Sequence[str]) -> int:
    """Read the command line, join the other processes, train."""
    words = "Train s4GAN, its supervised-only twin, or s4GAN with MLMT."
    cfg, run_dir = train_script.read(argv, Config, HERE, words)
    return train_script.start(cfg, run_dir, train, dry_run)


if __name__ == "__main__":
    run_main(main)
