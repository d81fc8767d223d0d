"""Figures of an evaluation for files, and pictures of predictions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from common.config import DataConfig
from common.data.files import remarks
from common.data.spec import DatasetSpec
from common.data.split import Split
from common.data.transforms import EvalTransform
from common.distributed import Dist
from common.measure.evaluation import Evaluation
from common.measure.inference import Forward
from common.measure.pictures import colorize, heatmap, panel
from common.run.log import RunLog

PANEL_IMAGES = 4
LOOKED_AT = 200  # photos, before a training on own data


def own_data_notes(cfg: Any, spec: DatasetSpec, split: Split) -> list[str]:
    """What the owner of photos should know before a training: quirks that are on, and what reading the photos changes.

    Quirks (fields of `cfg.quirks`) are on if they are true, or not the last of their choices.
    """
    if spec.built_in:
        return []
    quirks = getattr(cfg, "quirks", None)
    hints = {} if quirks is None else get_type_hints(type(quirks))
    last = {name: get_args(hint)[-1] for name, hint in hints.items() if get_origin(hint) is Literal}
    on = [
        name for name in hints if (value := getattr(quirks, name)) is True or value != last.get(name, value)
    ]
    notes = []
    if on:
        notes.append(
            f"quirks of the authors' code are on, which own data should not have ({', '.join(on)}); "
            "configs/own.yaml has none"
        )
    items = split.labeled + split.unlabeled
    seen = items[:: len(items) // LOOKED_AT + 1]
    met = Counter(
        one
        for item in seen
        for one in remarks(item.image, upright=spec.upright, value_range=spec.value_range)
    )
    for remark, times in met.most_common():
        view = "; masks must be drawn on that view, else see 'orientation' in dataset.yaml" * (
            "orientation" in remark
        )
        notes.append(f"{times} of {len(seen)} photos looked at: {remark}{view}")
    return notes


def summary(found: Evaluation, classes: Sequence[str]) -> dict[str, Any]:
    """The figures of an evaluation for a JSON file; IoUs by class name, all as fractions."""
    return {
        "miou": found.miou,
        "miou_present": found.miou_present,
        "pixel_accuracy": found.pixel_accuracy,
        "iou": dict(zip(classes, found.iou, strict=True)),
        "images": found.num_images,
        "images_not_finite": found.num_nonfinite,
    }


@torch.no_grad()
def log_panels(
    forward: Forward,
    data: DataConfig,
    spec: DatasetSpec,
    images: str,
    log: RunLog,
    step: int,
    dist: Dist,
    pseudo: Callable[[Tensor], Tensor],
) -> None:
    """Pictures of the first images of a list: photo, truth, prediction, kept pseudo-labels, confidence.

    Args:
        forward: Scores (1, K, H, W) of a normalized image (1, 3, H, W), by a network in evaluation mode.
        data: How images are normalized.
        spec: The dataset.
        images: Name of the list, or its path.
        log: Receives the pictures.
        step: Optimizer steps done.
        dist: This process; one is enough.
        pseudo: Pseudo-labels (1, H, W), 255 where none is kept, of class probabilities (1, K, H, W) float32.
    """
    transform = EvalTransform(mean=data.mean, std=data.std, resize=data.resize)
    for i, item in enumerate(spec.read_list(images)[:PANEL_IMAGES]):
        image = spec.load_image(item)
        label = spec.load_label(item) if item.label is not None else None
        x, y = transform(image, label)
        probs = forward(x[None].to(dist.device)).float().softmax(dim=1)
        conf, pred = probs.max(dim=1)
        maps = [m[0].cpu().numpy().astype(np.uint8) for m in (pred, pseudo(probs))]
        shown = image if data.resize is None else image[: y.shape[0], : y.shape[1]]
        tiles = [shown, *(colorize(m, spec.palette) for m in (y.numpy().astype(np.uint8), *maps))]
        tiles.append(heatmap(conf[0].cpu().numpy()))
        titles = ("image", "ground truth", "prediction", "pseudo-label kept", "confidence")
        log.add_image(f"val/{i}", step, panel(tiles, titles))
