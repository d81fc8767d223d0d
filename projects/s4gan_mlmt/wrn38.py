"""DeepLabV3+ with Wide-ResNet-38 (`model/deeplabv3p.py` and its trunk in the original; the paper has no number for it).

The trunk is pre-activated: a block normalizes its input, and where channels or stride change the shortcut projects
the normalized input. State keys are the original's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError
from common.models.deeplab import upsample

PUBLISHED_LAYERS = (3, 3, 6, 3, 1, 1)


class Module(NamedTuple):
    """One of the trunk's modules 2 to 7.

    Attributes:
        channels: of the convolutions of a block in multiples of the stem's; two are 3x3, three are 1x1, 3x3 and 1x1.
        stride: of the first block.
        dilation: of every 3x3 convolution.
        dropout: probability that a channel is dropped before the last convolution.
    """

    channels: tuple[int, ...]
    stride: int = 1
    dilation: int = 1
    dropout: float = 0.0


MODULES = (
    Module((2, 2)),
    Module((4, 4)),
    Module((8, 8), stride=2),
    Module((8, 16), dilation=2),
    Module((8, 16, 32), dilation=4, dropout=0.3),
    Module((16, 32, 64), dilation=4, dropout=0.5),
)


def _norm_relu(planes: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(planes), nn.ReLU(inplace=True))


def _conv(in_planes: int, planes: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    padding = dilation * (kernel // 2)
    return nn.Conv2d(in_planes, planes, kernel, stride, padding, dilation, bias=False)


class Block(nn.Module):
    """A pre-activated residual block of two 3x3 convolutions, or of 1x1, 3x3 and 1x1.

    Args:
        in_planes: channels of the input.
        channels: of the two or three convolutions; the last is the output's.
        stride: of the first convolution and of the projection.
        dilation: of the 3x3 convolutions.
        dropout: probability that a channel is dropped before the last of three convolutions.
    """

    def __init__(
        self, in_planes: int, channels: Sequence[int], stride: int, dilation: int, dropout: float
    ) -> None:
        super().__init__()
        self.bn1 = _norm_relu(in_planes)
        self.convs = nn.Sequential()
        if len(channels) == 2:
            self.convs.add_module("conv1", _conv(in_planes, channels[0], 3, stride, dilation))
            self.convs.add_module("bn2", _norm_relu(channels[0]))
            self.convs.add_module("conv2", _conv(channels[0], channels[1], 3, dilation=dilation))
        else:
            self.convs.add_module("conv1", _conv(in_planes, channels[0], 1, stride))
            self.convs.add_module("bn2", _norm_relu(channels[0]))
            self.convs.add_module("conv2", _conv(channels[0], channels[1], 3, dilation=dilation))
            self.convs.add_module("bn3", _norm_relu(channels[1]))
            if dropout:
                # the original rebinds the framework's Dropout to this class, for the whole process
                self.convs.add_module("dropout", nn.Dropout2d(dropout))
            self.convs.add_module("conv3", _conv(channels[1], channels[2], 1))
        project = stride != 1 or in_planes != channels[-1]
        self.proj_conv = _conv(in_planes, channels[-1], 1, stride) if project else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_planes, h, w) -> (B, channels[-1], ceil(h / stride), ceil(w / stride))."""
        normalized = self.bn1(x)
        shortcut: Tensor = x if self.proj_conv is None else self.proj_conv(normalized)
        out: Tensor = self.convs(normalized)
        return out + shortcut


class Trunk(nn.Module):
    """Wide-ResNet-38 without its last normalization and its classifier.

    Args:
        layers: blocks of the modules 2 to 7.
        width: channels of the stem; 64 as published.

    Attributes:
        out_planes: channels of the two outputs.
    """

    def __init__(self, layers: Sequence[int] = PUBLISHED_LAYERS, width: int = 64) -> None:
        super().__init__()
        if len(layers) != len(MODULES) or min(layers) < 1 or width < 1:
            raise UserError(
                f"wrn38: layers {tuple(layers)} and width {width} are not usable; give six positive block counts and a "
                "positive width"
            )
        self.mod1 = nn.Sequential()
        self.mod1.add_module("conv1", _conv(3, width, 3))
        planes = width
        stages: list[nn.Sequential] = []
        for module, blocks in zip(MODULES, layers, strict=True):
            channels = [width * factor for factor in module.channels]
            stage = nn.Sequential()
            for i in range(blocks):
                stride = module.stride if i == 0 else 1
                block = Block(planes, channels, stride, module.dilation, module.dropout)
                stage.add_module(f"block{i + 1}", block)
                planes = channels[-1]
            stages.append(stage)
        self.pool2, self.pool3 = (nn.MaxPool2d(3, stride=2, padding=1) for _ in range(2))
        self.mod2, self.mod3, self.mod4, self.mod5, self.mod6, self.mod7 = stages
        self.out_planes = (width * MODULES[0].channels[-1], planes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) -> module 2's output at stride 2 and the un-normalized sum of module 7 at stride 8."""
        low = self.mod2(self.pool2(self.mod1(x)))
        x = self.mod3(self.pool3(low))
        return low, self.mod7(self.mod6(self.mod5(self.mod4(x))))


def _conv_norm_relu(in_planes: int, planes: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(
        _conv(in_planes, planes, kernel, dilation=dilation), nn.BatchNorm2d(planes), nn.ReLU(inplace=True)
    )


class Aspp(nn.Module):
    """Image pooling, a 1x1 and three dilated 3x3 branches, concatenated in this order.

    Args:
        in_planes: channels of the input.
        planes: channels of each branch.
        dilations: of the three 3x3 branches.
    """

    def __init__(self, in_planes: int, planes: int, dilations: Sequence[int] = (12, 24, 36)) -> None:
        super().__init__()
        branches = [_conv_norm_relu(in_planes, planes, 1)]
        branches += [_conv_norm_relu(in_planes, planes, 3, dilation) for dilation in dilations]
        self.features = nn.ModuleList(branches)
        self.img_conv = _conv_norm_relu(in_planes, planes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_planes, h, w) -> (B, 5 * planes, h, w).

        Raises:
            UserError: in training with a single image, which leaves one value per channel to normalize in the pooling
                branch.
        """
        if self.training and len(x) == 1:
            raise UserError(
                "deeplabv3p_wrn38: the pooling branch cannot normalize a training batch of one image per process; use "
                "at least 2 images per process"
            )
        local = [branch(x) for branch in self.features]
        # a 1x1 map resized is a constant, whose backward pass is a plain sum
        pooled = self.img_conv(F.adaptive_avg_pool2d(x, 1)).expand_as(local[0])
        if local[0].is_contiguous(memory_format=torch.channels_last):
            pooled = pooled.contiguous(memory_format=torch.channels_last)  # else cat falls back to NCHW
        return torch.cat((pooled, *local), dim=1)


class DeepLabV3PlusWrn38(nn.Module):
    """DeepLabV3+ on Wide-ResNet-38, logits at stride 2.

    Args:
        num_classes: K.
        layers: blocks of the trunk's modules 2 to 7.
        width: channels of its stem; 64 as published.
        inner_planes: channels of the ASPP branches and of the hidden layers.
        low_planes: channels of the low-level branch.
        dilations: of the ASPP.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        layers: Sequence[int] = PUBLISHED_LAYERS,
        width: int = 64,
        inner_planes: int = 256,
        low_planes: int = 48,
        dilations: Sequence[int] = (12, 24, 36),
    ) -> None:
        super().__init__()
        self.backbone = Trunk(layers, width)
        low, high = self.backbone.out_planes
        self.aspp = Aspp(high, inner_planes, dilations)
        self.bot_fine = _conv(low, low_planes, 1)
        self.bot_aspp = _conv((2 + len(dilations)) * inner_planes, inner_planes, 1)
        hidden = partial(_conv_norm_relu, planes=inner_planes, kernel=3)
        self.final = nn.Sequential(
            *hidden(low_planes + inner_planes), *hidden(inner_planes), _conv(inner_planes, num_classes, 1)
        )
        for module in self.final:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, K, ceil(H / 2), ceil(W / 2))."""
        low, high = self.backbone(x)
        fine = self.bot_fine(low)
        coarse = self.bot_aspp(self.aspp(high))
        coarse = F.interpolate(coarse, size=fine.shape[-2:], mode="bilinear", align_corners=False)
        logits: Tensor = self.final(torch.cat((fine, coarse), dim=1))
        return logits

    def predict(self, x: Tensor) -> Tensor:
        """Logits (B, K, H, W) at the size of the images (B, 3, H, W)."""
        return upsample(self(x), x.shape[-2:])
