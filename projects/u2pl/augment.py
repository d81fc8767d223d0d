"""Strong augmentation of the unlabeled batch and the random numbers of a training step."""

from __future__ import annotations

from torch import Tensor

from common.data.spec import IGNORE
from common.mean_teacher.draws import StepDraws
from projects.u2pl.contrast import ContrastDraws


class Draws(StepDraws):
    """The random numbers of training steps; contrast indices come from the generator of the device."""

    contrast: ContrastDraws | None = None  # only recorded runs fix the indices


def strong_augment(images: Tensor, labels: Tensor, mode: str, draws: Draws) -> tuple[Tensor, Tensor]:
    """A batch of unlabeled images (B, 3, H, W) and pseudo-labels (B, H, W), see `StepDraws.mix`: blanks are ignored."""
    x, y = draws.mix(mode, labels, (images, 0.0), (labels, IGNORE))
    return x, y
