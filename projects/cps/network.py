"""The network of CPS: a dilated ResNet and the DeepLabV3+ head of the authors' repository.

The head differs from the one that U2PL and its family share (`common.models.deeplab`): the ASPP has no image pooling
among its concatenated branches but adds it afterwards, activations there are leaky, nothing is dropped, and the
classifier is one convolution. Module names and shapes equal the authors', so their checkpoints load by name.

Source: `network.py` of the experiments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.models.deeplab import pad_to_multiple, require_several, upsample
from common.models.resnet import conv1x1, conv3x3, encoder_of
from common.numerics.optim import Group
from projects.cps.config import ModelConfig

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)


class Aspp(nn.Module):
    """Four convolutions side by side, and a pooled branch that is added to what they give.

    Args:
        in_planes: channels of the input.
        planes: channels of each branch and of the output.
        dilations: of the three 3x3 branches.
    """

    def __init__(self, in_planes: int, planes: int, dilations: tuple[int, int, int]) -> None:
        super().__init__()
        self.map_convs = nn.ModuleList(
            [conv1x1(in_planes, planes), *(conv3x3(in_planes, planes, dilation=d) for d in dilations)]
        )
        self.map_bn = nn.BatchNorm2d(4 * planes)
        self.global_pooling_conv = conv1x1(in_planes, planes)
        self.global_pooling_bn = nn.BatchNorm2d(planes)
        self.red_conv = conv1x1(4 * planes, planes)
        self.pool_red_conv = conv1x1(planes, planes)
        self.red_bn = nn.BatchNorm2d(planes)
        self.leaky_relu = nn.LeakyReLU(0.01, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_planes, h, w) -> (B, planes, h, w); raises as `require_several`."""
        require_several(x, self)
        local = self.leaky_relu(self.map_bn(torch.cat([conv(x) for conv in self.map_convs], dim=1)))
        pooled = self.global_pooling_conv(x.mean(dim=(2, 3), keepdim=True))
        pooled = self.pool_red_conv(self.leaky_relu(self.global_pooling_bn(pooled)))
        out: Tensor = self.leaky_relu(self.red_bn(self.red_conv(local) + pooled))
        return out


class Head(nn.Module):
    """ASPP of the last stage, joined with the first stage at its resolution.

    Args:
        in_planes: channels of the four stages; the first and the last are used.
        planes: channels of the ASPP and of the output.
        low_planes: channels to which the first stage is reduced.
        dilations: of the ASPP.
    """

    def __init__(
        self,
        in_planes: Sequence[int],
        planes: int,
        low_planes: int,
        dilations: tuple[int, int, int],
    ) -> None:
        super().__init__()
        self.aspp = Aspp(in_planes[-1], planes, dilations)
        self.reduce = nn.Sequential(
            conv1x1(in_planes[0], low_planes), nn.BatchNorm2d(low_planes), nn.ReLU(inplace=True)
        )
        self.last_conv = nn.Sequential(
            conv3x3(planes + low_planes, planes),
            nn.BatchNorm2d(planes),
            nn.ReLU(inplace=True),
            conv3x3(planes, planes),
            nn.BatchNorm2d(planes),
            nn.ReLU(inplace=True),
        )

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        """Outputs of the four stages -> features (B, planes, h, w) at the size of the first."""
        low = self.reduce(stages[0])
        high = upsample(self.aspp(stages[-1]), low.shape[-2:])
        out: Tensor = self.last_conv(torch.cat((high, low), dim=1))
        return out


class CpsNetwork(nn.Module):
    """One of the two networks.

    Args:
        backbone: maps images to the features of four stages.
        head: maps those to pixel features.
        classifier: maps features to class scores.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.classifier = classifier

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) -> features (B, D, h, w) and logits (B, K, h, w), with h = H / 4 and w = W / 4."""
        feature = self.head(self.backbone(x))
        return feature, self.classifier(feature)

    def predict(self, x: Tensor) -> Tensor:
        """Logits (B, K, H, W) at the size of the images (B, 3, H, W)."""
        whole = pad_to_multiple(x, self.multiple)
        _, logits = self(whole)
        return upsample(logits, whole.shape[-2:])[..., : x.shape[-2], : x.shape[-1]]

    @property
    def multiple(self) -> int:
        """Sides of the images that `forward` takes are multiples of this."""
        return int(getattr(self.backbone, "multiple", 1))


def build_cps_network(model: ModelConfig, num_classes: int) -> CpsNetwork:
    """The network that a section `model` describes, before `init_head`."""
    encoder = encoder_of(model, ceil_pool=False)
    head = Head(encoder.out_planes, model.inner_planes, model.low_planes, model.dilations)
    return CpsNetwork(encoder, head, nn.Conv2d(model.inner_planes, num_classes, 1))


def init_head(network: CpsNetwork) -> None:
    """Draw new weights for head and classifier, in module order; the two networks of a run differ in them alone.

    Convolution weights come from a normal distribution of variance 2 / fan-in, normalizations start as the
    identity. The classifier's bias keeps the framework's draw.

    Source: `init_weight` in `furnace/utils/init_func.py`.
    """
    for part in (network.head, network.classifier):
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)


def parameter_groups(network: nn.Module, weight_decay: float) -> list[Group]:
    """Two groups for every part of a network: weights of convolutions with decay, all other parameters without.

    For a `CpsNetwork` these are six groups: backbone, head, classifier. Inside a group parameters are in module
    order, as in the authors' optimizer states. All have the same rate.

    Source: `group_weight` in `furnace/utils/init_func.py`.
    """
    groups = []
    for part in network.children():
        decayed: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for module in part.modules():
            for name, parameter in module.named_parameters(recurse=False):
                heavy = name == "weight" and isinstance(module, CONVOLUTIONS)
                (decayed if heavy else others).append(parameter)
        if decayed or others:
            groups += [Group(decayed, weight_decay=weight_decay), Group(others, weight_decay=0.0)]
    return groups
