"""Run directories of a small finished study, laid out as the projects write them, for the tests of the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from common.config import build
from splits.pictures import save_picture
from studies.study import OUTCOMES_NAME, PLAN_NAME, Study, jobs
from studies.table import Record
from tools.pictures import save_palette_png

CLASSES = ("ground", "tree & bush", "car")
PALETTE = [[0, 0, 0], [0, 160, 0], [200, 60, 40]]
SIZE = (24, 32)

STUDY: dict[str, Any] = {
    "name": "Trees <and> cars",
    "baseline": "labels only",
    "seeds": [0, 1],
    "pictures": 1,
    "runs": [
        {"label": "labels only", "project": "u2pl", "config": "configs/smoke_sup.yaml"},
        {"label": "method A", "project": "u2pl", "config": "configs/smoke.yaml"},
        {
            "label": "method B",
            "project": "u2pl",
            "config": "configs/smoke.yaml",
            "overrides": ["optim.lr=0.02"],
        },
    ],
}
FIGURES = {  # mIoU best and last; method B's second seed is missing
    ("labels only", 0): (0.50, 0.48),
    ("labels only", 1): (0.52, 0.50),
    ("method A", 0): (0.55, 0.55),
    ("method A", 1): (0.61, 0.57),
    ("method B", 0): (0.47, 0.46),
}


def make_study(**changes: Any) -> Study:
    return build(Study, STUDY | changes)


def result(
    best: float, last: float, seed: int, classes: Sequence[str] = CLASSES, **changes: Any
) -> dict[str, Any]:
    """A `result.json`; the classes lie at the mIoU, 0.1 above and 0.1 below it."""

    def figures(miou: float) -> dict[str, Any]:
        iou = dict(zip(classes, (miou, miou + 0.1, miou - 0.1), strict=True))
        return {"miou": miou, "pixel_accuracy": miou + 0.2, "iou": iou}

    return {
        "miou_best": best,
        "miou_last": last,
        "best": figures(best),
        "last": figures(last),
        "list": "val",
        "protocol": {
            "kind": "whole_image",
            "crop_size": None,
            "scales": [1.0],
            "flip": False,
            "batch_size": 4,
        },
        "split": "random/4",
        "split_hash": "a" * 64,
        "labeled": 4,
        "unlabeled": 36,
        "config_hash": "c0ffee",
        "seed": seed,
        "steps": 20,
        "commit": "1234567890abcdef",
        "seconds": 100.0 + 20 * seed,
        "peak_memory_bytes": (seed + 1) * 2**30,
        "skipped_files": 0,
        "skipped_steps": 0.0,
    } | changes


def write_run(
    run_dir: Path,
    content: Mapping[str, Any] | None,
    dataset: Path | None = None,
    metrics: Sequence[Mapping[str, Any]] = (),
) -> None:
    """A run directory; `content` is its result, None for a run that has not finished."""
    run_dir.mkdir(parents=True)
    lines = [{"step": i, "loss": 2 / i, "loss_sup": 1 / i, "loss_unsup": 1 / i, "images_per_s": 10.0 * i}
             for i in range(1, 6)]  # fmt: skip
    lines += [{"step": 5, "miou": 0.4}, *metrics]
    (run_dir / "metrics.jsonl").write_text(
        "".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 6, "los'
    )
    facts = {"device": "cpu", "devices": ["x86_64"], "world_size": 1, "threads": 1, "dirty": False}
    (run_dir / "env.json").write_text(json.dumps(facts | {"command": "python train.py"}))
    (run_dir / "train.log").write_text(
        "2026-01-01 INFO deviation from the paper: BatchNorm sees 4 images at once\n"
    )
    data = {"dataset": str(dataset) if dataset else "shapes", "root": None}
    (run_dir / "config.yaml").write_text(
        yaml.safe_dump({"data": data, "run": {"dir": None}, "expect": {"miou": None}})
    )
    if content is not None:
        (run_dir / "result.json").write_text(json.dumps(content))
        (run_dir / "best.pt").write_bytes(b"weights")


IDS = ("p0", "p1", "p2", "p3")


def write_dataset(folder: Path, classes: Sequence[str] = CLASSES, ids: Sequence[str] = IDS) -> Path:
    """Four photos of one car on a lawn; the fourth mask has ignored pixels. Returns the `dataset.yaml`."""
    for i, name in enumerate(ids):
        photo = np.full((*SIZE, 3), 40 * i, np.uint8)
        mask = np.zeros(SIZE, np.uint8)
        mask[4:20, 4 + 4 * i : 12 + 4 * i] = 2
        if i == 3:
            mask[:2] = 255
        save_picture(folder / f"photos/{name}.png", photo)
        save_palette_png(folder / f"masks/{name}.png", mask, PALETTE)
    (folder / "val.txt").write_text("".join(f"{name}\n" for name in ids))
    content = {
        "name": "park", "root": ".", "images": "photos/{id}.png", "labels": "masks/{id}.png",
        "classes": list(classes), "palette": PALETTE, "lists": {"val": "val.txt"},
    }  # fmt: skip
    (folder / "dataset.yaml").write_text(yaml.safe_dump(content))
    return folder / "dataset.yaml"


def fake_predict(record: Record, images: Path, out: Path, threads: int) -> None:
    """The second method finds the car of photo 0 and misses that of photo 1; the baseline does the opposite."""
    del threads
    labels = ["labels only", "method A", "method B"]
    place = labels.index(record.label) if record.label in labels else 1
    for path in sorted(images.glob("*.png")):
        i = int(path.stem)
        mask = np.zeros(SIZE, np.uint8)
        if i in ((1, 2, 3), (0, 2, 3), (2, 3))[place]:
            mask[4:20, 4 + 4 * i : 12 + 4 * i] = 2
        save_palette_png(out / path.name, mask, PALETTE)


def write_study(out: Path, dataset: Path) -> None:
    """Runs of two seeds of `STUDY`; method B's second seed is missing."""
    for job in jobs(make_study(), out):
        found = FIGURES.get((job.method.label, job.seed))
        write_run(job.run_dir, result(*found, job.seed) if found else None, dataset)
    (out / "study.yaml").write_text(yaml.safe_dump(STUDY))


SPLITS = ("random/4", "random/12")
WIDE = STUDY | {"splits": list(SPLITS), "seeds": [0, 1, 2], "pictures": 3}


def write_wide_study(out: Path, dataset: Path) -> Study:
    """Two splits, three seeds, pseudo-labels logged by method A, method B failed on the second split."""
    study = build(Study, WIDE)
    outcomes = {}
    for job in jobs(study, out):
        where, method = SPLITS.index(job.split), study.labels.index(job.method.label)
        if method == 2 and where == 1:
            outcomes[job.name] = {
                "status": "failed",
                "message": "the disk is full; free space",
                "seconds": 3.0,
            }
            continue
        best = 0.4 + 0.1 * where + 0.05 * method + 0.01 * job.seed * (1 + method)
        content = result(
            best, best - 0.01, job.seed, split=job.split, split_hash="ab"[where] * 64,
            labeled=(4, 12)[where], unlabeled=(36, 28)[where],
        )  # fmt: skip
        lines = [{"step": 10 * i, "miou": best - 0.2 / i, "pseudo_kept": 0.2 * i, "pseudo_accuracy": 0.9,
                  "pseudo_accuracy_all": 0.7} for i in range(1, 4)]  # fmt: skip
        if method != 1:
            lines = [{"step": line["step"], "miou": line["miou"]} for line in lines]
        write_run(job.run_dir, content, dataset, lines)
    (out / "study.yaml").write_text(yaml.safe_dump(WIDE))
    (out / OUTCOMES_NAME).write_text(json.dumps(outcomes))
    plan = {
        "differences": [{"split": "", "what": "steps", "values": {"labels only": 20, "method A": 24}}],
        "shared": {"random/4": {"crop": [64, 64]}},
    }
    (out / PLAN_NAME).write_text(json.dumps(plan))
    return study
