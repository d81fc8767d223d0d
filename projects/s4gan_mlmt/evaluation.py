"""How the segmentation network is measured; the same while training, in `eval.py` and in `evaluate.py`.

The authors' evaluation runs through the shared evaluator too. What differs is how an image is prepared
(`Protocol.transform`) and padded (`Protocol.scores`); the image-level branch may switch classes off (`refine`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from common.config import DataConfig
from common.data.loaders import Transform
from common.data.spec import DatasetSpec
from common.distributed import Dist
from common.measure.evaluation import Evaluation, OnImage, Protocol, Refine, When, evaluate_list, protocol_of
from common.measure.inference import Forward, whole_image
from common.run.checkpoint import load_weights
from projects.s4gan_mlmt.config import Config, Pipeline
from projects.s4gan_mlmt.mlmt.fusion import Fusion, read_scores
from projects.s4gan_mlmt.model import Segmenter, build_segmentation
from projects.s4gan_mlmt.transforms import (
    CITYSCAPES_EVALUATION,
    CONTEXT_EVALUATION,
    VOC_EVALUATION,
    CityscapesEvaluation,
    ContextEvaluation,
    padded,
)


@dataclass(frozen=True, kw_only=True)
class OriginalProtocol(Protocol):
    """The authors' evaluation: one pass over the whole image, one scale.

    `voc`: padded below and on the right to 505x505, the scores cut to the image. `pascal_context`: the centre 512x512
    of the image resized to a short side of 512. `cityscapes`: image and label at 512x1024. The last two are measured
    at that size and cannot be compared with figures at full resolution.

    Attributes:
        pipeline: which of them.
    """

    kind: str = "original"  # type: ignore[assignment]
    epsilon: float = 0.0
    pipeline: Pipeline = "voc"

    def transform(self, data: DataConfig) -> Transform:
        """What makes a sample of a decoded image and label; channels are R, G, B, see `network_input`."""
        if self.pipeline == "pascal_context":
            return ContextEvaluation(CONTEXT_EVALUATION)
        if self.pipeline == "cityscapes":
            return CityscapesEvaluation(CITYSCAPES_EVALUATION, order="rgb")
        return super().transform(data)

    def scores(self, forward: Forward, image: Tensor) -> Tensor:
        """Scores (B, K, H, W) of normalized images (B, 3, H, W)."""
        height, width = image.shape[-2:]
        size = VOC_EVALUATION if self.pipeline == "voc" else (height, width)
        return whole_image(forward, padded(image, size))[..., :height, :width]


def original_protocol(cfg: Config) -> Protocol:
    """The authors' evaluation of `data.pipeline`; whole images, like the authors', for the house pipeline."""
    if cfg.data.pipeline == "house":
        return Protocol(kind="whole_image")
    return OriginalProtocol(pipeline=cfg.data.pipeline)


def network_input(forward: Forward, pipeline: Pipeline) -> Forward:
    """A forward for the shared code, which hands out R, G, B, of a network that was trained by `pipeline`.

    QUIRK city_channels: Cityscapes' networks learn from B, G, R.

    Args:
        forward: scores (B, K, H, W) of images (B, 3, H, W) with channels as in training.
        pipeline: `data.pipeline`.
    """
    if pipeline != "cityscapes":
        return forward

    def reversed_channels(image: Tensor) -> Tensor:
        return forward(image.flip(1))

    return reversed_channels


def protocol(cfg: Config, when: When) -> Protocol:
    """The protocol that the configuration names for this occasion.

    Raises:
        UserError: the settings contradict each other.
    """
    settings = cfg.eval
    kind = settings.during_training if when == "training" else settings.protocol
    return original_protocol(cfg) if kind == "original" else protocol_of(settings, cfg.data, when)


def full_resolution(cfg: Config) -> Protocol | None:
    """A protocol beside the authors' where theirs measures at a size of its own; None where it does not.

    The network sees the size that it learned from, and its scores are brought to that of the labels.
    """
    if cfg.eval.protocol != "original" or cfg.data.pipeline not in ("pascal_context", "cityscapes"):
        return None
    return Protocol(kind="whole_image", scales=(0.5,) if cfg.data.pipeline == "cityscapes" else (1.0,))


def fusion_of(cfg: Config, scores: Path, spec: DatasetSpec, images: str, dist: Dist) -> Fusion:
    """What switches off the classes that a scores file does not see in the images of a list.

    Raises:
        UserError: the file is missing, malformed, or of other images or classes.
    """
    ids = [item.id for item in spec.read_list(images)]
    rows = read_scores(scores, len(ids), spec.num_classes)
    return Fusion(ids, rows, cfg.quirks.fusion, cfg.mlmt.keep_threshold, dist.device)


class Measured(nn.Module):
    """A segmentation network for code that hands out images as every project prepares them: R, G, B.

    Args:
        segmenter: the network, not wrapped.
        pipeline: `data.pipeline`, by which it learned.
    """

    def __init__(self, segmenter: Segmenter, pipeline: Pipeline) -> None:
        super().__init__()
        self.segmenter = segmenter
        self._forward: Forward = network_input(segmenter.predict, pipeline)

    def predict(self, x: Tensor) -> Tensor:
        """Logits (B, K, H, W) at the size of the images (B, 3, H, W)."""
        return self._forward(x)


def evaluate_network(
    cfg: Config,
    segmenter: Segmenter,
    spec: DatasetSpec,
    images: str,
    how: Protocol,
    dist: Dist,
    *,
    refine: Refine | None = None,
    on_image: OnImage | None = None,
) -> Evaluation:
    """MIoU on the list `images`; a collective. Leaves the network in evaluation mode.

    Args:
        cfg: the run's configuration.
        segmenter: the segmentation network, not wrapped.
        spec: the dataset.
        images: name of the list, or its path.
        how: protocol.
        dist: this process.
        refine: changes scores before the best class is taken, as a `Fusion`.
        on_image: see `common.measure.evaluation.evaluate`.

    Raises:
        UserError: list or files missing or broken; scores of another list or other classes.
    """
    forward = Measured(segmenter, cfg.data.pipeline).eval().predict
    return evaluate_list(
        forward,
        cfg.data,
        spec,
        images,
        how,
        dist,
        precision=cfg.run.precision,
        refine=refine,
        on_image=on_image,
    )


def segmenter_of(
    cfg: Config, weights: Mapping[str, Tensor], num_classes: int, device: torch.device, where: str
) -> Segmenter:
    """The segmentation network with these weights, on its device and in evaluation mode.

    Args:
        cfg: describes the network.
        weights: its state dict, with bare keys.
        num_classes: K.
        device: where it goes.
        where: place of the weights, for messages.

    Raises:
        UserError: they are of another architecture or other classes.
    """
    network = build_segmentation(cfg, num_classes)
    load_weights(network, weights, where)
    layout = torch.channels_last if cfg.run.channels_last else torch.contiguous_format
    network = network.to(device, memory_format=layout)  # type: ignore[call-overload]
    return Segmenter(network, precision=cfg.run.precision).eval()
