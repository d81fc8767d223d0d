"""The figures of a study in words, Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

from common.run.log import duration
from studies.study import Study
from studies.table import Record, Row, Stat, Table, class_figures, images_per_s, tables, world_size

DASH = "–"
DOUBT = "?"  # behind a published figure that its source does not confirm


def percent(value: Stat | None) -> str:
    """`58.10 ± 1.20` in percent; without a deviation for one run; a dash for none."""
    if value is None:
        return DASH
    spread = f" ± {100 * value.std:.2f}" if value.n > 1 else ""
    return f"{100 * value.mean:.2f}{spread}"


def points(value: Stat | None, n: int | None = None) -> str:
    """A gain in points with its sign and 95 % interval; says so where it rests on other than `n` runs."""
    if value is None:
        return DASH
    interval = value.interval
    spread = f" [{100 * interval[0]:+.2f}, {100 * interval[1]:+.2f}]" if interval else ""
    return f"{100 * value.mean:+.2f}{spread}" + (f" (n={value.n})" if n not in (None, value.n) else "")


def gibibytes(value: int | None) -> str:
    """Memory as `1.25 GiB`."""
    return DASH if value is None else f"{value / 2**30:.2f} GiB"


def published(row: Row) -> str:
    """The paper's figure, with a mark where its source does not confirm it."""
    if row.published is None:
        return DASH
    return f"{row.published:.2f}{f' {DOUBT}' if row.published_doubtful else ''}"


def hours(value: float | None) -> str:
    """Hours with two significant digits: `0.018`, `3.4`, `12`."""
    return DASH if value is None else f"{float(f'{value:.2g}'):g}"


Cell = Callable[[Row], str]

COLUMNS: dict[str, Cell] = {
    "method": lambda row: row.label,
    "n": lambda row: str(row.n) if row.n == row.wanted else f"{row.n} of {row.wanted}",
    "mIoU best": lambda row: percent(row.best),
    "gain [95 %]": lambda row: points(row.gain_best, row.n),
    "mIoU last": lambda row: percent(row.last),
    "gain, last [95 %]": lambda row: points(row.gain_last, row.n),
    "baseline": lambda row: row.baseline or DASH,
    "published": published,
    "time per run": lambda row: DASH if row.seconds is None else duration(row.seconds),
    "device hours": lambda row: hours(row.device_hours),
    "images/s": lambda row: DASH if row.images_per_s is None else f"{row.images_per_s:.1f}",
    "peak memory": lambda row: gibibytes(row.peak_memory),
    "missing": lambda row: "; ".join(row.missing),
}


def columns(study: Study, found: Sequence[Table]) -> dict[str, Cell]:
    """The columns to show; some only where a row has something to tell there."""
    rows = [row for table in found for row in table.rows]
    hidden = set()
    if all(row.published is None for row in rows):
        hidden.add("published")
    if not any(row.missing for row in rows):
        hidden.add("missing")
    if study.one_baseline:
        hidden.add("baseline")
    if all(
        row.device_hours is None or math.isclose(3600 * row.device_hours, row.seconds or 0) for row in rows
    ):
        hidden.add("device hours")  # one process per run: the time says it
    return {name: cell for name, cell in COLUMNS.items() if name not in hidden}


def sort_value(row: Row, column: str) -> float | str:
    """What a column is sorted by: an unrounded number, or the text; an empty text for a dash."""
    numbers: dict[str, float | None] = {
        "n": row.n,
        "mIoU best": row.best.mean if row.best else None,
        "gain [95 %]": row.gain_best.mean if row.gain_best else None,
        "mIoU last": row.last.mean if row.last else None,
        "gain, last [95 %]": row.gain_last.mean if row.gain_last else None,
        "published": row.published,
        "time per run": row.seconds,
        "device hours": row.device_hours,
        "images/s": row.images_per_s,
        "peak memory": row.peak_memory,
    }
    if column not in numbers:
        return COLUMNS[column](row)
    value = numbers[column]
    return "" if value is None else float(value)


def table_notes(study: Study, found: Sequence[Table]) -> list[str]:
    """What a reader must know to read the tables right, one sentence each."""
    records = [record for table in found for record in table.records]
    rows = [row for table in found for row in table.rows]
    over = f"'{study.one_baseline}'" if study.one_baseline else "the run that the column 'baseline' names,"
    notes = [
        "mIoU (mean intersection over union) in percent, mean ± standard deviation over n seeds; 'best' are the "
        "weights that scored highest while training, 'last' the final ones, both measured anew after training.",
        f"Gains are points over {over} on the same split with the same seed. In brackets the 95 % "
        "confidence interval of the mean gain: Student's t over the paired differences of the seeds (n - 1 degrees of "
        "freedom). One seed has no interval. The intervals are not widened for comparing several methods.",
    ]
    if any(row.n == 1 for row in rows):
        notes.append("Where n is 1, a difference of a point or two can be chance. More seeds tell.")
    if any(row.missing for row in rows):
        notes.append(f"{DASH} where no finished run is there; the reason stands beside it.")
    if any(table.apart for table in found):
        notes.append(
            "Runs with another split, protocol or code stand in tables of their own: "
            "their figures must not be compared."
        )
    notes += _published_notes(rows)
    notes += _machine_notes(records, "device hours" in columns(study, found))
    return notes


def _published_notes(rows: Sequence[Row]) -> list[str]:
    shown = [row for row in rows if row.published is not None]
    if not shown:
        return []
    sources = dict.fromkeys(f"{row.label}: {row.published_source or 'no source given'}" for row in shown)
    notes = [
        "'Published' is the paper's mIoU by its own recipe, not a figure of these runs. "
        + "; ".join(sources)
        + "."
    ]
    if any(row.published_doubtful for row in shown):
        notes.append(f"{DOUBT} marks published figures that are not verified.")
    return notes


def _machine_notes(records: Sequence[Record], shared: bool) -> list[str]:
    notes = []
    machines = {
        (str(r.environment.get("devices")), str(r.environment.get("threads")), world_size(r))
        for r in records
        if r.environment
    }
    if len(machines) > 1:
        notes.append("The runs were made on different devices: time, images/s and memory cannot be compared.")
    elif records:
        notes.append(
            f"Time is that of a run with its evaluations{' (device hours: on all its processes)' if shared else ''}; "
            "images/s is the median while training; peak memory the largest of the runs."
        )
    if any(record.environment.get("dirty") for record in records):
        notes.append("Some runs were made with uncommitted changes.")
    skipped = [r.job.name for r in records if r.result and r.result.get("skipped_files")]
    if skipped:
        notes.append(f"Broken files were replaced in: {', '.join(skipped)}.")
    return notes


def verdict(found: Sequence[Table]) -> list[str]:
    """The result in words: one sentence per method of each table with the baseline."""
    main = [table for table in found if not table.apart]
    sentences = [text for table in main for text in _sentences(table, len(main) > 1)]
    return sentences or ["There is no finished pair of runs to compare yet."]


def _sentences(table: Table, several: bool) -> list[str]:
    place = f"On split {table.split}, " if several else ""
    sentences = []
    for row in table.rows:
        gain = row.gain_best
        if row.best is None or gain is None:
            continue
        difference = 100 * gain.mean
        side = f"{abs(difference):.1f} points {'above' if difference > 0 else 'below'}"
        runs = "one run each, so it may be chance" if gain.n == 1 else f"mean of {gain.n} seeds"
        if gain.n > 1 and not gain.certain:
            runs += "; the interval includes zero"
        sentences.append(
            f"{place}{row.label} reaches {100 * row.best.mean:.1f} % mIoU, "
            f"{side if abs(difference) >= 0.05 else 'level with'} '{row.baseline}' ({runs})."
        )
    return sentences


def sentence(text: str) -> str:
    """The text with a capital first letter; the rest, unlike with `str.capitalize`, as it is."""
    return text[:1].upper() + text[1:]


def heading(table: Table) -> str:
    """What stands above a table, without a full stop."""
    apart = f". Kept apart: {table.apart}" if table.apart else ""
    return sentence(table.caption) + apart


# Markdown


def summary_markdown(study: Study, records: Sequence[Record], answers: Sequence[tuple[str, str]] = ()) -> str:
    """The summary: answers, tables, notes, classes, runs and the commands that made them."""
    found = tables(study, records)
    lines = [f"# {_plain(study.title)}", "", f"{sentence(study.meaning)}.", ""]
    for question, answer in answers:
        lines += [f"**{question}** {_plain(answer)}", ""]
    names = columns(study, found)
    for table in found:
        rows = [[cell(row) for cell in names.values()] for row in table.rows]
        lines += [f"{_plain(heading(table))}:", "", *_markdown_table(list(names), rows), ""]
    lines += [*(f"- {_plain(note)}" for note in table_notes(study, found)), ""]
    for table in found:
        if table.key is not None and not table.apart:
            lines += _class_lines(study, table)
    lines += ["## Runs", ""]
    lines += [*_markdown_table(RUN_HEADER, [run_cells(record) for record in records]), ""]
    lines += ["## Commands", "", *_fenced([command_line(record) for record in records])]
    return "\n".join([*lines, ""])


def _class_lines(study: Study, table: Table) -> list[str]:
    figures = class_figures(study, table)
    labels = [row.label for row in table.rows if row.n]
    rows = [
        [entry.name, *(_class_cell(entry.iou.get(label), entry.gain.get(label)) for label in labels)]
        for entry in figures
    ]
    title = f"IoU by class in percent, best weights (gain in points), split {table.split or 'unknown'}"
    return [f"{_plain(title)}:", "", *_markdown_table(["class", *labels], rows), ""]


def _class_cell(iou: Stat | None, gain: Stat | None) -> str:
    if iou is None:
        return DASH
    return f"{100 * iou.mean:.1f}" + ("" if gain is None else f" ({100 * gain.mean:+.1f})")


RUN_HEADER = ["run", "split", "best", "last", "steps", "split hash", "config", "commit", "state"]


def run_cells(record: Record) -> list[str]:
    """Name, split, mIoU best and last, steps, first digits of split hash, config hash and commit, and the state."""
    result = record.result
    if result is None:
        return [record.job.name, record.split or DASH, *[DASH] * 6, record.missing]
    figures = [f"{100 * result[key]:.2f}" for key in ("miou_best", "miou_last")]
    hashes = [str(result.get(key) or DASH)[:12] for key in ("split_hash", "config_hash", "commit")]
    steps = str(result.get("steps", DASH))
    return [record.job.name, record.split or DASH, *figures, steps, *hashes, "finished"]


def command_line(record: Record) -> str:
    """The command of a run, from the root of the repository."""
    return f"(cd projects/{record.job.method.project} && {shlex.join(record.job.command)})"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: no tags, no second line."""
    return escape(" ".join(text.split()), quote=False)


def _markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    lines = [f"| {' | '.join(rule)} |"]
    shown = [[_plain(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    return [f"| {' | '.join(shown[0])} |", *lines, *(f"| {' | '.join(row)} |" for row in shown[1:])]


def _fenced(lines: Sequence[str]) -> list[str]:
    """A block of code whose fence is longer than any row of backticks in it."""
    longest = max((len(ticks) for line in lines for ticks in re.findall("`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}sh", *lines, fence]


# CSV: unrounded numbers, mIoU and gains in percent, empty where there is no figure


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return file.getvalue()


def _percents(value: Stat | None, *, interval: bool = False) -> list[float | None]:
    """Mean, deviation and, if asked, the ends of the interval in percent; nothing of one value but its mean."""
    if value is None:
        return [None] * (4 if interval else 2)
    found: list[float | None] = [100 * value.mean, 100 * value.std if value.n > 1 else None]
    if interval:
        found += [100 * end for end in value.interval] if value.interval else [None, None]
    return [None if number is None else round(number, 6) for number in found]


SHARED = ["study", "mode", "split", "labeled", "unlabeled", "list", "protocol", "split_hash", "code"]


def _shared(study: Study, table: Table) -> list[Any]:
    key = table.key
    facts = [key.images, key.protocol, key.split_hash, key.code_hash] if key else [""] * 4
    return [study.name, study.mode, table.split, table.labeled, table.unlabeled, *facts]


def summary_csv(study: Study, records: Sequence[Record]) -> str:
    """One line per method and table."""
    header = [
        *SHARED, "kept_apart", "method", "n", "wanted", "miou_best", "miou_best_std", "miou_last", "miou_last_std",
        *(f"{gain}{end}" for gain in ("gain_best", "gain_last") for end in ("", "_std", "_low", "_high")), "gain_n",
        "baseline", "published", "published_source", "published_verified", "seconds", "device_hours", "images_per_s",
        "peak_memory_bytes", "missing",
    ]  # fmt: skip
    rows = []
    for table in tables(study, records):
        for row in table.rows:
            doubt = None if row.published is None else not row.published_doubtful
            rows.append([
                *_shared(study, table), table.apart, row.label, row.n, row.wanted,
                *_percents(row.best), *_percents(row.last),
                *_percents(row.gain_best, interval=True), *_percents(row.gain_last, interval=True),
                row.gain_best.n if row.gain_best else None, row.baseline,
                row.published, row.published_source if row.published is not None else "", doubt,
                row.seconds, row.device_hours, row.images_per_s, row.peak_memory, "; ".join(row.missing),
            ])  # fmt: skip
    return _csv(header, rows)


def runs_csv(study: Study, records: Sequence[Record]) -> str:
    """One line per run, also of those that have not finished."""
    header = [
        "study", "mode", "method", "seed", "split", "state", "miou_best", "miou_last", "pixel_accuracy_best",
        "pixel_accuracy_last", "steps", "labeled", "unlabeled", "list", "split_hash", "config_hash", "commit",
        "seconds", "images_per_s", "peak_memory_bytes", "processes", "skipped_files", "skipped_steps", "command",
    ]  # fmt: skip
    rows = []
    for record in records:
        result = record.result or {}
        accuracy = [(result.get(which) or {}).get("pixel_accuracy") for which in ("best", "last")]
        figures = [result.get("miou_best"), result.get("miou_last"), *accuracy]
        facts = ("steps", "labeled", "unlabeled", "list", "split_hash", "config_hash", "commit", "seconds")
        rows.append([
            study.name, study.mode, record.label, record.job.seed, record.split, record.missing or "finished",
            *(None if value is None else round(100 * value, 6) for value in figures),
            *(result.get(key) for key in facts), images_per_s(record), result.get("peak_memory_bytes"),
            world_size(record) if record.environment else None,
            result.get("skipped_files"), result.get("skipped_steps"), command_line(record),
        ])  # fmt: skip
    return _csv(header, rows)


def classes_csv(study: Study, records: Sequence[Record]) -> str:
    """One line per class, method and table: IoU of the best weights and its gain."""
    header = [
        *SHARED,
        "method",
        "class",
        "n",
        "iou",
        "iou_std",
        "gain",
        "gain_std",
        "gain_low",
        "gain_high",
        "gain_n",
    ]
    rows = []
    for table in tables(study, records):
        for entry in class_figures(study, table):
            for label, iou in entry.iou.items():
                gain = entry.gain.get(label)
                rows.append([
                    *_shared(study, table), label, entry.name, iou.n if iou else 0, *_percents(iou),
                    *_percents(gain, interval=True), gain.n if gain else None,
                ])  # fmt: skip
    return _csv(header, rows)
