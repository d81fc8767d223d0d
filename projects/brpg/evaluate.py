"""Which network of BRPG is measured, and how; the same while training and in `eval.py`."""

from __future__ import annotations

from common.data.spec import DatasetSpec
from common.distributed import Dist
from common.measure.evaluation import Evaluation, Protocol, When, evaluate_list, protocol_of
from common.models.deeplab import SegmentationNetwork
from projects.brpg.config import Config
from projects.brpg.data import pad_label


def protocol(cfg: Config, when: When) -> Protocol:
    """The protocol that the configuration names for this occasion."""
    return protocol_of(cfg.eval, cfg.data, when, pad_label(cfg))


def reported_network(cfg: Config) -> str:
    """The network whose figures count: the teacher, or the student of a supervised-only run."""
    return "teacher" if cfg.method.mode == "semi" else "student"


def method_name(cfg: Config) -> str:
    """The name of the method or of one of its baselines in reports."""
    if cfg.method.mode == "sup_only":
        return "sup_only"
    return "brpg" if cfg.method.prototypes else "mean_teacher"


def evaluate_network(
    cfg: Config, network: SegmentationNetwork, spec: DatasetSpec, images: str, how: Protocol, dist: Dist
) -> Evaluation:
    """MIoU of one network on the list `images`; a collective. Leaves the network in evaluation mode."""
    network.eval()
    return evaluate_list(network.predict, cfg.data, spec, images, how, dist, precision=cfg.run.precision)
