"""Which network of the method is measured, by which head, and how; the same while training and in `eval.py`."""

from __future__ import annotations

from common.data.spec import DatasetSpec
from common.distributed import Dist
from common.measure.evaluation import Evaluation, Protocol, When, evaluate_list, protocol_of
from common.measure.inference import Forward
from projects.proto_consistency.config import Config
from projects.proto_consistency.data import pad_label
from projects.proto_consistency.model import prototypes_of_first
from projects.proto_consistency.network import Head, ProtoNetwork


def protocol(cfg: Config, when: When) -> Protocol:
    """The protocol that the configuration names for this occasion."""
    return protocol_of(cfg.eval, cfg.data, when, pad_label(cfg))


def reported_network(cfg: Config) -> str:
    """The network whose figures count: the teacher, or the student of a supervised-only run."""
    return "teacher" if cfg.method.mode == "semi" else "student"


def reported_role(cfg: Config) -> str:
    """The network whose figures count with its head, as `--network` names them."""
    return reported_network(cfg) + ("_proto" if cfg.eval.head == "proto" else "")


def further_roles(cfg: Config) -> tuple[str, ...]:
    """What is measured besides: the prototype head with `eval.head=both`."""
    return (f"{reported_network(cfg)}_proto",) if cfg.eval.head == "both" else ()


def method_name(cfg: Config) -> str:
    """The name of the method or of its baseline in reports."""
    if cfg.method.mode == "sup_only":
        return "sup_only"
    return "mean_teacher" if cfg.method.proto is None else "proto_consistency"


def main_head(cfg: Config) -> Head:
    """The head whose figures choose the best weights and are reported first."""
    return "proto" if cfg.eval.head == "proto" else "linear"


def predictor_of(network: ProtoNetwork, head: Head) -> Forward:
    """Scores (B, K, H, W) of normalised images (B, 3, H, W) by one head of a network in evaluation mode."""
    return network.predict if head == "linear" else network.predict_prototypes


def evaluate_network(
    cfg: Config, network: ProtoNetwork, spec: DatasetSpec, images: str, how: Protocol, dist: Dist, head: Head
) -> Evaluation:
    """MIoU of one head of a network on the list `images`; a collective. Leaves the network in evaluation mode."""
    network.eval()
    with prototypes_of_first(network, dist):
        return evaluate_list(
            predictor_of(network, head), cfg.data, spec, images, how, dist, precision=cfg.run.precision
        )
