"""Train U2PL, or its supervised-only baseline."""

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
from torch import Tensor

from common.config import load_config, plan_batch, save_config
from common.data.streams import TrainingData
from common.distributed import Dist, delayed_reduction, start, stop
from common.errors import run_main
from common.measure.pseudo_quality import log_pseudo_quality
from common.models.deeplab import upsample
from common.numerics.ema import copy_buffers, copy_parameters, update_teacher, warmup_decay
from common.numerics.losses import IGNORE, Losses, mean_of
from common.numerics.optim import FiniteGuard, Group, build_optimizer, set_learning_rate
from common.numerics.schedules import linear_decay
from common.run.backend import configure
from common.run.checkpoint import bring_best, require_resumable, resolve_start
from common.run.log import RunLog
from common.run.reporting import announce, print_forecast
from common.run.signals import StopRequest
from projects.u2pl.ael_step import adaptive_state, adaptive_step
from projects.u2pl.augment import Draws, strong_augment
from projects.u2pl.config import Config
from projects.u2pl.data import build_training_data
from projects.u2pl.evaluate import evaluate_network, protocol
from projects.u2pl.losses import contrast, contrast_inputs, pseudo_label_loss, split_by_entropy
from projects.u2pl.model import Memory, Networks, build_networks, load_backbone
from projects.u2pl.reporting import deviations, finish, show_panels
from projects.u2pl.state import PROJECT, State, load_networks, restore, save_best, save_last

HERE = Path(__file__).resolve().parent


def supervised_step(x_l: Tensor, y_l: Tensor, nets: Networks) -> Losses:
    """Loss of labeled images alone: the baseline, and the epochs before the teacher is used."""
    out = nets.forward(x_l)
    size = y_l.shape[-2:]
    aux = None if out.aux is None else upsample(out.aux, size)
    sup = nets.criterion(upsample(out.logits, size), y_l, aux)
    total = sup
    if out.feats is not None:
        total = total + 0.0 * out.feats.sum()  # zero gradients, not none: weight decay reaches the head
    if nets.teacher is not None and nets.teacher_burn_in:
        nets.teach(x_l, train=True)  # QUIRK u2pl-6: only the teacher's BatchNorm statistics learn here
    return Losses(total, {"loss_sup": sup})


def train_step(
    x_l: Tensor, y_l: Tensor, x_u: Tensor, epoch: int, update: int,
    cfg: Config, nets: Networks, memory: Memory, draws: Draws, dist: Dist,
) -> Losses:  # fmt: skip
    """All loss terms of one iteration after the supervised-only epochs, still on the device.

    Labeled images `x_l` (B, 3, H, W) with labels `y_l` (B, H, W), unlabeled images `x_u` (B, 3, H, W). The entropy
    percentiles shrink with `epoch` (from 0); `update` counts the iterations since the teacher came into use.
    """
    method, quirks = cfg.method, cfg.quirks
    size, n = y_l.shape[-2:], len(x_l)
    left = linear_decay(epoch, cfg.optim.epochs)

    with torch.no_grad():
        pseudo = upsample(nets.teach(x_u, train=False).logits, size).argmax(dim=1)
        mixed = draws.coin() < method.augment_probability and method.strong_augmentation != "none"
        if mixed:
            x_u, pseudo = strong_augment(x_u, pseudo, method.strong_augmentation, draws)
    x = torch.cat((x_l, x_u))
    out = nets.forward(x)  # before the teacher: the order of dropout draws is part of the trajectory
    logits = upsample(out.logits, size)
    aux = None if out.aux is None else upsample(out.aux[:n], size)
    with torch.no_grad():
        seen = nets.teach(x, train=True)  # QUIRK u2pl-7: batch statistics and dropout
        keep = 100.0 - (100.0 - method.drop_percent) * left
        alpha = method.low_entropy_threshold * left
        split = split_by_entropy(upsample(seen.logits[n:], size), pseudo, keep, alpha)

    sup = nets.criterion(logits[:n], y_l, aux)
    unsup = method.unsup_weight * pseudo_label_loss(logits[n:], split.pseudo)
    terms = {"loss_sup": sup, "loss_unsup": unsup}
    total = sup + unsup
    if method.contra_weight > 0:
        assert out.feats is not None, "the representation head is part of the method"
        assert seen.feats is not None
        inputs = contrast_inputs(
            out.feats, seen.feats, seen.logits, y_l, pseudo, split,
            negative_high_entropy=method.negative_high_entropy, onehot_first_image=quirks.onehot_first_image,
            every_image=not quirks.own_label_negatives,
        )  # fmt: skip
        found = memory.collect(inputs, len(x_u), dist)
        result = contrast(
            inputs, memory.queues, memory.settings, draws.contrast, memory.prototypes,
            warmup_decay(update, 0.999), draws.generator,
        )  # fmt: skip
        memory.prototypes = result.prototypes
        contra = method.contra_weight * result.loss
        # QUIRK u2pl-8: summed over ranks and divided by their number, but only the own share has a gradient
        share = dist.world_size if quirks.contra_reduce == "sum_forward_only" else 1
        total = total + contra / share
        terms |= {"loss_contra": contra, "negatives": found.sum(), "anchor_classes": result.valid.sum()}
    elif out.feats is not None:
        total = total + 0.0 * out.feats.sum()
    terms["kept"] = (split.pseudo != IGNORE).float().mean()
    return Losses(total, terms)


def before_step(epoch: int, update: int, cfg: Config, nets: Networks) -> None:
    """Bring the teacher into use at `update` 0: as the student (all through its first epoch, QUIRK u2pl-5)."""
    if nets.teacher is None or update < 0:
        return
    shared = cfg.quirks.shared_first_epoch and epoch == cfg.method.sup_only_epochs
    if shared or (update == 0 and not cfg.method.average_from_start):
        copy_parameters(nets.teacher, nets.student)
    if update == 0 and not nets.teacher_burn_in:
        copy_buffers(nets.teacher, nets.student)


def after_step(epoch: int, update: int, cfg: Config, nets: Networks) -> None:
    """Move the teacher after the optimiser step; `update` counts its averages from 0."""
    if nets.teacher is None or update < 0:
        return
    if epoch == cfg.method.sup_only_epochs and cfg.quirks.shared_first_epoch:
        copy_parameters(nets.teacher, nets.student)
    update_teacher(nets.teacher, nets.student, warmup_decay(update, cfg.method.ema_decay))


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
                if epoch < first or not others or state.memory is None:
                    result = supervised_step(batch_l.image, batch_l.label, nets)
                elif cfg.method.ael is not None:
                    result = adaptive_step((batch_l, *others), epoch, i, cfg, data, state, dist)
                else:
                    result = train_step(
                        batch_l.image, batch_l.label, others[0].image, epoch, update, cfg, nets,
                        state.memory, state.draws, dist,
                    )  # fmt: skip
                state.scaler.scale(result.total / len(group)).backward()
            results.append(result)
        total, terms = mean_of(results)
        state.step += 1
        bad = guard.watch(state.step, total, terms, data.names(group))
        if dist.device.type == "cpu":
            guard.check(state.seen)
        guard.step(state.scaler, state.optimizer)
        after_step(epoch, state.step - 1 if cfg.method.average_from_start else update, cfg, nets)
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
            found = evaluate_network(cfg, network, data.spec, cfg.data.val, protocol(cfg, "training"), dist)
            state.last = found.miou
            log.scalars(state.step, {"epoch": epoch, "miou": found.miou, "miou_present": found.miou_present})
            # the burn-in student is no candidate: what the run yields, and the scripts use, is the teacher
            if found.miou > state.best and teaching == semi:
                state.best, state.best_epoch = found.miou, epoch + 1
                save_best(run_dir / "best.pt", cfg, data.spec, state, dist)
            who = "teacher" if teaching else "student"
            best = f" (best {100 * state.best:.2f})" if state.best >= 0 else ""
            log.info(f"epoch {epoch + 1}: {who} mIoU {100 * found.miou:.2f}{best}")
            log_pseudo_quality(cfg, [network] * teaching, data, log, state.step, epoch, dist)
            if cfg.run.panels and dist.is_main:
                show_panels(cfg, network, data, log, state.step, epoch, dist)
        state.evaluated = epoch + 1
        save_last(run_dir / "last.pt", cfg, data.spec, state, log, dist)


def set_up(cfg: Config, dist: Dist) -> tuple[TrainingData, State]:
    """Data, networks, memory and optimiser of a run, before any checkpoint is read."""
    configure(cfg.run)
    data = build_training_data(cfg, dist, plan_batch(cfg.optim, dist.world_size))
    nets = build_networks(cfg, data.spec.num_classes, dist)
    semi = cfg.method.mode == "semi"
    memory = Memory(cfg, data.spec.num_classes, cfg.model.inner_planes).to(dist.device) if semi else None
    draws = Draws(cfg.run.seed, dist.rank, dist.device)
    if cfg.method.ael is not None:
        memory, draws = adaptive_state(cfg, cfg.method.ael, data, dist)
    heads = [part for part in (nets.student.auxor, nets.student.decoder) if part is not None]
    groups = [Group(nets.student.encoder.parameters())]
    groups += [Group(part.parameters(), cfg.optim.head_lr_factor) for part in heads]
    optimizer = build_optimizer(cfg.optim, groups)
    scaler = torch.amp.GradScaler(dist.device.type, enabled=cfg.run.precision == "fp16")
    return data, State(nets, memory, draws, optimizer, scaler)


def run(cfg: Config, run_dir: Path, dist: Dist) -> None:
    """Train from wherever the run directory stands to the end, then measure the best and the last weights."""
    data, state = set_up(cfg, dist)
    length = data.steps_per_epoch
    total_steps = length * cfg.optim.epochs
    images = cfg.optim.batch_size * min(len(data.loaders), 2)  # what the AEL variant pastes is not counted
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
                 own_statistics=bool(state.nets.own_statistics))  # fmt: skip
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
    """Build everything, run steps of the heaviest phase, print the forecast; leaves nothing behind."""
    data, state = set_up(cfg, dist)
    state.draws.coin = lambda: 0.0  # type: ignore[method-assign]  # always the strong augmentation
    total_steps = data.steps_per_epoch * cfg.optim.epochs
    heaviest = cfg.method.sup_only_epochs if cfg.method.mode == "semi" else 0
    if cfg.method.ael is not None:  # the contrast begins later
        heaviest = min(max(heaviest, cfg.method.ael.start_epoch), cfg.optim.epochs - 1)
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
        prog="train.py", description="Train U2PL or its supervised-only baseline."
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
