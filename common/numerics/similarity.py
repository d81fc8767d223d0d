"""Cosine similarities of features to fixed vectors, in full precision, and sums of features by group."""

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


def grouped_sums(rows: Tensor, group: Tensor, groups: int, places: int | None = None) -> Tensor:
    """Sums (groups, D) of the rows (S, D) of each group (S,) int64, -1 for none; the same bits at every call.

    What is not finite spoils its own group alone. A GPU adds the rows of one place one after the other, so there a
    group has many `places`, by default as many as two million numbers allow.
    """
    if places is None:
        places = max(1, 2**21 // ((groups + 1) * rows.shape[1])) if rows.is_cuda else 1
    if places > 1:
        group = group * places + torch.arange(len(rows), device=rows.device) % places
    total = rows.new_zeros((groups + 1) * places, rows.shape[1])  # group -1 is the last
    total.index_put_((group,), rows, accumulate=True)
    return total.view(groups + 1, places, -1)[:-1].sum(dim=1)
