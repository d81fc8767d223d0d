"""ResNet encoders for dense prediction: two stems, output stride 8, 16 or 32, multi-grid, any width.

State keys and sizes are those of the networks that U2PL, BRPG, the prototype-consistency system and CPS
train (deep stem) and of torchvision (plain stem), so weight files of either kind load by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

Stem = Literal["deep", "plain"]
OutputStride = Literal[8, 16, 32]


def conv3x3(in_planes: int, planes: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """A 3x3 convolution without bias whose padding keeps the size at stride 1."""
    return nn.Conv2d(in_planes, planes, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)


def conv1x1(in_planes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    """A 1x1 convolution without bias."""
    return nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet-18 and -34).

    Args:
        in_planes: Channels of the input.
        planes: Channels of both convolutions and of the output.
        stride: Stride of the first convolution and of the projection.
        dilations: Dilation of the first and of the second convolution.
        project: Whether the shortcut is a 1x1 convolution instead of the identity.
    """

    expansion = 1

    def __init__(
        self,
        in_planes: int,
        planes: int,
        stride: int,
        dilations: tuple[int, int],
        project: bool,
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_planes, planes, stride, dilations[0])
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes, dilation=dilations[1])
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(conv1x1(in_planes, planes, stride), nn.BatchNorm2d(planes)) if project else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_planes, H, W) -> (B, planes, ceil(H / stride), ceil(W / stride))."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += shortcut
        result: Tensor = self.relu(out)
        return result


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut, with four times `planes` channels; otherwise as `BasicBlock`.

    The 3x3 carries the first of the dilations and the stride, unless the first 1x1 does (`stride_first`).
    """

    expansion = 4
    stride_first = False

    def __init__(
        self,
        in_planes: int,
        planes: int,
        stride: int,
        dilations: tuple[int, int],
        project: bool,
    ) -> None:
        super().__init__()
        out_planes = planes * self.expansion
        first, second = (stride, 1) if self.stride_first else (1, stride)
        self.conv1 = conv1x1(in_planes, planes, first)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes, second, dilations[0])
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = conv1x1(planes, out_planes)
        self.bn3 = nn.BatchNorm2d(out_planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(conv1x1(in_planes, out_planes, stride), nn.BatchNorm2d(out_planes))
            if project
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_planes, H, W) -> (B, 4 * planes, ceil(H / stride), ceil(W / stride))."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += shortcut
        result: Tensor = self.relu(out)
        return result


Block = type[BasicBlock] | type[Bottleneck]


class ResNet(nn.Module):
    """ResNet without classifier that returns the outputs of its four stages.

    Strides beyond the output stride become dilations: the first block of such a stage keeps the dilation
    reached before it (a `BasicBlock` from its second convolution on has the new one), so a dilated network
    computes the values of the strided one at every position. Multi-grid multiplies the dilations of the
    last stage block by block.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        layers: Number of blocks of the four stages.
        stem: "deep" is three 3x3 convolutions (keys `conv1.0`, `.1`, `.3`, `.4`, `.6`, `bn1`), "plain" one
            7x7 convolution (keys of torchvision).
        output_stride: Ratio of input size to the size of the last stage.
        multi_grid: Factors for the blocks of the last stage, from the first block on; () for none. U2PL and
            CPS use (2, 2, 4).
        zero_init_residual: Whether the last normalization weight of every block starts at 0.
        width: Channels of the first stage; 64 in every published network.
        ceil_pool: Rounding of the max-pool; matters only where the stem's output has an even side.
            True in U2PL's family, False in CPS and torchvision.

    Attributes:
        out_planes: Channels of the four outputs.
    """

    def __init__(
        self,
        block: Block,
        layers: tuple[int, int, int, int],
        *,
        stem: Stem = "deep",
        output_stride: OutputStride = 8,
        multi_grid: Sequence[int] = (),
        zero_init_residual: bool = False,
        width: int = 64,
        ceil_pool: bool = True,
    ) -> None:
        super().__init__()
        self.conv1: nn.Module
        if stem == "deep":
            stem_planes = 2 * width
            self.conv1 = nn.Sequential(
                conv3x3(3, width, stride=2),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
                conv3x3(width, width),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
                conv3x3(width, stem_planes),
            )
        else:
            stem_planes = width
            self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_planes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=ceil_pool)

        planes = [width * 2**i for i in range(4)]
        self.out_planes = tuple(width * 2**i * block.expansion for i in range(4))
        # strides of the stages, and the dilation before and after the first convolution of each
        dilate3, dilate4 = output_stride == 8, output_stride < 32
        after3 = 2 if dilate3 else 1
        after4 = after3 * 2 if dilate4 else after3
        self.layer1 = _stage(block, stem_planes, planes[0], layers[0], 1, (1, 1), ())
        self.layer2 = _stage(block, self.out_planes[0], planes[1], layers[1], 2, (1, 1), ())
        self.layer3 = _stage(
            block, self.out_planes[1], planes[2], layers[2], 1 if dilate3 else 2, (1, after3), ()
        )
        self.layer4 = _stage(
            block,
            self.out_planes[2],
            planes[3],
            layers[3],
            1 if dilate4 else 2,
            (after3, after4),
            multi_grid,
        )
        self._initialize(zero_init_residual)

    def _initialize(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules():
            if zero_init_residual and isinstance(module, (BasicBlock, Bottleneck)):
                nn.init.zeros_(module.bn3.weight if isinstance(module, Bottleneck) else module.bn2.weight)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) -> outputs of the four stages, channels as in `out_planes`.

        At output stride 8 a 513x513 image gives 129x129, 65x65, 65x65 and 65x65.
        """
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x1 = self.layer1(x)
        x2 = self.layer2(x1)
        x3 = self.layer3(x2)
        return [x1, x2, x3, self.layer4(x3)]


def _stage(
    block: Block,
    in_planes: int,
    planes: int,
    blocks: int,
    stride: int,
    dilation: tuple[int, int],
    grid: Sequence[int],
) -> nn.Sequential:
    """One stage; `dilation` holds the dilation reached before it and the one reached in it."""
    before, after = dilation
    out_planes = planes * block.expansion
    modules: list[nn.Module] = []
    for i in range(blocks):
        factor = grid[i] if grid else 1
        dilations = (factor * (before if i == 0 else after), factor * after)
        first = i == 0
        project = first and (stride != 1 or in_planes != out_planes)
        modules.append(
            block(in_planes if first else out_planes, planes, stride if first else 1, dilations, project)
        )
    return nn.Sequential(*modules)


BACKBONES: dict[str, Callable[..., ResNet]] = {
    "resnet_tiny": partial(ResNet, BasicBlock, (1, 1, 1, 1), width=16),
    "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet34": partial(ResNet, BasicBlock, (3, 4, 6, 3)),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
    "resnet101": partial(ResNet, Bottleneck, (3, 4, 23, 3)),
    "resnet152": partial(ResNet, Bottleneck, (3, 8, 36, 3)),
}


def encoder_of(model: Any, **options: Any) -> ResNet:
    """The encoder that `backbone`, `stem`, `output_stride`, `multi_grid` and `width` of a section `model` describe.

    `options` are further ones of `ResNet`.
    """
    own_width = {} if model.width is None else {"width": model.width}
    return BACKBONES[model.backbone](
        stem=model.stem,
        output_stride=model.output_stride,
        multi_grid=model.multi_grid,
        **own_width,
        **options,
    )
