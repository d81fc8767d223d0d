"""DeepLabV3+ head of the U2PL family, the auxiliary head, and the network that joins them.

U2PL, BRPG and the prototype-consistency system train the same network with different outputs switched on;
module names and shapes equal theirs, so their checkpoints load by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError
from common.models.resnet import encoder_of


class Outputs(NamedTuple):
    """What a segmentation network computes, before any upsampling.

    Attributes:
        logits: Class scores (B, K, h, w); with DeepLabV3+ at the resolution of the first stage (1/4).
        feats: Pixel features (B, D, h, w) at the same resolution: the output of the representation head, or
            the concatenated features that enter the classifier; None where neither is switched on.
        aux: Scores of the auxiliary head (B, K, h3, w3) at the resolution of the third stage, or None.
    """

    logits: Tensor
    feats: Tensor | None
    aux: Tensor | None


def upsample(x: Tensor, size: Sequence[int], align_corners: bool = True) -> Tensor:
    """Bilinear resize of (B, C, h, w) to `size` (H, W); the tensor itself if it has that size."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=(size[0], size[1]), mode="bilinear", align_corners=align_corners)


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Images (B, 3, H, W) whose last row and column are repeated until both sides are multiples; if they are, `x`."""
    rows, cols = (-side % multiple for side in x.shape[-2:])
    if torch.compiler.is_exporting():  # the sides are open, so that nothing may depend on what they are
        return F.pad(x, (0, cols, 0, rows), mode="replicate") if multiple > 1 else x
    return F.pad(x, (0, cols, 0, rows), mode="replicate") if rows or cols else x


def _conv_norm_relu(
    in_planes: int, planes: int, kernel: int, dilation: int = 1, bias: bool = False
) -> list[nn.Module]:
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(in_planes, planes, kernel, padding=padding, dilation=dilation, bias=bias)
    return [conv, nn.BatchNorm2d(planes), nn.ReLU(inplace=True)]


def pixel_classifier(in_planes: int, planes: int, out_planes: int, dropout: float) -> nn.Sequential:
    """Two 3x3 layers and a 1x1 output layer, all with bias."""
    return nn.Sequential(
        *_conv_norm_relu(in_planes, planes, 3, bias=True),
        nn.Dropout2d(dropout),
        *_conv_norm_relu(planes, planes, 3, bias=True),
        nn.Dropout2d(dropout),
        nn.Conv2d(planes, out_planes, 1),
    )


def require_several(x: Tensor, pooling: nn.Module) -> None:
    """Refuse one image in training where a module pools whole images.

    Raises:
        UserError: BatchNorm that is not synchronized would have a single value per channel to normalize.
    """
    if pooling.training and len(x) == 1 and any(isinstance(one, nn.BatchNorm2d) for one in pooling.modules()):
        raise UserError(
            "aspp: the pooling branch cannot normalize a training batch of one image per process; "
            "use at least 2 images per process, or several processes with synchronized BatchNorm"
        )


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: image pooling, 1x1 and three dilated 3x3 branches, concatenated.

    Args:
        in_planes: Channels of the input.
        inner_planes: Channels of each branch.
        dilations: Dilations of the three 3x3 branches.

    Attributes:
        out_planes: Channels of the output, five times `inner_planes`.
    """

    def __init__(self, in_planes: int, inner_planes: int, dilations: tuple[int, int, int]) -> None:
        super().__init__()
        self.out_planes = 5 * inner_planes
        self.conv1 = nn.Sequential(nn.AdaptiveAvgPool2d(1), *_conv_norm_relu(in_planes, inner_planes, 1))
        self.conv2 = nn.Sequential(*_conv_norm_relu(in_planes, inner_planes, 1))
        self.conv3, self.conv4, self.conv5 = (
            nn.Sequential(*_conv_norm_relu(in_planes, inner_planes, 3, dilation=dilation))
            for dilation in dilations
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_planes, h, w) -> (B, out_planes, h, w); raises as `require_several`."""
        require_several(x, self)
        local = self.conv2(x)
        # a 1x1 map resized with aligned corners is a constant, whose backward pass is a plain sum
        pooled = self.conv1(x).expand_as(local)
        if local.is_contiguous(memory_format=torch.channels_last):
            pooled = pooled.contiguous(memory_format=torch.channels_last)  # else cat falls back to NCHW
        return torch.cat((pooled, local, self.conv3(x), self.conv4(x), self.conv5(x)), dim=1)


class DeepLabV3Plus(nn.Module):
    """DeepLabV3+ decoder of the U2PL family (`dec_deeplabv3_plus` there).

    Unlike the published DeepLabV3+ the low-level branch keeps 256 channels and the classifier has two hidden
    3x3 layers.

    Args:
        in_planes: Channels of the four encoder stages; the first and the last are used.
        num_classes: K.
        inner_planes: Channels of the ASPP branches and of the hidden layers.
        low_planes: Channels of the low-level branch; None for `inner_planes`.
        dilations: Dilations of the ASPP.
        rep_head: Whether to build the representation head and return its features.
        return_concat: Whether to return the concatenated features before the classifier instead, not both.
        dropout: Probability of the channel dropout.

    Attributes:
        feats_planes: Channels of the returned features, 0 if none are returned.
    """

    def __init__(
        self,
        in_planes: Sequence[int],
        num_classes: int,
        *,
        inner_planes: int = 256,
        low_planes: int | None = None,
        dilations: tuple[int, int, int] = (12, 24, 36),
        rep_head: bool = False,
        return_concat: bool = False,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        low_planes = inner_planes if low_planes is None else low_planes
        concat_planes = low_planes + inner_planes
        self.low_conv = nn.Sequential(*_conv_norm_relu(in_planes[0], low_planes, 1, bias=True))
        self.aspp = ASPP(in_planes[-1], inner_planes, dilations)
        self.head = nn.Sequential(
            *_conv_norm_relu(self.aspp.out_planes, inner_planes, 3), nn.Dropout2d(dropout)
        )
        self.classifier = pixel_classifier(concat_planes, inner_planes, num_classes, dropout)
        self.representation = (
            pixel_classifier(concat_planes, inner_planes, inner_planes, dropout) if rep_head else None
        )
        self.return_concat = return_concat
        self.feats_planes = inner_planes if rep_head else concat_planes if return_concat else 0

    def forward(self, features: Sequence[Tensor], with_feats: bool = True) -> tuple[Tensor, Tensor | None]:
        """Logits (B, K, h, w) and features (B, D, h, w) at the resolution of the first stage.

        Args:
            features: Outputs of the four encoder stages.
            with_feats: False leaves the features out (None) and saves their computation.
        """
        low = self.low_conv(features[0])
        high = upsample(self.head(self.aspp(features[-1])), low.shape[-2:])
        concat = torch.cat((low, high), dim=1)
        logits: Tensor = self.classifier(concat)
        if not with_feats:
            return logits, None
        if self.representation is not None:
            return logits, self.representation(concat)
        return logits, concat if self.return_concat else None


class AuxHead(nn.Module):
    """Auxiliary classifier on the third stage, which has `in_planes` channels; see `DeepLabV3Plus` for the rest."""

    def __init__(
        self,
        in_planes: int,
        num_classes: int,
        *,
        inner_planes: int = 256,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.aux = nn.Sequential(
            *_conv_norm_relu(in_planes, inner_planes, 3, bias=True),
            nn.Dropout2d(dropout),
            nn.Conv2d(inner_planes, num_classes, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Third-stage features (B, in_planes, h, w) -> logits (B, K, h, w)."""
        out: Tensor = self.aux(x)
        return out


class SegmentationNetwork(nn.Module):
    """Encoder of four stages, decoder, and the auxiliary head on the third stage or None."""

    def __init__(self, encoder: nn.Module, decoder: Any, auxor: AuxHead | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.auxor = auxor

    @property
    def multiple(self) -> int:
        """Sides of the images that `forward` takes are multiples of this."""
        return int(getattr(self.encoder, "multiple", 1))

    def forward(self, x: Tensor) -> Outputs:
        """Normalized images (B, 3, H, W) -> `Outputs`, nothing upsampled."""
        features = self.encoder(x)
        logits, feats = self.decoder(features)
        return Outputs(logits, feats, None if self.auxor is None else self.auxor(features[2]))

    def predict(self, x: Tensor) -> Tensor:
        """Logits (B, K, H, W) at the size of the images (B, 3, H, W), without features and auxiliary head.

        The values are those of `forward`, upsampled; heads whose output is dropped are not computed. Meant
        for evaluation mode: in training mode the skipped heads would miss an update of their statistics.
        """
        whole = pad_to_multiple(x, self.multiple)
        logits, _ = self.decoder(self.encoder(whole), with_feats=False)
        return upsample(logits, whole.shape[-2:])[..., : x.shape[-2], : x.shape[-1]]


def build_network(
    model: Any,
    num_classes: int,
    *,
    zero_init_residual: bool = True,
    rep_head: bool = False,
    return_concat: bool = False,
    aux_head: bool = False,
    dropout: float = 0.1,
) -> SegmentationNetwork:
    """A ResNet with a DeepLabV3+ head; with `DeepLabConfig()` that of U2PL, BRPG and prototype consistency.

    The section `model` has what `encoder_of` reads, `inner_planes`, `low_planes` and `dilations`; see `ResNet` and
    `DeepLabV3Plus` for the other arguments. `aux_head` adds an `AuxHead`.
    """
    encoder = encoder_of(model, zero_init_residual=zero_init_residual)
    decoder = DeepLabV3Plus(
        encoder.out_planes,
        num_classes,
        inner_planes=model.inner_planes,
        low_planes=model.low_planes,
        dilations=model.dilations,
        rep_head=rep_head,
        return_concat=return_concat,
        dropout=dropout,
    )
    auxor = None
    if aux_head:
        auxor = AuxHead(encoder.out_planes[2], num_classes, inner_planes=model.inner_planes, dropout=dropout)
    return SegmentationNetwork(encoder, decoder, auxor)
