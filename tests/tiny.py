"""A dataset of a few generated photos on disk, for tests that need files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml
from PIL import Image

CLASSES = ("meadow", "pond", "barn")


def photo(
    index: int, height: int = 40, width: int = 48, classes: int = len(CLASSES)
) -> tuple[np.ndarray, np.ndarray]:
    """Image (H, W, 3) and label (H, W): rectangles of one grey-green, blue or red tone on noise."""
    rng = np.random.default_rng(index)
    label = np.zeros((height, width), np.uint8)
    for k in range(1, classes):
        row, col = rng.integers(0, height - 14), rng.integers(0, width - 14)
        label[row : row + 14, col : col + 14] = k
    tones = np.array([[90, 140, 90], [60, 90, 200], [190, 60, 50]])[:classes]
    image = tones[label] + rng.normal(0, 12, (height, width, 3))
    return image.clip(0, 255).astype(np.uint8), label


def write_dataset(
    folder: Path,
    labeled: int = 6,
    unlabeled: int = 10,
    val: int = 4,
    classes: int = len(CLASSES),
    masks: bool = True,
) -> Path:
    """Photos, masks, lists and a `dataset.yaml` in `folder`; returns the yaml. Without `masks` unlabeled have none."""
    names = [f"p{i:03d}" for i in range(labeled + unlabeled + val)]
    for part in ("img", "mask", "splits/few"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        image, label = photo(i, classes=classes)
        Image.fromarray(image).save(folder / "img" / f"{name}.jpg", quality=95)
        if masks or not labeled <= i < labeled + unlabeled:
            Image.fromarray(label).save(folder / "mask" / f"{name}.png")
    lists = {
        "train.txt": names[: labeled + unlabeled],
        "val.txt": names[labeled + unlabeled :],
        "splits/few/labeled.txt": names[:labeled],
        "splits/few/unlabeled.txt": names[labeled : labeled + unlabeled],
    }
    for path, ids in lists.items():
        (folder / path).write_text("\n".join(ids) + "\n")
    spec = {
        "name": "farm",
        "root": ".",
        "images": "img/{id}.jpg",
        "labels": "mask/{id}.png",
        "classes": list(CLASSES[:classes]),
        "palette": [[90, 140, 90], [60, 90, 200], [190, 60, 50]][:classes],
        "ignore": 255,
        "lists": {"train": "train.txt", "val": "val.txt"},
    }
    path = folder / "dataset.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def write_config(path: Path, dataset: Path, split: str, **sections: dict) -> Path:
    """A configuration of U2PL that trains in a second on the tiny dataset; sections update it."""
    tree: dict = {
        "data": {"dataset": str(dataset), "split": split, "crop_size": [32, 32], "workers": 0},
        "optim": {"lr": 0.01, "epochs": 3, "batch_size": 2},
        "model": {"backbone": "resnet_tiny", "stem": "plain", "inner_planes": 16, "dilations": [1, 2, 3],
                  "output_stride": 16, "multi_grid": [1, 1, 1]},
        "method": {"num_queries": 8, "num_negatives": 4, "queue_size": 60, "queue_size_first": 80},
        "eval": {"during_training": "whole_image"},
        "run": {"log_interval": 1, "panels": False},
    }  # fmt: skip
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values
    path.write_text(yaml.safe_dump(tree))
    return path
