"""What a run of UniMatch says in its own way: deviations from the papers, and pictures."""

from __future__ import annotations

from torch import Tensor

from common.config import plan_batch
from common.data.spec import IGNORE
from common.run.log import RunLog
from projects.unimatch.config import Config
from projects.unimatch.state import Run
from tools.training import log_panels


def deviations(cfg: Config, world_size: int) -> list[str]:
    """What differs from the authors' hardware in a way that moves numbers, one line each."""
    paper, plan = cfg.optim.paper_processes, plan_batch(cfg.optim, world_size)
    lines = []
    if paper and plan.per_forward * paper != cfg.optim.batch_size:
        share = cfg.optim.batch_size // paper
        lines.append(
            f"losses are divided by the pixels of {plan.per_forward} images at once, the authors' by those of {share}"
        )
        if cfg.method.criterion == "ohem":
            lines.append("OHEM keeps its pixels per forward, so another number of images keeps other pixels")
    if plan.accumulate > 1 and not cfg.model.is_dpt:
        lines.append(
            f"{plan.accumulate} forwards per step: BatchNorm sees {plan.per_forward} labeled images at once"
        )
    return lines


def show_panels(run: Run, log: RunLog) -> None:
    """Pictures of the first evaluation images with the pseudo-labels that reach the threshold."""
    cfg, network = run.cfg, getattr(run.nets, run.reported).eval()

    def kept(probs: Tensor) -> Tensor:
        conf, label = probs.max(dim=1)
        return label.where(conf >= cfg.method.threshold, IGNORE)

    log_panels(network.predict, cfg.data, run.data.spec, cfg.data.val, log, run.step, run.dist, kept)
