"""The network of UniMatch V1: a dilated encoder and the DeepLabV3+ head of the authors' repository.

Module names and shapes equal the authors', so their checkpoints load by name.

Source: `model/semseg/deeplabv3plus.py` of V1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.models.deeplab import require_several, upsample
from common.models.resnet import conv1x1, conv3x3


def rectified(conv: nn.Module, planes: int) -> list[nn.Module]:
    """A convolution, its normalization and a rectifier."""
    return [conv, nn.BatchNorm2d(planes), nn.ReLU(inplace=True)]


class Aspp(nn.Module):
    """A 1x1, three dilated 3x3 and the pooled branch, concatenated and projected.

    Args:
        in_planes: channels of the input.
        planes: channels of each branch and of the output.
        dilations: of the three 3x3 branches.
    """

    def __init__(self, in_planes: int, planes: int, dilations: Sequence[int]) -> None:
        super().__init__()
        if len(dilations) != 3 or min(dilations) < 1:
            raise UserError(f"model.dilations={tuple(dilations)}: give three positive numbers")
        self.b0 = nn.Sequential(*rectified(conv1x1(in_planes, planes), planes))
        self.b1, self.b2, self.b3 = (
            nn.Sequential(*rectified(conv3x3(in_planes, planes, dilation=d), planes)) for d in dilations
        )
        pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), *rectified(conv1x1(in_planes, planes), planes))
        self.b4 = nn.ModuleDict({"gap": pooled})
        self.project = nn.Sequential(*rectified(conv1x1(5 * planes, planes), planes))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_planes, h, w) -> (B, planes, h, w); raises as `require_several`."""
        require_several(x, self)
        # a 1x1 map resized with aligned corners is a constant
        pooled = self.b4["gap"](x).expand(-1, -1, *x.shape[-2:])
        branches = [branch(x) for branch in (self.b0, self.b1, self.b2, self.b3)]
        out: Tensor = self.project(torch.cat((*branches, pooled), dim=1))
        return out


class DeepLabV3Plus(nn.Module):
    """Encoder, ASPP on its last stage, joined with its first stage, and a classifier.

    Args:
        backbone: maps images to the outputs of stages; the first and the last are used.
        in_planes: channels of those two.
        num_classes: K.
        aspp_planes: channels inside the ASPP and of its output.
        low_planes: channels to which the first stage is reduced.
        fuse_planes: channels of the two 3x3 layers before the classifier.
        dilations: of the ASPP.

    Attributes:
        level_planes: channels of the feature maps between encoder and decoder.
    """

    one_factor = False  # every level is dropped by a mask of its own

    def __init__(
        self,
        backbone: nn.Module,
        in_planes: Sequence[int],
        num_classes: int,
        *,
        aspp_planes: int = 256,
        low_planes: int = 48,
        fuse_planes: int = 256,
        dilations: Sequence[int] = (6, 12, 18),
    ) -> None:
        super().__init__()
        self.level_planes = (in_planes[0], in_planes[-1])
        self.backbone = backbone
        self.head = Aspp(in_planes[-1], aspp_planes, dilations)
        self.reduce = nn.Sequential(*rectified(conv1x1(in_planes[0], low_planes), low_planes))
        self.fuse = nn.Sequential(
            *rectified(conv3x3(low_planes + aspp_planes, fuse_planes), fuse_planes),
            *rectified(conv3x3(fuse_planes, fuse_planes), fuse_planes),
        )
        self.classifier = nn.Conv2d(fuse_planes, num_classes, 1)

    def encode(self, x: Tensor) -> list[Tensor]:
        """The two feature maps (B, C, h, w) that the decoder takes of images (B, 3, H, W)."""
        stages = self.backbone(x)
        return [stages[0], stages[-1]]

    def decode(self, levels: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Logits (B, K, H, W) of feature maps at the size (H, W) of the images."""
        low = self.reduce(levels[0])
        high = upsample(self.head(levels[1]), low.shape[-2:])
        return upsample(self.classifier(self.fuse(torch.cat((low, high), dim=1))), size)

    def predict(self, x: Tensor) -> Tensor:
        """Logits (B, K, H, W) at the size of the images (B, 3, H, W)."""
        return self.decode(self.encode(x), x.shape[-2:])
