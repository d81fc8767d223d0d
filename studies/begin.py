"""`python -m studies begin`: a study of own photos that fits into some hours, measured by dry runs on this machine.

Beside the `dataset.yaml` it writes `study.yaml`, a configuration per method in `configs/`, and the lists of the photos
to train on in `study/<number of masks>/`. Called again when there are more masks, it adds their number to the study.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import yaml
from PIL import Image

from common.config import build
from common.data.dataset_yaml import load_spec
from common.data.files import orientation, write_bytes
from common.data.lists import read_ids
from common.data.spec import DatasetSpec, Item
from common.errors import UserError
from common.run.log import duration
from splits.draw import draw
from splits.init.write import unused
from splits.make import training_lines
from studies.node import run_environment
from studies.plan import fits, make_plan, steps_per_epoch
from studies.run import Write, cores, say
from studies.study import FILE_NAME, ROOT, Study, folder_name, jobs, load_study, output_folder, resolve
from tools.launch import count_gpus

SHAPES = ((512, 8), (256, 4), (128, 4))  # side of the crop, batch; the first for GPUs
LONG = 2  # photos are shrunk to so many crops along their longer side
GRID = 32  # of the crop's sides, in pixels
EVALUATIONS = (
    5  # while training; the best and the last weights are measured after it, and the report predicts once
)
EPOCHS = (
    4  # of the photos without masks at least; where the time is too short for them, fewer photos are taken
)
ENOUGH = 500  # steps per run, before the time goes into more seeds, methods and numbers of masks
MOST = 4000  # steps per run
DEARER = 4  # times that a step of a method with unlabeled photos takes, before one is measured
USED = 0.85  # of the hours: the rest is for what is not measured
MEMORY = 0.7  # of what is free, for a run
FEWEST = 8  # masks of a split that shows what more of them bring
LOOKED_AT = 200  # photos whose sizes tell the crop
STEPS = 3  # of a dry run
FORECAST = re.compile(r"peak memory ([\d.]+) GiB per process, (\d+) ms per step")
SPLITS_LINE = re.compile(r"^splits: \[(.*)\]", flags=re.M)
STEPS_LINE = re.compile(r"^budget_steps: \d+", flags=re.M)
EXCEPTIONS_LINE = re.compile(r"^exceptions: \[\]", flags=re.M)


@dataclass(frozen=True)
class Candidate:
    """A method that may be compared: its row in the table, and changes to its project's `configs/own.yaml`."""

    label: str
    project: str
    changes: Mapping[str, Any] = field(default_factory=dict)


CANDIDATES = (  # the baseline, then what README.md recommends
    Candidate("supervised only", "u2pl", {"method": {"mode": "sup_only"}}),
    Candidate("mean teacher + CutMix", "proto_consistency", {"method": {"proto": None}}),
    Candidate("CPS + CutMix", "cps"),
    Candidate("UniMatch V2", "unimatch"),
    Candidate("U2PL", "u2pl"),
)
PLANS = ((2, 1, 1), (2, 3, 1), (3, 3, 1), (3, 3, 2), (3, 3, 3), (5, 3, 3))  # methods, seeds, numbers of masks


@dataclass(frozen=True)
class Shape:
    """What the networks see: size (height, width) of the shrunk photo or None, crop, batch, pixels of a whole photo."""

    resize: tuple[int, int] | None
    crop: tuple[int, int]
    batch: int
    pixels: float

    def __str__(self) -> str:
        """In words."""
        shrunk = "" if self.resize is None else f"photos shrunk to {self.resize[1]}x{self.resize[0]}, "
        return f"{shrunk}crops of {self.crop[1]}x{self.crop[0]}, batches of {self.batch}"

    def evaluation(self, step: float) -> float:
        """Seconds of an evaluated photo by those of a step of the baseline, a third of which is its forward pass."""
        return step / 3 * self.pixels / (self.batch * math.prod(self.crop))


@dataclass(frozen=True)
class Cost:
    """Seconds of a step of a method, and of what comes before the first one."""

    step: float
    start: float


@dataclass(frozen=True)
class Extent:
    """How much is trained: methods, seeds, numbers of masks, steps of each run."""

    methods: tuple[Candidate, ...]
    seeds: int
    sizes: tuple[int, ...]
    steps: int

    @property
    def runs(self) -> int:
        """Of each method."""
        return self.seeds * len(self.sizes)


class TooLargeError(Exception):
    """A dry run for which the memory is too small."""


def begin(dataset: Path, hours: float, write: Write = say) -> Path:
    """Write a study for a dataset, or add new masks to the one that is there; its file.

    Args:
        dataset: The `dataset.yaml`.
        hours: That the study should take, the report included.
        write: Receives what was decided, in lines.

    Raises:
        UserError: too few photos, or a dry run that has failed.
    """
    if not hours > 0:
        raise UserError(f"--hours {hours:g}: expected a positive number")
    spec, target = load_spec(str(dataset.resolve())), dataset.resolve().parent / FILE_NAME
    items = spec.read_list("train")
    masks = sum(item.label is not None for item in items)
    most = min(masks, len(items) // 2)  # an epoch is as long as the list without masks
    if most < 2:
        raise UserError(
            f"{dataset}: of {len(items)} photos to train on {masks} have masks; a study needs two with and two "
            "without: annotate or add photos, then start this again"
        )
    if most < masks:
        write(
            f"of {masks} masks {most} are used, for methods with unlabeled photos need as many without masks"
        )
    if target.exists():
        _extend(target, spec, most, write)
        return target
    sizes = (*(n for n in (FEWEST << i for i in range(20)) if 1.4 * n < most), most)
    with tempfile.TemporaryDirectory() as folder:
        trial = _Trial(spec, Path(folder), sizes, hours, write)
        shape, extent = trial.decide()
    extent = _write(target, spec, shape, extent, hours, write)
    seconds = trial.seconds(extent, shape)
    short = (
        f", more than {hours:g} hours: the photos or the time are too few" if seconds > 3600 * hours else ""
    )
    write(f"about {duration(seconds)} for {extent.runs * len(extent.methods)} runs and the report{short}")
    return target


# What the hours allow


class _Trial:
    """Dry runs of the methods on one list of photos, and what follows from their times."""

    def __init__(
        self, spec: DatasetSpec, folder: Path, sizes: tuple[int, ...], hours: float, write: Write
    ) -> None:
        self.spec, self.folder, self.sizes, self.write = spec, folder, sizes, write
        self.gpus = count_gpus()
        self.budget = USED * 3600 * hours * max(1, self.gpus)  # seconds of one place
        self.val = len(spec.read_list("val"))
        self.costs: dict[str, Cost] = {}
        for name, data in _lists(spec, sizes[-1], None).items():
            write_bytes(folder / name, data)

    def decide(self) -> tuple[Shape, Extent]:
        """The largest shape that memory and time allow, and what is trained in it.

        Raises:
            UserError: no shape fits into memory, or a dry run has failed.
        """
        photo = _usual_size(self.spec)
        shapes = [shape_for(photo, side, min(batch, self.sizes[0])) for side, batch in SHAPES]
        for shape in dict.fromkeys(shapes if self.gpus else shapes[1:]):
            self.costs.clear()
            try:
                base = self._measure(CANDIDATES[0], shape)
                other = Cost(DEARER * base.step, base.start)
                if shape != shapes[-1] and self._steps([base, other], 1, shape) < ENOUGH:
                    self.write(f"{shape}: too slow for so little time")
                    continue
                return shape, self._grow(shape)
            except TooLargeError as error:
                self.write(f"{shape}: {error}")
        raise UserError("the memory is too small for any method; end other programs, or use a larger machine")

    def _grow(self, shape: Shape) -> Extent:
        """Seeds, methods and numbers of masks, as many as leave every run enough steps."""
        found = None
        for count, seeds, numbers in PLANS:
            methods, sizes = CANDIDATES[:count], self.sizes[-numbers:]
            runs = seeds * len(sizes)
            hoped = [self.costs.get(one.label, self.costs[CANDIDATES[0].label]) for one in methods]
            if found is not None and self._steps(hoped, runs, shape) < ENOUGH:
                break
            try:
                costs = [self._measure(one, shape) for one in methods]
            except TooLargeError:
                if found is None:
                    raise
                break
            steps = self._steps(costs, runs, shape)
            if found is not None and steps < ENOUGH:
                break
            found = Extent(methods, seeds, sizes, min(steps, MOST))
        assert found is not None, "the first plan is always taken"
        return found

    def _steps(self, costs: Sequence[Cost], runs: int, shape: Shape) -> int:
        """Steps of every run that the time allows, where each method has so many runs."""
        fixed = runs * sum(self._fixed(cost, shape) for cost in costs)
        return max(1, int((self.budget - fixed) / (runs * sum(cost.step for cost in costs))))

    def _fixed(self, cost: Cost, shape: Shape) -> float:
        """Seconds of a run beside its steps: it starts twice, to train and to predict for the report."""
        base = self.costs[CANDIDATES[0].label]
        return 2 * cost.start + (EVALUATIONS + 3) * self.val * shape.evaluation(base.step)

    def seconds(self, extent: Extent, shape: Shape) -> float:
        """That training and report take."""
        costs = [self.costs[one.label] for one in extent.methods]
        each = sum(self._fixed(cost, shape) + extent.steps * cost.step for cost in costs)
        return extent.runs * each / max(1, self.gpus)

    def _measure(self, method: Candidate, shape: Shape) -> Cost:
        """What a method costs, by a dry run.

        Raises:
            TooLargeError: more memory than is free.
            UserError: the dry run has failed.
        """
        if method.label in self.costs:
            return self.costs[method.label]
        config = self.folder / f"{folder_name(method.label)}.yaml"
        write_bytes(config, configuration(method, self.spec, str(self.folder), shape))
        free = psutil.virtual_memory().available
        command = ["sh", "train.sh", "1", "0", str(config), "run.dry_run=true"]
        env = run_environment(os.environ, cores())
        began = time.monotonic()
        done = subprocess.run(command, cwd=ROOT / "projects" / method.project, env=env, stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, errors="replace", check=False)  # fmt: skip
        wall, found = time.monotonic() - began, FORECAST.search(done.stdout)
        if found is None:
            last = ["", *done.stdout.splitlines(), *done.stderr.splitlines()][-1]
            told = last.removeprefix("error: ") or f"exit code {done.returncode}"
            if "memory is too small" in told or done.returncode in (-9, 137):  # the system has ended it
                raise TooLargeError("the memory is too small")
            raise UserError(f"dry run of {method.label}: {told}")
        memory, step = float(found[1]) * 2**30, int(found[2]) / 1000
        if not self.gpus and memory > MEMORY * free:
            raise TooLargeError(
                f"{memory / 2**30:.1f} GiB of memory, of {free / 2**30:.1f} GiB that are free"
            )
        self.write(
            f"measured {method.label}: {step:.2f} s per step, {memory / 2**30:.1f} GiB of memory ({shape})"
        )
        self.costs[method.label] = Cost(step, max(0.0, wall - STEPS * step))
        return self.costs[method.label]


def _usual_size(spec: DatasetSpec) -> tuple[float, float]:
    """Height and width of the usual photo: the median of both, of photos turned as they are read."""
    items, sizes = spec.read_list("train"), []
    for item in items[:: len(items) // LOOKED_AT + 1]:
        with Image.open(item.image) as file:
            turned = spec.upright and orientation(file) >= 5
            sizes.append((file.width, file.height) if turned else (file.height, file.width))
    return statistics.median(h for h, _ in sizes), statistics.median(w for _, w in sizes)


def shape_for(photo: tuple[float, float], side: int, batch: int) -> Shape:
    """Crops of at most `side` of a photo (height, width), which is shrunk first where it is much larger."""
    factor = min(1.0, LONG * side / max(photo))
    height, width = (max(GRID, round(factor * length)) for length in photo)
    crop = [max(GRID, min(side, length) // GRID * GRID) for length in (height, width)]
    return Shape((height, width) if factor < 1 else None, (crop[0], crop[1]), batch, height * width)


# What is written


def configuration(method: Candidate, spec: DatasetSpec, split: str, shape: Shape) -> bytes:
    """The configuration of a method on a dataset: the project's own for own photos, with what was decided here."""
    tree: dict[str, Any] = {
        "base": str(ROOT / "projects" / method.project / "configs" / "own.yaml"),
        "data": {
            "dataset": str(spec.source),
            "split": split,
            "resize": None if shape.resize is None else list(shape.resize),
            "crop_size": list(shape.crop),
        },
        "optim": {"batch_size": shape.batch},
        **method.changes,
    }
    head = f"# {method.label} on {spec.name}: the settings of 'base' with these changes.\n"
    return (head + yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=110)).encode()


def _lists(spec: DatasetSpec, masks: int, without: int | None) -> dict[str, bytes]:
    """The lists of a split of so many masks, which contains those of fewer.

    Args:
        spec: The dataset.
        masks: Photos with masks.
        without: Photos to learn from without them, at most; None for all that are left.
    """
    drawn, lines = draw(spec, str(masks), 0), training_lines(spec)
    rest = drawn.unlabeled
    if without is not None and len(rest) > max(masks, without):
        rest = sorted(random.Random(0).sample(rest, max(masks, without)), key=lambda item: item.id)

    def text(items: Iterable[Item]) -> bytes:
        return "".join(f"{lines.get(item.id, item.id)}\n" for item in items).encode()

    return {"labeled.txt": text(drawn.labeled), "unlabeled.txt": text(rest)}


def _write_split(spec: DatasetSpec, masks: int, without: int, write: Write) -> str:
    """Write the lists of a split; its name."""
    texts, out = _lists(spec, masks, without), spec.source.parent
    folder = unused(out / "study" / str(masks), texts)
    for name, data in texts.items():
        write_bytes(folder / name, data)
    split = folder.relative_to(out).as_posix()
    write(f"split {split}: {masks} photos with masks, {texts['unlabeled.txt'].count(10)} without")
    return split


def _write(
    target: Path, spec: DatasetSpec, shape: Shape, extent: Extent, hours: float, write: Write
) -> Extent:
    """Write lists, configurations and, when all is there, the study; what it trains, in whole epochs."""
    out = target.parent
    without = extent.steps * shape.batch // EPOCHS
    splits = [_write_split(spec, size, without, write) for size in extent.sizes]
    texts = {
        f"{folder_name(one.label)}.yaml": configuration(one, spec, splits[-1], shape)
        for one in extent.methods
    }
    configs = unused(out / "configs", texts)
    for name, data in texts.items():
        write_bytes(configs / name, data)
    gpus = count_gpus()
    tree: dict[str, Any] = {
        "name": out.name, "baseline": CANDIDATES[0].label, "out": str(out / "runs"),
        "seeds": list(range(extent.seeds)), "splits": splits, "evaluations": EVALUATIONS, "exceptions": [],
        **({"gpus": list(range(gpus))} if gpus else {"slots": 1}), "overrides": ["run.panels=false"],
        "runs": [{"label": one.label, "project": one.project, "config": str(configs / f"{folder_name(one.label)}.yaml")}
                 for one in extent.methods],
    }  # fmt: skip
    steps, exact = budget(extent.steps, lengths(build(Study, tree), out / "runs"))
    tree |= {"budget_steps": steps, "exceptions": [] if exact else ["steps"]}
    make_plan(build(Study, tree), out / "runs")  # nothing is written that could not be trained
    lines = [
        f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in tree.items() if key != "runs"
    ]
    lines += ["runs:", *(f"  - {json.dumps(one, ensure_ascii=False)}" for one in tree["runs"])]
    head = f"# What is compared, for about {hours:g} hours on this machine; yours to change.\n"
    write_bytes(target, (head + "\n".join(lines) + "\n").encode())
    write(f"{target}: {', '.join(one.label for one in extent.methods)}; {extent.seeds} seed(s), "
          f"{' and '.join(map(str, extent.sizes))} masks, {steps} steps each; {shape}")  # fmt: skip
    if not exact:
        write("whole epochs do not meet in so few steps: those of the methods differ by more than 1 %")
    return replace(extent, steps=steps)


def lengths(study: Study, out: Path) -> set[int]:
    """Steps per epoch of the runs of a study, which begins with whole ones."""
    known: dict[str, int] = {}
    return {
        steps_per_epoch(resolve(job), job, known)
        for job in jobs(study, out, {})
        if job.seed == study.seeds[0]
    }


def budget(limit: int, epochs: Iterable[int]) -> tuple[int, bool]:
    """Steps near a limit that are whole epochs of all these lengths, and whether they are, within the tolerance.

    A teacher is used from the second epoch on, so that there are two at least.
    """
    longest = max(epochs)
    most = max(2, limit // longest)
    for count in range(most, max(1, most // 2), -1):
        if all(fits(count * longest, length) for length in epochs):
            return count * longest, True
    return most * longest, False


def _extend(target: Path, spec: DatasetSpec, masks: int, write: Write) -> None:
    """Add the split of all masks to a study where they have become more; the former file is kept as `.before`."""
    study = load_study(target)
    lists = [spec.splits_dir / split / "labeled.txt" for split in study.splits]
    known = max((len(read_ids(path)) for path in lists if path.is_file()), default=0)
    text = target.read_text(encoding="utf-8")
    if masks <= known or not SPLITS_LINE.search(text):
        write(f"{target}: kept as it is" + (", for no masks are new" if masks <= known else ""))
        return
    without = max(
        (len(read_ids(path.with_name("unlabeled.txt"))) for path in lists if path.is_file()), default=0
    )
    split = _write_split(spec, masks, without, write)
    text = SPLITS_LINE.sub(lambda found: f"splits: [{found[1]}, {json.dumps(split)}]", text)
    new, told = build(Study, yaml.safe_load(text)), "what has been trained stays"
    epochs, steps = lengths(new, output_folder(new)), study.budget_steps
    if steps and steps < 2 * max(epochs):
        steps, _ = budget(steps, epochs)
        text = STEPS_LINE.sub(f"budget_steps: {steps}", text)
        told = (
            f"which needs {steps} steps, so all runs are trained anew; the former ones are kept beside them"
        )
    if steps and not all(fits(steps, length) for length in epochs):
        text = EXCEPTIONS_LINE.sub('exceptions: ["steps"]', text)
    make_plan(build(Study, yaml.safe_load(text)), output_folder(new))
    shutil.copyfile(target, target.with_name(f"{FILE_NAME}.before"))
    write_bytes(target, text.encode())
    write(f"{target}: trains with {split} too; {told}")
