"""What a run of s4GAN says beyond what every run says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.config import plan_batch
from common.distributed import Dist
from common.measure.evaluation import Evaluation, Protocol, Refine
from common.models.placing import share_statistics
from common.numerics.losses import best_class
from common.run.checkpoint import kept_path, load
from common.run.log import RunLog
from common.run.session import Session
from projects.s4gan_mlmt.config import Config
from projects.s4gan_mlmt.evaluation import Measured, evaluate_network, full_resolution, fusion_of, protocol
from projects.s4gan_mlmt.state import Run
from tools.training import log_panels, report, summary


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


def show_panels(run: Run, log: RunLog) -> None:
    """Pictures of the first evaluation images; a pseudo-label is kept or dropped for an image as a whole."""
    data = run.cfg.data
    forward = Measured(run.nets.segmenter, data.pipeline).eval().predict
    log_panels(forward, data, run.data.spec, data.val, log, run.step, run.dist, best_class)


def main_weights(cfg: Config, run_dir: Path) -> Path | None:
    """The weights of the main figure: those of `eval.after_steps`, the best of training, or None for the last."""
    if cfg.eval.after_steps is not None:
        return kept_path(run_dir, "step", cfg.eval.after_steps)
    best = run_dir / "best.pt"
    return best if best.is_file() else None


def finish(run: Run, session: Session, scores: Path | None) -> None:
    """Measure the last weights and those of the main figure, and write `result.json`.

    With the image-level branch the figures are those of the fusion; those without it come beside them.

    Args:
        run: the run; its networks end with the weights of the main figure.
        session: says where it goes.
        scores: scores file of the image-level branch for `eval.list`, if it took part.
    """
    cfg, spec, dist, run_dir = run.cfg, run.data.spec, run.dist, session.run_dir
    assert run_dir is not None, "a dry run measures nothing"
    images, how = cfg.eval.list, protocol(cfg, "script")
    fusion = None if scores is None else fusion_of(cfg, scores, spec, images, dist)

    def measured(how: Protocol, refine: Refine | None) -> Evaluation:
        return evaluate_network(cfg, run.nets.segmenter, spec, images, how, dist, refine=refine)

    share_statistics(run.nets.unsynchronized, dist)
    last = plain_last = measured(how, None)
    if fusion is not None:
        last = measured(how, fusion)
    best, plain, path = last, plain_last, main_weights(cfg, run_dir)
    if path is not None:
        run.load_networks(load(path), str(path))
        best = plain = measured(how, None)
        if fusion is not None:
            best = measured(how, fusion)
    extra: dict[str, Any] = {"weights": "last.pt" if path is None else path.relative_to(run_dir).as_posix()}
    whole = full_resolution(cfg)
    if whole is not None:
        extra["full_resolution"] = summary(measured(whole, fusion), spec.classes)
    if scores is not None:
        extra |= fused_entries(cfg, scores, run_dir, summary(plain, spec.classes), plain_last.miou)
        session.log.info(f"fusion: mIoU {100 * plain.miou:.2f} without it, {100 * best.miou:.2f} with it")
    network = "segmentation" if scores is None else "segmentation and mlmt"
    report(session, method=cfg.method.name, network=network, best=best, last=last, extra=extra)


def fused_entries(
    cfg: Config, scores: Path, run_dir: Path, plain: Mapping[str, Any], plain_last: float
) -> dict[str, Any]:
    """What `result.json` says about the fusion, and the figures of the segmentation network without it."""
    place = scores.relative_to(run_dir) if scores.is_relative_to(run_dir) else scores
    return {
        "fusion": {
            "scores": place.as_posix(),
            "mode": cfg.quirks.fusion,
            "threshold": cfg.mlmt.keep_threshold,
        },
        "unfused": dict(plain) | {"miou_last": plain_last},
    }
