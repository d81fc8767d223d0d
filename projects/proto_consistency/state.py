"""Everything a run must keep to go on exactly where it stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
from projects.proto_consistency.augment import Draws
from projects.proto_consistency.config import Config
from projects.proto_consistency.model import Networks

PROJECT = "proto_consistency"  # as checkpoints and results name it
PROTOTYPES = "proto_net.proto_list"


@dataclass
class State:
    """Networks, optimiser, random numbers and counters.

    Attributes:
        step: optimiser steps done.
        evaluated: epochs whose evaluation is done.
        best: in-training mIoU (fraction) of `best.pt`, -1 before the first; of the teacher in semi-supervised runs.
        best_epoch: number of epochs after which it was reached.
        last: in-training mIoU of the newest evaluation.
        placed: the first prototypes have been made.
        usage: pixels per prototype between the newest two evaluations, by name of the class.
        seen: latest checkpoint written, for messages.
    """

    nets: Networks
    draws: Draws
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    evaluated: int = 0
    best: float = -1.0
    best_epoch: int = 0
    last: float = -1.0
    placed: bool = False
    usage: dict[str, list[int]] | None = None
    seen: Path | None = None

    def weights(self) -> dict[str, Any]:
        """State dicts of student and teacher with bare keys."""
        networks = {"student": bare_state_dict(self.nets.student)}
        if self.nets.teacher is not None:
            networks["teacher"] = bare_state_dict(self.nets.teacher)
        return networks

    def own(self) -> dict[str, Tensor]:
        """What each process has for itself: its prototypes, which may differ, and their use since an evaluation."""
        nets = self.nets
        if nets.movement is None or nets.teacher is None:
            return {}
        heads = {"student": nets.student, "teacher": nets.teacher}
        found = {role: network.require_prototypes().proto_list.detach() for role, network in heads.items()}
        return {key: value.cpu() for key, value in (found | {"usage": nets.movement.usage}).items()}

    def load_own(self, saved: Mapping[str, Tensor]) -> None:
        """Take back what `own` gave."""
        nets = self.nets
        if nets.movement is None or nets.teacher is None:
            return
        nets.student.require_prototypes().set(saved["student"])
        nets.teacher.require_prototypes().set(saved["teacher"])
        nets.movement.usage.copy_(saved["usage"])


def header(cfg: Config, spec: DatasetSpec, state: State) -> dict[str, Any]:
    """The weights of a run and what its checkpoint says about itself."""
    return describe(PROJECT, cfg, spec, state.step, state.weights())


def save_last(path: Path, cfg: Config, spec: DatasetSpec, state: State, log: RunLog, dist: Dist) -> None:
    """Write the whole state; a collective. Only the first rank writes."""
    rng = capture_rng(dist)
    draws = gather_objects(state.draws.state_dict(), dist)
    owns = gather_objects(state.own(), dist)
    record = log.state_dict()
    if dist.is_main:
        contents = header(cfg, spec, state) | {
            "optimizer": state.optimizer.state_dict(),
            "scaler": state.scaler.state_dict(),
            "draws": draws,
            "own": owns,
            "rng": rng,
            "log": record,
            "evaluated": state.evaluated,
            "best": state.best,
            "best_epoch": state.best_epoch,
            "last": state.last,
            "placed": state.placed,
            "usage": state.usage,
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
    require_own(saved, PROJECT, where)
    load_weights(state.nets.student, saved["networks"]["student"], where)
    if state.nets.teacher is not None:
        load_weights(state.nets.teacher, saved["networks"]["teacher"], where)
    state.optimizer.load_state_dict(saved["optimizer"])
    state.scaler.load_state_dict(saved["scaler"])
    restore_rng(saved["rng"], dist)
    state.draws.load_state_dict(saved["draws"][dist.rank])
    state.load_own(saved["own"][dist.rank])
    state.step, state.evaluated = saved["step"], saved["evaluated"]
    state.best, state.best_epoch, state.last = saved["best"], saved["best_epoch"], saved["last"]
    state.placed, state.usage = saved["placed"], saved["usage"]
    log.load_state_dict(saved["log"])
    state.seen = Path(where)


def load_networks(nets: Networks, saved: dict[str, Any], where: str) -> None:
    """Give student and teacher the weights of a checkpoint to start from, but not its prototypes.

    These are made as `method.proto.source` says, so a network without any, or with another number of them, can be
    started from too. A teacher without its own weights takes the student's.

    Raises:
        UserError: the file is of another project or architecture.
    """
    require_own(saved, PROJECT, where)
    for role, network in (("student", nets.student), ("teacher", nets.teacher)):
        if network is not None:
            given = saved["networks"].get(role, saved["networks"]["student"])
            weights = {key: value for key, value in given.items() if key != PROTOTYPES}
            own = {key: value for key, value in bare_state_dict(network).items() if key == PROTOTYPES}
            load_weights(network, weights | own, where)
