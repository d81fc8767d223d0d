"""The random numbers of training steps that the papers which descend from U2PL's code have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from common.numerics.mixing import (
    LABEL_VALUES,
    BoxDraw,
    box_masks,
    draw_half_area_box,
    half_area_box,
    half_of_classes,
)
from common.run.rng import Streams


class StepDraws(Streams):
    """The random numbers of training steps, in the order of the original; saved with a checkpoint.

    Coins and boxes come from a NumPy generator seeded alike on every rank, so all ranks cut the same boxes
    (QUIRK shared_draws); class orders come from a generator of the device, one per rank.
    """

    def __init__(self, seed: int, rank: int, device: torch.device) -> None:
        super().__init__(seed, seed + rank, device)

    def coin(self) -> float:
        """Uniform number in [0, 1) that decides on the strong augmentation of a batch."""
        return float(self.rng.uniform(0, 1))

    def box(self, height: int, width: int) -> BoxDraw:
        """The draw of one half-area box."""
        return draw_half_area_box(height, width, self.rng)

    def class_order(self, labels: Tensor) -> Tensor:
        """Random numbers (B, 256) that rank the label values of each image of `labels` (B, H, W)."""
        return torch.rand(len(labels), LABEL_VALUES, generator=self.generator, device=labels.device)

    def keep(self, labels: Tensor, mode: str) -> Tensor:
        """Boolean masks (B, H, W) of the pixels of `labels` (B, H, W) that stay when a batch is augmented as `mode`."""
        height, width = labels.shape[-2:]
        if mode == "classmix":
            return half_of_classes(labels, self.class_order(labels))
        boxes = [half_area_box(height, width, self.box(height, width)) for _ in labels]
        return box_masks(boxes, height, width, labels.device)
