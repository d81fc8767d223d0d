"""Train s4GAN, its supervised-only twin, or s4GAN with the image-level branch MLMT."""

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

from common.config import load_config, plan_batch, save_config
from common.data.streams import Batches
from common.distributed import Dist, broadcast_buffers, delayed_reduction, start, stop
from common.errors import run_main
from common.measure.pseudo_quality import log_pseudo_quality
from common.numerics.losses import Losses, mean_of
from common.numerics.optim import FiniteGuard, set_learning_rate
from common.run.backend import configure
from common.run.checkpoint import MAY_CHANGE, bring_best, require_resumable, resolve_start
from common.run.log import RunLog
from common.run.reporting import announce, print_forecast
from common.run.signals import StopRequest
from projects.s4gan_mlmt.config import Config
from projects.s4gan_mlmt.data import TrainingStreams, build_training_data
from projects.s4gan_mlmt.evaluate import Measured, evaluate_network, protocol
from projects.s4gan_mlmt.mlmt import train_branch
from projects.s4gan_mlmt.mlmt_state import BRANCH
from projects.s4gan_mlmt.model import load_weights
from projects.s4gan_mlmt.reporting import deviations, finish, panels
from projects.s4gan_mlmt.state import (
    DISCRIMINATOR,
    PROJECT,
    State,
    build_state,
    keep_weights,
    load_networks,
    require_after_steps,
    restore,
    save_last,
    save_weights,
    synchronises,
    weights_due,
)
from projects.s4gan_mlmt.step import critic_losses, frozen, segmentation_losses, supervised_losses

HERE = Path(__file__).resolve().parent


def backward(batches: Batches, cfg: Config, state: State, share: int, more: bool, dist: Dist) -> Losses:
    """Gradients of all networks from one forward's batches; the losses and figures, still on the device.

    The discriminator learns from what the segmentation network said before its step, so both networks step later.

    Args:
        batches: of every loader.
        cfg: the run's configuration.
        state: the networks.
        share: forwards of the optimiser step.
        more: whether more of them follow, so that gradients are not yet reduced over processes.
        dist: this process.
    """
    if state.critic is None or state.judge is None:
        with delayed_reduction(state.segment, more):
            result = supervised_losses(batches[0], state.segment, dist)
            state.scaler.scale(result.total / share).backward()
        return result
    with frozen(state.critic), delayed_reduction(state.segment, more):
        result, inputs = segmentation_losses(
            batches, state.step, state.segment, state.critic, cfg.method, cfg.quirks, dist
        )
        state.scaler.scale(result.total / share).backward()
    with delayed_reduction(state.judge, more):
        judged = critic_losses(inputs, state.judge, dist)
        state.scaler.scale(judged.total / share).backward()
    return Losses(result.total.detach() + judged.total.detach(), result.terms | judged.terms)


def train_step(
    group: Sequence[Batches], cfg: Config, state: State, guard: FiniteGuard, names: object, dist: Dist
) -> Losses:
    """One step of all optimisers on a group of batches; the sum of all losses, its terms and figures."""
    optimizers = state.optimizers.values()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    results = [
        backward(batches, cfg, state, len(group), i + 1 < len(group), dist) for i, batches in enumerate(group)
    ]
    total, terms = mean_of(results)
    bad = guard.watch(state.step + 1, total, terms, names)
    if dist.device.type == "cpu":
        guard.check(state.seen)
    guard.step(state.scaler, *optimizers)
    return Losses(total, terms | {"nonfinite": bad})


def set_rates(cfg: Config, state: State) -> float:
    """Give both optimisers their rates of this step; that of the backbone is returned."""
    rates = [
        set_learning_rate(one, cfg.optim, state.step, cfg.optim.steps) for one in state.optimizers.values()
    ]
    return rates[0][0]


def own_statistics(cfg: Config, dist: Dist) -> bool:
    """Whether each of several processes computes BatchNorm on its own batch, as the authors' replicas do."""
    return dist.world_size > 1 and not synchronises(cfg, dist)


def share_statistics(cfg: Config, state: State, dist: Dist) -> None:
    """Give all processes the first one's running statistics; they begin every step and evaluation with those."""
    if own_statistics(cfg, dist):
        broadcast_buffers(state.segmenter, dist)


def train_epoch(
    epoch: int, cfg: Config, data: TrainingStreams, state: State, log: RunLog, guard: FiniteGuard,
    request: StopRequest, dist: Dist,
) -> bool:  # fmt: skip
    """The rest of a round from `state.step` on; True if the run was asked to stop (and has been saved)."""
    run, networks = cfg.run, state.networks.values()
    for network in networks:
        network.train()
    end = (epoch + 1) * cfg.optim.steps_per_round
    for group in data.steps(state.step, end, dist, run.channels_last):
        rate = set_rates(cfg, state)
        share_statistics(cfg, state, dist)
        guard.protect(*networks)
        total, terms = train_step(group, cfg, state, guard, data.names(group), dist)
        state.step += 1
        log.step(
            state.step,
            terms | {"loss": total},
            epoch=epoch,
            lr=rate,
            expected=[k for k in terms if k.startswith("loss_")],
        )
        if log.last_means.get("nonfinite"):
            guard.check(state.seen)
        due = run.save_interval and state.step % run.save_interval == 0
        kept = weights_due(cfg, state.step)
        ending = request.agree(dist) or state.step == run.max_steps
        if (due or kept or ending) and log.run_dir is not None:
            guard.check(state.seen)  # on a GPU a bad step may not have been noticed yet
            with log.paused():
                if kept:
                    keep_weights(log.run_dir, cfg, data.spec, state, dist)
                if due or ending:
                    save_last(log.run_dir / "last.pt", cfg, data.spec, state, log, dist)
        if ending:
            if log.run_dir is not None:
                log.info(f"stopped after step {state.step}; start the same command again to go on")
            return True
    return False


def end_epoch(
    epoch: int, cfg: Config, data: TrainingStreams, state: State, log: RunLog, run_dir: Path, dist: Dist
) -> None:
    """Evaluate after round `epoch` (from 0) where that is due, then save everything."""
    every, rounds = cfg.eval.every_epochs, epoch + 1
    share_statistics(cfg, state, dist)
    with log.paused():
        if every and (rounds % every == 0 or rounds == cfg.optim.epochs):
            how = protocol(cfg, "training")
            found = evaluate_network(cfg, state.segmenter, data.spec, cfg.data.val, how, dist)
            state.last = found.miou
            log.scalars(state.step, {"epoch": epoch, "miou": found.miou, "miou_present": found.miou_present})
            if found.miou > state.best:
                state.best, state.best_epoch = found.miou, rounds
                save_weights(run_dir / "best.pt", cfg, data.spec, state, dist, found.miou)
            log.info(f"step {state.step}: mIoU {100 * found.miou:.2f} (best {100 * state.best:.2f})")
            network = Measured(state.segmenter, cfg.data.pipeline)
            log_pseudo_quality(cfg, [network], data, log, state.step, epoch, dist)
            if cfg.run.panels and dist.is_main:
                panels(cfg, state, data, log, dist)
        state.evaluated = rounds
        save_last(run_dir / "last.pt", cfg, data.spec, state, log, dist)


def set_up(cfg: Config, dist: Dist) -> tuple[TrainingStreams, State]:
    """Data, networks and optimisers of a run, before any checkpoint is read."""
    configure(cfg.run)
    data = build_training_data(cfg, dist, plan_batch(cfg.optim, dist.world_size))
    return data, build_state(cfg, data.spec.num_classes, dist)


def begin(cfg: Config, state: State, log: RunLog, run_dir: Path, dist: Dist) -> None:
    """Put a run where it stands: at its own checkpoint, at `run.resume`, or at its start with weights from a file.

    Raises:
        UserError: the file is missing, or of another run, project or architecture.
    """
    began = resolve_start(run_dir, cfg.run.resume, cfg.run.init)
    if began.continues and began.state is not None:
        require_resumable(began.state, PROJECT, cfg, str(began.path), (*MAY_CHANGE, "keep.*", "mlmt.*"))
        restore(state, began.state, str(began.path), log, dist)
        bring_best(began.path, run_dir, dist)
    elif began.state is not None:
        load_networks(state, began.state, str(began.path))
    else:
        load_weights(cfg.model, state.segmenter.network, state.networks.get(DISCRIMINATOR), log)


def branch_config(cfg: Config) -> Config:
    """The configuration of the image-level branch, whose steps come after those of the segmentation branch."""
    limit = cfg.run.max_steps
    run = cfg.run if limit is None else dataclasses.replace(cfg.run, max_steps=limit - cfg.optim.steps)
    return dataclasses.replace(cfg, run=run)


def run(cfg: Config, run_dir: Path, dist: Dist) -> None:
    """Train from wherever the run directory stands to the end, then measure the last weights and those that count."""
    data, state = set_up(cfg, dist)
    total_steps, images = cfg.optim.steps, cfg.optim.batch_size
    images += cfg.optim.batch_size + cfg.optim.unlabeled if cfg.method.adversarial else 0
    with contextlib.closing(data), StopRequest() as request, RunLog(
        run_dir, dist, total_steps=total_steps, images_per_step=images, interval=cfg.run.log_interval
    ) as log:  # fmt: skip
        begin(cfg, state, log, run_dir, dist)
        require_after_steps(cfg, run_dir, state)
        announce(
            cfg, data, log, run_dir, dist, total_steps, deviations(cfg, dist),
            own_statistics=own_statistics(cfg, dist),
        )  # fmt: skip
        if dist.is_main:
            save_config(cfg, run_dir / "config.yaml")
        data.save_split(run_dir, dist)
        log.begin(state.step)
        guard = FiniteGuard(cfg.run.on_nonfinite, dist, cfg.run.log_interval)
        if state.step >= total_steps and state.evaluated == cfg.optim.epochs:
            log.info(f"{run_dir}: the segmentation branch is finished already ({state.step} steps)")
        while state.step < total_steps or state.evaluated < cfg.optim.epochs:
            epoch = state.evaluated
            if state.step < (epoch + 1) * cfg.optim.steps_per_round and train_epoch(
                epoch, cfg, data, state, log, guard, request, dist
            ):
                request.requeue(dist)
                return
            guard.check(state.seen)
            end_epoch(epoch, cfg, data, state, log, run_dir, dist)
        scores = None
        if cfg.method.name == "s4gan_mlmt":
            with log.paused():
                scores = train_branch(branch_config(cfg), run_dir / BRANCH, dist, request, split=data.split)
            if scores is None:
                request.requeue(dist)
                return
        finish(cfg, data, state, log, guard, run_dir, dist, scores)


def dry_run(cfg: Config, dist: Dist) -> None:
    """Build everything, run steps of the segmentation branch, print the forecast; leaves nothing behind."""
    data, state = set_up(cfg, dist)
    log = RunLog(None, dist, total_steps=cfg.optim.steps, images_per_step=1, interval=cfg.optim.steps)
    guard = FiniteGuard("stop", dist, 1)

    def step() -> None:
        limited = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, max_steps=state.step + 1))
        train_epoch(
            state.step // cfg.optim.steps_per_round, limited, data, state, log, guard, StopRequest(), dist
        )

    with contextlib.closing(data):
        print_forecast(cfg, data, dist, [step] * 3, cfg.optim.steps)


def train(cfg: Config, run_dir: Path) -> int:
    """Join the other processes and train; what every command line of this project ends in."""
    dist = start(cfg.run.device)
    try:
        if cfg.run.dry_run:
            dry_run(cfg, dist)
        else:
            run(cfg, run_dir, dist)
    finally:
        stop()
    return 0


def main(argv: Sequence[str]) -> int:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(
        prog="train.py", description="Train s4GAN, its supervised-only twin, or s4GAN with MLMT."
    )
    parser.add_argument("--config", required=True, help="YAML file, see the folder 'configs'")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="changes to the configuration"
    )
    args = parser.parse_args(argv)
    cfg = load_config(Config, args.config, args.overrides)
    default = HERE / "runs" / Path(args.config).stem / f"seed{cfg.run.seed}"
    return train(cfg, Path(cfg.run.dir or os.path.relpath(default)))


if __name__ == "__main__":
    run_main(main)
