"""Configuration of UniMatch, V1 and V2; the defaults are those of V1 on Pascal VOC."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from annotated_types import Interval

from common.config import (
    RISING,
    Count,
    DataConfig,
    Decay,
    Entries,
    EvalConfig,
    ExpectConfig,
    Natural,
    NonNegative,
    OptimConfig,
    RunConfig,
    Share,
)
from common.models.encoders import RESNETS, GenericConfig, fit_to_encoder, require_backbone, require_multiples

DINOV2 = ("dinov2_small", "dinov2_base", "dinov2_large", "dinov2_tiny")
# beyond these, boxes hardly ever fit, and are drawn for ever
Part = Annotated[float, Interval(ge=0, le=0.6)]
Ratio = Annotated[float, Interval(ge=0.01, le=100)]
AROUND_ONE = Entries("low <= 1 <= high", lambda pair: pair[0] <= 1 <= pair[1])


@dataclass(frozen=True, kw_only=True, slots=True)
class UniMatchDataConfig(DataConfig):
    """Which images, and how a training sample is cut out of them.

    Attributes:
        epoch_images: length of an epoch of a supervised-only run, to which the labeled list is repeated as in V2;
            None takes the list as it is, as in V1.
    """

    epoch_images: Count | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class UniMatchEvalConfig(EvalConfig):
    """How mIoU is measured.

    Attributes:
        protocol, during_training: `cut_windows` are those of V1 on Cityscapes, whose last ones are cut at the border,
            `moved_windows` those of V2, whose last ones are moved inside; probabilities are summed. The others are as
            everywhere here.
        stride: step of the windows; None takes two thirds of the window, for those two rounded down.
    """

    protocol: Literal[
        "cut_windows", "moved_windows", "center_crop", "whole_image", "sliding_window", "multi_scale_flip"
    ] = "whole_image"  # type: ignore[assignment]  # the shared section's values and two more
    during_training: Literal[
        "cut_windows", "moved_windows", "center_crop", "whole_image", "sliding_window"
    ] = "whole_image"  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(GenericConfig):
    """DeepLabV3+ on a ResNet or Xception-65 as in V1, DPT on DINOv2 as in V2; or the generic network.

    Attributes:
        backbone: `resnet18` to `resnet152`, `xception65`, `dinov2_small`, `dinov2_base`, `dinov2_large`; `resnet_tiny`
            for small data, `dinov2_tiny` for tests. It decides between V1's network and V2's.
        weights: file with the backbone's pretrained weights (searched in the working directory and in
            `SSS_WEIGHTS`), or `none` to start from random numbers.
        stem: of a ResNet: `deep` (three 3x3 convolutions, as the authors) or `plain` (7x7, takes torchvision weights).
        output_stride: of a ResNet 8, 16 or 32, of Xception-65 8 or 16.
        width: channels of the first stage of a ResNet; None for the backbone's own.
        inner_planes: channels inside the DeepLabV3+ head.
        low_planes: channels of its low-level branch.
        dilations: of its three atrous branches.
        sync_bn: synchronize BatchNorm over processes (GPUs only).
    """

    backbone: str = "resnet101"
    weights: str = "none"
    stem: Literal["deep", "plain"] = "deep"
    output_stride: Literal[8, 16, 32] = 16
    width: Count | None = None
    inner_planes: Count = 256
    low_planes: Count = 48
    dilations: tuple[Count, Count, Count] = (6, 12, 18)
    sync_bn: bool = True

    @property
    def is_dpt(self) -> bool:
        """Whether the network is that of V2."""
        return self.network == "paper" and self.backbone in DINOV2

    def __post_init__(self) -> None:
        require_backbone(self, (*RESNETS, "xception65", *DINOV2))


@dataclass(frozen=True, kw_only=True, slots=True)
class BoxSettings:
    """How the box of CutMix is drawn; the defaults are the published ones.

    Attributes:
        probability: share of the strong views that get a box.
        area: its smallest and largest share of the image.
        ratio: its smallest and largest height by width, in units of the image's.
    """

    probability: Share = 0.5
    area: Annotated[tuple[Part, Part], RISING] = (0.02, 0.4)
    ratio: Annotated[tuple[Ratio, Ratio], AROUND_ONE] = (0.3, 1 / 0.3)


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodConfig:
    """The method's own numbers. V1, V2 and FixMatch differ by `teacher`, `strong_views` and the two perturbations.

    Attributes:
        mode: `semi` or `sup_only`.
        teacher: V2: an averaged teacher in evaluation mode labels the weak views, and boxes come from the photo at the
            mirrored position of the batch. V1: the network labels them itself, and boxes come from a second loader.
        strong_views: 2, or 1 as in FixMatch.
        fp_share: V1: share of the feature perturbation in the unlabeled loss; 0 leaves that stream out.
        complementary_dropout: V2: the two strong views keep complementary halves of the feature channels.
        threshold: least probability of a pseudo-label.
        unsup_weight: weight of the unlabeled loss beside the labeled one.
        loss_weight: of both together; 1 where labeled images shall weigh as much as in the other papers.
        dropout: share of the feature channels that the perturbation of V1 drops.
        untouched: share of the pairs of views that the complementary dropout leaves as they are.
        ema_decay: ceiling of the teacher's decay.
        criterion: `ce` or `ohem` on labeled pixels.
        ohem_thresh: probability below which a pixel counts as hard.
        ohem_min_kept: pixels of the batch of one process that are kept at least.
        cutmix: the boxes.
    """

    mode: Literal["semi", "sup_only"] = "semi"
    teacher: bool = False
    strong_views: Literal[1, 2] = 2
    fp_share: Share = 0.5
    complementary_dropout: bool = False
    threshold: Share = 0.95
    unsup_weight: NonNegative = 1.0
    loss_weight: NonNegative = 0.5
    dropout: Decay = 0.5
    untouched: Share = 0.5
    ema_decay: Share = 0.996
    criterion: Literal["ce", "ohem"] = "ce"
    ohem_thresh: Share = 0.7
    ohem_min_kept: Natural = 200000
    cutmix: BoxSettings = field(default_factory=BoxSettings)

    def __post_init__(self) -> None:
        if self.teacher and self.fp_share:
            raise ValueError("'fp_share' is a stream of V1; with teacher=true set fp_share=0")
        if self.complementary_dropout and self.strong_views != 2:
            raise ValueError("'complementary_dropout' needs strong_views=2")


@dataclass(frozen=True, kw_only=True, slots=True)
class QuirkConfig:
    """Oddities of the authors' code that move numbers; the first value is the original, but for `nan_without_pixels`.

    Attributes:
        late_rate: every step but the first has the learning rate of the step before.
        same_photo: V1: a box comes from another view of the same photo; false takes another photo's.
        paired_lists: the orders of labeled and unlabeled images are the same permutation, so an unlabeled image meets
            one labeled image only, in every epoch; false draws them apart.
        nan_without_pixels: a batch of nothing but padding, or without any label, gives an undefined loss; false
            gives zero.
    """

    late_rate: bool = True
    same_photo: bool = True
    paired_lists: bool = True
    nan_without_pixels: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One run of UniMatch V1 or V2, of FixMatch or of the supervised-only baseline."""

    data: UniMatchDataConfig
    optim: OptimConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    eval: UniMatchEvalConfig = field(default_factory=UniMatchEvalConfig)
    run: RunConfig = field(default_factory=RunConfig)
    quirks: QuirkConfig = field(default_factory=QuirkConfig)
    expect: ExpectConfig = field(default_factory=ExpectConfig)

    def __post_init__(self) -> None:
        model = self.model  # the authors' network can be frozen too
        model = model if model.network == "generic" else replace(model, freeze_encoder=False)
        object.__setattr__(self, "data", fit_to_encoder(model, self.optim, self.data))
        if model.is_dpt:
            require_multiples("data.crop_size", self.data.crop_size, 14)


def method_name(cfg: Config) -> str:
    """The name of the method or of its baseline in reports."""
    method = cfg.method
    if method.mode == "sup_only":
        return "sup_only"
    plain = method.strong_views == 1 and not method.fp_share
    return ("fixmatch" if plain else "unimatch") + ("_v2" if method.teacher else "")
