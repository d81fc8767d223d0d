"""Everything a run must keep to go on exactly where it stopped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.data.spec import DatasetSpec
from common.distributed import Dist, gather_objects
from common.run.checkpoint import (
    bare_state_dict,
    describe,
    load_weights,
    require_own,
    save,
)
from common.run.log import RunLog
from common.run.rng import capture_rng, restore_rng
from projects.brpg.augment import Draws
from projects.brpg.config import Config
from projects.brpg.model import Networks
from projects.brpg.step import MethodState

PROJECT = "brpg"  # as checkpoints and results name it


@dataclass
class State:
    """Networks, optimiser, what the method remembers, random numbers and counters.

    Attributes:
        step: optimiser steps done.
        evaluated: epochs whose evaluation is done.
        best: in-training mIoU (fraction) of `best.pt`, -1 before the first; of the teacher in semi-supervised runs.
        best_epoch: epoch (from 1) in or after which it was reached.
        last: in-training mIoU of the newest evaluation.
        seen: latest checkpoint written, for messages.
    """

    nets: Networks
    method: MethodState | None
    draws: Draws
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    evaluated: int = 0
    best: float = -1.0
    best_epoch: int = 0
    last: float = -1.0
    seen: Path | None = None

    def weights(self) -> dict[str, Any]:
        """State dicts of student and teacher with bare keys."""
        networks = {"student": bare_state_dict(self.nets.student)}
        if self.nets.teacher is not None:
            networks["teacher"] = bare_state_dict(self.nets.teacher)
        return networks


def header(cfg: Config, spec: DatasetSpec, state: State) -> dict[str, Any]:
    """The weights of a run and what its checkpoint says about itself."""
    return describe(PROJECT, cfg, spec, state.step, state.weights())


def save_last(path: Path, cfg: Config, spec: DatasetSpec, state: State, log: RunLog, dist: Dist) -> None:
    """Write the whole state; a collective. Only the first rank writes."""
    rng = capture_rng(dist)
    draws = gather_objects(state.draws.state_dict(), dist)
    # QUIRK brpg-2: each process moves its own
    centres = None if state.method is None else gather_objects(state.method.prototypes.centres.cpu(), dist)
    record = log.state_dict()
    if dist.is_main:
        contents = header(cfg, spec, state) | {
            "optimizer": state.optimizer.state_dict(),
            "scaler": state.scaler.state_dict(),
            "method": None if state.method is None else state.method.state_dict(),
            "draws": draws,
            "centres": centres,
            "rng": rng,
            "log": record,
            "evaluated": state.evaluated,
            "best": state.best,
            "best_epoch": state.best_epoch,
            "last": state.last,
        }
        save(path, contents)
    state.seen = path


def save_best(path: Path, cfg: Config, spec: DatasetSpec, state: State, dist: Dist) -> None:
    """Write the weights alone."""
    if dist.is_main:
        save(path, header(cfg, spec, state) | {"miou": state.best})


def restore(state: State, saved: dict[str, Any], where: str, log: RunLog, dist: Dist) -> None:
    """Continue from the contents of a checkpoint that `save_last` wrote and `require_resumable` let pass.

    Raises:
        UserError: another architecture, or another number of processes.
    """
    load_networks(state.nets, saved, where)
    state.optimizer.load_state_dict(saved["optimizer"])
    state.scaler.load_state_dict(saved["scaler"])
    restore_rng(saved["rng"], dist)
    if state.method is not None:
        if not any(key.startswith("memory.") for key in saved["method"]):
            state.method.memory = None  # the queues were clustered before the checkpoint was written
        load_weights(state.method, saved["method"], where)
        state.method.prototypes.centres.copy_(saved["centres"][dist.rank])
    state.draws.load_state_dict(saved["draws"][dist.rank])
    state.step, state.evaluated = saved["step"], saved["evaluated"]
    state.best, state.best_epoch, state.last = saved["best"], saved["best_epoch"], saved["last"]
    log.load_state_dict(saved["log"])
    state.seen = Path(where)


def load_networks(nets: Networks, saved: dict[str, Any], where: str) -> None:
    """Give student and teacher the weights of a checkpoint; a teacher without its own takes the student's.

    Raises:
        UserError: the file is of another project or architecture.
    """
    require_own(saved, PROJECT, where)
    load_weights(nets.student, saved["networks"]["student"], where)
    if nets.teacher is not None:
        load_weights(nets.teacher, saved["networks"].get("teacher", saved["networks"]["student"]), where)
