"""Cosine similarities of features to fixed vectors, in full precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@contextmanager
def full_float32() -> Iterator[None]:
    """Matrix products of float32 without TF32, whose three digits a temperature of 0.1 would show."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class Products(torch.autograd.Function):
    """`rows @ columns.T` (S, D), (C, D) -> (S, C) in full precision forwards and backwards; columns are constant."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor) -> Tensor:
        """The products (S, C)."""
        ctx.save_for_backward(columns)
        with full_float32():
            return rows @ columns.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """The gradient of the rows (S, D)."""
        (columns,) = ctx.saved_tensors
        with full_float32():
            return grads[0] @ columns, None


def cosines(rows: Tensor, columns: Tensor, eps: float) -> Tensor:
    """Cosine similarity of every row (S, D), whose gradient it carries, to every constant column (C, D): (S, C).

    Norms below `eps` count as `eps`, so a zero vector has the similarity 0 to everything.
    """
    unit = F.normalize(columns.detach(), dim=1, eps=eps)
    result: Tensor = Products.apply(F.normalize(rows, dim=1, eps=eps), unit)
    return result
