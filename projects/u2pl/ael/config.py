"""Settings of the AEL variant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from common.config import ClassNumber, Natural, NonNegative, Percent, Range, Share


@dataclass(frozen=True, kw_only=True, slots=True)
class AelConfig:
    """What the AEL variant adds to `MethodConfig`; the defaults are the published setting.

    Attributes:
        start_epoch: first epoch of the contrastive loss.
        consist_weight: weight of the consistency loss.
        cons: weight pixels by the teacher's confidence; otherwise plain cross entropy.
        cons_sample: drop pixels of classes that the student already knows.
        cons_gamma: exponent of the confidence; `cons_gamma2` of the sampling rates.
        threshold: labeled pixels with less teacher probability (0..1) than this are left out of the consistency.
        sym_ce_l, sym_ce_u: add 0.1 times the reverse cross entropy to the supervised or the consistency loss.
        high_entropy_threshold: percentile of the entropy from which on a pixel is unreliable; below
            `method.low_entropy_threshold` it is reliable (both constant over the epochs).
        conf_weight: class centres are weighted by the teacher's confidence (not together with `anchor_ema`).
        momentum: of the class confidence.
        area_thresh: fraction of the image that a component must exceed to be cut out.
        area_thresh2: fraction of the image that a class must cover to enter the CutMix bank.
        no_pad, no_slim: take a component's box as it is, instead of bringing it to half the image.
        paste_number: draws of classes to paste in a step.
        paste_prob: a labeled image comes without a partner to paste from with this probability.
        paste_resize: range of the random resize of that partner.
        common_classes: classes that are never pasted; the default is that of Cityscapes.
        conf_init: QUIRK: the class confidence starts as random numbers, or as zeros.
        drop_low_entropy: QUIRK: the pseudo-labels with the lowest entropy are dropped, also from the contrast;
            otherwise those with the highest are, as the paper says, and the contrast sees all.
        banks: QUIRK: each process keeps class confidence and bank of its own images (`local`), or of all (`shared`).
        divide_by_ranks: QUIRK: every loss is divided by the number of processes although gradients are
            averaged over them, so the learning rate is effectively divided by it.
    """

    start_epoch: Natural = 20
    consist_weight: NonNegative = 1.0
    cons: bool = True
    cons_sample: bool = True
    cons_gamma: NonNegative = 2.0
    cons_gamma2: NonNegative = 1.0
    threshold: Share = 0.0
    sym_ce_l: bool = False
    sym_ce_u: bool = False
    high_entropy_threshold: Percent = 80.0
    conf_weight: bool = False
    momentum: Share = 0.999
    area_thresh: Share = 0.005
    area_thresh2: Share = 0.01
    no_pad: bool = True
    no_slim: bool = True
    paste_number: Natural = 3
    paste_prob: Share = 0.5
    paste_resize: Range = (0.1, 2.0)
    common_classes: tuple[ClassNumber, ...] = (0, 1, 2, 8, 10)
    conf_init: Literal["rand", "zeros"] = "rand"
    drop_low_entropy: bool = True
    banks: Literal["local", "shared"] = "local"
    divide_by_ranks: bool = True
