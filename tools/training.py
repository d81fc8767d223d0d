"""What every training script says before the loop, shows while it runs, and writes at its end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from common.config import DataConfig, dump, plan_batch
from common.data.files import remarks
from common.data.spec import DatasetSpec
from common.data.split import Split
from common.data.transforms import EvalTransform
from common.distributed import Dist, max_over_ranks
from common.errors import UserError
from common.measure.evaluation import Evaluation
from common.measure.inference import Forward
from common.run.log import RunLog, duration, write_json
from common.run.session import Session
from splits.pictures import colorize, panel
from tools.environment import code_of, config_hash, environment, peak_memory_bytes
from tools.pictures import heatmap

PANEL_IMAGES = 4
LOOKED_AT = 200  # photos, before a training on own data


def announce(
    session: Session,
    deviations: Sequence[str] = (),
    notes: Sequence[str] = (),
    *,
    unsynchronized: bool = False,
) -> None:
    """Say once what is going to be trained on what, write the configuration, start the clock.

    Args:
        session: of the run.
        deviations: what differs from the authors' hardware in a way that moves numbers, one line each.
        notes: other lines worth saying.
        unsynchronized: whether each of several processes computes BatchNorm on its own batch.
    """
    run, cfg, dist, split = session.run, session.run.cfg, session.dist, session.run.data.split
    plan, say = plan_batch(cfg.optim, dist.world_size), session.log.info
    counts = f"{len(split.labeled)} labeled"
    counts += f" + {len(split.unlabeled)} unlabeled" if len(run.data.loaders) > 1 else ""
    say(dump(cfg).rstrip())
    say(f"run directory: {session.run_dir}")
    say(f"data: {run.data.spec.root or 'generated'}")
    say(
        f"{dist.world_size} process(es) on {dist.device.type}; batch {cfg.optim.batch_size} = {dist.world_size} x "
        f"{plan.accumulate} x {plan.per_forward}; {counts} images ({split.name}, {split.hash[:12]}); "
        f"{run.data.steps_per_epoch} steps x {cfg.optim.epochs} epochs = {run.total_steps} steps"
    )
    if unsynchronized:
        say("BatchNorm statistics are those of each process (SyncBatchNorm needs GPUs)")
    notes = [*notes, *(f"note: {line}" for line in own_data_notes(cfg, run.data.spec, split))]
    for line in (*(f"deviation from the paper: {one}" for one in deviations), *notes):
        say(line)
    begin(session)


def begin(session: Session) -> None:
    """Start the clock, and write to `env.json` what the run is made by, with the code as it is now."""
    session.begin()
    session.made_by = environment(session.dist) | {"code": code_of(session.run.cfg)}
    if session.dist.is_main and session.run_dir is not None:
        write_json(session.run_dir / "env.json", session.made_by)


def quirks_of(cfg: Any) -> dict[str, bool]:
    """Which quirks of the authors' code are on: fields of `cfg.quirks` that are true, or not the last of their choices,
    and what a project's `config.further_quirks` knows besides.
    """
    section, module = getattr(cfg, "quirks", None), import_module(type(cfg).__module__)
    found: dict[str, bool] = {}
    for name, hint in {} if section is None else get_type_hints(type(section)).items():
        value = getattr(section, name)
        found[name] = value is True or (get_origin(hint) is Literal and value != get_args(hint)[-1])
    return found | (module.further_quirks(cfg) if hasattr(module, "further_quirks") else {})


def own_data_notes(cfg: Any, spec: DatasetSpec, split: Split) -> list[str]:
    """What the owner of photos should know before a training: quirks that are on, and what reading them changes."""
    if spec.built_in:
        return []
    on = [name for name, value in quirks_of(cfg).items() if value]
    notes = []
    if on:
        notes.append(
            f"quirks of the authors' code are on, which own data should not have ({', '.join(on)}); "
            "configs/own.yaml has none"
        )
    items = split.labeled + split.unlabeled
    seen = items[:: len(items) // LOOKED_AT + 1]
    met = Counter(
        one
        for item in seen
        for one in remarks(item.image, upright=spec.upright, value_range=spec.value_range)
    )
    for remark, times in met.most_common():
        view = "; masks must be drawn on that view, else see 'orientation' in dataset.yaml" * (
            "orientation" in remark
        )
        notes.append(f"{times} of {len(seen)} photos looked at: {remark}{view}")
    return notes


def forecast(session: Session, steps: Sequence[Callable[[], object]]) -> None:
    """The answer of `run.dry_run`: time steps of the heaviest phase after a first one, and say what the run will need.

    Each begins where the run stands now, so that a short epoch does not end under them.

    Raises:
        UserError: the device has too little memory.
    """
    run, dist, begin, seconds = session.run, session.dist, session.run.step, []
    try:
        for step in steps:
            run.step = begin
            began = time.perf_counter()
            step()
            if dist.device.type == "cuda":
                torch.cuda.synchronize(dist.device)
            seconds.append(time.perf_counter() - began)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"optim.device_batch={plan_batch(run.cfg.optim, dist.world_size).per_forward}: the device's memory is "
            "too small for the heaviest step; lower optim.device_batch (accumulation fills the batch) or "
            "data.crop_size"
        ) from error
    step_s = min(seconds[1:])
    name = f"dry run of {session.name}" if session.name else "dry run"
    if dist.is_main:
        print(  # noqa: T201
            f"{name}: peak memory {peak_memory_bytes(dist) / 2**30:.2f} GiB per process, {1000 * step_s:.0f} ms per "
            f"step, {run.images_per_step / step_s:.1f} images/s, about {duration(step_s * run.total_steps)} for "
            f"{run.total_steps} steps without evaluation",
            flush=True,
        )


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
        forward: Scores (1, K, H, W) of a normalized image (1, 3, H, W), by a network in evaluation mode.
        data: How images are normalized.
        spec: The dataset.
        images: Name of the list, or its path.
        log: Receives the pictures.
        step: Optimizer steps done.
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


def report(
    session: Session,
    *,
    method: str,
    network: str,
    best: Evaluation,
    last: Evaluation,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write `result.json` and say the figures; a collective.

    Args:
        session: of the run.
        method: name of the method or baseline within the project.
        network: role of the measured network.
        best: figures of the best weights of the run, by the script's protocol; `miou` of the result is theirs.
        last: figures of the weights at its end.
        extra: more entries, which come last.

    Raises:
        UserError: the file cannot be written.
    """
    assert session.run_dir is not None, "a dry run leaves nothing behind"
    run, cfg, data = session.run, session.run.cfg, session.run.data
    peak = max_over_ranks(torch.tensor(float(peak_memory_bytes(session.dist))), session.dist)
    result = {
        "project": session.project,
        "method": method,
        "miou": best.miou,
        "miou_best": best.miou,
        "miou_last": last.miou,
        "best": summary(best, data.spec.classes),
        "last": summary(last, data.spec.classes),
        "in_training": {"best": run.best, "best_epoch": run.best_epoch, "last": run.last},
        "network": network,
        "list": cfg.eval.list,
        "protocol": asdict(best.protocol),
        "split": data.split.name,
        "split_hash": data.split.hash,
        "truth": session.measured_on(cfg.eval.list),
        "labeled": len(data.split.labeled),
        "unlabeled": len(data.split.unlabeled),
        "config_hash": config_hash(cfg),
        "seed": cfg.run.seed,
        "steps": run.step,
        "commit": session.made_by.get("commit"),
        "code": session.made_by.get("code"),
        "seconds": session.log.elapsed_s,
        "peak_memory_bytes": int(peak),
        "skipped_files": data.skipped,
        "skipped_steps": float(session.guard.cancelled),
        **(extra or {}),
    }
    if session.dist.is_main:
        write_json(session.run_dir / "result.json", result)
    session.log.info(
        f"{cfg.eval.list}: mIoU best {100 * best.miou:.2f} last {100 * last.miou:.2f} "
        f"({network}, {best.protocol.kind})"
    )
    if cfg.expect.miou is not None:
        session.log.info(f"published: {cfg.expect.miou:.2f} ({cfg.expect.source})")
    session.log.info(f"result: {session.run_dir / 'result.json'}")


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
