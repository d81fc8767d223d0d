"""DeepLabV2 with ResNet-101 as s4GAN trains it (paper section 4.1; `model/deeplabv2.py` of the original).

It differs from the ResNets of `common.models.resnet` in the block, which has its stride on the first 1x1 convolution,
and in the classifier, four dilated convolutions of which the original adds two.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from common.errors import UserError
from common.models.deeplab import upsample
from common.models.resnet import Bottleneck

PUBLISHED_LAYERS = (3, 4, 23, 3)
STRIDES = (1, 2, 1, 1)
DILATIONS = (1, 1, 2, 4)
ASPP_DILATIONS = (6, 12, 18, 24)


class Block(Bottleneck):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; the first 1x1 carries the stride, the 3x3 the dilation."""

    stride_first = True


class AsppSum(nn.Module):
    """Four 3x3 convolutions of dilations 6, 12, 18 and 24 whose outputs are added.

    Args:
        in_planes: channels of the input.
        num_classes: K.
        branches: how many of the four, from the first on, are added. QUIRK quirks.aspp_branches: the original returns
            inside its loop, after two; the other two exist in its files and never learn.
    """

    def __init__(self, in_planes: int, num_classes: int, branches: int = 2) -> None:
        super().__init__()
        if branches not in (2, 4):
            raise UserError(f"quirks.aspp_branches={branches}: must be 2 or 4")
        self.conv2d_list = nn.ModuleList(
            nn.Conv2d(in_planes, num_classes, 3, padding=dilation, dilation=dilation)
            for dilation in ASPP_DILATIONS
        )
        self.branches = branches

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_planes, h, w) -> logits (B, K, h, w)."""
        out: Tensor = self.conv2d_list[0](x)
        for conv in self.conv2d_list[1 : self.branches]:
            out = out + conv(x)
        return out


class DeepLabV2(nn.Module):
    """ResNet at output stride 8 and a sum of dilated classifiers; state keys are the original's.

    Args:
        num_classes: K.
        layers: blocks of the four stages.
        width: channels of the stem; 64 as published.
        aspp_branches: branches that are added, 2 or 4, see `AsppSum`.
        frozen_affine: QUIRK quirks.frozen_affine: BatchNorm's weight and bias do not learn, while its statistics
            follow the batches in training mode.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        layers: Sequence[int] = PUBLISHED_LAYERS,
        width: int = 64,
        aspp_branches: int = 2,
        frozen_affine: bool = True,
    ) -> None:
        super().__init__()
        if len(layers) != len(STRIDES) or min(layers) < 1 or width < 1 or num_classes < 1:
            raise UserError(
                f"deeplabv2: layers {tuple(layers)}, width {width} and {num_classes} classes are not usable; give four "
                "positive block counts, a positive width and at least one class"
            )
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
        stages, planes = [], width
        for i, blocks in enumerate(layers):
            stages.append(_stage(planes, width * 2**i, blocks, STRIDES[i], DILATIONS[i]))
            planes = width * 2**i * Block.expansion
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.layer5 = AsppSum(planes, num_classes, aspp_branches)
        self._initialize(frozen_affine)

    def _initialize(self, frozen_affine: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
            elif isinstance(module, nn.BatchNorm2d) and frozen_affine:
                module.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, K, h, w) at stride 8.

        Sides: 321 -> 41, 505 -> 64, 64 -> 9, 512 -> 65; the even ones show that the max-pool rounds up.
        """
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.layer5(x)
        return logits

    def predict(self, x: Tensor) -> Tensor:
        """Logits (B, K, H, W) at the size of the images (B, 3, H, W)."""
        return upsample(self(x), x.shape[-2:])

    def unused_parameters(self) -> list[nn.Parameter]:
        """Those of the branches that are not added: they never get a gradient."""
        return [p for conv in self.layer5.conv2d_list[self.layer5.branches :] for p in conv.parameters()]


def _stage(in_planes: int, planes: int, blocks: int, stride: int, dilation: int) -> nn.Sequential:
    """One stage; its first block always projects the shortcut."""
    first = Block(in_planes, planes, stride, (dilation, 1), project=True)
    rest = (
        Block(planes * Block.expansion, planes, 1, (dilation, 1), project=False) for _ in range(blocks - 1)
    )
    return nn.Sequential(first, *rest)
