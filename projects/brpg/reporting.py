"""What a run of BRPG says in its own way: deviations from the paper, pictures, the result."""

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
from common.run.checkpoint import load, load_weights
from common.run.log import RunLog
from common.run.reporting import log_panels, report_result
from projects.brpg.config import Config
from projects.brpg.evaluate import evaluate_network, method_name, protocol, reported_network
from projects.brpg.losses import entropy_percentile
from projects.brpg.state import PROJECT, State


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
    drop = entropy_percentile(cfg.method.drop_percent, epoch, cfg.optim.epochs)

    def kept(probs: Tensor) -> Tensor:
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
