"""Precision of forward passes, and where BatchNorm is synchronized."""

from __future__ import annotations

import pytest
import torch

from common.distributed import Dist
from common.numerics.precision import autocast, synchronized, widened

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_forward_passes_compute_in_the_named_precision(precision: str, dtype: torch.dtype) -> None:
    layer = torch.nn.Linear(4, 4)
    with autocast(CPU, precision):
        out = layer(torch.ones(2, 4))
    assert out.dtype == dtype
    assert layer(torch.ones(2, 4)).dtype == torch.float32
    assert widened(out).dtype == torch.float32
    assert torch.equal(widened(out), out.float())


def test_wide_tensors_are_themselves() -> None:
    for dtype in (torch.float32, torch.float64, torch.int64):
        x = torch.ones(3, dtype=dtype)
        assert widened(x) is x


def test_statistics_are_synchronized_over_several_gpus_alone() -> None:
    several = Dist(world_size=2, device=GPU)
    assert synchronized(True, several)
    assert not synchronized(False, several)
    assert not synchronized(True, Dist(device=GPU))
    assert not synchronized(True, Dist(world_size=2, device=CPU))
