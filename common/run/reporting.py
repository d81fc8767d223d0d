"""What a run says before, during and after training."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.config import DataConfig, ProjectConfig, config_hash, dump, plan_batch
from common.data.spec import DatasetSpec
from common.data.streams import TrainingData
from common.data.transforms import EvalTransform
from common.distributed import Dist, max_over_ranks
from common.errors import UserError
from common.measure.evaluation import Evaluation
from common.measure.inference import Forward
from common.measure.pictures import colorize, heatmap, panel
from common.run.log import RunLog, duration, environment, peak_memory_bytes, write_result

PANEL_IMAGES = 4


def announce(
    cfg: ProjectConfig,
    data: TrainingData,
    log: RunLog,
    run_dir: Path | None,
    dist: Dist,
    total_steps: int,
    deviations: Sequence[str] = (),
    *,
    own_statistics: bool = False,
) -> None:
    """Configuration, places, arithmetic and deviations, once, at the start.

    Args:
        cfg: The run's configuration.
        data: Its loaders.
        log: Where to say it.
        run_dir: Its folder.
        dist: This process.
        total_steps: Optimiser steps of the whole run.
        deviations: What differs from the authors' hardware in a way that moves numbers, one line each.
        own_statistics: Whether each of several processes computes BatchNorm on its own batch.
    """
    plan = plan_batch(cfg.optim, dist.world_size)
    counts = f"{len(data.split.labeled)} labeled"
    counts += f" + {len(data.split.unlabeled)} unlabeled" if len(data.loaders) > 1 else ""
    log.info(dump(cfg).rstrip())
    log.info(f"run directory: {run_dir}")
    log.info(
        f"{dist.world_size} process(es) on {dist.device.type}; batch {cfg.optim.batch_size} = {dist.world_size} x "
        f"{plan.accumulate} x {plan.per_forward}; {counts} images ({data.split.name}, {data.split.hash[:12]}); "
        f"{data.steps_per_epoch} steps x {cfg.optim.epochs} epochs = {total_steps} steps"
    )
    if own_statistics:
        log.info("BatchNorm statistics are those of each process (SyncBatchNorm needs GPUs)")
    for line in deviations:
        log.info(f"deviation from the paper: {line}")


def summary(found: Evaluation, classes: Sequence[str]) -> dict[str, Any]:
    """The figures of an evaluation for a JSON file; IoUs by class name, all as fractions."""
    return {
        "miou": found.miou,
        "miou_present": found.miou_present,
        "pixel_accuracy": found.pixel_accuracy,
        "iou": dict(zip(classes, found.iou, strict=True)),
        "images": found.num_images,
        "images_not_finite": found.num_nonfinite,
    }


def report_result(
    cfg: ProjectConfig,
    data: TrainingData,
    log: RunLog,
    run_dir: Path,
    dist: Dist,
    *,
    project: str,
    method: str,
    network: str,
    best: Evaluation,
    last: Evaluation,
    in_training: Mapping[str, Any],
    steps: int,
    skipped_steps: float,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write `result.json` and say the figures; a collective.

    Args:
        cfg: The run's configuration.
        data: Its loaders.
        log: Where to say it.
        run_dir: Its folder.
        dist: This process.
        project: Name of the project.
        method: Name of the method or baseline within it.
        network: Role of the measured network.
        best: Figures of the best weights of the run, by the script's protocol; `miou` of the result is theirs.
        last: Figures of the weights at its end.
        in_training: What the evaluations while training found.
        steps: Optimiser steps done.
        skipped_steps: Steps that were left out because a loss was not finite.
        extra: More entries, which come last.

    Raises:
        UserError: the file cannot be written.
    """
    peak = max_over_ranks(torch.tensor(float(peak_memory_bytes(dist))), dist)
    result = {
        "project": project,
        "method": method,
        "miou": best.miou,
        "miou_best": best.miou,
        "miou_last": last.miou,
        "best": summary(best, data.spec.classes),
        "last": summary(last, data.spec.classes),
        "in_training": in_training,
        "network": network,
        "list": cfg.eval.list,
        "protocol": best.as_dict()["protocol"],
        "split": data.split.name,
        "split_hash": data.split.hash,
        "labeled": len(data.split.labeled),
        "unlabeled": len(data.split.unlabeled),
        "config_hash": config_hash(cfg),
        "seed": cfg.run.seed,
        "steps": steps,
        "commit": environment(dist)["commit"],
        "seconds": log.elapsed_s,
        "peak_memory_bytes": int(peak),
        "skipped_files": data.skipped,
        "skipped_steps": skipped_steps,
        **(extra or {}),
    }
    if dist.is_main:
        write_result(run_dir, result)
    log.info(
        f"{cfg.eval.list}: mIoU best {100 * best.miou:.2f} last {100 * last.miou:.2f} "
        f"({network}, {best.protocol.kind})"
    )
    if cfg.expect.miou is not None:
        log.info(f"published: {cfg.expect.miou:.2f} ({cfg.expect.source})")
    log.info(f"result: {run_dir / 'result.json'}")


@torch.no_grad()
def log_panels(
    forward: Forward,
    data: DataConfig,
    spec: DatasetSpec,
    images: str,
    log: RunLog,
    step: int,
    dist: Dist,
    pseudo: Callable[[Tensor], Tensor],
) -> None:
    """Pictures of the first images of a list: photo, truth, prediction, kept pseudo-labels, confidence.

    Args:
        forward: Scores (1, K, H, W) of a normalised image (1, 3, H, W), by a network in evaluation mode.
        data: How images are normalised.
        spec: The dataset.
        images: Name of the list, or its path.
        log: Receives the pictures.
        step: Optimiser steps done.
        dist: This process; one is enough.
        pseudo: Pseudo-labels (1, H, W), 255 where none is kept, of class probabilities (1, K, H, W) float32.
    """
    transform = EvalTransform(mean=data.mean, std=data.std, resize=data.resize)
    for i, item in enumerate(spec.read_list(images)[:PANEL_IMAGES]):
        image = spec.load_image(item)
        label = spec.load_label(item) if item.label is not None else None
        x, y = transform(image, label)
        probs = forward(x[None].to(dist.device)).float().softmax(dim=1)
        conf, pred = probs.max(dim=1)
        maps = [m[0].cpu().numpy().astype(np.uint8) for m in (pred, pseudo(probs))]
        shown = image if data.resize is None else image[: y.shape[0], : y.shape[1]]
        tiles = [shown, *(colorize(m, spec.palette) for m in (y.numpy().astype(np.uint8), *maps))]
        tiles.append(heatmap(conf[0].cpu().numpy()))
        titles = ("image", "ground truth", "prediction", "pseudo-label kept", "confidence")
        log.add_image(f"val/{i}", step, panel(tiles, titles))


def print_forecast(
    cfg: ProjectConfig,
    images_per_step: int,
    dist: Dist,
    steps: Sequence[Callable[[], object]],
    total_steps: int,
    of: str = "",
) -> None:
    """Time the given steps of the heaviest phase after a first one, and say what the whole run (`of` what) will need.

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
    name = f"dry run of {of}" if of else "dry run"
    if dist.is_main:
        print(  # noqa: T201  (the answer of run.dry_run)
            f"{name}: peak memory {peak_memory_bytes(dist) / 2**30:.2f} GiB per process, "
            f"{images_per_step / step_s:.1f} images/s, about {duration(step_s * total_steps)} for {total_steps} steps "
            "without evaluation",
            flush=True,
        )
