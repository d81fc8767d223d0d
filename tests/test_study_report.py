from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from scipy import stats

from common.errors import UserError
from studies import pictures
from studies import records as keeping
from studies.report import report
from studies.run import finished
from studies.study import jobs
from studies.summary import (
    classes_csv,
    columns,
    percent,
    points,
    runs_csv,
    summary_csv,
    summary_markdown,
    verdict,
)
from studies.table import (
    Record,
    Stat,
    Table,
    class_figures,
    images_per_s,
    load_records,
    mean_series,
    series,
    stat,
    tables,
    why_missing,
)
from studies.tiles import SIDES, all_tiles, data_uri, shrink
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
from tools import environment as code


@pytest.fixture
def finished_study(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    write_study(out, write_dataset(tmp_path / "park"))
    return out


def only_table(out: Path) -> Table:
    (found,) = tables(make_study(), load_records(make_study(), out))
    return found


def change(out: Path, run: str, **changes: Any) -> None:
    """Other entries in the result of one run."""
    file = out / run / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def numbers(value: Stat | None) -> tuple[float, float, int]:
    assert value is not None
    return value.mean, value.std, value.n


# Figures


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
    assert a.device_hours == pytest.approx(110 / 3600)


def test_the_interval_is_students_of_the_paired_differences() -> None:
    ours, theirs = [0.61, 0.60, 0.655], [0.55, 0.56, 0.57]
    gain = stat([a - b for a, b in zip(ours, theirs, strict=True)])
    assert gain is not None
    assert gain.interval is not None
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert gain.interval == pytest.approx((expected.low, expected.high))
    assert gain.certain == (expected.low > 0)
    one = stat([0.05])
    assert one is not None
    assert (one.interval, one.half_width, one.certain) == (None, None, False)
    wide = Stat(0.05, 0.04, 2)
    assert wide.half_width == pytest.approx(12.7062 * 0.04 / np.sqrt(2), rel=1e-5)  # one degree of freedom
    assert not wide.certain


def test_how_figures_are_written() -> None:
    assert percent(stat([0.5, 0.52])) == "51.00 ± 1.41"
    assert percent(stat([0.5])) == "50.00"
    assert percent(None) == points(None) == "–"
    assert points(stat([-0.031])) == "-3.10"
    assert points(stat([0.05]), 3) == "+5.00 (n=1)"
    assert points(stat([0.05, 0.06])) == "+5.50 [-0.85, +11.85]"


def test_several_processes_cost_device_hours(finished_study: Path) -> None:
    study = make_study()
    assert "device hours" not in columns(study, tables(study, load_records(study, finished_study)))
    for seed in (0, 1):
        file = finished_study / "method_a" / f"seed{seed}" / "env.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"world_size": 4}))
    found = tables(study, load_records(study, finished_study))
    assert found[0].rows[1].device_hours == pytest.approx(4 * 110 / 3600)
    assert "device hours" in columns(study, found)
    assert "different devices" in summary_markdown(study, load_records(study, finished_study))


def test_the_markdown_tells_why_something_is_missing(finished_study: Path) -> None:
    study = make_study()
    text = summary_markdown(study, load_records(study, finished_study))
    assert "# Trees &lt;and&gt; cars (matched)" in text
    row = next(line for line in text.splitlines() if line.startswith("| method A | 2 |"))
    assert row.startswith("| method A | 2 | 58.00 ± 4.24 | +7.00 [-18.41, +32.41] | 56.00 ± 1.41 | +7.00 [")
    assert "| 1m50 | 30.0 | 2.00 GiB |" in row
    assert "| method B | 1 of 2 | 47.00 | -3.00 | 46.00 | -2.00 |" in text
    missing = "not finished; it has written up to step 5"
    assert f"| seed 1: {missing} |" in text
    assert f"| method B seed 1 | – | – | – | – | – | – | – | {missing} |" in text
    assert "Student's t over the paired differences" in text
    assert "published" not in text
    assert "(cd projects/u2pl && sh train.sh 1 0 configs/smoke.yaml optim.lr=0.02" in text
    assert "| tree &amp; bush | 61.0 | 68.0 (+7.0) | 57.0 (-3.0) |" in text


def test_the_csv_files_have_unrounded_numbers(finished_study: Path) -> None:
    study = make_study()
    records = load_records(study, finished_study)

    def read(text: str) -> list[dict[str, str]]:
        return list(csv.DictReader(io.StringIO(text)))

    methods = read(summary_csv(study, records))
    assert [row["method"] for row in methods] == study.labels
    assert float(methods[1]["miou_best"]) == 58.0
    assert float(methods[1]["gain_best_std"]) == pytest.approx(2.828427)
    assert float(methods[1]["gain_best_low"]) == pytest.approx(7 - 25.412409, abs=1e-5)
    assert methods[0]["gain_best"] == methods[2]["gain_best_std"] == methods[2]["gain_best_low"] == ""
    assert (methods[2]["n"], methods[2]["wanted"], methods[0]["labeled"]) == ("1", "2", "4")
    assert "step 5" in methods[2]["missing"]

    runs = read(runs_csv(study, records))
    assert len(runs) == 6
    for row, record in zip(runs, records, strict=True):
        assert (row["method"], int(row["seed"])) == (record.label, record.job.seed)
        if record.result is None:
            assert row["miou_best"] == row["split_hash"] == ""
            assert row["state"].startswith("not finished")
        else:
            assert float(row["miou_best"]) == pytest.approx(100 * record.result["miou_best"])
            assert float(row["pixel_accuracy_last"]) == pytest.approx(
                100 * record.result["last"]["pixel_accuracy"]
            )
            assert row["split_hash"] == record.result["split_hash"]

    classes = read(classes_csv(study, records))
    assert len(classes) == 3 * 3
    bush = next(row for row in classes if (row["class"], row["method"]) == ("tree & bush", "method A"))
    assert (float(bush["iou"]), float(bush["gain"]), bush["gain_n"]) == (68.0, 7.0, "2")


def test_an_absent_class_has_no_figure(finished_study: Path) -> None:
    file = finished_study / "method_b" / "seed0" / "result.json"
    content = json.loads(file.read_text())
    content["best"]["iou"]["car"] = None
    file.write_text(json.dumps(content))
    study = make_study()
    records = load_records(study, finished_study)
    car = class_figures(study, tables(study, records)[0])[2]
    assert (car.name, car.iou["method B"], car.gain["method B"]) == ("car", None, None)
    assert car.iou["method A"] is not None
    assert "| car | 41.0 | 48.0 (+7.0) | – |" in summary_markdown(study, records)


# What is missing, what is kept apart


def test_a_method_without_any_run_is_a_row_of_dashes_and_reasons(finished_study: Path) -> None:
    shutil.rmtree(finished_study / "method_b")
    row = only_table(finished_study).rows[2]
    assert (row.label, row.n, row.best, row.gain_best, row.seconds) == ("method B", 0, None, None, None)
    assert row.missing == ("seed 0: not started", "seed 1: not started")
    study = make_study()
    text = summary_markdown(study, load_records(study, finished_study))
    assert (
        "| method B | 0 of 2 | – | – | – | – | – | – | – | seed 0: not started; seed 1: not started |" in text
    )
    assert " 0.00 |" not in text


def test_why_a_run_is_missing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert why_missing(run) == "not started"
    assert why_missing(run, (), {"status": "failed", "message": "no such GPU"}) == "failed: no such GPU"
    run.mkdir()
    assert why_missing(run) == "not finished"
    assert why_missing(run, [{"step": 3}, {"step": 7}], {"status": "stopped"}).endswith("up to step 7")
    (run / "console.log").write_text("step 1\nerror: data.root: no such folder\n")
    assert why_missing(run) == "failed: data.root: no such folder"
    (run / "result.json").write_text('{"miou_best": 0.5')
    assert why_missing(run) == "its result.json is damaged or incomplete"


TRUTH = {"classes": ["b", "a"], "labeled": "0", "label_map": "0", "list": "0"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"split_hash": "b" * 64}, "another split (hash bbbbbbbbbbbb instead of aaaaaaaaaaaa)"),
        ({"truth": TRUTH | {"classes": ["a", "b"]}}, "the class names changed"),
        (
            {"truth": TRUTH | {"label_map": "1", "list": "2"}},
            "the label map changed; the evaluation list changed",
        ),
        ({"list": "test"}, "measured on the 'test' list instead of 'val'"),
        (
            {"protocol": {"kind": "sliding_window", "crop_size": [9, 9], "scales": [1.0], "flip": False}},
            "another protocol (sliding window (crop 9x9) instead of whole image)",
        ),
        ({"commit": "fedcba"}, "another state of the code (commit fedcba instead of 1234567890ab)"),
    ],
)
def test_what_was_made_differently_stands_apart(
    finished_study: Path, changes: dict[str, Any], reason: str
) -> None:
    for run in finished_study.glob("*/seed*/result.json"):
        change(finished_study, str(run.parent.relative_to(finished_study)), truth=TRUTH)
    change(finished_study, "method_a/seed1", **changes)
    study = make_study()
    records = load_records(study, finished_study)
    first, second = tables(study, records)
    assert [(row.label, row.n) for row in first.rows] == [
        ("labels only", 2),
        ("method A", 1),
        ("method B", 1),
    ]
    assert first.rows[1].missing == ("seed 1: stands in a table of its own",)
    assert [(row.label, row.n, row.gain_best) for row in second.rows] == [("method A", 1, None)]
    assert (first.apart, second.apart) == ("", reason)
    text = summary_markdown(study, records)
    assert f"Kept apart: {reason}:" in text
    assert "must not be compared" in text
    assert text.count("| method | n |") == 2
    kept = [row["kept_apart"] for row in csv.DictReader(io.StringIO(summary_csv(study, records)))]
    assert kept == ["", "", "", reason]


def test_runs_share_a_table_as_long_as_no_file_that_both_can_reach_differs(finished_study: Path) -> None:
    shared = {"common/numerics/losses.py": "aa", "common/run/log.py": "bb"}
    for run in ("labels_only/seed0", "labels_only/seed1"):
        change(finished_study, run, commit="one", code=shared | {"projects/u2pl/train.py": "cc"})
    for run in ("method_a/seed0", "method_a/seed1"):
        change(finished_study, run, commit="two", code=shared | {"projects/brpg/train.py": "dd"})
    change(finished_study, "method_b/seed0", code={"common/numerics/losses.py": "ee"})
    first, second = tables(make_study(), load_records(make_study(), finished_study))
    assert [(row.label, row.n) for row in first.rows] == [("labels only", 2), ("method A", 2)]
    assert second.apart == "another state of the code (common/numerics/losses.py)"


def test_the_code_of_a_run_is_what_it_can_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "projects/a/train.py": "from common import loop\n",
        "projects/a/README.md": "text",
        "common/loop.py": "def f():\n    from common.losses import ce  # late\n",
        "common/losses.py": "# why\n\nce = 1\n",
        "common/other.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    config = type("Config", (), {"__module__": "projects.a.config"})()
    monkeypatch.setattr(code, "ROOT", tmp_path)

    def now() -> dict[str, str]:
        code._reached.cache_clear()
        return code.code_of(config)

    before = now()
    assert list(before) == ["common/loop.py", "common/losses.py", "projects/a/train.py"]
    (tmp_path / "projects/a/README.md").write_text("other text")
    (tmp_path / "common/losses.py").write_text("ce = 1  # another reason\n")
    assert now() == before
    (tmp_path / "common/losses.py").write_text("ce = -1\n")
    assert {name for name, digest in now().items() if digest != before[name]} == {"common/losses.py"}
    code._reached.cache_clear()


def test_another_batch_size_of_the_evaluation_does_not_part_runs(finished_study: Path) -> None:
    protocol = result(0.5, 0.5, 0)["protocol"] | {"batch_size": 1}
    change(finished_study, "method_a/seed1", protocol=protocol)
    assert only_table(finished_study).rows[1].n == 2


@pytest.mark.parametrize(
    ("kind", "together"), [("whole_image", 2), ("sliding_window", 2), ("center_crop", 1)]
)
def test_the_label_of_padding_parts_runs_only_where_there_is_padding(
    finished_study: Path, kind: str, together: int
) -> None:
    protocol = result(0.5, 0.5, 0)["protocol"] | {"kind": kind, "pad_label": 0}
    for run in ("labels_only/seed0", "labels_only/seed1", "method_a/seed0", "method_b/seed0"):
        change(finished_study, run, protocol=protocol)
    change(finished_study, "method_a/seed1", protocol=protocol | {"pad_label": 255})
    study = make_study()
    first = tables(study, load_records(study, finished_study))[0]
    assert first.rows[1].n == together


def test_the_table_of_a_split_is_the_one_with_the_baseline(finished_study: Path) -> None:
    """Though more runs stand elsewhere."""
    for method, seed in (("method_a", 0), ("method_a", 1), ("method_b", 0)):
        change(finished_study, f"{method}/seed{seed}", commit="fedcba")
    study = make_study()
    first, second = tables(study, load_records(study, finished_study))
    assert [row.label for row in first.rows] == ["labels only"]
    assert [(row.label, row.n, row.gain_best) for row in second.rows] == [
        ("method A", 2, None),
        ("method B", 1, None),
    ]
    assert second.rows[1].missing == ("seed 1: not finished; it has written up to step 5",)
    assert verdict([first, second]) == ["There is no finished pair of runs to compare yet."]


def test_every_split_has_its_table(tmp_path: Path) -> None:
    out = tmp_path / "out"
    study = write_wide_study(out, write_dataset(tmp_path / "park"))
    records = load_records(study, out)
    first, second = tables(study, records)
    assert [(table.split, table.labeled, table.apart) for table in (first, second)] == [
        ("random/4", 4, ""),
        ("random/12", 12, ""),
    ]
    assert "12 of 40 images labeled" in second.caption
    assert second.rows[2].missing == tuple(
        f"seed {i}: failed: the disk is full; free space" for i in range(3)
    )
    assert second.rows[2].best is None
    gain = second.rows[1].gain_best  # 0.05 + 0.01 * seed, by the baseline of the same split
    assert numbers(gain) == pytest.approx((0.06, 0.01, 3))
    assert verdict([first, second])[-1].startswith("On split random/12, method A reaches 57.0 % mIoU")


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
    assert [table.key for table in tables(study, records)] == [None]
    with pytest.raises(UserError, match="no such folder"):
        load_records(study, tmp_path / "absent")


@pytest.mark.parametrize(
    ("source", "mark"), [("paper, table 2", ""), ("the paper, from memory, unverified", " ?")]
)
def test_a_published_figure_has_its_column_and_its_doubt(
    finished_study: Path, source: str, mark: str
) -> None:
    file = finished_study / "method_a" / "seed0" / "config.yaml"
    file.write_text(yaml.safe_dump({"expect": {"miou": 79.0, "source": source}}))
    study = make_study()
    text = summary_markdown(study, load_records(study, finished_study))
    assert "| published |" in text
    assert f"| 79.00{mark} |" in text
    assert f"method A: {source}" in text
    assert ("not verified" in text) == bool(mark)


def test_a_verdict_names_chance(finished_study: Path) -> None:
    assert verdict([only_table(finished_study)]) == [
        "method A reaches 58.0 % mIoU, 7.0 points above 'labels only' (mean of 2 seeds; the interval includes zero).",
        "method B reaches 47.0 % mIoU, 3.0 points below 'labels only' (one run each, so it may be chance).",
    ]


def test_a_method_may_have_a_baseline_of_its_own(finished_study: Path) -> None:
    """Where networks differ, each is compared with what it learns from labels alone."""
    runs = [STUDY["runs"][0], STUDY["runs"][1], {**STUDY["runs"][2], "baseline": "method A"}]
    study = make_study(runs=runs)
    records = load_records(study, finished_study)
    found = tables(study, records)
    base, a, b = found[0].rows
    assert [(row.label, row.baseline) for row in (base, a, b)] == [
        ("labels only", ""),
        ("method A", ""),
        ("method B", "method A"),
    ]
    assert a.gain_best is None
    assert numbers(b.gain_best) == pytest.approx((0.47 - 0.55, 0.0, 1))
    assert [sorted(entry.gain) for entry in class_figures(study, found[0])] == [["method B"]] * 3
    assert verdict(found) == [
        "method B reaches 47.0 % mIoU, 8.0 points below 'method A' (one run each, so it may be chance)."
    ]
    text = summary_markdown(study, records)
    assert "Gains are points over the run that the column 'baseline' names, on the same split" in text
    header, _, *lines = [line for line in text.splitlines() if line.startswith("|")][:5]
    column = header.split("|").index(" baseline ")
    assert [line.split("|")[column].strip() for line in lines] == ["–", "–", "method A"]
    named = [row["baseline"] for row in csv.DictReader(io.StringIO(summary_csv(study, records)))]
    assert named == ["", "", "method A"]


def test_one_baseline_needs_no_column(finished_study: Path) -> None:
    study = make_study()
    assert "baseline" not in columns(study, tables(study, load_records(study, finished_study)))


def test_hostile_labels_stay_text_in_markdown(tmp_path: Path) -> None:
    label = "a|b <script>alert(1)</script>\n# c"
    runs = [{"label": label, "project": "u2pl", "config": "configs/smoke.yaml", "overrides": ["x.y=```"]}]
    study = make_study(runs=runs, baseline=label, name="x <b>")
    (tmp_path / "out").mkdir()
    text = summary_markdown(study, load_records(study, tmp_path / "out"))
    assert "<script>" not in text
    assert "<b>" not in text
    assert "\n# c" not in text
    assert "a\\|b &lt;script&gt;alert(1)&lt;/script&gt; # c" in text
    assert "\n````sh\n" in text  # a fence that the command's own backticks do not end


# Curves


def test_series_and_their_mean() -> None:
    lines = [
        {"step": step, "miou": value} for step, value in ((1, 0.5), (2, None), (3, float("nan")), (4, 1))
    ]
    record = Record(jobs(make_study(), Path("x"))[0], None, lines, {}, {})
    assert series(record, "miou") == [(1.0, 0.5), (4.0, 1.0)]
    assert mean_series([[(1, 0.0), (2, 1.0)], [(2, 3.0), (3, 5.0)]]) == [(2, 2.0)]
    assert mean_series([]) == []


# Pictures


def test_iou_of_one_image_counts_the_classes_it_shows() -> None:
    truth = np.array([[0, 0, 1, 255]], np.uint8)
    found = pictures.image_iou(np.array([[0, 1, 1, 2]], np.uint8), truth, 3)
    assert found == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert pictures.image_iou(truth, truth, 3) == 1.0
    assert np.isnan(pictures.image_iou(truth, np.full_like(truth, 255), 3))


def test_pictures_are_chosen_by_their_difference() -> None:
    gains = {0: 0.3, 1: -0.2, 2: 0.0, 3: 0.1, 4: -0.4, 5: float("nan"), 6: 0.0}
    chosen = pictures.choose(gains, 2)
    assert [i for i, group in chosen.items() if group == "gain"] == [0, 3]
    assert [i for i, group in chosen.items() if group == "loss"] == [4, 1]
    assert len([i for i, group in chosen.items() if group == "random"]) == 2
    assert pictures.choose(gains, 2) == chosen
    # nothing is called a loss that is none
    assert set(pictures.choose({0: 0.1, 1: 0.2}, 5).values()) == {"gain"}


def gallery_of(out: Path, predict: pictures.Predict = fake_predict) -> pictures.Gallery:
    study = make_study()
    gallery = pictures.make_gallery(study, load_records(study, out), out, predict)
    assert isinstance(gallery, pictures.Gallery)
    return gallery


def test_the_gallery_shows_the_same_images_for_all(finished_study: Path) -> None:
    gallery = gallery_of(finished_study)
    assert (set(gallery.seeds.values()), gallery.scored, gallery.total) == ({0}, 4, 4)
    assert gallery.judged == ("method A", "method B")
    groups = {picture.group: picture for picture in gallery.pictures}
    assert (groups["gain"].id, groups["loss"].id) == ("p0", "p1")
    assert set(groups["gain"].predictions) == {"labels only", "method A", "method B"}
    assert groups["gain"].iou["method A"] == 1.0
    base = groups["gain"].iou["labels only"]
    assert base == pytest.approx((1 - 128 / 768) / 2)
    assert groups["gain"].gain == pytest.approx((1.0 + base) / 2 - base)  # method B is as bad as the baseline


def test_the_error_map_marks_wrong_pixels_and_those_not_counted(finished_study: Path) -> None:
    gallery = gallery_of(finished_study)
    picture = next(p for p in gallery.pictures if p.id == "p1")
    wrong = picture.errors("method A")
    assert (picture.errors("labels only") == 0).all()
    assert (wrong == (picture.truth == 2)).all()
    ignored = pictures.Picture(
        "x", "gain", picture.photo, np.full((24, 32), 255, np.uint8), picture.predictions, {}, 0
    )
    assert (ignored.errors("method A") == 2).all()


def test_predictions_are_made_once_per_run(finished_study: Path) -> None:
    calls = []

    def counting(record: Record, images: Path, out: Path, threads: int) -> None:
        calls.append(record.job.name)
        assert len(list(images.glob("*.png"))) == 4
        fake_predict(record, images, out, threads)

    gallery_of(finished_study, counting)
    gallery_of(finished_study, counting)
    assert len(calls) == 3
    change(finished_study, "method_a/seed0", seconds=77.0)  # trained again
    gallery_of(finished_study, counting)
    assert calls[3:] == ["method A seed 0"]


def test_records_stand_for_the_runs_on_another_machine(
    finished_study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "ROOT", tmp_path)
    study = make_study(records="kept")
    (finished_study / "study.yaml").write_text(yaml.safe_dump(STUDY | {"records": "kept"}))

    def with_photos(record: Record, images: Path, folder: Path, threads: int) -> None:
        fake_predict(record, images, folder, threads)
        (folder / "000000_overlay.jpg").write_bytes(b"a photo")

    report(finished_study, with_photos, lambda line: None)
    kept = tmp_path / "kept"
    assert [name for name in ("*.pt", "*.jpg") if list(kept.rglob(name))] == []
    assert "deviation from the paper" in (kept / "method_a/seed0/train.log").read_text()
    page = (finished_study / "summary.csv").read_text()
    gallery = gallery_of(finished_study)

    shutil.rmtree(finished_study)
    places = {job.name: keeping.recorded(study, finished_study, job) for job in jobs(study, finished_study)}
    assert all(place.is_relative_to(kept) for place in places.values())
    assert [name for name, place in places.items() if not (place / "result.json").is_file()] == [
        "method B seed 1"
    ]
    for job in jobs(study, finished_study):
        keeping.bring_back(study, finished_study, job)
    assert not (finished_study / "method_b/seed1").exists()
    back = summary_csv(study, load_records(study, finished_study))
    assert back == page.replace("not finished; it has written up to step 5", "not started")
    again = pictures.make_gallery(study, load_records(study, finished_study), finished_study, no_weights)
    assert isinstance(again, pictures.Gallery)
    assert again.notes == []
    assert [picture.iou for picture in again.pictures] == [picture.iou for picture in gallery.pictures]


def test_no_pictures_where_none_are_wanted(finished_study: Path) -> None:
    study = make_study(pictures=0)
    said = pictures.make_gallery(study, load_records(study, finished_study), finished_study, no_weights)
    assert said == "This report was made without pictures (pictures: 0)."


def no_weights(record: Record, images: Path, out: Path, threads: int) -> None:
    raise AssertionError(f"{record.job.name} has no weights to predict with")


def test_splits_do_not_share_predictions(tmp_path: Path) -> None:
    out = tmp_path / "out"
    study = write_wide_study(out, write_dataset(tmp_path / "park"))
    shown = []

    def noting(record: Record, images: Path, folder: Path, threads: int) -> None:
        shown.append((record.job.split, record.job.seed, folder.name))
        fake_predict(record, images, folder, threads)

    gallery = pictures.make_gallery(study, load_records(study, out), out, noting)
    assert isinstance(gallery, pictures.Gallery)
    assert [place[:2] for place in shown] == [("random/4", 0)] * 3  # all methods of one split, one seed
    assert shown[1][2] == "random_4_method_a_seed0"


def test_a_failing_prediction_is_named_and_the_rest_is_shown(finished_study: Path) -> None:
    def failing(record: Record, images: Path, out: Path, threads: int) -> None:
        if record.label == "method B":
            raise UserError("best.pt: cut short")
        fake_predict(record, images, out, threads)

    gallery = gallery_of(finished_study, failing)
    assert gallery.notes == ["method B seed 0 is not shown: best.pt: cut short."]
    assert "method B" not in gallery.pictures[0].predictions
    assert gallery.judged == ("method A",)

    (finished_study / "method_a" / "seed0" / "best.pt").unlink()
    shutil.rmtree(finished_study / "predictions")
    study = make_study()
    reason = pictures.make_gallery(study, load_records(study, finished_study), finished_study, failing)
    assert isinstance(reason, str)
    assert "method A seed 0 is not shown: best.pt is missing" in reason


def decoded(uri: str) -> np.ndarray[Any, Any]:
    import base64

    with Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))) as image:
        return np.asarray(image)


def test_embedded_masks_and_error_maps_are_exact(finished_study: Path) -> None:
    gallery = gallery_of(finished_study)
    for picture, tiles in zip(gallery.pictures, all_tiles(gallery), strict=True):
        assert (tiles.width, tiles.height) == (32, 24)
        truth = decoded(tiles.truth)
        counted = picture.truth != 255
        assert (truth[counted] == np.asarray(gallery.palette)[picture.truth[counted]]).all()
        for label, uri in tiles.errors.items():
            shown = decoded(uri)[..., 3] > 0
            assert (shown == (picture.errors(label) > 0)).all()
        assert (decoded(tiles.photo) == picture.photo).all()  # small enough to be embedded without loss


def test_pictures_shrink_until_they_fit_the_budget() -> None:
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 255, (300, 600, 3), dtype=np.uint8)
    ids = rng.integers(0, 3, (300, 600), dtype=np.uint8)
    picture = pictures.Picture("x", "gain", photo, ids, {"a": ids, "b": ids}, {"a": 1.0, "b": 1.0}, 0.0)
    palette = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0]], np.uint8)
    gallery = pictures.Gallery(
        [picture], ("x", "y", "z"), palette, {"a": 0, "b": 0}, ("b",), "a", "s", 1, 1, []
    )
    (large,) = all_tiles(gallery, budget=10**9)
    (fitting,) = all_tiles(gallery, budget=200_000)
    (least,) = all_tiles(gallery, budget=1)
    assert (large.width, large.height) == (512, 256)
    assert fitting.size <= 200_000 < large.size
    assert least.width == SIDES[-1] < fitting.width < large.width
    small = shrink(ids, 100, smooth=False)
    assert small.shape == (50, 100)
    assert set(np.unique(small)) <= {0, 1, 2}  # ids are picked, never averaged
    assert data_uri(photo, lossless=False).startswith("data:image/webp;base64,")


# All of it


def test_the_report_ends_with_both_figures_the_gain_and_the_page(finished_study: Path) -> None:
    lines: list[str] = []
    report(finished_study, fake_predict, lines.append)
    first = next(i for i, line in enumerate(lines) if line.startswith("  labels only"))
    words = " ".join(lines[first].split())
    assert words == "labels only mIoU best 51.00 ± 1.41 last 49.00 ± 1.41"
    assert "gain +7.00 [-18.41, +32.41] points" in lines[first + 1]
    assert lines[first + 3].strip() == "seed 1: not finished; it has written up to step 5"
    assert lines[-1].split() == ["report", str(finished_study / "report.html")]
    for name in ("summary.md", "summary.csv", "runs.csv", "classes.csv", "report.html", "pictures.png"):
        assert (finished_study / name).stat().st_size


def test_report_of_a_folder_without_a_study(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no study.yaml; give the folder"):
        report(tmp_path)


def test_a_report_that_cannot_be_written_says_so(finished_study: Path) -> None:
    (finished_study / "summary.csv").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        report(finished_study, fake_predict, lambda line: None)
