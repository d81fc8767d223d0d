"""Strong augmentation of the unlabeled batch and the random numbers of a training step."""

from __future__ import annotations

from collections.abc import Sequence

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
from projects.proto_consistency.config import QuirkConfig
from projects.proto_consistency.draws import sample_points


class Draws:
    """The random numbers of training steps, in the order of the original; saved with a checkpoint.

    Coins and boxes come from a NumPy generator and places from a generator of the CPU, both seeded alike on every
    rank, so all ranks cut the same boxes and look at the same places (QUIRK shared_draws). Class orders come from a
    generator of the device, one per rank.
    """

    def __init__(self, seed: int, rank: int, device: torch.device) -> None:
        self.device = device
        self.rng = np.random.RandomState(seed)
        self.places = torch.Generator().manual_seed(seed)
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

    def keep(self, labels: Tensor, mode: str) -> Tensor:
        """Boolean masks (B, H, W) of the pixels of `labels` (B, H, W) that stay when a batch is augmented as `mode`."""
        height, width = labels.shape[-2:]
        if mode == "classmix":
            return half_of_classes(labels, self.class_order(labels))
        boxes = [half_area_box(height, width, self.box(height, width)) for _ in labels]
        return box_masks(boxes, height, width, labels.device)

    def points(
        self, size: Sequence[int], granularity: int, images: int, quirks: QuirkConfig
    ) -> tuple[Tensor, Tensor]:
        """Rows and columns of one pixel per patch on the device: (G*G,) for all images, or (B, G*G).

        Args:
            size: (H, W) of the crop.
            granularity: G, patches per side.
            images: B.
            quirks: `one_mask` gives the first shape; without `border_never_sampled` the patches are moved at random
                over what they do not fill.
        """
        drawn = [
            torch.stack(self._points(size, granularity, quirks.border_never_sampled))
            for _ in range(1 if quirks.one_mask else images)
        ]
        both = drawn[0] if quirks.one_mask else torch.stack(drawn, dim=1)
        if self.device.type == "cuda":
            both = both.pin_memory()  # the copy of pageable memory would wait for the device
        rows, cols = both.to(self.device, non_blocking=True)
        return rows, cols

    def _points(self, size: Sequence[int], granularity: int, at_corner: bool) -> tuple[Tensor, Tensor]:
        height, width = size
        rows, cols = sample_points(height, width, granularity, self.places)
        if at_corner:
            return rows, cols
        shifts = [torch.randint(side % granularity + 1, (1,), generator=self.places) for side in size]
        return rows + shifts[0], cols + shifts[1]

    def state_dict(self) -> dict[str, Tensor | int]:
        """All generators as plain tensors and numbers."""
        return {
            **numpy_state(self.rng),
            "places": self.places.get_state(),
            "torch": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        """Continue exactly where `state_dict` was taken."""
        restore_numpy(self.rng, state)
        self.places.set_state(torch.as_tensor(state["places"], dtype=torch.uint8))
        self.generator.set_state(torch.as_tensor(state["torch"], dtype=torch.uint8))


def strong_augment(
    images: Tensor, labels: Tensor, confidence: Tensor, mode: str, draws: Draws
) -> tuple[Tensor, Tensor, Tensor]:
    """Mix a batch of unlabeled images (B, 3, H, W), pseudo-labels (B, H, W) and their confidence (B, H, W).

    `cutout` blanks half of every image and ignores its labels; `cutmix` fills that half from the next image;
    `classmix` keeps half of the label values of an image and takes the rest from the next one.

    Source: `generate_unsup_data` in `u2pl/dataset/augmentation.py` of U2PL, on which the method is built.
    """
    keep = draws.keep(labels, mode)
    if mode == "cutout":
        return *cut_out(images, labels, keep), confidence
    return mix_with_next(images, keep), mix_with_next(labels, keep), mix_with_next(confidence, keep)
