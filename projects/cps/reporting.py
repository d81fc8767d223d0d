"""What a run of CPS says beyond what every run says."""

from __future__ import annotations

from common.config import plan_batch
from common.numerics.losses import best_class
from common.run.checkpoint import load
from common.run.log import RunLog
from common.run.session import Session
from projects.cps.config import Config, loss_divisor, loss_groups
from projects.cps.evaluate import evaluate_modules, measured, protocol
from projects.cps.state import Run
from tools.training import log_panels, report


def deviations(cfg: Config, world_size: int) -> list[str]:
    """What differs from the authors' hardware in a way that moves numbers, one line each."""
    paper = cfg.optim.paper_processes
    plan = plan_batch(cfg.optim, world_size)
    lines = []
    if (
        paper
        and cfg.quirks.loss_per_process
        and loss_groups(cfg, plan.per_forward) * world_size * plan.accumulate != paper
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


def show_panels(run: Run, log: RunLog) -> None:
    """Pictures of the first evaluation images; every pseudo-label of these methods is kept."""
    cfg = run.cfg
    forward = measured(cfg, run.nets.modules, cfg.eval.network).predict
    log_panels(forward, cfg.data, run.data.spec, cfg.data.val, log, run.step, run.dist, best_class)


def finish(run: Run, session: Session) -> None:
    """Measure the last weights, and `best.pt` where training kept one, and write `result.json`."""
    assert session.run_dir is not None, "a dry run measures nothing"
    cfg, modules, how = run.cfg, run.nets.modules, protocol(run.cfg, "script")
    run.nets.share_statistics(run.dist)
    last = evaluate_modules(cfg, modules, run.data.spec, cfg.eval.list, how, run.dist)
    best, path = last, session.run_dir / "best.pt"
    if path.is_file():
        run.load_networks(load(path), str(path))
        best = evaluate_modules(cfg, modules, run.data.spec, cfg.eval.list, how, run.dist)
    report(session, method=cfg.method.name, network=cfg.eval.network, best=best, last=last)
