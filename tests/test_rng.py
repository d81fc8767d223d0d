"""A stream goes on exactly where its state was taken, after a trip through a checkpoint file."""

from __future__ import annotations

import numpy as np

from common.run.checkpoint import load, save
from common.run.rng import numpy_state, restore_numpy


def test_a_stream_goes_on(tmp_path):
    rng = np.random.RandomState(3)
    rng.uniform(size=700)  # beyond the first block of the generator
    save(tmp_path / "state.pt", {"draws": numpy_state(rng)})
    expected = [rng.uniform(), rng.randint(0, 1000)]
    other = np.random.RandomState(99)
    restore_numpy(other, load(tmp_path / "state.pt")["draws"])
    assert [other.uniform(), other.randint(0, 1000)] == expected
