"""The network of BRPG with either encoder, and student and teacher as a training step uses them."""

from __future__ import annotations

from pathlib import Path

from common.distributed import Dist
from common.errors import UserError
from common.mean_teacher.networks import StudentTeacher, network_of, student_and_teacher
from common.models.deeplab import DeepLabV3Plus, SegmentationNetwork
from common.models.pretrained import LoadReport, load_state, read_weights
from common.models.xception import Xception65, pretrained_state
from projects.brpg.config import Config, ModelConfig
from projects.brpg.losses import Criterion

XCEPTION = "xception65"
Networks = StudentTeacher[SegmentationNetwork, Criterion]


def has_xception(model: ModelConfig) -> bool:
    """Whether the paper's own network stands on Xception-65; timm has an encoder of that name too."""
    return model.network == "paper" and model.backbone == XCEPTION


def segmentation_of(
    model: ModelConfig, num_classes: int, *, rep_head: bool = True, rectified_shortcut: bool = True
) -> SegmentationNetwork:
    """DeepLabV3+ on the encoder that a configuration describes, with fresh random numbers.

    Args:
        model: section of the configuration.
        num_classes: K.
        rep_head: whether there is a representation head.
        rectified_shortcut: see `Xception65`.

    Raises:
        UserError: a name or a combination is not known.
    """
    if not has_xception(model):
        return network_of(model, num_classes, rep_head=rep_head)
    if model.aux_weight > 0:
        raise UserError("model.aux_weight: xception65 has no output for the auxiliary head; set it to 0")
    if model.output_stride == 32:
        raise UserError("model.output_stride=32: xception65 has 8 or 16")
    encoder = Xception65(model.output_stride, 64 if model.width is None else model.width, rectified_shortcut)
    decoder = DeepLabV3Plus(
        encoder.out_planes,
        num_classes,
        inner_planes=model.inner_planes,
        low_planes=model.low_planes,
        dilations=model.dilations,
        rep_head=rep_head,
    )
    return SegmentationNetwork(encoder, decoder)


def build_student(cfg: Config, num_classes: int) -> SegmentationNetwork:
    """A network with fresh random numbers outside the backbone's weight file."""
    return segmentation_of(
        cfg.model,
        num_classes,
        rep_head=cfg.method.mode == "semi",
        rectified_shortcut=cfg.quirks.rectified_shortcut,
    )


def build_criterion(cfg: Config) -> Criterion:
    """The supervised loss that the configuration names."""
    method = cfg.method
    return Criterion(
        ce_weight=method.ce_weight,
        ohem_weight=method.ohem_weight,
        thresh=method.ohem_thresh,
        min_kept=method.ohem_min_kept,
        aux_weight=cfg.model.aux_weight,
    )


def build_networks(cfg: Config, num_classes: int, dist: Dist) -> Networks:
    """Student and teacher on their device, wrapped for this run."""
    return student_and_teacher(
        cfg,
        lambda: build_student(cfg, num_classes),
        build_criterion(cfg),
        dist,
        # QUIRK quirks.own_xception_statistics: the teacher's Xception-65 never synchronizes its statistics
        sync_teacher_encoder=not (has_xception(cfg.model) and cfg.quirks.own_xception_statistics),
    )


def load_xception(network: SegmentationNetwork, path: Path) -> LoadReport:
    """Load the authors' ImageNet file of Xception-65: what it lacks keeps its value, what it has must fit.

    Raises:
        UserError: the file cannot be read, or holds a tensor that the network has no place for.
    """
    state, source = read_weights(path)
    report = load_state(network, pretrained_state(state), source=source, allow_missing=("",))
    misfits = (*report.unused, *report.mismatched)
    if misfits:
        raise UserError(
            f"{source}: {len(misfits)} tensors have no place in xception65, the first is {misfits[0]}; give the "
            "authors' file for that backbone, or choose another model.backbone"
        )
    return report
