"""Weights by a rule: what recordings of networks hold instead of the authors' files."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np


def rule_value(key: str, shape: Sequence[int]) -> np.ndarray:
    """The value that the recordings give to a state entry, from its name and shape."""
    rng = np.random.RandomState(zlib.crc32(key.encode()))
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if key.endswith("running_var"):
        return (0.5 + rng.rand(*shape)).astype(np.float32)
    if key.endswith("running_mean") or (len(shape) == 1 and not key.endswith("weight")):
        return (0.1 * rng.randn(*shape)).astype(np.float32)
    if len(shape) == 1:
        return (0.5 + 0.5 * rng.rand(*shape)).astype(np.float32)
    return (rng.randn(*shape) * np.sqrt(2.0 / np.prod(shape[1:]))).astype(np.float32)
