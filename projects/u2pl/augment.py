"""Strong augmentation of the unlabeled batch and the random numbers of a training step."""

from __future__ import annotations

from torch import Tensor

from common.data.spec import IGNORE
from common.mean_teacher.draws import StepDraws
from common.numerics.mixing import half_area_box, mix_with_next
from projects.u2pl.contrast import ContrastDraws


class Draws(StepDraws):
    """The random numbers of training steps; contrast indices come from the generator of the device."""

    contrast: ContrastDraws | None = None  # only recorded runs fix the indices


def strong_augment(images: Tensor, labels: Tensor, mode: str, draws: Draws) -> tuple[Tensor, Tensor]:
    """Mix a batch of unlabeled images (B, 3, H, W) and pseudo-labels (B, H, W) as `mode` says.

    `cutout` blanks half of every image and ignores its labels; `cutmix` fills that half from the next image;
    `classmix` keeps half of the label values of an image and takes the rest from the next one.

    Source: `generate_unsup_data` in `u2pl/dataset/augmentation.py`.
    """
    if mode == "classmix":
        keep = draws.keep(labels, mode)
        return mix_with_next(images, keep), mix_with_next(labels, keep)
    (height, width), batches, blank = labels.shape[-2:], (images, labels), (0.0, IGNORE)
    boxes = [half_area_box(height, width, draws.box(height, width)) for _ in labels]
    mixed = images.clone(), labels.clone()
    for batch, out, value in zip(batches, mixed, blank, strict=True):
        for i, box in enumerate(boxes):
            inside = (..., slice(box.row0, box.row1), slice(box.col0, box.col1))
            if mode == "cutout":
                out[i][inside].fill_(value)
            else:
                out[i][inside] = batch[(i + 1) % len(boxes)][inside]
    return mixed
