"""Figures of a study, from what its run directories hold.

mIoU is a fraction in the records and in `Stat`, and percent (gains: points) in what is written. Runs that were
trained on another split, measured on other images or by another protocol, or made by other code never share a table.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from scipy.special import stdtrit  # of Student's t; scipy.stats takes half a second to import

from common.data.split import changed
from common.errors import UserError
from studies.node import CONSOLE_FILE
from studies.run import read_outcomes, read_result
from studies.study import DEVIATION, Job, Study, jobs

CONFIDENCE = 0.95
ROUNDING_ONLY = ("batch_size",)  # parts of a protocol that cannot change what is measured
PADDING_ONLY = ("pad_label",)  # of centre crops that reach beyond the image; nothing else is padded
DOUBTFUL = ("unverified", "not verified", "from memory")  # in the source of a published figure


@dataclass(frozen=True)
class Record:
    """A run as its directory shows it; `result` is None until it has ended, the others are empty where absent.

    Attributes:
        job: what was asked for.
        result: `result.json`.
        metrics: lines of `metrics.jsonl`.
        environment: `env.json`.
        config: `config.yaml`, resolved.
        deviations: from the paper, as the run has said them.
        missing: why there is no result; empty where there is one.
    """

    job: Job
    result: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    environment: dict[str, Any]
    config: dict[str, Any]
    deviations: tuple[str, ...] = ()
    missing: str = ""

    @property
    def label(self) -> str:
        """Label of the method."""
        return self.job.method.label

    @property
    def split(self) -> str:
        """Name of the split; empty where the run has not begun and the study names none."""
        named = (self.result or {}).get("split") or (self.config.get("data") or {}).get("split")
        return str(named or self.job.split)


@dataclass(frozen=True)
class Stat:
    """Mean and sample standard deviation (0 for one value) of `n` values."""

    mean: float
    std: float
    n: int

    @property
    def half_width(self) -> float | None:
        """Half of the 95 % confidence interval of the mean by Student's t; None for one value, which tells nothing."""
        if self.n < 2:
            return None
        quantile = float(stdtrit(self.n - 1, 0.5 + CONFIDENCE / 2))
        return quantile * self.std / math.sqrt(self.n)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % confidence interval of the mean."""
        half = self.half_width
        return None if half is None else (self.mean - half, self.mean + half)

    @property
    def certain(self) -> bool:
        """Whether the interval excludes zero."""
        found = self.interval
        return found is not None and (found[0] > 0 or found[1] < 0)


@dataclass(frozen=True)
class Row:
    """One method in one table; None where there is no finished run to tell.

    Attributes:
        label: of the method.
        n: finished runs; `wanted` seeds were asked for.
        best: test mIoU of the weights that were best while training.
        last: test mIoU of the final weights.
        gain_best, gain_last: differences to the baseline's run of the same seed in the same table; None of a baseline.
        baseline: label of that run; empty of a baseline.
        seconds: wall time of a run, evaluation included.
        device_hours: that time on all processes of a run.
        images_per_s: median over the log lines, averaged over runs.
        peak_memory: largest of the runs, in bytes.
        published: the paper's mIoU in percent.
        published_source: where it stands.
        missing: why runs are absent, one entry for each.
    """

    label: str
    n: int
    wanted: int
    best: Stat | None = None
    last: Stat | None = None
    gain_best: Stat | None = None
    gain_last: Stat | None = None
    baseline: str = ""
    seconds: float | None = None
    device_hours: float | None = None
    images_per_s: float | None = None
    peak_memory: int | None = None
    published: float | None = None
    published_source: str = ""
    missing: tuple[str, ...] = ()

    @property
    def published_doubtful(self) -> bool:
        """Whether the published figure is not confirmed by its source."""
        return any(word in self.published_source.lower() for word in DOUBTFUL)


@dataclass(frozen=True)
class Key:
    """What runs must share to be compared.

    Attributes:
        images: list that was measured.
        protocol: how, as JSON.
        split_hash: of the labeled and unlabeled images.
        truth: lists, classes, label map and the like, as JSON; empty of runs that have not noted them.
        code: source files that the runs can reach, with their hashes, see `common.run.code`; the name "" holds the
            commit of runs that have not noted them.
    """

    images: str
    protocol: str
    split_hash: str
    truth: str
    code: tuple[tuple[str, str], ...]

    @property
    def code_hash(self) -> str:
        """All of `code` in 12 digits."""
        return hashlib.sha256(repr(self.code).encode()).hexdigest()[:12]

    def allows(self, other: Key) -> bool:
        """Whether runs of both may share a table: no file that both can reach differs, and no entry of both truths."""
        known = dict(self.code)
        same = all(known.get(name, digest) == digest for name, digest in other.code)
        same = same and not changed(json.loads(self.truth), json.loads(other.truth))
        return same and replace(self, code=(), truth="") == replace(other, code=(), truth="")


@dataclass(frozen=True)
class Table:
    """Methods that may be compared.

    Attributes:
        key: what they share; None where no run has finished.
        rows: in the order of the study, baseline first.
        split: name of the split.
        labeled: labeled images of the split, where the runs tell.
        unlabeled: its other images.
        records: the finished runs behind the rows.
        apart: why its runs do not stand in the table before them; empty for the main table of a split.
    """

    key: Key | None
    rows: list[Row]
    split: str
    labeled: int | None = None
    unlabeled: int | None = None
    records: list[Record] = field(default_factory=list)
    apart: str = ""

    @property
    def caption(self) -> str:
        """What all rows share, in words."""
        if self.key is None:
            return f"no finished run yet{f' (split {self.split})' if self.split else ''}"
        share = ""
        if self.labeled and self.unlabeled:
            share = f", {self.labeled} of {self.labeled + self.unlabeled} images labeled"
        elif self.labeled:
            share = f", {self.labeled} images labeled"
        return (
            f"split {self.split or 'unknown'} (hash {self.key.split_hash[:12]}{share}), measured on the "
            f"'{self.key.images}' list by {protocol_text(self.key.protocol)}, "
            f"code {self.key.code_hash}"
        )


@dataclass(frozen=True)
class Winner:
    """The best method of a study.

    Attributes:
        table: of the split with the most labeled photos.
        row: the method in it.
        record: its run whose best weights scored highest on the validation list while training.
        val: that figure's mean over the seeds, a fraction, by which the method was chosen.
    """

    table: Table
    row: Row
    record: Record
    val: float


@dataclass(frozen=True)
class ClassFigures:
    """IoU of one class over the seeds of each method, and the gains over its baseline; None where not measured."""

    name: str
    iou: dict[str, Stat | None]
    gain: dict[str, Stat | None]


def load_records(study: Study, out: Path) -> list[Record]:
    """All runs of the study, finished or not.

    Raises:
        UserError: `out` does not exist.
    """
    if not out.is_dir():
        raise UserError(f"{out}: no such folder; give the folder that 'python -m studies run' has written")
    outcomes = read_outcomes(out)
    return [_load(job, outcomes.get(job.name)) for job in jobs(study, out)]


def _load(job: Job, outcome: Any) -> Record:
    result = read_result(job.run_dir)
    metrics = _read_lines(job.run_dir / "metrics.jsonl")
    return Record(
        job,
        result,
        metrics,
        _read_mapping(job.run_dir / "env.json"),
        _read_mapping(job.run_dir / "config.yaml"),
        _deviations(job.run_dir / "train.log"),
        why_missing(job.run_dir, metrics, outcome) if result is None else "",
    )


def why_missing(run_dir: Path, metrics: Sequence[Mapping[str, Any]] = (), outcome: Any = None) -> str:
    """Why a run directory holds no result, as far as it tells; `outcome` is how the study saw the run end last."""
    if isinstance(outcome, dict) and outcome.get("status") == "failed":
        return f"failed: {outcome.get('message') or 'without a message'}"
    if not run_dir.is_dir():
        return "not started"
    if (run_dir / "result.json").is_file():
        return "its result.json is damaged or incomplete"
    lines = [line for line in _text(run_dir / CONSOLE_FILE).splitlines() if line.strip()]
    errors = [line for line in lines[-40:] if line.startswith("error: ")]
    if errors:
        return f"failed: {errors[-1].removeprefix('error: ')}"
    step = max((int(line["step"]) for line in metrics), default=0)
    return f"not finished; it has written up to step {step}" if step else "not finished"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _deviations(log: Path) -> tuple[str, ...]:
    """What a run has said to differ from its paper, each once."""
    found = [line.split(DEVIATION, 1)[1].strip() for line in _text(log).splitlines() if DEVIATION in line]
    return tuple(dict.fromkeys(found))


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSON-lines file; a run in progress may be writing the last one."""
    found = []
    for line in _text(path).splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            found.append(entry)
    return found


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(_text(path))  # JSON is YAML
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}


# Tables


def comparison_key(result: Mapping[str, Any]) -> Key:
    """What a result must share with others to stand in one table with them."""
    files = result.get("code") or {}
    code = {"": "" if files else str(result.get("commit") or ""), **files}
    padded = result["protocol"].get("kind") == "center_crop"
    unused = ROUNDING_ONLY if padded else (*ROUNDING_ONLY, *PADDING_ONLY)
    protocol = {key: value for key, value in result["protocol"].items() if key not in unused}
    return Key(
        str(result.get("list", "")),
        json.dumps(protocol, sort_keys=True),
        str(result["split_hash"]),
        json.dumps(result.get("truth", {}), sort_keys=True),
        tuple(sorted(code.items())),
    )


def _groups(records: Iterable[Record]) -> dict[Key, list[Record]]:
    """Finished runs by what they share, in the order in which they come."""
    groups: dict[Key, list[Record]] = {}
    for record in records:
        if record.result is None:
            continue
        key = comparison_key(record.result)
        home = next((known for known in groups if known.allows(key)), key)
        members = groups.pop(home, [])
        groups[replace(home, code=tuple(sorted({*home.code, *key.code})))] = [*members, record]
    return groups


def tables(study: Study, records: Sequence[Record]) -> list[Table]:
    """The main table of every split of the study, each followed by what had to be kept apart from it.

    A method without a finished run is a row of None in the main table of its split.
    """
    wanted: dict[str, list[Record]] = {}
    for record in records:
        wanted.setdefault(record.job.split, []).append(record)
    return [table for group in wanted.values() for table in _tables_of_split(study, group)]


def _tables_of_split(study: Study, records: Sequence[Record]) -> list[Table]:
    groups = _groups(sorted(records, key=lambda record: study.labels.index(record.label)))

    def weight(key: Key) -> tuple[int, int]:
        return sum(record.label == study.baseline for record in groups[key]), len(groups[key])

    keys = sorted(groups, key=weight, reverse=True)
    homes: dict[str, Key | None] = {}  # table that tells of a method's absent runs
    labels = [label for label in study.labels if any(record.label == label for record in records)]
    for label in labels:
        counts = {key: sum(record.label == label for record in groups[key]) for key in keys}
        homes[label] = max(counts, key=lambda key: counts[key]) if any(counts.values()) else None
    main = keys[0] if keys else None
    shown: list[Key | None] = [*keys] or [None]
    found = []
    for key in shown:
        group = groups[key] if key else []
        rows = []
        for label in labels:
            home = homes[label] or main
            if home == key or any(record.label == label for record in group):
                absent = [r for r in records if r.label == label and r not in group] if home == key else []
                rows.append(_row(label, group, absent, study))
        results = [record.result for record in group if record.result]
        found.append(
            Table(
                key,
                rows,
                next((str(r["split"]) for r in results if r.get("split")), records[0].job.split),
                next((int(r["labeled"]) for r in results if r.get("labeled")), None),
                next((int(r["unlabeled"]) for r in results if r.get("unlabeled")), None),
                group,
                difference(key, main) if key and main and key != main else "",
            )
        )
    return found


def difference(key: Key, main: Key) -> str:
    """In what a table differs from the main one, in words."""
    reasons = []
    if key.split_hash != main.split_hash:
        reasons.append(f"another split (hash {key.split_hash[:12]} instead of {main.split_hash[:12]})")
    reasons += [f"{words} changed" for words in changed(json.loads(key.truth), json.loads(main.truth))]
    if key.images != main.images:
        reasons.append(f"measured on the '{key.images}' list instead of '{main.images}'")
    if key.protocol != main.protocol:
        reasons.append(
            f"another protocol ({protocol_text(key.protocol)} instead of {protocol_text(main.protocol)})"
        )
    known = dict(main.code)
    files = [name for name, digest in key.code if known.get(name, digest) != digest]
    if "" in files:
        ours, theirs = (dict(code)[""][:12] or "unknown" for code in (key.code, main.code))
        files = [f"commit {ours} instead of {theirs}"]
    if files:
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        reasons.append(f"another state of the code ({', '.join(files[:3])}{more})")
    return "; ".join(reasons)


def _by_seed(group: Iterable[Record], label: str) -> dict[int, dict[str, Any]]:
    return {
        record.job.seed: record.result
        for record in group
        if record.label == label and record.result is not None
    }


def paired(
    runs: Mapping[int, float | None], baseline: Mapping[int, float | None]
) -> list[float]:  # one number per seed that both have
    """Differences to the baseline's run of the same seed."""
    pairs = [(value, baseline.get(seed)) for seed, value in sorted(runs.items())]
    return [value - other for value, other in pairs if value is not None and other is not None]


def _row(label: str, group: Sequence[Record], absent: Sequence[Record], study: Study) -> Row:
    against = study.baseline_of(label)
    results, baseline = _by_seed(group, label), _by_seed(group, against or label)
    runs = [record for record in group if record.label == label]
    gains: dict[str, Stat | None] = {}
    for key in ("miou_best", "miou_last"):
        ours, theirs = ({seed: r[key] for seed, r in found.items()} for found in (results, baseline))
        gains[key] = stat(paired(ours, theirs)) if against else None
    seconds = [
        (r.result["seconds"], world_size(r)) for r in runs if r.result and r.result.get("seconds") is not None
    ]
    expect = [record.config.get("expect") or {} for record in runs or absent]
    published = next((entry for entry in expect if entry.get("miou") is not None), {})
    return Row(
        label=label,
        n=len(results),
        wanted=len(study.seeds),
        best=stat([result["miou_best"] for result in results.values()]),
        last=stat([result["miou_last"] for result in results.values()]),
        gain_best=gains["miou_best"],
        gain_last=gains["miou_last"],
        baseline=against or "",
        seconds=_mean([value for value, _ in seconds]),
        device_hours=_hours(seconds),
        images_per_s=_mean([rate for record in runs if (rate := images_per_s(record)) is not None]),
        peak_memory=max((int(r["peak_memory_bytes"]) for r in results.values() if r.get("peak_memory_bytes")),
                        default=None),
        published=float(published["miou"]) if published else None,
        published_source=str(published.get("source") or ""),
        missing=tuple(f"seed {r.job.seed}: {r.missing or 'stands in a table of its own'}" for r in absent),
    )  # fmt: skip


def stat(values: Sequence[float]) -> Stat | None:
    """Mean and sample standard deviation; None of nothing."""
    if not values:
        return None
    return Stat(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _hours(seconds: Sequence[tuple[float, int]]) -> float | None:
    """Mean over runs of their time on all their processes, in hours."""
    total = _mean([value * size for value, size in seconds])
    return None if total is None else total / 3600


def world_size(record: Record) -> int:
    """Processes of a run; one where it does not tell."""
    size = record.environment.get("world_size")
    return size if isinstance(size, int) and size > 0 else 1


def images_per_s(record: Record) -> float | None:
    """Median training speed over the log lines of a run."""
    rates = [float(line["images_per_s"]) for line in record.metrics if line.get("images_per_s")]
    return statistics.median(rates) if rates else None


def protocol_text(protocol: str) -> str:
    """A protocol, given as JSON, in words."""
    content = json.loads(protocol)
    kind = str(content.get("kind", "an unknown protocol")).replace("_", " ")
    details = []
    if content.get("crop_size"):
        details.append("crop " + "x".join(str(side) for side in content["crop_size"]))
    if list(content.get("scales") or [1.0]) != [1.0]:
        details.append("scales " + ", ".join(f"{scale:g}" for scale in content["scales"]))
    if content.get("flip"):
        details.append("mirrored")
    return f"{kind} ({', '.join(details)})" if details else kind


# The best


def val_miou(record: Record) -> float:
    """MIoU (fraction) of a finished run's best weights on the validation list, measured while training."""
    result = record.result or {}
    return float((result.get("in_training") or {}).get("best", result.get("miou_best", math.nan)))


def winner(found: Sequence[Table]) -> Winner | None:
    """The method with the highest mean on the validation list, and its best run; None where no run has finished.

    Where the study has several splits, it is that of the most labeled photos.
    """
    main = [table for table in found if not table.apart and table.records]
    if not main:
        return None
    table = max(main, key=lambda table: table.labeled or 0)
    runs = {row.label: [r for r in table.records if r.label == row.label] for row in table.rows if row.n}
    means = {label: statistics.fmean(map(val_miou, group)) for label, group in runs.items()}
    label = max(means, key=lambda label: means[label])
    row = next(row for row in table.rows if row.label == label)
    return Winner(table, row, max(runs[label], key=val_miou), means[label])


# Classes, curves


def class_figures(study: Study, table: Table) -> list[ClassFigures]:
    """IoU of every class (best weights) by method, and the gains over its baseline with the same seeds."""
    runs: dict[str, dict[int, Mapping[str, float | None]]] = {}
    for record in table.records:
        if record.result is not None:
            runs.setdefault(record.label, {})[record.job.seed] = record.result["best"].get("iou") or {}
    names = dict.fromkeys(name for seeds in runs.values() for iou in seeds.values() for name in iou)
    found = []
    for name in names:
        values = {
            label: {seed: iou.get(name) for seed, iou in seeds.items()} for label, seeds in runs.items()
        }
        figures = {
            label: stat([v for v in seeds.values() if v is not None]) for label, seeds in values.items()
        }
        gains = {
            label: stat(paired(seeds, values.get(against, {})))
            for label, seeds in values.items()
            if (against := study.baseline_of(label))
        }
        found.append(ClassFigures(str(name), figures, gains))
    return found


def series(record: Record, key: str) -> list[tuple[float, float]]:
    """(step, value) of one quantity of a run; lines without a number for it are passed over."""
    return [
        (float(line["step"]), float(line[key]))
        for line in record.metrics
        if isinstance(line.get(key), int | float) and math.isfinite(line[key])
    ]


def mean_series(runs: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Mean over runs at the steps that all of them have."""
    if not runs:
        return []
    values = [dict(run) for run in runs]
    shared = sorted(set.intersection(*(set(run) for run in values)))
    return [(step, statistics.fmean(run[step] for run in values)) for step in shared]
