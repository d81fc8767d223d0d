"""What a run says in its own way: resolved switches, deviations, use of the prototypes, pictures."""

from __future__ import annotations

from torch import Tensor

from common.config import plan_batch
from common.data.spec import IGNORE
from common.numerics.optim import linear_decay
from common.run.log import RunLog
from projects.proto_consistency.config import Config, ProtoConfig, proto_start
from projects.proto_consistency.losses import select_pixels
from projects.proto_consistency.prototypes import effective_number
from projects.proto_consistency.state import Run
from tools.training import log_panels


def resolved_switches(cfg: Config) -> dict[str, str]:
    """The choice for every open point of the reconstruction, by its name in the README's table "Open points"."""
    method, proto = cfg.method, cfg.prototypes
    if method.mode == "sup_only":
        return {"the stage before": f"{cfg.optim.epochs} epochs, criterion {method.criterion}"}
    threshold = {
        "confidence": f"at least {method.confid_thresh:g}",
        "entropy": f"below the percentile {method.drop_percent:g}, rising to 100",
        "none": "every pixel",
    }[method.select]
    averaged = ", averaged from the start" if method.average_from_start else ""
    lines = {
        "pixels of the pseudo-label loss": f"{method.select} ({threshold})",
        "divisor of the pseudo-label loss": method.norm,
        "share of mixed batches": f"{method.cutmix_probability:g} ({method.strong_augmentation})",
        "start of the student": cfg.run.init or cfg.model.weights,
        "weight of the pseudo-label loss": f"{method.unsup_weight:g}, no ramp",
        "first epoch of the teacher": f"copied {method.teacher_copy}{averaged}",
    }
    return lines | ({"prototypes": "none: a mean teacher"} if proto is None else _of_prototypes(cfg, proto))


def _of_prototypes(cfg: Config, proto: ProtoConfig) -> dict[str, str]:
    place = {
        "file": str(proto.init_path),
        "warmup_end": f"clustered before epoch {cfg.method.sup_only_epochs}",
        "random": "standard normal",
    }
    kinds = {"labeled": proto.supervised, "unlabeled": proto.unsupervised}
    used = " and ".join(name for name, on in kinds.items() if on) or "no"
    moved = f"momentum {proto.momentum:g}" if proto.update else "frozen"
    return {
        "pixels of the prototype loss": f"{proto.select}, of unlabeled images",
        "first prototypes": f"{proto.source} ({place[proto.source]}), {'unit' if proto.normalize else 'raw'} features, "
        f"at most {proto.pixels_per_image} per class and image, {proto.pixels_per_class} per class, seed {proto.seed}",
        "first epoch of the prototypes": f"{proto_start(cfg.method)}",
        "prototypes of several processes": proto.sync,
        "features of the movement": proto.update_source,
        "unlabeled pixels in the movement": "yes" if proto.update_unlabeled else "no",
        "prototypes of the teacher": proto.teacher_proto,
        "temperature": f"{proto.temperature:g}",
        "prototypes": f"{proto.per_class} per class, {moved}, weight {proto.weight:g}, losses of {used} pixels, "
        f"{proto.granularity} x {proto.granularity} places",
    }


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


def report_usage(epoch: int, run: Run, log: RunLog) -> None:
    """Say how many pixels each prototype got since the last time; a collective.

    A class whose pixels all go to one prototype has an effective number of 1: the others are out of use, for which
    there is no remedy in the method. Classes without any pixel are left out of the figures.
    """
    if run.movement is None:
        return
    counts, names = run.movement.take_usage(run.dist).cpu(), run.data.spec.classes
    run.usage = {name: [int(n) for n in row] for name, row in zip(names, counts.tolist(), strict=True)}
    effective = effective_number(counts)
    present = effective[effective > 0]
    if not len(present):
        return
    found = {"prototypes_in_use": float(present.mean()), "prototypes_in_use_min": float(present.min())}
    log.scalars(run.step, {"epoch": epoch, **found, "classes_with_pixels": float(len(present))})
    for name, row, number in zip(names, counts, effective, strict=True):
        shares = " ".join(f"{100 * float(share):.0f}" for share in row / row.sum().clamp(min=1))
        log.info(
            f"prototypes of {name}: {shares} % of {int(row.sum())} pixels, effective number {float(number):.2f}"
        )


def show_panels(epoch: int, run: Run, log: RunLog) -> None:
    """Pictures of the first evaluation images with the pseudo-labels that the selection of `epoch` keeps."""
    cfg, method, network = run.cfg, run.cfg.method, getattr(run.nets, run.in_use(epoch)).eval()
    drop = 100.0 - (100.0 - method.drop_percent) * linear_decay(epoch, cfg.optim.epochs)

    def kept(probs: Tensor) -> Tensor:
        conf, labels = probs.max(dim=1)
        chosen = select_pixels(conf, labels, method.select, method.confid_thresh, probs.log(), drop)
        return labels.where(chosen, IGNORE)

    log_panels(network.predict, cfg.data, run.data.spec, cfg.data.val, log, run.step, run.dist, kept)
