"""Train CPS, CPS + CutMix, their supervised-only twin, or one of the baselines shipped with them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from common.config import plan_batch, save_config
from common.data.streams import Batches, TrainingData
from common.distributed import Dist, broadcast_buffers, delayed_reduction, start, stop
from common.errors import run_main
from common.measure.pseudo_quality import log_pseudo_quality
from common.numerics.losses import Losses, mean_of
from common.numerics.optim import FiniteGuard, set_learning_rate
from common.numerics.precision import synchronised
from common.run.backend import configure
from common.run.checkpoint import MAY_CHANGE, bring_best, require_resumable, resolve_start
from common.run.log import RunLog
from common.run.reporting import announce, print_forecast
from common.run.signals import StopRequest
from projects.cps.arithmetic import warmup_poly
from projects.cps.config import Config, loss_divisor
from projects.cps.data import build_training_data
from projects.cps.evaluate import evaluate_modules, labeling_networks, protocol, require_network
from projects.cps.flags import train_config, train_parser
from projects.cps.methods import Method, Progress, build_method
from projects.cps.model import load_backbone
from projects.cps.reporting import deviations, finish, panels
from projects.cps.state import PROJECT, State, keep_weights, load_modules, restore, save_last, save_weights

HERE = Path(__file__).resolve().parent


def train_step(
    group: Sequence[Batches], progress: Progress, cfg: Config, state: State, guard: FiniteGuard, names: object
) -> Losses:
    """All phases of one optimiser step on a group of batches; the loss and its terms, still on the device.

    QUIRK Q1: the authors sum the loss over processes, divide it by their number and let the gradients be averaged
    once more, so the loss is divided by the number of their processes here.
    """
    share = len(group) * loss_divisor(cfg)
    totals: list[Tensor] = []
    found: dict[str, Tensor] = {}
    for phase in state.method.phases:
        optimizers = phase.optimizers.values()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        results = []
        for i, batches in enumerate(group):
            with delayed_reduction(phase.module, i + 1 < len(group)):
                result = phase.losses(batches, progress._replace(forward=i))
                state.scaler.scale(result.total / share).backward()
            results.append(result)
        total, terms = mean_of(results)
        bad = guard.watch(progress.step + 1, total, terms, names)
        if guard.dist.device.type == "cpu":
            guard.check(state.seen)
        guard.step(state.scaler, *optimizers)
        totals.append(total)
        found |= terms | {"nonfinite": torch.maximum(bad, found.get("nonfinite", bad))}
    return Losses(torch.stack(totals).sum(), found)


def set_rates(cfg: Config, method: Method, step: int, steps_per_epoch: int) -> float:
    """Give every scheduled optimiser its rate of this step (from 0); the first network's is returned."""
    step = max(step - 1, 0) if method.late_rate else step
    warmup, total = cfg.optim.warmup_epochs * steps_per_epoch, cfg.optim.epochs * steps_per_epoch
    scheduled = [one for phase in method.phases if phase.scheduled for one in phase.optimizers.values()]
    for optimizer in scheduled:
        set_learning_rate(optimizer, cfg.optim, step, total)
        for group in optimizer.param_groups if step < warmup else ():
            group["lr"] = warmup_poly(group["initial_lr"], step, total, cfg.optim.power, warmup)
    return float(scheduled[0].param_groups[0]["lr"])


def own_statistics(cfg: Config, dist: Dist) -> bool:
    """Whether each of several processes computes BatchNorm on its own batch."""
    return dist.world_size > 1 and not synchronised(cfg.model.sync_bn, dist)


def share_statistics(cfg: Config, method: Method, dist: Dist) -> None:
    """Give all processes the first one's running statistics; they begin every step and evaluation with those."""
    if own_statistics(cfg, dist):
        for module in method.modules.values():
            broadcast_buffers(module, dist)


def train_epoch(
    epoch: int, cfg: Config, data: TrainingData, state: State, log: RunLog, guard: FiniteGuard,
    request: StopRequest, dist: Dist,
) -> bool:  # fmt: skip
    """The rest of an epoch from `state.step` on; True if the run was asked to stop (and has been saved)."""
    length, run, modules = data.steps_per_epoch, cfg.run, state.method.modules
    for module in modules.values():
        module.train()
    for group in data.epoch(epoch, state.step % length, dist, run.channels_last):
        rate = set_rates(cfg, state.method, state.step, length)
        share_statistics(cfg, state.method, dist)
        guard.protect(*modules.values())
        progress = Progress(state.step, length, cfg.optim.epochs)
        total, terms = train_step(group, progress, cfg, state, guard, data.names(group))
        state.step += 1
        log.step(state.step, terms | {"loss": total}, epoch=epoch, lr=rate,
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
    """Keep the weights after epoch `epoch` (from 0) and evaluate them where that is due, then save everything."""
    every, modules = cfg.eval.every_epochs, state.method.modules
    share_statistics(cfg, state.method, dist)
    with log.paused():
        keep_weights(run_dir, cfg.keep, epoch + 1, cfg, data.spec, state, dist)
        if every and ((epoch + 1) % every == 0 or epoch + 1 == cfg.optim.epochs):
            how = protocol(cfg, "training")
            found = evaluate_modules(cfg, modules, data.spec, cfg.data.val, how, dist)
            state.last = found.miou
            log.scalars(state.step, {"epoch": epoch, "miou": found.miou, "miou_present": found.miou_present})
            if found.miou > state.best:
                state.best, state.best_epoch = found.miou, epoch + 1
                save_weights(run_dir / "best.pt", cfg, data.spec, state, dist, found.miou)
            log.info(
                f"epoch {epoch + 1}: {cfg.eval.network} mIoU {100 * found.miou:.2f} (best {100 * state.best:.2f})"
            )
            teachers = [modules[name] for name in labeling_networks(cfg)]
            log_pseudo_quality(cfg, teachers, data, log, state.step, epoch, dist)
            if cfg.run.panels and dist.is_main:
                panels(cfg, state, data, log, dist)
        state.evaluated = epoch + 1
        save_last(run_dir / "last.pt", cfg, data.spec, state, log, dist)


def set_up(cfg: Config, dist: Dist) -> tuple[TrainingData, State]:
    """Data, networks and optimisers of a run, before any checkpoint is read."""
    configure(cfg.run)
    require_network(cfg, cfg.eval.network)
    data = build_training_data(cfg, dist, plan_batch(cfg.optim, dist.world_size))
    method = build_method(cfg, data.spec.num_classes, dist)
    return data, State(method, torch.amp.GradScaler(dist.device.type, enabled=cfg.run.precision == "fp16"))


def run(cfg: Config, run_dir: Path, dist: Dist) -> None:
    """Train from wherever the run directory stands to the end, then measure the last and the best weights."""
    data, state = set_up(cfg, dist)
    length = data.steps_per_epoch
    total_steps = length * cfg.optim.epochs
    images = cfg.optim.batch_size * len(data.loaders)
    with contextlib.closing(data), StopRequest() as request, RunLog(
        run_dir, dist, total_steps=total_steps, images_per_step=images, interval=cfg.run.log_interval
    ) as log:  # fmt: skip
        began = resolve_start(run_dir, cfg.run.resume, cfg.run.init)
        if began.continues and began.state is not None:
            require_resumable(began.state, PROJECT, cfg, str(began.path), (*MAY_CHANGE, "keep.*"))
            restore(state, began.state, str(began.path), log, dist)
            bring_best(began.path, run_dir, dist)
        elif began.state is not None:
            load_modules(state.method, began.state, str(began.path))
        else:
            load_backbone(cfg, state.method.modules, log)
        announce(
            cfg, data, log, run_dir, dist, total_steps, deviations(cfg, dist),
            own_statistics=own_statistics(cfg, dist),
        )  # fmt: skip
        if dist.is_main:
            save_config(cfg, run_dir / "config.yaml")
        log.begin(state.step)
        guard = FiniteGuard(cfg.run.on_nonfinite, dist, cfg.run.log_interval * len(state.method.phases))
        if state.step >= total_steps and state.evaluated == cfg.optim.epochs:
            log.info(f"{run_dir}: finished already ({state.step} steps); only evaluating")
        while state.step < total_steps or state.evaluated < cfg.optim.epochs:
            epoch = state.evaluated
            if state.step < (epoch + 1) * length and train_epoch(
                epoch, cfg, data, state, log, guard, request, dist
            ):
                request.requeue(dist)
                return
            guard.check(state.seen)
            end_epoch(epoch, cfg, data, state, log, run_dir, dist)
        finish(cfg, data, state, log, guard, run_dir, dist)


def dry_run(cfg: Config, dist: Dist) -> None:
    """Build everything, run steps of the method, print the forecast; leaves nothing behind."""
    data, state = set_up(cfg, dist)
    total_steps = data.steps_per_epoch * cfg.optim.epochs
    log = RunLog(None, dist, total_steps=total_steps, images_per_step=1, interval=total_steps)
    guard = FiniteGuard("stop", dist, 1)

    def step() -> None:
        limited = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, max_steps=state.step + 1))
        train_epoch(0, limited, data, state, log, guard, StopRequest(), dist)

    with contextlib.closing(data):
        print_forecast(cfg, data, dist, [step] * 3, total_steps)


def main(argv: Sequence[str]) -> int:
    """Read the command line, join the other processes, train."""
    args = train_parser().parse_intermixed_args(argv)
    cfg = train_config(args)
    default = HERE / "runs" / args.config.stem / f"seed{cfg.run.seed}"
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
