"""Which networks a run trains; the defaults are the published DeepLabV2 with ResNet-101."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Network = Literal["deeplabv2", "deeplabv3p_wrn38", "deeplabv3plus"]
Backbone = Literal["resnet_tiny", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Segmentation network and discriminator.

    Attributes:
        network: `deeplabv2` (ResNet-101 with the stride on the first 1x1 convolution, BatchNorm weights frozen) or
            `deeplabv3p_wrn38` (DeepLabV3+ with Wide-ResNet-38), both the authors'; `deeplabv3plus` is this
            repository's DeepLabV3+ with a ResNet of any depth, for small data and for comparisons.
        weights: file to start from (searched in the working directory, in `SSS_WEIGHTS` and among the bundled
            files), or `none` for random numbers. `deeplabv2` takes every tensor whose name and shape match, so an
            ImageNet file (without its classifier) as well as a file of a whole network; `deeplabv3p_wrn38` the
            authors' trunk file; `deeplabv3plus` a file of its backbone.
        weights_d: file of a discriminator to start from, or `none`; every tensor must fit.
        layers: blocks per stage; None for the published ones. Four for `deeplabv2` (3, 4, 23, 3), six for
            `deeplabv3p_wrn38` (3, 3, 6, 3, 1, 1).
        width: channels of the first stage; None for the network's own (64, `resnet_tiny` 16).
        backbone: of `deeplabv3plus` alone, as are the next four.
        stem: `plain` (7x7, takes torchvision weights) or `deep` (three 3x3 convolutions).
        output_stride: 8, 16 or 32.
        multi_grid: dilation factors of the blocks of the last stage; () for none.
        sync_bn: synchronise BatchNorm over processes (GPUs only). The authors' networks never do.
        inner_planes: channels inside the head of either DeepLabV3+.
        low_planes: channels of its low-level branch.
        dilations: of its three atrous branches.
        d_width: channels of the discriminator's first layer; the other three double them.
        d_pool: window (h, w) of the discriminator's average pool, as the authors fix it per dataset: (20, 20) at crop
            321x321, (16, 32) at 256x512. None averages the whole map, which is the same at those crops and works at
            any other.
    """

    network: Network = "deeplabv2"
    weights: str = "none"
    weights_d: str = "none"
    layers: tuple[int, ...] | None = None
    width: int | None = None
    backbone: Backbone = "resnet101"
    stem: Literal["plain", "deep"] = "plain"
    output_stride: Literal[8, 16, 32] = 16
    multi_grid: tuple[int, ...] = ()
    sync_bn: bool = True
    inner_planes: int = 256
    low_planes: int = 48
    dilations: tuple[int, int, int] = (12, 24, 36)
    d_width: int = 64
    d_pool: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        blocks = {"deeplabv2": 4, "deeplabv3p_wrn38": 6, "deeplabv3plus": 0}[self.network]
        if self.layers is not None and (len(self.layers) != blocks or min(self.layers, default=0) < 1):
            expected = f"{blocks} positive numbers" if blocks else "null"
            raise ValueError(f"'layers' is {self.layers!r}; expected {expected} for network={self.network}")
        for key in ("width", "inner_planes", "low_planes", "d_width"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"'{key}' is {value!r}; expected 1 or more")
        if self.d_pool is not None and min(self.d_pool) < 1:
            raise ValueError(f"'d_pool' is {self.d_pool!r}; expected two positive numbers, or null")
