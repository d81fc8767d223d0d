"""The backward pass without the engine, which refuses a device that has no driver.

The nodes of the graph are called as the engine does: the last one made comes first, gradients of several paths are
added, brought to the shape of what they belong to, and what a node has saved is freed after it.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Saved:
    """A tensor that a node keeps for its backward pass, until that has been."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor


class Backward:
    """Runs backward passes; `node` names the one that is called."""

    def __init__(self) -> None:
        self.node = ""
        self._tasks = itertools.count(1)
        self._task = -1
        self._used: list[Saved] = []

    def task(self) -> int:
        """Number of the running pass, -1 outside: by it recomputed parts know that they need not do so twice."""
        return self._task

    def saved(self) -> Any:
        """Context of forward passes whose saved tensors can be freed one by one."""

        def use(kept: Saved) -> Tensor:
            assert kept.tensor is not None, "a second backward pass through the same graph"
            self._used.append(kept)
            return kept.tensor

        return torch.autograd.graph.saved_tensors_hooks(Saved, use)

    @torch.no_grad()
    def run(self, loss: Tensor) -> None:
        """In place of `loss.backward()`."""
        root = loss.grad_fn
        assert root is not None, "nothing to differentiate"
        self._task = next(self._tasks)
        waiting, seen, todo = Counter[Any](), {root}, [root]
        while todo:
            for child, _ in _edges(todo.pop()):
                waiting[child] += 1
                if child not in seen:
                    seen.add(child)
                    todo.append(child)
        grads: dict[Any, list[Tensor | None]] = {root: [torch.ones_like(loss)]}
        order = itertools.count()
        ready = [(0, next(order), root)]
        while ready:
            node = heapq.heappop(ready)[-1]
            outputs = self._call(node, grads.pop(node))
            for (child, place), grad in zip(_edges(node), outputs, strict=True):
                _add(grads, child, place, grad)
                waiting[child] -= 1
                if not waiting[child]:
                    heapq.heappush(ready, (-child._sequence_nr(), next(order), child))
        self.node, self._task = "", -1

    def _call(self, node: Any, grads: list[Tensor | None]) -> Sequence[Tensor | None]:
        """What a node makes of the gradients of its outputs, one per edge; a leaf keeps its own."""
        self.node = node.name().rpartition("::")[2]
        if all(grad is None for grad in grads):
            return [None] * len(_edges(node))
        if hasattr(node, "variable"):
            leaf, (grad,) = node.variable, grads
            leaf.grad = grad if leaf.grad is None else leaf.grad.add_(grad)
            return ()
        function = hasattr(node, "needs_input_grad")  # of the project, where an input may be no tensor
        outputs = node.apply(*grads) if function else node(*grads)
        for kept in self._used:
            kept.tensor = None
        self._used.clear()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = (
            node.needs_input_grad if function else [child is not None for child, _ in node.next_functions]
        )
        return [grad for grad, needed in zip(outputs, wanted, strict=True) if needed]


def _edges(node: Any) -> list[tuple[Any, int]]:
    """The nodes that a node gives gradients to, each with the place of the output that they belong to."""
    return [edge for edge in node.next_functions if edge[0] is not None]


def _add(grads: dict[Any, list[Tensor | None]], node: Any, place: int, grad: Tensor | None) -> None:
    """Add a gradient to those of a node's output `place`."""
    metadata = node._input_metadata
    own = grads.setdefault(node, [None] * len(metadata))
    if grad is None:
        return
    wanted = metadata[place]
    if grad.shape != torch.Size(wanted.shape):  # which is a list
        grad = grad.sum_to_size(wanted.shape)
    if grad.dtype != wanted.dtype:
        grad = grad.to(wanted.dtype)
    assert grad.device == wanted.device, (
        f"{node.name()}: a gradient on {grad.device}, wanted on {wanted.device}"
    )
    before = own[place]
    own[place] = grad if before is None else before + grad
