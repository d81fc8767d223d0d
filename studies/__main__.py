"""Run a study or report on one.

python -m studies run FILE.yaml [--out DIR] [--slots N] [--dry-run] [--report]
python -m studies report DIR
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError, run_main
from common.runlog import duration
from studies.page import render
from studies.pictures import Gallery, Predict, contact_sheet, make_gallery, run_predict
from studies.run import Outcome, Write, run_study, save_study, say, show_commands
from studies.study import FILE_NAME, jobs, load_study, output_folder, resolve
from studies.table import load_records, percent, points, summary_csv, summary_markdown, tables


def report(out: Path, predict: Predict = run_predict, write: Write = say) -> None:
    """Write `summary.md`, `summary.csv` and `report.html` into `out`, and the result in words to the console.

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
    for note in [gallery] if isinstance(gallery, str) else gallery.notes:
        write(f"report: {note}")
    page = render(study, records, gallery, source.read_text(encoding="utf-8"))
    try:
        (out / "summary.md").write_text(summary_markdown(study, records), encoding="utf-8")
        (out / "summary.csv").write_text(summary_csv(study, records), encoding="utf-8")
        (out / "report.html").write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); check permissions and space") from None
    if isinstance(gallery, Gallery) and gallery.pictures:
        contact_sheet(gallery, out / "pictures.png")
    width = max(len(label) for label in [*study.labels, "report"])
    write("")
    for table in tables(study, records):
        write(table.caption if table.records else "no finished run yet")
        for row in table.rows:
            gain = f"   gain {points(row.gain_best, row.n)} points" if row.gain_best else ""
            write(f"  {row.label:<{width}}  mIoU best {percent(row.best)}  last {percent(row.last)}{gain}")
    write(f"  {'report':<{width}}  {_short(out / 'report.html')}")


def _short(path: Path) -> str:
    """The path from the working directory if it lies below it."""
    here = Path.cwd()
    return os.path.relpath(path, here) if path.is_relative_to(here) else str(path)


def _conclude(outcomes: Sequence[Outcome], write: Write) -> int:
    """List the runs that have not ended well; the exit code."""
    unfinished = [outcome for outcome in outcomes if outcome.status not in ("finished", "finished before")]
    trained = sum(outcome.seconds for outcome in outcomes)
    write(
        f"study: {len(outcomes) - len(unfinished)} of {len(outcomes)} runs finished, {duration(trained)} of training"
    )
    for outcome in unfinished:
        write(f"  {outcome.job.name}: {outcome.status}: {outcome.message}")
    return 1 if unfinished else 0


def main(argv: Sequence[str]) -> int:
    """Read the command line and do as it says."""
    parser = argparse.ArgumentParser(prog="python -m studies", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train what is missing of a study")
    run.add_argument("file", type=Path, help="YAML file, see the folder 'studies'")
    run.add_argument("--out", type=Path, help="folder of runs and report; default: named in the file")
    run.add_argument("--slots", type=int, help="runs at the same time; default: named in the file")
    run.add_argument("--dry-run", action="store_true", help="only print the commands")
    run.add_argument("--report", action="store_true", help="report afterwards, also if a run has failed")
    reporter = commands.add_parser("report", help="write summary.md, summary.csv and report.html")
    reporter.add_argument("folder", type=Path, help="folder of a study")
    args = parser.parse_args(argv)
    if args.command == "report":
        report(args.folder.resolve())
        return 0
    if args.slots is not None and args.slots < 1:
        raise UserError(f"--slots={args.slots}: expected 1 or more")
    study = load_study(args.file)
    out = output_folder(study, args.out)
    if args.dry_run:
        show_commands(study, out)
        return 0
    for job in jobs(study, out):
        resolve(job)  # mistakes are told before anything is written
    save_study(args.file, out)
    outcomes = run_study(study, out, slots=args.slots)
    code = _conclude(outcomes, say)
    if args.report and not any(outcome.status == "stopped" for outcome in outcomes):
        report(out)
    return code


if __name__ == "__main__":
    run_main(main)
