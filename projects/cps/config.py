"""Configuration of CPS and of the baselines shipped with it; the defaults are those of CPS on Pascal VOC."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from common.config import (
    RISING,
    Count,
    DataConfig,
    EvalConfig,
    ExpectConfig,
    Natural,
    NonNegative,
    OptimConfig,
    RunConfig,
    Scales,
    Share,
)
from common.models.encoders import RESNETS, GenericConfig, fit_to_encoder, require_backbone
from projects.cps.baselines.config import CctSettings, GctSettings, MeanTeacherSettings

Method = Literal["sup_only", "cps", "cps_cutmix", "mean_teacher", "cct", "gct"]
PHASES = ("optim.warmup_epochs", "method.gct.dc_ramp_epochs")  # in epochs: move with a change of optim.epochs


@dataclass(frozen=True, kw_only=True, slots=True)
class CpsDataConfig(DataConfig):
    """Which images, and how a training sample is cut out of them.

    Attributes:
        scales: factors of the random resize, one of which is drawn; None draws from `scale_range` instead.
        epoch_images: images of an epoch, drawn from both lists alike; None takes the longer list's length. The
            authors compute it from the label ratio, which differs from the lists by up to one.
    """

    scales: Scales | None = (0.5, 0.75, 1.0, 1.5, 1.75, 2.0)
    epoch_images: Count | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CpsOptimConfig(OptimConfig):
    """Optimizer, schedule and batch.

    Attributes:
        warmup_epochs: epochs over which the rate rises from 0 before the poly schedule, which is not shifted.
    """

    warmup_epochs: Natural = 0

    def __post_init__(self) -> None:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"'warmup_epochs' is {self.warmup_epochs!r}; expected less than 'epochs'")


@dataclass(frozen=True, kw_only=True, slots=True)
class CpsEvalConfig(EvalConfig):
    """How mIoU is measured.

    Attributes:
        protocol: `original` is the authors' evaluation (windows whose scores are summed, small images padded);
            `port` that of the PaddleSeg contribution (averaged, nothing padded); the others as everywhere here.
        during_training: the protocol after every `every_epochs` epochs.
        network: `branch1` as the authors, `branch2`, or the `mean` of both networks' logits.
        every_epochs: 0 as the authors: nothing is measured before the end.
    """

    protocol: Literal[
        "original", "port", "center_crop", "whole_image", "sliding_window", "multi_scale_flip"
    ] = "original"  # type: ignore[assignment]  # the shared section's values and two more
    during_training: Literal["original", "port", "center_crop", "whole_image", "sliding_window"] = "original"  # type: ignore[assignment]
    network: Literal["branch1", "branch2", "mean"] = "branch1"
    every_epochs: Natural = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(GenericConfig):
    """ResNet + DeepLabV3+ in the form of the CPS repository; or the generic network, see `GenericConfig`.

    Attributes:
        backbone: `resnet18`, `resnet34`, `resnet50`, `resnet101`, `resnet152`, or `resnet_tiny` for small data.
        stem: `deep` (three 3x3 convolutions, as the authors) or `plain` (7x7, takes torchvision weights).
        weights: file with ImageNet weights of that backbone (searched in the working directory and in
            `SSS_WEIGHTS`), or `none` to start from random numbers.
        output_stride: 8, 16 or 32.
        multi_grid: factors of the three blocks of the last stage; (2, 2, 4) are dilations 2, 4, 8 at stride 16.
        width: channels of the first stage; None for the backbone's own.
        inner_planes: channels inside the head and length of the pixel feature.
        low_planes: channels of the low-level branch.
        dilations: of the three atrous branches.
        sync_bn: synchronize BatchNorm over processes (GPUs only).
    """

    backbone: str = "resnet50"
    stem: Literal["deep", "plain"] = "deep"
    weights: str = "none"
    output_stride: Literal[8, 16, 32] = 16
    multi_grid: tuple[Count, Count, Count] = (2, 2, 4)
    width: Count | None = None
    inner_planes: Count = 256
    low_planes: Count = 48
    dilations: tuple[Count, Count, Count] = (6, 12, 18)
    sync_bn: bool = True

    def __post_init__(self) -> None:
        require_backbone(self, RESNETS)


@dataclass(frozen=True, kw_only=True, slots=True)
class BoxMaskSettings:
    """How boxes are drawn; the defaults are the published ones.

    Attributes:
        prop_range: smallest and largest share of the image that the boxes of a mask have together.
        n_boxes: boxes per mask.
        random_aspect_ratio: draw the boxes' form; false gives them the image's.
        prop_by_area: shares are of the area; false takes them of height and width.
        within_bounds: boxes lie inside the image; false draws their centres inside it.
        invert: the boxes are 1; false makes them 0 and the rest 1.
        fixed_aspect_shrinks_twice: QUIRK method.cutmix.fixed_aspect_shrinks_twice: with `random_aspect_ratio` false
            the factor sqrt(1 / n_boxes) meets one array under two names and is applied twice; false applies it once.
    """

    prop_range: Annotated[tuple[Share, Share], RISING] = (0.25, 0.5)
    n_boxes: Count = 3
    random_aspect_ratio: bool = True
    prop_by_area: bool = True
    within_bounds: bool = True
    invert: bool = True
    fixed_aspect_shrinks_twice: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodConfig:
    """The method's own numbers.

    Attributes:
        name: `cps`, `cps_cutmix`, `sup_only` (one network, labeled images), or a baseline of the authors'
            repository: `mean_teacher`, `cct`, `gct`.
        cps_weight: weight of the cross pseudo supervision.
        criterion: `ce` or `ohem` on labeled pixels.
        ohem_thresh: probability below which a pixel counts as hard.
        ohem_min_kept: pixels per image that are kept at least.
        cutmix: the boxes of CPS + CutMix.
        mean_teacher, cct, gct: the baselines' own numbers.
    """

    name: Method = "cps"
    cps_weight: NonNegative = 1.5
    criterion: Literal["ce", "ohem"] = "ce"
    ohem_thresh: Share = 0.7
    ohem_min_kept: Natural = 50000
    cutmix: BoxMaskSettings = field(default_factory=BoxMaskSettings)
    mean_teacher: MeanTeacherSettings = field(default_factory=MeanTeacherSettings)
    cct: CctSettings = field(default_factory=CctSettings)
    gct: GctSettings = field(default_factory=GctSettings)


@dataclass(frozen=True, kw_only=True, slots=True)
class KeepConfig:
    """Which epochs' weights stay in the run directory, to be measured afterwards in one command.

    Attributes:
        every_epochs: keep the weights of every so many epochs; 0 keeps those of the last epoch only.
        after_epoch: number of epochs before the first that is kept.
        newest: how many are kept; None keeps all.
    """

    every_epochs: Natural = 0
    after_epoch: Natural = 0
    newest: Count | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class QuirkConfig:
    """Oddities of the authors' code that move numbers; the first value is the original.

    Attributes:
        loss_world_size: the loss is divided by the number of processes once more than an average would;
            None divides by `optim.paper_processes` (which the published rates rest on), 1 not at all.
        loss_per_process: the supervised loss is averaged (OHEM: selected) over the batch of each of the authors'
            processes and then over processes; false takes the forward's images together.
        fixed_unlabeled_order: every epoch visits the unlabeled images in the order of the first.
        unlabeled_pairing: CutMix mixes two views of the `same_index`, hence of one and the same image;
            `independent` pairs different images.
        train_mode_labels: CutMix's labels come from networks in train mode, whose BatchNorm statistics they move;
            false labels in evaluation mode.
        separate_statistics: labeled and unlabeled images never share a BatchNorm batch; false joins the forwards
            with gradients of a step into one per network.
        inclusive_crop: one crop in (side - crop + 2) is one pixel short and padded.
        nan_without_labels: a batch without any labeled pixel gives an undefined loss; false gives zero.
    """

    loss_world_size: Count | None = None
    loss_per_process: bool = True
    fixed_unlabeled_order: bool = True
    unlabeled_pairing: Literal["same_index", "independent"] = "same_index"
    train_mode_labels: bool = True
    separate_statistics: bool = True
    inclusive_crop: bool = True
    nan_without_labels: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One run of CPS, of its supervised-only twin or of a baseline."""

    data: CpsDataConfig
    optim: CpsOptimConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    eval: CpsEvalConfig = field(default_factory=CpsEvalConfig)
    keep: KeepConfig = field(default_factory=KeepConfig)
    run: RunConfig = field(default_factory=RunConfig)
    quirks: QuirkConfig = field(default_factory=QuirkConfig)
    expect: ExpectConfig = field(default_factory=ExpectConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", fit_to_encoder(self.model, self.optim, self.data))
        processes = self.optim.paper_processes
        if processes and self.optim.batch_size % processes:
            raise ValueError(
                f"'optim.batch_size' is {self.optim.batch_size}; expected a multiple of optim.paper_processes="
                f"{processes}, or null for the latter"
            )


def loss_divisor(cfg: Config) -> int:
    """What the loss is divided by (QUIRK quirks.loss_world_size): by default the authors' number of processes."""
    return cfg.quirks.loss_world_size or cfg.optim.paper_processes or 1


def loss_groups(cfg: Config, images: int) -> int:
    """Into how many of the authors' per-process batches `images` labeled images fall; 1 where they do not divide."""
    if not cfg.quirks.loss_per_process or not cfg.optim.paper_processes:
        return 1
    share = cfg.optim.batch_size // cfg.optim.paper_processes
    return images // share if images % share == 0 else 1


def further_quirks(cfg: Config) -> dict[str, bool]:
    """Quirks among the numbers of the method in use."""
    method = cfg.method
    boxes = method.cutmix
    twice = boxes.fixed_aspect_shrinks_twice and not boxes.random_aspect_ratio
    found = {"cutmix.fixed_aspect_shrinks_twice": method.name == "cps_cutmix" and twice}
    if method.name == "mean_teacher":
        found["mean_teacher.ema_between_batches"] = method.mean_teacher.ema_between_batches
    if method.name == "gct":
        names = ("straight_through_clip", "late_rate", "constant_detector_rate")
        found |= {f"gct.{name}": getattr(method.gct, name) for name in names}
    return found
