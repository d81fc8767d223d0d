"""Finished runs as small records that a repository can hold, so that days of training survive the machine.

A record is what the report reads of a run: result, figures while training, configuration, environment, deviations from
the paper, and the predicted masks of the photos that the report chooses from. No weights, no photos and no places of
the machine.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from common.errors import writing
from studies.study import DEVIATION, PREDICTIONS, ROOT, Job, Study

COPIED = ("result.json", "metrics.jsonl", "env.json")


def keep(study: Study, out: Path, job: Job) -> None:
    """Copy what is small of a finished run, and its predictions as far as they are made, into `study.records`.

    Raises:
        UserError: the folder cannot be written.
    """
    if study.records is None:
        return
    target, predictions = _places(study, out, job)
    with writing(target, "correct 'records' of the study"):
        target.mkdir(parents=True, exist_ok=True)
        for name in COPIED:
            shutil.copyfile(job.run_dir / name, target / name)
        config = yaml.safe_load((job.run_dir / "config.yaml").read_text(encoding="utf-8"))
        config["data"]["root"], config["run"]["dir"] = None, None
        (target / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        lines = (job.run_dir / "train.log").read_text(encoding="utf-8").splitlines(keepends=True)
        (target / "train.log").write_text(
            "".join(line for line in lines if DEVIATION in line), encoding="utf-8"
        )
        if predictions.is_dir():
            no_photos = shutil.ignore_patterns("*_overlay.*")  # large, and not for everyone to pass on
            shutil.copytree(predictions, target / PREDICTIONS, ignore=no_photos, dirs_exist_ok=True)


def recorded(study: Study, out: Path, job: Job) -> Path:
    """Folder in which the result of a run is to be found: its own once it has been started here, else its record."""
    if study.records is None or job.run_dir.exists():
        return job.run_dir
    return _places(study, out, job)[0]


def bring_back(study: Study, out: Path, job: Job) -> None:
    """Put the record of a run where the run itself would be, unless that has been started here."""
    source = recorded(study, out, job)
    if source != job.run_dir and (source / "result.json").is_file():
        shutil.copytree(source, job.run_dir, ignore=shutil.ignore_patterns(PREDICTIONS))
        if (source / PREDICTIONS).is_dir():
            predictions = _places(study, out, job)[1]
            shutil.copytree(source / PREDICTIONS, predictions, dirs_exist_ok=True)


def _places(study: Study, out: Path, job: Job) -> tuple[Path, Path]:
    """Folder of the record, and folder of the predictions below `out`."""
    assert study.records is not None
    return ROOT / study.records / job.run_dir.relative_to(out), out / PREDICTIONS / job.prediction_folder(out)
