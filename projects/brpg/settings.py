"""The method's numbers and the oddities of the authors' code; the defaults are those of all published settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from common.config import ClassNumber, Count, Natural, NonNegative, Percent, Range, Seed, Share, Temperature


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodConfig:
    """The method's own numbers; `mode: sup_only` is the supervised baseline of the same code.

    Epochs count from 0. Stages: supervised before `sup_only_epochs`; then the mean teacher; features are collected
    in `collect_epochs` epochs from `collect_start` on; at the first step after them they are clustered, once, and
    the prototype loss begins.

    Attributes:
        mode: `semi` or `sup_only`.
        sup_only_order: a supervised-only run takes the labeled list in `file` order or `sampled` once.
        ce_weight, ohem_weight: of the two supervised criteria; 0 leaves one out.
        ohem_thresh: probability below which a pixel counts as hard.
        ohem_min_kept: pixels of the batch of one process that are kept at least.
        sup_only_epochs: epochs before the teacher is used.
        ema_decay: ceiling of the teacher's decay.
        average_from_start: the teacher averages the student in the supervised epochs too, so that it comes into use
            as an average. The original starts from the student itself.
        drop_percent: percentile of the entropy above which a pseudo-label is dropped in epoch 0; rises to 100.
        strong_augmentation: mixing of the strong views: `cutmix`, `cutout`, `classmix` or `none`.
        augment_probability: share of the unlabeled batches that are mixed.
        unsup_weight, proto_weight: of the pseudo-label and of the prototype loss.
        prototypes: everything about prototypes, from the collection on; without, the mean teacher with mixed images
            alone is left, to which the prototypes are an addition.
        collect_confidence: prototypes of `both` confidences, or only those of `high` or of `low` confidence.
        adaptive: give the least compact classes `add_prototypes` more.
        collect_start, collect_epochs: first epoch and number of epochs of the collection.
        sample_per_image: features per image that a step brings to the queues at most.
        threshold_type: `fix`, or `csp`, thresholds that follow the classes' confidence.
        high_threshold: least confidence of a high-confidence feature.
        low_threshold: a low-confidence feature is more confident than this (`fix` only).
        conf_init, conf_decay: start value and decay of the classes' confidence (`csp` only).
        thre_min, thre_max: bounds of the thresholds (`csp`).
        fix_classes: classes that keep `high_threshold` (`csp`).
        class_balanced: draw features with weights n^-gamma of their class instead of uniformly.
        gamma: exponent of those weights.
        queue_size: features kept per class and queue.
        queue_dtype: of the stored features; `float16` halves the memory and loses nothing where the networks run in
            fp16.
        scarce_queue: keep labeled features of whatever confidence too, for classes that end with fewer than ten
            confident ones (published for COCO).
        scarce_classes: `stop` at a class with fewer features than prototypes, or give it `fewer` prototypes.
        prototype_kind: `cluster` centres, confidence-weighted means of the clusters (`prob`), or clusters of one
            queue without regard to confidence (`random`).
        high_prototypes, low_prototypes: prototypes per class of either confidence.
        add_prototypes: more for the least compact classes.
        add_proportion: share of the classes that get them, at least one.
        compactness: how it is measured: `cos_sim`, `l2` or `l2_norm`.
        cluster_seed: of the clustering.
        temperature: of the cosine similarities.
        grid_steps: the labeled features of the prototype loss lie on a grid of one point more per axis.
        unsup_points: features per unlabeled image in the prototype loss at most.
        pseudo_threshold: least teacher confidence, of collected unlabeled features and, rising to
            `pseudo_threshold_end`, of pseudo-labels in the prototype loss.
        pseudo_threshold_end: see above.
        prototype_decay: decay of the prototypes' moving average.
        contra_weight: weight of a contrast with prototypes as positives; 0 switches it off (as published).
        low_rank, high_rank: a pixel is a negative of the classes ranked [low_rank, high_rank) by the teacher.
        current_class_threshold: least teacher probability of an anchor's class.
        current_class_negative_threshold: a negative's probability of the class is below this.
        low_entropy_threshold: percent at each end of the entropy ranking in epoch 0; falls to 0.
        num_queries, num_negatives: anchors per class and negatives per anchor.
        contra_temperature: of the contrast's similarities.
        contra_queue, contra_queue_first: negatives kept per class and of class 0.
        copy_paste: paste classes from a second labeled image.
        paste_ignore: classes that are never pasted.
        paste_delay, paste_promote: epochs before pasting, and until its probability has risen to 1.
        paste_momentum: decay of the classes' confidence that chooses them.
        paste_classes: classes drawn per step.
        paste_skip: share of the labeled images without a second one.
        paste_scale_range: range of the random resize of the second image.
    """

    mode: Literal["semi", "sup_only"] = "semi"
    sup_only_order: Literal["file", "sampled"] = "file"
    ce_weight: NonNegative = 0.5
    ohem_weight: NonNegative = 0.5
    ohem_thresh: Share = 0.7
    ohem_min_kept: Natural = 100000
    sup_only_epochs: Natural = 1
    ema_decay: Share = 0.99
    average_from_start: bool = False
    drop_percent: Percent = 80.0
    strong_augmentation: Literal["none", "cutout", "cutmix", "classmix"] = "cutmix"
    augment_probability: Share = 0.5
    unsup_weight: NonNegative = 1.0
    proto_weight: NonNegative = 1.0
    prototypes: bool = True
    collect_confidence: Literal["both", "high", "low"] = "both"
    adaptive: bool = True
    collect_start: Natural = 1
    collect_epochs: Count = 1
    sample_per_image: Count = 5000
    threshold_type: Literal["fix", "csp"] = "fix"
    high_threshold: Share = 0.8
    low_threshold: Share = 0.0
    conf_init: Share = 0.8
    conf_decay: Share = 0.999
    thre_min: Share = 0.7
    thre_max: Share = 0.9
    fix_classes: tuple[ClassNumber, ...] = ()
    class_balanced: bool = False
    gamma: NonNegative = 0.5
    queue_size: Count = 30000
    queue_dtype: Literal["float32", "float16"] = "float32"
    scarce_queue: bool = False
    scarce_classes: Literal["stop", "fewer"] = "stop"
    prototype_kind: Literal["cluster", "prob", "random"] = "cluster"
    high_prototypes: Natural = 2
    low_prototypes: Natural = 2
    add_prototypes: Natural = 1
    add_proportion: Share = 0.05
    compactness: Literal["cos_sim", "l2", "l2_norm"] = "cos_sim"
    cluster_seed: Seed = 0
    temperature: Temperature = 0.1
    grid_steps: Count = 32
    unsup_points: Count = 1000
    pseudo_threshold: Share = 0.8
    pseudo_threshold_end: Share = 0.95
    prototype_decay: Share = 0.99
    contra_weight: NonNegative = 0.0
    low_rank: Natural = 3
    high_rank: Count = 20
    current_class_threshold: Share = 0.3
    current_class_negative_threshold: Share = 1.0
    low_entropy_threshold: Percent = 20.0
    num_queries: Count = 256
    num_negatives: Count = 50
    contra_temperature: Temperature = 0.5
    contra_queue: Count = 30000
    contra_queue_first: Count = 50000
    copy_paste: bool = False
    paste_ignore: tuple[ClassNumber, ...] = ()
    paste_delay: Natural = 0
    paste_promote: Natural = 0
    paste_momentum: Share = 0.999
    paste_classes: Natural = 3
    paste_skip: Share = 0.5
    paste_scale_range: Range = (0.5, 2.0)

    def __post_init__(self) -> None:
        if self.num_slots < 1:
            raise ValueError("'high_prototypes', 'low_prototypes': expected at least one of them")
        if self.mode == "semi" and self.prototypes and self.collect_start < self.sup_only_epochs:
            raise ValueError(
                f"'collect_start' is {self.collect_start}; expected sup_only_epochs={self.sup_only_epochs} or more, "
                "since the teacher takes part in the collection"
            )
        if self.prototype_kind == "random" and self.collect_confidence != "both":
            raise ValueError(
                f"'collect_confidence' is {self.collect_confidence!r}; expected both, since prototype_kind random "
                "keeps one queue for all confidences"
            )
        if self.contra_weight > 0 and not self.prototypes:
            raise ValueError("'contra_weight' needs prototypes=true; expected 0")
        if self.scarce_queue and (self.prototype_kind == "random" or self.threshold_type == "csp"):
            raise ValueError("'scarce_queue' needs prototype_kind cluster or prob and threshold_type fix")

    @property
    def prototype_start(self) -> int:
        """First epoch of the prototype loss."""
        return self.collect_start + self.collect_epochs

    @property
    def num_slots(self) -> int:
        """Most prototypes that a class can have."""
        return sum(part + self.extra_prototypes if part else 0 for part in self.base_numbers.values())

    @property
    def base_numbers(self) -> dict[str, int]:
        """Prototypes of a class by confidence, before more are given to some classes."""
        wanted = ("high", "low") if self.collect_confidence == "both" else (self.collect_confidence,)
        numbers = {"high": self.high_prototypes, "low": self.low_prototypes}
        return {kind: number if kind in wanted else 0 for kind, number in numbers.items()}

    @property
    def extra_prototypes(self) -> int:
        """How many more the least compact classes get."""
        return self.add_prototypes if self.adaptive and self.prototype_kind != "random" else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class QuirkConfig:
    """Oddities of the authors' code that move numbers; true (or the first value) is the original.

    Attributes:
        proto_reduce: `sum_forward_only` divides the gradient of the prototype loss by the number of processes
            once more than `mean`.
        own_prototypes: every process moves its own prototypes; otherwise all processes move them alike.
        pad_label_zero: the border added by the crop is labeled class 0 instead of ignore.
        pad_black: unlabeled images are padded with black, otherwise with the mean colour like labeled ones.
        ramp_from_five: the threshold of the prototype loss starts to rise at epoch 5 whatever the stages
            (and lies below its start value before); otherwise at the first epoch of that loss.
        own_teacher_statistics: the teacher's BatchNorm statistics are learned from the start by a teacher
            that is not yet trained; otherwise they are the student's when the teacher comes into use. Matters in
            short runs: the first pseudo-labels of the original are those of a network with foreign statistics.
        half_confidence: confidences of collected features are rounded to fp16 where the networks run in it.
        own_xception_statistics: several processes never synchronize BatchNorm in the teacher's Xception-65,
            whose statistics are those of the first process.
        rectified_shortcut: identity shortcuts of Xception-65 add the rectified input.
        slot_index: anchors of the optional contrast are looked up by slot number, prototypes by class.
        onehot_first_image: class masks of the optional contrast collapse onto the first image.
    """

    proto_reduce: Literal["sum_forward_only", "mean"] = "sum_forward_only"
    own_prototypes: bool = True
    pad_label_zero: bool = True
    pad_black: bool = True
    ramp_from_five: bool = True
    own_teacher_statistics: bool = True
    half_confidence: bool = True
    own_xception_statistics: bool = True
    rectified_shortcut: bool = True
    slot_index: bool = True
    onehot_first_image: bool = True
