"""Twenty steps of a small run, compared with recorded losses: has a change moved a number?

    python -m projects.brpg.tests.regress [--update] [--device cpu|cuda]

The run goes through the real `train.main` on images of its own: burn-in, the mean teacher with mixed and unmixed
batches, queues that fill and overflow, clustering, prototypes. Networks and images are in float64, so
that other processors
and library versions round differently without crossing a threshold. `--update` records anew; say why in the commit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from common.data.streams import TrainingData
from common.errors import UserError, run_main
from projects.brpg import train

FOLDER = Path(__file__).parent / "golden"
RTOL = {"cpu": 1e-5, "cuda": 1e-3}  # sums over pixels come in any order on a GPU
ATOL = 1e-9
STEPS = 20
CLASSES = 5
LABELED, UNLABELED, VAL = range(6), range(6, 26), range(26, 28)
TREE: dict[str, dict[str, Any]] = {
    "data": {"crop_size": [33, 33], "workers": 0},
    "optim": {"lr": 0.005, "head_lr_factor": 4.0, "epochs": 4, "batch_size": 4},
    "model": {
        "backbone": "resnet_tiny",
        "width": 8,
        "inner_planes": 16,
        "dilations": [1, 2, 3],
        "aux_weight": 0.4,
    },
    "method": {
        "sup_only_epochs": 1,
        "collect_start": 1,
        "high_threshold": 0.4,
        "pseudo_threshold": 0.35,
        "pseudo_threshold_end": 0.45,
        "ohem_min_kept": 2000,
        "queue_size": 30,
        "sample_per_image": 40,
        "scarce_classes": "fewer",
        "grid_steps": 8,
        "unsup_points": 50,
    },
    "eval": {"every_epochs": 0},
    "run": {"seed": 7, "log_interval": 1, "deterministic": True, "panels": False, "max_steps": STEPS},
}
KEYS = ("loss", "loss_sup", "loss_unsup", "loss_proto", "kept", "collected_high", "collected_low", "lr")


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Networks, memory and images of runs inside are float64."""
    set_up, epoch = train.set_up, TrainingData.epoch

    def wide_set_up(*args: Any) -> Any:
        torch.set_default_dtype(torch.float64)
        try:
            return set_up(*args)
        finally:
            torch.set_default_dtype(torch.float32)

    def wide_epoch(self: TrainingData, *args: Any) -> Iterator[Any]:
        for group in epoch(self, *args):
            yield [tuple(b._replace(image=b.image.double()) for b in batches) for batches in group]

    train.set_up, TrainingData.epoch = wide_set_up, wide_epoch  # type: ignore[method-assign]
    try:
        yield
    finally:
        train.set_up, TrainingData.epoch = set_up, epoch  # type: ignore[method-assign]


@contextlib.contextmanager
def same_settings() -> Iterator[None]:
    """One thread, and whatever the run switches on is switched back."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    silenced = logging.getLogger("semiseg").disabled
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        logging.getLogger("semiseg").disabled = silenced


def photo(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Image (40, 48, 3) and label (40, 48): four rectangles, one per class, in tones of their own on noise."""
    rng = np.random.RandomState(index)
    label = np.zeros((40, 48), np.uint8)
    for k in range(1, CLASSES):
        row, col = rng.randint(0, 26), rng.randint(0, 34)
        label[row : row + 14, col : col + 14] = k
    tones = np.array([[90, 140, 90], [60, 90, 200], [190, 60, 50], [200, 200, 60], [120, 40, 130]])
    image = tones[label] + rng.randint(-40, 41, (40, 48, 3)) + rng.randint(-30, 31)
    return image.clip(0, 255).astype(np.uint8), label


def write_images(folder: Path) -> Path:
    """PNG files, lists and a `dataset.yaml` in `folder`; returns the yaml."""
    for part in ("img", "mask", "splits/few"):
        (folder / part).mkdir(parents=True)
    for index in range(len(LABELED) + len(UNLABELED) + len(VAL)):
        for part, pixels in zip(("img", "mask"), photo(index), strict=True):
            Image.fromarray(pixels).save(folder / part / f"{index:02d}.png")
    lists = {"splits/few/labeled": LABELED, "splits/few/unlabeled": UNLABELED, "val": VAL}
    for name, indices in lists.items():
        (folder / f"{name}.txt").write_text("".join(f"{i:02d}\n" for i in indices))
    spec = {
        "name": "regress",
        "root": ".",
        "images": "img/{id}.png",
        "labels": "mask/{id}.png",
        "classes": [f"class {k}" for k in range(CLASSES)],
        "palette": [[40 * k, 40 * k, 40 * k] for k in range(CLASSES)],
        "ignore": 255,
        "lists": {"val": "val.txt"},
    }
    (folder / "dataset.yaml").write_text(yaml.safe_dump(spec))
    return folder / "dataset.yaml"


def losses(device: str = "cpu") -> list[dict[str, float]]:
    """What the run logs at every step."""
    with tempfile.TemporaryDirectory() as name, float64(), same_settings():
        folder = Path(name)
        data = TREE["data"] | {"dataset": str(write_images(folder)), "split": "few"}
        tree = TREE | {"data": data, "run": TREE["run"] | {"device": device}}
        (folder / "regress.yaml").write_text(yaml.safe_dump(tree))
        logging.getLogger("semiseg").disabled = True
        train.main(["--config", str(folder / "regress.yaml"), f"run.dir={folder / 'run'}"])
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [{key: entry[key] for key in KEYS if key in entry} for entry in map(json.loads, lines)]


def write(path: Path, steps: Sequence[dict[str, float]]) -> None:
    """One line a step: its number and `key=value` for everything logged."""
    rows = [
        f"{i} " + " ".join(f"{key}={value!r}" for key, value in step.items())
        for i, step in enumerate(steps, start=1)
    ]
    path.write_text("\n".join(rows) + "\n")


def read(path: Path) -> list[dict[str, float]]:
    """What `write` wrote.

    Raises:
        UserError: nothing has been recorded.
    """
    if not path.is_file():
        raise UserError(f"{path}: nothing recorded for this device; record it with --update")
    rows = [line.split()[1:] for line in path.read_text().splitlines()]
    return [{key: float(value) for key, _, value in (word.partition("=") for word in row)} for row in rows]


def first_difference(
    ours: Sequence[dict[str, float]], recorded: Sequence[dict[str, float]], rtol: float
) -> str | None:
    """The first step at which a value differs, with that value; None if all agree."""
    for i, (mine, theirs) in enumerate(zip(ours, recorded, strict=False), start=1):
        if mine.keys() != theirs.keys():
            return f"step {i}: logged {', '.join(mine)}; recorded {', '.join(theirs)}"
        for key, value in mine.items():
            if not abs(value - theirs[key]) <= ATOL + rtol * abs(theirs[key]):
                off = abs(value - theirs[key]) / max(abs(theirs[key]), ATOL)
                return (
                    f"step {i}: {key} is {value!r}, recorded {theirs[key]!r} (relative difference {off:.1e})"
                )
    return None if len(ours) == len(recorded) else f"{len(ours)} steps, recorded {len(recorded)}"


def main(argv: Sequence[str]) -> int:
    """Compare or record; 1 if a number has moved."""
    parser = argparse.ArgumentParser(prog="regress.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--update", action="store_true", help="record the losses instead of comparing them")
    parser.add_argument("--device", choices=sorted(RTOL), default="cpu")
    args = parser.parse_args(argv)
    path, ours = FOLDER / f"losses_{args.device}.txt", losses(args.device)
    if args.update:
        write(path, ours)
        sys.stdout.write(f"{path.name}: {len(ours)} steps recorded\n")
        return 0
    rtol = RTOL[args.device]
    difference = first_difference(ours, read(path), rtol)
    if difference:
        sys.stdout.write(f"brpg: {difference}; if that is meant, record anew with --update and say why\n")
        return 1
    sys.stdout.write(f"brpg: {len(ours)} steps as recorded in {path.name} (rtol {rtol:g})\n")
    return 0


if __name__ == "__main__":
    run_main(main)
