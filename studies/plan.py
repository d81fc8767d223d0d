"""What a study's file amounts to: resolved configurations, the budget, and whether the comparison is a matched one."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common.config import plan_batch, to_dict
from common.data.dataset_yaml import load_spec
from common.data.split import find_split
from common.distributed import Dist
from common.errors import UserError
from common.models.encoders import GenericConfig
from common.run.log import write_json
from splits.make import make
from studies.study import PLACE_KEYS, PLAN_NAME, Job, Study, config_module, jobs, resolve
from tools.environment import config_hash

BUDGET_TOLERANCE = 0.01  # how far whole epochs may miss the budget
SECTIONS = ("data", "model", "optim", "eval")  # of a configuration, compared between the methods
MATTERS = {  # what a matched comparison holds equal, and where a configuration says it
    "dataset": "data.dataset",
    "split": "data.split",
    "resize": "data.resize",
    "crop": "data.crop_size",
    "scale range": "data.scale_range",
    "flip": "data.flip",
    "rotation": "data.rotation",
    "blur": "data.blur",
    "network": "model.network",
    "decoder": "model.decoder",
    "backbone": "model.backbone",
    "weights": "model.weights",
    "width": "model.width",
    "batch": "optim.batch_size",
    "optimizer": "optim.optimizer",
    "rate": "optim.lr",
    "rate of heads": "optim.head_lr_factor",
    "weight decay": "optim.weight_decay",
    "schedule": "optim.schedule",
    "measured on": "eval.list",
    "protocol": "eval.protocol",
}
EVERY = "all methods"
NOT_COMPARED = (  # places, reading, and what the entries 'steps' and 'evaluations' say better
    "data.root", "data.workers", "data.cache", "data.on_error", "optim.epochs", "optim.steps", "optim.device_batch",
    "optim.paper_processes", "eval.every_epochs", "eval.every_steps", "eval.network",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run as it will be started.

    Attributes:
        job: the run.
        cfg: its configuration.
        hash: that of the configuration, as its `result.json` will tell it.
    """

    job: Job
    cfg: Any
    hash: str


@dataclass(frozen=True)
class Plan:
    """All runs of a study and what they have in common; see the docstring of `studies.study`.

    Attributes:
        study: what was asked for.
        runs: in the order in which they are started.
        steps: optimizer steps by split and label; None where the lists of images are not at hand.
        budget: overrides by split and label.
        shared: by split, what all methods agree on.
        differences: where they do not.
        deviations: changes to the projects' configurations.
    """

    study: Study
    runs: tuple[Run, ...]
    steps: dict[str, dict[str, int | None]]
    budget: dict[str, dict[str, tuple[str, ...]]]
    shared: dict[str, dict[str, Any]] = field(default_factory=dict)
    differences: tuple[dict[str, Any], ...] = ()
    deviations: tuple[dict[str, Any], ...] = ()


def make_plan(study: Study, out: Path) -> Plan:
    """Resolve every configuration and compare them.

    Raises:
        UserError: a mistake in a configuration, or a budget that a method cannot meet; names the run.
    """
    lengths: dict[str, int] = {}
    budget = _budget(study, out, lengths) if study.budget_steps is not None else {}
    runs = []
    for job in jobs(study, out, budget):
        cfg = resolve(job)
        runs.append(Run(job, cfg, config_hash(cfg)))
    plan = Plan(study, tuple(runs), {}, budget, deviations=tuple(_deviations(study)))
    if study.mode != "matched":
        return plan
    first = [run for run in runs if run.job.seed == study.seeds[0]]
    steps: dict[str, dict[str, int | None]] = {}
    for run in first:
        steps.setdefault(run.job.split, {})[run.job.method.label] = total_steps(run.cfg, run.job, lengths)
    shared: dict[str, dict[str, Any]] = {}
    differences: list[dict[str, Any]] = []
    for split in study.splits or ("",):
        here = [run for run in first if run.job.split == split]
        shared[split], found = compare({run.job.method.label: _facts(run, steps[split]) for run in here})
        differences += [{"split": split, **entry} for entry in found]
    _require_matched(study, differences)
    return replace(plan, steps=steps, shared=shared, differences=tuple(differences))


def _require_matched(study: Study, differences: Sequence[Mapping[str, Any]]) -> None:
    for entry in differences:
        if entry["matters"] and entry["what"] not in study.exceptions:
            raise UserError(
                f"{study.name}: a matched comparison holds '{entry['what']}' equal, which is "
                f"{grouped(entry['values'])}; change the configurations, or add it to 'exceptions' of the study, "
                "which the report prints"
            )
    unknown = [name for name in study.exceptions if name not in (*MATTERS, "steps")]
    if unknown:
        raise UserError(f"{study.name}: exceptions: {unknown[0]!r}; known: {', '.join((*MATTERS, 'steps'))}")


# The numbers of masks


def draw_fractions(study: Study, out: Path) -> None:
    """Draw the splits of `fractions` that are not there yet, as `python -m splits make` does.

    Raises:
        UserError: a mistake in a configuration, or more masks asked for than there are.
    """
    if not study.fractions:
        return
    for job in jobs(replace(study, seeds=study.seeds[:1]), out, {}):
        cfg = resolve(job)
        spec = load_spec(cfg.data.dataset, cfg.data.root)
        if not job.split or spec.generator:
            continue
        try:
            find_split(spec, job.split)
        except UserError:
            try:
                make(spec, job.split.rsplit("/", 1)[-1], 0, None, force=False)
            except UserError as error:
                raise UserError(
                    f"{study.name}: 'fractions': {str(error).removeprefix('--fraction ')}"
                ) from None


# The budget


def _budget(study: Study, out: Path, known: dict[str, int]) -> dict[str, dict[str, tuple[str, ...]]]:
    """What brings every method to the budget, by split and label."""
    assert study.budget_steps is not None
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for split in study.splits or ("",):
        todo = [job for job in jobs(replace(study, seeds=study.seeds[:1]), out, {}) if job.split == split]
        configs = [resolve(job) for job in todo]
        lengths = [
            None if hasattr(cfg.optim, "steps") else steps_per_epoch(cfg, job, known)
            for job, cfg in zip(todo, configs, strict=True)
        ]
        steps = common_steps(study.budget_steps, [length for length in lengths if length is not None])
        found[split] = {}
        for job, cfg, length in zip(todo, configs, lengths, strict=True):
            missed = 0 if length is None else abs(_whole(steps, length) - study.budget_steps)
            if length and missed > _allowed(study.budget_steps) and "steps" not in study.exceptions:
                below, above = (
                    study.budget_steps // length * length,
                    math.ceil(study.budget_steps / length) * length,
                )
                raise UserError(
                    f"run '{job.method.label}': budget_steps={study.budget_steps}: an epoch on data.split="
                    f"{cfg.data.split} has {length} steps, and whole epochs do not come within {BUDGET_TOLERANCE:.0%}; "
                    f"use {f'{below} or ' if below else ''}{above}, or another optim.batch_size"
                )
            phases = getattr(config_module(job), "PHASES", ())
            found[split][job.method.label] = budget_overrides(cfg, steps, study.evaluations, length, phases)
    return found


def common_steps(budget: int, lengths: Sequence[int]) -> int:
    """The number of steps near the budget that whole epochs of all these lengths come closest to.

    It is a whole number of the longest epochs, if one lies within the tolerance.
    """
    longest = max(lengths, default=1)
    low, high = (budget - _allowed(budget), budget + _allowed(budget))
    near = [n * longest for n in range(max(1, math.ceil(low / longest)), math.floor(high / longest) + 1)]

    def misses(steps: int) -> tuple[int, int]:
        return max((abs(_whole(steps, length) - steps) for length in lengths), default=0), abs(steps - budget)

    return min(near, key=misses, default=budget)


def fits(budget: int, length: int) -> bool:
    """Whether whole epochs of this length come close enough to a budget."""
    return abs(_whole(budget, length) - budget) <= _allowed(budget)


def _allowed(budget: int) -> float:
    return BUDGET_TOLERANCE * budget


def _whole(steps: int, length: int) -> int:
    """The nearest number of steps that is a whole number of epochs, at least one."""
    return max(1, round(steps / length)) * length


def budget_overrides(
    cfg: Any, steps: int, evaluations: int, length: int | None, phases: Sequence[str] = ()
) -> tuple[str, ...]:
    """Overrides that make a run take `steps` optimizer steps with about as many evaluations as asked for.

    Args:
        cfg: The configuration as it stands.
        steps: Of the whole run.
        evaluations: While training.
        length: Steps of an epoch; None for a configuration that counts steps itself.
        phases: Dotted keys of numbers of epochs that keep their share of the run.
    """
    if length is None:  # rounds of equally many steps
        rounds = next(n for n in range(min(evaluations, steps), 0, -1) if steps % n == 0)
        return (f"optim.steps={steps}", f"optim.epochs={rounds}", "eval.every_epochs=1")
    epochs = _whole(steps, length) // length
    found = [f"optim.epochs={epochs}", f"eval.every_epochs={math.ceil(epochs / evaluations)}"]
    if getattr(cfg.eval, "every_steps", 0):
        found.append("eval.every_steps=0")  # no evaluations within the epochs
    for key in phases:
        value = _value(cfg, key)
        moved = max(1, round(value * epochs / cfg.optim.epochs)) if value else value
        if moved != value:
            found.append(f"{key}={moved}")
    return tuple(found)


def steps_per_epoch(cfg: Any, job: Job, known: dict[str, int]) -> int:
    """Optimizer steps of an epoch, as the project's own loaders give them.

    Args:
        cfg: Configuration of the run.
        job: The run.
        known: Answers that were found before, which the budget and the comparison share.

    Raises:
        UserError: lists or data are missing.
    """
    tree = {
        name: value for name, value in to_dict(cfg).items() if name not in ("optim", "eval", "run", "expect")
    }
    batch = [cfg.optim.batch_size, cfg.optim.device_batch, cfg.run.seed, job.processes]
    key = json.dumps([job.method.project, batch, tree])
    if key not in known:
        module = importlib.import_module(f"projects.{job.method.project}.data")
        dist = Dist(world_size=job.processes)
        data = module.build_training_data(cfg, dist, plan_batch(cfg.optim, job.processes))
        with contextlib.closing(data):
            known[key] = int(data.steps_per_epoch)
    return known[key]


def total_steps(cfg: Any, job: Job, known: dict[str, int]) -> int | None:
    """Optimizer steps of a run; None where its lists are not at hand, which the run itself will say better."""
    optim = getattr(cfg, "optim", None)
    if optim is None:
        return None
    if hasattr(optim, "steps"):
        return int(optim.steps)
    try:
        return steps_per_epoch(cfg, job, known) * int(optim.epochs)
    except UserError:
        return None


# The comparison


def _facts(run: Run, steps: Mapping[str, int | None]) -> dict[str, Any]:
    """What is compared of a run: the entries of `MATTERS`, steps, evaluations, and the other shared settings."""
    tree = to_dict(run.cfg)
    flat = {key: value for key, value in _flat(tree).items() if key.split(".")[0] in SECTIONS}
    if flat.get("model.network") == "generic":
        read = {f"model.{key}" for key in GenericConfig.READS}
        flat = {key: value for key, value in flat.items() if key[:6] != "model." or key in read}
    else:
        flat["model.network"] = getattr(
            config_module(run.job), "NETWORK", f"that of {run.job.method.project}"
        )
    facts = {name: flat.pop(key) for name, key in MATTERS.items() if key in flat}
    taken = steps[run.job.method.label]
    if taken is not None:
        facts["steps"] = taken
    every = flat.get("eval.every_epochs")
    if every is not None:
        epochs = flat["optim.epochs"]
        facts["evaluations"] = math.ceil(epochs / every) if every else 1
    return facts | {key: value for key, value in flat.items() if key not in NOT_COMPARED}


def compare(facts: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What all methods that have a setting agree on, and the settings on which they differ.

    Args:
        facts: By label, settings by name; a setting of one method alone is its own affair.
    """
    shared: dict[str, Any] = {}
    differences = []
    for key in dict.fromkeys(key for one in facts.values() for key in one):
        values = {label: one[key] for label, one in facts.items() if key in one}
        if len(values) < min(2, len(facts)):
            continue
        if len({json.dumps(value) for value in values.values()}) == 1:
            shared[key] = next(iter(values.values()))
        else:
            matters = _spread(values) > BUDGET_TOLERANCE if key == "steps" else key in MATTERS
            differences.append({"what": key, "matters": matters, "values": values})
    return shared, sorted(differences, key=lambda entry: not entry["matters"])


def _spread(values: Mapping[str, int]) -> float:
    return (max(values.values()) - min(values.values())) / max(values.values())


def _deviations(study: Study) -> list[dict[str, Any]]:
    """Changes to the configurations of the projects, places apart; once where they are the same everywhere."""
    found = []
    shared = _changes(study.overrides)
    if shared:
        found.append({"label": EVERY, "split": "", "overrides": shared})
    for method in study.runs:
        splits = [split for split in study.splits or ("",) if method in study.methods_on(split)]
        changes = {split: _changes(method.overrides_of(split)) for split in splits}
        if len({tuple(one) for one in changes.values()}) == 1:
            changes = {"": changes[splits[0]]}
        found += [
            {"label": method.label, "split": split, "overrides": one} for split, one in changes.items() if one
        ]
    return found


def _changes(overrides: Sequence[str]) -> list[str]:
    return [one for one in overrides if not one.startswith(PLACE_KEYS)]


def _flat(tree: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{where}{key}.")
        else:
            flat[f"{where}{key}"] = value
    return flat


def _value(cfg: Any, key: str) -> Any:
    """The value of a dotted key; None where a section of it is switched off."""
    for part in key.split("."):
        cfg = None if cfg is None else getattr(cfg, part)
    return cfg


# What is said and kept


def describe(plan: Plan) -> list[str]:
    """The comparison in words, one line each: what is equal, what is not, what deviates."""
    lines = []
    for split, shared in plan.shared.items():
        where = f"on {split}: " if split else ""
        names = [key for key in (*MATTERS, "steps", "evaluations") if shared.get(key) is not None]
        equal = [f"{key} {_text(shared[key])}" for key in names]
        lines.append(f"matched: {where}all methods have {', '.join(equal)}")
    places: dict[str, list[str]] = {}
    for entry in plan.differences:
        kind = "exception" if entry["matters"] else "difference"
        text = f"{entry['what']}: {grouped(entry['values'])}"
        places.setdefault(f"{kind}{{where}}: {text}", []).append(entry["split"])
    for line, splits in places.items():
        lines.append(line.replace("{where}", f" on {', '.join(splits)}" if any(splits) else "", 1))
    for entry in plan.deviations:
        where = f" on {entry['split']}" if entry["split"] else ""
        lines.append(f"changed: {entry['label']}{where}: {' '.join(entry['overrides'])}")
    return lines


def grouped(values: Mapping[str, Any]) -> str:
    """Values with the labels that have them: `588 (A, B); 600 (C)`."""
    labels: dict[str, list[str]] = {}
    for label, value in values.items():
        labels.setdefault(_text(value), []).append(label)
    return "; ".join(f"{value} ({', '.join(names)})" for value, names in labels.items())


def _text(value: Any) -> str:
    if isinstance(value, list) and value:
        return "x".join(map(str, value)) if len(value) == 2 else ", ".join(map(str, value))
    return "none" if value in (None, []) else str(value)


def plan_tree(plan: Plan, out: Path) -> dict[str, Any]:
    """The content of `study.json`."""
    return {
        "format": 1,
        "name": plan.study.name,
        "mode": plan.study.mode,
        "budget_steps": plan.study.budget_steps,
        "steps": plan.steps,
        "budget": plan.budget,
        "shared": plan.shared,
        "differences": list(plan.differences),
        "deviations": list(plan.deviations),
        "runs": [
            {
                "name": run.job.name,
                "label": run.job.method.label,
                "project": run.job.method.project,
                "split": run.job.split,
                "seed": run.job.seed,
                "folder": run.job.run_dir.relative_to(out).as_posix(),
                "config": run.job.config,
                "command": run.job.command,
                "config_hash": run.hash,
                "expect": to_dict(run.cfg).get("expect"),
            }
            for run in plan.runs
        ],
    }


def save_plan(plan: Plan, out: Path) -> None:
    """Write `study.json`.

    Raises:
        UserError: the folder cannot be written.
    """
    write_json(out / PLAN_NAME, plan_tree(plan, out))
