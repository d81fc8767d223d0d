"""Strong augmentation of the unlabeled batch and the random numbers of a training step."""

from __future__ import annotations

from torch import Tensor

from common.mean_teacher.draws import MixDraws
from common.numerics.mixing import cut_out, mix_with_next
from projects.u2pl.losses import ContrastDraws


class Draws(MixDraws):
    """The random numbers of training steps; contrast indices come from the generator of the device, too."""

    contrast: ContrastDraws | None = None  # only recorded runs fix the indices


def strong_augment(images: Tensor, labels: Tensor, mode: str, draws: Draws) -> tuple[Tensor, Tensor]:
    """Mix a batch of unlabeled images (B, 3, H, W) and pseudo-labels (B, H, W) as `mode` says.

    `cutout` blanks half of every image and ignores its labels; `cutmix` fills that half from the next image;
    `classmix` keeps half of the label values of an image and takes the rest from the next one.

    Source: `generate_unsup_data` in `u2pl/dataset/augmentation.py`.
    """
    keep = draws.keep_masks(labels, mode)
    if mode == "cutout":
        return cut_out(images, labels, keep)
    return mix_with_next(images, keep), mix_with_next(labels, keep)
