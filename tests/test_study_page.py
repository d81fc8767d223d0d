from __future__ import annotations

import html
import itertools
import json
import os
import re
import statistics
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from studies.charts import (
    LETTER,
    Dot,
    DotRow,
    Line,
    dot_chart,
    fraction_chart,
    line_chart,
    nice_ticks,
    thin_out,
)
from studies.page import render
from studies.pictures import Gallery, Picture
from studies.report import report
from studies.study import jobs
from studies.style import DARK, DARK_SERIES, LIGHT, LIGHT_SERIES
from studies.table import load_records
from tests import browser
from tests.study_runs import (
    PALETTE,
    fake_predict,
    make_study,
    result,
    write_dataset,
    write_run,
    write_study,
    write_wide_study,
)

MOST_BYTES = 2_000_000  # of a page with three photos per group
BROWSER = browser.find()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Folder of a reported study with one split."""
    out = tmp_path / "out"
    write_study(out, write_dataset(tmp_path / "park"))
    report(out, fake_predict, lambda line: None)
    return out


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a reported study with two splits and three seeds, in which one method has failed."""
    folder = tmp_path_factory.mktemp("wide")
    write_wide_study(folder / "out", write_dataset(folder / "park"))
    report(folder / "out", fake_predict, lambda line: None)
    return folder / "out"


def text_of(out: Path) -> str:
    return (out / "report.html").read_text(encoding="utf-8")


def tree_of(page: str) -> ElementTree.Element:
    """The page as XML, which is stricter than HTML: it also finds what was not escaped or closed."""
    return ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))


def words_of(page: str) -> str:
    return " ".join("".join(tree_of(page).itertext()).split())


# Without a browser


@pytest.mark.parametrize("name", ["small", "wide"])
def test_the_page_is_well_formed_and_complete_in_itself(name: str, request: pytest.FixtureRequest) -> None:
    text = text_of(request.getfixturevalue(name))
    assert text.startswith("<!DOCTYPE html>")
    assert len(text.encode()) < MOST_BYTES
    tree = tree_of(text)
    assert not re.search(
        r"https?:|\b(?:src|href)=[\"']//|@import|url\(|fetch\(|XMLHttpRequest|import\(", text
    )
    for element in tree.iter():
        assert element.tag not in ("iframe", "object", "embed", "base", "audio", "video"), element.tag
        for key in ("src", "href", "srcset", "action", "data", "poster", "background"):
            value = element.get(key, "#")
            assert value.startswith(("data:", "#")), (element.tag, value[:80])
        assert not [key for key in element.keys() if key.startswith("on")]  # noqa: SIM118
    ids = [element.get("id") for element in tree.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert {e.get("href", "")[1:] for e in tree.iter("a")} <= set(ids)
    assert {e.get("aria-controls") for e in tree.iter() if e.get("aria-controls")} <= set(ids)
    assert text.count("<script") == text.count("</script>") == 1


def test_the_page_can_be_read_without_seeing_it(wide: Path) -> None:
    tree = tree_of(text_of(wide))
    images = [image for image in tree.iter("img") if image.get("src")]
    assert images
    assert all(image.get("alt") for image in images)
    assert all(figure.find(".//figcaption") is not None for figure in tree.iter("figure"))
    for drawing in tree.iter("svg"):
        label = drawing.get("aria-label", "")
        assert drawing.get("aria-hidden") == "true" or (drawing.get("role") == "img" and "method A" in label)
    assert [heading.text for heading in tree.iter("h1")] == ["Trees <and> cars"]
    for table in tree.iter("table"):
        assert table.find("caption") is not None
        assert all(head.get("scope") in ("col", "row") for head in table.iter("th"))
    for button in tree.iter("button"):
        assert "".join(button.itertext()).strip()
    assert all(field.get("aria-label") for field in tree.iter("input"))


def test_the_page_says_what_was_found(small: Path) -> None:
    text = text_of(small)
    words = words_of(text)
    assert "method A reaches 58.0 % mIoU, 7.0 points above 'labels only' (mean of 2 seeds" in words
    assert "Comparison matched" in words
    assert "5 of 6 runs finished" in words
    assert "tree & bush" in words
    assert "loss_unsup" in words
    assert "c0ffee" in words
    assert "1234567890ab" in words
    assert "method A on image p0: mIoU 100.0 % (+58.3)" in html.unescape(text)
    assert (
        "Chosen by rule, not by hand: the largest gain and the largest loss of the mean of 'method A', 'method B'"
        in words
    )
    assert "BatchNorm sees 4 images at once" in words  # what a run has said in its log
    assert "changed: optim.lr=0.02" in words
    assert "seed 1: not finished; it has written up to step 5" in words
    assert "No run of this study has logged its pseudo-labels." in words


def test_the_numbers_are_those_of_the_results(small: Path) -> None:
    study = make_study()
    (table,) = [
        box.find(".//table") for box in tree_of(text_of(small)).iter("div") if box.get("id") == "summary-1"
    ]
    assert table is not None
    rows = table.findall(".//tbody/tr")
    assert [row[0].get("data-value") for row in rows] == study.labels
    for row, label in zip(rows, study.labels, strict=True):
        cells = {cell.get("data-name"): cell for cell in row}
        results = [
            json.loads((job.run_dir / "result.json").read_text())
            for job in jobs(study, small)
            if job.method.label == label and (job.run_dir / "result.json").is_file()
        ]
        for name, key in (("mIoU best", "miou_best"), ("mIoU last", "miou_last")):
            values = [entry[key] for entry in results]
            assert float(cells[name].get("data-value", "")) == statistics.fmean(values)
            shown = "".join(cells[name].itertext())
            assert shown.startswith(f"{100 * statistics.fmean(values):.2f}")
            assert ("±" in shown) == (len(values) > 1)
        assert cells["n"].get("data-value") == f"{float(len(results))}"
        assert float(cells["peak memory"].get("data-value", "")) == max(
            r["peak_memory_bytes"] for r in results
        )
    (heat,) = [b.find(".//table") for b in tree_of(text_of(small)).iter("div") if b.get("id") == "classes-1"]
    assert heat is not None
    bush = next(row for row in heat.findall(".//tbody/tr") if row[0].get("data-value") == "tree & bush")
    assert [float(cell.get("data-iou", "")) for cell in bush[1:]] == pytest.approx([0.61, 0.68, 0.57])
    assert bush[1].get("data-gain") == ""
    assert float(bush[2].get("data-gain", "")) == pytest.approx(0.07)
    assert "".join(bush[2].itertext()).split() == ["68.0", "+7.0"]


def test_gains_are_coloured_only_where_their_interval_excludes_zero(wide: Path, small: Path) -> None:
    def looks(out: Path) -> list[str | None]:
        cells = [c for c in tree_of(text_of(out)).iter("td") if c.get("data-name") == "gain [95 %]"]
        return [cell[0].get("class") for cell in cells]

    assert looks(small) == [None, None, None]  # +7.00 of two seeds, -3.00 of one
    assert looks(wide) == [None, "up", "up", None, "up", None]


def test_a_failed_method_is_a_row_of_dashes_with_its_reason(wide: Path) -> None:
    (table,) = [
        box.find(".//table") for box in tree_of(text_of(wide)).iter("div") if box.get("id") == "summary-2"
    ]
    assert table is not None
    row = table.findall(".//tbody/tr")[2]
    assert "seed 0: failed: the disk is full; free space" in "".join(row[0].itertext())
    shown = ["".join(cell.itertext()).strip() for cell in row[1:]]
    assert shown[0] == "0 of 3"
    assert set(shown[1:]) == {"–"}


def test_several_splits_have_a_chart_over_labeled_images(wide: Path, small: Path) -> None:
    text = text_of(wide)
    assert "Accuracy over labeled fraction" in text
    assert "4 (10 %)" in words_of(text)
    assert "12 (30 %)" in words_of(text)
    assert "Accuracy over labeled fraction" not in text_of(small)
    (chart,) = [
        d for d in tree_of(text).iter("svg") if d.get("aria-label", "").startswith("mIoU over labeled")
    ]
    bars = [line for line in chart.iter("line") if "whisker" in line.get("class", "")]
    assert len(bars) == 3 * (
        2 + 2 + 1
    )  # a bar with two caps for each point; method B has failed on the second split
    assert "labels only: 41.0 % at 4, 51.0 % at 12" in chart.get("aria-label", "")


def test_pseudo_labels_are_drawn_where_they_were_logged(wide: Path) -> None:
    text = text_of(wide)
    assert "Confident pseudo-labels" in text
    assert "Accuracy of the confident ones" in text
    assert "Nothing logged by: labels only, method B." in words_of(text)
    drawn = [d for d in tree_of(text).iter("svg") if d.get("aria-label", "").startswith("Confident")]
    assert len(drawn) == 2  # one for each split
    for drawing in drawn:
        assert "method A ends at 60 %" in drawing.get("aria-label", "")
        groups = [group.get("data-m") for group in drawing.iter("g")]
        assert groups == ["1"] * 4  # three seeds and their mean


def test_everything_to_reproduce_is_there(wide: Path) -> None:
    words = words_of(text_of(wide))
    assert "data.split=random/12" in words
    assert (
        "Where the methods do not agree although the comparison is matched: steps: labels only: 20; method A: 24"
        in words
    )
    assert "What all methods share" in words
    assert "Environment of all runs" in words
    assert "Configuration of labels only on random/4 seeds 0, 1, 2" in words
    assert "a" * 12 in words
    assert "b" * 12 in words


HOSTILE = '"><script>document.title="broken"</script><img src=x onerror=alert(1)>\'&amp;]]>{{ 7 * 7 }}'


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A reported study whose labels, classes, image names, messages and settings are all meant to break the page."""
    classes = ("ground", f"class {HOSTILE}", "</title></style></script><h1>car")
    dataset = write_dataset(tmp_path / "park", classes, ("p<0>", "p&1", "p\"2'", "p3"))
    tree: dict[str, Any] = {
        "name": f"name {HOSTILE}", "baseline": f"base {HOSTILE}", "seeds": [0, 1], "pictures": 2,
        "runs": [
            {"label": f"base {HOSTILE}", "project": "u2pl", "config": "configs/smoke_sup.yaml"},
            {"label": f"other {HOSTILE}", "project": "u2pl", "config": f"configs/{HOSTILE}.yaml"},
        ],
    }  # fmt: skip
    study = make_study(**tree)
    out = tmp_path / "out"
    outcomes = {}
    for job in jobs(study, out):
        if job.seed == 1 and job.method.label != study.baseline:
            outcomes[job.name] = {"status": "failed", "message": HOSTILE}
            continue
        content = result(
            0.5, 0.4, job.seed, classes, split=HOSTILE, list=f"val{HOSTILE}", commit="</script><b>"
        )
        content["protocol"]["kind"] = HOSTILE
        write_run(job.run_dir, content | {"list": "val"}, dataset, [{"step": 9, f"loss_{HOSTILE}": 1.0}])
        (job.run_dir / "train.log").write_text(f"deviation from the paper: {HOSTILE}\n")
        facts = {"expect": {"miou": 70.0, "source": HOSTILE}, "data": {"dataset": str(dataset)}}
        (job.run_dir / "config.yaml").write_text(yaml.safe_dump(facts | {"x": HOSTILE}))
        (job.run_dir / "env.json").write_text(json.dumps({"device": HOSTILE}))
    (out / "outcomes.json").write_text(json.dumps(outcomes))
    (out / "study.yaml").write_text(yaml.safe_dump(tree))
    plan = {
        "differences": [{"split": HOSTILE, "what": HOSTILE, "values": {HOSTILE: HOSTILE}}],
        "shared": {HOSTILE: 1},
    }
    (out / "study.json").write_text(json.dumps(plan))
    report(
        out,
        lambda record, images, folder, threads: fake_predict(record, images, folder, threads),
        lambda line: None,
    )
    return out


def test_hostile_names_stay_text(hostile: Path) -> None:
    text = text_of(hostile)
    tree = tree_of(text)
    scripts = list(tree.iter("script"))
    assert len(scripts) == 1
    assert "broken" not in (scripts[0].text or "")
    assert [len(tree.findall(f".//{tag}")) for tag in ("h1", "style", "head/title")] == [1, 1, 1]
    assert not [image for image in tree.iter("img") if not image.get("src", "").startswith("data:")]
    assert not [key for element in tree.iter() for key in element.keys() if key.startswith("on")]  # noqa: SIM118
    assert "<script>document" not in text
    words = "".join(tree.itertext())
    for place in ("name ", "base ", "other ", "class ", "loss_", "seed 1: failed: "):
        assert place + HOSTILE in words, (
            place
        )  # as it was written: nothing is run, by a browser or by the template


def test_a_study_without_a_finished_run_still_has_a_page(tmp_path: Path) -> None:
    study = make_study()
    (tmp_path / "out").mkdir()
    page = render(study, load_records(study, tmp_path / "out"), "No pictures.", "name: x")
    words = words_of(page)
    assert "There is no finished pair of runs to compare yet." in words
    assert "No pictures." in words
    assert "0 of 6 runs finished" in words


def test_a_large_study_stays_small_enough(tmp_path: Path) -> None:
    """Eight methods, three seeds, three photos per group of a camera's size, ten thousand logged steps."""
    labels = [f"method {i}" for i in range(8)]
    runs = [{"label": label, "project": "u2pl", "config": "configs/smoke.yaml"} for label in labels]
    study = make_study(runs=runs, baseline=labels[0], seeds=[0, 1, 2], pictures=3)
    out = tmp_path / "out"
    classes = [f"class {k}" for k in range(3)]
    lines = [
        {"step": 10 * i, "loss": 1 / i, "loss_sup": 1 / i, "miou": 0.5 - 1 / (i + 2)} for i in range(1, 1001)
    ]
    for job in jobs(study, out):
        write_run(job.run_dir, result(0.5, 0.5, job.seed, classes), None, lines)
    rng = np.random.default_rng(0)
    shown = []
    for i in range(9):
        coarse = rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)
        photo = np.repeat(np.repeat(coarse, 20, 0), 20, 1)
        photo = (photo + rng.integers(0, 20, photo.shape)).clip(0, 255).astype(np.uint8)
        masks = {
            label: np.repeat(np.repeat(rng.integers(0, 3, (48, 64), dtype=np.uint8), 10, 0), 10, 1)
            for label in labels
        }
        group = ("gain", "loss", "random")[i // 3]
        shown.append(Picture(str(i), group, photo, masks[labels[0]], masks, dict.fromkeys(labels, 0.5), 0.0))
    palette = np.array(PALETTE, np.uint8)
    gallery = Gallery(
        shown, tuple(classes), palette, dict.fromkeys(labels, 0), tuple(labels[1:]), labels[0], "s", 9, 9, []
    )
    page = render(study, load_records(study, out), gallery, "name: x")
    assert len(page.encode()) < MOST_BYTES


# Charts


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
    assert len(thin) <= 140
    assert thin[-1] == many[-1]
    assert thin_out([(0.0, float("nan")), (1.0, 2.0)]) == [(1.0, 2.0)]
    tree = ElementTree.fromstring(line_chart([Line("a", 0, many), Line("b", 1, [(5.0, 1.0)])], "x"))
    line = tree.find(".//polyline")
    assert line is not None
    places = [tuple(map(float, point.split(","))) for point in line.get("points", "").split()]
    assert all(46 <= x <= 350 and 10 <= y <= 186 for x, y in places)
    assert tree.find(".//rect") is not None  # a single measurement is a mark


def test_error_bars_reach_as_far_as_they_say() -> None:
    lines = [Line("a", 0, [(4.0, 50.0), (16.0, 60.0)], spread=[5.0, float("nan")], markers=True)]
    tree = ElementTree.fromstring(fraction_chart(lines, [(4.0, "4"), (16.0, "16")], "mIoU"))
    grid = {float(e.get("y1", "")) for e in tree.iter("line") if e.get("class") == "grid"}
    labels = [e.text for e in tree.iter("text")]
    assert "50 %" in labels
    bars = [e for e in tree.iter("line") if "whisker" in e.get("class", "") and e.get("x1") == e.get("x2")]
    assert len(bars) == 1
    low, high = float(bars[0].get("y1", "")), float(bars[0].get("y2", ""))
    scale = (max(grid) - min(grid)) / (60 - 45)  # the ticks run from 45 to 60
    assert low - high == pytest.approx(10 * scale, abs=0.3)


def test_dot_charts_of_gains_show_zero() -> None:
    rows = [DotRow("a <b>", [Dot("a <b>", 1, 5.0, 2.0)]), DotRow("c", [Dot("c", 2, 9.0)])]
    text = dot_chart(rows, "Gain", "points", zero="base & co")
    tree = ElementTree.fromstring(text)
    assert len([e for e in tree.iter("line") if e.get("class") == "axis"]) == 1
    assert "base & co" in [e.text for e in tree.iter("text")]
    assert "a <b>: 5.0" in tree.get("aria-label", "")
    assert [group.get("data-m") for group in tree.iter("g")] == ["1", "2"]


LONG = "mean teacher + CutMix of prototype consistency"
CROWDED = {
    "percent with a decimal": line_chart([Line("a", 0, [(0.0, 94.8), (9000.0, 97.3)])], "x", " %", zero=False),
    "small values": line_chart([Line("a", 0, [(0.0, 0.00012), (9e5, 0.00013)])], "x", zero=False),
    "five splits": fraction_chart(
        [Line("a", 0, [(92.0, 50.0), (1464.0, 50.7)], markers=True)],
        [(float(n), f"{n} ({share} %)") for n, share in ((92, 0.87), (183, 1.7), (366, 3.5), (732, 6.9), (1464, 14))],
        "mIoU",
    ),
    "gains of long names": dot_chart([DotRow(LONG, [Dot(LONG, 1, 5.0, 2.0)])], "Gain", "points", zero=LONG),
    "gains of short names": dot_chart([DotRow("car", [Dot("a", 1, 5.0)])], "Gain", "points", zero="supervised (CPS)"),
    "losses of short names": dot_chart([DotRow("car", [Dot("a", 1, -5.0)])], "Gain", "points", zero=LONG),
}  # fmt: skip


@pytest.mark.parametrize("name", CROWDED)
def test_no_text_is_cut_or_shortened_in_a_chart(name: str) -> None:
    tree = ElementTree.fromstring(CROWDED[name])
    _, _, width, height = map(float, tree.get("viewBox", "").split())
    texts = [text.text or "" for text in tree.iter("text")]
    assert not [text for text in texts if "…" in text]
    assert name != "gains of long names" or LONG in " ".join(texts)
    rows: dict[float, list[tuple[float, float]]] = {}
    for text in tree.iter("text"):
        length = LETTER * len(text.text or "")
        share = {"start": 0.0, "middle": 0.5, "end": 1.0}[text.get("text-anchor", "start")]
        left = float(text.get("x", "")) - share * length
        assert left >= -0.01, text.text
        assert left + length <= width + 0.01, text.text
        assert 10 <= float(text.get("y", "")) <= height - 2, text.text
        rows.setdefault(float(text.get("y", "")), []).append((left, left + length))
    for places in rows.values():
        places.sort()
        assert all(one[1] <= other[0] + 4 for one, other in itertools.pairwise(places)), places


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("colors", "series"), [(LIGHT, LIGHT_SERIES), (DARK, DARK_SERIES)])
def test_text_and_lines_stand_out_in_both_themes(colors: dict[str, str], series: tuple[str, ...]) -> None:
    for ground in (colors["bg"], colors["card"]):
        for name in ("ink", "soft", "link", "up", "down"):
            assert contrast(colors[name], ground) >= 4.5, name
        for color in series:
            assert contrast(color, ground) >= 3.0, color


# In a browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    if BROWSER is None:
        pytest.skip("no Chromium is installed to open the page with")
    with browser.Browser(BROWSER, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def page(chromium: browser.Browser, wide: Path) -> browser.Browser:
    """The wide study's page, opened anew on a desk."""
    chromium.complaints.clear()
    chromium.window(1280, 900)
    chromium.dark(False)
    chromium.open(wide / "report.html")
    chromium.run("(() => { try { localStorage.clear() } catch (error) { } })()")
    chromium.run("document.documentElement.removeAttribute('data-theme')")
    return chromium


def column(page: browser.Browser, box: str, number: int = 0) -> list[str]:
    """Texts of a column of a table, of the rows that are shown."""
    rows = f"[...document.querySelectorAll('#{box} tbody tr')].filter(row => row.offsetParent !== null)"
    found: list[str] = page.run(f"{rows}.map(row => row.cells[{number}].firstChild.textContent.trim())")
    return found


def test_the_page_opens_without_complaint_or_request(
    page: browser.Browser, wide: Path, hostile: Path
) -> None:
    for folder in (wide, hostile):
        page.open(folder / "report.html")
        assert page.complaints == []
        assert page.requests == [(folder / "report.html").resolve().as_uri()]
        assert page.run("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.run("document.title") == f"name {HOSTILE} (matched)"
    assert page.run("document.querySelectorAll('script').length") == 1


def test_tables_are_sorted_by_their_headings(page: browser.Browser) -> None:
    assert column(page, "summary-1") == ["labels only", "method A", "method B"]
    heading = "#summary-1 thead th:nth-child(3) button"
    page.click(heading)  # the highest mIoU first
    assert column(page, "summary-1") == ["method B", "method A", "labels only"]
    assert page.run("document.querySelector('#summary-1 th:nth-child(3)').ariaSort") == "descending"
    page.click(heading)
    assert column(page, "summary-1") == ["labels only", "method A", "method B"]
    page.click(heading)
    assert page.run("document.querySelectorAll('#summary-1 [aria-sort]').length") == 0
    page.run("document.querySelector('#summary-2 thead th:nth-child(3) button').focus()")
    page.key("Enter")
    assert column(page, "summary-2") == ["method A", "labels only", "method B"]
    page.key("Enter")
    assert column(page, "summary-2") == ["labels only", "method A", "method B"]  # a dash is last both ways


def test_classes_are_sorted_by_the_figures_that_are_shown(page: browser.Browser) -> None:
    page.click("#classes-1 thead th:nth-child(2) button")
    order = page.run(
        "[...document.querySelectorAll('#classes-1 tbody th')].map(head => head.textContent.trim())"
    )
    assert order == ["tree & bush", "ground", "car"]
    shown = "getComputedStyle(document.querySelector('#classes-1 td .iou')).display"
    assert page.run(shown) != "none"
    page.click("#classes-1 [data-figures=gain]")
    assert page.run(shown) == "none"
    assert page.run("document.querySelector('#classes-1 [data-figures=gain]').ariaPressed") == "true"


def test_rows_are_filtered(page: browser.Browser) -> None:
    page.run("document.querySelector('#runs input').focus()")
    for letter in "Method A on random/12":
        page.key(letter)
    shown = column(page, "runs")
    assert shown == [f"method A on random/12 seed {seed}" for seed in range(3)]
    assert page.run("document.querySelector('#runs .count').textContent") == "3 of 18"
    page.run(
        "(() => { const field = document.querySelector('#runs input'); field.value = 'disk';"
        " field.dispatchEvent(new Event('input')); })()"
    )
    assert len(column(page, "runs")) == 3  # reasons are searched, too


def test_a_method_is_hidden_everywhere(page: browser.Browser) -> None:
    every = "[...document.querySelectorAll('main [data-m=\"1\"]')]"
    curves = f"{every}.filter(e => getComputedStyle(e).display !== 'none').length"
    assert page.run(curves) > 10
    page.click("[data-method='1']")
    assert page.run(curves) == 0
    assert page.run("document.querySelector('[data-method=\"1\"]').ariaPressed") == "false"
    assert column(page, "summary-1") == ["labels only", "method A", "method B"]  # the table stays complete
    page.click("[data-method='1']")
    assert page.run(curves) > 10


STATUS = "document.querySelector('.viewer .status').textContent"
SHOWN = "[...document.querySelectorAll('.shot')].filter(shot => !shot.hidden).map(shot => shot.dataset.id)"
ZOOM = "Number(document.querySelector('.viewer').style.getPropertyValue('--z'))"
FOCUS = "document.querySelector('.viewer').focus()"


def test_pictures_are_changed_by_button_thumbnail_and_keyboard(page: browser.Browser) -> None:
    ids = page.run("[...document.querySelectorAll('.shot')].map(shot => shot.dataset.id)")
    assert len(ids) > 2
    assert page.run(SHOWN) == ids[:1]
    page.click(".viewer .after")
    assert page.run(SHOWN) == ids[1:2]
    assert page.run(STATUS) == f"Image 2 of {len(ids)}"
    page.key("ArrowRight")  # the button has the focus, the browser around it gets the key
    assert page.run(SHOWN) == ids[2:3]
    page.run(FOCUS)
    page.key("Home")
    page.key("ArrowLeft")
    assert page.run(SHOWN) == ids[-1:]
    page.click(".thumbs li:nth-child(2) button")
    assert page.run(SHOWN) == ids[1:2]
    current = (
        "[...document.querySelectorAll('.thumbs button')].map(button => button.getAttribute('aria-current'))"
    )
    assert page.run(current).index("true") == 1
    labels = page.run(
        "[...document.querySelectorAll('.shot:not([hidden]) figcaption b')].map(b => b.textContent)"
    )
    assert labels == ["photo", "truth", "labels only", "method A", "method B"]


def test_classes_overlay_and_errors_are_shown_in_turn(page: browser.Browser) -> None:
    def style(selector: str, name: str) -> str:
        found: str = page.run(
            f"getComputedStyle(document.querySelector('.shot:not([hidden]) {selector}')).{name}"
        )
        return found

    assert style(".error", "visibility") == "hidden"
    page.click(".viewer [data-show=errors]")
    assert style(".error", "visibility") == "visible"
    assert style("[data-m] .mask", "visibility") == "hidden"
    assert style(".truth .mask", "visibility") == "visible"
    page.run(FOCUS)
    page.key("2")
    assert (style("[data-m] .mask", "opacity"), style(".error", "visibility")) == ("0.55", "hidden")
    photo = "document.querySelector('.shot:not([hidden]) .photo').src"
    assert page.run(f"document.querySelector('.shot:not([hidden]) .under').src === {photo}")
    page.key("1")
    assert style("[data-m] .mask", "opacity") == "1"


def test_all_tiles_are_enlarged_and_moved_together(page: browser.Browser) -> None:
    layers = "[...document.querySelectorAll('.shot:not([hidden]) .layers')]"
    parts = "getComputedStyle(e).transform.slice(7, -1).split(',').map(v => Math.round(20 * v) / 20).join()"
    places = (
        f"[...new Set({layers}.map(e => {parts}))]"  # to a twentieth of a pixel, for tiles lie between pixels
    )
    page.run(FOCUS)
    page.key("+")
    page.key("+")
    assert page.run(ZOOM) == pytest.approx(2.25)
    (before,) = page.run(places)
    assert before.startswith("2.25,0,0,2.25,-")
    page.drag(".shot:not([hidden]) .truth .stage", 30, 20)
    (after,) = page.run(places)
    moved = [float(b) - float(a) for a, b in zip(before.split(","), after.split(","), strict=True)]
    assert moved == pytest.approx([0, 0, 0, 0, 30, 20], abs=1.5)
    page.key("ArrowLeft", shift=True)
    (by_key,) = page.run(places)
    assert by_key != after
    page.key("0")
    assert page.run(ZOOM) == 1
    page.click(".viewer .in")
    page.key("ArrowRight")
    assert page.run(ZOOM) == 1  # another image begins whole
    page.click(".shot:not([hidden]) .tile:nth-child(3) figcaption button")
    wider = "document.querySelector('.shot:not([hidden]) .tile:nth-child(3)').offsetWidth"
    assert page.run(wider) > 500


def test_everything_is_reached_by_the_tab_key_with_a_visible_focus(page: browser.Browser) -> None:
    seen, outlines = [], []
    for _ in range(45):
        page.key("Tab")
        seen.append(page.run("document.activeElement.className + ' ' + document.activeElement.tagName"))
        outlines.append(page.run("getComputedStyle(document.activeElement).outlineStyle"))
    assert seen[0] == "skip A"
    assert {"before BUTTON", "after BUTTON", "in BUTTON", "viewer DIV"} <= {
        name.replace(" zoomed", "") for name in seen
    }
    assert "none" not in outlines
    page.open(Path(page.run("location.pathname")))
    page.key("Tab")
    page.key("Enter")
    assert page.run("location.hash") == "#summary"


CUT = """[...document.querySelectorAll('svg[role=img] text')].filter(text => {
  const box = text.getBBox(), room = text.ownerSVGElement.viewBox.baseVal;
  return box.x < -0.1 || box.x + box.width > room.width + 0.1 || box.y + box.height > room.height;
}).map(text => text.textContent)"""


def test_a_wide_window_is_filled_and_no_label_is_cut(page: browser.Browser, tmp_path: Path) -> None:
    page.run("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert page.run("document.querySelectorAll('svg[role=img] text').length") > 100
    assert page.run(CUT) == []
    for width, columns in ((1280, 3), (1600, 3), (1920, 4)):
        page.window(width, 900)
        assert page.run("document.querySelector('#summary table').offsetWidth") >= min(width, 1800) - 80
        tracks = "getComputedStyle(document.querySelector('#pseudo .charts')).gridTemplateColumns.split(' ')"
        assert page.run(f"{tracks}.length") == columns
    (tmp_path / "charts.html").write_text(
        f"<style>svg text {{ font: 12px Verdana, 'DejaVu Sans', sans-serif }}</style>{''.join(CROWDED.values())}"
    )
    page.open(tmp_path / "charts.html")
    assert page.run(CUT) == []


def test_a_phone_needs_no_sideways_scrolling(page: browser.Browser, hostile: Path, wide: Path) -> None:
    page.window(390, 844, phone=True)
    for folder in (wide, hostile):
        page.open(folder / "report.html")
        width, room = page.run("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert room == 390
        assert width <= room
        for opened in ("errors", "over"):
            page.click(f".viewer [data-show={opened}]")
        page.run("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        assert page.run("document.documentElement.scrollWidth") <= room
    page.open(wide / "report.html")
    assert page.run(
        "document.querySelector('#summary-1 select').offsetParent !== null"
    )  # headings are not shown here
    page.run(
        "(() => { const choice = document.querySelector('#summary-1 select'); choice.value = '2';"
        " choice.dispatchEvent(new Event('change')); })()"
    )
    assert column(page, "summary-1") == ["method B", "method A", "labels only"]
    sizes = page.run("[...document.querySelectorAll('.bar button')].map(button => button.offsetHeight)")
    assert min(sizes) >= 32  # of a fingertip
    assert page.run("parseFloat(getComputedStyle(document.querySelector('svg text')).fontSize)") >= 11


def test_dark_follows_the_system_and_the_button(page: browser.Browser, wide: Path) -> None:
    def ground() -> str:
        found: str = page.run("getComputedStyle(document.body).backgroundColor")
        return found

    def rgb(color: str) -> str:
        return "rgb(" + ", ".join(str(int(color[i : i + 2], 16)) for i in (1, 3, 5)) + ")"

    assert ground() == rgb(LIGHT["bg"])
    page.dark(True)
    assert ground() == rgb(DARK["bg"])
    assert page.run("getComputedStyle(document.querySelector('svg text')).fill") == rgb(DARK["soft"])
    page.open(wide / "report.html")
    assert page.run("document.getElementById('theme').textContent") == "Light mode"
    page.click("#theme")
    assert ground() == rgb(LIGHT["bg"])  # against the system's wish
    page.click("#theme")
    assert ground() == rgb(DARK["bg"])
    page.dark(False)
    assert ground() == rgb(DARK["bg"])


def test_the_page_is_readable_without_its_script(
    chromium: browser.Browser, wide: Path, tmp_path: Path
) -> None:
    chromium.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        chromium.open(wide / "report.html")
        assert chromium.run("document.querySelectorAll('.thumbs button').length") == 0
        assert chromium.run(
            "[...document.querySelectorAll('.shot')].every(shot => shot.offsetParent !== null)"
        )
        assert chromium.run("document.querySelector('.bar').offsetParent === null")
    finally:
        chromium.call("Emulation.setScriptExecutionDisabled", value=False)


def test_screenshots_are_written_where_asked(page: browser.Browser, wide: Path, tmp_path: Path) -> None:
    """For people: with STUDY_SCREENSHOTS=DIR the pages are kept as pictures to look at."""
    folder = Path(os.environ.get("STUDY_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = []
    for name, width, dark in (("desk_light", 1280, False), ("desk_dark", 1280, True), ("phone", 390, False)):
        page.window(width, 900, phone=width < 500)
        page.dark(dark)
        page.open(wide / "report.html")
        page.window(width, min(8000, page.run("document.documentElement.scrollHeight")), phone=width < 500)
        page.screenshot(folder / f"{name}.png")
        sizes.append((folder / f"{name}.png").stat().st_size)
    assert min(sizes) > 20_000
