"""The image-wise discriminator of s4GAN (paper section 3.2; `model/discriminator.py` of the original)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError
from common.numerics.precision import widened

STRIDE = 16
rectify = partial(F.leaky_relu, negative_slope=0.2, inplace=True)


class Discriminator(nn.Module):
    """Four strided convolutions, average pool, linear layer and sigmoid; state keys are the original's.

    Args:
        in_channels: classes and the image's three channels.
        pool: window (h, w) of the average pool, as the authors fix it: (20, 20) at 321x321, (16, 32) at 256x512. The
            crop must leave one window. `None` averages the whole map, which is the same there and takes any crop.
        dropout: probability with which each of the first three layers drops a channel in training mode.
        width: channels of the first layer, doubled by each of the others; 64 as published.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        pool: tuple[int, int] | None = None,
        dropout: float = 0.5,
        width: int = 64,
    ) -> None:
        super().__init__()
        if in_channels < 1 or width < 1 or (pool is not None and min(pool) < 1):
            raise UserError(
                f"discriminator: {in_channels} channels, width {width} and pool {pool} are not usable; give positive "
                "numbers"
            )
        planes = (in_channels, width, 2 * width, 4 * width, 8 * width)
        self.conv1, self.conv2, self.conv3, self.conv4 = (
            nn.Conv2d(planes[i], planes[i + 1], 4, stride=2, padding=1) for i in range(4)
        )
        # three modules and not one, so that each may be given masks of its own
        self.dropout1, self.dropout2, self.dropout3 = (nn.Dropout2d(dropout) for _ in range(3))
        self.fc = nn.Linear(planes[-1], 1)
        self.pool = pool

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """How real the maps (B, C + 3, H, W) are, class channels first, the image in 0..1 behind them.

        Returns:
            Score (B, 1) in 0..1, 1 for real, and the pooled feature (B, 8 * width, 1, 1), both in float32 or wider.

        Raises:
            UserError: the maps do not leave exactly one pooling window.
        """
        self.require_crop((x.shape[-2], x.shape[-1]))
        x = self.dropout1(rectify(self.conv1(x)))
        x = self.dropout2(rectify(self.conv2(x)))
        x = self.dropout3(rectify(self.conv3(x)))
        x = rectify(self.conv4(x))
        # the loss takes logarithms of the score and the gate compares it with a threshold
        with torch.autocast(x.device.type, enabled=False):
            x = widened(x)
            feats = x.mean(dim=(2, 3), keepdim=True) if self.pool is None else F.avg_pool2d(x, self.pool)
            return self.fc(feats.flatten(1)).sigmoid(), feats

    def require_crop(self, size: tuple[int, int]) -> None:
        """Refuse images (H, W) that do not leave exactly one pooling window; `UserError`."""
        window = self.pool or tuple(side // STRIDE for side in size)
        if all(side // STRIDE // max(length, 1) == 1 for side, length in zip(size, window, strict=True)):
            return
        height, width = size
        if self.pool is None:
            raise UserError(
                f"data.crop_size=({height}, {width}): the discriminator needs at least {STRIDE} pixels per side"
            )
        raise UserError(
            f"model.d_pool={self.pool}: does not fit the map {height // STRIDE}x{width // STRIDE} that a crop of "
            f"{height}x{width} leaves; set it to null, which takes any crop"
        )
