"""Strong augmentation of the unlabeled batch and the random numbers of a training step."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from common.numerics.mixing import (
    LABEL_VALUES,
    BoxDraw,
    box_masks,
    cut_out,
    draw_half_area_box,
    half_area_box,
    half_of_classes,
    mix_with_next,
)
from common.run.rng import numpy_state, restore_numpy
from projects.u2pl.losses import ContrastDraws


class Draws:
    """The random numbers of training steps, in the order of the original; saved with a checkpoint.

    Coins and boxes come from a NumPy generator seeded alike on every rank, so all ranks cut the same boxes
    (QUIRK u2pl-12); class orders and contrast indices come from a generator of the device, one per rank.
    """

    contrast: ContrastDraws | None = None  # only recorded runs fix the indices

    def __init__(self, seed: int, rank: int, device: torch.device) -> None:
        self.rng = np.random.RandomState(seed)
        self.generator = torch.Generator(device=device)
        self.generator.manual_seed(seed + rank)

    def coin(self) -> float:
        """Uniform number in [0, 1) that decides on the strong augmentation of a batch."""
        return float(self.rng.uniform(0, 1))

    def box(self, height: int, width: int) -> BoxDraw:
        """The draw of one half-area box."""
        return draw_half_area_box(height, width, self.rng)

    def class_order(self, labels: Tensor) -> Tensor:
        """Random numbers (B, 256) that rank the label values of each image of `labels` (B, H, W)."""
        return torch.rand(len(labels), LABEL_VALUES, generator=self.generator, device=labels.device)

    def state_dict(self) -> dict[str, Tensor | int]:
        """Both generators as plain tensors and numbers."""
        return {**numpy_state(self.rng), "torch": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        """Continue exactly where `state_dict` was taken."""
        restore_numpy(self.rng, state)
        self.generator.set_state(torch.as_tensor(state["torch"], dtype=torch.uint8))


def strong_augment(images: Tensor, labels: Tensor, mode: str, draws: Draws) -> tuple[Tensor, Tensor]:
    """Mix a batch of unlabeled images (B, 3, H, W) and pseudo-labels (B, H, W) as `mode` says.

    `cutout` blanks half of every image and ignores its labels; `cutmix` fills that half from the next image;
    `classmix` keeps half of the label values of an image and takes the rest from the next one.

    Source: `generate_unsup_data` in `u2pl/dataset/augmentation.py`.
    """
    height, width = labels.shape[-2:]
    if mode == "classmix":
        keep = half_of_classes(labels, draws.class_order(labels))
    else:
        boxes = [half_area_box(height, width, draws.box(height, width)) for _ in labels]
        keep = box_masks(boxes, height, width, labels.device)
    if mode == "cutout":
        return cut_out(images, labels, keep)
    return mix_with_next(images, keep), mix_with_next(labels, keep)
