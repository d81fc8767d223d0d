"""Measure a network of U2PL; the same code while training and in `eval.py`."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from common.data.datasets import DatasetSpec
from common.distributed import Dist
from common.evaluation import Evaluation, OnImage, Protocol, evaluate
from common.models.deeplab import SegmentationNetwork
from projects.u2pl.config import Config
from projects.u2pl.data import evaluation_samples, pad_label
from projects.u2pl.model import HALF

CROPS_PER_FORWARD = 4


def protocol(cfg: Config, when: Literal["training", "script"]) -> Protocol:
    """The protocol that the configuration names for this occasion."""
    settings = cfg.eval
    kind = settings.during_training if when == "training" else settings.protocol
    scaled = when == "script" and kind != "center_crop"
    windowed = kind in ("center_crop", "sliding_window")
    return Protocol(
        kind=kind,
        crop_size=settings.crop_size or (cfg.data.crop_size if windowed else None),
        stride=settings.stride,
        scales=settings.scales if scaled else (1.0,),
        flip=settings.flip and kind == "multi_scale_flip",
        base_size=settings.base_size if scaled else None,
        pad_label=pad_label(cfg),
        batch_size=CROPS_PER_FORWARD,
    )


def evaluate_network(
    cfg: Config,
    network: SegmentationNetwork,
    spec: DatasetSpec,
    images: str,
    how: Protocol,
    dist: Dist,
    on_image: OnImage | None = None,
) -> Evaluation:
    """MIoU of one network on the list `images`; a collective. Leaves the network in evaluation mode."""
    items = spec.read_list(images)
    network.eval()

    def forward(x: Tensor) -> Tensor:
        return network.predict(x)

    return evaluate(
        forward,
        evaluation_samples(cfg, spec, items, dist),
        spec.num_classes,
        how,
        device=dist.device,
        ignore_index=spec.ignore_index,
        autocast_dtype=HALF[cfg.run.precision],
        dist=dist,
        on_image=on_image,
    )
