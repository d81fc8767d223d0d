"""The network of BRPG with either encoder, and student and teacher as a training step uses them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.distributed import Dist
from common.errors import UserError
from common.mean_teacher.networks import StudentTeacher, student_and_teacher
from common.models.deeplab import DeepLabV3Plus, SegmentationNetwork, build_network
from common.models.pretrained import LoadReport, load_state, read_weights
from common.models.resnet import OutputStride, Stem
from projects.brpg.config import Config
from projects.brpg.losses import Criterion
from projects.brpg.xception import Xception65, pretrained_state

XCEPTION = "xception65"


def build_segmentation(
    backbone: str,
    *,
    num_classes: int,
    stem: Stem = "deep",
    output_stride: OutputStride = 8,
    multi_grid: Sequence[int] = (2, 2, 4),
    zero_init_residual: bool = True,
    width: int | None = None,
    inner_planes: int = 256,
    low_planes: int | None = None,
    dilations: tuple[int, int, int] = (12, 24, 36),
    rep_head: bool = True,
    aux_head: bool = False,
    dropout: float = 0.1,
    rectified_shortcut: bool = True,
) -> SegmentationNetwork:
    """DeepLabV3+ with a representation head on a ResNet, as `common.models.deeplab.build_network`, or on Xception-65.

    `stem`, `multi_grid` and `zero_init_residual` concern ResNets only, `rectified_shortcut` Xception-65.

    Raises:
        UserError: a name or a combination is not known.
    """
    if backbone != XCEPTION:
        return build_network(
            backbone,
            num_classes=num_classes,
            stem=stem,
            output_stride=output_stride,
            multi_grid=multi_grid,
            zero_init_residual=zero_init_residual,
            width=width,
            inner_planes=inner_planes,
            low_planes=low_planes,
            dilations=dilations,
            rep_head=rep_head,
            aux_head=aux_head,
            dropout=dropout,
        )
    if aux_head:
        raise UserError("model.aux_weight: xception65 has no output for the auxiliary head; set it to 0")
    if output_stride == 32:
        raise UserError("model.output_stride=32: xception65 has 8 or 16")
    encoder = Xception65(output_stride, 64 if width is None else width, rectified_shortcut)
    decoder = DeepLabV3Plus(
        encoder.out_planes,
        num_classes,
        inner_planes=inner_planes,
        low_planes=low_planes,
        dilations=dilations,
        rep_head=rep_head,
        dropout=dropout,
    )
    return SegmentationNetwork(encoder, decoder)


Networks = StudentTeacher[SegmentationNetwork, Criterion]


# --- of a configuration ------------------------------------------------------------------------------------------


def build_student(cfg: Config, num_classes: int) -> SegmentationNetwork:
    """A network with fresh random numbers outside the backbone's weight file."""
    model = cfg.model
    return build_segmentation(
        model.backbone,
        num_classes=num_classes,
        stem=model.stem,
        output_stride=model.output_stride,
        multi_grid=model.multi_grid,
        zero_init_residual=model.zero_init_residual,
        width=model.width,
        inner_planes=model.inner_planes,
        low_planes=model.low_planes,
        dilations=model.dilations,
        rep_head=cfg.method.mode == "semi",
        aux_head=model.aux_weight > 0,
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
        # QUIRK quirks.own_xception_statistics: the teacher's Xception-65 never synchronises its statistics
        sync_teacher_encoder=cfg.model.backbone != XCEPTION or not cfg.quirks.own_xception_statistics,
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
