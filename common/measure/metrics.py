"""Intersection over union and pixel accuracy, counted on the device."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from common.data.spec import IGNORE
from common.distributed import Dist, sum_over_ranks
from common.errors import UserError
from common.numerics.mixing import LABEL_VALUES

Absent = Literal["zero", "skip"]


class ConfusionMatrix:
    """Pixel counts by label and prediction, accumulated on the device without waiting for it.

    A label outside 0..K-1 that is not the ignore label is a mistake in the data: it is counted apart and
    reported when a result is asked for.

    Args:
        num_classes: K.
        device: Where the counts live; predictions and labels are moved there.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        # a cell for every pair of label and prediction in 0..255, and one for all others
        self._cells = torch.zeros(LABEL_VALUES**2 + 1, dtype=torch.int64, device=device)

    def update(self, pred: Tensor, label: Tensor) -> None:
        """Count one batch: predicted classes and train ids of its pixels, of one shape and any integer types."""
        assert pred.shape == label.shape
        label, pred = (x.to(self._cells.device).long().flatten() for x in (label, pred))
        cell = torch.where((label | pred) >> 8 == 0, label * LABEL_VALUES + pred, LABEL_VALUES**2)
        if cell.is_cuda:  # bincount would read the largest value back
            self._cells.scatter_add_(0, cell, torch.ones_like(cell))
        else:
            self._cells += cell.bincount(minlength=len(self._cells))

    def reduce(self, dist: Dist) -> None:
        """Sum the counts over the ranks, once, after the last update; every rank then holds the total."""
        self._cells = sum_over_ranks(self._cells, dist)

    @property
    def counts(self) -> Tensor:
        """Pixels (K, K) int64 on the CPU, rows by label, columns by prediction; waits for the device.

        Raises:
            UserError: If a label or a prediction was neither a class nor ignored.
        """
        cells = self._cells.cpu()
        pairs = cells[:-1].view(LABEL_VALUES, LABEL_VALUES)
        found = pairs[: self.num_classes, : self.num_classes]
        if strange := int(cells.sum() - pairs[IGNORE].sum() - found.sum()):
            raise UserError(
                f"metrics: {strange} pixels have a label or prediction outside 0..{self.num_classes - 1}; "
                f"check num_classes and the dataset's label_map (ignored pixels must be {IGNORE})"
            )
        return found

    def intersection_union(self) -> tuple[Tensor, Tensor]:
        """Intersection and union of label and prediction of each class, (K,) int64 both."""
        counts = self.counts
        intersection = counts.diagonal().clone()
        return intersection, counts.sum(dim=0) + counts.sum(dim=1) - intersection

    def pixel_accuracy(self) -> float:
        """Share of the labeled pixels that are predicted right; NaN if there are none."""
        counts = self.counts
        total = int(counts.sum())
        return int(counts.diagonal().sum()) / total if total else math.nan


def class_iou(intersection: Tensor, union: Tensor, epsilon: float = 1e-10) -> Tensor:
    """I / (U + epsilon) of each class, (K,) float64.

    U2PL's family adds 1e-10, so a class that occurs nowhere gets 0. With epsilon 0 such a class is NaN.
    """
    return intersection.double() / (union.double() + epsilon)


def mean_iou(intersection: Tensor, union: Tensor, absent: Absent = "zero", epsilon: float = 1e-10) -> float:
    """Mean of the class IoUs of pixel counts (K,) as a fraction; NaN if no class is left.

    A class that occurs neither in a label nor in a prediction counts as 0 if `absent` is "zero" (U2PL, BRPG, prototype
    consistency, s4GAN); "skip" leaves it out of the mean (CPS, and the figure that does not depend on which classes a
    small evaluation set happens to hold). `epsilon` is added to the union.
    """
    iou = class_iou(intersection, union, epsilon)
    if absent == "skip":
        present = union > 0
        return float(iou[present].mean()) if bool(present.any()) else math.nan
    return float(torch.where(union > 0, iou, torch.zeros_like(iou)).mean())
