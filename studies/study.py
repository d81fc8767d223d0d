"""What a study is: the YAML file, and the training runs that follow from it."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.config import load_config
from common.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
FILE_NAME = "study.yaml"

MODES = {
    "matched": "matched: the same images, network, batch, steps and seeds for every method",
    "as_published": "as published: every method by its paper's own recipe",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One row of the table.

    Attributes:
        label: its name in tables and pictures.
        project: folder below `projects/`.
        config: configuration file, relative to the project's folder.
        overrides: `section.key=value` changes to it.
    """

    label: str
    project: str
    config: str
    overrides: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """The label as a folder name."""
        return re.sub(r"[^a-z0-9]+", "_", self.label.lower()).strip("_") or "run"


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """Methods x seeds.

    Attributes:
        name: title of the report.
        runs: the methods.
        seeds: every method is trained once with each.
        baseline: label of the method that gains are measured against.
        mode: how the comparison is meant; named in every title.
        overrides: `section.key=value` changes shared by all runs; a method's own come after them.
        out: folder of the runs and the report, relative to the repository; None takes `runs/<name>`.
        slots: runs trained at the same time.
        threads: CPU threads of each run; None shares the cores among the slots.
        pictures: evaluation images shown per group (largest gain, largest loss, random).
    """

    name: str
    runs: tuple[Method, ...]
    seeds: tuple[int, ...] = (0,)
    baseline: str
    mode: Literal["matched", "as_published"] = "matched"
    overrides: tuple[str, ...] = ()
    out: str | None = None
    slots: int = 1
    threads: int | None = None
    pictures: int = 3

    def __post_init__(self) -> None:
        if not self.runs or not self.seeds:
            raise ValueError("'runs' and 'seeds' need at least one entry each")
        labels = [method.label for method in self.runs]
        if len({method.folder for method in self.runs}) < len(labels):
            raise ValueError(
                f"'runs' has labels that are too alike ({', '.join(labels)}); make them distinct"
            )
        if self.baseline not in labels:
            raise ValueError(f"'baseline' is {self.baseline!r}; expected one of {', '.join(labels)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"'seeds' is {list(self.seeds)}; expected each seed once")
        for key in ("slots", "threads", "pictures"):
            value = getattr(self, key)
            if value is not None and value < (0 if key == "pictures" else 1):
                raise ValueError(f"'{key}' is {value}; expected 1 or more")

    @property
    def labels(self) -> list[str]:
        """Labels of all methods, the baseline first."""
        others = [method.label for method in self.runs if method.label != self.baseline]
        return [self.baseline, *others]

    @property
    def title(self) -> str:
        """Name and mode."""
        return f"{self.name} ({self.mode.replace('_', ' ')})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One training run.

    Attributes:
        method: the row it belongs to.
        seed: of the run.
        run_dir: where it writes.
        overrides: everything after the configuration file on its command line.
    """

    method: Method
    seed: int
    run_dir: Path
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        """Label and seed."""
        return f"{self.method.label} seed {self.seed}"

    @property
    def folder(self) -> Path:
        """The project's folder."""
        return ROOT / "projects" / self.method.project

    @property
    def command(self) -> list[str]:
        """The command, to be started in the project's folder; port 0 lets the launcher pick a free one."""
        return ["sh", "train.sh", "1", "0", self.method.config, *self.overrides]


def load_study(path: str | Path) -> Study:
    """The study of a YAML file.

    Raises:
        UserError: the file or a value in it is wrong; one line that names it.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such study; give a YAML file such as studies/shapes_demo.yaml")
    return load_config(Study, path)


def output_folder(study: Study, out: str | Path | None = None) -> Path:
    """Where the study writes: `out`, else the one its file names, else `runs/<name>` in the repository."""
    if out is not None:
        return Path(out).resolve()
    if study.out is not None:
        return (ROOT / study.out).resolve()
    return ROOT / "runs" / (re.sub(r"[^a-z0-9]+", "_", study.name.lower()).strip("_") or "study")


def jobs(study: Study, out: Path) -> list[Job]:
    """All runs of a study below the folder `out`, seed by seed, so that whole comparisons finish first."""
    found = []
    for seed in study.seeds:
        for method in study.runs:
            run_dir = out / method.folder / f"seed{seed}"
            overrides = (
                *study.overrides,
                *method.overrides,
                f"run.dir={_from_project(run_dir, method.project)}",
                f"run.seed={seed}",
            )
            found.append(Job(method=method, seed=seed, run_dir=run_dir, overrides=overrides))
    return found


def _from_project(run_dir: Path, project: str) -> str:
    """The run directory as the command line names it: relative inside the repository, so that it holds anywhere."""
    inside = run_dir.is_relative_to(ROOT)
    return os.path.relpath(run_dir, ROOT / "projects" / project) if inside else str(run_dir)


def resolve(job: Job, config: Path | None = None) -> Any:
    """The typed configuration of a run, exactly as its training script will build it.

    Args:
        job: The run.
        config: Another file to read in place of the command's, without overrides, such as a run's `config.yaml`.

    Raises:
        UserError: no such project or configuration, or a mistake in it.
    """
    module = f"projects.{job.method.project}.config"
    try:
        cls = importlib.import_module(module).Config
    except ModuleNotFoundError as error:
        if error.name and not module.startswith(error.name):
            raise
        known: Sequence[str] = sorted(path.parent.name for path in ROOT.glob("projects/*/config.py"))
        raise UserError(
            f"run '{job.method.label}': no project '{job.method.project}'; known: {', '.join(known)}"
        ) from None
    if config is not None:
        return load_config(cls, config)
    path = job.folder / job.method.config
    try:
        return load_config(cls, path, job.overrides)
    except UserError as error:
        raise UserError(f"run '{job.method.label}': {error}") from None
