"""Which pixels the prototype head sees while training, and their features and labels.

Legend: B images, D channels, (h, w) feature size, (H, W) crop, G patches along each side, n = G * G points.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.errors import UserError
from projects.proto_consistency.head import corner_weights


def sample_points(
    height: int, width: int, granularity: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One random pixel in each of G x G patches: rows (n,) and columns (n,), int64 on the host, in row-major order.

    Patches have `height // G` rows and `width // G` columns and start at the corner, so of a crop that they do not
    fill the last rows and columns are never drawn (QUIRK quirks.border_never_sampled: 513 = 32 * 16 + 1).

    Args:
        height: of the crop.
        width: of the crop.
        granularity: G.
        generator: of the host; it gives G row offsets and G column offsets for one strip of columns after the other.

    Raises:
        UserError: the crop has fewer rows or columns than patches.

    Source: the mask generation left in comments in the released model file; there a dense mask.
    """
    if not 1 <= granularity <= min(height, width):
        raise UserError(
            f"method.proto.granularity={granularity}: a crop of {height}x{width} pixels has no {granularity} patches "
            "along each side; lower it or enlarge data.crop_size"
        )
    rows_per, cols_per = height // granularity, width // granularity
    corner = torch.arange(granularity)
    rows, cols = [], []
    for strip in range(granularity):
        rows.append(corner * rows_per + torch.randint(rows_per, (granularity,), generator=generator))
        cols.append(strip * cols_per + torch.randint(cols_per, (granularity,), generator=generator))
    place = (torch.cat(rows) * width + torch.cat(cols)).sort().values
    return place // width, place % width


def gather_points(maps: Tensor, rows: Tensor, cols: Tensor, size: Sequence[int]) -> Tensor:
    """Values (B * n, D) of maps (B, D, h, w) at pixels of the maps resized to `size`, image by image.

    Only the four neighbours of each pixel are touched; values and gradients are those of a bilinear resize of the
    whole map with aligned corners.

    Args:
        maps: (B, D, h, w).
        rows: (n,) for all images, or (B, n); positions in the resized map, on the device of the maps.
        cols: alike.
        size: (H, W).
    """
    batch, dim, height, width = maps.shape
    down, across = corner_weights(rows, int(size[0]), height), corner_weights(cols, int(size[1]), width)
    flat = maps.permute(0, 2, 3, 1).reshape(batch, height * width, dim)
    image = torch.arange(batch, device=maps.device)[:, None]
    right, bottom = (x.share.to(maps.dtype).unsqueeze(-1) for x in (across, down))

    def line(row: Tensor) -> Tensor:
        low, high = flat[image, row * width + across.low], flat[image, row * width + across.high]
        return (1 - right) * low + right * high

    return ((1 - bottom) * line(down.low) + bottom * line(down.high)).flatten(0, 1)


def gather_labels(labels: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Values (B * n,) of maps (B, H, W) of any kind at pixels (n,) or (B, n), in the order of `gather_points`."""
    image = torch.arange(len(labels), device=labels.device)[:, None]
    return labels[image, rows, cols].flatten()
