"""The random numbers of AEL steps."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.run.rng import NumpyStream
from projects.u2pl.augment import Draws

Floats = NDArray[np.floating[Any]]


class BoxUniforms(NamedTuple):
    """The uniform numbers of one random box, in the order in which they are drawn."""

    aspect: float
    row: float
    col: float


class AelDraws(Draws):
    """The random numbers of AEL steps in the order of the original; saved with a checkpoint.

    Classes and random boxes come from the NumPy generator, images and shuffles from one of Python, the maps of the
    consistency from the device's. The first two are seeded alike on every rank, as in the original, unless the
    ranks shall draw `apart`: with shared banks equal numbers would choose the same image everywhere.
    """

    def __init__(self, seed: int, rank: int, device: torch.device, apart: bool = False) -> None:
        super().__init__(seed, rank, device)
        own = seed + rank if apart else seed
        self.rng = np.random.RandomState(own)
        self.python = random.Random(own)
        self._kept: dict[str, Any] = {}

    def coin(self) -> float:
        """Uniform number in [0, 1) that decides which of two unlabeled images stays."""
        return self.python.random()

    def classes(self, candidates: Sequence[int], probs: Floats, count: int) -> list[int]:
        """`count` independent draws among `candidates`."""
        return [int(self.rng.choice(candidates, p=probs)) for _ in range(count)]

    def image(self, candidates: Sequence[int], count: int) -> int:
        """One of the candidates, or any of `count` images if there are none."""
        return self.python.choice(candidates) if candidates else self.python.randint(0, count - 1)

    def component_order(self, count: int) -> list[int]:
        """The numbers 1..count, shuffled."""
        order = list(range(1, count + 1))
        self.python.shuffle(order)
        return order

    def box_uniforms(self) -> BoxUniforms:
        """The numbers of a random box."""
        self.rng.uniform()  # the original also draws the area, from a range of one value
        aspect, row, col = (float(self.rng.uniform()) for _ in range(3))
        return BoxUniforms(aspect, row, col)

    def growth(self) -> float:
        """Uniform number that decides on the height of a grown box."""
        return float(self.rng.uniform())

    def class_maps(self, num_classes: int, height: int, width: int) -> Tensor:
        """Uniform numbers (K, H, W) on the device."""
        return torch.rand(num_classes, height, width, generator=self.generator, device=self.generator.device)

    def look_ahead(self) -> None:
        """From now on the host's numbers are of the step after this one: a run resumed before it draws them again."""
        self._kept = NumpyStream.state_dict(self) | self._python_state()

    def catch_up(self) -> None:
        """The step that the numbers since `look_ahead` were drawn for has begun."""
        self._kept = {}

    def _python_state(self) -> dict[str, Any]:
        return {"python": torch.tensor(self.python.getstate()[1])}

    def state_dict(self) -> dict[str, Any]:
        """All three generators as plain tensors and numbers, those of the host without what was drawn ahead."""
        return super().state_dict() | self._python_state() | self._kept

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        super().load_state_dict(state)
        self.catch_up()
        words = tuple(torch.as_tensor(state["python"]).tolist())
        self.python.setstate((self.python.VERSION, words, None))
