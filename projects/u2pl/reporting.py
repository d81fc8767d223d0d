"""What a run says before, during and after training."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.checkpoint import load, load_weights
from common.config import config_hash, dump, plan_batch
from common.data.transforms import EvalTransform
from common.distributed import Dist, max_over_ranks
from common.errors import UserError
from common.evaluation import Evaluation
from common.losses import IGNORE, entropy, masked_percentiles
from common.optim import FiniteGuard
from common.runlog import RunLog, duration, environment, peak_memory_bytes, write_result
from common.schedules import linear_decay
from common.visualize import colorize, heatmap, panel
from projects.u2pl.config import Config
from projects.u2pl.data import TrainingData
from projects.u2pl.evaluate import evaluate_network, protocol
from projects.u2pl.state import State

PANEL_IMAGES = 4


def deviations(cfg: Config, world_size: int) -> list[str]:
    """What differs from the authors' hardware in a way that moves numbers, one line each."""
    paper = cfg.optim.paper_processes
    plan = plan_batch(cfg.optim, world_size)
    lines = []
    if paper and paper != world_size and cfg.method.mode == "semi" and cfg.method.contra_weight > 0:
        if cfg.quirks.contra_reduce == "sum_forward_only":
            weight = cfg.method.contra_weight * world_size / paper
            lines.append(
                f"contrastive gradient is divided by {world_size} processes, the authors' by {paper}; "
                f"method.contra_weight={weight:g} would restore theirs"
            )
        lines.append(
            f"entropy percentiles and class masks are taken per forward of {plan.per_forward} images, the "
            f"authors' per process of {cfg.optim.batch_size // paper}"
        )
    if plan.accumulate > 1:
        lines.append(
            f"{plan.accumulate} forwards per step: BatchNorm sees {plan.per_forward} labeled images at once"
        )
    if cfg.method.criterion == "ohem" and paper and paper != world_size:
        lines.append("OHEM keeps its pixels per forward, so another number of processes keeps other pixels")
    return lines


def announce(
    cfg: Config, data: TrainingData, state: State, log: RunLog, run_dir: Path, dist: Dist, total_steps: int
) -> None:
    """Configuration, places, arithmetic and deviations, once, at the start."""
    plan = plan_batch(cfg.optim, dist.world_size)
    counts = f"{len(data.split.labeled)} labeled"
    counts += f" + {len(data.split.unlabeled)} unlabeled" if data.unlabeled else ""
    log.info(dump(cfg).rstrip())
    log.info(f"run directory: {run_dir}")
    log.info(
        f"{dist.world_size} process(es) on {dist.device.type}; batch {cfg.optim.batch_size} = {dist.world_size} x "
        f"{plan.accumulate} x {plan.per_forward}; {counts} images ({data.split.name}, {data.split.hash[:12]}); "
        f"{data.steps_per_epoch} steps x {cfg.optim.epochs} epochs = {total_steps} steps"
    )
    if state.nets.own_statistics:
        log.info("BatchNorm statistics are those of each process (SyncBatchNorm needs GPUs)")
    for line in deviations(cfg, dist.world_size):
        log.info(f"deviation from the paper: {line}")


@torch.no_grad()
def log_panels(
    cfg: Config, network: Any, data: TrainingData, log: RunLog, step: int, epoch: int, dist: Dist
) -> None:
    """Pictures of the first evaluation images: photo, truth, prediction, kept pseudo-labels, confidence."""
    spec = data.spec
    transform = EvalTransform(mean=cfg.data.mean, std=cfg.data.std, resize=cfg.data.resize)
    drop = 100.0 - (100.0 - cfg.method.drop_percent) * linear_decay(epoch, cfg.optim.epochs)
    network.eval()
    for i, item in enumerate(spec.read_list(cfg.data.val)[:PANEL_IMAGES]):
        image = spec.load_image(item)
        label = spec.load_label(item) if item.label is not None else None
        x, y = transform(image, label)
        probs = network.predict(x[None].to(dist.device)).float().softmax(dim=1)
        conf, pred = probs.max(dim=1)
        values = entropy(probs)
        limit = masked_percentiles(values, torch.ones_like(values, dtype=torch.bool), (drop,))[0]
        pseudo = pred.where(values < limit, IGNORE)
        maps = [m[0].cpu().numpy().astype(np.uint8) for m in (pred, pseudo)]
        shown = image if cfg.data.resize is None else image[: y.shape[0], : y.shape[1]]
        tiles = [shown, *(colorize(m, spec.palette) for m in (y.numpy().astype(np.uint8), *maps))]
        tiles.append(heatmap(conf[0].cpu().numpy()))
        titles = ("image", "ground truth", "prediction", "pseudo-label kept", "confidence")
        log.add_image(f"val/{i}", step, panel(tiles, titles))


def finish(
    cfg: Config, data: TrainingData, state: State, log: RunLog, guard: FiniteGuard, run_dir: Path, dist: Dist
) -> None:
    """Measure the last and the best weights with the configured protocol and write `result.json`."""
    name = "teacher" if cfg.method.mode == "semi" else "student"
    network: Any = getattr(state.nets, name)
    how = protocol(cfg, "script")
    last = evaluate_network(cfg, network, data.spec, cfg.eval.list, how, dist)
    best = last
    if (run_dir / "best.pt").is_file():
        saved = load(run_dir / "best.pt")["networks"]
        load_weights(network, saved.get(name, saved["student"]), str(run_dir / "best.pt"))
        best = evaluate_network(cfg, network, data.spec, cfg.eval.list, how, dist)
    peak = max_over_ranks(torch.tensor(float(peak_memory_bytes(dist))), dist)
    result = {
        "project": "u2pl",
        "method": "u2pl" if cfg.method.mode == "semi" else "sup_only",
        "miou": best.miou,
        "miou_best": best.miou,
        "miou_last": last.miou,
        "best": summary(best, data.spec.classes),
        "last": summary(last, data.spec.classes),
        "in_training": {"best": state.best, "best_epoch": state.best_epoch, "last": state.last},
        "network": name,
        "list": cfg.eval.list,
        "protocol": best.as_dict()["protocol"],
        "split": data.split.name,
        "split_hash": data.split.hash,
        "config_hash": config_hash(cfg),
        "seed": cfg.run.seed,
        "steps": state.step,
        "commit": environment(dist)["commit"],
        "seconds": log.elapsed_s,
        "peak_memory_bytes": int(peak),
        "skipped_files": data.labeled.skipped + (data.unlabeled.skipped if data.unlabeled else 0),
        "skipped_steps": float(guard.cancelled),
    }
    if dist.is_main:
        write_result(run_dir, result)
    log.info(
        f"{cfg.eval.list}: mIoU best {100 * best.miou:.2f} last {100 * last.miou:.2f} ({name}, {how.kind})"
    )
    if cfg.expect.miou is not None:
        log.info(f"published: {cfg.expect.miou:.2f} ({cfg.expect.source})")
    log.info(f"result: {run_dir / 'result.json'}")


def summary(found: Evaluation, classes: tuple[str, ...]) -> dict[str, Any]:
    """The figures of an evaluation for a JSON file; IoUs by class name, all as fractions."""
    return {
        "miou": found.miou,
        "miou_present": found.miou_present,
        "pixel_accuracy": found.pixel_accuracy,
        "iou": dict(zip(classes, found.iou, strict=True)),
        "images": found.num_images,
        "images_not_finite": found.num_nonfinite,
    }


def print_forecast(
    cfg: Config, data: TrainingData, dist: Dist, steps: list[Callable[[], None]], total_steps: int
) -> None:
    """Time the given steps of the heaviest phase after a first one, and say what the whole run will need.

    Raises:
        UserError: the device has too little memory.
    """
    seconds = []
    try:
        for one in steps:
            began = time.perf_counter()
            one()
            if dist.device.type == "cuda":
                torch.cuda.synchronize(dist.device)
            seconds.append(time.perf_counter() - began)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"optim.device_batch={plan_batch(cfg.optim, dist.world_size).per_forward}: the device's memory is too "
            "small for the heaviest step; lower optim.device_batch (accumulation fills the batch) or data.crop_size"
        ) from error
    step_s = min(seconds[1:])
    images = cfg.optim.batch_size * (2 if data.unlabeled else 1)
    if dist.is_main:
        print(  # noqa: T201  (the answer of run.dry_run)
            f"dry run: peak memory {peak_memory_bytes(dist) / 2**30:.2f} GiB per process, {images / step_s:.1f} "
            f"images/s, about {duration(step_s * total_steps)} for {total_steps} steps without evaluation",
            flush=True,
        )
