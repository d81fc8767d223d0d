"""The network that all papers share: an encoder of timm, a decoder of segmentation-models-pytorch.

`build_generic` gives a `SegmentationNetwork` like the papers' own: logits and pixel features at the decoder's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError
from common.models.deeplab import AuxHead, SegmentationNetwork, pixel_classifier, require_several
from common.models.encoders import facts_of
from common.numerics.optim import Group

STAGES = 4
DROPOUT = 0.1


class Encoder(nn.Module):
    """A network of timm as the source of four feature maps, with `out_planes` channels; see `facts_of` for the rest.

    `model` is a section of a configuration with the fields of `GenericConfig`.
    """

    def __init__(self, model: Any) -> None:
        import timm

        super().__init__()
        try:
            facts = facts_of(model.backbone, model.decoder, model.output_stride, model.weights)
        except ValueError as error:
            raise UserError(str(error)) from None
        self.model: Any = timm.create_model(model.backbone, **facts.options)
        info = self.model.feature_info
        first, step = (
            (len(info) // STAGES - 1, len(info) // STAGES) if facts.plain else (len(info) - STAGES, 1)
        )
        self.indices = [first + step * i for i in range(STAGES)]
        self.model.prune_intermediate_layers(self.indices, prune_norm=not facts.plain, prune_head=True)
        self.out_planes = [info[i]["num_chs"] for i in self.indices]
        self.plain, self.multiple, self.frozen = facts.plain, facts.multiple, model.freeze_encoder
        self.requires_grad_(not self.frozen)

    def train(self, mode: bool = True) -> Encoder:
        """Training mode, but for a frozen encoder."""
        super().train(mode and not self.frozen)
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        """Normalized images (B, 3, H, W) -> maps at strides 4, 8, 16 and 32 or less, a transformer's at its patch."""
        return self.model.forward_intermediates(
            x, indices=self.indices, norm=self.plain, intermediates_only=True
        )

    def layers(self, decay: float) -> list[Group]:
        """Its parameters by depth: every layer learns `decay` times as fast as the one behind it."""
        from timm.optim import param_groups_layer_decay

        found = param_groups_layer_decay(self.model, weight_decay_exclude_1d=False, layer_decay=decay)
        return [Group(one["params"], one["lr_scale"]) for one in reversed(found)]


class Body(nn.Module):
    """A decoder of the library, from the four maps of an encoder to pixel features (B, `inner_planes`, h, w).

    They are at stride 4; of `dpt` 8 times as fine as the transformer works. In training it raises as `require_several`
    where it pools whole images.
    """

    def __init__(self, encoder: Encoder, model: Any) -> None:
        from segmentation_models_pytorch.base.initialization import initialize_decoder

        super().__init__()
        self.decoder = _decoder_of(encoder.out_planes, model)
        initialize_decoder(self.decoder)
        self.plain, self.pools = encoder.plain, model.decoder in ("deeplabv3plus", "upernet")

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps of the encoder -> pixel features."""
        height, width = maps[0].shape[-2:]
        if self.pools:
            require_several(maps[-1], self.decoder)
        if self.plain:  # it halves the last map and doubles it again, which needs even sides
            even = [F.pad(x, (0, width % 2, 0, height % 2), mode="replicate") for x in maps]
            return self.decoder(even, [None] * STAGES)[..., : 8 * height, : 8 * width]
        # it counts from the image, of which it looks at the size alone
        before = [maps[0].new_empty(maps[0].shape[0], 0, k * height, k * width) for k in (4, 2)]
        return self.decoder([*before, *maps])


def _decoder_of(planes: Sequence[int], model: Any) -> nn.Module:
    from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3PlusDecoder
    from segmentation_models_pytorch.decoders.dpt.decoder import DPTDecoder
    from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
    from segmentation_models_pytorch.decoders.segformer.decoder import SegformerDecoder
    from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

    width, every = model.inner_planes, [3, 0, *planes]  # before the maps: the image, and nothing at stride 2
    if model.decoder == "deeplabv3plus":
        return DeepLabV3PlusDecoder(every, 5, width, model.dilations, model.output_stride, True, DROPOUT)
    if model.decoder == "fpn":
        return FPNDecoder(every, pyramid_channels=2 * width, segmentation_channels=width, dropout=DROPOUT)
    if model.decoder == "upernet":
        return UPerNetDecoder(every, decoder_channels=width)
    if model.decoder == "segformer":
        return SegformerDecoder(every, segmentation_channels=width)
    # the maps are made 4, 2, 1 and 1/2 times as large, whatever the patch; channels as in UniMatch V2
    inside = [width * 3 * 2**i // 4 for i in range(STAGES)]
    return DPTDecoder(
        planes, [16] * STAGES, readout="ignore", intermediate_channels=inside, fusion_channels=width
    )


class GenericDecoder(nn.Module):
    """Body, classifier and, where asked for, a representation head on the body's features; called as `DeepLabV3Plus`.

    `feats_planes` is the number of channels of the returned features, 0 if none are returned.
    """

    def __init__(
        self, encoder: Encoder, model: Any, num_classes: int, rep_head: bool, return_feats: bool
    ) -> None:
        super().__init__()
        width = model.inner_planes
        self.body = Body(encoder, model)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        self.representation = pixel_classifier(width, width, width, DROPOUT) if rep_head else None
        self.return_feats, self.feats_planes = return_feats, width if rep_head or return_feats else 0

    def forward(self, maps: Sequence[Tensor], with_feats: bool = True) -> tuple[Tensor, Tensor | None]:
        """Logits (B, K, h, w) and, unless left out, features (B, D, h, w)."""
        feats = self.body(maps)
        logits = self.classifier(feats)
        if self.representation is not None and with_feats:
            return logits, self.representation(feats)
        return logits, feats if self.return_feats and with_feats else None


def build_generic(
    model: Any, num_classes: int, *, rep_head: bool = False, return_feats: bool = False
) -> SegmentationNetwork:
    """The network of `model.network=generic` with fresh random numbers, which are the same in all projects.

    Args:
        model: section of a configuration with the fields of `GenericConfig` and those that it names; `aux_weight`, if
            there is one above 0, adds an `AuxHead`.
        num_classes: K.
        rep_head: its features are those of a head of its own, `inner_planes` channels too.
        return_feats: its features are those that the classifier reads.

    Raises:
        UserError: an unknown encoder, or one that does not fit the decoder.
    """
    encoder = Encoder(model)
    decoder = GenericDecoder(encoder, model, num_classes, rep_head, return_feats)
    auxiliary = getattr(model, "aux_weight", 0) > 0
    auxor = (
        AuxHead(encoder.out_planes[2], num_classes, inner_planes=model.inner_planes) if auxiliary else None
    )
    return SegmentationNetwork(encoder, decoder, auxor)
