"""How networks reach a device and several processes."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common.distributed import Dist, broadcast_buffers

M = TypeVar("M", bound=nn.Module)


def placed(module: M, dist: Dist, *, synchronize: bool, channels_last: bool) -> M:
    """The module on its device, in the memory layout asked for.

    With `synchronize` BatchNorm takes its statistics over all processes, see `common.numerics.precision.synchronized`.
    """
    if synchronize:
        module = with_sync_bn(module)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return module.to(device=dist.device).to(memory_format=layout)


def with_sync_bn(module: M) -> M:
    """The module with BatchNorm over all processes in place of its own."""
    convert: Any = nn.SyncBatchNorm.convert_sync_batchnorm
    if any(type(one).__module__.startswith("timm.") for one in module.modules()):
        from timm import layers

        convert = layers.convert_sync_batchnorm  # its layers may hold the activation too
    converted: M = convert(module)
    return converted


def wrapped(
    module: nn.Module, dist: Dist, *, compiled: bool, idle: Collection[nn.Parameter] = ()
) -> nn.Module:
    """The module as the loop calls it: `compiled` if asked for, and its gradients averaged over processes.

    Buffers are not broadcast at a forward; `share_statistics` does that. `idle` parameters never get a gradient, for
    which the averaging would wait.
    """
    module = torch.compile(module) if compiled else module  # type: ignore[assignment]
    if dist.world_size == 1:
        return module
    ignored = [name for name, p in module.named_parameters() if any(p is one for one in idle)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)
    ids = [dist.local_rank] if dist.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False)


def unsynchronized(networks: Iterable[nn.Module], dist: Dist, *, synchronize: bool) -> tuple[nn.Module, ...]:
    """Those networks in which each of several processes computes BatchNorm on its own batch: all or none."""
    return tuple(networks) if dist.world_size > 1 and not synchronize else ()


def share_statistics(networks: Iterable[nn.Module], dist: Dist) -> None:
    """Give all processes the first one's running statistics; every step and evaluation begins with those."""
    for network in networks:
        broadcast_buffers(network, dist)
