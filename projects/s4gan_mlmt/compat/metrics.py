"""The authors' figures: mean IoU over all classes, and the texts of `evaluate.py`.

Source: `utils/metric.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.data.files import write_bytes
from common.measure.evaluation import Evaluation
from common.measure.metrics import class_iou

PROGRESS_EVERY = 100


def original_iou(intersection: Tensor, union: Tensor) -> Tensor:
    """IoU of each class (K,) float64 as a fraction; not a number for a class in no label and no prediction."""
    return class_iou(intersection, union, epsilon=0.0)


def original_miou(intersection: Tensor, union: Tensor) -> float:
    """Sum of the IoUs by the number of all classes: one that is never hit, absent or not, counts as 0.

    QUIRK all_classes: the authors divide so. Summed by NumPy like theirs: another order of additions would show in the
    last printed digit.
    """
    hit = intersection > 0
    return float(np.sum(original_iou(intersection, union)[hit].numpy())) / len(intersection)


def _iou(found: Evaluation) -> tuple[list[float], float]:
    intersection, union = torch.tensor(found.intersection), torch.tensor(found.union)
    return original_iou(intersection, union).tolist(), original_miou(intersection, union)


def class_line(index: int, name: str, iou: float) -> str:
    """One class of the table, with its IoU as a fraction."""
    return f"class {index:2d} {name.replace(' ', '_'):12} IU {iou:.2f}"


def result_text(found: Evaluation, classes: Sequence[str]) -> str:
    """Content of `result.txt`: a line for every class, then the mean.

    Args:
        found: figures over the whole list.
        classes: names in the order of the ids; the authors' are not for PASCAL-Context (`context_names` of the README).
    """
    iou, mean = _iou(found)
    lines = [class_line(k, name, iou[k]) for k, name in enumerate(classes)]
    return "\n".join([*lines, f"meanIOU: {mean}", ""])


def printed_text(found: Evaluation, classes: Sequence[str]) -> str:
    """What `evaluate.py` prints: the classes with an IoU above 0, then the mean and an empty line."""
    iou, mean = _iou(found)
    lines = [
        class_line(k, name, iou[k]) for k, name in enumerate(classes) if not math.isnan(iou[k]) and iou[k] > 0
    ]
    return "\n".join([*lines, f"meanIOU: {mean}", "", ""])


def progress_line(index: int) -> str | None:
    """What it prints after image `index` (from 0): a line for every hundredth, the first included."""
    return f"{index} processd" if index % PROGRESS_EVERY == 0 else None


def write_result(folder: Path, found: Evaluation, classes: Sequence[str]) -> Path:
    """Write `result.txt` to a folder, which is made.

    Raises:
        UserError: the folder cannot be written or the disk is full.
    """
    path = folder / "result.txt"
    write_bytes(path, result_text(found, classes).encode())
    return path
