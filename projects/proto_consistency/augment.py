"""Strong augmentation of the unlabeled batch and the random numbers of a training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from common.data.spec import IGNORE
from common.mean_teacher.draws import StepDraws
from projects.proto_consistency.config import QuirkConfig
from projects.proto_consistency.draws import sample_points


class Draws(StepDraws):
    """The random numbers of training steps; places come from a generator of the CPU, alike on every rank too."""

    def __init__(self, seed: int, rank: int, device: torch.device) -> None:
        super().__init__(seed, rank, device)
        self.device = device
        self.places = torch.Generator().manual_seed(seed)

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

    def state_dict(self) -> dict[str, Any]:
        """All generators as plain tensors and numbers."""
        return super().state_dict() | {"places": self.places.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        super().load_state_dict(state)
        self.places.set_state(torch.as_tensor(state["places"], dtype=torch.uint8))


def strong_augment(
    images: Tensor, labels: Tensor, confidence: Tensor, mode: str, draws: Draws
) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of unlabeled images (B, 3, H, W), pseudo-labels and their confidence (B, H, W), see `StepDraws.mix`.

    Blanks are ignored, and keep their confidence.
    """
    x, y, c = draws.mix(mode, labels, (images, 0.0), (labels, IGNORE), (confidence, None))
    return x, y, c
