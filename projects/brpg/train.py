"""Train BRPG, its mean teacher without prototypes, or its supervised-only baseline."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from common.config import load_config, plan_batch, save_config
from common.data.streams import Batches, TrainingData
from common.distributed import Dist, delayed_reduction, start, stop
from common.errors import run_main
from common.measure.pseudo_quality import log_pseudo_quality
from common.numerics.losses import Losses, mean_of
from common.numerics.optim import FiniteGuard, Group, build_optimizer, set_learning_rate
from common.run.backend import configure
from common.run.checkpoint import bring_best, require_resumable, resolve_start
from common.run.log import RunLog
from common.run.reporting import announce, print_forecast
from common.run.signals import StopRequest
from projects.brpg.augment import Draws, split_views
from projects.brpg.config import Config, require_classes
from projects.brpg.data import build_training_data
from projects.brpg.evaluate import evaluate_network, protocol
from projects.brpg.model import build_networks, load_backbone
from projects.brpg.reporting import deviations, finish, show_panels
from projects.brpg.state import PROJECT, State, load_networks, restore, save_best, save_last
from projects.brpg.step import (
    Batch,
    MethodState,
    Progress,
    after_step,
    before_step,
    clustering_due,
    make_prototypes,
    paste_classes,
    phase_of,
    supervised_step,
    train_step,
)

HERE = Path(__file__).resolve().parent


def losses_of(batches: Batches, at: Progress, cfg: Config, state: State, dist: Dist) -> Losses:
    """All loss terms of one forward, in whatever phase the training is."""
    labeled, *others = batches
    x_l, y_l = labeled.image, labeled.label
    if state.method is None:
        return supervised_step(x_l, y_l, at, cfg.method, state.nets, None)
    x_l, y_l = paste_classes(x_l, y_l, at, cfg.method, state.method, state.draws)
    if phase_of(at.epoch, cfg.method) == "supervised":
        return supervised_step(x_l, y_l, at, cfg.method, state.nets, state.method)
    batch = Batch(x_l, y_l, *split_views(others[0].image))
    return train_step(batch, at, cfg.method, cfg.quirks, state.nets, state.method, state.draws, dist)


def cluster_once(
    at: Progress, cfg: Config, data: TrainingData, state: State, log: RunLog, dist: Dist
) -> None:
    """At the first step of the prototype phase: make the prototypes and say how many each class has."""
    if state.method is None or not clustering_due(at, cfg.method, state.method):
        return
    with log.paused():
        numbers = make_prototypes(at, cfg.method, state.method, data.spec.classes, dist)
    listed = ", ".join(f"{name} {n}" for name, n in zip(data.spec.classes, numbers or (), strict=True))
    log.info(f"prototypes from epoch {at.epoch + 1} on: {listed}")


def train_epoch(
    epoch: int, cfg: Config, data: TrainingData, state: State, log: RunLog, guard: FiniteGuard,
    request: StopRequest, dist: Dist, total_steps: int,
) -> bool:  # fmt: skip
    """The rest of an epoch from `state.step` on; True if the run was asked to stop (and has been saved)."""
    length, nets, run = data.steps_per_epoch, state.nets, cfg.run
    for group in data.epoch(epoch, state.step % length, dist, run.channels_last):
        rates = set_learning_rate(state.optimizer, cfg.optim, state.step, total_steps)
        at = Progress(epoch, state.step - epoch * length, length, cfg.optim.epochs)
        nets.student.train()
        nets.share_statistics(dist)
        before_step(at, cfg.method, nets)
        cluster_once(at, cfg, data, state, log, dist)
        guard.protect(nets.student, nets.teacher)
        state.optimizer.zero_grad(set_to_none=True)
        results = []
        for i, batches in enumerate(group):
            with delayed_reduction(nets.wrapped, i + 1 < len(group)):
                result = losses_of(batches, at, cfg, state, dist)
                state.scaler.scale(result.total / len(group)).backward()
            results.append(result)
        total, terms = mean_of(results)
        state.step += 1
        bad = guard.watch(state.step, total, terms, data.names(group))
        if dist.device.type == "cpu":
            guard.check(state.seen)
        guard.step(state.scaler, state.optimizer)
        after_step(at, cfg.method, nets)
        log.step(state.step, terms | {"loss": total, "nonfinite": bad}, epoch=epoch, lr=rates[0],
                 expected=[k for k in terms if k.startswith("loss_")])  # fmt: skip
        if log.last_means.get("nonfinite"):
            guard.check(state.seen)
        every = cfg.eval.every_steps
        if every and at.iteration and at.iteration % every == 0 and log.run_dir is not None:
            guard.check(state.seen)
            with log.paused():
                evaluate_now(epoch, cfg, data, state, log, log.run_dir, dist)
        due = run.save_interval and state.step % run.save_interval == 0
        ending = request.agree(dist) or state.step == run.max_steps
        if (due or ending) and log.run_dir is not None:
            guard.check(state.seen)  # on a GPU a bad step may not have been noticed yet
            with log.paused():
                save_last(log.run_dir / "last.pt", cfg, data.spec, state, log, dist)
        if ending:
            if log.run_dir is not None:
                log.info(f"stopped after step {state.step}; start the same command again to go on")
            return True
    return False


def evaluate_now(
    epoch: int, cfg: Config, data: TrainingData, state: State, log: RunLog, run_dir: Path, dist: Dist
) -> None:
    """Measure the network in use in epoch `epoch` (from 0) and keep the best weights."""
    semi = cfg.method.mode == "semi"
    teaching = semi and epoch >= cfg.method.sup_only_epochs
    state.nets.share_statistics(dist)
    network = state.nets.require_teacher() if teaching else state.nets.student
    found = evaluate_network(cfg, network, data.spec, cfg.data.val, protocol(cfg, "training"), dist)
    state.last = found.miou
    log.scalars(state.step, {"epoch": epoch, "miou": found.miou, "miou_present": found.miou_present})
    # the burn-in student is no candidate: what the run yields, and the scripts use, is the teacher
    if found.miou > state.best and teaching == semi:
        state.best, state.best_epoch = found.miou, epoch + 1
        save_best(run_dir / "best.pt", cfg, data.spec, state, dist)
    who = "teacher" if teaching else "student"
    best = f" (best {100 * state.best:.2f})" if state.best >= 0 else ""
    log.info(f"epoch {epoch + 1}, step {state.step}: {who} mIoU {100 * found.miou:.2f}{best}")
    log_pseudo_quality(cfg, [network] * teaching, data, log, state.step, epoch, dist)


def end_epoch(
    epoch: int, cfg: Config, data: TrainingData, state: State, log: RunLog, run_dir: Path, dist: Dist
) -> None:
    """Evaluate after epoch `epoch` (from 0) if it is due, keep the best weights, save everything."""
    every, method = cfg.eval.every_epochs, cfg.method
    last = epoch + 1 == cfg.optim.epochs
    with log.paused():
        if last or (every and (epoch + 1) % every == 0):
            evaluate_now(epoch, cfg, data, state, log, run_dir, dist)
            if cfg.run.panels and dist.is_main:
                teaching = method.mode == "semi" and epoch >= method.sup_only_epochs
                network = state.nets.require_teacher() if teaching else state.nets.student
                show_panels(cfg, network, data, log, state.step, epoch, dist)
        state.evaluated = epoch + 1
        save_last(run_dir / "last.pt", cfg, data.spec, state, log, dist)


def set_up(cfg: Config, dist: Dist) -> tuple[TrainingData, State]:
    """Data, networks, memory and optimiser of a run, before any checkpoint is read."""
    configure(cfg.run)
    data = build_training_data(cfg, dist, plan_batch(cfg.optim, dist.world_size))
    classes = data.spec.num_classes
    require_classes(cfg.method, classes)
    nets = build_networks(cfg, classes, dist)
    method = None
    if cfg.method.mode == "semi":
        method = MethodState(cfg.method, classes, cfg.model.inner_planes).to(dist.device)
    heads = [part for part in (nets.student.auxor, nets.student.decoder) if part is not None]
    groups = [Group(nets.student.encoder.parameters())]
    groups += [Group(part.parameters(), cfg.optim.head_lr_factor) for part in heads]
    optimizer = build_optimizer(cfg.optim, groups)
    scaler = torch.amp.GradScaler(dist.device.type, enabled=cfg.run.precision == "fp16")
    return data, State(nets, method, Draws(cfg.run.seed, dist.rank, dist.device), optimizer, scaler)


def run(cfg: Config, run_dir: Path, dist: Dist) -> None:
    """Train from wherever the run directory stands to the end, then measure the best and the last weights."""
    data, state = set_up(cfg, dist)
    length = data.steps_per_epoch
    total_steps = length * cfg.optim.epochs
    images = cfg.optim.batch_size * len(data.loaders)
    with contextlib.closing(data), StopRequest() as request, RunLog(
        run_dir, dist, total_steps=total_steps, images_per_step=images, interval=cfg.run.log_interval
    ) as log:  # fmt: skip
        began = resolve_start(run_dir, cfg.run.resume, cfg.run.init)
        if began.continues and began.state is not None:
            require_resumable(began.state, PROJECT, cfg, str(began.path))
            restore(state, began.state, str(began.path), log, dist)
            bring_best(began.path, run_dir, dist)
        elif began.state is not None:
            load_networks(state.nets, began.state, str(began.path))
        else:
            load_backbone(cfg, state.nets, log)
        announce(cfg, data, log, run_dir, dist, total_steps, deviations(cfg, dist.world_size),
                 own_statistics=state.nets.student in state.nets.own_statistics)  # fmt: skip
        if dist.is_main:
            save_config(cfg, run_dir / "config.yaml")
        log.begin(state.step)
        guard = FiniteGuard(cfg.run.on_nonfinite, dist, cfg.run.log_interval)
        if state.step >= total_steps and state.evaluated == cfg.optim.epochs:
            log.info(f"{run_dir}: finished already ({state.step} steps); only evaluating")
        while state.step < total_steps or state.evaluated < cfg.optim.epochs:
            epoch = state.evaluated
            if state.step < (epoch + 1) * length and train_epoch(
                epoch, cfg, data, state, log, guard, request, dist, total_steps
            ):
                request.requeue(dist)
                return
            guard.check(state.seen)
            end_epoch(epoch, cfg, data, state, log, run_dir, dist)
        finish(cfg, data, state, log, guard, run_dir, dist)


def dry_run(cfg: Config, dist: Dist) -> None:
    """Build everything, run steps of the heaviest phases, print the forecast; leaves nothing behind.

    The queues of the collection stay allocated while the prototypes, here random ones, are used: together they
    need the most memory that any step can.
    """
    data, state = set_up(cfg, dist)
    state.draws.coin = lambda: 0.0  # type: ignore[method-assign]  # always the strong augmentation
    length = data.steps_per_epoch
    total_steps = length * cfg.optim.epochs
    log = RunLog(None, dist, total_steps=total_steps, images_per_step=1, interval=total_steps)
    guard = FiniteGuard("stop", dist, 1)

    def step_of(epoch: int) -> None:
        state.step = epoch * length
        limited = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, max_steps=state.step + 1))
        train_epoch(epoch, limited, data, state, log, guard, StopRequest(), dist, total_steps)

    method, memory = state.method, None if state.method is None else state.method.memory
    steps = [lambda: step_of(cfg.method.sup_only_epochs if method is not None else 0)] * 3
    if method is not None and memory is not None:

        def use_prototypes() -> None:
            method.memory = None
            method.prototypes.set(torch.randn_like(method.prototypes.centres).unbind())
            step_of(cfg.method.prototype_start)

        steps = [lambda: step_of(cfg.method.collect_start), use_prototypes, use_prototypes]
    print_forecast(cfg, data, dist, steps, total_steps)
    del memory  # so long it has been held


def main(argv: Sequence[str]) -> int:
    """Read the command line, join the other processes, train."""
    parser = argparse.ArgumentParser(
        prog="train.py", description="Train BRPG, its mean teacher alone, or its supervised-only baseline."
    )
    parser.add_argument("--config", required=True, help="YAML file, see the folder 'configs'")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="changes to the configuration"
    )
    args = parser.parse_args(argv)
    cfg = load_config(Config, args.config, args.overrides)
    default = HERE / "runs" / Path(args.config).stem / f"seed{cfg.run.seed}"
    run_dir = Path(cfg.run.dir or os.path.relpath(default))
    dist = start(cfg.run.device)
    try:
        if cfg.run.dry_run:
            dry_run(cfg, dist)
        else:
            run(cfg, run_dir, dist)
    finally:
        stop()
    return 0


if __name__ == "__main__":
    run_main(main)
