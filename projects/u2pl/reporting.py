"""What a run of U2PL says in its own way: deviations from the paper, pictures, the result."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from common.config import plan_batch
from common.data.streams import TrainingData
from common.distributed import Dist
from common.models.deeplab import SegmentationNetwork
from common.numerics.losses import IGNORE, entropy, masked_percentiles
from common.numerics.optim import FiniteGuard
from common.numerics.schedules import linear_decay
from common.run.checkpoint import load, load_weights
from common.run.log import RunLog
from common.run.reporting import log_panels, report_result
from projects.u2pl.ael import unlabeled_targets
from projects.u2pl.config import Config
from projects.u2pl.evaluate import evaluate_network, method_name, protocol, reported_network
from projects.u2pl.state import PROJECT, State


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


def show_panels(
    cfg: Config,
    network: SegmentationNetwork,
    data: TrainingData,
    log: RunLog,
    step: int,
    epoch: int,
    dist: Dist,
) -> None:
    """Pictures of the first evaluation images with the pseudo-labels that the threshold of `epoch` keeps."""
    left, ael = linear_decay(epoch, cfg.optim.epochs), cfg.method.ael
    drop = 100.0 - (100.0 - cfg.method.drop_percent) * left

    def kept(probs: Tensor) -> Tensor:
        if ael is not None:
            share = cfg.method.low_entropy_threshold * left
            return unlabeled_targets(probs.log(), share, 0.0, 100.0, ael.drop_low_entropy).pseudo
        values = entropy(probs)
        limit = masked_percentiles(values, torch.ones_like(values, dtype=torch.bool), (drop,))[0]
        return probs.argmax(dim=1).where(values < limit, IGNORE)

    network.eval()
    log_panels(network.predict, cfg.data, data.spec, cfg.data.val, log, step, dist, kept)


def finish(
    cfg: Config, data: TrainingData, state: State, log: RunLog, guard: FiniteGuard, run_dir: Path, dist: Dist
) -> None:
    """Measure the last and the best weights with the configured protocol and write `result.json`."""
    name = reported_network(cfg)
    network: SegmentationNetwork = getattr(state.nets, name)
    how = protocol(cfg, "script")
    last = evaluate_network(cfg, network, data.spec, cfg.eval.list, how, dist)
    best = last
    if (run_dir / "best.pt").is_file():
        saved = load(run_dir / "best.pt")["networks"]
        load_weights(network, saved.get(name, saved["student"]), str(run_dir / "best.pt"))
        best = evaluate_network(cfg, network, data.spec, cfg.eval.list, how, dist)
    report_result(
        cfg, data, log, run_dir, dist, project=PROJECT, method=method_name(cfg), network=name, best=best, last=last,
        in_training={"best": state.best, "best_epoch": state.best_epoch, "last": state.last},
        steps=state.step, skipped_steps=float(guard.cancelled),
    )  # fmt: skip
