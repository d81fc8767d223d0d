"""What a study says in plain words: the first sentences of its report."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence

from common.run.log import duration
from studies.pictures import Gallery
from studies.study import Study
from studies.table import Row, Table, Winner, class_figures, winner

WORST = 3  # classes and photos that are named
MORE = 10  # masks, in the question what more of them would bring


def answers(study: Study, found: Sequence[Table], gallery: Gallery | str) -> list[tuple[str, str]]:
    """(question, answer) pairs: what somebody wants to know of a study; nothing where no run has finished.

    Args:
        study: The study.
        found: Its tables.
        gallery: Its pictures, which tell the worst photos.
    """
    best = winner(found)
    if best is None:
        return []
    told = [
        ("Which method is best?", _best(best)),
        ("Is the gain real?", _real(study, best.row)),
        ("How much room is there?", _room(best.table, found)),
        ("What does it cost?", _cost(best)),
        ("Where does it fail?", _fails(study, best, gallery)),
        ("What would more masks bring?", _more_masks(best.row.label, found)),
    ]
    return [(question, answer) for question, answer in told if answer]


def how_to_use(folder: str) -> str:
    """The command that predicts with the winner of the study in a folder."""
    return f"python -m studies use {shlex.quote(folder)} --input PHOTOS --out MASKS"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _best(best: Winner) -> str:
    row = best.row
    assert row.best is not None, "a finished run has figures"
    seeds = "one run" if row.n == 1 else f"the mean of {row.n} runs"
    text = f"{row.label}, with {_percent(row.best.mean)} mIoU ({seeds})"
    gain = row.gain_best
    if not row.baseline:
        text += ". It is the baseline: no method with unlabeled photos did better"
    elif gain is not None:
        between = ""
        if gain.interval is not None:
            low, high = (f"{100 * end:+.1f}" for end in gain.interval)
            between = f" (95 % interval {low} to {high})"
        text += f", {100 * gain.mean:+.1f} points against '{row.baseline}'{between}"
    data = best.record.config.get("data") or {}
    images = (best.record.result or {}).get("list")
    flattering = "; the method and its weights were chosen by these photos, so the figure flatters a little"
    where = f"Measured on the '{images}' list" + (flattering if images == data.get("val", "val") else "")
    return f"{text}. {where}."


def _real(study: Study, row: Row) -> str:
    gain = row.gain_best
    if gain is None:
        return ""
    if gain.n == 1:
        return "One run of each cannot tell: it may be chance. Add seeds to the study, three or more."
    if not gain.certain:
        return f"Not shown: the 95 % interval over {gain.n} seeds includes zero. More seeds tell."
    rivals = len(study.labels) - len(study.baselines)
    picked = (
        f", though it is the best of {rivals} methods, for which the interval is not widened"
        if rivals > 1
        else ""
    )
    side = "Yes" if gain.mean > 0 else "It is a loss, and not by chance"
    return f"{side}: the 95 % interval over {gain.n} seeds excludes zero{picked}."


def _room(table: Table, found: Sequence[Table]) -> str:
    """What a run with the masks of all photos gains: methods that guess those masks can hardly bring more."""
    base = next((row for row in table.rows if not row.baseline and row.best is not None), None)
    every = [
        (row.best.mean, row.label)
        for one in found
        if one.apart and one.labeled and not one.unlabeled and _measured_alike(one, table)
        for row in one.rows
        if row.best is not None
    ]
    if base is None or base.best is None or not every:
        return ""
    bound, label = max(every)
    return (
        f"With the masks of all photos ('{label}') mIoU is {_percent(bound)}, {100 * (bound - base.best.mean):+.1f} "
        f"points against '{base.label}' after as many steps. Methods that have to guess those masks can hardly bring "
        "more; where that is little, train longer or label other scenes."
    )


def _measured_alike(one: Table, other: Table) -> bool:
    if one.key is None or other.key is None:
        return False
    return (one.key.images, one.key.protocol) == (other.key.images, other.key.protocol)


def _cost(best: Winner) -> str:
    row = best.row
    if row.seconds is None:
        return ""
    text = f"{duration(row.seconds)} of training per run"
    base = next((one for one in best.table.rows if one.label == row.baseline), None)
    if base is not None and base.seconds:
        text += (
            f", {row.seconds / base.seconds:.1f} times as long as '{base.label}' ({duration(base.seconds)})"
        )
    if row.peak_memory is not None:
        text += f"; {row.peak_memory / 2**30:.1f} GiB of memory"
    return text + "."


def _fails(study: Study, best: Winner, gallery: Gallery | str) -> str:
    figures = [(entry.name, entry.iou.get(best.row.label)) for entry in class_figures(study, best.table)]
    known = sorted((iou.mean, name) for name, iou in figures if iou is not None)
    parts = [f"Lowest IoU by class: {', '.join(f'{name} {_percent(iou)}' for iou, name in known[:WORST])}."]
    if isinstance(gallery, Gallery) and gallery.worst:
        named = ", ".join(f"{name} {_percent(iou)}" for name, iou in gallery.worst[:WORST])
        parts.append(f"Lowest mIoU by photo: {named}.")
    return " ".join(parts) if known else ""


def _more_masks(label: str, found: Sequence[Table]) -> str:
    """The curve over the numbers of labeled photos, and where it leads if it goes on as between the last two."""
    curve = sorted(
        (table.labeled, row.best.mean)
        for table in found
        for row in table.rows
        if not table.apart and table.labeled and row.label == label and row.best is not None
    )
    if len(curve) < 2 or curve[-2][0] == curve[-1][0]:
        return ""
    told = ", ".join(f"{count} masks {_percent(miou)}" for count, miou in curve)
    (few, low), (many, high) = curve[-2:]
    slope = (high - low) / math.log(many / few)
    more = 100 * slope * math.log((many + MORE) / many)
    if more < 0.1:
        return f"{label}: {told}. From {few} to {many} masks it did not grow: others than more of the same are needed."
    return f"{label}: {told}. If it goes on as between the last two, {MORE} more masks bring about {more:.1f} points."
