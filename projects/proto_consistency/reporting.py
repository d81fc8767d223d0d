"""What a run says in its own way: resolved switches, deviations, use of the prototypes, pictures, the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from common.config import plan_batch
from common.data.streams import TrainingData
from common.distributed import Dist
from common.numerics.losses import IGNORE
from common.numerics.optim import FiniteGuard
from common.numerics.schedules import linear_decay
from common.run.checkpoint import load, load_weights
from common.run.log import RunLog
from common.run.reporting import log_panels, report_result, summary
from projects.proto_consistency.config import Config, proto_start
from projects.proto_consistency.evaluate import (
    evaluate_network,
    further_roles,
    main_head,
    method_name,
    protocol,
    reported_network,
    reported_role,
)
from projects.proto_consistency.losses import select_pixels
from projects.proto_consistency.network import ProtoNetwork
from projects.proto_consistency.prototypes import effective_number
from projects.proto_consistency.state import PROJECT, State


def resolved_switches(cfg: Config) -> list[str]:
    """The choice for every open point of the reconstruction (spec section 11), one line each."""
    method, proto = cfg.method, cfg.prototypes
    if method.mode == "sup_only":
        return [f"11.13 stage before: {cfg.optim.epochs} epochs, criterion {method.criterion}"]
    threshold = {
        "confidence": f"at least {method.confid_thresh:g}",
        "entropy": f"below the percentile {method.drop_percent:g}, rising to 100",
        "none": "every pixel",
    }[method.select]
    lines = [
        f"11.1 pixels of the pseudo-label loss: {method.select} ({threshold})",
        f"11.2 its divisor: {method.norm}",
        f"11.11 share of mixed batches: {method.cutmix_probability:g} ({method.strong_augmentation})",
        f"11.12 the student starts from: {cfg.run.init or cfg.model.weights}",
        f"11.14 weight of the pseudo-label loss: {method.unsup_weight:g}, no ramp",
        f"11.17 teacher: copied {method.teacher_copy}"
        + (", averaged from the start" if method.average_from_start else ""),
    ]
    if proto is None:
        return [*lines, "no prototypes: a mean teacher"]
    place = {
        "file": str(proto.init_path),
        "warmup_end": f"clustered before epoch {method.sup_only_epochs}",
        "random": "standard normal",
    }
    kinds = {"linear": proto.supervised, "unlabeled": proto.unsupervised}
    used = [name for name, on in zip(("labeled", "unlabeled"), kinds.values(), strict=True) if on]
    moved = f"momentum {proto.momentum:g}" if proto.update else "frozen"
    return [
        *lines,
        f"11.4 pixels of the prototype loss of unlabeled images: {proto.select}",
        f"11.5 first prototypes: {proto.source} ({place[proto.source]}), {'unit' if proto.normalize else 'raw'} "
        f"features, at most {proto.pixels_per_image} per class and image, {proto.pixels_per_class} per class, "
        f"seed {proto.seed}",
        f"11.6 prototypes active from epoch {proto_start(method)}",
        f"11.7 prototypes of several processes: {proto.sync}",
        f"11.8 features of the update: {proto.update_source}",
        f"11.9 unlabeled pixels in the update: {'yes' if proto.update_unlabeled else 'no'}",
        f"11.10 the teacher's prototypes: {proto.teacher_proto}",
        f"11.15 temperature {proto.temperature:g}",
        f"prototypes: {proto.per_class} per class, {moved}, weight {proto.weight:g}, "
        f"losses of {' and '.join(used) or 'no'} pixels, {proto.granularity} x {proto.granularity} places",
    ]


def deviations(cfg: Config, world_size: int) -> list[str]:
    """What differs from the authors' hardware in a way that moves numbers, one line each."""
    paper, proto = cfg.optim.paper_processes, cfg.prototypes
    plan = plan_batch(cfg.optim, world_size)
    lines = []
    if paper and paper != world_size and proto is not None and proto.sync == "local":
        lines.append(
            f"the published prototypes move by {cfg.optim.batch_size // world_size} labeled and as many unlabeled "
            f"images of a step, the authors' by {cfg.optim.batch_size // paper}"
        )
    if paper and paper != world_size and proto is not None and cfg.quirks.one_mask:
        lines.append(
            f"one drawing of places serves a forward of {plan.per_forward} labeled images, the authors' one of "
            f"{cfg.optim.batch_size // paper}"
        )
    if plan.accumulate > 1:
        lines.append(
            f"{plan.accumulate} forwards per step: BatchNorm sees {plan.per_forward} labeled images at once"
        )
    if cfg.method.criterion == "ohem" and paper and paper != world_size:
        lines.append("OHEM keeps its pixels per forward, so another number of processes keeps other pixels")
    return lines


def report_usage(state: State, names: tuple[str, ...], log: RunLog, epoch: int, dist: Dist) -> None:
    """Say how many pixels each prototype got since the last time; a collective.

    A class whose pixels all go to one prototype has an effective number of 1: the others are out of use, for which
    there is no remedy in the method. Classes without any pixel are left out of the figures.
    """
    if state.nets.movement is None:
        return
    counts = state.nets.movement.take_usage(dist).cpu()
    state.usage = {name: [int(n) for n in row] for name, row in zip(names, counts.tolist(), strict=True)}
    effective = effective_number(counts)
    seen = effective > 0
    if not bool(seen.any()):
        return
    found = {
        "prototypes_in_use": float(effective[seen].mean()),
        "prototypes_in_use_min": float(effective[seen].min()),
    }
    log.scalars(state.step, {"epoch": epoch, **found, "classes_with_pixels": float(seen.sum())})
    for name, row, number in zip(names, counts, effective, strict=True):
        shares = " ".join(f"{100 * float(share):.0f}" for share in row / row.sum().clamp(min=1))
        log.info(
            f"prototypes of {name}: {shares} % of {int(row.sum())} pixels, effective number {float(number):.2f}"
        )


def show_panels(
    cfg: Config,
    network: ProtoNetwork,
    data: TrainingData,
    log: RunLog,
    step: int,
    epoch: int,
    dist: Dist,
) -> None:
    """Pictures of the first evaluation images with the pseudo-labels that the selection of `epoch` keeps."""
    method = cfg.method
    drop = 100.0 - (100.0 - method.drop_percent) * linear_decay(epoch, cfg.optim.epochs)

    def kept(probs: Tensor) -> Tensor:
        conf, labels = probs.max(dim=1)
        chosen = select_pixels(
            conf, labels, select=method.select, confid_thresh=method.confid_thresh, logits_teacher=probs.log(),
            drop_percent=drop,
        )  # fmt: skip
        return labels.where(chosen, IGNORE)

    network.eval()
    log_panels(network.predict, cfg.data, data.spec, cfg.data.val, log, step, dist, kept)


def finish(
    cfg: Config, data: TrainingData, state: State, log: RunLog, guard: FiniteGuard, run_dir: Path, dist: Dist
) -> None:
    """Measure the last and the best weights with the configured protocol and write `result.json`."""
    name, head = reported_network(cfg), main_head(cfg)
    network: ProtoNetwork = getattr(state.nets, name)
    how = protocol(cfg, "script")
    extra: dict[str, Any] = {} if state.usage is None else {"prototype_usage": state.usage}
    both = further_roles(cfg) != ()

    def other(label: str) -> None:
        if both:
            found = evaluate_network(cfg, network, data.spec, cfg.eval.list, how, dist, "proto")
            extra[f"proto_{label}"] = summary(found, data.spec.classes)
            log.info(f"{cfg.eval.list}: mIoU of the prototype head, {label} weights: {100 * found.miou:.2f}")

    last = evaluate_network(cfg, network, data.spec, cfg.eval.list, how, dist, head)
    other("last")
    best = last
    if (run_dir / "best.pt").is_file():
        saved = load(run_dir / "best.pt")["networks"]
        load_weights(network, saved.get(name, saved["student"]), str(run_dir / "best.pt"))
        best = evaluate_network(cfg, network, data.spec, cfg.eval.list, how, dist, head)
        other("best")
    elif both:
        extra["proto_best"] = extra["proto_last"]
    report_result(
        cfg, data, log, run_dir, dist, project=PROJECT, method=method_name(cfg), network=reported_role(cfg),
        best=best, last=last,
        in_training={"best": state.best, "best_epoch": state.best_epoch, "last": state.last},
        steps=state.step, skipped_steps=float(guard.cancelled), extra=extra,
    )  # fmt: skip
