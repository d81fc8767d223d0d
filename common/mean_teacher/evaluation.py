"""Which network of student and teacher is measured, and how; the same while training and in `eval.py`."""

from __future__ import annotations

from typing import Any

from common.data.spec import IGNORE, DatasetSpec
from common.distributed import Dist
from common.mean_teacher.run import MeanTeacherRun
from common.measure.evaluation import Evaluation, Protocol, When, evaluate_list, protocol_of
from common.measure.pseudo_quality import log_pseudo_quality
from common.models.deeplab import SegmentationNetwork
from common.run.checkpoint import load, load_weights
from common.run.session import Session


def pad_label(cfg: Any) -> int:
    """Label of the border that a crop adds: 0 as the original (QUIRK quirks.pad_label_zero), or ignore."""
    return 0 if cfg.quirks.pad_label_zero else IGNORE


def protocol(cfg: Any, when: When) -> Protocol:
    """The protocol that the configuration names for this occasion."""
    return protocol_of(cfg.eval, cfg.data, when, pad_label(cfg))


def reported_network(cfg: Any) -> str:
    """The network whose figures count: the teacher, or the student of a supervised-only run."""
    return "teacher" if cfg.method.mode == "semi" else "student"


def evaluate_network(
    cfg: Any, network: SegmentationNetwork, spec: DatasetSpec, images: str, how: Protocol, dist: Dist
) -> Evaluation:
    """MIoU of one network on the list `images`; a collective. Leaves the network in evaluation mode."""
    network.eval()
    return evaluate_list(network.predict, cfg.data, spec, images, how, dist, precision=cfg.run.precision)


def evaluate_in_use(epoch: int, run: MeanTeacherRun, session: Session, when: str) -> None:
    """Measure the network in use in `epoch` (from 0), keep the best weights, and measure its pseudo-labels.

    The student of the first epochs is no candidate for the best weights of a semi-supervised run: what that yields,
    and the scripts use, is the teacher. `when` begins the message.
    """
    cfg, role = run.cfg, run.in_use(epoch)
    network = getattr(run.nets, role)
    run.nets.share_statistics(run.dist)
    how = protocol(cfg, "training")
    found = evaluate_network(cfg, network, run.data.spec, cfg.data.val, how, run.dist)
    best = session.note(epoch, found, candidate=role == reported_network(cfg))
    session.log.info(f"{when}: {role} mIoU {100 * found.miou:.2f}{best}")
    teachers = [network] if role == "teacher" else []
    log_pseudo_quality(cfg, teachers, run.data, session.log, run.step, epoch, run.dist)


def load_best(network: SegmentationNetwork, role: str, session: Session) -> bool:
    """Give a network its best weights of this run; False if there are none."""
    assert session.run_dir is not None, "a dry run measures nothing"
    path = session.run_dir / "best.pt"
    if not path.is_file():
        return False
    saved = load(path)["networks"]
    load_weights(network, saved.get(role, saved["student"]), str(path))
    return True
