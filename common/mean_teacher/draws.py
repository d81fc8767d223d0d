"""The random numbers of training steps that the papers which descend from U2PL's code have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from common.numerics.mixing import (
    LABEL_VALUES,
    BoxDraw,
    draw_half_area_box,
    fill_boxes,
    half_area_box,
    half_of_classes,
    mix_with_next,
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

    def mix(self, mode: str, labels: Tensor, *batches: tuple[Tensor, float | None]) -> list[Tensor]:
        """Batches (B, ..., H, W), given with their values of a blank, augmented alike, as `mode` says.

        `cutout` blanks a box of half the area of every image (None: leaves that batch as it is); `cutmix` fills it from
        the next image; `classmix` keeps half of the values of an image's `labels`, the rest is that of the next one.

        Source: `generate_unsup_data` in `u2pl/dataset/augmentation.py`.
        """
        if mode == "classmix":
            keep = half_of_classes(labels, self.class_order(labels))
            return [mix_with_next(batch, keep) for batch, _ in batches]
        height, width = labels.shape[-2:]
        boxes = [half_area_box(height, width, self.box(height, width)) for _ in labels]
        if mode == "cutmix":
            return [fill_boxes(batch, boxes, [*batch[1:], batch[0]]) for batch, _ in batches]
        return [batch if blank is None else fill_boxes(batch, boxes, blank) for batch, blank in batches]
