"""The image-level classifier of the multi-label mean teacher: torchvision's ResNet with one output per class."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.models.pretrained import find_weights, load_pretrained
from common.models.resnet import BACKBONES
from common.numerics.precision import widened


class MultiLabelClassifier(nn.Module):
    """A ResNet (plain stem, output stride 32) and a linear layer; state keys are torchvision's.

    Args:
        backbone: name in `common.models.resnet.BACKBONES`; `resnet101` as published.
        num_classes: outputs; 21 on Pascal VOC.
    """

    def __init__(self, backbone: str, num_classes: int) -> None:
        super().__init__()
        if backbone not in BACKBONES:
            raise UserError(f"mlmt.backbone={backbone}: unknown; use one of {', '.join(BACKBONES)}")
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


def build_classifier(
    backbone: str, num_classes: int, weights: str = "none", say: Callable[[str], object] | None = None
) -> MultiLabelClassifier:
    """A classifier with the weights of a file in all but its last layer, which is drawn anew.

    Args:
        backbone: name of the ResNet.
        num_classes: outputs.
        weights: file with ImageNet weights of that ResNet (plain stem), or `none`. A last layer of the very shape
            that is wanted is taken over.
        say: told, in one line, what of the file was used.

    Raises:
        UserError: unknown backbone, or the file is missing or does not fit.
    """
    network = MultiLabelClassifier(backbone, num_classes)
    if weights == "none":
        line = f"{backbone}: random numbers (mlmt.weights=none)"
    else:
        path = find_weights(weights, "mlmt.weights")
        line = f"{backbone}: {load_pretrained(network, path, allow_missing=('fc.',)).summary()}"
    if say is not None:
        say(line)
    return network
