"""Random numbers of CCT's perturbations, saved with its checkpoints."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.run.rng import numpy_state, restore_numpy


class CctDraws:
    """Random numbers of the perturbations, one set per process.

    Places of the cut-out come from a stream of Python, thresholds from one of NumPy, as in the original, where neither
    was seeded; channels and noise come from a generator of the device.
    """

    def __init__(self, seed: int, rank: int, device: torch.device) -> None:
        self.places = random.Random(seed + rank)
        self.rng = np.random.RandomState(seed + rank)
        self.generator = torch.Generator(device=device)
        self.generator.manual_seed(seed + rank)

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
        return {"places": places, **numpy_state(self.rng), "torch": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        self.places.setstate((3, tuple(torch.as_tensor(state["places"]).tolist()), None))
        restore_numpy(self.rng, state)
        self.generator.set_state(torch.as_tensor(state["torch"], dtype=torch.uint8))
