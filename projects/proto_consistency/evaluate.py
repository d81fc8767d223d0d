"""Which head of a network is measured, and how; the same while training and in `eval.py`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from common.data.spec import DatasetSpec
from common.distributed import Dist, broadcast_object
from common.mean_teacher.evaluation import load_best, protocol, reported_network
from common.measure.evaluation import Evaluation, Protocol, evaluate_list
from common.measure.inference import Forward
from common.measure.pseudo_quality import log_pseudo_quality
from common.run.session import Session
from projects.proto_consistency.config import Config, method_name
from projects.proto_consistency.network import Head, ProtoNetwork
from projects.proto_consistency.state import Run
from tools.training import report, summary


def main_head(cfg: Config) -> Head:
    """The head whose figures choose the best weights and are reported first."""
    return "proto" if cfg.eval.head == "proto" else "linear"


def reported_role(cfg: Config) -> str:
    """The network whose figures count with its head, as `--network` names them."""
    return reported_network(cfg) + ("_proto" if cfg.eval.head == "proto" else "")


def further_roles(cfg: Config) -> tuple[str, ...]:
    """What is measured besides: the prototype head with `eval.head=both`."""
    return (f"{reported_network(cfg)}_proto",) if cfg.eval.head == "both" else ()


def predictor_of(network: ProtoNetwork, head: Head) -> Forward:
    """Scores (B, K, H, W) of normalized images (B, 3, H, W) by one head of a network in evaluation mode."""
    return network.predict if head == "linear" else network.predict_prototypes


@contextmanager
def prototypes_of_first(network: ProtoNetwork, dist: Dist) -> Iterator[None]:
    """Every process has the prototypes of the first one inside, for they are the ones that are published.

    A collective. With `sync: local` those of the processes differ.
    """
    head = network.proto_net
    if head is None or dist.world_size == 1:
        yield
        return
    own = head.proto_list.detach().clone()
    head.proto_list.data.copy_(broadcast_object(own.cpu(), dist))
    try:
        yield
    finally:
        head.proto_list.data.copy_(own)


def evaluate_network(
    cfg: Config, network: ProtoNetwork, spec: DatasetSpec, images: str, how: Protocol, dist: Dist, head: Head
) -> Evaluation:
    """MIoU of one head of a network on the list `images`; a collective. Leaves the network in evaluation mode."""
    network.eval()
    forward = predictor_of(network, head)
    with prototypes_of_first(network, dist):
        return evaluate_list(forward, cfg.data, spec, images, how, dist, precision=cfg.run.precision)


def evaluate_in_use(epoch: int, run: Run, session: Session) -> None:
    """Measure the network in use in `epoch` (from 0), keep the best weights, and measure its pseudo-labels.

    The student of the first epochs is no candidate for the best weights of a semi-supervised run, for what that
    yields is the teacher. The prototype head is measured from its first prototypes on.
    """
    cfg, role = run.cfg, run.in_use(epoch)
    network: ProtoNetwork = getattr(run.nets, role)
    run.nets.share_statistics(run.dist)

    def measured(head: Head) -> Evaluation:
        how = protocol(cfg, "training")
        return evaluate_network(cfg, network, run.data.spec, cfg.data.val, how, run.dist, head)

    found = measured(main_head(cfg) if run.placed else "linear")
    further = {"miou_proto": measured("proto").miou} if further_roles(cfg) and run.placed else {}
    best = session.note(epoch, found, candidate=role == reported_network(cfg), **further)
    besides = "".join(f", prototype head {100 * miou:.2f}" for miou in further.values())
    session.log.info(f"epoch {epoch + 1}: {role} mIoU {100 * found.miou:.2f}{best}{besides}")
    teachers = [network] if role == "teacher" else []
    log_pseudo_quality(cfg, teachers, run.data, session.log, run.step, epoch, run.dist)


def finish(run: Run, session: Session) -> None:
    """Measure the last and the best weights with the configured protocol and write `result.json`."""
    cfg, role = run.cfg, reported_network(run.cfg)
    network: ProtoNetwork = getattr(run.nets, role)
    how, spec, images = protocol(cfg, "script"), run.data.spec, cfg.eval.list
    extra: dict[str, Any] = {} if run.usage is None else {"prototype_usage": run.usage}

    def measured(label: str) -> Evaluation:
        if further_roles(cfg):
            other = evaluate_network(cfg, network, spec, images, how, run.dist, "proto")
            extra[f"proto_{label}"] = summary(other, spec.classes)
            session.log.info(f"{images}: mIoU of the prototype head, {label} weights: {100 * other.miou:.2f}")
        return evaluate_network(cfg, network, spec, images, how, run.dist, main_head(cfg))

    last = best = measured("last")
    if load_best(network, role, session):
        best = measured("best")
    elif further_roles(cfg):
        extra["proto_best"] = extra["proto_last"]
    report(session, method=method_name(cfg), network=reported_role(cfg), best=best, last=last, extra=extra)
