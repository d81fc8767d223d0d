"""Begin a study of own photos, run one, report on it, or use what has won.

python -m studies begin mydata/dataset.yaml --hours 2
python -m studies run FILE.yaml [--out DIR] [--slots N | --gpus 0,1 | --submit slurm] [--dry-run] [--report]
python -m studies report DIR
python -m studies use FILE.yaml|DIR --input PHOTOS --out MASKS [--as labelme|coco|cvat] [--first N]
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import get_args

from common.errors import UserError, run_main
from common.run.log import duration
from studies.annotations import Kind
from studies.begin import begin
from studies.cluster import run_on_cluster
from studies.node import require_submitit
from studies.plan import draw_fractions, make_plan
from studies.report import report
from studies.run import Outcome, Write, run_study, save_study, say, show_commands
from studies.study import FILE_NAME, Study, load_study, output_folder
from studies.use import use


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


def adjusted(study: Study, slots: int | None, gpus: str | None) -> Study:
    """The study with the places that the command line names.

    Raises:
        UserError: not numbers, out of range, or both given.
    """
    if slots is not None and gpus is not None:
        raise UserError("--slots and --gpus: give one of them; the GPUs are the slots")
    if slots is not None and slots < 1:
        raise UserError(f"--slots={slots}: expected 1 or more")
    if slots is not None:
        return dataclasses.replace(study, slots=slots, gpus=())
    if gpus is None:
        return study
    try:
        return dataclasses.replace(study, slots=1, gpus=tuple(int(number) for number in gpus.split(",")))
    except ValueError as error:
        why = "expected numbers such as 0,1" if "literal" in str(error) else str(error)
        raise UserError(f"--gpus={gpus}: {why}") from None


def main(argv: Sequence[str]) -> int:
    """Read the command line and do as it says."""
    parser = argparse.ArgumentParser(prog="python -m studies", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    beginner = commands.add_parser("begin", help="write a study of own photos that fits into some hours")
    beginner.add_argument("dataset", type=Path, help="dataset.yaml, as 'python -m splits init' writes it")
    beginner.add_argument("--hours", type=float, default=2.0, help="that it should take here (default: 2)")
    run = commands.add_parser("run", help="train what is missing of a study")
    run.add_argument("file", type=Path, help="YAML file, see the folder 'studies'")
    run.add_argument("--out", type=Path, help="folder of runs and report; default: named in the file")
    run.add_argument("--slots", type=int, help="runs at the same time; default: named in the file")
    run.add_argument("--gpus", help="GPUs that runs are given, one each: 0,1; default: named in the file")
    run.add_argument(
        "--submit",
        choices=("slurm", "local"),
        help="hand the runs to Slurm as an array and wait; 'local' tries that way out on this machine",
    )
    run.add_argument("--dry-run", action="store_true", help="only print the commands")
    run.add_argument("--report", action="store_true", help="report afterwards, also if a run has failed")
    reporter = commands.add_parser("report", help="write summary.md, summary.csv and report.html")
    reporter.add_argument("folder", type=Path, help="folder of a study")
    user = commands.add_parser("use", help="predict photos with the winner, and say which to annotate next")
    user.add_argument("study", type=Path, help="YAML file or folder of a study that was run")
    user.add_argument("--input", type=Path, required=True, help="folder of photos, photo, or list of photos")
    user.add_argument(
        "--out", type=Path, required=True, help="folder of masks, overlays, confidence, next.csv"
    )
    user.add_argument("--as", dest="kind", choices=get_args(Kind), help="also write annotations to correct")
    words = "only those of the first N photos of next.csv; default: of all photos"
    user.add_argument("--first", type=int, metavar="N", help=words)
    args = parser.parse_args(argv)
    if args.command == "begin":
        begin(args.dataset, args.hours)
        return 0
    if args.command == "report":
        report(args.folder.resolve())
        return 0
    if args.command == "use":
        if args.first is not None and (args.kind is None or args.first < 1):
            raise UserError(f"--first {args.first}: a number of 1 or more that goes with --as")
        source = args.study / FILE_NAME if args.study.is_dir() else args.study
        study = load_study(source)
        folder = args.study.resolve() if args.study.is_dir() else output_folder(study)
        return use(study, folder, args.input, args.out, args.kind, args.first)
    study = adjusted(load_study(args.file), args.slots, args.gpus)
    out = output_folder(study, args.out)
    if args.dry_run:
        show_commands(study, out)
        return 0
    draw_fractions(study, out)
    plan = make_plan(study, out)  # mistakes are told before anything is written
    if args.submit:
        require_submitit()
    save_study(args.file, out)
    start = partial(run_on_cluster, cluster=args.submit) if args.submit else run_study
    outcomes = start(study, out, plan=plan)
    code = _conclude(outcomes, say)
    if args.report and not any(outcome.status == "stopped" for outcome in outcomes):
        report(out)
    return code


if __name__ == "__main__":
    run_main(main)
