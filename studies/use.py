"""`python -m studies use`: the winner of a study predicts photos, and says which of them to annotate next."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from common.data.dataset_yaml import load_spec
from common.data.files import read_rgb
from common.data.spec import DatasetSpec, Item
from common.data.split import beginning, resolve_split
from common.errors import UserError
from splits.init.command import scenes_of
from studies.annotations import Kind, write_annotations
from studies.next import Candidate, Floats, Load, Uint8, describe, rank, write_next
from studies.node import run_environment
from studies.run import Write, say, thread_count
from studies.study import Study
from studies.table import Record, Winner, load_records, tables, winner

THREADS = 4


@dataclass(frozen=True)
class Predicted:
    """A line of `photos.csv`: files of the photo and its mask, and the mean probability of the classes."""

    photo: Path
    mask: Path
    confidence: float

    @property
    def sure(self) -> Path:
        """File of the confidence of every pixel."""
        return self.mask.with_name(f"{self.mask.stem}_confidence.png")

    def classes(self) -> Uint8:
        """Class ids (H, W)."""
        with Image.open(self.mask) as file:
            return np.asarray(file, dtype=np.uint8)

    def load(self, spec: DatasetSpec) -> tuple[Uint8, Uint8]:
        """The photo (H, W, 3), read as those of the dataset, and its class ids (H, W)."""
        return read_rgb(self.photo, upright=spec.upright, value_range=spec.value_range), self.classes()


def use(
    study: Study, folder: Path, photos: Path, out: Path, kind: Kind | None = None, first: int | None = None,
    write: Write = say,
) -> int:  # fmt: skip
    """Predict photos with the best run of a study's best method, and rank those that are not labeled yet.

    Args:
        study: The study.
        folder: Its folder.
        photos: Folder of photos, a photo, or a list.
        out: Folder of the results: what `predict.py --confidence` writes, `next.csv` and `next.html`.
        kind: Also write the predictions as annotations of this kind.
        first: Only those of so many photos of `next.csv`; None for all photos.
        write: Receives the lines that tell what happens.

    Returns:
        1 if a photo was skipped, else 0.

    Raises:
        UserError: no run has finished, its weights or its dataset are gone, or the prediction has failed.
    """
    best = winner(tables(study, load_records(study, folder)))
    if best is None:
        raise UserError(f"{folder}: no run has finished yet; train with 'python -m studies run' first")
    data = best.record.config.get("data") or {}
    spec = load_spec(str(data.get("dataset")), data.get("root"))
    write(f"winner: {_told(best)}")
    code = _predict(best.record, photos, out, thread_count(study, 1))
    every = _read_table(out, photos)
    labeled, measured, others = _items(best.record, spec)
    taken = {beginning(item.image) for item in (*labeled, *measured, *others) if item.image is not None}
    fresh = {name: one for name, one in every.items() if beginning(one.photo) not in taken}
    beside = _beside(measured, fresh, spec)
    if beside:
        write(
            f"{len(beside)} photos are of scenes that are measured on, and not ranked: training leaves them out"
        )
        fresh = {name: one for name, one in fresh.items() if name not in beside}
    known = _describe({item.id: partial(_load, spec, item) for item in labeled}, spec, "labeled photos")
    loads = {name: partial(one.load, spec) for name, one in fresh.items()}
    new = _describe(loads, spec, "photos to rank")
    candidates = [
        Candidate(name, one.confidence, new[name], loads[name], one.sure) for name, one in fresh.items()
    ]
    found = rank(candidates, list(known.values()))
    write_next(found, out, spec.palette)
    write(f"{out / 'next.csv'}: {len(found)} photos not labeled yet, first those that would teach most; pictures: "
          f"{out / 'next.html'}")  # fmt: skip
    if kind is not None:
        names = list(every) if first is None else [one.candidate.name for one in found[:first]]
        chosen = {name: (every[name].photo, every[name].classes()) for name in names}
        place = write_annotations(kind, chosen, spec.classes, spec.palette, out)
        write(f"{place}: {len(chosen)} predictions to correct; read back by")
        write(f"  python -m splits init PHOTOS --annotations {place} --out FOLDER")
    return code


def _told(best: Winner) -> str:
    several = f"mean {100 * best.val:.1f} % mIoU on the validation list over {best.row.n} runs; "
    return f"{best.row.label} ({several if best.row.n > 1 else ''}best run: {best.record.job.run_dir})"


def _predict(record: Record, photos: Path, out: Path, threads: int) -> int:
    """Have the project of a run predict, with its progress on this terminal; 1 if it has skipped a photo."""
    command = [sys.executable, "-m", f"projects.{record.job.method.project}.predict", "--confidence"]
    command += ["--run", str(record.job.run_dir), "--input", str(photos), "--out", str(out)]
    (out / "photos.csv").unlink(missing_ok=True)  # what is there afterwards is new
    done = subprocess.run(
        command, env=run_environment(os.environ, threads), stdin=subprocess.DEVNULL, check=False
    )
    if done.returncode not in (0, 1) or not (out / "photos.csv").is_file():
        raise UserError(
            f"{record.job.name}: the prediction has failed (exit code {done.returncode}), see above"
        )
    return done.returncode


def _read_table(out: Path, photos: Path) -> dict[str, Predicted]:
    """What was predicted, by the photos' names below their folder."""
    base = photos if photos.is_dir() else photos.parent
    found = {}
    with (out / "photos.csv").open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            photo = Path(line["photo"])
            name = photo.relative_to(base) if photo.is_relative_to(base) else Path(photo.name)
            found[name.as_posix()] = Predicted(photo, out / line["mask"], float(line["confidence"]))
    return found


def _items(record: Record, spec: DatasetSpec) -> tuple[list[Item], list[Item], list[Item]]:
    """What a run has learned from, what it was measured on, and all else to train on that has a mask, as far as the
    lists are there.
    """
    data = record.config.get("data") or {}
    names = {str(data.get("val", "val")), str((record.result or {}).get("list"))}
    known = {
        name: spec.read_list(name, labels=False)
        for name in (*names, "train")
        if name in spec.lists or name in spec.ranges
    }
    measured = [item for name in names for item in known.get(name, ())]
    others = [item for item in known.get("train", ()) if item.label is not None]
    return resolve_split(spec, record.split).labeled, measured, others


def _beside(measured: Iterable[Item], photos: Iterable[str], spec: DatasetSpec) -> set[str]:
    """Photos of scenes that are measured on, by the pattern that `splits init` was given."""
    if spec.root is None:
        return set()
    numbers = {name: Path(name).with_suffix("").as_posix() for name in photos}
    ids = {item.id for item in measured}
    scenes = scenes_of(None, {*numbers.values(), *ids}, spec.root)
    seen = {scenes[number] for number in ids & scenes.keys()}
    return {name for name, number in numbers.items() if scenes.get(number) in seen}


def _load(spec: DatasetSpec, item: Item) -> tuple[Uint8, Uint8]:
    return spec.load_image(item), spec.load_label(item)


def _describe(photos: Mapping[str, Load], spec: DatasetSpec, what: str) -> dict[str, Floats]:
    """Descriptions of photos by name; files are read by threads."""

    def one(load: Load) -> Floats:
        photo, ids = load()
        return describe(photo, ids, spec.num_classes)

    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(one, photos.values())
        bar = tqdm(found, desc=what, total=len(photos), unit="photo", disable=None, leave=False)
        return dict(zip(photos, bar, strict=True))
