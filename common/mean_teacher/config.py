"""Settings of the network that the papers which descend from U2PL's code share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from common.config import Count, NonNegative
from common.models.encoders import RESNETS, GenericConfig, require_backbone


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepLabConfig(GenericConfig):
    """ResNet + DeepLabV3+; or the generic network, see `GenericConfig` for what it reads.

    Attributes:
        backbone: `resnet18`, `resnet34`, `resnet50`, `resnet101`, `resnet152`, or `resnet_tiny` for small data.
        stem: `deep` (three 3x3 convolutions, as the authors) or `plain` (7x7, takes torchvision weights).
        weights: file with ImageNet weights of that backbone (searched in the working directory and in
            `SSS_WEIGHTS`), or `none` to start from random numbers.
        output_stride: 8, 16 or 32.
        multi_grid: dilation factors of the three blocks of the last stage.
        zero_init_residual: start every residual branch at zero.
        width: channels of the first stage; None for the backbone's own.
        inner_planes: channels inside the decoder, and length of the representation where it is a head of its own.
        low_planes: channels of the low-level branch; None for `inner_planes`.
        dilations: of the three atrous branches.
        aux_weight: weight of the auxiliary head on stage 3; 0 builds none.
        sync_bn: synchronize BatchNorm over processes (GPUs only).
    """

    backbone: str = "resnet101"
    stem: Literal["deep", "plain"] = "deep"
    weights: str = "none"
    output_stride: Literal[8, 16, 32] = 8
    multi_grid: tuple[Count, Count, Count] = (2, 2, 4)
    zero_init_residual: bool = True
    width: Count | None = None
    inner_planes: Count = 256
    low_planes: Count | None = None
    dilations: tuple[Count, Count, Count] = (12, 24, 36)
    aux_weight: NonNegative = 0.0
    sync_bn: bool = True

    def __post_init__(self) -> None:
        require_backbone(self, RESNETS)
