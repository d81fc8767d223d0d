"""Numbers of the baselines that the authors ship beside CPS; the defaults are the published ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from common.config import NOT_EMPTY, RISING, Count, Decay, Natural, NonNegative, Positive, Share

Perturbation = Literal[
    "spatial_dropout", "cutout", "context_masking", "object_masking", "feature_drop", "feature_noise"
]
Consistency = Literal["mse", "kl", "js"]
TWO_OF_EACH: tuple[Perturbation, ...] = (
    *("spatial_dropout", "spatial_dropout", "cutout", "cutout"),
    *("context_masking", "context_masking", "object_masking", "object_masking"),
    *("feature_drop", "feature_drop", "feature_noise", "feature_noise"),
)
DETECTOR_STRIDES = (2, 2, 1, 2, 1, 2, 1, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class MeanTeacherSettings:
    """Numbers of the mean teacher; the defaults are the published ones.

    Attributes:
        weight: of the consistency term; constant.
        ema_decay: share of the teacher that an average keeps; constant, without a warm-up.
        ema_between_batches: QUIRK method.mean_teacher.ema_between_batches: the teacher sees the labeled batch before
            the average and the unlabeled one after it; false averages before both.
    """

    weight: NonNegative = 100.0
    ema_decay: Share = 0.99
    ema_between_batches: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class CctSettings:
    """Numbers of cross-consistency training; the defaults are the published ones.

    Attributes:
        weight: of the consistency of the auxiliary decoders; QUIRK method.cct.weight: constant, without a ramp.
        decoders: perturbation of each auxiliary decoder, in order.
        drop_rate: share of channels that `spatial_dropout` drops.
        erase: share of an object's height and width that `cutout` blanks.
        drop_range: range of the share of the largest attention above which `feature_drop` drops.
        noise: largest relative change by `feature_noise`.
        consistency: distance of the auxiliary probabilities to the main ones: squared error, or a divergence.
        confidence_masking: only pixels whose main probability exceeds `confidence_thresh` count; `js` ignores it.
        confidence_thresh: see there.
        ramp_share: share of the run after which hardly any labeled pixel is left out.
        ramp_end: probability of the label that is left out then.
    """

    weight: NonNegative = 30.0
    decoders: Annotated[tuple[Perturbation, ...], NOT_EMPTY] = TWO_OF_EACH
    drop_rate: Decay = 0.5
    erase: Share = 0.4
    drop_range: Annotated[tuple[NonNegative, NonNegative], RISING] = (0.7, 0.9)
    noise: NonNegative = 0.3
    consistency: Consistency = "mse"
    confidence_masking: bool = False
    confidence_thresh: Share = 0.5
    ramp_share: Share = 0.4
    ramp_end: Share = 0.99


@dataclass(frozen=True, kw_only=True, slots=True)
class GctSettings:
    """Numbers of guided collaborative training; the defaults are the published ones.

    Attributes:
        dc_threshold: normalized flaw above which a pixel counts as wrong.
        dc_ramp_epochs: epochs over which the dynamic consistency comes in.
        dc_weight: of the dynamic consistency.
        fc_weight: of the flaw correction.
        detector_planes: channels of the detector's first layer.
        detector_strides: of its eight convolutions. The published ones leave one value for an image of 64 pixels, so
            smaller images need smaller strides.
        detector_lr: rate of the detector; the authors' 1e-4 times their 4 processes.
        detector_weight: of the detector's loss.
        mu: factor of the true error before it is blurred.
        nu: how often the blurred error is dilated and blurred again.
        straight_through_clip: QUIRK method.gct.straight_through_clip: negative flaws are clipped in place where
            autograd does not see it, so the detector learns from the clipped map with the gradient of an unclipped
            one; false leaves the map alone.
        late_rate: QUIRK method.gct.late_rate: the networks' rate is that of the step before.
        constant_detector_rate: QUIRK method.gct.constant_detector_rate: the detector's rate never changes; false
            gives it the networks' schedule.
    """

    dc_threshold: NonNegative = 0.6
    dc_ramp_epochs: Natural = 3
    dc_weight: NonNegative = 100.0
    fc_weight: NonNegative = 1.0
    detector_planes: Count = 64
    detector_strides: tuple[Count, Count, Count, Count, Count, Count, Count, Count] = DETECTOR_STRIDES
    detector_lr: Positive = 4e-4
    detector_weight: NonNegative = 10.0
    mu: NonNegative = 0.5
    nu: Natural = 1
    straight_through_clip: bool = True
    late_rate: bool = True
    constant_detector_rate: bool = True

    def __post_init__(self) -> None:
        if self.detector_planes % 2:
            raise ValueError(f"'detector_planes' is {self.detector_planes!r}; expected an even number")
