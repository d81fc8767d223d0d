"""The networks of a run, and how its steps call them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.config import OptimConfig
from common.distributed import Dist
from common.errors import UserError
from common.models import placing
from common.models.deeplab import SegmentationNetwork, upsample
from common.models.generic import build_generic
from common.models.pretrained import LoadReport, load_state, read_weights
from common.models.resnet import BACKBONES
from common.models.xception import Xception65, pretrained_state
from common.numerics.optim import Group, encoder_and_heads
from common.numerics.precision import autocast, synchronized, widened
from projects.unimatch.config import Config, ModelConfig
from projects.unimatch.deeplab import DeepLabV3Plus
from projects.unimatch.dpt import SIZES, Dpt
from projects.unimatch.losses import supervised


class Generic(SegmentationNetwork):
    """The network that all papers share, as its parts are called here."""

    @property
    def backbone(self) -> Any:
        """The encoder."""
        return self.encoder

    @property
    def level_planes(self) -> tuple[int, ...]:
        """Channels of the maps between encoder and decoder."""
        return tuple(self.backbone.out_planes)

    @property
    def one_factor(self) -> bool:
        """Whether all levels are dropped by one mask, as those of a plain transformer in V2."""
        return bool(self.backbone.plain)

    def encode(self, x: Tensor) -> list[Tensor]:
        """The four maps (B, C, h, w) of images (B, 3, H, W)."""
        levels: list[Tensor] = self.encoder(x)
        return levels

    def decode(self, levels: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Logits (B, K, H, W) of four maps, at the size (H, W) of the images."""
        return upsample(self.decoder(levels, with_feats=False)[0], size)


Network = DeepLabV3Plus | Dpt | Generic


def network_of(model: ModelConfig, num_classes: int) -> Network:
    """The network that a configuration describes, with fresh random numbers.

    Raises:
        UserError: a name or a combination is not known.
    """
    network: Network
    if model.network == "generic":
        generic = build_generic(model, num_classes)
        return Generic(generic.encoder, generic.decoder)
    if model.is_dpt:
        network = Dpt(SIZES[model.backbone], num_classes)
    else:
        backbone = encoder_of(model)
        network = DeepLabV3Plus(
            backbone,
            backbone.out_planes,
            num_classes,
            aspp_planes=model.inner_planes,
            low_planes=model.low_planes,
            fuse_planes=model.inner_planes,
            dilations=model.dilations,
        )
    network.backbone.requires_grad_(not model.freeze_encoder)
    return network


def encoder_of(model: ModelConfig) -> Any:
    """The encoder of V1 that a configuration names; raises as `network_of`."""
    if model.backbone == "xception65":
        if model.output_stride == 32:
            raise UserError("model.output_stride=32: xception65 has 8 or 16")
        return Xception65(model.output_stride, 64 if model.width is None else model.width)
    width = {} if model.width is None else {"width": model.width}
    return BACKBONES[model.backbone](
        stem=model.stem, output_stride=model.output_stride, ceil_pool=False, **width
    )


def build_student(cfg: Config, num_classes: int) -> Network:
    """A network with fresh random numbers outside the backbone's weight file."""
    return network_of(cfg.model, num_classes)


def load_encoder(network: Network, path: Path) -> LoadReport:
    """Give the backbone the weights of a file: of an ImageNet ResNet, of Xception-65 or of DINOv2.

    Raises:
        UserError: the file cannot be read or does not fit.
    """
    state, source = read_weights(path)
    if isinstance(network.backbone, Xception65):
        state = pretrained_state(state)
    return load_state(network.backbone, state, source=source)


class Perturbed(nn.Module):
    """A network as the loop calls it: the feature maps between encoder and decoder may lose channels.

    Args:
        network: has `encode` and `decode`.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, factors: Sequence[Tensor] | None = None, beside: bool = False) -> Tensor:
        """Logits (B, K, H, W) of images (B, 3, H, W); with `beside` (2B, K, H, W), those of all channels first.

        Args:
            x: images.
            factors: (B, C) of the channels of each level; None leaves them.
            beside: decode the untouched features in the same batch, whose BatchNorm statistics are then common.
        """
        levels = self.network.encode(x)
        if factors is not None:
            touched = [level * _like(factor, level) for level, factor in zip(levels, factors, strict=True)]
            levels = [torch.cat(pair) for pair in zip(levels, touched, strict=True)] if beside else touched
        return self.network.decode(levels, x.shape[-2:])


def _like(factor: Tensor, level: Tensor) -> Tensor:
    """Factors (B, C) for a map (B, C, h, w) or for tokens (B, N, C)."""
    factor = factor.to(level.dtype)
    return factor[:, :, None, None] if level.dim() == 4 else factor[:, None]


@dataclass
class Networks:
    """The networks of a run.

    Attributes:
        student: bare network that is trained.
        teacher: its average, never trained by gradients; None in V1 and in supervised-only runs.
        wrapped: the student as the loop calls it, see `Perturbed` (distributed, compiled).
        ohem: threshold and least number of pixels of the supervised loss; None for plain cross entropy.
        empty_is_nan: QUIRK quirks.nan_without_pixels.
        precision: of the forward passes; losses are always float32.
        unsynchronized: those in which each of several processes computes BatchNorm on its own batch.
    """

    student: Network
    teacher: Network | None
    wrapped: Any
    ohem: tuple[float, int] | None = None
    empty_is_nan: bool = False
    precision: str = "fp32"
    unsynchronized: tuple[nn.Module, ...] = ()

    def forward(self, x: Tensor, factors: Sequence[Tensor] | None = None, beside: bool = False) -> Tensor:
        """Logits of the student in float32, see `Perturbed.forward`."""
        with autocast(x.device, self.precision):
            return widened(self.wrapped(x, factors, beside))

    def label(self, x: Tensor) -> Tensor:
        """Logits (B, K, H, W) in evaluation mode, without a graph: the teacher's, or the student's without one."""
        network = self.teacher or self.student
        training = network.training
        network.eval()
        with torch.no_grad(), autocast(x.device, self.precision):
            logits = widened(network.decode(network.encode(x), x.shape[-2:]))
        network.train(training)
        return logits

    def criterion(self, logits: Tensor, target: Tensor) -> Tensor:
        """The supervised loss, see `losses.supervised`."""
        return supervised(logits, target, self.ohem, self.empty_is_nan)

    def share_statistics(self, dist: Dist) -> None:
        """Give all processes the first one's statistics where each has its own; at the start of a step."""
        placing.share_statistics(self.unsynchronized, dist)


def build_networks(cfg: Config, num_classes: int, dist: Dist) -> Networks:
    """Student and, for V2, its teacher on their device, wrapped for this run; the first step copies the teacher."""
    together, method = synchronized(cfg.model.sync_bn, dist), cfg.method

    def place() -> Network:
        return placing.placed(
            build_student(cfg, num_classes), dist, synchronize=together, channels_last=cfg.run.channels_last
        )

    student = place()
    teacher = place().requires_grad_(False).eval() if method.mode == "semi" and method.teacher else None
    idle = student.idle() if isinstance(student, Dpt) else []
    return Networks(
        student,
        teacher,
        placing.wrapped(Perturbed(student), dist, compiled=cfg.run.compile, idle=idle),
        (method.ohem_thresh, method.ohem_min_kept) if method.criterion == "ohem" else None,
        cfg.quirks.nan_without_pixels,
        cfg.run.precision,
        placing.unsynchronized(
            (student,) if teacher is None else (student, teacher), dist, synchronize=together
        ),
    )


def parameter_groups(network: Network, optim: OptimConfig) -> list[Group]:
    """The backbone with the rate of the configuration, everything else with its own; decay on all (QUIRK decay_all)."""
    heads = nn.ModuleList(part for part in network.children() if part is not network.backbone)
    return encoder_and_heads(network.backbone, [heads], optim)


@torch.no_grad()
def average_buffers(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """`teacher <- decay * teacher + (1 - decay) * student` for every buffer too; QUIRK averaged_buffers: so the
    statistics of BatchNorm, and its counters, which are truncated.
    """
    for ours, theirs in zip(teacher.buffers(), student.buffers(), strict=True):
        ours.copy_(ours * decay + theirs * (1.0 - decay))
