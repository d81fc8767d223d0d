from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import projects
import studies.study
from common.config import build, config_hash, load_config, to_dict
from common.errors import UserError
from common.visualize import save_palette_png, save_picture
from studies import pictures
from studies.__main__ import main, report
from studies.charts import Line, line_chart, nice_ticks, thin_out
from studies.page import render, verdict
from studies.run import finished, run_study, set_aside
from studies.study import Study, jobs, load_study, output_folder, resolve
from studies.table import (
    Record,
    Stat,
    Table,
    images_per_s,
    load_records,
    percent,
    points,
    stat,
    summary_csv,
    summary_markdown,
    tables,
)

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ("ground", "tree & bush", "car")
PALETTE = [[0, 0, 0], [0, 160, 0], [200, 60, 40]]

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


def make_study(**changes: Any) -> Study:
    return build(Study, STUDY | changes)


def result(best: float, last: float, seed: int, **changes: Any) -> dict[str, Any]:
    figures = {"miou": best, "iou": dict(zip(CLASSES, (best, best + 0.1, best - 0.1), strict=True))}
    return {
        "miou_best": best,
        "miou_last": last,
        "best": figures,
        "last": figures,
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
        "config_hash": "c0ffee",
        "seed": seed,
        "steps": 20,
        "commit": "1234567890abcdef",
        "seconds": 100.0 + 20 * seed,
        "peak_memory_bytes": (seed + 1) * 2**30,
    } | changes


def write_run(run_dir: Path, content: dict[str, Any] | None, dataset: Path | None = None) -> None:
    run_dir.mkdir(parents=True)
    lines = [{"step": i, "loss": 2 / i, "loss_sup": 1 / i, "loss_unsup": 1 / i, "images_per_s": 10.0 * i}
             for i in range(1, 6)]  # fmt: skip
    lines.append({"step": 5, "miou": 0.4})
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"step": 6, "los'
    (run_dir / "metrics.jsonl").write_text(text)
    (run_dir / "env.json").write_text(
        json.dumps({"device": "cpu", "dirty": False, "command": "python train.py"})
    )
    data = {"dataset": str(dataset), "root": None} if dataset else {"dataset": "shapes"}
    (run_dir / "config.yaml").write_text(yaml.safe_dump({"data": data, "expect": {"miou": None}}))
    if content is not None:
        (run_dir / "result.json").write_text(json.dumps(content))
        (run_dir / "best.pt").write_bytes(b"weights")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Four photos of one car on a lawn; the fourth mask has ignored pixels."""
    folder = tmp_path / "park"
    for i in range(4):
        photo = np.full((24, 32, 3), 40 * i, np.uint8)
        mask = np.zeros((24, 32), np.uint8)
        mask[4:20, 4 + 4 * i : 12 + 4 * i] = 2
        if i == 3:
            mask[:2] = 255
        save_picture(folder / f"photos/p{i}.png", photo)
        save_palette_png(folder / f"masks/p{i}.png", mask, PALETTE)
    (folder / "val.txt").write_text("".join(f"p{i}\n" for i in range(4)))
    content = {
        "name": "park",
        "root": ".",
        "images": "photos/{id}.png",
        "labels": "masks/{id}.png",
        "classes": list(CLASSES),
        "palette": PALETTE,
        "lists": {"val": "val.txt"},
    }
    (folder / "dataset.yaml").write_text(yaml.safe_dump(content))
    return folder / "dataset.yaml"


def fake_predict(record: Record, images: Path, out: Path, threads: int) -> None:
    """Method A finds the car of photo 0, misses that of photo 1; the baseline does the opposite."""
    for path in sorted(images.glob("*.png")):
        i = int(path.stem)
        mask = np.zeros((24, 32), np.uint8)
        if i in {"labels only": (1, 2, 3), "method A": (0, 2, 3), "method B": (2, 3)}[record.label]:
            mask[4:20, 4 + 4 * i : 12 + 4 * i] = 2
        save_palette_png(out / path.name, mask, PALETTE)


@pytest.fixture
def finished_study(tmp_path: Path, dataset: Path) -> Path:
    """Runs of two seeds; method B's second seed is missing."""
    out = tmp_path / "out"
    study = make_study()
    figures = {
        ("labels only", 0): (0.50, 0.48),
        ("labels only", 1): (0.52, 0.50),
        ("method A", 0): (0.55, 0.55),
        ("method A", 1): (0.61, 0.57),
        ("method B", 0): (0.47, 0.46),
    }
    for job in jobs(study, out):
        found = figures.get((job.method.label, job.seed))
        write_run(job.run_dir, result(*found, job.seed) if found else None, dataset)
    (out / "study.yaml").write_text(yaml.safe_dump(STUDY))
    return out


# The file


def test_a_study_file_is_checked(tmp_path: Path) -> None:
    def message(**changes: Any) -> str:
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(STUDY | changes))
        with pytest.raises(UserError) as caught:
            load_study(path)
        return str(caught.value)

    assert "'baseline' is 'nobody'; expected one of labels only, method A, method B" in message(
        baseline="nobody"
    )
    assert "did you mean 'seeds'?" in message(seed=[0])
    assert "'seeds' is [1, 1]; expected each seed once" in message(seeds=[1, 1])
    assert "need at least one entry" in message(runs=[])
    assert "'slots' is 0; expected 1 or more" in message(slots=0)
    twins = [STUDY["runs"][0], {**STUDY["runs"][1], "label": "Labels-only!"}]
    assert "too alike" in message(runs=twins)
    assert "'runs[0].label'" in message(runs=[{"project": "u2pl", "config": "x.yaml"}])
    with pytest.raises(UserError, match="no such study"):
        load_study(tmp_path / "absent.yaml")


def test_the_studies_of_the_repository_name_real_configurations() -> None:
    files = sorted((ROOT / "studies").glob("*.yaml"))
    assert files
    for path in files:
        study = load_study(path)
        out = output_folder(study)
        assert out.is_relative_to(ROOT / "runs")
        for job in jobs(study, out):
            cfg = resolve(job)
            assert cfg.run.seed == job.seed
            assert (
                job.folder / cfg.run.dir
            ).resolve() == job.run_dir  # named so that it holds in any checkout
            assert not Path(cfg.run.dir).is_absolute()


def test_overrides_of_the_study_come_before_those_of_the_method(tmp_path: Path) -> None:
    study = make_study(overrides=("optim.lr=0.5", "optim.epochs=3"))
    cfg = resolve(jobs(study, tmp_path)[2])
    assert (cfg.optim.lr, cfg.optim.epochs) == (0.02, 3)


def test_a_mistake_in_a_configuration_names_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run 'labels only': .*did you mean 'optim.momentum'"):
        run_study(make_study(overrides=("optim.momentun=1",)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    wrong = [{**STUDY["runs"][0], "project": "u2pI"}]
    with pytest.raises(UserError, match=r"run 'labels only': no project 'u2pI'; known: .*u2pl"):
        run_study(make_study(runs=wrong), tmp_path / "out")


# The figures


def only_table(out: Path) -> Table:
    (found,) = tables(make_study(), load_records(make_study(), out))
    return found


def numbers(value: Stat | None) -> tuple[float, float, int]:
    assert value is not None
    return value.mean, value.std, value.n


def test_means_deviations_and_gains_on_the_same_seeds(finished_study: Path) -> None:
    table = only_table(finished_study)
    base, a, b = table.rows
    assert [row.label for row in table.rows] == ["labels only", "method A", "method B"]
    assert numbers(base.best) == pytest.approx((0.51, 0.02 / np.sqrt(2), 2))
    assert base.gain_best is None
    assert numbers(a.gain_best) == pytest.approx((0.07, 0.04 / np.sqrt(2), 2))  # 0.05 and 0.09
    assert numbers(a.gain_last) == pytest.approx((0.07, 0.0, 2))
    assert (b.n, b.wanted) == (1, 2)
    # against the baseline of the same seed, not against the mean of both, which would be -0.04
    assert numbers(b.gain_best) == pytest.approx((-0.03, 0.0, 1))
    assert (a.seconds, a.peak_memory, a.images_per_s) == (110.0, 2 * 2**30, 30.0)


def test_how_figures_are_written() -> None:
    assert percent(stat([0.5, 0.52])) == "51.00 ± 1.41"
    assert percent(stat([0.5])) == "50.00"
    assert percent(None) == points(None) == "–"
    assert points(stat([-0.031])) == "-3.10"
    assert points(stat([0.05]), 3) == "+5.00 (n=1)"


def test_the_markdown_has_dashes_for_what_is_missing(finished_study: Path) -> None:
    study = make_study()
    text = summary_markdown(study, load_records(study, finished_study))
    assert "# Trees <and> cars (matched)" in text
    assert (
        "| method A | 2 | 58.00 ± 4.24 | +7.00 ± 2.83 | 56.00 ± 1.41 | +7.00 ± 0.00 | 1m50 | 30.0 | 2.00 GiB |"
        in text
    )
    assert "| method B | 1 of 2 | 47.00 | -3.00 | 46.00 | -2.00 |" in text
    assert "| method B seed 1 | – | – | – | – | – | – |" in text
    assert "published" not in text
    assert "(cd projects/u2pl && sh train.sh 1 0 configs/smoke.yaml optim.lr=0.02" in text


def test_the_csv_has_numbers(finished_study: Path) -> None:
    study = make_study()
    rows = list(csv.DictReader(io.StringIO(summary_csv(study, load_records(study, finished_study)))))
    assert [row["method"] for row in rows] == study.labels
    assert float(rows[1]["miou_best"]) == 58.0
    assert float(rows[1]["gain_best_std"]) == pytest.approx(2.828427)
    assert rows[0]["gain_best"] == rows[2]["gain_best_std"] == ""


def test_a_method_without_any_run_is_a_row_of_dashes(finished_study: Path) -> None:
    shutil.rmtree(finished_study / "method_b")
    row = only_table(finished_study).rows[2]
    assert (row.label, row.n, row.best, row.seconds) == ("method B", 0, None, None)


@pytest.mark.parametrize(
    "change",
    [
        {"split_hash": "b" * 64},
        {"list": "test"},
        {"protocol": {"kind": "sliding_window", "crop_size": [9, 9], "scales": [1.0], "flip": False}},
    ],
)
def test_what_was_measured_differently_stands_apart(finished_study: Path, change: dict[str, Any]) -> None:
    file = finished_study / "method_a" / "seed1" / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    study = make_study()
    records = load_records(study, finished_study)
    first, second = tables(study, records)
    assert [(row.label, row.n) for row in first.rows] == [
        ("labels only", 2),
        ("method A", 1),
        ("method B", 1),
    ]
    assert [(row.label, row.n, row.gain_best) for row in second.rows] == [("method A", 1, None)]
    text = summary_markdown(study, records)
    assert "must not be compared" in text
    assert text.count("| method | n |") == 2


def test_another_batch_size_of_the_evaluation_does_not_part_runs(finished_study: Path) -> None:
    file = finished_study / "method_a" / "seed1" / "result.json"
    content = json.loads(file.read_text())
    content["protocol"]["batch_size"] = 1
    file.write_text(json.dumps(content))
    assert only_table(finished_study).rows[1].n == 2


def test_runs_of_different_commits_are_pointed_out(finished_study: Path) -> None:
    file = finished_study / "method_a" / "seed1" / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"commit": "fedcba"}))
    study = make_study()
    assert "different commits" in summary_markdown(study, load_records(study, finished_study))


def test_damaged_and_absent_files_count_as_unfinished(tmp_path: Path) -> None:
    study = make_study()
    out = tmp_path / "out"
    first, second, *_ = jobs(study, out)
    write_run(first.run_dir, result(0.5, 0.5, 0))
    (first.run_dir / "result.json").write_text('{"miou_best": 0.5')
    write_run(second.run_dir, {"miou_best": 0.5})
    records = load_records(study, out)
    assert all(record.result is None for record in records)
    assert images_per_s(records[0]) == 30.0  # the broken last line of metrics.jsonl is passed over
    assert images_per_s(records[3]) is None
    assert not finished(first, "c0ffee")


def test_a_published_figure_has_its_column(finished_study: Path) -> None:
    file = finished_study / "method_a" / "seed0" / "config.yaml"
    file.write_text(yaml.safe_dump({"expect": {"miou": 79.0}}))
    study = make_study()
    text = summary_markdown(study, load_records(study, finished_study))
    assert "| published |" in text
    assert "| 79.00 |" in text


# Pictures


def test_iou_of_one_image_counts_the_classes_it_shows() -> None:
    truth = np.array([[0, 0, 1, 255]], np.uint8)
    assert pictures.image_iou(np.array([[0, 1, 1, 2]], np.uint8), truth, 3) == pytest.approx(
        (1 / 2 + 1 / 2) / 2
    )
    assert pictures.image_iou(truth, truth, 3) == 1.0
    assert np.isnan(pictures.image_iou(truth, np.full_like(truth, 255), 3))


def test_pictures_are_chosen_by_their_difference() -> None:
    gains = {0: 0.3, 1: -0.2, 2: 0.0, 3: 0.1, 4: -0.4, 5: float("nan"), 6: 0.0}
    chosen = pictures.choose(gains, 2)
    assert [i for i, group in chosen.items() if group == "gain"] == [0, 3]
    assert [i for i, group in chosen.items() if group == "loss"] == [4, 1]
    assert len([i for i, group in chosen.items() if group == "random"]) == 2
    assert pictures.choose(gains, 2) == chosen
    assert set(pictures.choose({0: 0.1, 1: 0.2}, 5).values()) == {
        "gain"
    }  # nothing is called a loss that is none


def test_the_gallery_shows_the_same_images_for_all(finished_study: Path) -> None:
    study = make_study()
    gallery = pictures.make_gallery(study, load_records(study, finished_study), finished_study, fake_predict)
    assert isinstance(gallery, pictures.Gallery)
    assert (gallery.seed, gallery.scored, gallery.total) == (0, 4, 4)
    groups = {picture.group: picture for picture in gallery.pictures}
    assert (groups["gain"].id, groups["loss"].id) == ("p0", "p1")
    assert set(groups["gain"].predictions) == {"labels only", "method A", "method B"}
    assert groups["gain"].iou["method A"] == 1.0
    assert groups["gain"].iou["labels only"] == pytest.approx((1 - 128 / 768) / 2)


def test_predictions_are_made_once_per_checkpoint(finished_study: Path) -> None:
    study = make_study()
    calls = []

    def counting(record: Record, images: Path, out: Path, threads: int) -> None:
        calls.append(record.job.name)
        assert len(list(images.glob("*.png"))) == 4
        fake_predict(record, images, out, threads)

    def make() -> None:
        assert pictures.make_gallery(study, load_records(study, finished_study), finished_study, counting)

    make()
    make()
    assert len(calls) == 3
    (finished_study / "method_a" / "seed0" / "best.pt").write_bytes(b"other weights")
    make()
    assert calls[3:] == ["method A seed 0"]


def test_a_failing_prediction_is_named_and_the_rest_is_shown(finished_study: Path) -> None:
    def failing(record: Record, images: Path, out: Path, threads: int) -> None:
        if record.label == "method B":
            raise UserError("best.pt: cut short")
        fake_predict(record, images, out, threads)

    study = make_study()
    records = load_records(study, finished_study)
    gallery = pictures.make_gallery(study, records, finished_study, failing)
    assert isinstance(gallery, pictures.Gallery)
    assert gallery.notes == ["method B seed 0 is not shown: best.pt: cut short."]
    assert "method B" not in gallery.pictures[0].predictions

    (finished_study / "method_a" / "seed0" / "best.pt").unlink()
    reason = pictures.make_gallery(study, records, finished_study, failing)
    assert isinstance(reason, str)
    assert "method A seed 0 is not shown: best.pt is missing" in reason


# The page


def page_of(out: Path) -> str:
    report(out, fake_predict, lambda line: None)
    return (out / "report.html").read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_complete_in_itself(finished_study: Path) -> None:
    text = page_of(finished_study)
    tree = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>"))  # also finds unescaped names
    assert not re.search(r"https?://|//[a-z]+\.", text)
    allowed = ("data:image/png;base64,", "data:image/jpeg;base64,", "#")
    for element in tree.iter():
        for name in ("src", "href", "srcset", "action", "data"):
            assert element.get(name, "#").startswith(allowed), (element.tag, element.get(name))
    assert not [
        e
        for e in tree.iter()
        if e.tag in ("link", "iframe", "object") or (e.get("src") and e.tag == "script")
    ]
    assert "@import" not in text
    assert "url(" not in text
    ids = [element.get("id") for element in tree.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    anchors = [e.get("href", "")[1:] for e in tree.iter("a")]
    assert set(anchors) <= set(ids)


def test_the_page_can_be_read_without_seeing_it(finished_study: Path) -> None:
    tree = ElementTree.fromstring(page_of(finished_study).removeprefix("<!DOCTYPE html>"))
    images = [image for image in tree.iter("img") if image.get("src")]
    assert images
    assert all(image.get("alt") for image in images)
    assert all(figure.find(".//figcaption") is not None for figure in tree.iter("figure"))
    for drawing in tree.iter("svg"):
        assert drawing.get("aria-hidden") == "true" or "ends at" in drawing.get("aria-label", "")
    assert [heading.text for heading in tree.iter("h1")] == ["Trees <and> cars"]
    clickable = [e for e in tree.iter() if e.get("onclick")]
    assert not clickable  # only real buttons and links, which the keyboard reaches


def test_the_page_says_what_was_found(finished_study: Path) -> None:
    text = page_of(finished_study)
    assert "method A reaches 58.0 % mIoU, 7.0 points above 'labels only' (mean of 2 seeds)." in _text(text)
    assert "method B reaches 47.0 % mIoU, 3.0 points below 'labels only' (one run each)." in _text(text)
    assert "Comparison matched" in text
    assert "tree &amp; bush" in text
    assert "loss_unsup" in text
    assert "c0ffee" in text
    assert "1234567890ab" in text
    assert "method A on image p0: mIoU 100.0 % (+58.3)" in text
    for name in ("summary.md", "summary.csv", "pictures.png"):
        assert (finished_study / name).is_file()


def _text(page: str) -> str:
    return " ".join("".join(ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>")).itertext()).split())


def test_a_study_without_a_finished_run_still_has_a_page(tmp_path: Path) -> None:
    study = make_study()
    (tmp_path / "out").mkdir()
    records = load_records(study, tmp_path / "out")
    page = render(study, records, "No pictures.", "name: x")
    ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))
    assert verdict(study, tables(study, records)) == ["There is no finished pair of runs to compare yet."]


def test_the_report_ends_with_both_figures_the_gain_and_the_page(finished_study: Path) -> None:
    lines: list[str] = []
    report(finished_study, fake_predict, lines.append)
    assert lines[-4].split() == [
        "labels",
        "only",
        "mIoU",
        "best",
        "51.00",
        "±",
        "1.41",
        "last",
        "49.00",
        "±",
        "1.41",
    ]
    assert "gain +7.00 ± 2.83 points" in lines[-3]
    assert lines[-1].split() == ["report", str(finished_study / "report.html")]


def test_report_of_a_folder_without_a_study(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no study.yaml; give the folder"):
        report(tmp_path)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.07), (0, 0), (-0.3, 2), (0, 12345), (3, 3)])
def test_axis_ticks_enclose_the_values(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 8
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])


def test_lines_stay_inside_the_drawing_and_are_thinned_out() -> None:
    many = [(float(i), float(np.sin(i))) for i in range(10_000)]
    thin = thin_out(many)
    assert len(thin) <= 240
    assert thin[-1] == many[-1]
    assert thin_out([(0.0, float("nan")), (1.0, 2.0)]) == [(1.0, 2.0)]
    tree = ElementTree.fromstring(line_chart([Line("a", 0, many), Line("b", 1, [(5.0, 1.0)])], "x"))
    places = [tuple(map(float, p.split(","))) for p in tree.find("polyline").get("points").split()]  # type: ignore[union-attr]
    assert all(46 <= x <= 350 and 10 <= y <= 180 for x, y in places)
    assert tree.find("circle") is not None  # a single measurement is a dot


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium to open the page with")
def test_a_browser_opens_the_page_without_complaint(finished_study: Path, tmp_path: Path) -> None:
    page_of(finished_study)
    driver = tmp_path / "driver.html"  # enlarges the first picture and goes one back, which is the last one
    driver.write_text("""<iframe id="page" src="out/report.html"></iframe><script>
        const frame = document.getElementById("page");
        frame.onload = () => {
            const page = frame.contentDocument, dialog = page.querySelector("dialog");
            page.querySelector(".shots button").click();
            const open = dialog.open;
            dialog.dispatchEvent(new frame.contentWindow.KeyboardEvent("keydown", {key: "ArrowLeft"}));
            const all = page.querySelectorAll(".shots img");
            const last = dialog.querySelector("img").src === all[all.length - 1].src;
            dialog.querySelector(".close").click();
            document.title = `opened ${open}, last ${last}, closed ${!dialog.open}`;
        };</script>""")
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--dump-dom",
    ]
    flags += ["--enable-logging=stderr", "--virtual-time-budget=3000", f"--user-data-dir={tmp_path / 'user'}"]
    command = ["chromium", *flags, driver.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "<title>opened true, last true, closed true</title>" in done.stdout
    assert "CONSOLE" not in done.stderr


# The runner, with a project of shell and standard library


CONFIG = """
    from dataclasses import dataclass
    from common.config import RunConfig

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Toy:
        steps: int = 3
        fail: bool = False
        wait: bool = False

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        run: RunConfig
        toy: Toy
"""
TRAIN = """
    import json, os, signal, sys, time
    from pathlib import Path
    from common.config import config_hash, load_config, save_config
    from projects.toy.config import Config

    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    path, *overrides = sys.argv[1:]
    cfg = load_config(Config, path, overrides)
    run_dir = Path(cfg.run.dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    save_config(cfg, run_dir / "config.yaml")
    state = run_dir / "last.pt"
    step = int(state.read_text()) if state.exists() else 0
    print(f"from step {step} with {os.environ['OMP_NUM_THREADS']} thread(s), process {os.getpid()}")
    while step < cfg.toy.steps:
        step += 1
        state.write_text(str(step))
        print(f"step {step}")
        if cfg.toy.fail:
            print("error: toy.fail=true: the disk is full; free space", file=sys.stderr)
            sys.exit(2)
        while cfg.toy.wait and not stop:
            time.sleep(0.02)
        if stop:
            sys.exit(0)
    result = {"miou_best": 0.5, "miou_last": 0.5, "best": {"iou": {}}, "last": {"iou": {}}, "protocol": {},
              "split_hash": "x", "config_hash": config_hash(cfg), "seed": cfg.run.seed}
    (run_dir / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project `toy` beside the real ones; returns the folder that takes the place of the repository."""
    root = tmp_path / "repo"
    folder = root / "projects" / "toy"
    folder.mkdir(parents=True)
    (folder / "config.py").write_text(textwrap.dedent(CONFIG))
    (folder / "toy_train.py").write_text(textwrap.dedent(TRAIN))
    (folder / "train.sh").write_text(
        'cd "$(dirname "$0")" && shift 2 && export PYTHONPATH="$PYTHONPATH:../.." && exec "$PYTHON" start.py "$@"\n'
    )
    (folder / "start.py").write_text(
        "import projects, runpy; projects.__path__.append('..'); runpy.run_path('toy_train.py', run_name='__main__')\n"
    )
    (folder / "plain.yaml").write_text("toy: {steps: 3}\nrun: {}\n")
    monkeypatch.setattr(studies.study, "ROOT", root)
    monkeypatch.setattr(projects, "__path__", [*projects.__path__, str(root / "projects")])
    for name in ("projects.toy", "projects.toy.config"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return root


def toy_study(**changes: Any) -> Study:
    def run(label: str, *overrides: str) -> dict[str, Any]:
        return {"label": label, "project": "toy", "config": "plain.yaml", "overrides": list(overrides)}

    tree = {
        "name": "toys",
        "baseline": "a",
        "runs": [run("a"), run("b", "toy.fail=true"), run("c", "toy.steps=4")],
    }
    return build(Study, tree | {"threads": 1} | changes)


def statuses(outcomes: list[Any]) -> dict[str, str]:
    return {outcome.job.method.label: outcome.status for outcome in outcomes}


@pytest.mark.parametrize("slots", [1, 3])
def test_a_failed_run_is_reported_and_the_others_go_on(toy: Path, slots: int) -> None:
    lines: list[str] = []
    outcomes = run_study(toy_study(slots=slots), toy / "out", write=lines.append)
    assert statuses(outcomes) == {"a": "finished", "b": "failed", "c": "finished"}
    assert outcomes[1].message == "toy.fail=true: the disk is full; free space"
    assert "c seed 0 | step 4" in lines
    assert "step 4" in (toy / "out" / "c" / "seed0" / "console.log").read_text()
    assert any("with 1 thread(s)" in line for line in lines)


def test_finished_runs_are_skipped_and_interrupted_ones_go_on(toy: Path) -> None:
    study, out = toy_study(), toy / "out"
    run_study(study, out, write=lambda line: None)
    (out / "c" / "seed0" / "result.json").unlink()  # as if it had been killed after its third step
    (out / "c" / "seed0" / "last.pt").write_text("3")
    lines: list[str] = []
    outcomes = run_study(study, out, write=lines.append)
    assert statuses(outcomes) == {"a": "finished before", "b": "failed", "c": "finished"}
    assert not [line for line in lines if line.startswith("a seed 0 |")]
    assert any("c seed 0 (continues)" in line for line in lines)
    assert any("from step 3" in line for line in lines)


def test_a_run_of_another_configuration_is_set_aside_not_lost(toy: Path) -> None:
    out = toy / "out"
    run_study(toy_study(), out, write=lambda line: None)
    lines: list[str] = []
    outcomes = run_study(toy_study(overrides=["toy.steps=5"]), out, write=lines.append)
    assert statuses(outcomes)["a"] == "finished"
    assert (out / "a" / "seed0.old1" / "result.json").is_file()
    assert any("the former run is now seed0.old1" in line for line in lines)
    assert any(line == "a seed 0 | step 5" for line in lines)
    assert statuses(outcomes)["c"] == "finished before"  # its own override comes later and is the same


def test_set_aside_leaves_a_live_run_alone(toy: Path) -> None:
    from common.runlog import RunLock

    (job,) = [job for job in jobs(toy_study(), toy / "out") if job.method.label == "a"]
    run_study(toy_study(), toy / "out", write=lambda line: None)
    lock = RunLock(job.run_dir)
    try:
        with pytest.raises(UserError, match="another live run"):
            set_aside(job, "another hash", lambda line: None)
    finally:
        lock.release()
    assert job.run_dir.is_dir()


def test_dry_run_and_exit_codes(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = toy / "toys.yaml"
    file.write_text(yaml.safe_dump(to_dict(toy_study())))
    out = toy / "out"
    assert main(["run", str(file), "--out", str(out), "--dry-run"]) == 0
    assert "(cd projects/toy && sh train.sh 1 0 plain.yaml toy.fail=true run.dir=" in capsys.readouterr().out
    assert not out.exists()
    assert main(["run", str(file), "--out", str(out), "--slots", "2"]) == 1
    shown = capsys.readouterr().out
    assert "study: 2 of 3 runs finished" in shown
    assert "b seed 0: failed: toy.fail=true: the disk is full; free space" in shown
    assert load_study(out / "study.yaml") == toy_study()
    with pytest.raises(UserError, match="--slots=0"):
        main(["run", str(file), "--slots", "0"])


def start_study(toy: Path, study: Study) -> subprocess.Popen[str]:
    """The study in a process of its own, with the toy project in place."""
    (toy / "toys.yaml").write_text(yaml.safe_dump(to_dict(study)))
    code = f"""
import sys, projects, studies.study
from pathlib import Path
studies.study.ROOT = Path({str(toy)!r})
projects.__path__.append({str(toy / "projects")!r})
from studies.__main__ import main
sys.exit(main(["run", {str(toy / "toys.yaml")!r}, "--out", {str(toy / "out")!r}]))
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)


def wait_for(stream: Any, pattern: str) -> re.Match[str]:
    for line in stream:
        if match := re.search(pattern, line):
            return match
    raise AssertionError(f"the study ended without {pattern!r}")


def gone(process: int, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        state = Path(f"/proc/{process}/stat")
        if state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_study_saves_its_runs_and_goes_on_later(toy: Path, kind: signal.Signals) -> None:
    waiting = toy_study(overrides=["toy.wait=true"])
    with start_study(toy, waiting) as process:
        wait_for(process.stdout, r"a seed 0 \| step 1")
        process.send_signal(kind)
        rest = process.stdout.read()  # type: ignore[union-attr]
    assert process.returncode == 1
    assert "a seed 0: stopped" in rest
    assert "c seed 0: stopped: not started" in rest
    assert (toy / "out" / "a" / "seed0" / "last.pt").read_text() == "1"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_a_killed_study_takes_its_run_along(toy: Path) -> None:
    with start_study(toy, toy_study(overrides=["toy.wait=true"])) as process:
        child = int(wait_for(process.stdout, r"process (\d+)").group(1))
        wait_for(process.stdout, r"a seed 0 \| step 1")
        process.kill()
    assert gone(child)
    assert (toy / "out" / "a" / "seed0" / "last.pt").read_text() == "1"


def test_the_configuration_hash_is_that_of_the_training_script(toy: Path) -> None:
    job = jobs(toy_study(), toy / "out")[2]
    expected = config_hash(resolve(job))
    cls: Callable[..., Any] = type(resolve(job))
    assert expected == config_hash(load_config(cls, job.folder / "plain.yaml", ["toy.steps=4", "run.seed=7"]))
