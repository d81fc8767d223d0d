"""Everything a run must keep to go on exactly where it stopped."""

from __future__ import annotations

from collections.abc import Mapping
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
from projects.cps.config import Config, KeepConfig
from projects.cps.methods import Method

PROJECT = "cps"
KEPT = "weights"


@dataclass
class State:
    """The method with its optimisers and random numbers, and counters.

    Attributes:
        step: optimiser steps done.
        evaluated: epochs whose end (weights kept, evaluation if due) is done.
        best: in-training mIoU (fraction) of `best.pt`, -1 before the first.
        best_epoch: number of epochs after which it was reached.
        last: in-training mIoU of the newest evaluation.
        seen: latest checkpoint written, for messages.
    """

    method: Method
    scaler: torch.amp.GradScaler
    step: int = 0
    evaluated: int = 0
    best: float = -1.0
    best_epoch: int = 0
    last: float = -1.0
    seen: Path | None = None

    def weights(self) -> dict[str, Any]:
        """State dicts of all modules with bare keys."""
        return {name: bare_state_dict(module) for name, module in self.method.modules.items()}


def save_last(path: Path, cfg: Config, spec: DatasetSpec, state: State, log: RunLog, dist: Dist) -> None:
    """Write the whole state; a collective. Only the first rank writes."""
    rng = capture_rng(dist)
    method = state.method
    draws = gather_objects(None if method.draws is None else method.draws.state_dict(), dist)
    record = log.state_dict()
    if dist.is_main:
        contents = describe(PROJECT, cfg, spec, state.step, state.weights()) | {
            "optimizers": {name: one.state_dict() for name, one in method.optimizers().items()},
            "scaler": state.scaler.state_dict(),
            "draws": draws,
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


def kept_weights(run_dir: Path) -> dict[str, Path]:
    """Weights that a run has kept, by `epoch_<number>`, from the earliest on."""
    numbers = {path.stem.removeprefix("epoch_"): path for path in (run_dir / KEPT).glob("epoch_*.pt")}
    found = {int(number): path for number, path in numbers.items() if number.isdigit()}  # no `epoch_3.prev`
    return {f"epoch_{number}": found[number] for number in sorted(found)}


def keep_weights(
    run_dir: Path, keep: KeepConfig, epochs: int, cfg: Config, spec: DatasetSpec, state: State, dist: Dist
) -> None:
    """Keep the weights after `epochs` epochs if they are due, and drop the oldest beyond `keep.newest`."""
    if not keep.every_epochs or epochs <= keep.after_epoch:
        return
    if epochs % keep.every_epochs and epochs != cfg.optim.epochs:
        return
    save_weights(run_dir / KEPT / f"epoch_{epochs}.pt", cfg, spec, state, dist)
    if dist.is_main and keep.newest is not None:
        for path in list(kept_weights(run_dir).values())[: -keep.newest]:
            path.unlink()


def restore(state: State, saved: Mapping[str, Any], where: str, log: RunLog, dist: Dist) -> None:
    """Continue from the contents of a checkpoint that `save_last` wrote.

    Raises:
        UserError: another architecture, or another number of processes.
    """
    load_modules(state.method, saved, where)
    for name, one in state.method.optimizers().items():
        one.load_state_dict(saved["optimizers"][name])
    state.scaler.load_state_dict(saved["scaler"])
    restore_rng(saved["rng"], dist)
    if state.method.draws is not None:
        state.method.draws.load_state_dict(saved["draws"][dist.rank])
    state.step, state.evaluated = saved["step"], saved["evaluated"]
    state.best, state.best_epoch, state.last = saved["best"], saved["best_epoch"], saved["last"]
    log.load_state_dict(saved["log"])
    state.seen = Path(where)


def load_modules(method: Method, saved: Mapping[str, Any], where: str) -> None:
    """Give every module the weights of a checkpoint.

    A second network that it lacks takes those of the first; what only one method has (a detector, auxiliary
    decoders) keeps its own.

    Raises:
        UserError: the file is of another project or architecture.
    """
    require_own(saved, PROJECT, where)
    networks = saved["networks"]
    for name, module in method.modules.items():
        found = networks.get("branch1" if name == "branch2" and name not in networks else name)
        if found is not None:
            load_weights(module, found, where)
