"""What a run of U2PL says in its own way: deviations from the paper, and pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from common.config import plan_batch
from common.data.spec import IGNORE
from common.numerics.losses import best_class, entropy, masked_percentiles
from common.numerics.optim import linear_decay
from common.run.log import RunLog
from projects.u2pl.ael.losses import unlabeled_targets
from projects.u2pl.config import Config
from projects.u2pl.state import Run
from tools.training import log_panels


def deviations(cfg: Config, world_size: int) -> list[str]:
    """What differs from the authors' hardware in a way that moves numbers, one line each."""
    paper = cfg.optim.paper_processes
    plan = plan_batch(cfg.optim, world_size)
    ael = cfg.method.ael
    lines = []
    if paper and paper != world_size and ael is not None and ael.divide_by_ranks:
        lines.append(
            f"every loss is divided by {world_size} processes, the authors' by {paper}; "
            f"optim.lr={cfg.optim.lr * world_size / paper:g} would restore their effective rate"
        )
    if paper and paper != world_size and cfg.method.mode == "semi" and cfg.method.contra_weight > 0:
        if cfg.quirks.contra_reduce == "sum_forward_only":
            weight = cfg.method.contra_weight * world_size / paper
            lines.append(
                f"contrastive gradient is divided by {world_size} processes, the authors' by {paper}; "
                f"method.contra_weight={weight:g} would restore theirs"
            )
        mixed = 1 if ael is None else 2  # images that become one
        lines.append(
            f"entropy percentiles and class masks are taken per forward of {plan.per_forward // mixed} images, the "
            f"authors' per process of {cfg.optim.batch_size // paper // mixed}"
        )
    if plan.accumulate > 1:
        lines.append(
            f"{plan.accumulate} forwards per step: BatchNorm sees {plan.per_forward} labeled images at once"
        )
    if cfg.method.criterion == "ohem" and paper and paper != world_size:
        lines.append("OHEM keeps its pixels per forward, so another number of processes keeps other pixels")
    return lines


def show_panels(epoch: int, run: Run, log: RunLog) -> None:
    """Pictures of the first evaluation images with the pseudo-labels that the threshold of `epoch` keeps."""
    cfg, network = run.cfg, getattr(run.nets, run.in_use(epoch)).eval()
    left, ael = linear_decay(epoch, cfg.optim.epochs), cfg.method.ael
    drop = 100.0 - (100.0 - cfg.method.drop_percent) * left

    def kept(probs: Tensor) -> Tensor:
        if ael is not None:
            share = cfg.method.low_entropy_threshold * left
            return unlabeled_targets(probs.log(), share, 0.0, 100.0, ael.drop_low_entropy).pseudo
        values = entropy(probs)
        limit = masked_percentiles(values, torch.ones_like(values, dtype=torch.bool), (drop,))[0]
        return best_class(probs).where(values < limit, IGNORE)

    log_panels(network.predict, cfg.data, run.data.spec, cfg.data.val, log, run.step, run.dist, kept)
