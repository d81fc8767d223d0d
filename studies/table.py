"""Figures of a study: what its run directories hold, and the summary as Markdown and CSV.

mIoU is a fraction in the records and in `Stat`, and percent (gains: points) in what is written. Runs that were
measured on other images, by another protocol or trained on another split never share a table.
"""

from __future__ import annotations

import csv
import io
import json
import shlex
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from common.errors import UserError
from common.runlog import duration
from studies.run import read_result
from studies.study import MODES, Job, Study, jobs

DASH = "–"
ROUNDING_ONLY = ("batch_size",)  # parts of a protocol that cannot change what is measured


@dataclass(frozen=True)
class Record:
    """A run as its directory shows it; `result` is None until it has ended, the others are empty where absent."""

    job: Job
    result: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    environment: dict[str, Any]
    config: dict[str, Any]

    @property
    def label(self) -> str:
        """Label of the method."""
        return self.job.method.label


@dataclass(frozen=True)
class Stat:
    """Mean and sample standard deviation (0 for one value) of `n` values."""

    mean: float
    std: float
    n: int


@dataclass(frozen=True)
class Row:
    """One method in one table; None where there is no finished run to tell.

    Attributes:
        label: of the method.
        n: finished runs; `wanted` seeds were asked for.
        best: test mIoU of the weights that were best while training.
        last: test mIoU of the final weights.
        gain_best, gain_last: differences to the baseline's run of the same seed.
        seconds: wall time of a run, evaluation included.
        images_per_s: median over the log lines, averaged over runs.
        peak_memory: largest of the runs, in bytes.
        published: the paper's mIoU in percent.
    """

    label: str
    n: int
    wanted: int
    best: Stat | None = None
    last: Stat | None = None
    gain_best: Stat | None = None
    gain_last: Stat | None = None
    seconds: float | None = None
    images_per_s: float | None = None
    peak_memory: int | None = None
    published: float | None = None


@dataclass(frozen=True)
class Table:
    """Methods that may be compared.

    Attributes:
        key: what they share: (list, protocol as JSON, split hash).
        rows: in the order of the study, baseline first.
        split: name of the split.
        records: the finished runs behind the rows.
    """

    key: tuple[str, str, str]
    rows: list[Row]
    split: str
    records: list[Record] = field(default_factory=list)

    @property
    def caption(self) -> str:
        """What all rows share, in words."""
        images, protocol, split_hash = self.key
        return (
            f"split {self.split or 'unknown'} (hash {split_hash[:12]}), measured on the '{images}' list "
            f"by {_protocol_text(json.loads(protocol))}"
        )


def load_records(study: Study, out: Path) -> list[Record]:
    """All runs of the study, finished or not.

    Raises:
        UserError: `out` does not exist.
    """
    if not out.is_dir():
        raise UserError(f"{out}: no such folder; give the folder that 'python -m studies run' has written")
    return [
        Record(
            job,
            read_result(job.run_dir),
            _read_lines(job.run_dir / "metrics.jsonl"),
            _read_mapping(job.run_dir / "env.json"),
            _read_mapping(job.run_dir / "config.yaml"),
        )
        for job in jobs(study, out)
    ]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSON-lines file; a run in progress may be writing the last one."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            found.append(entry)
    return found


def _read_mapping(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}


def comparison_key(result: Mapping[str, Any]) -> tuple[str, str, str]:
    """What two results must share to stand in one table: list, protocol, split hash."""
    protocol = {key: value for key, value in result["protocol"].items() if key not in ROUNDING_ONLY}
    return str(result.get("list", "")), json.dumps(protocol, sort_keys=True), str(result["split_hash"])


def tables(study: Study, records: Sequence[Record]) -> list[Table]:
    """One table per comparison key, the baseline's first; methods without a finished run as rows of dashes."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    ordered = sorted(records, key=lambda record: study.labels.index(record.label))
    for record in ordered:
        if record.result is not None:
            groups.setdefault(comparison_key(record.result), []).append(record)
    wanted = len(study.seeds)
    started = {record.label for group in groups.values() for record in group}
    missing = [Row(label, 0, wanted) for label in study.labels if label not in started]
    found = []
    for key, group in groups.items():
        labels = [label for label in study.labels if any(record.label == label for record in group)]
        baseline = _by_seed(group, study.baseline)
        rows = [_row(label, _by_seed(group, label), baseline, study) for label in labels]
        if len(groups) == 1:
            rows = sorted([*rows, *missing], key=lambda row: study.labels.index(row.label))
        split = next((str(r.result["split"]) for r in group if r.result and r.result.get("split")), "")
        found.append(Table(key, rows, split, group))
    if missing and len(groups) != 1:
        found.append(Table(("", "{}", ""), missing, ""))
    return found


def _by_seed(group: Iterable[Record], label: str) -> dict[int, Record]:
    return {record.job.seed: record for record in group if record.label == label}


def _row(label: str, runs: Mapping[int, Record], baseline: Mapping[int, Record], study: Study) -> Row:
    results = {seed: record.result for seed, record in runs.items() if record.result is not None}
    gains: dict[str, Stat | None] = {}
    for key in ("miou_best", "miou_last"):
        pairs = [
            results[seed][key] - other.result[key]
            for seed, other in baseline.items()
            if seed in results and other.result is not None
        ]
        gains[key] = stat(pairs) if label != study.baseline else None
    rates = [rate for record in runs.values() if (rate := images_per_s(record)) is not None]
    published = [(record.config.get("expect") or {}).get("miou") for record in runs.values()]
    return Row(
        label=label,
        n=len(results),
        wanted=len(study.seeds),
        best=stat([result["miou_best"] for result in results.values()]),
        last=stat([result["miou_last"] for result in results.values()]),
        gain_best=gains["miou_best"],
        gain_last=gains["miou_last"],
        seconds=_mean([result["seconds"] for result in results.values() if result.get("seconds") is not None]),
        images_per_s=_mean(rates),
        peak_memory=max((int(r["peak_memory_bytes"]) for r in results.values() if r.get("peak_memory_bytes")),
                        default=None),
        published=next((float(value) for value in published if value is not None), None),
    )  # fmt: skip


def stat(values: Sequence[float]) -> Stat | None:
    """Mean and sample standard deviation; None of nothing."""
    if not values:
        return None
    return Stat(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def images_per_s(record: Record) -> float | None:
    """Median training speed over the log lines of a run."""
    rates = [float(line["images_per_s"]) for line in record.metrics if line.get("images_per_s")]
    return statistics.median(rates) if rates else None


def _protocol_text(protocol: Mapping[str, Any]) -> str:
    kind = str(protocol.get("kind", "an unknown protocol")).replace("_", " ")
    details = []
    if protocol.get("crop_size"):
        details.append("crop " + "x".join(str(side) for side in protocol["crop_size"]))
    if list(protocol.get("scales", [1.0])) != [1.0]:
        details.append("scales " + ", ".join(f"{scale:g}" for scale in protocol["scales"]))
    if protocol.get("flip"):
        details.append("mirrored")
    return f"{kind} ({', '.join(details)})" if details else kind


# What is written


def percent(value: Stat | None) -> str:
    """`58.10 ± 1.20` in percent; without a deviation for one run; a dash for none."""
    if value is None:
        return DASH
    spread = f" ± {100 * value.std:.2f}" if value.n > 1 else ""
    return f"{100 * value.mean:.2f}{spread}"


def points(value: Stat | None, n: int | None = None) -> str:
    """A gain with its sign, in percentage points; says so where it rests on other than `n` runs."""
    if value is None:
        return DASH
    spread = f" ± {100 * value.std:.2f}" if value.n > 1 else ""
    return f"{100 * value.mean:+.2f}{spread}" + (f" (n={value.n})" if n not in (None, value.n) else "")


def gibibytes(value: int | None) -> str:
    """Memory as `1.25 GiB`."""
    return DASH if value is None else f"{value / 2**30:.2f} GiB"


Cell = Callable[[Row], str]

COLUMNS: dict[str, Cell] = {
    "method": lambda row: row.label,
    "n": lambda row: str(row.n) if row.n == row.wanted else f"{row.n} of {row.wanted}",
    "mIoU best": lambda row: percent(row.best),
    "gain": lambda row: points(row.gain_best, row.n),
    "mIoU last": lambda row: percent(row.last),
    "gain (last)": lambda row: points(row.gain_last, row.n),
    "published": lambda row: DASH if row.published is None else f"{row.published:.2f}",
    "time per run": lambda row: DASH if row.seconds is None else duration(row.seconds),
    "images/s": lambda row: DASH if row.images_per_s is None else f"{row.images_per_s:.1f}",
    "peak memory": lambda row: gibibytes(row.peak_memory),
}


def columns(found: Sequence[Table]) -> dict[str, Cell]:
    """The columns to show: 'published' only where a run names a published figure."""
    published = any(row.published is not None for table in found for row in table.rows)
    return {name: cell for name, cell in COLUMNS.items() if name != "published" or published}


def table_notes(study: Study, found: Sequence[Table]) -> list[str]:
    """What a reader must know to read the tables right, one sentence each."""
    runs = sum(row.n for table in found for row in table.rows)
    notes = [
        "mIoU (mean intersection over union) in percent; 'best' are the weights that scored highest while "
        "training, 'last' the final ones, both measured anew after training.",
        f"Gains are points over '{study.baseline}' with the same seed; ± is the standard deviation over seeds.",
    ]
    if runs < len(study.runs) * len(study.seeds):
        notes.append(f"{DASH} where no finished run is there yet, or none to compare with.")
    if sum(1 for table in found if table.records) > 1:
        notes.append(
            "Runs with another split or protocol stand in tables of their own: their figures must not be compared."
        )
    records = [record for table in found for record in table.records]
    if len({record.result.get("commit") for record in records if record.result}) > 1:
        notes.append("The runs were made by different commits of this repository; see the list of runs.")
    if any(record.environment.get("dirty") for record in records):
        notes.append("Some runs were made with uncommitted changes.")
    return notes


def sentence(text: str) -> str:
    """The text with a capital first letter; the rest, unlike with `str.capitalize`, as it is."""
    return text[:1].upper() + text[1:]


def summary_markdown(study: Study, records: Sequence[Record]) -> str:
    """The summary: tables, notes, runs and the commands that made them."""
    found = tables(study, records)
    lines = [f"# {study.title}", "", f"{sentence(MODES[study.mode])}.", ""]
    names = columns(found)
    for table in found:
        lines += [f"{sentence(table.caption)}:" if table.records else "No finished run yet:", ""]
        rows = [[cell(row) for cell in names.values()] for row in table.rows]
        lines += [*_markdown_table(list(names), rows), ""]
    lines += [*(f"- {note}" for note in table_notes(study, found)), "", "## Runs", ""]
    header = ["run", "best", "last", "steps", "split", "config", "commit"]
    lines += [*_markdown_table(header, [run_cells(record) for record in records]), ""]
    lines += ["## Commands", "", "```sh"]
    for record in records:
        lines.append(f"(cd projects/{record.job.method.project} && {shlex.join(record.job.command)})")
    return "\n".join([*lines, "```", ""])


def run_cells(record: Record) -> list[str]:
    """Name, mIoU best and last, steps, and the first digits of split hash, config hash and commit of one run."""
    result = record.result
    if result is None:
        return [record.job.name, *[DASH] * 6]
    figures = [f"{100 * result[key]:.2f}" for key in ("miou_best", "miou_last")]
    hashes = [str(result.get(key) or DASH)[:12] for key in ("split_hash", "config_hash", "commit")]
    return [record.job.name, *figures, str(result.get("steps", DASH)), *hashes]


def _markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in (header, rule, *rows))
    return [f"| {' | '.join(row)} |" for row in escaped]


def summary_csv(study: Study, records: Sequence[Record]) -> str:
    """The tables with unrounded numbers; mIoU and gains in percent, empty where there is no figure."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([
        "study", "mode", "list", "protocol", "split", "split_hash", "method", "n", "miou_best", "miou_best_std",
        "miou_last", "miou_last_std", "gain_best", "gain_best_std", "gain_last", "gain_last_std", "gain_n",
        "seconds", "images_per_s", "peak_memory_bytes",
    ])  # fmt: skip
    for table in tables(study, records):
        images, protocol, split_hash = table.key
        for row in table.rows:
            stats = [number for value in (row.best, row.last, row.gain_best, row.gain_last)
                     for number in _percent_pair(value)]  # fmt: skip
            writer.writerow([
                study.name, study.mode, images, protocol if images else "", table.split, split_hash, row.label, row.n,
                *stats, row.gain_best.n if row.gain_best else None,
                row.seconds, row.images_per_s, row.peak_memory,
            ])  # fmt: skip
    return file.getvalue()


def _percent_pair(value: Stat | None) -> tuple[float | None, float | None]:
    """Mean and deviation in percent; no deviation of one value."""
    if value is None:
        return None, None
    return round(100 * value.mean, 6), round(100 * value.std, 6) if value.n > 1 else None
