"""The networks of a run, built and filled with weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from common.data.files import find_weights
from common.distributed import Dist
from common.errors import UserError
from common.models.deeplab import build_network, pad_to_multiple, upsample
from common.models.generic import build_generic
from common.models.placing import placed, unsynchronized, wrapped
from common.models.pretrained import LoadReport, load_state, read_weights
from common.numerics.precision import autocast, synchronized, widened
from common.run.log import RunLog
from projects.s4gan_mlmt.config import Config, ModelConfig
from projects.s4gan_mlmt.deeplabv2 import PUBLISHED_LAYERS as DEEPLABV2_LAYERS
from projects.s4gan_mlmt.deeplabv2 import DeepLabV2
from projects.s4gan_mlmt.discriminator import Discriminator
from projects.s4gan_mlmt.wrn38 import PUBLISHED_LAYERS as WRN38_LAYERS
from projects.s4gan_mlmt.wrn38 import DeepLabV3PlusWrn38
from tools.weights import load_encoders

M = TypeVar("M", bound=nn.Module)

SEGMENTATION = "segmentation"
DISCRIMINATOR = "discriminator"
TRUNK = "backbone."
TRUNK_LEFT_OUT = ("bn_out.", "classifier.")  # end of the ImageNet network, which the original throws away
IMAGE_CHANNELS = 3


class LogitsOnly(nn.Module):
    """The DeepLabV3+ of `common.models.deeplab`, or the generic network, with logits as its only output.

    Args:
        num_classes: K.
        model: `backbone`, `stem`, `output_stride`, `multi_grid`, `width`, `inner_planes`, `low_planes` and `dilations`;
            of the generic network what `GenericConfig` says.
    """

    def __init__(self, num_classes: int, model: ModelConfig) -> None:
        super().__init__()
        build = build_generic if model.network == "generic" else build_network
        network = build(model, num_classes)
        self.encoder, self.decoder, self.multiple = network.encoder, network.decoder, network.multiple

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, K, h, w) at stride 4."""
        logits: Tensor = self.decoder(self.encoder(x), with_feats=False)[0]
        return logits

    def predict(self, x: Tensor) -> Tensor:
        """Logits (B, K, H, W) at the size of the images (B, 3, H, W)."""
        return upsample(self(x), x.shape[-2:])


SegmentationNetwork = DeepLabV2 | DeepLabV3PlusWrn38 | LogitsOnly


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
    return LogitsOnly(num_classes, model)


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


# --- as the step calls them --------------------------------------------------------------------------------------


class Segmenter(nn.Module):
    """The segmentation network as the step calls it: all batches of an iteration in one call, one after the other.

    One call lets the gradients of all its forwards be reduced over processes at once. The running statistics of
    BatchNorm are moved by every batch, in their order.

    Args:
        network: maps images (B, 3, H, W) to logits (B, K, h, w).
        separate: QUIRK quirks.separate_statistics: every batch has BatchNorm statistics of its own; false joins
            them into one forward.
        precision: of the forward passes.
    """

    def __init__(self, network: nn.Module, separate: bool = True, precision: str = "fp32") -> None:
        super().__init__()
        self.network, self.separate, self.precision = network, separate, precision

    def forward(self, *batches: Tensor) -> list[Tensor]:
        """Logits (B, K, H, W) in float32 at the size of the images, for every batch."""
        if self.separate or len(batches) == 1:
            return [self.scores(x) for x in batches]
        return list(self.scores(torch.cat(batches)).split([len(x) for x in batches]))

    def scores(self, x: Tensor) -> Tensor:
        """Logits of one batch."""
        with autocast(x.device, self.precision):
            logits = self.network(x)
        return upsample(widened(logits), x.shape[-2:])

    def predict(self, x: Tensor) -> Tensor:
        """The same for evaluation, in the precision of its caller and at any size."""
        whole = pad_to_multiple(x, getattr(self.network, "multiple", 1))
        return upsample(widened(self.network(whole)), whole.shape[-2:])[..., : x.shape[-2], : x.shape[-1]]


class Judgement(NamedTuple):
    """What the discriminator says of maps: scores (B, 1) in 0..1, 1 for real, and features (B, D, 1, 1)."""

    scores: Tensor
    feats: Tensor


class Critic(nn.Module):
    """The discriminator as the step calls it.

    Args:
        discriminator: maps (B, K + 3, H, W) to scores and features.
        precision: of the forward passes.
    """

    def __init__(self, discriminator: nn.Module, precision: str = "fp32") -> None:
        super().__init__()
        self.discriminator, self.precision = discriminator, precision

    def forward(self, *maps: Tensor) -> list[Judgement]:
        """A judgement in float32 of every input, with dropout of its own."""
        return [self.judged(x) for x in maps]

    def judged(self, x: Tensor) -> Judgement:
        """The judgement of one input."""
        with autocast(x.device, self.precision):
            scores, feats = self.discriminator(x)
        return Judgement(widened(scores), widened(feats))

    @torch.no_grad()
    def scores_without_dropout(self, maps: Tensor) -> Tensor:
        """Scores (B, 1) of maps as in evaluation, without gradient."""
        training = self.training
        scores = self.eval().judged(maps.detach()).scores
        self.train(training)
        return scores


@contextlib.contextmanager
def frozen(module: nn.Module | None) -> Iterator[None]:
    """The parameters of a module take no gradient inside, though gradients pass through it; None is let be."""
    if module is None:
        yield
        return
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


@dataclass
class Networks:
    """The networks of a run.

    Attributes:
        segmenter: the segmentation network as the step calls it, not wrapped.
        segment: the same, compiled and with gradients averaged over processes, as configured.
        critic: the discriminator as the step calls it, not wrapped; None in supervised-only runs.
        judge: the same, compiled and with gradients averaged over processes; None where `critic` is.
        unsynchronized: networks in which each of several processes computes BatchNorm on its own batch, as the
            authors' replicas do.
    """

    segmenter: Segmenter
    segment: Callable[..., list[Tensor]]
    critic: Critic | None = None
    judge: Callable[..., list[Judgement]] | None = None
    unsynchronized: tuple[nn.Module, ...] = ()

    @property
    def bare(self) -> dict[str, nn.Module]:
        """Networks by their name in checkpoints; evaluation takes the first."""
        found: dict[str, nn.Module] = {SEGMENTATION: self.segmenter.network}
        return found if self.critic is None else found | {DISCRIMINATOR: self.critic.discriminator}


def build_networks(cfg: Config, num_classes: int, dist: Dist) -> Networks:
    """Networks with fresh random numbers on their device, wrapped for this run; all processes begin alike."""
    # the authors' networks never synchronize
    own = cfg.model.network in ("deeplabv2", "deeplabv3p_wrn38")
    together = not own and synchronized(cfg.model.sync_bn, dist)

    def on_device(network: M) -> M:
        return placed(network, dist, synchronize=together, channels_last=cfg.run.channels_last)

    network = on_device(build_segmentation(cfg, num_classes))
    segmenter = Segmenter(network, cfg.quirks.separate_statistics, cfg.run.precision)
    critic = judge = None
    if cfg.method.adversarial:
        discriminator = on_device(build_discriminator(cfg, num_classes, cfg.data.crop_size))
        critic = Critic(discriminator, cfg.run.precision)
        judge = wrapped(critic, dist, compiled=cfg.run.compile)
    # the branches that are not added, see `quirks.aspp_branches`
    idle = network.unused_parameters() if isinstance(network, DeepLabV2) else ()
    segment = wrapped(segmenter, dist, compiled=cfg.run.compile, idle=idle)
    return Networks(segmenter, segment, critic, judge, unsynchronized([network], dist, synchronize=together))


# --- weights -----------------------------------------------------------------------------------------------------


def load_segmentation(network: nn.Module, path: str | Path) -> LoadReport:
    """Start a segmentation network from a file.

    DeepLabV2 takes every tensor whose name and shape match, as the original: of an ImageNet file all but the
    classifier, of a file of DeepLabV2 (as the COCO one) the classifier too where the classes are as many. The backbone
    must be whole. Wide-ResNet-38 takes the authors' trunk file, whole and with nothing besides its own last
    normalization and classifier, or a file of the whole network. The others take a file of the backbone or of the
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


def load_pretrained(
    model: ModelConfig, segmentation: nn.Module, discriminator: nn.Module | None, log: RunLog
) -> None:
    """Start the networks from the files that the configuration names, and log what was used.

    Raises:
        UserError: a file is missing or does not fit.
    """
    if model.network == "generic":
        load_encoders(model, [segmentation.get_submodule("encoder")], log)
    elif model.weights == "none":
        log.info("segmentation network: random numbers (model.weights=none)")
    else:
        report = load_segmentation(segmentation, find_weights(model.weights))
        log.info(f"segmentation network: {report.summary()}")
    if discriminator is not None and model.weights_d != "none":
        report = load_discriminator(discriminator, find_weights(model.weights_d))
        log.info(f"discriminator: {report.summary()}")
