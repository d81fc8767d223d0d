"""Fusion of both branches: classes that the image-level branch does not see are switched off (MLMT).

A scores file has one row per image of the evaluation list, in its order, and one column per class, class 0 (the
background of VOC) first: probabilities with six decimals, separated by one blank.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.data.files import write_bytes
from common.data.lists import MAX_LIST_BYTES
from common.errors import UserError

FusionMode = Literal["zero_logits", "mask"]
Scores = NDArray[np.float64]

KEEP = 0.2


def fuse(logits: Tensor, keep: Tensor, mode: FusionMode = "zero_logits") -> Tensor:
    """Logits (B, K, H, W) whose classes outside `keep` (B, K) bool are switched off.

    QUIRK quirks.fusion: the authors multiply those logits by 0, so a switched-off class still wins where all kept
    ones are negative ("zero_logits"). With "mask" it never wins; an image that keeps no class stays as it is.

    Source: section 3.3 of the paper; `evaluate.py`.
    """
    keep = keep.to(logits.device)[:, :, None, None]
    if mode == "zero_logits":
        return logits * keep
    off = ~keep
    floor = logits.amin(dim=1, keepdim=True)
    floor = floor - floor.abs() - 1  # below every class of the pixel, and finite
    return torch.where(off & ~off.all(dim=1, keepdim=True), floor, logits)


def kept_classes(scores: Scores, threshold: float = KEEP) -> Tensor:
    """Which classes of each image stay on: scores (N, K) of at least `threshold`, compared in float64; bool (N, K)."""
    return torch.from_numpy(np.asarray(scores, dtype=np.float64) >= threshold)


class Fusion:
    """Switches classes off in the scores of the images that are evaluated; the `refine` of `common.measure.evaluation`.

    Args:
        ids: ids of the images of the list, in its order.
        scores: probabilities (N, K) of the image-level branch, row i for image i.
        mode: see `fuse`.
        threshold: see `kept_classes`.
        device: where scores are.

    Raises:
        UserError: other numbers of rows and images.
    """

    def __init__(
        self,
        ids: Sequence[str],
        scores: Scores,
        mode: FusionMode = "zero_logits",
        threshold: float = KEEP,
        device: torch.device | str = "cpu",
    ) -> None:
        if len(ids) != len(scores):
            raise UserError(
                f"fusion: {len(scores)} rows of scores for {len(ids)} images; use those of this list"
            )
        self.mode: FusionMode = mode
        self.keep = kept_classes(scores, threshold).to(device)
        self.row = {name: i for i, name in reversed(list(enumerate(ids)))}

    def __call__(self, ids: Sequence[str], logits: Tensor) -> Tensor:
        """Logits (B, K, H, W) of the images `ids` after `fuse`.

        Raises:
            UserError: an image of another list, or scores of other classes.
        """
        missing = next((name for name in ids if name not in self.row), None)
        if missing is not None:
            raise UserError(f"fusion: no scores for image '{missing}'; use the scores file of this list")
        if self.keep.shape[1] != logits.shape[1]:
            raise UserError(
                f"fusion: scores of {self.keep.shape[1]} classes, the segmentation network has {logits.shape[1]}; "
                "use the scores file of this dataset"
            )
        rows = [self.keep[self.row[name]] for name in ids]
        return fuse(logits, torch.stack(rows), self.mode)


def read_scores(path: str | Path, images: int, classes: int) -> Scores:
    """The probabilities of a scores file, float64 (images, classes).

    Args:
        path: the file, as `train_mlmt.py` (ours and the authors') writes it.
        images: how many rows it must have: one per image of the evaluation list.
        classes: how many columns.

    Raises:
        UserError: the file is absent or no text; too few or too many rows; a row has another number of columns, or a
            value that is no probability.
    """
    path = Path(path)
    rows: list[list[float]] = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != classes:
            raise UserError(
                f"{path}:{number}: {len(fields)} scores instead of {classes}, one per class; use the scores file of "
                "this dataset, or write it again"
            )
        rows.append([_probability(field, f"{path}:{number}") for field in fields])
    if len(rows) != images:
        raise UserError(f"{path}: {len(rows)} rows for {images} images; {_remedy(len(rows), images)}")
    return np.array(rows, dtype=np.float64).reshape(images, classes)


def write_scores(path: str | Path, scores: NDArray[Any]) -> None:
    """Write scores (N, K) in the authors' format: `%f`, one blank between, one line per image.

    The authors append, so a second run leaves the first one's rows in front; here the file is replaced.

    Raises:
        UserError: the folder cannot be written or the disk is full.
    """
    lines = [" ".join(f"{value:f}" for value in row) for row in np.asarray(scores).tolist()]
    write_bytes(Path(path), "".join(f"{line}\n" for line in lines).encode())


def _remedy(rows: int, images: int) -> str:
    if rows < images:
        return "the file is of another list or its writing was cut off; write it again"
    if images and rows % images == 0:
        runs = rows // images
        return f"it seems to hold {runs} runs, for the authors' script appends to an old file; keep one run's rows"
    return "the file is of another list; write it again"


def _probability(field: str, where: str) -> float:
    try:
        value = float(field)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        raise UserError(
            f"{where}: '{field}' is no probability; a row holds one number from 0 to 1 for each class"
        )
    return value


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_LIST_BYTES:
            raise UserError(f"{path}: larger than {MAX_LIST_BYTES >> 20} MiB; this is not a scores file")
        return path.read_bytes().decode("ascii")
    except UnicodeDecodeError:
        raise UserError(
            f"{path}: no text of numbers; give a scores file such as output_ema_raw_100.txt"
        ) from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path}: scores file cannot be read ({reason}); check the path") from None
