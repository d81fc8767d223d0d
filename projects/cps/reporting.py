"""What a run of CPS says beyond what every run says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from common.config import plan_batch
from common.data.streams import TrainingData
from common.distributed import Dist
from common.numerics.optim import FiniteGuard
from common.run.checkpoint import load
from common.run.log import RunLog
from common.run.reporting import log_panels, report_result
from projects.cps.config import Config, loss_divisor, loss_groups
from projects.cps.evaluate import evaluate_modules, measured, protocol
from projects.cps.state import PROJECT, State, load_modules


def deviations(cfg: Config, dist: Dist) -> list[str]:
    """What differs from the authors' hardware in a way that moves numbers, one line each."""
    paper = cfg.optim.paper_processes
    plan = plan_batch(cfg.optim, dist.world_size)
    lines = []
    if (
        paper
        and cfg.quirks.loss_per_process
        and loss_groups(cfg, plan.per_forward) * dist.world_size * plan.accumulate != paper
    ):
        lines.append(
            f"the supervised loss is taken over {plan.per_forward} images at once, the authors' over "
            f"{cfg.optim.batch_size // paper} of each of {paper} processes"
        )
    if plan.accumulate > 1:
        lines.append(f"{plan.accumulate} forwards per step: BatchNorm sees {plan.per_forward} images at once")
    if paper and loss_divisor(cfg) not in (1, paper):
        lines.append(f"the loss is divided by {loss_divisor(cfg)}, the authors' by {paper} processes")
    return lines


def panels(cfg: Config, state: State, data: TrainingData, log: RunLog, dist: Dist) -> None:
    """Pictures of the first evaluation images; every pseudo-label of these methods is kept."""
    forward = measured(cfg, state.method.modules, cfg.eval.network).predict

    def pseudo(probs: torch.Tensor) -> torch.Tensor:
        return probs.argmax(dim=1)

    log_panels(forward, cfg.data, data.spec, cfg.data.val, log, state.step, dist, pseudo)


def finish(
    cfg: Config, data: TrainingData, state: State, log: RunLog, guard: FiniteGuard, run_dir: Path, dist: Dist
) -> None:
    """Measure the last weights, and `best.pt` where training kept one, and write `result.json`."""
    how, modules = protocol(cfg, "script"), state.method.modules
    last = evaluate_modules(cfg, modules, data.spec, cfg.eval.list, how, dist)
    best, path = last, run_dir / "best.pt"
    if path.is_file():
        load_modules(state.method, load(path), str(path))
        best = evaluate_modules(cfg, modules, data.spec, cfg.eval.list, how, dist)
    in_training: dict[str, Any] = {"best": state.best, "best_epoch": state.best_epoch, "last": state.last}
    report_result(
        cfg, data, log, run_dir, dist, project=PROJECT, method=cfg.method.name, network=cfg.eval.network,
        best=best, last=last, in_training=in_training, steps=state.step,
        skipped_steps=float(guard.cancelled),
    )  # fmt: skip
