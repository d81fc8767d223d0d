"""Everything that `python -m studies report` writes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError, writing
from studies.answers import answers, how_to_use
from studies.page import render
from studies.pictures import Gallery, Predict, contact_sheet, make_gallery, run_predict
from studies.records import keep
from studies.run import Write, say
from studies.study import FILE_NAME, Study, load_study, read_plan
from studies.summary import classes_csv, heading, percent, points, runs_csv, summary_csv, summary_markdown
from studies.table import Table, load_records, tables


def report(out: Path, predict: Predict = run_predict, write: Write = say) -> None:
    """Write the report of a study into its folder, and the result in words to the console.

    The files are `summary.md`, `summary.csv` (methods), `runs.csv`, `classes.csv`, `report.html` and `pictures.png`.

    Raises:
        UserError: `out` holds no study, or cannot be written.
    """
    source = out / FILE_NAME
    if not source.is_file():
        raise UserError(
            f"{out}: holds no {FILE_NAME}; give the folder that 'python -m studies run' has written"
        )
    study = load_study(source)
    records = load_records(study, out)
    write("report: collecting predictions for the pictures")
    gallery = make_gallery(study, records, out, predict)
    for one in records:
        if one.result is not None:
            keep(study, out, one.job)
    for note in [gallery] if isinstance(gallery, str) else gallery.notes:
        write(f"report: {note}")
    found = tables(study, records)
    told = answers(study, found, gallery)
    texts = {
        "summary.md": summary_markdown(study, records, told),
        "summary.csv": summary_csv(study, records),
        "runs.csv": runs_csv(study, records),
        "classes.csv": classes_csv(study, records),
        "report.html": render(
            study, records, gallery, source.read_text(encoding="utf-8"), read_plan(out), _short(out)
        ),
    }
    with writing(out, "check permissions and space"):
        for name, text in texts.items():
            (out / name).write_text(text, encoding="utf-8")
    if isinstance(gallery, Gallery) and gallery.pictures:
        contact_sheet(gallery, out / "pictures.png")
    _say_result(study, found, told, out, write)


def _say_result(
    study: Study, found: Sequence[Table], told: Sequence[tuple[str, str]], out: Path, write: Write
) -> None:
    """Write the tables and the answers to the console, and where the report lies."""
    width = max(len(label) for label in [*study.labels, "report"])
    write("")
    for table in found:
        write(heading(table))
        for row in table.rows:
            gain = f"   gain {points(row.gain_best, row.n)} points" if row.gain_best else ""
            write(f"  {row.label:<{width}}  mIoU best {percent(row.best)}  last {percent(row.last)}{gain}")
            for reason in row.missing:
                write(f"  {'':<{width}}  {reason}")
    for question, answer in told:
        write(f"{question} {answer}")
    if told:
        write(f"use it: {how_to_use(_short(out))}")
    write(f"  {'report':<{width}}  {_short(out / 'report.html')}")


def _short(path: Path) -> str:
    """The path from the working directory if it lies below it."""
    here = Path.cwd()
    return os.path.relpath(path, here) if path.is_relative_to(here) else str(path)
