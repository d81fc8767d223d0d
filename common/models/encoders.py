"""Encoders by timm's name: what they expect of images, which decoders they fit, where their weights come from.

timm and torch are imported where an encoder is used, so that nothing else waits for them.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

from common.config import IMAGENET_MEAN, IMAGENET_STD, DataConfig, OptimConfig

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet_tiny")  # the papers'
LITE0 = "tf_efficientnet_lite0"


@dataclass(frozen=True, kw_only=True, slots=True)
class GenericConfig:
    """The network that every paper can train instead of its own.

    Attributes:
        network: `paper`, the authors'; or `generic`, an encoder of timm with a decoder of segmentation-models-pytorch,
            the same in all projects. Of a paper's settings it reads `READS`: `backbone` (timm's name), `weights`
            (besides a file: `imagenet` or a tag of timm's for the library's own), `inner_planes` (channels of the
            decoder and of the pixel features), `sync_bn`, and with `deeplabv3plus` `output_stride` (8 or 16) and
            `dilations`.
        decoder: of the generic network; `dpt` for plain vision transformers, the others for encoders with stages.
        freeze_encoder: the generic network's encoder keeps its weights and BatchNorm statistics.
    """

    network: Literal["paper", "generic"] = "paper"
    decoder: Literal["deeplabv3plus", "fpn", "upernet", "segformer", "dpt"] = "deeplabv3plus"
    freeze_encoder: bool = False

    READS: ClassVar = ("network", "decoder", "freeze_encoder", "backbone", "weights", "inner_planes", "sync_bn",
                       "output_stride", "dilations")  # fmt: skip


class Facts(NamedTuple):
    """What is known of an encoder before it is built.

    Attributes:
        options: for `timm.create_model`.
        plain: a vision transformer, whose blocks all work at one size.
        multiple: of what the sides of its images are multiples.
        mean, std: of the images it was pretrained on, RGB on the scale 0..255.
    """

    options: Mapping[str, Any]
    plain: bool
    multiple: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def require_backbone(model: Any, names: Sequence[str]) -> None:
    """Refuse another backbone than these for a paper's own network; `ValueError`."""
    if model.network != "generic" and model.backbone not in names:
        raise ValueError(
            f"'backbone' is {model.backbone!r}; expected one of {', '.join(names)}, or network: generic"
        )


def require_multiples(key: str, size: Sequence[int], multiple: int) -> None:
    """Refuse a size whose sides are no multiples; `ValueError`."""
    if any(side % multiple for side in size):
        near = [max(round(side / multiple), 1) * multiple for side in size]
        raise ValueError(f"'{key}' is {list(size)}; expected multiples of {multiple}, such as {near}")


def fit_to_encoder(model: Any, optim: OptimConfig, data: DataConfig) -> DataConfig:
    """The section `data` with the statistics of a generic network's encoder, unless the configuration sets others.

    Raises:
        ValueError: the settings of the network do not go together, or the crop does not fit the encoder.
    """
    if model.network != "generic":
        for key, value in (
            ("model.freeze_encoder", model.freeze_encoder),
            ("optim.layer_decay", optim.layer_decay),
        ):
            if value:
                raise ValueError(f"'{key}' is {value!r}; expected model.network=generic with it")
        return data
    if model.freeze_encoder and model.weights == "none":
        raise ValueError(
            "'model.freeze_encoder' is true; expected pretrained weights with it, model.weights is none"
        )
    if model.decoder == "fpn" and model.inner_planes % 32:
        raise ValueError(
            f"'model.inner_planes' is {model.inner_planes}; expected a multiple of 32 for decoder=fpn"
        )
    facts = facts_of(model.backbone, model.decoder, model.output_stride, model.weights)
    require_multiples("data.crop_size", data.crop_size, facts.multiple)
    # what was configured is another tuple than the default, even with the same numbers
    mean = facts.mean if data.mean is IMAGENET_MEAN else data.mean
    return replace(data, mean=mean, std=facts.std if data.std is IMAGENET_STD else data.std)


@functools.lru_cache
def facts_of(backbone: str, decoder: str, output_stride: int, weights: str) -> Facts:
    """The facts of an encoder that feeds a decoder, at `output_stride` where that is `deeplabv3plus`.

    Raises:
        ValueError: there is no such encoder, or it does not fit; says what does.
    """
    import timm

    if not timm.is_model(backbone):
        near = difflib.get_close_matches(backbone, timm.list_models(), n=3) or [LITE0, "resnet50"]
        raise ValueError(
            f"'model.backbone' is {backbone!r}; expected a name of timm's, such as {', '.join(near)}"
        )
    tag = tag_of(backbone, weights)
    described = timm.get_pretrained_cfg(f"{backbone}.{tag}" if tag else backbone)
    options: dict[str, Any] = {"dynamic_img_size": True} if described.fixed_input_size else {}
    strides = _strides(backbone, options)
    plain, staged = len(set(strides)) == 1, strides == (4, 8, 16, 32)
    fits, multiple = plain if decoder == "dpt" else staged, max(strides, default=0)
    if staged and decoder == "deeplabv3plus":
        options, multiple = {"output_stride": output_stride}, output_stride
        fits = output_stride < 32 and _strides(backbone, options) == (
            4,
            8,
            min(output_stride, 16),
            output_stride,
        )
    if not fits:
        expected = "dpt" if plain else "fpn, upernet or segformer" if staged else "another backbone"
        raise ValueError(
            f"'model.decoder' is {decoder!r}, which {backbone} cannot feed (output_stride {output_stride}); expected "
            f"{expected}"
        )
    mean, std = (tuple(255.0 * value for value in values) for values in (described.mean, described.std))
    if (backbone, weights) == (LITE0, "imagenet"):
        mean, std = (127.0,) * 3, (128.0,) * 3
    return Facts(options, plain, multiple, mean, std)


def _strides(backbone: str, options: Mapping[str, Any]) -> tuple[int, ...]:
    """Strides of the last four stages, of a transformer's last four blocks; none where it cannot be built so."""
    import timm
    import torch

    try:
        with torch.device("meta"):  # neither memory nor random numbers
            network = timm.create_model(backbone, **options)
    except (TypeError, AssertionError):
        return ()
    usable = hasattr(network, "forward_intermediates")
    return tuple(stage["reduction"] for stage in network.feature_info)[-4:] if usable else ()


def tag_of(backbone: str, weights: str) -> str | None:
    """The library's tag of the weights that `model.weights` names; None where that is a file or `none`."""
    import timm

    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{backbone}.*")]
    if weights == "imagenet":  # torchvision's where there are some
        return "tv_in1k" if "tv_in1k" in tags else str(timm.get_pretrained_cfg(backbone).tag)
    return weights if weights in tags else None
