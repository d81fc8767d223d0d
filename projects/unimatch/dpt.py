"""The network of UniMatch V2: the vision transformer of DINOv2 and a DPT head.

Module names and shapes equal the authors', so their checkpoints, and DINOv2's own files, load by name. timm has the
same transformer, but adapts its position table to other image sizes by another rule.

Source: `model/backbone/dinov2.py`, `model/semseg/dpt.py` and `model/util/blocks.py` of V2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models.deeplab import upsample

PATCH = 14
TABLE_SIDE = 37  # patches of the photos of 518 x 518 pixels that the position table belongs to


class Size(NamedTuple):
    """Width, depth and heads of the transformer, levels that the head takes, and channels of the head."""

    width: int
    depth: int
    heads: int
    levels: tuple[int, ...]
    features: int
    planes: tuple[int, int, int, int]


SIZES = {
    "dinov2_tiny": Size(24, 4, 2, (0, 1, 2, 3), 12, (8, 8, 12, 16)),  # for tests; no weights exist
    "dinov2_small": Size(384, 12, 6, (2, 5, 8, 11), 64, (48, 96, 192, 384)),
    "dinov2_base": Size(768, 12, 12, (2, 5, 8, 11), 128, (96, 192, 384, 768)),
    "dinov2_large": Size(1024, 24, 16, (4, 11, 17, 23), 256, (256, 512, 1024, 1024)),
}


# --- encoder -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention and MLP, each normalized before, scaled after and added.

    Args:
        width: channels of a token.
        heads: of the attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.ls1 = nn.ParameterDict({"gamma": torch.ones(width)})
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.ls2 = nn.ParameterDict({"gamma": torch.ones(width)})

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(*qkv.unbind()).transpose(1, 2).flatten(2)
        x = x + self.attn["proj"](seen) * self.ls1["gamma"]
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))) * self.ls2["gamma"]


def adapted_positions(table: Tensor, rows: int, cols: int) -> Tensor:
    """Position table (1, 1 + n * n, D), class token first, for `rows` x `cols` patches: (1, 1 + rows * cols, D).

    Bicubic; the sampling step follows from the factors (rows + 0.1) / n and (cols + 0.1) / n, as in DINOv2, not from
    the sizes.
    """
    side = round((table.shape[1] - 1) ** 0.5)
    if (rows, cols) == (side, side):
        return table
    grid = table[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    factors = ((rows + 0.1) / side, (cols + 0.1) / side)
    grid = F.interpolate(grid, scale_factor=factors, mode="bicubic", align_corners=False)
    return torch.cat((table[:, :1], grid.flatten(2).transpose(1, 2)), dim=1)


class DinoV2(nn.Module):
    """The transformer of DINOv2 without registers.

    Args:
        width: channels of a token.
        depth: number of blocks.
        heads: of the attention.
        table_side: patches along each side of the images that the position table belongs to.
    """

    def __init__(self, width: int, depth: int, heads: int, table_side: int = TABLE_SIDE) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + table_side**2, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # of DINOv2's own training; takes no part
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH, stride=PATCH)})
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)

    def tokens(self, x: Tensor) -> Tensor:
        """What enters the first block: class token and patches (B, 1 + h * w, D), with their positions."""
        rows, cols = (side // PATCH for side in x.shape[-2:])
        patches = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.cls_token.expand(len(x), -1, -1), patches), dim=1)
        return tokens + adapted_positions(self.pos_embed, rows, cols)

    def forward(self, x: Tensor, levels: Sequence[int]) -> list[Tensor]:
        """Normalized patch tokens (B, h * w, D) after the blocks `levels` of images (B, 3, 14h, 14w)."""
        tokens, found = self.tokens(x), []
        for i, block in enumerate(self.blocks):
            tokens = block(tokens)
            if i in levels:
                found.append(self.norm(tokens)[:, 1:])
        return found


# --- head --------------------------------------------------------------------------------------------------------


class Fusion(nn.Module):
    """Joins the coarser path with a level and brings both to the next size."""

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(planes, planes, 1)
        for name in ("resConfUnit1", "resConfUnit2"):
            convs = {f"conv{i}": nn.Conv2d(planes, planes, 3, padding=1) for i in (1, 2)}
            self.add_module(name, nn.ModuleDict(convs))

    def forward(self, path: Tensor, skip: Tensor | None, size: Sequence[int]) -> Tensor:
        """(B, C, h, w) at `size`; without `skip` the first unit takes no part."""
        if skip is not None:
            path = path + self._residual("resConfUnit1", skip)
        out: Tensor = self.out_conv(upsample(self._residual("resConfUnit2", path), size))
        return out

    def _residual(self, unit: str, x: Tensor) -> Tensor:
        """X + two 3x3 convolutions, each after a rectifier."""
        conv1, conv2 = self.get_submodule(unit).children()
        out: Tensor = x + conv2(F.relu(conv1(F.relu(x))))
        return out


class DptHead(nn.Module):
    """Four levels of tokens to logits at eight times the patch grid.

    Args:
        num_classes: K.
        width: channels of a token.
        features: channels in which the levels are joined.
        planes: channels of the four levels before.
    """

    def __init__(self, num_classes: int, width: int, features: int, planes: Sequence[int]) -> None:
        super().__init__()
        first, second, _, fourth = planes
        self.projects = nn.ModuleList([nn.Conv2d(width, n, 1) for n in planes])
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(first, first, 4, stride=4),
                nn.ConvTranspose2d(second, second, 2, stride=2),
                nn.Identity(),
                nn.Conv2d(fourth, fourth, 3, stride=2, padding=1),
            ]
        )
        self.scratch = nn.Module()
        for i, n in enumerate(planes, start=1):
            self.scratch.add_module(f"layer{i}_rn", nn.Conv2d(n, features, 3, padding=1, bias=False))
        for i in range(1, 5):
            self.scratch.add_module(f"refinenet{i}", Fusion(features))
        self.scratch.output_conv = nn.Sequential(
            nn.Conv2d(features, features, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(features, num_classes, 1),
        )

    def forward(self, levels: Sequence[Tensor], rows: int, cols: int) -> Tensor:
        """Tokens (B, rows * cols, D) of four levels -> logits (B, K, 8 * rows, 8 * cols)."""
        maps = []
        for i, tokens in enumerate(levels):
            x = self.projects[i](tokens.transpose(1, 2).unflatten(2, (rows, cols)))
            maps.append(self.scratch.get_submodule(f"layer{i + 1}_rn")(self.resize_layers[i](x)))
        sizes = [(8 * rows, 8 * cols), *(x.shape[-2:] for x in maps)]
        path: Tensor = self.scratch.get_submodule("refinenet4")(maps[3], None, sizes[3])
        for i in (3, 2, 1):
            path = self.scratch.get_submodule(f"refinenet{i}")(path, maps[i - 1], sizes[i - 1])
        out: Tensor = self.scratch.get_submodule("output_conv")(path)
        return out


class Dpt(nn.Module):
    """DINOv2 with a DPT head; images have sides that are multiples of 14.

    Args:
        size: see `Size`.
        num_classes: K.
        table_side: see `DinoV2`.

    Attributes:
        level_planes: channels of the four levels of tokens between encoder and decoder.
    """

    one_factor = True  # all levels are dropped by one mask

    def __init__(self, size: Size, num_classes: int, table_side: int = TABLE_SIDE) -> None:
        super().__init__()
        self.levels, self.level_planes = size.levels, (size.width,) * 4
        self.backbone = DinoV2(size.width, size.depth, size.heads, table_side)
        self.head = DptHead(num_classes, size.width, size.features, size.planes)

    def encode(self, x: Tensor) -> list[Tensor]:
        """Normalized tokens (B, h * w, D) of four levels."""
        levels: list[Tensor] = self.backbone(x, self.levels)
        return levels

    def decode(self, levels: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Logits (B, K, H, W) of four levels of tokens, at the size (H, W) of the images."""
        return upsample(self.head(levels, size[0] // PATCH, size[1] // PATCH), size)

    def idle(self) -> list[nn.Parameter]:
        """Parameters that take no part in anything."""
        return [
            self.backbone.mask_token,
            *self.head.get_submodule("scratch.refinenet4.resConfUnit1").parameters(),
        ]

    def predict(self, x: Tensor) -> Tensor:
        """Logits (B, K, H, W) at the size of the images (B, 3, H, W), which may be any: see `at_multiples`."""
        return at_multiples(x, PATCH, lambda image: self.decode(self.encode(image), image.shape[-2:]))


def at_multiples(x: Tensor, multiple: int, forward: Callable[[Tensor], Tensor]) -> Tensor:
    """What `forward` gives of images (B, 3, H, W) whose sides are brought to the nearest multiples, and back again."""
    size = [max(int(side / multiple + 0.5), 1) * multiple for side in x.shape[-2:]]
    return upsample(forward(upsample(x, size)), x.shape[-2:])
