"""The same evaluation images for all methods: photo, truth, what each run predicts and where it errs."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.data.dataset_yaml import load_spec
from common.data.spec import IGNORE, DatasetSpec, Item
from common.errors import UserError
from splits.pictures import colorize, panel, save_picture
from studies.node import run_environment
from studies.run import thread_count
from studies.study import PREDICTIONS, ROOT, Study
from studies.table import Record, tables, winner

Uint8 = NDArray[np.uint8]
Predict = Callable[[Record, Path, Path, int], None]

CANDIDATES = 200  # images scored in search of the largest differences; more would make large datasets slow
CANDIDATES_KEPT = 24  # where their predictions are kept in the repository
GROUPS = {
    "gain": "Largest gain",
    "loss": "Largest loss",
    "worst": "Worst of the rest",
    "random": "Picked at random",
}
IGNORED_COLOR = (150, 150, 150)


@dataclass(frozen=True)
class Picture:
    """One evaluation image.

    Attributes:
        id: of the image in its dataset.
        group: why it was chosen, a key of `GROUPS`.
        photo: RGB (H, W, 3).
        truth: class ids (H, W), 255 = not counted.
        predictions: class ids (H, W) by label.
        iou: mean IoU (fraction) over the classes of this image by label.
        gain: what it was chosen by: the mean of the judged methods' `iou` less the baseline's.
    """

    id: str
    group: str
    photo: Uint8
    truth: Uint8
    predictions: dict[str, Uint8]
    iou: dict[str, float]
    gain: float

    def errors(self, label: str) -> Uint8:
        """Where a prediction is wrong: (H, W) of 0 = right, 1 = wrong, 2 = not counted."""
        wrong = (self.predictions[label] != self.truth).astype(np.uint8)
        wrong[self.truth == IGNORE] = 2
        return wrong


@dataclass(frozen=True)
class Gallery:
    """Chosen pictures and what is needed to read them.

    Attributes:
        pictures: in the order of `GROUPS`.
        classes: names.
        palette: colours (K, 3).
        seeds: of the run shown, by label.
        judged: labels whose mean difference to `baseline` decided.
        baseline: label.
        split: that the baseline was trained on.
        scored, total: images compared, images in the list.
        best, worst: label of the best method, and its images (id, mIoU) from the lowest on.
        notes: why something is missing, one sentence each.
    """

    pictures: list[Picture]
    classes: tuple[str, ...]
    palette: Uint8
    seeds: dict[str, int]
    judged: tuple[str, ...]
    baseline: str
    split: str
    scored: int
    total: int
    notes: list[str]
    best: str = ""
    worst: tuple[tuple[str, float], ...] = ()


def image_iou(prediction: Uint8, truth: Uint8, num_classes: int) -> float:
    """Mean IoU (fraction) of one image over the classes in its truth or prediction, both (H, W); NaN of nothing."""
    counted = truth != IGNORE
    index = truth[counted].astype(np.int64) * num_classes + prediction[counted].clip(max=num_classes - 1)
    confusion = np.bincount(index, minlength=num_classes**2).reshape(num_classes, num_classes)
    intersection = np.diag(confusion)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - intersection
    present = union > 0
    return float((intersection[present] / union[present]).mean()) if present.any() else float("nan")


def choose(
    gains: Mapping[int, float], count: int, seed: int = 0, scores: Mapping[int, float] | None = None
) -> dict[int, str]:
    """Index -> group for `count` images each: largest gains, largest losses, and of the rest the lowest and a draw.

    An image with a loss is never shown as a gain, nor the other way round. The lowest are those by `scores`, if given.
    """
    ranked = sorted((index for index in gains if np.isfinite(gains[index])), key=lambda i: (-gains[i], i))
    best = [index for index in ranked if gains[index] > 0][:count]
    worst = [index for index in reversed(ranked) if gains[index] < 0][:count]
    rest = sorted(set(gains) - set(best) - set(worst))
    low = ascending({index: score for index, score in (scores or {}).items() if index in rest})[:count]
    rest = [index for index in rest if index not in low]
    drawn = random.Random(seed).sample(rest, min(count, len(rest)))
    return {
        **dict.fromkeys(best, "gain"),
        **dict.fromkeys(worst, "loss"),
        **dict.fromkeys(low, "worst"),
        **dict.fromkeys(sorted(drawn), "random"),
    }


def ascending(scores: Mapping[int, float]) -> list[int]:
    """Indices from the lowest score on, without those that have none."""
    return sorted((index for index in scores if np.isfinite(scores[index])), key=lambda i: (scores[i], i))


def run_predict(record: Record, images: Path, out: Path, threads: int) -> None:
    """Have the project of a run write palette PNG masks of all images in a folder.

    Raises:
        UserError: with the last line that the project has said.
    """
    command = [sys.executable, "-m", f"projects.{record.job.method.project}.predict"]
    command += ["--run", str(record.job.run_dir), "--input", str(images), "--out", str(out)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=run_environment(os.environ, threads),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise UserError(lines[-1] if lines else f"predict ended with exit code {done.returncode}")


def make_gallery(
    study: Study, records: Sequence[Record], out: Path, predict: Predict = run_predict
) -> Gallery | str:
    """Pictures for the report, or the reason (a sentence) why there are none."""
    if not study.pictures:
        return "This report was made without pictures (pictures: 0)."
    found = _compared(study, records)
    if found is None:
        return "Pictures need a finished run of the baseline and of another method with the same seed."
    baseline, judged = found
    data = baseline.config.get("data") or {}
    try:
        spec = load_spec(data.get("dataset", ""), data.get("root"))
        items = [item for item in spec.read_list(_images(baseline)) if item.label is not None]
    except UserError as error:
        return f"The evaluation images are not there: {error}."
    if not items:
        return "The evaluation list holds no image with a mask."
    count = min(len(items), CANDIDATES if study.records is None else CANDIDATES_KEPT)
    indices = [i * len(items) // count for i in range(count)]

    notes: list[str] = []
    masks: dict[str, dict[int, Uint8]] = {}
    seeds: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name:
        for record in _shown(study, records, baseline):
            try:
                folder = _predictions(record, spec, items, indices, Path(name), out, predict, study)
                masks[record.label] = _load_masks(folder, spec, items, indices)
                seeds[record.label] = record.job.seed
            except UserError as error:
                notes.append(f"{record.job.name} is not shown: {error}.")
    judged = tuple(label for label in judged if label in masks)
    if baseline.label not in masks or not judged:
        return " ".join(["Pictures could not be made.", *notes])

    truths = {index: spec.load_label(items[index]) for index in indices}
    scores = {
        label: {i: image_iou(mask, truths[i], spec.num_classes) for i, mask in found.items()}
        for label, found in masks.items()
    }
    gains = {i: fmean(scores[label][i] for label in judged) - scores[baseline.label][i] for i in indices}
    best = winner(tables(study, records))
    same = best is not None and baseline in best.table.records
    of_best = scores.get(best.row.label, {}) if best is not None and same else {}
    chosen = choose(gains, study.pictures, scores=of_best)
    pictures = [
        Picture(
            id=items[i].id,
            group=group,
            photo=spec.load_image(items[i]),
            truth=truths[i],
            predictions={label: found[i] for label, found in masks.items()},
            iou={label: found[i] for label, found in scores.items()},
            gain=gains[i],
        )
        for i, group in chosen.items()
    ]
    return Gallery(
        pictures,
        spec.classes,
        spec.palette,
        seeds,
        judged,
        baseline.label,
        baseline.split,
        len(indices),
        len(items),
        notes,
        best.row.label if best else "",
        tuple((items[i].id, of_best[i]) for i in ascending(of_best)),
    )


def _images(record: Record) -> str:
    return str((record.result or {}).get("list", "val"))


def _compared(study: Study, records: Sequence[Record]) -> tuple[Record, tuple[str, ...]] | None:
    """The baseline's first finished run that others can be compared with, and the labels of those others.

    They stand in one table and share its seed. Baselines of other networks do not judge which image is shown.
    """
    found = tables(study, records)
    if study.fractions:  # the most masks first: that is what the winner has learned from
        found.sort(key=lambda table: (bool(table.apart), -(table.labeled or 0)))
    for table in found:
        for seed in study.seeds:
            runs = {record.label: record for record in table.records if record.job.seed == seed}
            others = tuple(label for label in study.labels if label in runs and label not in study.baselines)
            if study.baseline in runs and others:
                return runs[study.baseline], others
    return None


def _shown(study: Study, records: Sequence[Record], baseline: Record) -> list[Record]:
    """One run of every method that was measured on the baseline's images: its seed if finished, else another."""
    found = []
    for label in study.labels:
        runs = [r for r in records if r.label == label and r.result and _images(r) == _images(baseline)
                and _dataset(r) == _dataset(baseline) and r.job.split == baseline.job.split]  # fmt: skip
        runs.sort(key=lambda record: record.job.seed != baseline.job.seed)
        found += runs[:1]
    return found


def _dataset(record: Record) -> Any:
    return (record.config.get("data") or {}).get("dataset")


def _predictions(
    record: Record, spec: DatasetSpec, items: Sequence[Item], indices: Sequence[int], temporary: Path, out: Path,
    predict: Predict, study: Study,
) -> Path:  # fmt: skip
    """Folder with the masks `<index>.png` of a run; made anew only when its weights or the images have changed."""
    assert record.result is not None
    ids = hashlib.sha256("\n".join(items[i].id for i in indices).encode()).hexdigest()
    key = json.dumps(
        {name: record.result[name] for name in ("miou_best", "config_hash", "seconds")} | {"images": ids}
    )
    folder = out / PREDICTIONS / record.job.prediction_folder(out)
    stamp = folder / "made_from.json"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == key:
        return folder
    if not (record.job.run_dir / "best.pt").is_file():
        raise UserError("best.pt is missing")
    photos = temporary / "photos"
    if not photos.exists():
        photos.mkdir()
        for i in indices:
            save_picture(photos / f"{i:06d}.png", spec.load_image(items[i]))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    predict(record, photos, folder, thread_count(study, 1))
    stamp.write_text(key, encoding="utf-8")
    return folder


def _load_masks(
    folder: Path, spec: DatasetSpec, items: Sequence[Item], indices: Sequence[int]
) -> dict[int, Uint8]:
    """Class ids (H, W) by index, at the size of the truth."""
    names = {path.name: path for path in sorted(folder.rglob("*.png"), reverse=True)}
    found = {}
    for i in indices:
        path = names.get(f"{i:06d}.png")
        if path is None:
            raise UserError(f"its prediction of image {items[i].id} is missing")
        with Image.open(path) as image:
            if image.mode not in ("P", "L"):
                raise UserError(f"{path.name} is a picture of mode {image.mode}, not a mask of class ids")
            mask = np.asarray(image, dtype=np.uint8)
        height, width = spec.load_label(items[i]).shape
        if mask.shape != (height, width):
            mask = np.asarray(cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST), np.uint8)
        found[i] = mask
    return found


def contact_sheet(gallery: Gallery, path: Path, limit: int = 3) -> None:
    """Write the first `limit` pictures as one PNG: photo, truth and predictions side by side.

    Raises:
        UserError: the file cannot be written.
    """
    rows = []
    for picture in gallery.pictures[:limit]:
        height = max(160, picture.photo.shape[0])
        masks = [picture.truth, *picture.predictions.values()]
        titles = [
            "photo",
            "truth",
            *(f"{label} {100 * picture.iou[label]:.0f}" for label in picture.predictions),
        ]
        tiles = [picture.photo, *(colorize(mask, gallery.palette, IGNORED_COLOR) for mask in masks)]
        rows.append(panel(tiles, titles, height=height))
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    save_picture(path, np.concatenate(padded))
