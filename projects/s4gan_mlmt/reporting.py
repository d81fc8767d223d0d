"""What a run of s4GAN says beyond what every run says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from common.config import plan_batch
from common.data.streams import TrainingData
from common.distributed import Dist
from common.measure.evaluation import Evaluation, Protocol, Refine
from common.numerics.optim import FiniteGuard
from common.run.checkpoint import load
from common.run.log import RunLog
from common.run.reporting import log_panels, report_result, summary
from projects.s4gan_mlmt.config import Config
from projects.s4gan_mlmt.evaluate import Measured, evaluate_network, full_resolution, fusion_of, protocol
from projects.s4gan_mlmt.state import PROJECT, State, kept_path, load_networks


def deviations(cfg: Config, dist: Dist) -> list[str]:
    """What differs from the authors' run in a way that moves numbers, one line each."""
    plan = plan_batch(cfg.optim, dist.world_size)
    lines = []
    if plan.accumulate > 1:
        lines.append(
            f"{plan.accumulate} forwards per step: BatchNorm, the ranges of the images and the means of the features "
            f"see {plan.per_forward * dist.world_size} images at once"
        )
    return lines


def panels(cfg: Config, state: State, data: TrainingData, log: RunLog, dist: Dist) -> None:
    """Pictures of the first evaluation images; a pseudo-label is kept or dropped for an image as a whole."""

    def pseudo(probs: Tensor) -> Tensor:
        return probs.argmax(dim=1)

    forward = Measured(state.segmenter, cfg.data.pipeline).eval().predict
    log_panels(forward, cfg.data, data.spec, cfg.data.val, log, state.step, dist, pseudo)


def main_weights(cfg: Config, run_dir: Path) -> Path | None:
    """The weights of the main figure: those of `eval.after_steps`, the best of training, or None for the last."""
    if cfg.eval.after_steps is not None:
        return kept_path(run_dir, cfg.eval.after_steps)
    best = run_dir / "best.pt"
    return best if best.is_file() else None


def finish(
    cfg: Config,
    data: TrainingData,
    state: State,
    log: RunLog,
    guard: FiniteGuard,
    run_dir: Path,
    dist: Dist,
    scores: Path | None = None,
) -> None:
    """Measure the last weights and those of the main figure, and write `result.json`.

    With the image-level branch the figures are those of the fusion; those without it come beside them.

    Args:
        cfg: the run's configuration.
        data: its loaders.
        state: its networks; they end with the weights of the main figure.
        log: where to say it.
        guard: how many steps were left out.
        run_dir: its folder.
        dist: this process.
        scores: scores file of the image-level branch for `eval.list`, if it took part.
    """
    images, how = cfg.eval.list, protocol(cfg, "script")
    fusion = None if scores is None else fusion_of(cfg, scores, data.spec, images, dist)

    def measured(protocol: Protocol, refine: Refine | None) -> Evaluation:
        return evaluate_network(cfg, state.segmenter, data.spec, images, protocol, dist, refine=refine)

    last = plain_last = measured(how, None)
    if fusion is not None:
        last = measured(how, fusion)
    best, plain, path = last, plain_last, main_weights(cfg, run_dir)
    if path is not None:
        load_networks(state, load(path), str(path))
        best = plain = measured(how, None)
        if fusion is not None:
            best = measured(how, fusion)
    extra: dict[str, Any] = {"weights": "last.pt" if path is None else path.relative_to(run_dir).as_posix()}
    whole = full_resolution(cfg)
    if whole is not None:
        extra["full_resolution"] = summary(measured(whole, fusion), data.spec.classes)
    if scores is not None:
        extra |= fused_entries(cfg, scores, run_dir, summary(plain, data.spec.classes), plain_last.miou)
        log.info(f"fusion: mIoU {100 * plain.miou:.2f} alone, {100 * best.miou:.2f} fused")
    in_training = {"best": state.best, "best_epoch": state.best_epoch, "last": state.last}
    network = "segmentation" if scores is None else "segmentation and mlmt"
    report_result(
        cfg, data, log, run_dir, dist, project=PROJECT, method=cfg.method.name, network=network, best=best, last=last,
        in_training=in_training, steps=state.step, skipped_steps=float(guard.cancelled), extra=extra,
    )  # fmt: skip


def fused_entries(
    cfg: Config, scores: Path, run_dir: Path, plain: Mapping[str, Any], plain_last: float
) -> dict[str, Any]:
    """What `result.json` says about the fusion, with the figures of the segmentation network alone."""
    place = scores.relative_to(run_dir) if scores.is_relative_to(run_dir) else scores
    return {
        "fusion": {
            "scores": place.as_posix(),
            "mode": cfg.quirks.fusion,
            "threshold": cfg.mlmt.keep_threshold,
        },
        "unfused": dict(plain) | {"miou_last": plain_last},
    }
