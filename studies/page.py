"""`report.html`: one file that opens from disk, without a network, in light and dark, wide and narrow."""

from __future__ import annotations

import base64
import io
import json
import shlex
from collections.abc import Sequence
from html import escape
from typing import Any

import cv2
import numpy as np
import yaml
from PIL import Image

from common.visualize import colorize
from studies.charts import Line, line_chart, sample
from studies.pictures import GROUPS, IGNORED_COLOR, Gallery, Picture, Uint8
from studies.study import MODES, Study
from studies.style import CSS, LIGHT, SCRIPT
from studies.table import (
    DASH,
    Record,
    Row,
    Stat,
    Table,
    columns,
    run_cells,
    sentence,
    stat,
    table_notes,
    tables,
)

LONGEST_SIDE = 420  # pixels of an embedded picture
WIDEST_PNG = 256  # photos up to this width are embedded without loss
FEW_CLASSES = 40  # more are folded away in legends

CURVES = {
    "miou": (
        "mIoU while training",
        "Measured on the evaluation images that are used during training.",
    ),
    "loss": ("Total loss", "The sum that training makes smaller."),
    "loss_sup": ("loss_sup", "Error on the labeled images."),
    "loss_unsup": ("loss_unsup", "Disagreement with the pseudo-labels of the unlabeled images."),
    "loss_contra": ("loss_contra", "Contrastive loss: pixels of a class should look alike, others unlike."),
    "kept": (
        "Pseudo-labels kept",
        "Share of unlabeled pixels whose pseudo-label was trusted enough to be used.",
    ),
}


def render(study: Study, records: Sequence[Record], gallery: Gallery | str, source: str) -> str:
    """The page as text.

    Args:
        study: What was asked for.
        records: Its runs.
        gallery: Pictures, or the reason why there are none.
        source: The study's YAML text.
    """
    found = tables(study, records)
    sections = {
        "Summary": _summary(study, found),
        "Pictures": _pictures(gallery, study),
        "Learning curves": _curves(study, records),
        "Classes": _classes(study, found, gallery),
        "How to reproduce": _reproduce(records, source),
    }
    links = "".join(f'<li><a href="#{_anchor(name)}">{name}</a></li>' for name in sections)
    body = "\n".join(
        f'<section id="{_anchor(name)}"><h2>{name}</h2>\n{text}\n</section>'
        for name, text in sections.items()
    )
    verdicts = "".join(f'<p class="verdict">{escape(text)}</p>' for text in verdict(study, found))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>{escape(study.title)}</title>
<style>{CSS}</style>
</head>
<body>
<a class="skip" href="#summary">Skip to the summary</a>
<header>
<h1>{escape(study.name)}</h1>
<p class="soft">Comparison {escape(MODES[study.mode])}.</p>
{verdicts}
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{body}
</main>
<footer>Made by <code>python -m studies report</code>. This page is complete in itself and loads nothing.</footer>
<dialog id="zoom" aria-label="Enlarged picture"><img alt=""/><div class="row"><p></p>
<span><button type="button" class="before">Previous</button> <button type="button" class="after">Next</button>
<button type="button" class="close">Close</button></span></div></dialog>
<script>{SCRIPT}</script>
</body>
</html>
"""


def verdict(study: Study, found: Sequence[Table]) -> list[str]:
    """The result in words: one sentence per method of the baseline's table."""
    rows = {row.label: row for row in found[0].rows} if found else {}
    baseline = rows.get(study.baseline)
    sentences = []
    for row in rows.values():
        if row.label == study.baseline or row.best is None or row.gain_best is None or baseline is None:
            continue
        difference = 100 * row.gain_best.mean
        side = f"{abs(difference):.1f} points {'above' if difference > 0 else 'below'}"
        runs = "one run each" if row.gain_best.n == 1 else f"mean of {row.gain_best.n} seeds"
        sentences.append(
            f"{row.label} reaches {100 * row.best.mean:.1f} % mIoU, "
            f"{side if abs(difference) >= 0.05 else 'level with'} '{study.baseline}' ({runs})."
        )
    return sentences or ["There is no finished pair of runs to compare yet."]


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _style(study: Study, label: str) -> int:
    return study.labels.index(label) % len(LIGHT)


def _summary(study: Study, found: Sequence[Table]) -> str:
    names = columns(found)
    parts = []
    for table in found:
        head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
        rows = "".join(f"<tr>{_cells(row, names)}</tr>" for row in table.rows)
        caption = sentence(table.caption) if table.records else "No finished run yet"
        parts.append(
            f'<div class="scroll"><table class="stack"><caption>{escape(caption)}</caption>'
            f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        )
    notes = list(table_notes(study, found))
    if len(study.seeds) == 1:
        notes.insert(0, "One run per method: a difference of a point or two can be chance. More seeds tell.")
    parts.append('<ul class="notes">' + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>")
    return "\n".join(parts)


def _cells(row: Row, names: dict[str, Any]) -> str:
    cells = []
    for name, cell in names.items():
        text = escape(cell(row))
        if name == "method":
            cells.append(f'<th scope="row">{text}</th>')
            continue
        side = ""
        if name.startswith("gain") and text[0] in "+-":
            side = ' class="up"' if text[0] == "+" else ' class="down"'
        cells.append(f'<td data-name="{escape(name)}"><span{side}>{text}</span></td>')
    return "".join(cells)


# Pictures


def data_uri(picture: Uint8, lossless: bool) -> str:
    """An RGB picture (H, W, 3) as a data URI, scaled down to `LONGEST_SIDE`; PNG if lossless, else JPEG."""
    height, width = picture.shape[:2]
    factor = LONGEST_SIDE / max(height, width)
    if factor < 1:
        size = (max(1, round(width * factor)), max(1, round(height * factor)))
        method = cv2.INTER_NEAREST if lossless else cv2.INTER_AREA
        picture = np.asarray(cv2.resize(picture, size, interpolation=method), np.uint8)
    file = io.BytesIO()
    image = Image.fromarray(picture)
    if lossless:
        image.save(file, "PNG", optimize=True)
    else:
        image.save(file, "JPEG", quality=85)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _pictures(gallery: Gallery | str, study: Study) -> str:
    if isinstance(gallery, str):
        return f"<p>{escape(gallery)}</p>"
    compared = (
        f"all {gallery.total} evaluation images"
        if gallery.scored == gallery.total
        else f"{gallery.scored} of the {gallery.total} evaluation images, evenly spread"
    )
    parts = [
        f"<p>The same evaluation images for every method (seed {gallery.seed}, best weights). The number below a "
        "prediction is the mIoU of that image alone, over the classes it shows. Chosen by the difference between "
        f"{escape(gallery.method)} and {escape(gallery.baseline)} over {compared}. Select a picture to enlarge it; "
        "the arrow keys then go through all of them.</p>",
        _legend(gallery),
    ]
    parts += [f"<p>{escape(note)}</p>" for note in gallery.notes]
    for group, title in GROUPS.items():
        chosen = [picture for picture in gallery.pictures if picture.group == group]
        if not chosen and study.pictures:
            parts.append(f"<h3>{escape(title.format(method=gallery.method))}</h3><p>On no image.</p>")
        elif chosen:
            parts.append(f"<h3>{escape(title.format(method=gallery.method))}</h3>")
            parts += [_shot(picture, gallery) for picture in chosen]
    return "\n".join(parts)


def _legend(gallery: Gallery) -> str:
    entries = [
        f'<li><span class="swatch" style="background:rgb{_rgb(color)}"></span>{escape(name)}</li>'
        for name, color in zip(gallery.classes, gallery.palette, strict=True)
    ]
    if any((picture.truth == 255).any() for picture in gallery.pictures):
        entries.append(
            f'<li><span class="swatch" style="background:rgb{_rgb(IGNORED_COLOR)}"></span>not counted</li>'
        )
    text = f'<ul class="legend soft" aria-label="Colours of the classes">{"".join(entries)}</ul>'
    if len(entries) <= FEW_CLASSES:
        return text
    return f"<details><summary>Colours of the {len(gallery.classes)} classes</summary>{text}</details>"


def _rgb(color: Sequence[int] | Uint8) -> str:
    return "(" + ",".join(str(int(value)) for value in color) + ")"


def _shot(picture: Picture, gallery: Gallery) -> str:
    photo = data_uri(picture.photo, lossless=picture.photo.shape[1] <= WIDEST_PNG)
    tiles = [_tile(photo, "photo", f"photo of image {picture.id}", False)]
    masks = {"truth": picture.truth, **picture.predictions}
    for label, mask in masks.items():
        uri = data_uri(colorize(mask, gallery.palette, IGNORED_COLOR), lossless=True)
        if label == "truth" and mask is picture.truth:
            tiles.append(_tile(uri, "truth", f"true classes of image {picture.id}", True))
            continue
        figure = f"{100 * picture.iou[label]:.1f} %"
        if label != gallery.baseline:
            gain = 100 * (picture.iou[label] - picture.iou[gallery.baseline])
            figure += f" ({gain:+.1f})"
        alternative = f"{label} on image {picture.id}: mIoU {figure}"
        tiles.append(_tile(uri, label, alternative, True, figure))
    return f'<div class="shot"><div class="shots">{"".join(tiles)}</div></div>'


def _tile(uri: str, name: str, alternative: str, mask: bool, figure: str = "") -> str:
    look = ' class="mask"' if mask else ""
    return (
        f'<figure><button type="button"><img src="{uri}" alt="{escape(alternative)}"{look}/></button>'
        f"<figcaption><b>{escape(name)}</b>{escape(figure)}</figcaption></figure>"
    )


# Curves and classes


def _curves(study: Study, records: Sequence[Record]) -> str:
    names = {key for record in records for line in record.metrics for key in line}
    losses = sorted(name for name in names if name.startswith("loss_"))
    wanted = [name for name in ("miou", "loss", *losses, "kept") if name in names]
    if not wanted:
        return "<p>No run has written figures yet.</p>"
    figures = []
    for name in wanted:
        percent = name in ("miou", "kept")
        lines = [
            Line(record.job.name, _style(study, record.label), values)
            for record in records
            if (values := [(float(entry["step"]), entry[name] * (100 if percent else 1))
                           for entry in record.metrics if isinstance(entry.get(name), int | float)])
        ]  # fmt: skip
        if not lines:
            continue
        title, text = CURVES.get(name, (name, "A term of the loss; the project's README explains it."))
        drawing = line_chart(lines, title, " %" if percent else "")
        figures.append(
            f'<figure class="card"><h3>{escape(title)}</h3><figcaption>{escape(text)}</figcaption>{drawing}</figure>'
        )
    legend = "".join(f"<li>{sample(_style(study, label))}{escape(label)}</li>" for label in study.labels)
    seeds = " One line per seed." if len(study.seeds) > 1 else ""
    return (
        f'<p>Every line is a training run.{seeds}</p><ul class="legend">{legend}</ul>'
        f'<div class="charts">{"".join(figures)}</div>'
    )


def _classes(study: Study, found: Sequence[Table], gallery: Gallery | str) -> str:
    if not found or not found[0].records:
        return "<p>No finished run yet.</p>"
    runs: dict[str, dict[int, dict[str, float]]] = {}
    for record in found[0].records:
        if record.result is not None:
            runs.setdefault(record.label, {})[record.job.seed] = record.result["best"]["iou"]
    baseline = runs.get(study.baseline, {})
    names = list(next(iter(next(iter(runs.values())).values())))
    colors = {} if isinstance(gallery, str) else dict(zip(gallery.classes, gallery.palette, strict=True))
    cards = []
    for name in names:
        swatch = (
            f'<span class="swatch" style="background:rgb{_rgb(colors[name])}"></span>'
            if name in colors
            else ""
        )
        bars = []
        for label, seeds in runs.items():
            mean = stat([iou[name] for iou in seeds.values()])
            gain = stat([iou[name] - baseline[seed][name] for seed, iou in seeds.items() if seed in baseline])
            bars.append(
                _bar(label, mean.mean if mean else 0.0, gain if label != study.baseline else None, study)
            )
        cards.append(f'<div class="card"><h3>{swatch}{escape(name)}</h3>{"".join(bars)}</div>')
    return (
        "<p>IoU of each class in percent (best weights, mean over seeds), and the gain in points over "
        f"'{escape(study.baseline)}' with the same seed. {escape(sentence(found[0].caption))}.</p>"
        f'<div class="classes">{"".join(cards)}</div>'
    )


def _bar(label: str, iou: float, gain: Stat | None, study: Study) -> str:
    shown = ""
    if gain is not None:
        side = "up" if gain.mean > 0 else "down"
        shown = f'<span class="figure {side}">{100 * gain.mean:+.1f}</span>'
    return (
        f'<div class="bar"><span class="name">{escape(label)}</span><span class="track">'
        f'<span class="fill s{_style(study, label)}" style="width:{100 * iou:.1f}%"></span></span>'
        f'<span class="figure">{100 * iou:.1f}</span>{shown}</div>'
    )


# Reproduction


def _reproduce(records: Sequence[Record], source: str) -> str:
    commands = "\n".join(
        f"(cd projects/{record.job.method.project} && {shlex.join(record.job.command)})" for record in records
    )
    header = ("run", "best", "last", "steps", "split", "config", "commit")
    head = "".join(f'<th scope="col">{name}</th>' for name in header)
    rows = []
    for record in records:
        first, *others = run_cells(record)
        cells = "".join(
            f'<td data-name="{name}">{escape(text)}</td>'
            for name, text in zip(header[1:], others, strict=True)
        )
        rows.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    return "\n".join([
        "<p>The commands, from the root of the repository at the commit named below:</p>",
        f"<pre>{escape(commands)}</pre>",
        '<div class="scroll"><table class="stack"><caption>Every run: mIoU in percent, and the first digits of the '
        f"hashes of its split and its configuration</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>",
        _environment(records),
        _folded("The study file", source),
        *(
            _folded(f"Configuration of {record.job.name}", yaml.safe_dump(record.config, sort_keys=False))
            for record in records
            if record.config
        ),
    ])  # fmt: skip


def _environment(records: Sequence[Record]) -> str:
    """The environment of the runs, once if they agree apart from their command."""
    groups: dict[str, list[str]] = {}
    for record in records:
        facts = {key: value for key, value in record.environment.items() if key != "command"}
        if facts:
            groups.setdefault(json.dumps(facts, sort_keys=True), []).append(record.job.name)
    parts = []
    for text, names in groups.items():
        title = "Environment of all runs" if len(groups) == 1 else f"Environment of {', '.join(names)}"
        parts.append(_folded(title, yaml.safe_dump(json.loads(text), sort_keys=False)))
    return "\n".join(parts) or f"<p>Environment: {DASH}</p>"


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
