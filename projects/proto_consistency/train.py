"""Train prototype consistency, the mean teacher below it, or the supervised stage before it."""

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
from common.data.streams import TrainingData
from common.distributed import Dist, delayed_reduction, start, stop
from common.errors import UserError, run_main
from common.measure.pseudo_quality import log_pseudo_quality
from common.numerics.losses import mean_of
from common.numerics.optim import FiniteGuard, Group, build_optimizer, set_learning_rate
from common.run.backend import configure
from common.run.checkpoint import bring_best, require_resumable, resolve_start
from common.run.log import RunLog
from common.run.reporting import announce, print_forecast
from common.run.signals import StopRequest
from projects.proto_consistency import original
from projects.proto_consistency.augment import Draws
from projects.proto_consistency.config import Config
from projects.proto_consistency.data import build_training_data
from projects.proto_consistency.evaluate import evaluate_network, further_roles, main_head, protocol
from projects.proto_consistency.model import build_networks, load_backbone
from projects.proto_consistency.placing import place_prototypes
from projects.proto_consistency.reporting import (
    deviations,
    finish,
    report_usage,
    resolved_switches,
    show_panels,
)
from projects.proto_consistency.state import PROJECT, State, load_networks, restore, save_best, save_last
from projects.proto_consistency.step import after_step, before_step, supervised_step, train_step

HERE = Path(__file__).resolve().parent


def train_epoch(
    epoch: int, cfg: Config, data: TrainingData, state: State, log: RunLog, guard: FiniteGuard,
    request: StopRequest, dist: Dist, total_steps: int,
) -> bool:  # fmt: skip
    """The rest of an epoch from `state.step` on; True if the run was asked to stop (and has been saved)."""
    length, nets, run = data.steps_per_epoch, state.nets, cfg.run
    first = cfg.method.sup_only_epochs if cfg.method.mode == "semi" else cfg.optim.epochs
    for group in data.epoch(epoch, state.step % length, dist, run.channels_last):
        rates = set_learning_rate(state.optimizer, cfg.optim, state.step, total_steps)
        update = state.step - first * length
        nets.student.train()
        nets.share_statistics(dist)
        before_step(epoch, update, cfg, nets)
        guard.protect(nets.student, nets.teacher)
        state.optimizer.zero_grad(set_to_none=True)
        results = []
        for i, (batch_l, *others) in enumerate(group):
            with delayed_reduction(nets.wrapped, i + 1 < len(group)):
                if epoch < first or not others:
                    result = supervised_step(batch_l.image, batch_l.label, epoch, cfg, nets, state.draws)
                else:
                    result = train_step(
                        batch_l.image, batch_l.label, others[0].image, epoch, update, cfg, nets, state.draws, dist
                    )  # fmt: skip
                state.scaler.scale(result.total / len(group)).backward()
            results.append(result)
        total, terms = mean_of(results)
        state.step += 1
        bad = guard.watch(state.step, total, terms, data.names(group))
        if dist.device.type == "cpu":
            guard.check(state.seen)
        guard.step(state.scaler, state.optimizer)
        after_step(epoch, state.step - 1 if cfg.method.average_from_start else update, cfg, nets, dist, bad)
        log.step(state.step, terms | {"loss": total, "nonfinite": bad}, epoch=epoch, lr=rates[0],
                 expected=[k for k in terms if k.startswith("loss_")])  # fmt: skip
        if log.last_means.get("nonfinite"):
            guard.check(state.seen)
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


def end_epoch(
    epoch: int, cfg: Config, data: TrainingData, state: State, log: RunLog, run_dir: Path, dist: Dist
) -> None:
    """Evaluate after epoch `epoch` (from 0) if it is due, keep the best weights, save everything."""
    every, semi = cfg.eval.every_epochs, cfg.method.mode == "semi"
    last = epoch + 1 == cfg.optim.epochs
    with log.paused():
        if last or (every and (epoch + 1) % every == 0):
            state.nets.share_statistics(dist)
            teaching = semi and epoch >= cfg.method.sup_only_epochs
            network = state.nets.require_teacher() if teaching else state.nets.student
            how, val = protocol(cfg, "training"), cfg.data.val
            # prototypes that are still random would say nothing
            head = main_head(cfg) if state.placed else "linear"
            found = evaluate_network(cfg, network, data.spec, val, how, dist, head)
            state.last = found.miou
            figures = {"epoch": epoch, "miou": found.miou, "miou_present": found.miou_present}
            besides = ""
            if further_roles(cfg) and state.placed:
                other = evaluate_network(cfg, network, data.spec, val, how, dist, "proto")
                figures["miou_proto"] = other.miou
                besides = f", prototype head {100 * other.miou:.2f}"
            log.scalars(state.step, figures)
            # the student of the first epochs is no candidate: what the run yields, and the scripts use, is the teacher
            if found.miou > state.best and teaching == semi:
                state.best, state.best_epoch = found.miou, epoch + 1
                save_best(run_dir / "best.pt", cfg, data.spec, state, dist)
            who = "teacher" if teaching else "student"
            best = f" (best {100 * state.best:.2f})" if state.best >= 0 else ""
            log.info(f"epoch {epoch + 1}: {who} mIoU {100 * found.miou:.2f}{best}{besides}")
            log_pseudo_quality(cfg, [network] * teaching, data, log, state.step, epoch, dist)
            report_usage(state, data.spec.classes, log, epoch, dist)
            if cfg.run.panels and dist.is_main:
                show_panels(cfg, network, data, log, state.step, epoch, dist)
        state.evaluated = epoch + 1
        save_last(run_dir / "last.pt", cfg, data.spec, state, log, dist)


def set_up(cfg: Config, dist: Dist) -> tuple[TrainingData, State]:
    """Data, networks and optimiser of a run, before any checkpoint is read.

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
    heads = [part for part in (nets.student.auxor, nets.student.decoder) if part is not None]
    groups = [Group(nets.student.encoder.parameters())]
    groups += [Group(part.parameters(), cfg.optim.head_lr_factor) for part in heads]
    optimizer = build_optimizer(cfg.optim, groups)
    scaler = torch.amp.GradScaler(dist.device.type, enabled=cfg.run.precision == "fp16")
    return data, State(nets, Draws(cfg.run.seed, dist.rank, dist.device), optimizer, scaler)


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
        place_prototypes(0, cfg, data, state, log, dist)
        announce(cfg, data, log, run_dir, dist, total_steps, deviations(cfg, dist.world_size),
                 own_statistics=bool(state.nets.own_statistics))  # fmt: skip
        for line in resolved_switches(cfg):
            log.info(f"switch {line}")
        if dist.is_main:
            save_config(cfg, run_dir / "config.yaml")
        log.begin(state.step)
        guard = FiniteGuard(cfg.run.on_nonfinite, dist, cfg.run.log_interval)
        if state.step >= total_steps and state.evaluated == cfg.optim.epochs:
            log.info(f"{run_dir}: finished already ({state.step} steps); only evaluating")
        while state.step < total_steps or state.evaluated < cfg.optim.epochs:
            epoch = state.evaluated
            place_prototypes(epoch, cfg, data, state, log, dist)
            if state.step < (epoch + 1) * length and train_epoch(
                epoch, cfg, data, state, log, guard, request, dist, total_steps
            ):
                request.requeue(dist)
                return
            guard.check(state.seen)
            end_epoch(epoch, cfg, data, state, log, run_dir, dist)
        finish(cfg, data, state, log, guard, run_dir, dist)


def dry_run(cfg: Config, dist: Dist) -> None:
    """Build everything, run steps of the heaviest phase, print the forecast; leaves nothing behind.

    The prototypes are random numbers: none are read, and nothing is clustered.
    """
    data, state = set_up(cfg, dist)
    state.draws.coin = lambda: 0.0  # type: ignore[method-assign]  # always the strong augmentation
    total_steps = data.steps_per_epoch * cfg.optim.epochs
    heaviest = cfg.method.sup_only_epochs if cfg.method.mode == "semi" else 0
    if cfg.prototypes is not None and cfg.prototypes.start_epoch is not None:
        heaviest = min(max(heaviest, cfg.prototypes.start_epoch), cfg.optim.epochs - 1)
    log = RunLog(None, dist, total_steps=total_steps, images_per_step=1, interval=total_steps)
    guard = FiniteGuard("stop", dist, 1)
    state.step = heaviest * data.steps_per_epoch

    def step() -> None:
        limited = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, max_steps=state.step + 1))
        train_epoch(heaviest, limited, data, state, log, guard, StopRequest(), dist, total_steps)

    print_forecast(cfg, data, dist, [step] * 3, total_steps)


def main(argv: Sequence[str]) -> int:
    """Read the command line, join the other processes, train."""
    parser = argparse.ArgumentParser(
        prog="train.py", description="Train prototype consistency, or the supervised stage before it."
    )
    parser.add_argument("--config", required=True, help="YAML file, see the folder 'configs'")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="changes to the configuration"
    )
    args = parser.parse_args(argv)
    cfg = load_config(Config, args.config, args.overrides, original.read_own)
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
