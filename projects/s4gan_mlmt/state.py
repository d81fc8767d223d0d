"""What a run trains, and everything it must keep to go on exactly where it stopped."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common.data.spec import DatasetSpec
from common.distributed import Dist
from common.errors import UserError
from common.numerics.precision import synchronised
from common.run.checkpoint import (
    bare_state_dict,
    describe,
    load_weights,
    require_own,
    save,
)
from common.run.log import RunLog
from common.run.rng import capture_rng, restore_rng
from projects.s4gan_mlmt.config import Config
from projects.s4gan_mlmt.deeplabv2 import DeepLabV2
from projects.s4gan_mlmt.model import build_discriminator, build_segmentation
from projects.s4gan_mlmt.optimizer import build_discriminator_optimizer, build_generator_optimizer
from projects.s4gan_mlmt.step import Critic, Segmenter

M = TypeVar("M", bound=nn.Module)

PROJECT = "s4gan_mlmt"
KEPT = "weights"
SEGMENTATION = "segmentation"
DISCRIMINATOR = "discriminator"
OWN_DRAWS = 1_000_003  # between the seeds of two processes' dropout


@dataclass
class State:
    """Networks, optimisers and counters.

    Attributes:
        segmenter: the segmentation network as the step calls it, not wrapped.
        segment: the same, compiled and with gradients averaged over processes, as configured.
        critic: the discriminator as the step calls it, not wrapped; None for supervised-only runs.
        judge: the same, with gradients averaged over processes.
        optimizers: by the name of the network they train.
        scaler: of the losses in half precision.
        step: optimiser steps done.
        evaluated: rounds whose end (weights kept, evaluation if due) is done.
        best: in-training mIoU (fraction) of `best.pt`, -1 before the first.
        best_epoch: number of rounds after which it was reached.
        last: in-training mIoU of the newest evaluation.
        seen: latest checkpoint written, for messages.
    """

    segmenter: Segmenter
    segment: nn.Module
    critic: Critic | None
    judge: nn.Module | None
    optimizers: dict[str, torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    step: int = 0
    evaluated: int = 0
    best: float = -1.0
    best_epoch: int = 0
    last: float = -1.0
    seen: Path | None = None

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Bare networks by their name in checkpoints; evaluation takes the first."""
        found: dict[str, nn.Module] = {SEGMENTATION: self.segmenter.network}
        return found if self.critic is None else found | {DISCRIMINATOR: self.critic.discriminator}

    def weights(self) -> dict[str, Any]:
        """State dicts of all networks with bare keys."""
        return {name: bare_state_dict(network) for name, network in self.networks.items()}


def synchronises(cfg: Config, dist: Dist) -> bool:
    """Whether BatchNorm takes its statistics over all processes; the authors' networks never do."""
    return cfg.model.network == "deeplabv3plus" and synchronised(cfg.model.sync_bn, dist)


def placed(module: M, cfg: Config, dist: Dist) -> M:
    """The module on its device, with synchronised BatchNorm and memory layout as configured."""
    if synchronises(cfg, dist):
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    layout = torch.channels_last if cfg.run.channels_last else torch.contiguous_format
    return module.to(device=dist.device).to(memory_format=layout)


def wrapped(module: nn.Module, cfg: Config, dist: Dist, idle: Collection[nn.Parameter] = ()) -> nn.Module:
    """The module as the loop calls it: compiled, and its gradients averaged over processes.

    Args:
        module: what makes the graph.
        cfg: the run's configuration.
        dist: this process's place.
        idle: parameters that never get a gradient, for which the averaging would wait.
    """
    module = torch.compile(module) if cfg.run.compile else module  # type: ignore[assignment]
    if dist.world_size == 1:
        return module
    ignored = [name for name, p in module.named_parameters() if any(p is one for one in idle)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)
    ids = [dist.local_rank] if dist.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False)


def build_state(cfg: Config, num_classes: int, dist: Dist) -> State:
    """Networks with fresh random numbers on their device, and their optimisers.

    All processes begin with the same weights; what dropout draws from here on is each process's own.
    """
    network = placed(build_segmentation(cfg, num_classes), cfg, dist)
    optimizers: dict[str, torch.optim.Optimizer] = {
        SEGMENTATION: build_generator_optimizer(cfg.optim, network, cfg.quirks.visits)
    }
    segmenter = Segmenter(network, cfg.quirks.separate_statistics, cfg.run.precision)
    critic = judge = None
    if cfg.method.adversarial:
        discriminator = placed(build_discriminator(cfg, num_classes, cfg.data.crop_size), cfg, dist)
        optimizers[DISCRIMINATOR] = build_discriminator_optimizer(
            discriminator, lr=cfg.optim.lr_d, betas=cfg.optim.betas_d
        )
        critic = Critic(discriminator, cfg.run.precision)
        judge = wrapped(critic, cfg, dist)
    # QUIRK aspp_branches: the branches that are not added
    idle = network.unused_parameters() if isinstance(network, DeepLabV2) else ()
    segment = wrapped(segmenter, cfg, dist, idle)
    torch.manual_seed(cfg.run.seed + OWN_DRAWS * dist.rank)
    scaler = torch.amp.GradScaler(dist.device.type, enabled=cfg.run.precision == "fp16")
    return State(segmenter, segment, critic, judge, optimizers, scaler)


def save_last(path: Path, cfg: Config, spec: DatasetSpec, state: State, log: RunLog, dist: Dist) -> None:
    """Write the whole state; a collective. Only the first rank writes."""
    rng = capture_rng(dist)
    record = log.state_dict()
    if dist.is_main:
        contents = describe(PROJECT, cfg, spec, state.step, state.weights()) | {
            "optimizers": {name: one.state_dict() for name, one in state.optimizers.items()},
            "scaler": state.scaler.state_dict(),
            "rng": rng,
            "log": record,
            "evaluated": state.evaluated,
            "best": state.best,
            "best_epoch": state.best_epoch,
            "last": state.last,
        }
        save(path, contents)
    state.seen = path


def save_weights(
    path: Path, cfg: Config, spec: DatasetSpec, state: State, dist: Dist, miou: float | None = None
) -> None:
    """Write the weights alone, with the mIoU that made them worth it."""
    if dist.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, describe(PROJECT, cfg, spec, state.step, state.weights()) | {"miou": miou})


def kept_path(run_dir: Path, step: int) -> Path:
    """Where the weights after `step` updates are kept."""
    return run_dir / KEPT / f"step_{step}.pt"


def kept_weights(run_dir: Path) -> dict[str, Path]:
    """Weights that a run has kept, by `step_<number>`, from the earliest on."""
    numbers = {path.stem.removeprefix("step_"): path for path in (run_dir / KEPT).glob("step_*.pt")}
    found = {int(number): path for number, path in numbers.items() if number.isdigit()}  # no `step_3.prev`
    return {f"step_{number}": found[number] for number in sorted(found)}


def original_path(run_dir: Path, number: int, suffix: str = "") -> Path:
    """The authors' name of the segmentation network's weights; with the suffix `_D`, of the discriminator's."""
    return run_dir / f"VOC_{number}{suffix}.pth"


def original_number(cfg: Config, step: int) -> int | None:
    """The number in the authors' name for the weights after `step` updates; None where they write no file.

    QUIRK 10.27: they save before they count, so that number t stands for t + 1 updates, but for the last file.
    """
    every, number = cfg.keep.original_every, step - 1
    if not every:
        return None
    if step == cfg.optim.steps:
        return step
    return number if number and number % every == 0 else None


def kept_due(cfg: Config, step: int) -> bool:
    """Whether `keep.every_epochs` or `eval.after_steps` names the weights after `step` updates."""
    rounds = cfg.keep.every_epochs * cfg.optim.steps_per_round
    return step == cfg.eval.after_steps or bool(rounds and step % rounds == 0)


def weights_due(cfg: Config, step: int) -> bool:
    """Whether the weights after `step` updates are kept in one form or another."""
    return kept_due(cfg, step) or original_number(cfg, step) is not None


def keep_weights(run_dir: Path, cfg: Config, spec: DatasetSpec, state: State, dist: Dist) -> None:
    """Write the weights of this step in the forms that the configuration asks for."""
    if kept_due(cfg, state.step):
        save_weights(kept_path(run_dir, state.step), cfg, spec, state, dist)
    number = original_number(cfg, state.step)
    if number is not None and dist.is_main:
        for name, suffix in ((SEGMENTATION, ""), (DISCRIMINATOR, "_D")):
            if name in state.networks:
                weights = bare_state_dict(state.networks[name])
                # the prefix of data parallelism, which the authors' evaluate.py wants
                save(original_path(run_dir, number, suffix), {f"module.{k}": v for k, v in weights.items()})


def require_after_steps(cfg: Config, run_dir: Path, state: State) -> None:
    """Refuse to measure weights that the run is past and has not kept.

    Raises:
        UserError: names the step.
    """
    after = cfg.eval.after_steps
    if after is not None and after < state.step and not kept_path(run_dir, after).exists():
        raise UserError(
            f"eval.after_steps={after}: {run_dir} stands at step {state.step} and has kept no weights of that step; "
            "set it to null, or to a later step"
        )


def restore(state: State, saved: Mapping[str, Any], where: str, log: RunLog, dist: Dist) -> None:
    """Continue from the contents of a checkpoint that `save_last` wrote.

    Raises:
        UserError: another architecture, or another number of processes.
    """
    load_networks(state, saved, where)
    for name, one in state.optimizers.items():
        one.load_state_dict(saved["optimizers"][name])
    state.scaler.load_state_dict(saved["scaler"])
    restore_rng(saved["rng"], dist)
    state.step, state.evaluated = saved["step"], saved["evaluated"]
    state.best, state.best_epoch, state.last = saved["best"], saved["best_epoch"], saved["last"]
    log.load_state_dict(saved["log"])
    state.seen = Path(where)


def load_networks(state: State, saved: Mapping[str, Any], where: str) -> None:
    """Give the networks the weights of a checkpoint; a discriminator that it lacks stays as it is.

    Raises:
        UserError: the file is of another project or architecture.
    """
    require_own(saved, PROJECT, where)
    for name, network in state.networks.items():
        if name in saved["networks"]:
            load_weights(network, saved["networks"][name], where)
