"""Random streams of the host as plain tensors and numbers, for checkpoints that hold nothing else."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def numpy_state(rng: np.random.RandomState) -> dict[str, Tensor | int]:
    """State of a NumPy stream of uniform numbers and integers; a pending normal variate would be lost."""
    state = rng.get_state(legacy=False)["state"]
    return {
        "numpy_keys": torch.from_numpy(state["key"].astype(np.int64)),
        "numpy_position": int(state["pos"]),
    }


def restore_numpy(rng: np.random.RandomState, state: Mapping[str, Tensor | int]) -> None:
    """Continue a stream exactly where `numpy_state` was taken."""
    keys = torch.as_tensor(state["numpy_keys"]).numpy().astype(np.uint32)
    rng.set_state(("MT19937", keys, int(state["numpy_position"]), 0, 0.0))
