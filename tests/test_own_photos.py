"""docs/own_photos.md, executed as it stands but for the hours: three commands, a second round, data without init."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.data.lists import read_ids
from studies.study import load_study
from tests.tiny import photo

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "own_photos.md").read_text(encoding="utf-8")
HEIGHT, WIDTH = 72, 80
FASTER = {
    "crop_size=[256, 256]": "crop_size=[64, 64]",
    "seeds: [0, 1, 2]": "seeds: [0]",
    "budget_steps: 2200": "budget_steps: 30",
    "slots: 1 ": "slots: 2 ",
    'overrides: ["data': 'overrides: ["model.inner_planes=16", "data',
}
LEAF = 14  # rows and columns of the leaf that `photo` draws


def blocks(title: str, language: str = "sh") -> list[str]:
    """Code blocks below a heading."""
    section = TEXT.split(f"{title}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(rf"^```{language}\n(.*?)^```", section, flags=re.M | re.S)


def execute(script: str, folder: Path) -> str:
    """What a script prints, on one core, so that the tests beside it do not stretch its times."""
    script = script.replace("--hours 2", "--hours 0.01").replace("python ", f"{sys.executable} ")
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    env.pop("SSS_DATA", None)
    core = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    done = subprocess.run(
        ["sh", "-eu", "-c", script],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
        preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, {core}),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def leaves(folder: Path, count: int, annotated: int) -> None:
    """Photos of a leaf each, of which the first are annotated in labelme."""
    folder.mkdir()
    for i in range(count):
        image, label = photo(i, HEIGHT, WIDTH, classes=2)
        Image.fromarray(image).save(folder / f"leaf{i:02d}.jpg")
        if i < annotated:
            (top, left) = (int(axis.min()) for axis in np.nonzero(label))
            corners = [
                [left, top],
                [left + LEAF - 1, top],
                [left + LEAF - 1, top + LEAF - 1],
                [left, top + LEAF - 1],
            ]
            shape = {"label": "leaf", "points": corners, "shape_type": "polygon"}
            content = {
                "shapes": [shape],
                "imagePath": f"leaf{i:02d}.jpg",
                "imageHeight": HEIGHT,
                "imageWidth": WIDTH,
            }
            (folder / f"leaf{i:02d}.json").write_text(json.dumps(content))


@pytest.mark.slow
def test_three_commands_and_a_second_round(tmp_path: Path) -> None:
    leaves(tmp_path / "photos", 44, 14)
    said = execute(blocks("# Your own photos")[0], tmp_path)
    data = tmp_path / "mydata"
    study = load_study(data / "study.yaml")
    assert study.splits == ("study/10",)
    assert "found 44 photos (80x72), 14 of them annotated (14 labelme)" in said
    assert "next: python -m studies run mydata/study.yaml --report" in said
    for folder in (data / "runs" / "study_10").iterdir():
        assert 0 < json.loads((folder / "seed0" / "result.json").read_text())["miou"] <= 1
    assert "<dt>Which method is best?</dt>" in (data / "runs" / "report.html").read_text(encoding="utf-8")
    masks = list((tmp_path / "masks").glob("leaf??.png"))
    assert len(masks) == 44
    with Image.open(masks[0]) as mask:
        assert mask.size == (WIDTH, HEIGHT)
    with (tmp_path / "masks" / "next.csv").open() as file:
        first = [line["photo"] for line in csv.DictReader(file)]
    assert len(first) == 30  # those without masks
    val = (data / "val.txt").read_text()

    again, export = blocks("## 3. The winner at work")
    said = execute(again, tmp_path)
    assert load_study(data / "study.yaml").splits == ("study/10", "study/20")
    new = set(read_ids(data / "study/20/labeled.txt")) - set(read_ids(data / "study/10/labeled.txt"))
    assert new == {name.removesuffix(".jpg") for name in first[:10]}
    assert (data / "val.txt").read_text() == val
    # on a slow machine the steps are too few for an epoch of more masks
    same = load_study(data / "study.yaml").budget_steps == study.budget_steps
    assert ("finished before" in said) == same
    assert ("trained anew" in said) != same
    assert "20 masks" in (data / "runs" / "report.html").read_text(encoding="utf-8")

    run = re.findall(r"best run: ([^)]+)\)", said)[-1]
    execute(export.replace("RUN", run), tmp_path)
    assert len(list((tmp_path / "masks_onnx").glob("leaf??.png"))) == 44
    for path in (tmp_path / "masks_onnx").glob("leaf??.png"):
        with Image.open(path) as ours, Image.open(tmp_path / "masks" / path.name) as theirs:
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def described_leaves(folder: Path, faster: bool = False) -> None:
    """36 photos, 12 to train with masks, 16 without, 8 to measure on, and the files of the page that describe them."""
    data = folder / "leaves"
    for part in ("img", "mask"):
        (data / part).mkdir(parents=True)
    for i in range(36):
        image, label = photo(i, HEIGHT, WIDTH, classes=2)
        Image.fromarray(image).save(data / "img" / f"leaf{i:02d}.jpg")
        if i < 12 or i >= 28:
            Image.fromarray(label).save(data / "mask" / f"leaf{i:02d}.png")
    (data / "train.txt").write_text("".join(f"leaf{i:02d}\n" for i in range(28)))
    (data / "val.txt").write_text("".join(f"leaf{i:02d}\n" for i in range(28, 36)))
    for block in blocks("## Without init", "yaml"):
        name, text = re.match(r"# (\S+)\n(.*)", block, flags=re.S).groups()
        for slow, fast in FASTER.items() if faster else ():
            text = text.replace(slow, fast)
        (folder / name).write_text(text.replace("{root}", str(folder)))


@pytest.mark.smoke
def test_a_dataset_without_init(tmp_path: Path) -> None:
    described_leaves(tmp_path)
    data = tmp_path / "leaves"
    (script,) = blocks("## Without init")
    said = execute(script, tmp_path)
    assert "8 labeled, 20 unlabeled" in said
    assert "leaves: all is well" in said
    assert load_study(data / "study.yaml").splits == ("study/12",)
    assert "matched: all methods have" in said
    assert said.count("to do") == 9
    assert not (ROOT / "runs" / "leaves").exists()


@pytest.mark.slow
def test_the_study_by_hand_trains(tmp_path: Path) -> None:
    described_leaves(tmp_path, faster=True)
    out = tmp_path / "runs" / "leaves"
    said = execute(
        "python -m splits make leaves/dataset.yaml --fraction 8 --seed 0\n"
        f"python -m studies run leaves/by_hand.yaml --out {out} --report\n"
        f"python {ROOT}/projects/u2pl/predict.py --run {out}/u2pl/seed0 --input leaves/img --out masks",
        tmp_path,
    )
    assert "8 labeled, 20 unlabeled" in said
    names = ("supervised_only", "u2pl", "cps_cutmix")
    results = {name: json.loads((out / name / "seed0" / "result.json").read_text()) for name in names}
    assert len({result["split_hash"] for result in results.values()}) == 1
    assert {result["steps"] for result in results.values()} == {30}
    assert 0.3 < results["u2pl"]["miou"] <= 1
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(label in page for label in ("supervised only", "U2PL", "CPS + CutMix"))
    masks = sorted((tmp_path / "masks").glob("*.png"))
    assert len(masks) == 36
    with Image.open(masks[0]) as mask:
        assert mask.size == (WIDTH, HEIGHT)
        assert set(np.unique(np.asarray(mask))) <= {0, 1}
