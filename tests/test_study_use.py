"""The winner of a study in use: what is chosen, what is said, what is written, and what to annotate next."""

from __future__ import annotations

import base64
import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw

from common.config import build
from common.data.dataset_yaml import load_spec
from common.errors import UserError
from splits.make import make
from splits.prepare.masks import decode_runs, decode_segmentation
from studies import annotations
from studies.__main__ import main
from studies.annotations import write_annotations
from studies.answers import answers, how_to_use
from studies.next import Candidate, describe, rank
from studies.plan import draw_fractions
from studies.progress import Progress
from studies.report import report
from studies.study import Study, jobs
from studies.table import load_records, tables, winner
from tests import tiny
from tests.study_runs import (
    STUDY,
    fake_predict,
    make_study,
    result,
    write_dataset,
    write_run,
    write_study,
    write_wide_study,
)
from tests.test_export import write_run as write_network

CLASSES = ("background", "road", "tree")
PALETTE = np.array([[0, 0, 0], [90, 90, 90], [0, 160, 0]], np.uint8)


def park() -> np.ndarray[Any, Any]:
    """Class ids of a scene: a road around a lawn with a tree on it, in which a road shows, and a tree at the border."""
    ids = np.zeros((360, 480), np.uint8)
    cv2.ellipse(ids, (240, 180), (200, 152), 0, 0, 360, 1, -1)
    cv2.ellipse(ids, (240, 180), (160, 112), 0, 0, 360, 0, -1)
    cv2.circle(ids, (240, 180), 80, 2, -1)
    cv2.circle(ids, (240, 180), 32, 1, -1)
    ids[:120, 400:] = 2
    return ids


def paint_labelme(content: dict[str, Any]) -> np.ndarray[Any, Any]:
    canvas = Image.new("L", (content["imageWidth"], content["imageHeight"]))
    for shape in content["shapes"]:
        assert shape["shape_type"] == "polygon"
        points = [tuple(point) for point in shape["points"]]
        number = CLASSES.index(shape["label"])
        ImageDraw.Draw(canvas).polygon(points, outline=number, fill=number)
    return np.asarray(canvas)


def iou(found: np.ndarray[Any, Any], truth: np.ndarray[Any, Any]) -> list[float]:
    return [
        ((found == k) & (truth == k)).sum() / ((found == k) | (truth == k)).sum() for k in np.unique(truth)
    ]


def test_labelme_outlines_paint_what_was_predicted(tmp_path: Path) -> None:
    ids, photo = park(), tmp_path / "photos" / "day" / "a.jpg"
    place = write_annotations("labelme", {"day/a.jpg": (photo, ids)}, CLASSES, PALETTE, tmp_path / "out")
    (file,) = place.rglob("*.json")
    assert file == tmp_path / "out" / "labelme" / "day" / "a.json"
    content = json.loads(file.read_text())
    assert (file.parent / content["imagePath"]).resolve() == photo
    labels = [shape["label"] for shape in content["shapes"]]
    assert labels == ["road", "background", "tree", "tree", "road"]  # the lawn within, not the outside
    assert min(iou(paint_labelme(content), ids)) > 0.99
    assert sum(len(shape["points"]) for shape in content["shapes"]) < 300  # of some 3000 pixels on borders


def test_coco_and_cvat_regions_are_what_was_predicted(tmp_path: Path) -> None:
    photos = {
        "day/a.jpg": (tmp_path / "a.jpg", park()),
        "b.jpg": (tmp_path / "b.jpg", park()[:, ::-1].copy()),
    }
    coco = json.loads(write_annotations("coco", photos, CLASSES, PALETTE, tmp_path).read_text())
    assert [image["file_name"] for image in coco["images"]] == list(photos)
    names = {entry["id"]: entry["name"] for entry in coco["categories"]}
    cvat = ElementTree.parse(write_annotations("cvat", photos, CLASSES, PALETTE, tmp_path)).getroot()
    assert [label.findtext("color") for label in cvat.iter("label")] == ["#000000", "#5a5a5a", "#00a000"]
    for image, element in zip(coco["images"], cvat.iter("image"), strict=True):
        truth = photos[image["file_name"]][1]
        height, width = truth.shape
        found = np.zeros((2, height, width), np.uint8)
        for entry in coco["annotations"]:
            if entry["image_id"] == image["id"]:
                region = decode_segmentation(entry["segmentation"], height, width, "test")
                assert region.sum() == entry["area"]
                found[0][region] = CLASSES.index(names[entry["category_id"]])
        for one in element.iter("mask"):
            left, top, across, down = (int(one.get(key, "")) for key in ("left", "top", "width", "height"))
            runs = np.array([int(run) for run in one.get("rle", "").split(",")])
            region = decode_runs(runs, across, down, "test").T
            found[1, top : top + down, left : left + across][region] = CLASSES.index(one.get("label", ""))
        assert element.get("name") == image["file_name"]
        np.testing.assert_array_equal(found, [truth, truth])


def test_noise_is_given_to_what_surrounds_it() -> None:
    ids = park()
    noisy = ids.copy()
    noisy[180, 236:244], noisy[20:25, 20:26], noisy[340, 400] = 2, 1, 2
    np.testing.assert_array_equal(annotations.without_specks(noisy), ids)
    large = ids.copy()
    large[8:16, 8:16] = 1  # 64 of 172800 pixels
    np.testing.assert_array_equal(annotations.without_specks(large), large)
    grains = np.arange(12, dtype=np.uint8).reshape(3, 4)  # nothing but noise
    np.testing.assert_array_equal(annotations.without_specks(grains), grains)


def test_runs_begin_outside() -> None:
    region = np.array([[True, True, False], [False, True, True]])
    assert annotations.runs(region) == [0, 2, 2, 2]
    assert annotations.runs(np.zeros((2, 2), bool)) == [4]


# --- what to annotate next ---------------------------------------------------------------------------------------


def candidate(name: str, confidence: float, *point: float) -> Candidate:
    return Candidate(name, confidence, np.array(point), lambda: (park(), park()), Path(name))


def test_photos_rank_by_uncertainty_times_distance_to_what_is_known() -> None:
    candidates = [
        candidate("like the labeled", 0.2, 0.0, 0.1),
        candidate("far and unsure", 0.5, 1.0, 0.0),
        candidate("its twin", 0.5, 0.99, 0.0),
        candidate("near and unsure", 0.4, 0.0, 0.5),
        candidate("far and sure", 0.99, 1.0, 1.0),
    ]
    found = rank(candidates, [np.zeros(2)])
    assert [one.candidate.name for one in found] == [
        "far and unsure", "near and unsure", "like the labeled", "far and sure", "its twin"
    ]  # fmt: skip
    assert [round(one.worth, 4) for one in found] == [0.5, 0.3, 0.08, 0.01, 0.005]
    assert [round(one.distance, 4) for one in found] == [1.0, 0.5, 0.1, 1.0, 0.01]
    assert rank([], [np.zeros(2)]) == []


def test_the_rest_of_many_photos_is_ranked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studies.next.GREEDY", 1)
    names = [one.candidate.name for one in rank([candidate(str(i), 0.1 * i, i, 0.0) for i in range(6)], [])]
    assert names[0] == "0"  # nothing is known: the most unsure one
    assert sorted(names) == list("012345")


def test_a_description_holds_shares_and_colours() -> None:
    photo = np.zeros((40, 40, 3), np.uint8)
    photo[:20] = 255
    ids = np.zeros((40, 40), np.uint8)
    ids[:, :10], ids[0] = 1, 255
    found = describe(photo, ids, 3)
    np.testing.assert_allclose(found[:3], [math.sqrt(0.75), 0.5, 0.0])
    np.testing.assert_allclose(found[3:], [0.25] * 24 + [0.0] * 24)
    other = describe(255 - photo, ids, 3)
    assert np.linalg.norm(found - other) == pytest.approx(math.sqrt(48) / 4)


# --- who has won, and what is said -------------------------------------------------------------------------------


@pytest.fixture
def finished_study(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    write_study(out, write_dataset(tmp_path / "park"))
    return out


def told(study: Study, out: Path) -> dict[str, str]:
    return dict(answers(study, tables(study, load_records(study, out)), "no pictures"))


def change(out: Path, run: str, **changes: Any) -> None:
    file = out / run / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_the_winner_is_chosen_by_the_validation_list(finished_study: Path) -> None:
    study = make_study()
    best = winner(tables(study, load_records(study, finished_study)))
    assert best is not None
    assert (best.row.label, best.record.job.seed, best.val) == ("method A", 1, pytest.approx(0.58))
    change(finished_study, "labels_only/seed0", in_training={"best": 0.7})
    change(finished_study, "labels_only/seed1", in_training={"best": 0.6})
    change(finished_study, "method_a/seed0", in_training={"best": 0.66})
    best = winner(tables(study, load_records(study, finished_study)))
    assert best is not None
    assert (best.row.label, best.record.job.seed, best.val) == ("labels only", 0, pytest.approx(0.65))
    assert (
        "no method with unlabeled photos did better" in told(study, finished_study)["Which method is best?"]
    )
    assert "Is the gain real?" not in told(study, finished_study)
    assert winner([]) is None
    assert answers(study, [], "none") == []


def test_answers_name_gain_interval_and_chance(finished_study: Path) -> None:
    study = make_study()
    found = told(study, finished_study)
    assert found["Which method is best?"] == (
        "method A, with 58.0 % mIoU (the mean of 2 runs), +7.0 points against 'labels only' (95 % interval -18.4 to "
        "+32.4). Measured on the 'val' list; the method and its weights were chosen by these photos, so the figure "
        "flatters a little."
    )
    assert found["Is the gain real?"].startswith("Not shown: the 95 % interval over 2 seeds includes zero.")
    assert found["What does it cost?"] == (
        "1m50 of training per run, 1.0 times as long as 'labels only' (1m50); 2.0 GiB of memory."
    )
    assert found["Where does it fail?"] == (
        "Lowest IoU by class: car 48.0 %, ground 58.0 %, tree & bush 68.0 %."
    )
    assert "What would more masks bring?" not in found
    change(finished_study, "method_a/seed0", miou_best=0.569)  # gains of 6.9 and 9 points
    assert "includes zero" in told(study, finished_study)["Is the gain real?"]
    change(finished_study, "method_a/seed1", miou_best=0.59)  # 6.9 and 7
    assert told(study, finished_study)["Is the gain real?"] == (
        "Yes: the 95 % interval over 2 seeds excludes zero, though it is the best of 2 methods, for which the interval "
        "is not widened."
    )
    (finished_study / "method_a/seed1/result.json").unlink()
    assert told(study, finished_study)["Is the gain real?"].startswith("One run of each cannot tell")


def test_answers_tell_what_all_masks_would_bring(finished_study: Path) -> None:
    assert "How much room is there?" not in told(make_study(), finished_study)
    for run in ("method_b/seed0", "labels_only/seed1"):
        change(finished_study, run, labeled=40, unlabeled=0, split_hash="b" * 64)
    change(finished_study, "method_b/seed0", miou_best=0.621)
    baseline = json.loads((finished_study / "labels_only/seed0/result.json").read_text())["miou_best"]
    assert told(make_study(), finished_study)["How much room is there?"].startswith(
        f"With the masks of all photos ('method B') mIoU is 62.1 %, {62.1 - 100 * baseline:+.1f} points against "
        "'labels only' after as many steps."
    )
    for run in ("method_b/seed0", "labels_only/seed1"):
        change(finished_study, run, list="test")  # figures of other photos are no bound
    assert "How much room is there?" not in told(make_study(), finished_study)


def test_answers_tell_the_curve_over_masks(tmp_path: Path) -> None:
    out = tmp_path / "out"
    study = write_wide_study(out, write_dataset(tmp_path / "park"))
    expected = 100 * 0.1 * math.log(22 / 12) / math.log(3)
    assert told(study, out)["What would more masks bring?"] == (
        "method A: 4 masks 47.0 %, 12 masks 57.0 %. If it goes on as between the last two, 10 more masks bring about "
        f"{expected:.1f} points."
    )
    for seed in range(3):
        change(out, f"random_12/method_a/seed{seed}", miou_best=0.47, in_training={"best": 0.9})
    assert told(study, out)["What would more masks bring?"].endswith(
        "From 4 to 12 masks it did not grow: others than more of the same are needed."
    )


def test_page_and_summary_begin_with_the_answers(finished_study: Path) -> None:
    lines: list[str] = []
    report(finished_study, fake_predict, lines.append)
    page = (finished_study / "report.html").read_text()
    head = page[: page.index("<main>")]
    for text in ("Which method is best?", "Is the gain real?", "What does it cost?", "Where does it fail?"):
        assert f"<dt>{text}</dt>" in head
        assert f"**{text}** " in (finished_study / "summary.md").read_text()
        assert any(line.startswith(text) for line in lines)
    worst = "Lowest mIoU by photo: p1 "  # method A misses the car of photo 0 or 1
    assert worst in head or worst.replace("p1", "p0") in head
    command = how_to_use(str(finished_study))
    assert command in head
    assert f"use it: {command}" in lines


# --- numbers of masks, progress ----------------------------------------------------------------------------------


def test_fractions_are_drawn_and_all_is_the_configurations_own(tmp_path: Path) -> None:
    dataset = tiny.write_dataset(tmp_path / "farm", masks=False)
    config = tiny.write_config(tmp_path / "c.yaml", dataset, "few")
    runs = [{"label": label, "project": "u2pl", "config": str(config)} for label in ("a", "b")]
    tree = {"name": "farm", "baseline": "a", "runs": runs, "fractions": [2, 4, "all"]}
    study = build(Study, tree)
    assert study.splits == ("random/2", "random/4", "")
    found = jobs(study, tmp_path / "out")
    assert [job.run_dir.relative_to(tmp_path / "out").as_posix() for job in found] == [
        "random_2/a/seed0", "random_2/b/seed0", "random_4/a/seed0", "random_4/b/seed0", "a/seed0", "b/seed0"
    ]  # fmt: skip
    assert not [text for text in found[-1].overrides if text.startswith("data.split")]
    own = tmp_path / "farm" / "random" / "4"
    make(load_spec(str(dataset)), "4", 3, tmp_path / "other", force=False)
    draw_fractions(study, tmp_path / "out")
    lists = {n: (own.with_name(n) / "labeled.txt").read_text().split() for n in ("2", "4")}
    assert (len(lists["2"]), len(lists["4"])) == (2, 4)
    assert set(lists["2"]) < set(lists["4"])
    (own / "labeled.txt").write_text("p001\np000\n")
    draw_fractions(study, tmp_path / "out")
    assert (own / "labeled.txt").read_text() == "p001\np000\n"  # what is there stays
    with pytest.raises(UserError, match="farm: 'fractions': 60: 60 of 6 photos with masks"):
        draw_fractions(build(Study, tree | {"fractions": [60]}), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fractions": [0]}, "'fractions' has 0; expected numbers of masks, 1 or more, or all"),
        ({"fractions": ["most"]}, "'fractions' has 'most'"),
        (
            {"fractions": [8], "splits": ["random/4"]},
            "'fractions' goes with mode matched and without 'splits'",
        ),
        ({"fractions": [8], "mode": "as_published"}, "'fractions' goes with mode matched"),
        ({"fractions": [8, 8]}, "expected names that differ"),
    ],
)
def test_fractions_that_make_no_sense_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(Study, STUDY | changes)


def test_progress_counts_what_is_left_at_the_speed_so_far() -> None:
    now = [100.0]
    progress = Progress(4, 1, lambda: now[0])
    assert progress.text == "1 of 4 runs, 25 %"
    progress.read("a", "2026 INFO step   50/200 ep 1 lr 1.0e-02")  # it goes on from there
    now[0] += 60
    progress.read("a", "step 150/200 ep 3")
    assert progress.text == "1 of 4 runs, 44 %, 4m30 left"  # half a run in a minute, 2.25 to go
    progress.read("a", "no step")
    progress.end("a", finished=True)
    assert progress.text == "2 of 4 runs, 50 %, 2m40 left"
    progress.end("b", finished=False)  # before its first step
    assert progress.text == "3 of 4 runs, 75 %, 1m20 left"
    progress.end("c", finished=True)
    assert progress.text == "4 of 4 runs, 100 %"


# --- all of it ---------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_the_winner_predicts_ranks_and_annotates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = tiny.write_dataset(tmp_path / "farm", masks=False)
    out, spec = tmp_path / "out", load_spec(str(dataset))
    study = build(Study, STUDY)
    for job in jobs(study, out):
        best = {"labels only": 0.4, "method A": 0.6, "method B": 0.5}[job.method.label] + 0.01 * job.seed
        write_run(job.run_dir, result(best, best, job.seed, spec.classes, split="few"), dataset)
        if job.method.label == "method A" and job.seed == 1:
            write_network(job.run_dir, "u2pl", dataset=str(dataset))
    (out / "study.yaml").write_text(yaml.safe_dump(STUDY))
    photos = shutil.copytree(tmp_path / "farm" / "img", tmp_path / "elsewhere")
    masks = tmp_path / "masks"
    command = [
        "use",
        str(out),
        "--input",
        str(photos),
        "--out",
        str(masks),
        "--as",
        "labelme",
        "--first",
        "3",
    ]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "winner: method A (mean 60.5 % mIoU on the validation list over 2 runs" in said
    with (masks / "next.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["rank"] for line in lines] == [str(i) for i in range(1, 11)]
    assert {line["photo"] for line in lines} == {
        f"p{i:03d}.jpg" for i in range(6, 16)
    }  # neither labeled nor val
    page = (masks / "next.html").read_text()
    assert page.count("<figure>") == 30
    assert len(base64.b64decode(page.split("base64,")[1].split('"')[0])) > 100
    assert sorted(path.stem for path in (masks / "labelme").glob("*.json")) == sorted(
        line["photo"].removesuffix(".jpg") for line in lines[:3]
    )
    for path in (masks / "labelme").glob("*.json"):
        content = json.loads(path.read_text())
        assert (path.parent / content["imagePath"]).resolve() == photos / f"{path.stem}.jpg"
        assert {shape["label"] for shape in content["shapes"]} <= set(spec.classes)
    for end in (".png", "_overlay.jpg", "_confidence.png"):
        assert (masks / f"p000{end}").is_file()

    (tmp_path / "farm" / "group.txt").write_text("p0(.)")  # the validation photos' scene shows six others
    assert main(command[:6]) == 0
    assert "6 photos are of scenes that are measured on, and not ranked" in capsys.readouterr().out
    with (masks / "next.csv").open(newline="") as file:
        assert {line["photo"] for line in csv.DictReader(file)} == {f"p{i:03d}.jpg" for i in range(6, 10)}


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "study.yaml").write_text(yaml.safe_dump(STUDY))
    shared = ["--input", "photos", "--out", str(tmp_path / "masks")]
    with pytest.raises(UserError, match="no run has finished yet; train with 'python -m studies run' first"):
        main(["use", str(out), *shared])
    with pytest.raises(UserError, match="no such study; give a YAML file"):
        main(["use", str(tmp_path), *shared])
    for words in (["--first", "3"], ["--first", "0", "--as", "coco"]):
        with pytest.raises(UserError, match="a number of 1 or more that goes with --as"):
            main(["use", str(out), *shared, *words])
    assert not (tmp_path / "masks").exists()
