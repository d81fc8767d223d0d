"""Student and teacher of the image-level branch: torchvision's ResNet with one output per class."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from common.data.files import find_weights
from common.distributed import Dist
from common.errors import UserError
from common.models.encoders import facts_of
from common.models.placing import placed, wrapped
from common.models.pretrained import load_pretrained
from common.models.resnet import BACKBONES
from common.numerics.precision import autocast, synchronized, widened
from common.run.log import RunLog
from projects.s4gan_mlmt.config import Config
from projects.s4gan_mlmt.mlmt.config import MlmtConfig
from tools.weights import load_encoders


class MultiLabelClassifier(nn.Module):
    """A ResNet (plain stem, output stride 32) and a linear layer; state keys are torchvision's.

    Args:
        backbone: name in `common.models.resnet.BACKBONES`; `resnet101` as published.
        num_classes: outputs; 21 on Pascal VOC.
    """

    def __init__(self, backbone: str, num_classes: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise UserError(f"mlmt: {num_classes} classes are not usable; give at least 1")
        encoder = BACKBONES[backbone](stem="plain", output_stride=32, ceil_pool=False)
        # its parts and not itself, for their names in the files
        self.conv1, self.bn1, self.relu, self.maxpool = (
            encoder.conv1,
            encoder.bn1,
            encoder.relu,
            encoder.maxpool,
        )
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            encoder.layer1,
            encoder.layer2,
            encoder.layer3,
            encoder.layer4,
        )
        self.fc = nn.Linear(encoder.out_planes[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, K) in float32 or wider; the sigmoid is the caller's."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        with torch.autocast(x.device.type, enabled=False):
            logits: Tensor = self.fc(widened(x).mean(dim=(2, 3)))
        return logits


class TwoForwards(nn.Module):
    """A classifier on the labeled and on the unlabeled batch of a step, one after the other.

    Each batch has BatchNorm statistics of its own, and the running ones move twice. Both forwards are one call, so
    that their gradients are reduced over processes together.

    Args:
        network: maps images (B, 3, H, W) to logits (B, K).
        precision: of the forward passes.
    """

    def __init__(self, network: nn.Module, precision: str = "fp32") -> None:
        super().__init__()
        self.network, self.precision = network, precision

    def forward(self, labeled: Tensor, unlabeled: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, K) and (B', K) in float32 or wider."""
        with autocast(labeled.device, self.precision):
            return widened(self.network(labeled)), widened(self.network(unlabeled))


@dataclass
class Networks:
    """Student and teacher.

    Attributes:
        student: the classifier that learns.
        teacher: its average; never receives gradients.
        learn: the student as the step calls it: labeled and augmented images to logits, with gradients that are
            averaged over processes.
        teach: the teacher likewise: labeled and clean images to logits.
    """

    student: nn.Module
    teacher: nn.Module
    learn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    teach: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

    @property
    def bare(self) -> dict[str, nn.Module]:
        """Networks by their name in checkpoints."""
        return {"student": self.student, "teacher": self.teacher}


def networks_of(cfg: Config, student: nn.Module, teacher: nn.Module, dist: Dist) -> Networks:
    """Two networks that are on their device already, as the step calls them."""
    teacher.requires_grad_(False)
    learn = wrapped(TwoForwards(student, cfg.run.precision), dist, compiled=cfg.run.compile)
    return Networks(student, teacher, learn, TwoForwards(teacher, cfg.run.precision))


def build_classifier(cfg: Config, num_classes: int) -> nn.Module:
    """A classifier with fresh random numbers: on `mlmt.backbone`, or timm's own on the generic network's encoder."""
    model = cfg.model
    if model.network != "generic":
        return MultiLabelClassifier(cfg.mlmt.backbone, num_classes)
    import timm

    facts = facts_of(model.backbone, model.decoder, model.output_stride, model.weights)
    options = {key: value for key, value in facts.options.items() if key != "output_stride"}
    classifier: nn.Module = timm.create_model(model.backbone, num_classes=num_classes, **options)
    return classifier


def build_networks(cfg: Config, num_classes: int, dist: Dist) -> Networks:
    """Two classifiers with fresh random numbers on their device; all processes begin alike.

    QUIRK mlmt.copy_teacher: the teacher is no copy of the student. Its last layer (without a weight file, all of it)
    has random numbers of its own, which stay in the average with weight 1 / (steps + 1).
    """
    mlmt = cfg.mlmt
    together = synchronized(mlmt.sync_bn, dist)

    def on_device() -> nn.Module:
        network = build_classifier(cfg, num_classes)
        return placed(network, dist, synchronize=together, channels_last=cfg.run.channels_last)

    student, teacher = on_device(), on_device()
    if mlmt.copy_teacher:
        teacher.load_state_dict(student.state_dict())
    return networks_of(cfg, student, teacher, dist)


def weights_file(mlmt: MlmtConfig) -> Path | None:
    """The configured file of ImageNet weights; None for random numbers.

    Raises:
        UserError: it is missing.
    """
    return None if mlmt.weights == "none" else find_weights(mlmt.weights, "mlmt.weights")


def load_pretrained_classifiers(cfg: Config, networks: Iterable[nn.Module], log: RunLog) -> None:
    """`load_backbone`, or with the generic network the same for the weights of its encoder; raises likewise."""
    if cfg.model.network == "generic":
        load_encoders(cfg.model, networks, log, whole=True)
    else:
        load_backbone(cfg.mlmt, networks, log)


def load_backbone(mlmt: MlmtConfig, networks: Iterable[nn.Module], log: RunLog) -> None:
    """Give classifiers the configured ImageNet weights, and say what was used.

    Their last layers stay as they are, unless that of the file is of the very shape that is wanted.

    Raises:
        UserError: the file is missing or does not fit.
    """
    found = weights_file(mlmt)
    if found is None:
        log.info(f"classifiers: {mlmt.backbone}: random numbers (mlmt.weights=none)")
        return
    for network in networks:
        report = load_pretrained(network, found, allow_missing=("fc.",))
    log.info(f"classifiers: {mlmt.backbone}: {report.summary()}")
