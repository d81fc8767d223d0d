"""Train CPS, CPS + CutMix, their supervised-only twin, or one of the baselines shipped with them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from common.config import plan_batch
from common.data.streams import Batches
from common.distributed import Dist, delayed_reduction
from common.errors import run_main
from common.measure.pseudo_quality import log_pseudo_quality
from common.numerics.losses import Losses, best_class, mean_of
from common.numerics.optim import set_learning_rate
from common.numerics.precision import grad_scaler
from common.run.checkpoint import MAY_CHANGE
from common.run.progress import Progress
from common.run.rng import configure
from common.run.session import Session
from projects.cps.arithmetic import warmup_poly
from projects.cps.baselines.cct import cct_step
from projects.cps.baselines.gct import detector_step, gct_step
from projects.cps.baselines.mean_teacher import mean_teacher_before_step, mean_teacher_step
from projects.cps.compat.flags import read_train
from projects.cps.config import Config, loss_divisor
from projects.cps.data import build_training_data, never_used
from projects.cps.evaluate import evaluate_modules, labeling_networks, protocol, require_network
from projects.cps.losses import compiled, mix, mutual_losses
from projects.cps.methods import build_draws, build_networks, build_optimizers
from projects.cps.reporting import deviations, finish, show_panels
from projects.cps.state import PROJECT, Run, keep_weights
from tools import train_script
from tools.training import announce, forecast

HERE = Path(__file__).resolve().parent
Step = Callable[[Batches, Progress, Run], Losses]
BASELINES: dict[str, Step] = {"mean_teacher": mean_teacher_step, "cct": cct_step, "gct": gct_step}


def supervised_step(batch: Batches, at: Progress, run: Run) -> Losses:
    """Loss of labeled images alone: the baseline, which has one network."""
    x_l, y_l = batch[0][:2]
    ((logits,),) = run.nets.forward(x_l)
    sup = run.nets.criterion(logits, y_l)
    return Losses(sup, {"loss_sup": sup})


def train_step(batch: Batches, at: Progress, run: Run) -> Losses:
    """All loss terms of one forward on labeled and unlabeled images, still on the device.

    Each of two networks learns the hard labels of the other, without a threshold or a ramp: of all images, or with
    CutMix of mixed unlabeled ones, where the mixed logits make the labels. Integer labels carry no gradient.

    Source: eq. (1) to (4) of the paper; `train.py` of `voc8.res50v3+.CPS` and `voc8.res50v3+.CPS+CutMix`.
    """
    method, nets = run.cfg.method, run.nets
    if method.name == "sup_only":
        return supervised_step(batch, at, run)
    if method.name in BASELINES:
        return BASELINES[method.name](batch, at, run)
    x_l, y_l = batch[0][:2]
    pseudo = None
    if method.name == "cps":
        (labeled_1, unlabeled_1), (labeled_2, unlabeled_2) = nets.forward(x_l, batch[1].image)
    else:
        x_0, x_1 = batch[1].image, batch[2].image
        mask = run.draws.masks(x_0)
        # QUIRK quirks.train_mode_labels: by batch statistics, which move the running ones
        taught = nets.teach(x_0, x_1, train=run.cfg.quirks.train_mode_labels)
        pseudo = [best_class(mix(u_0, u_1, mask)) for u_0, u_1 in taught]
        (unlabeled_1, labeled_1), (unlabeled_2, labeled_2) = nets.forward(mix(x_0, x_1, mask), x_l)
    losses = compiled(mutual_losses, run.cfg.run.compile)
    labeled, unlabeled = (labeled_1, labeled_2), (unlabeled_1, unlabeled_2)
    sup_1, sup_2, cps = losses(nets.criterion, labeled, unlabeled, y_l, pseudo)
    cps = method.cps_weight * cps
    terms = {"loss_sup": sup_1, "loss_sup_2": sup_2, "loss_cps": cps}
    if (at.step + 1) % run.cfg.run.log_interval == 0:  # one more pass over the scores of both networks
        terms["agreement"] = (best_class(unlabeled_1) == best_class(unlabeled_2)).float().mean()
    return Losses(sup_1 + sup_2 + cps, terms)


def before_step(at: Progress, run: Run) -> None:
    """Nothing for CPS, both of whose networks learn; the mean teacher begins as a copy."""
    if run.cfg.method.name == "mean_teacher":
        mean_teacher_before_step(at, run)


def after_step(at: Progress, run: Run) -> None:
    """Nothing: neither network follows the other, and the mean teacher is averaged before the step."""


class Phase(NamedTuple):
    """A backward pass and the optimizers that step after it.

    Attributes:
        step: losses of one forward.
        module: what is called with gradients; it may reduce them over processes.
        optimizers: those that step.
    """

    step: Step
    module: object
    optimizers: list[torch.optim.Optimizer]


def phases(run: Run) -> list[Phase]:
    """What follows one another in an optimizer step: the networks, and in GCT then the detector of their flaws."""
    networks = [one for name, one in run.optimizers.items() if name != "detector"]
    first = Phase(train_step, run.nets.forward, networks)
    if run.nets.detect is None:
        return [first]
    return [first, Phase(detector_step, run.nets.detect, [run.optimizers["detector"]])]


def set_rates(at: Progress, run: Run) -> float:
    """Give the optimizers their rate of this step; the first network's is returned."""
    method, optim = run.cfg.method, run.cfg.optim
    gct = method.gct if method.name == "gct" else None
    # QUIRK method.gct.late_rate: the rate of the step before
    step = max(at.step - 1, 0) if gct is not None and gct.late_rate else at.step
    warmup, total = optim.warmup_epochs * at.length, at.epochs * at.length
    for name, optimizer in run.optimizers.items():
        if name == "detector" and gct is not None and gct.constant_detector_rate:
            continue  # QUIRK method.gct.constant_detector_rate: the rate never changes
        set_learning_rate(optimizer, optim, step, total)
        for group in optimizer.param_groups if step < warmup else ():
            group["lr"] = warmup_poly(group["initial_lr"], step, total, optim.power, warmup)
    return float(run.optimizers["branch1"].param_groups[0]["lr"])


def train_epoch(epoch: int, run: Run, session: Session) -> bool:
    """The rest of an epoch; True if the run was asked to stop (and has been saved)."""
    nets = run.nets
    for at, group in session.steps(epoch):
        rate = set_rates(at, run)
        nets.train()
        nets.share_statistics(run.dist)
        before_step(at, run)
        session.guard.protect(*nets.modules.values())
        # QUIRK quirks.loss_world_size: the authors sum the loss over processes, divide it by their number and let the
        # gradients be averaged once more
        share = len(group) * loss_divisor(run.cfg)
        found, flags = [], []
        for phase in phases(run):
            for optimizer in phase.optimizers:
                optimizer.zero_grad(set_to_none=True)
            results = []
            for i, batch in enumerate(group):
                with delayed_reduction(phase.module, i + 1 < len(group)):
                    losses = phase.step(batch, at._replace(forward=i), run)
                    run.scaler.scale(losses.total / share).backward()
                results.append(losses)
            found.append(mean_of(results))
            flags.append(session.watch(at, found[-1], group))
            session.guard.step(run.scaler, *phase.optimizers)
        after_step(at, run)
        total = torch.stack([losses.total for losses in found]).sum()
        terms = {name: value for losses in found for name, value in losses.terms.items()}
        session.record(epoch, Losses(total, terms), torch.stack(flags).amax(), rate)
        if session.save_or_stop():
            return True
    return False


def evaluate(epoch: int, run: Run, session: Session) -> None:
    """Measure the network in use after `epoch` (from 0), keep the best weights, show what it labels."""
    cfg, modules = run.cfg, run.nets.modules
    run.nets.share_statistics(run.dist)
    with session.log.paused():
        how = protocol(cfg, "training")
        found = evaluate_modules(cfg, modules, run.data.spec, cfg.data.val, how, run.dist)
        best = session.note(epoch, found)
        session.log.info(f"epoch {epoch + 1}: {cfg.eval.network} mIoU {100 * found.miou:.2f}{best}")
        teachers = [modules[name] for name in labeling_networks(cfg)]
        log_pseudo_quality(cfg, teachers, run.data, session.log, run.step, epoch, run.dist)
        if cfg.run.panels and run.dist.is_main:
            show_panels(run, session.log)


def set_up(cfg: Config, dist: Dist) -> Run:
    """Data, networks and optimizers of a run, before any checkpoint is read."""
    configure(cfg.run)
    require_network(cfg, cfg.eval.network)
    data = build_training_data(cfg, dist, plan_batch(cfg.optim, dist.world_size))
    nets = build_networks(cfg, data.spec.num_classes, dist)
    optimizers, scaler = build_optimizers(cfg, nets), grad_scaler(cfg.run.precision, dist)
    return Run(cfg, dist, data, nets, build_draws(cfg, dist), optimizers, scaler)


def train(cfg: Config, run_dir: Path, dist: Dist) -> None:
    """Train from wherever the run directory stands to the end, then measure the best and the last weights.

    With `eval.every_epochs` 0 nothing is measured before, as by the authors, who keep weights and measure those.
    """
    run = set_up(cfg, dist)
    may_change = (*MAY_CHANGE, "keep.*")
    with Session(run, PROJECT, run_dir, may_change=may_change, losses_per_step=len(phases(run))) as session:
        session.start()
        apart = bool(run.nets.unsynchronized)
        announce(session, deviations(cfg, dist.world_size), never_used(run.data), unsynchronized=apart)
        for epoch in session.epochs():
            if train_epoch(epoch, run, session):
                return
            if session.evaluation_due(epoch) and cfg.eval.every_epochs:
                evaluate(epoch, run, session)
            keep_weights(epoch, run, session)
            session.end_epoch(epoch)
        finish(run, session)


def dry_run(cfg: Config, dist: Dist) -> None:
    """Build everything, run steps of the method, print the forecast; leaves nothing behind."""
    run = set_up(cfg, dist)
    with Session(run, PROJECT, None) as session:
        forecast(session, [lambda: train_epoch(0, run, session)] * 3)


def main(argv: Sequence[str]) -> int:
    """Read the command line, join the other processes, train."""
    cfg, run_dir = read_train(argv, HERE)
    return train_script.start(cfg, run_dir, train, dry_run)


if __name__ == "__main__":
    run_main(main)
