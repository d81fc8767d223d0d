"""A stream goes on exactly where its state was taken, after a trip through a checkpoint file."""

from __future__ import annotations

import torch

from common.run.checkpoint import load, save
from common.run.rng import Streams


def test_a_stream_goes_on(tmp_path):
    def draw(one: Streams) -> list[float]:
        drawn = torch.rand(3, generator=one.generator).tolist()
        return [one.rng.uniform(), one.rng.randint(0, 1000), *drawn]

    streams, other = (Streams(seed, seed + 1, torch.device("cpu")) for seed in (3, 99))
    streams.rng.uniform(size=700)  # beyond the first block of the generator
    torch.rand(5, generator=streams.generator)
    save(tmp_path / "state.pt", {"draws": streams.state_dict()})
    expected = draw(streams)
    other.load_state_dict(load(tmp_path / "state.pt")["draws"])
    assert draw(other) == expected
