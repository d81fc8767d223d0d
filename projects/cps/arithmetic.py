"""Numbers of an epoch and the learning rate of the original."""

from __future__ import annotations

from typing import NamedTuple

from common.numerics.optim import poly

TRAIN_IMAGES = {"voc": 10582, "cityscapes": 2975}


class EpochSizes(NamedTuple):
    """Counts of one epoch: images of either kind, images seen of each, optimizer steps."""

    labeled: int
    unlabeled: int
    max_samples: int
    iterations: int


def epoch_arithmetic(total_images: int, ratio: int, batch: int) -> EpochSizes:
    """The original's counts for one of `ratio` images labeled and `batch` labeled images per step.

    QUIRK data.epoch_images: computed from the ratio and not counted in the lists, which may hold one more or one less.

    Source: `config.py` of the experiments.
    """
    labeled = total_images // ratio
    unlabeled = total_images - labeled
    longer = max(labeled, unlabeled)
    return EpochSizes(labeled, unlabeled, longer, longer // batch)


def warmup_poly(base: float, step: int, total_steps: int, power: float, warmup: int = 0) -> float:
    """Learning rate of `step` (from 0): linear from 0 over `warmup` steps, then the poly rate, not shifted.

    Every published setting has no warm-up, where this is `common.numerics.optim.poly`.

    Source: `WarmUpPolyLR` in `furnace/engine/lr_policy.py`.
    """
    return base * (step / warmup) if step < warmup else poly(base, step, total_steps, power)
