"""The network of the released checkpoints: U2PL's, with a prototype head on the feature that enters the classifier."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from common.mean_teacher.networks import network_of
from common.models.deeplab import AuxHead, SegmentationNetwork, pad_to_multiple, upsample
from projects.proto_consistency.config import ModelConfig
from projects.proto_consistency.head import PrototypeHead

Head = Literal["linear", "proto"]


class ProtoNetwork(SegmentationNetwork):
    """Encoder, decoder, optional auxiliary head, and the prototype head, which `forward` does not call.

    `forward` gives `Outputs` at feature size; its `feats` (B, D, h, w) are what `proto_net` compares.

    Args:
        encoder: Maps images to the features of four stages.
        decoder: Maps those features to (logits, features).
        auxor: Head on the third stage, or None.
        proto_net: The prototypes, or None for a network without them.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: Any,
        auxor: AuxHead | None,
        proto_net: PrototypeHead | None,
    ) -> None:
        super().__init__(encoder, decoder, auxor)
        self.proto_net = proto_net

    def require_prototypes(self) -> PrototypeHead:
        """The prototype head of a network that has one."""
        assert self.proto_net is not None, "this network was built without prototypes"
        return self.proto_net

    def predict_prototypes(self, x: Tensor) -> Tensor:
        """Scores (B, K, H, W) of the prototype head at the size of the images (B, 3, H, W)."""
        return self.predict_both(x)[1]

    def predict_both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the linear and of the prototype head, each (B, K, H, W), from one pass of the images."""
        whole = pad_to_multiple(x, self.multiple)
        logits, feats = self.decoder(self.encoder(whole))
        assert feats is not None, "the decoder returns the features"
        size, (height, width) = whole.shape[-2:], x.shape[-2:]
        both = upsample(logits, size), self.require_prototypes().dense(feats, size)
        return both[0][..., :height, :width], both[1][..., :height, :width]

    def feature_maps(self, x: Tensor) -> Tensor:
        """The features (B, D, h, w) of images (B, 3, H, W), whose sides are multiples of `multiple`."""
        feats = self.decoder(self.encoder(x))[1]
        assert feats is not None, "the decoder returns the features"
        return feats


class SameMaxPool(nn.Module):
    """3x3 max pooling of step 2 that gives ceil(n / 2) values: the released evaluation code's "same" padding.

    It equals the pooling of the training code where a side is odd. Where it is even, the windows start at 0 instead
    of -1 and there is one less (QUIRK model.maxpool).
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2))."""
        top, left = (side % 2 for side in x.shape[-2:])
        return F.max_pool2d(F.pad(x, (left, 1, top, 1), value=float("-inf")), 3, stride=2)


def build_network(
    model: ModelConfig, num_classes: int, per_class: int | None, temperature: float = 0.1
) -> ProtoNetwork:
    """A network with fresh random numbers outside the backbone's weight file.

    The names and shapes of its state are those of the released checkpoints, `proto_net.proto_list` last.

    Args:
        model: Backbone, decoder and auxiliary head.
        num_classes: K.
        per_class: Prototypes per class, P; None builds no prototype head.
        temperature: Of the prototype head.
    """
    plain = network_of(model, num_classes, return_concat=True)
    if model.maxpool == "same":
        plain.encoder.maxpool = SameMaxPool()
    head = None
    if per_class is not None:
        head = PrototypeHead(num_classes, per_class, plain.decoder.feats_planes, temperature)
    return ProtoNetwork(plain.encoder, plain.decoder, plain.auxor, head)
