"""Configuration of U2PL; the defaults are what all published settings share."""

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
    Share,
    Temperature,
)
from common.mean_teacher.config import DeepLabConfig
from common.models.encoders import fit_to_encoder
from projects.u2pl.ael.config import AelConfig

NETWORK = "DeepLabV3+ with a representation head"  # studies: one name, one network
PHASES = ("method.sup_only_epochs", "method.ael.start_epoch")  # in epochs: move with a change of optim.epochs


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(DeepLabConfig):
    """ResNet + DeepLabV3+ with a representation head, whose length is `inner_planes`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodConfig:
    """The method's own numbers; `mode: sup_only` is the supervised baseline of the same code.

    Attributes:
        mode: `semi` or `sup_only`.
        sup_only_order: a supervised-only run takes the labeled list in `file` order (as for Pascal) or
            `sampled` once from the seed (as for Cityscapes).
        criterion: `ce` or `ohem` on labeled pixels.
        ohem_thresh: probability below which a pixel counts as hard.
        ohem_min_kept: pixels of the batch of one process that are kept at least.
        class_weights: extra class weighting of the 19 Cityscapes classes (an unused option of the original).
        sup_only_epochs: epochs before the teacher is used.
        ema_decay: ceiling of the teacher's decay.
        average_from_start: the teacher averages the student in the supervised epochs too, so that it comes into use
            as an average (needs quirks.shared_first_epoch=false). The original starts from the student itself.
        drop_percent: percentile of the entropy above which a pseudo-label is dropped in epoch 0; rises to 100.
        strong_augmentation: `cutmix`, `cutout`, `classmix` or `none`.
        augment_probability: share of the unlabeled batches that are augmented so; the original's is 0.5.
        unsup_weight: weight of the pseudo-label loss.
        contra_weight: weight of the contrastive loss; 0 switches it off.
        negative_high_entropy: negatives must have high entropy; otherwise any unlabeled pixel may be one.
        low_rank, high_rank: a pixel is a negative of the classes that the teacher ranks in [low_rank, high_rank)
            (0 = most probable). None derives the paper's window (3 of 21, to the end) from the class count.
        current_class_threshold: least teacher probability of an anchor's class.
        current_class_negative_threshold: a negative's probability of the class is below this.
        low_entropy_threshold: percent at each end of the entropy ranking in epoch 0; falls to 0.
        num_queries: anchors per class.
        num_negatives: negatives per anchor.
        temperature: of the cosine similarities.
        queue_size: negatives kept per class; `queue_size_first` of class 0.
        anchor_ema: average the class centres over steps (an ablation).
        binary: named in the original's configurations, but its function exists nowhere; must stay false.
        ael: settings of the variant on adaptive equalization learning; null trains plain U2PL. The variant has its
            own pseudo-labels and mixing, so it does not look at `drop_percent`, `strong_augmentation`,
            `augment_probability` and `unsup_weight`. Of `optim.batch_size` unlabeled images one half is mixed with
            images chosen for it.
    """

    mode: Literal["semi", "sup_only"] = "semi"
    sup_only_order: Literal["file", "sampled"] = "file"
    criterion: Literal["ce", "ohem"] = "ce"
    ohem_thresh: Share = 0.7
    ohem_min_kept: Natural = 100000
    class_weights: bool = False
    sup_only_epochs: Natural = 1
    ema_decay: Share = 0.99
    average_from_start: bool = False
    drop_percent: Percent = 80.0
    strong_augmentation: Literal["none", "cutout", "cutmix", "classmix"] = "cutmix"
    augment_probability: Share = 0.5
    unsup_weight: NonNegative = 1.0
    contra_weight: NonNegative = 1.0
    negative_high_entropy: bool = True
    low_rank: Natural | None = None
    high_rank: Count | None = None
    current_class_threshold: Share = 0.3
    current_class_negative_threshold: Share = 1.0
    low_entropy_threshold: Percent = 20.0
    num_queries: Count = 256
    num_negatives: Count = 50
    temperature: Temperature = 0.5
    queue_size: Count = 30000
    queue_size_first: Count = 50000
    anchor_ema: bool = False
    binary: bool = False
    ael: AelConfig | None = None

    def __post_init__(self) -> None:
        if self.binary:
            raise ValueError(
                "'binary' is true, but the function it names was never published; set it to false"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class QuirkConfig:
    """Oddities of the authors' code that move numbers; true (or the first value) is the original.

    Attributes:
        onehot_first_image: the class masks of a batch collapse onto its first image.
        slot_index: anchors and centres are looked up by slot number, the queue by class.
        own_label_negatives: a negative of class c must carry label c, so labeled pixels never qualify.
        pad_label_zero: the border added by the crop is labeled class 0 instead of ignore.
        own_teacher_statistics: the teacher's BatchNorm statistics are learned from the start by a teacher
            that is not yet trained; otherwise they are the student's when the teacher comes into use. Matters in
            short runs: the first pseudo-labels of the original are those of a network with foreign statistics.
        shared_first_epoch: the teacher's parameters are the student's all through its first epoch; otherwise
            it starts as a copy and is averaged at once.
        contra_reduce: `sum_forward_only` divides the gradient of the contrastive loss by the number of
            processes once more than `mean`.
    """

    onehot_first_image: bool = True
    slot_index: bool = True
    own_label_negatives: bool = True
    pad_label_zero: bool = True
    own_teacher_statistics: bool = True
    shared_first_epoch: bool = True
    contra_reduce: Literal["sum_forward_only", "mean"] = "sum_forward_only"


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One run of U2PL or of its supervised-only baseline."""

    data: DataConfig
    optim: OptimConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)
    quirks: QuirkConfig = field(default_factory=QuirkConfig)
    expect: ExpectConfig = field(default_factory=ExpectConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", fit_to_encoder(self.model, self.optim, self.data))
        if self.method.mode == "semi" and self.method.sup_only_epochs >= self.optim.epochs:
            raise ValueError(
                f"'method.sup_only_epochs' is {self.method.sup_only_epochs}; expected less than optim.epochs="
                f"{self.optim.epochs}, or method.mode=sup_only"
            )
        if self.method.average_from_start and self.quirks.shared_first_epoch:
            raise ValueError("'method.average_from_start' needs quirks.shared_first_epoch=false")
        if self.method.ael is not None:
            self._require_fit_for_ael()
        if self.method.class_weights and self.model.aux_weight <= 0 and self.method.criterion == "ce":
            raise ValueError("'method.class_weights' needs the auxiliary head; set model.aux_weight")

    def _require_fit_for_ael(self) -> None:
        if self.method.mode != "semi":
            raise ValueError("'method.ael' needs method.mode=semi; set method.ael=null for the baseline")
        if not self.method.average_from_start:
            raise ValueError(
                "'method.ael' needs method.average_from_start=true, as its teacher always averages"
            )
        height, width = self.data.crop_size
        if height != width:
            raise ValueError(
                f"'data.crop_size' is {self.data.crop_size!r}; expected a square, of which method.ael cuts boxes"
            )


def require_ael(cfg: Config) -> AelConfig:
    """The settings of the AEL variant in a run of it."""
    assert cfg.method.ael is not None, "not a run of the AEL variant"
    return cfg.method.ael


def method_name(cfg: Config) -> str:
    """The name of the method or of its baseline in reports."""
    if cfg.method.ael is not None:
        return "u2pl_ael"
    return "u2pl" if cfg.method.mode == "semi" else "sup_only"


def further_quirks(cfg: Config) -> dict[str, bool]:
    """Quirks among the numbers of the AEL variant."""
    ael = cfg.method.ael
    if ael is None:
        return {}
    return {
        "ael.conf_init": ael.conf_init == "rand",
        "ael.drop_low_entropy": ael.drop_low_entropy,
        "ael.banks": ael.banks == "local",
        "ael.divide_by_ranks": ael.divide_by_ranks,
    }
