"""The authors' evaluation of each dataset as a protocol of `common.measure.evaluation`, and the pictures it saves.

Everything runs through the shared evaluator; what differs is how an image is prepared (`Protocol.transform`) and
padded (`Protocol.scores`), and that the image-level branch may switch classes off (`refine`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from common.config import DataConfig
from common.data.files import voc_colormap
from common.data.loaders import Transform
from common.measure.evaluation import OnImage, Protocol
from common.measure.inference import Forward, whole_image
from common.measure.pictures import BLACK, WHITE, Picture, full_palette, save_palette_png
from projects.s4gan_mlmt.config import Config, Pipeline
from projects.s4gan_mlmt.transforms import (
    CITYSCAPES_EVALUATION,
    CONTEXT_EVALUATION,
    VOC_EVALUATION,
    CityscapesEvaluation,
    ContextEvaluation,
    padded,
)

VOC_COLORS = 22


@dataclass(frozen=True, kw_only=True)
class OriginalProtocol(Protocol):
    """The authors' evaluation: one pass over the whole image, one scale.

    `voc`: padded below and on the right to 505x505, the scores cut to the image. `pascal_context`: the centre 512x512
    of the image resized to a short side of 512. `cityscapes`: image and label at 512x1024. The last two are measured
    at that size and cannot be compared with figures at full resolution (10.26).

    Attributes:
        pipeline: which of them.
    """

    kind: str = "original"  # type: ignore[assignment]
    epsilon: float = 0.0
    pipeline: Pipeline = "voc"

    def __post_init__(self) -> None:
        Protocol(kind="whole_image", scales=self.scales, epsilon=self.epsilon)  # its checks

    def transform(self, data: DataConfig) -> Transform:
        """What makes a sample of a decoded image and label; channels are R, G, B, see `network_input`."""
        if self.pipeline == "pascal_context":
            return ContextEvaluation(CONTEXT_EVALUATION)
        if self.pipeline == "cityscapes":
            return CityscapesEvaluation(CITYSCAPES_EVALUATION, order="rgb")
        return super().transform(data)

    def scores(self, forward: Forward, image: Tensor) -> Tensor:
        """Scores (B, K, H, W) of normalised images (B, 3, H, W)."""
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

    QUIRK 10.7: Cityscapes' networks learn from B, G, R.

    Args:
        forward: scores (B, K, H, W) of images (B, 3, H, W) with channels as in training.
        pipeline: `data.pipeline`.
    """
    if pipeline != "cityscapes":
        return forward

    def reversed_channels(image: Tensor) -> Tensor:
        return forward(image.flip(1))

    return reversed_channels


def original_palette() -> Picture:
    """The authors' colours (256, 3): the first 22 of the VOC map, 255 white, all others black."""
    palette = full_palette(voc_colormap(VOC_COLORS), BLACK)
    palette[255] = WHITE
    return palette


def prediction_writer(folder: Path, palette: ArrayLike | None = None) -> OnImage:
    """A function that saves a prediction as `<id>.png`: class ids, shown in the colours of a palette.

    The authors save the colours alone, for VOC alone; a viewer shows the same picture.

    Args:
        folder: where; it is made.
        palette: colours (P, 3); None for `original_palette`.
    """
    colors = original_palette() if palette is None else palette

    def write(name: str, scores: Any, pred: Tensor) -> None:
        del scores
        save_palette_png(folder / f"{name}.png", pred.to(torch.uint8), colors)

    return write
