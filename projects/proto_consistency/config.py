"""Configuration of prototype consistency; the defaults are what all published settings share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from common.config import (
    Count,
    DataConfig,
    EvalConfig,
    ExpectConfig,
    Natural,
    NonNegative,
    OptimConfig,
    Percent,
    RunConfig,
    Seed,
    Share,
    Temperature,
)
from common.mean_teacher.config import DeepLabConfig
from common.models.encoders import fit_to_encoder

# in epochs: move with a change of optim.epochs
NETWORK = "DeepLabV3+ with a representation head"  # studies: one name, one network
PHASES = ("method.sup_only_epochs", "method.proto.start_epoch")
HOW_TO_MAKE = (
    "train the pre-stage (train.sh with the configuration of the same name that ends in _sup), then cluster: "
    "python -m projects.proto_consistency.cluster --config CONFIG --checkpoint BEST --out FILE; or set "
    "method.proto.source=warmup_end, which needs neither"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(DeepLabConfig):
    """ResNet + DeepLabV3+; the feature that both heads read has the channels of decoder and low-level branch.

    Attributes:
        maxpool: `ceil`, the pooling of the training code, or `same`, that of the released evaluation code; they
            differ for images whose stem output is even, and only evaluation may use the second.
    """

    maxpool: Literal["ceil", "same"] = "ceil"

    @property
    def feature_planes(self) -> int:
        """Channels of the feature that both heads read, D."""
        if self.network == "generic":
            return self.inner_planes
        return self.inner_planes + (self.inner_planes if self.low_planes is None else self.low_planes)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProtoConfig:
    """The prototype head and its loss. The README says which of these are known and which are our reading.

    Attributes:
        weight: of the sum of both prototype losses.
        supervised: use the prototype loss of labeled pixels (an ablation switches it off).
        unsupervised: use the prototype loss of unlabeled pixels (an ablation switches it off).
        per_class: prototypes per class, P.
        update: move the prototypes while training; false freezes them (an ablation).
        momentum: share of the old prototype that an update keeps.
        granularity: one pixel is drawn in each of granularity x granularity patches of the crop.
        temperature: cosines are divided by it.
        select: `same`, unlabeled pixels enter the prototype loss by the selection of the linear head's loss; `none`,
            all drawn pixels do. The update of the prototypes always follows the selection.
        source: where the first prototypes come from: `file` reads `init_path`, `warmup_end` clusters features of the
            labeled images by the student itself just before its first semi-supervised step, `random` draws them.
        init_path: file of `cluster.py`, of the original's pickle layout, or a checkpoint with prototypes.
        normalize: cluster features of unit length instead of raw ones.
        pixels_per_image: features of one class taken from one image at most.
        pixels_per_class: features clustered per class at most.
        seed: of the choice of features, of the clustering and of random prototypes.
        start_epoch: first epoch (from 0) with prototype losses and updates. Null is automatic: 0 with `file`, where
            the epochs before the teacher use labeled pixels alone, and `method.sup_only_epochs` otherwise.
        sync: `local`, every process moves its own prototypes; `gather`, all move them alike by all pixels.
        update_source: features that move the prototypes: of the `student`, or of the `teacher` (train mode).
        update_unlabeled: unlabeled pixels that pass the selection move the prototypes too.
        teacher_proto: the teacher's prototypes are the `ema` of the student's, as its weights are, or a `copy`.
    """

    weight: NonNegative = 1.0
    supervised: bool = True
    unsupervised: bool = True
    per_class: Count = 4
    update: bool = True
    momentum: Share = 0.99
    granularity: Count = 32
    temperature: Temperature = 0.1
    select: Literal["same", "none"] = "same"
    source: Literal["file", "warmup_end", "random"] = "file"
    init_path: str | None = None
    normalize: bool = False
    pixels_per_image: Count = 1024
    pixels_per_class: Count = 200_000
    seed: Seed = 0
    start_epoch: Natural | None = None
    sync: Literal["local", "gather"] = "local"
    update_source: Literal["student", "teacher"] = "student"
    update_unlabeled: bool = True
    teacher_proto: Literal["ema", "copy"] = "ema"


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodConfig:
    """The method's own numbers; `mode: sup_only` is the supervised pre-stage and baseline.

    Attributes:
        mode: `semi` or `sup_only`.
        sup_only_order: a supervised-only run takes the labeled list in `file` order (as for Pascal) or
            `sampled` once from the seed (as for Cityscapes).
        criterion: `ce` or `ohem` on labeled pixels.
        ohem_thresh: probability below which a pixel counts as hard.
        ohem_min_kept: pixels of the batch of one process that are kept at least.
        sup_only_epochs: epochs before the teacher is used.
        ema_decay: ceiling of the teacher's decay.
        average_from_start: the teacher averages the student in the supervised epochs too, so that it comes into use
            as an average (needs method.teacher_copy=once). The original starts from the student itself.
        teacher_copy: the teacher's parameters are the student's all through its first `epoch`; or it is copied
            `once`, before its first step, and averaged from then on.
        confid_thresh: least teacher probability of a pseudo-label with `select: confidence`.
        select: which pseudo-labels count: `confidence` by that threshold, `entropy` by U2PL's percentile, `none` all.
        drop_percent: with `entropy`, the percentile above which a pseudo-label is dropped in epoch 0; rises to 100.
        norm: divisor of the pseudo-label loss: `all` pixels, the `valid` ones, or `u2pl` (the mean over the valid
            ones times pixels over valid ones).
        unsup_weight: weight of the pseudo-label loss.
        strong_augmentation: `cutmix`, `cutout`, `classmix` or `none`.
        cutmix_probability: share of the unlabeled batches that are augmented so; the original's is 0.5.
        proto: the prototype head; null trains a plain mean teacher.
    """

    mode: Literal["semi", "sup_only"] = "semi"
    sup_only_order: Literal["file", "sampled"] = "file"
    criterion: Literal["ce", "ohem"] = "ohem"
    ohem_thresh: Share = 0.7
    ohem_min_kept: Natural = 100000
    sup_only_epochs: Natural = 1
    ema_decay: Share = 0.99
    average_from_start: bool = False
    teacher_copy: Literal["epoch", "once"] = "epoch"
    confid_thresh: Share = 0.8
    select: Literal["confidence", "entropy", "none"] = "confidence"
    drop_percent: Percent = 80.0
    norm: Literal["all", "valid", "u2pl"] = "all"
    unsup_weight: NonNegative = 1.0
    strong_augmentation: Literal["none", "cutout", "cutmix", "classmix"] = "cutmix"
    cutmix_probability: Share = 0.5
    proto: ProtoConfig | None = field(default_factory=ProtoConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuirkConfig:
    """Oddities of the authors' code that move numbers; true is the original.

    Attributes:
        pad_label_zero: the border added by the crop is labeled class 0 instead of ignore.
        own_teacher_statistics: the teacher's BatchNorm statistics are learned from the start by a teacher that is
            not yet trained; otherwise they are the student's when the teacher comes into use. Matters in
            short runs: the first pseudo-labels of the original are those of a network with foreign statistics.
        border_never_sampled: the patches start at the corner, so of a crop that they do not fill (513 = 32 * 16 + 1)
            the last rows and columns are never drawn; otherwise they are placed anew in every step.
        one_mask: all images of a batch, labeled and unlabeled, are looked at in the same places.
        raw_update: prototypes average features of any length, so long ones weigh more.
    """

    pad_label_zero: bool = True
    own_teacher_statistics: bool = True
    border_never_sampled: bool = True
    one_mask: bool = True
    raw_update: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadConfig(EvalConfig):
    """How mIoU is measured, and by which head.

    Attributes:
        head: `linear` (the published figures), `proto`, or `both`, where the second is reported beside the first.
            Evaluation while training and the choice of the best weights go by the linear head with `both`.
    """

    head: Literal["linear", "proto", "both"] = "linear"


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One run of the method, of a mean teacher without prototypes, or of the supervised pre-stage."""

    data: DataConfig
    optim: OptimConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    eval: HeadConfig = field(default_factory=HeadConfig)
    run: RunConfig = field(default_factory=RunConfig)
    quirks: QuirkConfig = field(default_factory=QuirkConfig)
    expect: ExpectConfig = field(default_factory=ExpectConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", fit_to_encoder(self.model, self.optim, self.data))
        method, proto = self.method, self.prototypes
        if method.mode == "semi" and method.sup_only_epochs >= self.optim.epochs:
            raise ValueError(
                f"'method.sup_only_epochs' is {method.sup_only_epochs}; expected less than optim.epochs="
                f"{self.optim.epochs}, or method.mode=sup_only"
            )
        if method.average_from_start and method.teacher_copy == "epoch":
            raise ValueError("'method.average_from_start' needs method.teacher_copy=once")
        if self.eval.head != "linear" and proto is None:
            raise ValueError(
                f"'eval.head' is {self.eval.head!r}, but only method.mode=semi with method.proto has another than "
                "'linear'"
            )
        if proto is not None:
            self._require_fit_for_prototypes(proto)

    @property
    def prototypes(self) -> ProtoConfig | None:
        """The prototype head of the run's networks; supervised-only runs have none."""
        return self.method.proto if self.method.mode == "semi" else None

    def _require_fit_for_prototypes(self, proto: ProtoConfig) -> None:
        if proto.granularity > min(self.data.crop_size):
            raise ValueError(
                f"'method.proto.granularity' is {proto.granularity}; expected at most the crop's smaller side, "
                f"{min(self.data.crop_size)}"
            )
        start, first = proto.start_epoch, self.method.sup_only_epochs
        if proto.source == "warmup_end" and start is not None and start < first:
            raise ValueError(
                f"'method.proto.start_epoch' is {start}, but method.proto.source=warmup_end makes prototypes before "
                f"epoch {first}; use null or {first} or more"
            )


def method_name(cfg: Config) -> str:
    """The name of the method or of its baseline in reports."""
    if cfg.method.mode == "sup_only":
        return "sup_only"
    return "mean_teacher" if cfg.method.proto is None else "proto_consistency"


def prototypes_active(epoch: int, cfg: Config) -> bool:
    """Whether losses and updates of the prototypes are on in this epoch (from 0)."""
    return cfg.prototypes is not None and epoch >= proto_start(cfg.method)


def proto_start(method: MethodConfig) -> int:
    """First epoch, from 0, with prototype losses and updates.

    Raises:
        ValueError: if there is no prototype head.
    """
    proto = method.proto
    if proto is None:
        raise ValueError("method.proto is null: no prototype head")
    if proto.start_epoch is not None:
        return proto.start_epoch
    return 0 if proto.source == "file" else method.sup_only_epochs


def start_files(cfg: Config) -> dict[str, tuple[str | None, str]]:
    """Files besides the data that a run starts from, by their key, and what makes them if they are no weights."""
    proto = cfg.method.proto if cfg.method.mode == "semi" else None
    prototypes = proto.init_path if proto is not None and proto.source == "file" else None
    return {"model.weights": (cfg.model.weights, ""), "method.proto.init_path": (prototypes, HOW_TO_MAKE)}
