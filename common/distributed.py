"""This process's place among those of a run, and the few collectives a run needs."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class Dist:
    """This process's place among the processes of a run.

    Attributes:
        rank: Index over all machines, 0 .. world_size - 1.
        world_size: Number of processes of the run.
        local_rank: Index on this machine.
        device: Where this process's networks live.
        backend: "none" (one process), "gloo" (CPUs) or "nccl" (GPUs).
        launcher: "single", "torchrun" (any launcher that sets RANK and WORLD_SIZE) or "slurm".
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")  # noqa: RUF009 -- immutable
    backend: str = "none"
    launcher: str = "single"

    @property
    def is_main(self) -> bool:
        """True on the first rank, the only one that writes files."""
        return self.rank == 0


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x` of the host on `device`; the host does not wait for a GPU, and torch keeps the pinned copy until then."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def _reduced(tensor: Tensor, dist: Dist, op: Any) -> Tensor:
    """`tensor` itself for one process, otherwise a new tensor reduced with `op`."""
    if dist.world_size == 1:
        return tensor
    result = tensor.detach().clone()
    torch_dist.all_reduce(result, op)
    return result


def sum_over_ranks(tensor: Tensor, dist: Dist) -> Tensor:
    """Sum of `tensor` (any shape, equal on all ranks) over the ranks; `tensor` itself for one process."""
    return _reduced(tensor, dist, torch_dist.ReduceOp.SUM)


def mean_over_ranks(tensor: Tensor, dist: Dist) -> Tensor:
    """Mean of a floating-point `tensor` (any shape) over the ranks; `tensor` itself for one process."""
    return tensor if dist.world_size == 1 else sum_over_ranks(tensor, dist) / dist.world_size


def max_over_ranks(tensor: Tensor, dist: Dist) -> Tensor:
    """Elementwise maximum of `tensor` over the ranks; `tensor` itself for one process."""
    return _reduced(tensor, dist, torch_dist.ReduceOp.MAX)


def all_gather_padded(tensor: Tensor, dist: Dist) -> Tensor:
    """`tensor` (any shape) of every rank, stacked: (world_size, *shape), without gradient.

    All ranks must bring the same shape. Rows that differ in number are padded by the caller to a size
    known beforehand and come with a count, so that nothing has to ask the device how many there are.
    """
    if dist.world_size == 1:
        return tensor.detach().unsqueeze(0)
    source = tensor.detach().contiguous()
    if source.dtype == torch.bool:  # gloo does not carry it
        return all_gather_padded(source.to(torch.uint8), dist).to(torch.bool)
    result = source.new_empty((dist.world_size, *source.shape))
    torch_dist.all_gather(list(result.unbind(0)), source)
    return result


def gather_objects(obj: T, dist: Dist) -> list[T]:
    """`obj` of every rank, in the order of ranks, on every rank. Tensors in it should be on the CPU."""
    if dist.world_size == 1:
        return [obj]
    gathered: list[Any] = [None] * dist.world_size
    torch_dist.all_gather_object(gathered, obj)
    return gathered


def broadcast_object(obj: T, dist: Dist) -> T:
    """`obj` of the first rank, on every rank."""
    if dist.world_size == 1:
        return obj
    carrier: list[Any] = [obj]
    torch_dist.broadcast_object_list(carrier, src=0)
    return cast(T, carrier[0])


@torch.no_grad()
def broadcast_buffers(module: nn.Module, dist: Dist) -> None:
    """Give every rank the floating-point buffers (BatchNorm statistics) that `module` has on the first rank."""
    buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    if dist.world_size == 1 or not buffers:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    torch_dist.broadcast(flat, src=0)
    for part, buffer in zip(
        flat.split_with_sizes([buffer.numel() for buffer in buffers]), buffers, strict=True
    ):
        buffer.copy_(part.view_as(buffer))


def delayed_reduction(module: object, delay: bool) -> contextlib.AbstractContextManager[object]:
    """Context of a backward pass through `module` whose gradients are not yet reduced over processes.

    Without `delay`, or where nothing is reduced (one process), it does nothing.
    """
    if delay and isinstance(module, nn.parallel.DistributedDataParallel):
        return module.no_sync()
    return contextlib.nullcontext()
