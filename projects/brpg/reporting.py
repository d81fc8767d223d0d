"""What a run of BRPG says in its own way: deviations from the paper, and pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from common.config import plan_batch
from common.data.spec import IGNORE
from common.numerics.losses import best_class, entropy, masked_percentiles
from common.run.log import RunLog
from projects.brpg.config import Config
from projects.brpg.losses import entropy_percentile
from projects.brpg.state import Run
from tools.training import log_panels


def deviations(cfg: Config, world_size: int) -> list[str]:
    """What differs from the authors' hardware in a way that moves numbers, one line each."""
    paper, method = cfg.optim.paper_processes, cfg.method
    plan = plan_batch(cfg.optim, world_size)
    lines = []
    if paper and paper != world_size and method.mode == "semi":
        if method.prototypes and cfg.quirks.proto_reduce == "sum_forward_only":
            lines.append(
                f"prototype gradient is divided by {world_size} processes, the authors' by {paper}; "
                f"method.proto_weight={method.proto_weight * world_size / paper:g} would restore theirs"
            )
        lines.append(
            f"entropy percentiles are taken per forward of {plan.per_forward} images, the authors' per process of "
            f"{cfg.optim.batch_size // paper}"
        )
    if plan.accumulate > 1:
        lines.append(
            f"{plan.accumulate} forwards per step: BatchNorm sees {plan.per_forward} labeled images at once"
        )
    if method.ohem_weight > 0 and paper and paper != world_size:
        lines.append("OHEM keeps its pixels per forward, so another number of processes keeps other pixels")
    return lines


def show_panels(epoch: int, run: Run, log: RunLog) -> None:
    """Pictures of the first evaluation images with the pseudo-labels that the threshold of `epoch` keeps."""
    cfg, network = run.cfg, getattr(run.nets, run.in_use(epoch)).eval()
    drop = entropy_percentile(cfg.method.drop_percent, epoch, cfg.optim.epochs)

    def kept(probs: Tensor) -> Tensor:
        values = entropy(probs)
        limit = masked_percentiles(values, torch.ones_like(values, dtype=torch.bool), (drop,))[0]
        return best_class(probs).where(values < limit, IGNORE)

    log_panels(network.predict, cfg.data, run.data.spec, cfg.data.val, log, run.step, run.dist, kept)
