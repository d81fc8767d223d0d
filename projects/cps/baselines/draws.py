"""Random numbers of CCT's perturbations, saved with its checkpoints."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from common.run.rng import Streams


class CctDraws(Streams):
    """Random numbers of the perturbations, one set per process.

    Places of the cut-out come from a stream of Python, thresholds from one of NumPy, as in the original, where neither
    was seeded; channels and noise come from a generator of the device.
    """

    def __init__(self, seed: int, rank: int, device: torch.device) -> None:
        super().__init__(seed + rank, seed + rank, device)
        self.places = random.Random(seed + rank)

    def place(self, low: int, high: int) -> int:
        """Offset of a blanked rectangle, both ends included."""
        return self.places.randint(low, high)

    def share(self, low: float, high: float) -> float:
        """Share of the largest attention."""
        return float(self.rng.uniform(low, high))

    def uniform(self, *shape: int, like: Tensor) -> Tensor:
        """Numbers in [0, 1) on the device of `like`."""
        return torch.rand(*shape, generator=self.generator, device=like.device, dtype=like.dtype)

    def state_dict(self) -> dict[str, Any]:
        """All streams as plain tensors and numbers."""
        places = torch.tensor(self.places.getstate()[1], dtype=torch.int64)
        return {**super().state_dict(), "places": places}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        super().load_state_dict(state)
        self.places.setstate((3, tuple(torch.as_tensor(state["places"]).tolist()), None))
