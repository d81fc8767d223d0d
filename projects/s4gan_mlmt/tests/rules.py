"""Values that the recordings give to network states."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def rule_value(key: str, shape: Sequence[int]) -> np.ndarray:
    """The value of a state entry, from its name and shape."""
    rng = np.random.RandomState(zlib.crc32(key.encode()))
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if key.endswith("running_var"):
        return (0.5 + rng.rand(*shape)).astype(np.float32)
    if key.endswith("running_mean") or (len(shape) == 1 and not key.endswith("weight")):
        return (0.1 * rng.randn(*shape)).astype(np.float32)
    if len(shape) == 1:
        return (0.5 + 0.5 * rng.rand(*shape)).astype(np.float32)
    return (rng.randn(*shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)


def rule_state(keys: Any) -> dict[str, Tensor]:
    """A state with the recorded keys, in their order."""
    return {key: torch.from_numpy(np.asarray(rule_value(key, shape))) for key, shape, _ in keys}


def fill(network: nn.Module, keys: Any) -> None:
    """Give a network the rule's values; every key must fit, in its order."""
    state = rule_state(keys)
    assert list(network.state_dict()) == list(state)
    network.load_state_dict(state)
