"""`report.html`: one file that opens from disk, without a network, in light and dark, wide and narrow.

The template lies in `assets/report.html`; it escapes whatever it is given that is not `Markup`. Charts are drawn by
`charts`, pictures encoded by `tiles`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from common.measure.pseudo_quality import CONFIDENT
from studies.answers import answers, how_to_use
from studies.charts import Dot, DotRow, Line, dot_chart, fraction_chart, line_chart, sample
from studies.pictures import GROUPS, IGNORED_COLOR, Gallery, Uint8
from studies.study import Study
from studies.style import ASSETS, script, style_sheet
from studies.summary import (
    DASH,
    RUN_HEADER,
    columns,
    command_line,
    heading,
    points,
    run_cells,
    sentence,
    sort_value,
    table_notes,
    verdict,
)
from studies.table import (
    ClassFigures,
    Record,
    Row,
    Stat,
    Table,
    class_figures,
    mean_series,
    series,
    tables,
)
from studies.tiles import all_tiles

FEW_CLASSES = 40  # more are folded away in legends and tables
HEAT_REACH = 0.15  # a gain of so much (a fraction) has the full colour

CURVES = {
    "loss": ("Total loss", "The sum that training makes smaller."),
    "loss_sup": ("loss_sup", "Error on the labeled images."),
    "loss_unsup": ("loss_unsup", "Disagreement with the pseudo-labels of the unlabeled images."),
    "loss_contra": ("loss_contra", "Contrastive loss: pixels of a class should look alike, others unlike."),
}
PSEUDO = {
    "pseudo_kept": (
        "Confident pseudo-labels",
        f"Share of the pixels whose likeliest class has a probability of {CONFIDENT:g} or more: one bar for all "
        "methods, whatever their own rule is. Measured at each evaluation on unlabeled images whose truth is known.",
    ),
    "pseudo_accuracy": (
        "Accuracy of the confident ones",
        f"Share of the pseudo-labels with a probability of {CONFIDENT:g} or more that are right.",
    ),
    "pseudo_accuracy_all": ("Accuracy of all", "Share of all pseudo-labels that are right."),
    "kept": (
        "Kept by the method itself",
        "Share of the unlabeled pixels that the method's own rule lets into its loss, averaged over training steps; "
        "only of methods that log it.",
    ),
}
SEVERAL = "its baseline"  # what a gain is measured against where methods have baselines of their own
FROM_ZERO = ("pseudo_kept", "kept")  # shares whose distance from nothing matters


@dataclass(frozen=True)
class Chart:
    """A drawing with its heading and a sentence that explains it."""

    title: str
    text: str
    svg: Markup


def render(
    study: Study,
    records: Sequence[Record],
    gallery: Gallery | str,
    source: str,
    plan: Mapping[str, Any] | None = None,
    folder: str = "FOLDER",
) -> str:
    """The page as text.

    Args:
        study: What was asked for.
        records: Its runs.
        gallery: Pictures, or the reason why there are none.
        source: The study's YAML text.
        plan: The content of `study.json`, where there is one.
        folder: Of the study, as commands name it.
    """
    found = tables(study, records)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((ASSETS / "report.html").read_text(encoding="utf-8"))
    return template.render(
        study=study,
        mode=study.meaning,
        over=f"‘{study.one_baseline}’" if study.one_baseline else SEVERAL,
        css=Markup(style_sheet()),
        script=Markup(script()),
        dash=DASH,
        answers=answers(study, found, gallery),
        command=how_to_use(folder),
        verdicts=verdict(found),
        facts=_facts(study, records),
        methods=[
            {"label": label, "style": i, "sample": Markup(sample(i))} for i, label in enumerate(study.labels)
        ],
        tables=[_summary(study, table, found) for table in found],
        notes=table_notes(study, found),
        gains=_gain_charts(study, found),
        fractions=_fractions(study, found),
        gallery=gallery if isinstance(gallery, str) else _pictures(gallery, study),
        curves=_curves(study, found),
        pseudo=_pseudo(study, found),
        classes=[_classes(study, table, found, gallery) for table in found if table.key is not None],
        reproduce=_reproduce(records, source, plan or {}),
    )


def _number(study: Study, label: str) -> int:
    return study.labels.index(label)


def _over(study: Study) -> str:
    return f"'{study.one_baseline}'" if study.one_baseline else SEVERAL


def _facts(study: Study, records: Sequence[Record]) -> str:
    done = [record for record in records if record.result is not None]
    hours = sum(float((record.result or {}).get("seconds") or 0) for record in done) / 3600
    splits = f" × {len(study.splits)} splits" if len(study.splits) > 1 else ""
    plural = "seed" if len(study.seeds) == 1 else "seeds"
    return (
        f"{len(study.runs)} methods{splits} × {len(study.seeds)} {plural}: {len(done)} of {len(records)} runs "
        f"finished, {hours:.2g} hours of training in all."
    )


# Summary


def _summary(study: Study, table: Table, found: Sequence[Table]) -> dict[str, Any]:
    names = {
        name: cell for name, cell in columns(study, found).items() if name != "missing"
    }  # said below the method
    return {
        "caption": heading(table),
        "apart": bool(table.apart),
        "columns": list(names),
        "rows": [
            {
                "label": row.label,
                "missing": row.missing,
                "cells": [
                    {
                        "name": name,
                        "parts": cell(row).split(" [", 1),  # the interval of a gain gets a line of its own
                        "value": sort_value(row, name),
                        "look": _look(row, name),
                        "title": row.published_source
                        if name == "published" and row.published is not None
                        else "",
                    }
                    for name, cell in names.items()
                    if name != "method"
                ],
            }
            for row in table.rows
        ],
    }


def _look(row: Row, column: str) -> str:
    """Class of a cell: gains are coloured only where their interval excludes zero; names may wrap."""
    if column == "baseline":
        return "words"
    gain = {"gain [95 %]": row.gain_best, "gain, last [95 %]": row.gain_last}.get(column)
    return "" if gain is None or not gain.certain else ("up" if gain.mean > 0 else "down")


def _gain_charts(study: Study, found: Sequence[Table]) -> list[Chart]:
    charts = []
    for table in found:
        rows = [row for row in table.rows if row.gain_best is not None]
        if not rows:
            continue
        drawn = [DotRow(row.label, [_dot(study, row.label, row.gain_best)]) for row in rows if row.gain_best]
        title = f"Gain over {_over(study)}" + (f", split {table.split}" if len(study.splits) > 1 else "")
        text = "Points of mIoU (best weights); bars are the 95 % intervals, none for a single seed."
        svg = dot_chart(drawn, title, "points", zero=study.one_baseline or SEVERAL)
        charts.append(Chart(title, text, Markup(svg)))
    return charts


def _dot(study: Study, label: str, value: Stat) -> Dot:
    half = value.half_width
    return Dot(label, _number(study, label), 100 * value.mean, None if half is None else 100 * half)


def _fractions(study: Study, found: Sequence[Table]) -> Chart | None:
    """MIoU over labeled images of the main tables; None where there is only one number of them."""
    main = [table for table in found if not table.apart and table.labeled]
    counts = {table.labeled: table.labeled + (table.unlabeled or 0) for table in main if table.labeled}
    if len(counts) < 2:
        return None
    lines = []
    for i, label in enumerate(study.labels):
        figures = sorted(
            (float(table.labeled or 0), row.best)
            for table in main
            for row in table.rows
            if row.label == label and row.best is not None
        )
        if figures:
            points = [(x, 100 * value.mean) for x, value in figures]
            spread = [100 * value.std if value.n > 1 else float("nan") for _, value in figures]
            lines.append(Line(label, i, points, spread=spread, markers=True))
    if not lines:
        return None
    names = [
        (float(labeled), f"{labeled} ({100 * labeled / total:.2g} %)")
        for labeled, total in sorted(counts.items())
    ]
    text = (
        "mIoU of the best weights over the number of labeled images (its share of the training images in brackets), "
        "on a logarithmic axis. Bars are ± one standard deviation over seeds; a single seed has none."
    )
    return Chart("Accuracy over labeled fraction", text, Markup(fraction_chart(lines, names, "mIoU")))


# Curves


def _curves(study: Study, found: Sequence[Table]) -> list[dict[str, Any]]:
    """Per table: mIoU with every seed, and the losses."""
    sections = []
    for table in found:
        names = {key for record in table.records for line in record.metrics for key in line}
        losses = [name for name in sorted(names) if name == "loss" or name.startswith("loss_")]
        charts = _chart_list(
            study, table, "miou", "mIoU while training",
            "Measured on the evaluation images that are used during training. Strong lines are means over seeds, "
            "thin ones single seeds.", percent=True, each=True,
        )  # fmt: skip
        more = []
        for name in losses:
            title, text = CURVES.get(name, (name, "A term of the loss; the project's README explains it."))
            more += _chart_list(study, table, name, title, text)
        if charts or more:
            sections.append({"title": _place(table, found), "charts": charts, "more": more})
    return sections


def _place(table: Table, found: Sequence[Table]) -> str:
    if len(found) < 2:
        return ""
    return sentence(f"split {table.split or 'unknown'}") + (
        f", kept apart: {table.apart}" if table.apart else ""
    )


def _pseudo(study: Study, found: Sequence[Table]) -> dict[str, Any]:
    sections, silent = [], []
    for table in found:
        charts = [
            chart
            for name, (title, text) in PSEUDO.items()
            for chart in _chart_list(study, table, name, title, text, percent=True, each=name != "kept")
        ]
        if charts:
            sections.append({"title": _place(table, found), "charts": charts})
    telling = {
        record.label
        for table in found
        for record in table.records
        if any(series(record, name) for name in PSEUDO)
    }
    silent = [label for label in study.labels if label not in telling]
    return {"sections": sections, "silent": silent}


def _chart_list(
    study: Study,
    table: Table,
    key: str,
    title: str,
    text: str,
    *,
    percent: bool = False,
    each: bool = False,
) -> list[Chart]:
    """One chart of the means over seeds, behind them each seed; nothing where no run has logged the quantity."""
    factor = 100 if percent else 1
    lines = []
    for i, label in enumerate(study.labels):
        runs = {
            record.job.name: values
            for record in table.records
            if record.label == label and (values := [(x, factor * y) for x, y in series(record, key)])
        }
        if each and len(runs) > 1:
            lines += [Line(name, i, values, faint=True) for name, values in runs.items()]
        if mean := mean_series(list(runs.values())):
            lines.append(Line(label, i, mean, markers=each and len(mean) <= 16))
    unit = " %" if percent else ""
    zero = not percent or key in FROM_ZERO
    return [Chart(title, text, Markup(line_chart(lines, title, unit, zero=zero)))] if lines else []


# Classes


def _classes(study: Study, table: Table, found: Sequence[Table], gallery: Gallery | str) -> dict[str, Any]:
    figures = class_figures(study, table)
    labels = [row.label for row in table.rows if row.n]
    colors = {} if isinstance(gallery, str) else dict(zip(gallery.classes, gallery.palette, strict=True))
    gains = any(gain for entry in figures for gain in entry.gain.values())
    charts = []
    if figures:
        name = "IoU by class, percent"
        iou = [DotRow(entry.name, _class_dots(study, entry.iou)) for entry in figures]
        charts.append(Chart(name, "Best weights, mean over seeds.", Markup(dot_chart(iou, name, "percent"))))
    if gains:
        name = f"Gain by class over {_over(study)}"
        rows = [DotRow(entry.name, _class_dots(study, entry.gain)) for entry in figures]
        drawing = dot_chart(rows, name, "points", zero=study.one_baseline or SEVERAL)
        charts.append(Chart(name, "Points of IoU, mean over seeds with the same seed.", Markup(drawing)))
    return {
        "title": _place(table, found),
        "caption": f"IoU in percent, best weights, mean over seeds. {heading(table)}.",
        "labels": [(label, _number(study, label)) for label in labels],
        "rows": [_class_row(entry, labels, colors) for entry in figures],
        "gains": gains,
        "charts": charts,
        "many": len(figures) > FEW_CLASSES,
    }


def _class_dots(study: Study, values: Mapping[str, Stat | None]) -> list[Dot]:
    return [
        Dot(label, _number(study, label), 100 * value.mean)
        for label, value in values.items()
        if value is not None
    ]


def _class_row(entry: ClassFigures, labels: Sequence[str], colors: Mapping[str, Uint8]) -> dict[str, Any]:
    cells = []
    for label in labels:
        iou, gain = entry.iou.get(label), entry.gain.get(label)
        cells.append({
            "label": label,
            "iou": DASH if iou is None else f"{100 * iou.mean:.1f}",
            "iou_value": "" if iou is None else iou.mean,
            "iou_heat": 0.0 if iou is None else round(0.55 * iou.mean, 3),
            "gain": "" if gain is None else f"{100 * gain.mean:+.1f}",
            "gain_value": "" if gain is None else gain.mean,
            "gain_heat": 0.0 if gain is None else round(0.55 * min(1.0, abs(gain.mean) / HEAT_REACH), 3),
            "above": gain is not None and gain.mean >= 0,
            "title": "" if gain is None else f"{points(gain)} points",
        })  # fmt: skip
    swatch = f"rgb{_rgb(colors[entry.name])}" if entry.name in colors else ""
    return {"name": entry.name, "swatch": swatch, "cells": cells}


# Pictures


def _rgb(color: Sequence[int] | Uint8) -> str:
    return "(" + ",".join(str(int(value)) for value in color) + ")"


def _pictures(gallery: Gallery, study: Study) -> dict[str, Any]:
    entries = [
        (name, f"rgb{_rgb(color)}") for name, color in zip(gallery.classes, gallery.palette, strict=True)
    ]
    if any((picture.truth == 255).any() for picture in gallery.pictures):
        entries.append(("not counted", f"rgb{_rgb(IGNORED_COLOR)}"))
    shots = []
    for picture, tiles in zip(gallery.pictures, all_tiles(gallery), strict=True):
        methods = []
        for label in picture.predictions:
            figure = _share(picture.iou[label])
            if label != gallery.baseline:
                figure += f" ({_signed(picture.iou[label] - picture.iou[gallery.baseline])})"
            methods.append({
                "label": label,
                "style": _number(study, label),
                "figure": figure,
                "prediction": Markup(tiles.predictions[label]),
                "errors": Markup(tiles.errors[label]),
            })  # fmt: skip
        shots.append({
            "id": picture.id,
            "group": GROUPS[picture.group],
            "short": picture.group,
            "gain": _signed(picture.gain),
            "width": tiles.width,
            "height": tiles.height,
            "photo": Markup(tiles.photo),
            "truth": Markup(tiles.truth),
            "methods": methods,
        })  # fmt: skip
    absent = [title for group, title in GROUPS.items() if not any(p.group == group for p in gallery.pictures)]
    return {
        "rule": _rule(gallery),
        "notes": gallery.notes,
        "shots": shots,
        "absent": absent,
        "legend": entries,
        "many": len(entries) > FEW_CLASSES,
    }


def _share(value: float) -> str:
    return f"{100 * value:.1f} %" if value == value else DASH  # noqa: PLR0124  (NaN: no pixel is counted)


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}" if value == value else DASH  # noqa: PLR0124


def _rule(gallery: Gallery) -> str:
    """How the images were chosen."""
    compared = (
        f"all {gallery.total} evaluation images"
        if gallery.scored == gallery.total
        else f"{gallery.scored} of the {gallery.total} evaluation images, evenly spread"
    )
    judged = ", ".join(f"'{label}'" for label in gallery.judged)
    who = judged if len(gallery.judged) == 1 else f"the mean of {judged}"
    seeds = sorted(set(gallery.seeds.values()))
    shown = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
    low = f"the lowest mIoU of '{gallery.best}' among the rest, " if gallery.worst else ""
    return (
        f"The same evaluation images for every method ({shown}, best weights, split {gallery.split or 'unknown'}). An "
        "image's mIoU is over the classes that it shows. Chosen by rule, not by hand: the largest gain and the largest "
        f"loss of {who} against '{gallery.baseline}' in an image's mIoU, over {compared}, {low}and a random draw "
        "(seed 0) among the others."
    )


# Reproduction


def _reproduce(records: Sequence[Record], source: str, plan: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "commands": "\n".join(command_line(record) for record in records),
        "header": RUN_HEADER,
        "runs": [run_cells(record) for record in records],
        "environments": _environments(records),
        "source": source,
        "configs": _configs(records),
        "deviations": _deviations(records),
        "differences": _differences(plan),
        "shared": _dump(plan["shared"]) if plan.get("shared") else "",
    }


def _dump(content: Any) -> str:
    return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def _grouped(pairs: Sequence[tuple[Record, str]]) -> list[tuple[str, list[Record]]]:
    """(text, records) of equal texts, in the order of their first."""
    groups: dict[str, list[Record]] = {}
    for record, text in pairs:
        groups.setdefault(text, []).append(record)
    return list(groups.items())


def _names(records: Sequence[Record]) -> str:
    """`CPS seeds 0, 1; U2PL on random/6 seed 2`."""
    seeds: dict[str, list[str]] = {}
    for record in records:
        seeds.setdefault(_method_name(record), []).append(str(record.job.seed))
    return "; ".join(
        f"{name} {'seed' if len(own) == 1 else 'seeds'} {', '.join(own)}" for name, own in seeds.items()
    )


def _method_name(record: Record) -> str:
    return f"{record.label}{f' on {record.job.split}' if record.job.split else ''}"


def _environments(records: Sequence[Record]) -> list[tuple[str, str]]:
    """(title, facts), once for the runs that agree apart from their command."""
    pairs = []
    for record in records:
        facts = {key: value for key, value in record.environment.items() if key != "command"}
        if facts:
            pairs.append((record, json.dumps(facts, sort_keys=True)))
    groups = _grouped(pairs)
    return [
        (f"Environment of {'all runs' if len(groups) == 1 else _names(runs)}", _dump(json.loads(text)))
        for text, runs in groups
    ]


def _configs(records: Sequence[Record]) -> list[tuple[str, str]]:
    """(title, resolved configuration), once for the seeds of a method that differ in nothing else."""
    pairs = []
    for record in records:
        if record.config:
            run = {k: v for k, v in (record.config.get("run") or {}).items() if k not in ("seed", "dir")}
            facts = [_method_name(record), {**record.config, "run": run}]
            pairs.append((record, json.dumps(facts, sort_keys=True, default=str)))
    return [(f"Configuration of {_names(runs)}", _dump(runs[0].config)) for _, runs in _grouped(pairs)]


def _deviations(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """(methods, what differs from the paper): changes to the published file, and what the runs have said."""
    pairs = []
    for record in records:
        changes = [text for text in record.job.overrides if not text.startswith(("run.dir=", "run.seed="))]
        lines = [*(f"changed: {text}" for text in changes), *record.deviations]
        if lines:
            pairs.append((record, json.dumps(lines)))
    return [
        (", ".join(dict.fromkeys(map(_method_name, runs))), list(map(str, json.loads(text))))
        for text, runs in _grouped(pairs)
    ]


def _differences(plan: Mapping[str, Any]) -> list[str]:
    """Where the methods do not agree, from the study's plan."""
    lines = []
    for entry in plan.get("differences") or []:
        values = entry.get("values") or {}
        told = "; ".join(f"{label}: {value}" for label, value in values.items())
        place = f" on {entry['split']}" if entry.get("split") else ""
        lines.append(f"{entry.get('what', '')}{place}: {told}")
    return lines
