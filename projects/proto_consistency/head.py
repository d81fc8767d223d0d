"""The prototype predictor: cosine to the nearest prototype of every class, divided by a temperature.

Legend: B images, K classes, P prototypes per class, D channels, (h, w) feature size, (H, W) image size, N pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.numerics.losses import best_class
from common.numerics.precision import widened
from common.numerics.similarity import cosines, full_float32

EPSILON = 1e-12  # least norm, as `F.normalize` has it
BLOCK = 1 << 23  # cosines (numbers) that dense evaluation holds at once


class Match(NamedTuple):
    """How pixels resemble the classes.

    Attributes:
        scores: (N, K), the largest cosine to a prototype of each class, divided by the temperature.
        nearest: (N, K) int64 in 0..P-1, which prototype of the class has it.
    """

    scores: Tensor
    nearest: Tensor


class PrototypeHead(nn.Module):
    """K * P prototypes, kept raw and scaled to unit length only when they are compared; no optimizer moves them.

    Args:
        num_classes: K.
        per_class: P.
        dim: D.
        temperature: the cosines are divided by it.

    Attributes:
        proto_list: Parameter (K * P, D) without gradient, row = class * P + prototype; random until it is set. A
            parameter, not a buffer, so that the teacher's are averages of the student's.

    Raises:
        UserError: a size or the temperature is not positive.

    Source: `CosProto_Module` of the released evaluation code and the training code left there in comments.
    """

    def __init__(self, num_classes: int, per_class: int, dim: int, temperature: float = 0.1) -> None:
        super().__init__()
        if num_classes < 1 or per_class < 1 or dim < 1 or temperature <= 0:
            raise UserError(
                f"prototype head: {num_classes} classes, {per_class} prototypes each, {dim} channels, temperature "
                f"{temperature}; give positive numbers"
            )
        self.num_classes, self.per_class, self.temperature = num_classes, per_class, temperature
        self.proto_list = nn.Parameter(torch.randn(num_classes * per_class, dim), requires_grad=False)

    @property
    def dim(self) -> int:
        """Channels of a prototype, D."""
        return self.proto_list.shape[1]

    @torch.no_grad()
    def set(self, prototypes: Tensor) -> None:
        """Take prototypes (K * P, D).

        Raises:
            UserError: they have another shape.
        """
        if prototypes.shape != self.proto_list.shape:
            raise UserError(
                f"prototypes: shape {tuple(prototypes.shape)}, the network has {tuple(self.proto_list.shape)} "
                "(classes * method.proto.per_class, channels); make them for this configuration"
            )
        self.proto_list.copy_(prototypes)

    def match(self, feats: Tensor) -> Match:
        """Class scores of features (N, D), whose gradient they carry, and the nearest prototype of every class.

        The gradient passes through the unit length and through the nearest prototype of each class, whose own
        values are constant. Half precision is widened. A zero vector has no direction: it scores 0, without gradient,
        and its nearest prototypes are any.
        """
        with torch.autocast(feats.device.type, enabled=False):
            feats = widened(feats)
            # the derivative of the unit length at 0 would be 1 / EPSILON
            alive = feats.detach().square().sum(dim=1, keepdim=True) > 0
            products = cosines(feats.where(alive, 0.0), self._prototypes_like(feats), EPSILON)
        value, nearest = products.view(-1, self.num_classes, self.per_class).max(dim=2)
        return Match(value / self.temperature, nearest)

    def dense(self, feats: Tensor, size: Sequence[int]) -> Tensor:
        """Class scores (B, K, H, W) of features (B, D, h, w), resized to `size` with aligned corners before the cosine.

        The values are those of `match` at every pixel, without the resized features ever being made: the products
        with the prototypes are resized instead, and the length of an interpolated feature follows from the products
        of neighbouring features.
        """
        shape = (feats.shape[0], self.num_classes, self.per_class)
        blocks = [c.view(*shape, *c.shape[2:]).amax(dim=2) for c in self._cosines(feats, size)]
        return torch.cat(blocks, dim=2) / self.temperature

    def nearest(self, feats: Tensor, size: Sequence[int]) -> Tensor:
        """Row of the nearest of all prototypes (B, H, W) int64, for pictures of which prototype stands where."""
        return torch.cat([best_class(c) for c in self._cosines(feats, size)], dim=1)

    def _prototypes_like(self, feats: Tensor) -> Tensor:
        return self.proto_list.detach().to(feats.dtype if feats.dtype == torch.float64 else torch.float32)

    def _cosines(self, feats: Tensor, size: Sequence[int]) -> Iterator[Tensor]:
        """Cosines (B, K * P, R, W) to all prototypes, some rows of the image at a time."""
        height, width = size[0], size[1]
        with torch.autocast(feats.device.type, enabled=False), full_float32():
            feats = widened(feats)
            unit = F.normalize(self._prototypes_like(feats), dim=1, eps=EPSILON)
            products = torch.einsum("bdhw,cd->bchw", feats, unit)
            lengths = _Lengths(feats)
        whole = torch.compiler.is_exporting()  # an exported network does not know how many rows there will be
        rows = height if whole else max(1, BLOCK // max(1, len(feats) * len(unit) * width))
        for first in (0,) if whole else range(0, height, rows):
            place = torch.arange(first, min(first + rows, height), device=feats.device)
            down = corner_weights(place, height, feats.shape[2])
            across = corner_weights(torch.arange(width, device=feats.device), width, feats.shape[3])
            share = down.share.to(feats.dtype)[:, None]
            lines = torch.lerp(products[:, :, down.low], products[:, :, down.high], share)
            found = torch.lerp(lines[..., across.low], lines[..., across.high], across.share.to(feats.dtype))
            # rounding may leave the length of opposite neighbours' mean too small; no cosine exceeds 1
            yield (found / lengths.at(down, across).unsqueeze(1)).clamp(-1.0, 1.0)


class Corners(NamedTuple):
    """Where positions fall between the samples of a smaller grid; each of the shape of the positions."""

    low: Tensor
    high: Tensor
    share: Tensor  # of `high`, float64 in [0, 1)


def corner_weights(place: Tensor, length: int, samples: int) -> Corners:
    """Neighbours and weights of positions 0..length-1 on a line of `samples` values with aligned ends.

    Whole numbers all the way, so that a position that coincides with a sample takes it alone.
    """
    whole = max(length - 1, 1)
    scaled = place * (samples - 1)
    low = scaled.div(whole, rounding_mode="floor")
    return Corners(low, (low + 1).clamp(max=samples - 1), (scaled - low * whole).double() / whole)


class _Lengths:
    """Norms of interpolated features, from the products of features (B, D, h, w) with their neighbours."""

    def __init__(self, feats: Tensor) -> None:
        right = torch.cat((feats[..., 1:], feats[..., -1:]), dim=3)
        self.own = feats.square().sum(dim=1)
        self.beside = (feats * right).sum(dim=1)
        below, below_right = (torch.cat((x[:, :, 1:], x[:, :, -1:]), dim=2) for x in (feats, right))
        self.under = (feats * below).sum(dim=1)
        self.crossed = (feats * below_right).sum(dim=1) + (right * below).sum(dim=1)

    def at(self, down: Corners, across: Corners) -> Tensor:
        """Norms (B, R, W), at least `EPSILON`: the square of a mean is a sum of products, along each direction."""
        b = down.share.to(self.own.dtype)[:, None]
        a = 1 - b
        own = (
            a * a * self.own[:, down.low]
            + b * b * self.own[:, down.high]
            + 2 * a * b * self.under[:, down.low]
        )
        beside = a * a * self.beside[:, down.low] + b * b * self.beside[:, down.high]
        beside = beside + a * b * self.crossed[:, down.low]
        d = across.share.to(self.own.dtype)
        c = 1 - d
        square = (
            c * c * own[..., across.low] + d * d * own[..., across.high] + 2 * c * d * beside[..., across.low]
        )
        return square.clamp(min=EPSILON**2).sqrt()
