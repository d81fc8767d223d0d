"""Recorded losses of short runs: the images, the settings and the comparison that all projects use.

Runs go through a project's real `train.main` on images of their own. Networks and images are in float64, so that
other processors and library versions round differently without crossing a threshold.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from common.data.streams import TrainingData
from common.errors import UserError

RTOL = {"cpu": 1e-5, "cuda": 1e-3}  # sums over pixels come in any order on a GPU
ATOL = 1e-9
CLASSES = 5
LABELED, UNLABELED, VAL = range(6), range(6, 26), range(26, 28)

STEPS = 20
# of the small networks of U2PL's family: everything but `method`
FAMILY_TREE: dict[str, dict[str, Any]] = {
    "data": {"crop_size": [33, 33], "workers": 0},
    "optim": {"lr": 0.005, "head_lr_factor": 4.0, "epochs": 4, "batch_size": 4},
    "model": {
        "backbone": "resnet_tiny",
        "width": 8,
        "inner_planes": 16,
        "dilations": [1, 2, 3],
        "aux_weight": 0.4,
    },
    "eval": {"every_epochs": 0},
    "run": {"seed": 7, "log_interval": 1, "deterministic": True, "panels": False, "max_steps": STEPS},
}

Steps = list[dict[str, float]]


def wide_group(group: Any) -> Any:
    """A group of batches whose images are float64."""
    return [tuple(b._replace(image=b.image.double()) for b in batches) for batches in group]


@contextlib.contextmanager
def float64(
    train: Any,
    streams: type = TrainingData,
    method: str = "epoch",
    widen: Callable[[Any], Any] = wide_group,
) -> Iterator[None]:
    """Networks, memory and images of runs inside are float64.

    Args:
        train: module whose `set_up` builds the networks.
        streams: class that hands out the batches.
        method: its method that yields them.
        widen: makes the images of what it yields float64.
    """
    set_up, epoch = train.set_up, getattr(streams, method)

    def wide_set_up(*args: Any) -> Any:
        torch.set_default_dtype(torch.float64)
        try:
            return set_up(*args)
        finally:
            torch.set_default_dtype(torch.float32)

    def wide_epoch(self: Any, *args: Any) -> Iterator[Any]:
        yield from map(widen, epoch(self, *args))

    train.set_up = wide_set_up
    setattr(streams, method, wide_epoch)
    try:
        yield
    finally:
        train.set_up = set_up
        setattr(streams, method, epoch)


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


def run_losses(
    train: Any,
    tree: Mapping[str, Mapping[str, Any]],
    keys: Sequence[str],
    device: str,
    wide: contextlib.AbstractContextManager[None] | None = None,
) -> Steps:
    """What a run of `train.main` with the configuration `tree` logs under `keys` at every step.

    `wide` makes networks and images float64; None for `float64(train)`.
    """
    with tempfile.TemporaryDirectory() as name, wide or float64(train), same_settings():
        folder = Path(name)
        data = dict(tree["data"]) | {"dataset": str(write_images(folder)), "split": "few"}
        whole = dict(tree) | {"data": data, "run": dict(tree["run"]) | {"device": device}}
        (folder / "regress.yaml").write_text(yaml.safe_dump(whole))
        logging.getLogger("semiseg").disabled = True
        train.main(["--config", str(folder / "regress.yaml"), f"run.dir={folder / 'run'}"])
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [{key: entry[key] for key in keys if key in entry} for entry in map(json.loads, lines)]


def write(path: Path, steps: Sequence[Mapping[str, float]]) -> None:
    """One line a step: its number and `key=value` for everything logged."""
    rows = [
        f"{i} " + " ".join(f"{key}={value!r}" for key, value in step.items())
        for i, step in enumerate(steps, start=1)
    ]
    path.write_text("\n".join(rows) + "\n")


def read(path: Path) -> Steps:
    """What `write` wrote.

    Raises:
        UserError: nothing has been recorded.
    """
    if not path.is_file():
        raise UserError(f"{path}: nothing recorded for this device; record it with --update")
    rows = [line.split()[1:] for line in path.read_text().splitlines()]
    return [{key: float(value) for key, _, value in (word.partition("=") for word in row)} for row in rows]


def first_difference(
    ours: Sequence[Mapping[str, float]], recorded: Sequence[Mapping[str, float]], rtol: float
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


def arguments(argv: Sequence[str], doc: str | None) -> argparse.Namespace:
    """The command line of every project's `regress.py`."""
    parser = argparse.ArgumentParser(prog="regress.py", description=(doc or "").splitlines()[0])
    parser.add_argument("--update", action="store_true", help="record the losses instead of comparing them")
    parser.add_argument("--device", choices=sorted(RTOL), default="cpu")
    return parser.parse_args(argv)


def record_or_compare(
    args: argparse.Namespace, path: Path, label: str, losses: Callable[[str], Steps]
) -> int:
    """Write the losses of a run to `path`, or compare them with those there; 1 if a number has moved."""
    ours = losses(args.device)
    if args.update:
        write(path, ours)
        sys.stdout.write(f"{path.name}: {len(ours)} steps recorded\n")
        return 0
    rtol = RTOL[args.device]
    difference = first_difference(ours, read(path), rtol)
    if difference:
        sys.stdout.write(f"{label}: {difference}; if that is meant, record anew with --update and say why\n")
        return 1
    sys.stdout.write(f"{label}: {len(ours)} steps as recorded in {path.name} (rtol {rtol:g})\n")
    return 0


def record_or_compare_all(
    argv: Sequence[str],
    doc: str | None,
    folder: Path,
    label: str,
    losses: Mapping[str, Callable[[str], Steps]],
) -> int:
    """As `record_or_compare`, for runs by the beginning of their files' names in `folder`."""
    args = arguments(argv, doc)
    codes = [
        record_or_compare(args, folder / f"losses_{name}{args.device}.txt", label, own)
        for name, own in losses.items()
    ]
    return max(codes)
