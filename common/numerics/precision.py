"""Precision of the forward passes and of BatchNorm's statistics; losses are always float32."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from common.distributed import Dist

HALF = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """Context of a forward pass in the precision `fp32`, `bf16` or `fp16` of `run.precision`."""
    half = HALF[precision]
    return contextlib.nullcontext() if half is None else torch.autocast(device.type, half)


def widened(x: Tensor) -> Tensor:
    """`x` (any shape) in float32 if it is of half precision, otherwise itself."""
    return x.float() if x.dtype.itemsize == 2 else x


def grad_scaler(precision: str, dist: Dist) -> torch.amp.GradScaler:
    """The scaler of the losses; it does nothing unless `precision` is `fp16`."""
    return torch.amp.GradScaler(dist.device.type, enabled=precision == "fp16")


def synchronized(sync_bn: bool, dist: Dist) -> bool:
    """Whether BatchNorm statistics are taken over all processes: wanted, several processes, on GPUs."""
    return sync_bn and dist.world_size > 1 and dist.device.type == "cuda"
