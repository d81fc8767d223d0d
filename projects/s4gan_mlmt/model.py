"""The networks of a run, built and filled with weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from common.errors import UserError
from common.models.deeplab import build_network, upsample
from common.models.pretrained import LoadReport, find_weights, load_state, read_weights
from common.run.log import RunLog
from projects.s4gan_mlmt.config import Config
from projects.s4gan_mlmt.deeplabv2 import PUBLISHED_LAYERS as DEEPLABV2_LAYERS
from projects.s4gan_mlmt.deeplabv2 import DeepLabV2
from projects.s4gan_mlmt.discriminator import Discriminator
from projects.s4gan_mlmt.settings import ModelConfig
from projects.s4gan_mlmt.wrn38 import PUBLISHED_LAYERS as WRN38_LAYERS
from projects.s4gan_mlmt.wrn38 import DeepLabV3PlusWrn38

TRUNK = "backbone."
TRUNK_LEFT_OUT = ("bn_out.", "classifier.")  # end of the ImageNet network, which the original throws away
IMAGE_CHANNELS = 3


class DeepLabV3PlusResNet(nn.Module):
    """The DeepLabV3+ of `common.models.deeplab` with logits as its only output.

    Args:
        num_classes: K.
        model: `backbone`, `stem`, `output_stride`, `multi_grid`, `width`, `inner_planes`, `low_planes` and `dilations`.
    """

    def __init__(self, num_classes: int, model: ModelConfig) -> None:
        super().__init__()
        network = build_network(
            model.backbone,
            num_classes=num_classes,
            stem=model.stem,
            output_stride=model.output_stride,
            multi_grid=model.multi_grid,
            width=model.width,
            inner_planes=model.inner_planes,
            low_planes=model.low_planes,
            dilations=model.dilations,
        )
        self.encoder, self.decoder = network.encoder, network.decoder

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, K, h, w) at stride 4."""
        logits: Tensor = self.decoder(self.encoder(x), with_feats=False)[0]
        return logits

    def predict(self, x: Tensor) -> Tensor:
        """Logits (B, K, H, W) at the size of the images (B, 3, H, W)."""
        return upsample(self(x), x.shape[-2:])


SegmentationNetwork = DeepLabV2 | DeepLabV3PlusWrn38 | DeepLabV3PlusResNet


def build_segmentation(cfg: Config, num_classes: int) -> SegmentationNetwork:
    """A segmentation network with fresh random numbers.

    Args:
        cfg: `model`, and of `quirks` for DeepLabV2 `aspp_branches` and `frozen_affine`.
        num_classes: K.
    """
    model = cfg.model
    if model.network == "deeplabv2":
        return DeepLabV2(
            num_classes,
            layers=model.layers or DEEPLABV2_LAYERS,
            width=model.width or 64,
            aspp_branches=cfg.quirks.aspp_branches,
            frozen_affine=cfg.quirks.frozen_affine,
        )
    if model.network == "deeplabv3p_wrn38":
        return DeepLabV3PlusWrn38(
            num_classes,
            layers=model.layers or WRN38_LAYERS,
            width=model.width or 64,
            inner_planes=model.inner_planes,
            low_planes=model.low_planes,
            dilations=model.dilations,
        )
    return DeepLabV3PlusResNet(num_classes, model)


def build_discriminator(
    cfg: Config, num_classes: int, crop_size: Sequence[int] | None = None
) -> Discriminator:
    """A discriminator with fresh random numbers for maps of `num_classes` and an image.

    Args:
        cfg: `model.d_width`, `model.d_pool` and `method.dropout` are taken.
        num_classes: K.
        crop_size: (h, w) of the training images, which must leave one pooling window; None does not check.

    Raises:
        UserError: the crop does not fit the pool.
    """
    network = Discriminator(
        num_classes + IMAGE_CHANNELS,
        pool=cfg.model.d_pool,
        dropout=cfg.method.dropout,
        width=cfg.model.d_width,
    )
    if crop_size is not None:
        network.require_crop((int(crop_size[0]), int(crop_size[1])))
    return network


# --- weights -----------------------------------------------------------------------------------------------------


def load_segmentation(network: nn.Module, path: str | Path) -> LoadReport:
    """Start a segmentation network from a file.

    DeepLabV2 takes every tensor whose name and shape match, as the original: of an ImageNet file all but the
    classifier, of a file of DeepLabV2 (as the COCO one) the classifier too where the classes are as many. The backbone
    must be whole. Wide-ResNet-38 takes the authors' trunk file, whole and with nothing besides its own last
    normalisation and classifier, or a file of the whole network. The others take a file of the backbone or of the
    whole network.

    Raises:
        UserError: the file cannot be read, or does not fit.
    """
    if not isinstance(network, DeepLabV3PlusWrn38):
        state, source = read_weights(path)
        return load_state(network, state, source=source, allow_missing=("layer5.", "decoder."))
    state, source = read_weights(path, ("state_dict",))
    if any(key.startswith(TRUNK) for key in state):
        return load_state(network, state, source=source)
    require_only(state, network.backbone, TRUNK_LEFT_OUT, f"{source}: no file of the authors' Wide-ResNet-38")
    return load_state(network.backbone, state, source=source)


def require_only(
    state: Mapping[str, Tensor], network: nn.Module, besides: tuple[str, ...], complaint: str
) -> None:
    """Refuse tensors that are neither the network's nor begin with one of `besides`; `UserError`."""
    strange = [key for key in state.keys() - network.state_dict().keys() if not key.startswith(besides)]
    if strange:
        raise UserError(
            f"{complaint}: {len(strange)} tensors have no place in it, such as {min(strange)}; give another file"
        )


def load_discriminator(network: nn.Module, path: str | Path) -> LoadReport:
    """Start a discriminator from a file that has every tensor of it and no other.

    Prefixes of data parallelism are removed; the original's own script fails on them.

    Raises:
        UserError: the file cannot be read, or does not fit.
    """
    state, source = read_weights(path)
    require_only(state, network, (), f"{source}: no file of a discriminator (VOC_..._D.pth)")
    return load_state(network, state, source=source)


def load_weights(
    model: ModelConfig, segmentation: nn.Module, discriminator: nn.Module | None, log: RunLog
) -> None:
    """Start the networks from the files that the configuration names, and log what was used.

    Raises:
        UserError: a file is missing or does not fit.
    """
    if model.weights == "none":
        log.info("segmentation network: random numbers (model.weights=none)")
    else:
        report = load_segmentation(segmentation, find_weights(model.weights))
        log.info(f"segmentation network: {report.summary()}")
    if discriminator is not None and model.weights_d != "none":
        report = load_discriminator(discriminator, find_weights(model.weights_d))
        log.info(f"discriminator: {report.summary()}")
