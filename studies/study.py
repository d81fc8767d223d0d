"""What a study is: the YAML file, and the training runs that follow from it.

Beside its runs a study's folder holds `study.yaml` (the file as given), `study.json` (what was made of it, written
before anything starts) and `outcomes.json` (how each run ended last, by its name). `study.json`; a split is "" where
the study names none:

    {"format": 1, "name": ..., "mode": "matched", "budget_steps": null,
     "steps": {split: {label: 588}},                        null where the lists are not at hand
     "budget": {split: {label: ["optim.epochs=12", ...]}},  what the budget has made of each configuration
     "shared": {split: {"batch": 8, ...}},                  what all methods agree on
     "differences": [{"split", "what", "matters", "values": {label: value}}],  where they do not; `matters`: it is one
                                                            of the things that a matched comparison holds equal
     "deviations": [{"label", "split", "overrides": [...]}],  changes to a configuration of the project
     "runs": [{"name", "label", "project", "split", "seed", "folder", "config", "command", "config_hash", "expect"}]}

`folder` is relative to the study's; `command` is started in `projects/<project>`; `expect` is that section of the
configuration (the paper's figure). `outcomes.json`: {name: {"status": "finished" | "finished before" | "stopped" |
"failed", "message": ..., "seconds": ..., "at": "2026-01-31T12:00:00+00:00"}}.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.config import Count, Natural, Positive, Seed, load_config
from common.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
FILE_NAME = "study.yaml"
PLAN_NAME = "study.json"
OUTCOMES_NAME = "outcomes.json"
DEVIATION = "deviation from the paper: "  # what a run says in train.log before each of them
PREDICTIONS = "predictions"  # folder of the masks that the report chooses pictures from
HERE = "{root}"  # in overrides and names of configurations: this repository's folder, for paths of one's own
FRACTION = "{fraction}"  # in the name of a configuration: the last part of the split's name

MODES = {
    "matched": "matched: the same images, network, weights, optimizer, rates, batch, crop, augmentation of labeled "
    "images, steps and seeds for every method",
    "as_published": "as published: every method by its paper's own recipe",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitChanges:
    """Changes to a method's configuration on one split.

    Attributes:
        split: one of the study's `splits`.
        overrides: `section.key=value`, after the method's own.
    """

    split: str
    overrides: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One row of the table.

    Attributes:
        label: its name in tables and pictures.
        project: folder below `projects/`.
        config: configuration file, relative to the project's folder; `{fraction}` in it stands for the last part of
            the split's name, such as 366 of `classic/366`, and `{root}` for the folder of the repository.
        overrides: `section.key=value` changes to it; with `{root}` too.
        splits: those of the study's splits that it is trained on; empty for all.
        by_split: further changes on single splits.
        baseline: label of the run that its gain is measured against, where that is not the study's: papers whose
            networks differ each have a supervised run of their own.
    """

    label: str
    project: str
    config: str
    overrides: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    by_split: tuple[SplitChanges, ...] = ()
    baseline: str | None = None

    @property
    def folder(self) -> str:
        """The label as a folder name."""
        return folder_name(self.label) or "run"

    def config_of(self, split: str) -> str:
        """The configuration file for a split ("" where the study names none)."""
        return self.config.replace(FRACTION, split.rsplit("/", 1)[-1])

    def overrides_of(self, split: str) -> tuple[str, ...]:
        """The method's own changes on a split."""
        extra = [change for entry in self.by_split if entry.split == split for change in entry.overrides]
        return (*self.overrides, *extra)


@dataclass(frozen=True, kw_only=True, slots=True)
class Slurm:
    """What a run asks of a Slurm cluster.

    Attributes:
        partition: of the cluster; None for its default.
        hours: longest time of one run; one that needs more is requeued and continues.
        memory_gb: of the host, per run.
        gpus: per run.
        cpus: per run.
        at_once: runs of the array at the same time.
        account, constraint: as the cluster names them; None for none.
    """

    partition: str | None = None
    hours: Positive = 24.0
    memory_gb: Count = 32
    gpus: Natural = 1
    cpus: Count = 4
    at_once: Count = 16
    account: str | None = None
    constraint: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """Methods x splits x seeds.

    Attributes:
        name: title of the report.
        runs: the methods.
        seeds: every method is trained once with each.
        splits: values of `data.split`, every method is trained on each; empty leaves each configuration its own. As
            published, they choose the configuration by its `{fraction}`, which keeps its own `data.split`.
        fractions: instead of `splits`, numbers of masks to train with: `[8, 16, all]`. A number is the split
            `random/<number>`, drawn where it is not there yet; `all` the split of each configuration. Matched only.
        baseline: label of the method that gains are measured against; pictures too are chosen by it.
        mode: how the comparison is meant; named in every title.
        overrides: `section.key=value` changes shared by all runs; a method's own come after them. As published, only
            those that leave the recipe as it is (`run.*`, place and reading of the data).
        budget_steps: optimizer steps of every run (matched only); each project's epochs and their phases follow from
            it. None leaves them as configured.
        evaluations: evaluations while training, with `budget_steps`: the best of more would be an advantage.
        out: folder of the runs and the report, relative to the repository; None takes `runs/<name>`.
        slots: runs trained at the same time.
        gpus: numbers of the GPUs that runs are given, one run each; empty leaves the choice to the runs. A number
            given twice takes two runs.
        processes: processes of each run; with `gpus`, as many of them per run.
        threads: CPU threads of each run; None shares the cores among the slots.
        slurm: what runs ask for when the study is handed to a cluster.
        pictures: evaluation images shown per group (largest gain, largest loss, random); 0 for none.
        records: folder, relative to the repository, where finished runs are kept as small records; what is there is
            not run again. None keeps none.
        exceptions: what a matched comparison may leave unequal, by the names of `studies.plan.MATTERS`; printed above
            the tables.
    """

    name: str
    runs: tuple[Method, ...]
    seeds: tuple[Seed, ...] = (0,)
    splits: tuple[str, ...] = ()
    fractions: tuple[Any, ...] = ()
    baseline: str
    mode: Literal["matched", "as_published"] = "matched"
    overrides: tuple[str, ...] = ()
    budget_steps: Count | None = None
    evaluations: Count = 10
    out: str | None = None
    slots: Count = 1
    gpus: tuple[int, ...] = ()
    processes: Count = 1
    threads: Count | None = None
    slurm: Slurm | None = None
    pictures: Natural = 3
    records: str | None = None
    exceptions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.fractions:
            object.__setattr__(self, "splits", self._splits_of_fractions())
        if not self.runs or not self.seeds:
            raise ValueError("'runs' and 'seeds' need at least one entry each")
        labels = [method.label for method in self.runs]
        if len({method.folder for method in self.runs}) < len(labels):
            raise ValueError(
                f"'runs' has labels that are too alike ({', '.join(labels)}); make them distinct"
            )
        if self.baseline not in labels:
            raise ValueError(f"'baseline' is {self.baseline!r}; expected one of {', '.join(labels)}")
        self._check_baselines()
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"'seeds' is {list(self.seeds)}; expected each seed once")
        self._check_splits()
        self._check_mode()
        self._check_gpus()

    def _splits_of_fractions(self) -> tuple[str, ...]:
        for one in self.fractions:
            if one != "all" and not (type(one) is int and one > 0):
                raise ValueError(f"'fractions' has {one!r}; expected numbers of masks, 1 or more, or all")
        names = tuple("" if one == "all" else f"random/{one}" for one in self.fractions)
        if self.mode != "matched" or self.splits not in ((), names):
            raise ValueError("'fractions' goes with mode matched and without 'splits'; leave one of them out")
        return names

    def _check_baselines(self) -> None:
        labels = [method.label for method in self.runs]
        for method in self.runs:
            own = method.baseline
            if own is not None and own not in labels:
                raise ValueError(
                    f"run '{method.label}' has the baseline {own!r}; expected one of {', '.join(labels)}"
                )
            if own is not None and method.label in self.baselines:
                raise ValueError(
                    f"run '{method.label}' is a baseline itself; take its own 'baseline: {own}' out"
                )

    def _check_splits(self) -> None:
        if len({folder_name(split) for split in self.splits}) < len(self.splits):
            raise ValueError(f"'splits' is {list(self.splits)}; expected names that differ")
        for method in self.runs:
            named = [*method.splits, *(entry.split for entry in method.by_split)]
            foreign = [split for split in named if split not in self.splits]
            if foreign:
                raise ValueError(
                    f"run '{method.label}' names the split {foreign[0]!r}; expected one of "
                    f"{', '.join(self.splits) or 'none, for the study names no splits'}"
                )
            if FRACTION in method.config and not self.splits:
                raise ValueError(
                    f"run '{method.label}' has {FRACTION} in 'config', but the study has no 'splits'; add them"
                )

    def _check_mode(self) -> None:
        if self.mode != "as_published":
            return
        if self.exceptions:
            raise ValueError("'exceptions' goes with mode matched; as published, nothing is held equal")
        if self.budget_steps is not None:
            raise ValueError(
                "'budget_steps' goes with mode matched; as published, each paper sets its own steps"
            )
        for method in self.runs:
            several = len(method.splits or self.splits) > 1
            if several and FRACTION not in method.config:
                raise ValueError(
                    f"run '{method.label}' would be the same on every split: as published, 'config' needs {FRACTION} "
                    "in its name; or use mode matched"
                )
        for override in self.overrides:
            if not override.startswith(PLACE_KEYS):
                raise ValueError(
                    f"'overrides' has {override!r}, which changes the recipe of every paper; as published, only "
                    f"{', '.join(PLACE_KEYS)} may be shared; use mode matched"
                )

    def _check_gpus(self) -> None:
        if not self.gpus:
            return
        if min(self.gpus) < 0:
            raise ValueError(f"'gpus' is {list(self.gpus)}; expected numbers from 0 on")
        if self.slots != 1:
            raise ValueError("'slots' and 'gpus' were both given; the GPUs are the slots, leave 'slots' out")
        if len(self.gpus) % self.processes:
            raise ValueError(
                f"'gpus' has {len(self.gpus)} entries; expected a multiple of 'processes' ({self.processes})"
            )

    @property
    def labels(self) -> list[str]:
        """Labels of all methods, the baseline first."""
        others = [method.label for method in self.runs if method.label != self.baseline]
        return [self.baseline, *others]

    @property
    def baselines(self) -> list[str]:
        """Labels that gains are measured against, the study's own first."""
        named = [method.baseline for method in self.runs if method.baseline is not None]
        return list(dict.fromkeys([self.baseline, *named]))

    @property
    def one_baseline(self) -> str | None:
        """The label that all gains are measured against; None where methods have baselines of their own."""
        return self.baseline if len(self.baselines) == 1 else None

    def baseline_of(self, label: str) -> str | None:
        """The label that the gain of a method is measured against; None of a baseline."""
        if label in self.baselines:
            return None
        own = next((method.baseline for method in self.runs if method.label == label), None)
        return own or self.baseline

    @property
    def meaning(self) -> str:
        """The mode in words, with what is not equal."""
        return MODES[self.mode] + (f"; except: {', '.join(self.exceptions)}" if self.exceptions else "")

    @property
    def title(self) -> str:
        """Name and mode."""
        return f"{self.name} ({self.mode.replace('_', ' ')})"

    def methods_on(self, split: str) -> list[Method]:
        """The methods trained on a split, in the order of the file."""
        return [method for method in self.runs if not method.splits or split in method.splits]


PLACE_KEYS = ("run.", "data.root=", "data.workers=", "data.cache=", "data.on_error=", "optim.device_batch=")


def folder_name(text: str) -> str:
    """A label or the name of a split as the name of a folder: small letters, digits and underscores."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One training run.

    Attributes:
        method: the row it belongs to.
        seed: of the run.
        split: the study's name of its split; "" where the study names none.
        run_dir: where it writes.
        config: configuration file, relative to the project's folder.
        overrides: everything after the configuration file on its command line.
        processes: of the run.
    """

    method: Method
    seed: int
    split: str = ""
    run_dir: Path
    config: str
    overrides: tuple[str, ...]
    processes: int = 1

    @property
    def name(self) -> str:
        """Label, split where the study names any, and seed."""
        place = f" on {self.split}" if self.split else ""
        return f"{self.method.label}{place} seed {self.seed}"

    @property
    def folder(self) -> Path:
        """The project's folder."""
        return ROOT / "projects" / self.method.project

    def prediction_folder(self, out: Path) -> str:
        """Name of the folder of its predictions, from its place below the study's folder."""
        return "_".join(self.run_dir.relative_to(out).parts)

    @property
    def command(self) -> list[str]:
        """The command, to be started in the project's folder; port 0 lets the launcher pick a free one."""
        return ["sh", "train.sh", str(self.processes), "0", self.config, *self.overrides]


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
    return ROOT / "runs" / (folder_name(study.name) or "study")


Budget = Mapping[str, Mapping[str, Sequence[str]]]


def jobs(study: Study, out: Path, budget: Budget | None = None) -> list[Job]:
    """All runs of a study below the folder `out`, seed by seed and split by split, so that comparisons finish first.

    A run writes to `out/<method>/seed<N>`, with the split's folder before the method's where the study names splits.

    Args:
        study: The study.
        out: Its folder.
        budget: Overrides by split and label that bring the runs to `budget_steps`; None takes those of `study.json`.
    """
    if budget is None:
        plan = read_plan(out)
        budget = plan.get("budget") or {} if plan.get("budget_steps") == study.budget_steps else {}
    return [
        _job(study, method, split, seed, out, budget.get(split, {}).get(method.label, ()))
        for seed in study.seeds
        for split in study.splits or ("",)
        for method in study.methods_on(split)
    ]


def read_plan(out: Path) -> dict[str, Any]:
    """The content of `study.json`; empty where it is absent or damaged."""
    try:
        plan = json.loads((out / PLAN_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return plan if isinstance(plan, dict) else {}


def _job(study: Study, method: Method, split: str, seed: int, out: Path, budget: Sequence[str]) -> Job:
    place = out / folder_name(split) if split else out
    run_dir = place / method.folder / f"seed{seed}"
    chosen = (f"data.split={split}",) if split and study.mode == "matched" else ()
    overrides = (
        *study.overrides,
        *chosen,
        *method.overrides_of(split),
        *budget,
        f"run.dir={_from_project(run_dir, method.project)}",
        f"run.seed={seed}",
    )
    return Job(
        method=method,
        seed=seed,
        split=split,
        run_dir=run_dir,
        config=method.config_of(split).replace(HERE, str(ROOT)),
        overrides=tuple(one.replace(HERE, str(ROOT)) for one in overrides),
        processes=study.processes,
    )


def _from_project(run_dir: Path, project: str) -> str:
    """The run directory as the command line names it: relative inside the repository, so that it holds anywhere."""
    inside = run_dir.is_relative_to(ROOT)
    return os.path.relpath(run_dir, ROOT / "projects" / project) if inside else str(run_dir)


def config_module(job: Job) -> Any:
    """The project's module `config`.

    Raises:
        UserError: no such project.
    """
    module = f"projects.{job.method.project}.config"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and not module.startswith(error.name):
            raise
        known: Sequence[str] = sorted(path.parent.name for path in ROOT.glob("projects/*/config.py"))
        raise UserError(
            f"run '{job.method.label}': no project '{job.method.project}'; known: {', '.join(known)}"
        ) from None


def resolve(job: Job, config: Path | None = None) -> Any:
    """The typed configuration of a run, exactly as its training script will build it.

    Args:
        job: The run.
        config: Another file to read in place of the command's, without overrides, such as a run's `config.yaml`.

    Raises:
        UserError: no such project or configuration, or a mistake in it.
    """
    cls = config_module(job).Config
    if config is not None:
        return load_config(cls, config)
    path = job.folder / job.config
    try:
        return load_config(cls, path, job.overrides)
    except UserError as error:
        raise UserError(f"run '{job.method.label}': {error}") from None
