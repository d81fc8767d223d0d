"""Xception-65 for dense prediction, the encoder of the published COCO settings.

State keys and shapes are those of the authors' networks, so their weight files load by name. Two oddities are part of
the pretrained weights: where a block's shortcut is the identity it adds the rectified input, and the low-level feature
is tapped inside block 2 before the strided layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError

norm = partial(nn.BatchNorm2d, momentum=0.0003)
MIDDLE = range(4, 20)
DROPPED_KEYS = ("itr", "tmp", "track")  # counters of the framework that wrote the weight file


class SeparableConv(nn.Module):
    """Depthwise 3x3 and pointwise 1x1 convolution; `activate` rectifies after each, else the caller does before."""

    def __init__(self, in_planes: int, planes: int, stride: int, dilation: int, activate: bool) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            in_planes, in_planes, 3, stride, dilation, dilation, groups=in_planes, bias=False
        )
        self.bn1 = norm(in_planes)
        self.pointwise = nn.Conv2d(in_planes, planes, 1, bias=False)
        self.bn2 = norm(planes)
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_planes, H, W) -> (B, planes, ceil(H / stride), ceil(W / stride))."""
        x = self.bn1(self.depthwise(x))
        x = self.bn2(self.pointwise(F.relu(x, inplace=True) if self.activate else x))
        return F.relu(x, inplace=True) if self.activate else x


class Block(nn.Module):
    """Three separable convolutions, each after a rectifier, and a shortcut.

    The third convolution and the shortcut have the stride; the first or (not `grow_first`) the second changes widths.
    An identity shortcut carries relu(x) where `rectified_shortcut`, because the authors' rectifier works in place
    (QUIRK quirks.rectified_shortcut), otherwise x.
    """

    def __init__(
        self, in_planes: int, planes: int, stride: int = 1, dilation: int = 1,
        grow_first: bool = True, rectified_shortcut: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        project = in_planes != planes or stride != 1
        self.skip = nn.Conv2d(in_planes, planes, 1, stride, bias=False) if project else None
        self.skipbn = norm(planes) if project else None
        middle = planes if grow_first else in_planes
        self.sepconv1 = SeparableConv(in_planes, middle, 1, dilation, False)
        self.sepconv2 = SeparableConv(middle, planes, 1, dilation, False)
        self.sepconv3 = SeparableConv(planes, planes, stride, dilation, False)
        self.rectified_shortcut = rectified_shortcut

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Output (B, planes, H', W') and the second convolution's output (B, planes, H, W), not rectified."""
        rectified = F.relu(x)
        if self.skip is not None and self.skipbn is not None:
            shortcut = self.skipbn(self.skip(x))
        else:
            shortcut = rectified if self.rectified_shortcut else x
        tapped = self.sepconv2(F.relu(self.sepconv1(rectified), inplace=True))
        return self.sepconv3(F.relu(tapped)) + shortcut, tapped


class Xception65(nn.Module):
    """Xception-65 without classifier, (B, 3, H, W) -> [low, low, x, x] with channels `out_planes`.

    At `output_stride` 8 or 16; `width` is a 32nd of the channels of `x`, 64 as published.

    Raises:
        UserError: another output stride or a width that cannot be used.
    """

    def __init__(
        self, output_stride: Literal[8, 16] = 8, width: int = 64, rectified_shortcut: bool = True
    ) -> None:
        super().__init__()
        if output_stride not in (8, 16):
            raise UserError(f"model.output_stride={output_stride}: xception65 has 8 or 16")
        if width < 8 or width % 8:
            raise UserError(
                f"model.width={width}: xception65 needs a multiple of 8 (64 is the published one)"
            )
        rate, block = 16 // output_stride, partial(Block, rectified_shortcut=rectified_shortcut)
        p32, p64, p128, p256, p728, p1024, p1536, p2048 = (
            n * width // 64 for n in (32, 64, 128, 256, 728, 1024, 1536, 2048)
        )
        self.conv1 = nn.Conv2d(3, p32, 3, 2, 1, bias=False)
        self.bn1 = norm(p32)
        self.conv2 = nn.Conv2d(p32, p64, 3, 1, 1, bias=False)
        self.bn2 = norm(p64)
        self.block1 = block(p64, p128, 2)
        self.block2 = block(p128, p256, 2)
        self.block3 = block(p256, p728, 1 if output_stride == 8 else 2)
        for i in MIDDLE:
            self.add_module(f"block{i}", block(p728, p728, 1, rate))
        self.block20 = block(p728, p1024, 1, rate, grow_first=False)
        self.conv3 = SeparableConv(p1024, p1536, 1, rate, True)
        self.conv4 = SeparableConv(p1536, p1536, 1, rate, True)
        self.conv5 = SeparableConv(p1536, p2048, 1, rate, True)
        self.out_planes = (p256, p256, p2048, p2048)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) -> low-level features at 1/4 (twice) and the last features (twice)."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        x, low = self.block2(self.block1(x)[0])
        x, _ = self.block3(x)
        for i in (*MIDDLE, 20):
            x, _ = self.get_submodule(f"block{i}")(x)
        x = self.conv5(self.conv4(self.conv3(x)))
        return [low, low, x, x]


def pretrained_state(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of an ImageNet weight file that belong to the network; the rest are another framework's counters."""
    return {key: value for key, value in weights.items() if not any(part in key for part in DROPPED_KEYS)}
