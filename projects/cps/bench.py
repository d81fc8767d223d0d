"""How much of a training step is the method, how much the networks, and what separate BatchNorm statistics cost.

    python -m projects.cps.bench [--config FILE] [--methods NAME ...] [--steps N] [--json FILE] [section.key=value ...]

The parts of a method are timed in turns within one run, so that their ratios hold whatever else the machine does.
"Networks alone" are the forwards that the method needs, with and without gradients, a trivial loss and the steps of
the optimizers. Images and labels are random numbers at the configured crop; only the loader needs the dataset.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from common.config import plan_batch
from common.data.dataset_yaml import load_spec
from common.data.loaders import Batch
from common.data.streams import Batches
from common.distributed import Dist
from common.errors import run_main
from common.numerics.precision import grad_scaler
from common.run.progress import Progress
from projects.cps.baselines.cct import times_four
from projects.cps.baselines.gct import frozen
from projects.cps.config import Config, Method
from projects.cps.data import build_training_data
from projects.cps.methods import build_draws, build_networks, build_optimizers
from projects.cps.model import BRANCHES, Branches, segment
from projects.cps.state import Run
from projects.cps.train import before_step, phases
from tools import bench

HERE = Path(__file__).resolve().parent
NO_DATA: Any = None  # the steps read no loader
# batches (0 = labeled) that networks see without gradients in a step, and with; both networks where two learn
QUIET: dict[str, tuple[Sequence[str], Sequence[int]]] = {
    "cps_cutmix": (BRANCHES, (1, 2)),
    "mean_teacher": (("branch2",), (0, 1)),
    "gct": (BRANCHES, (0, 1, 0, 1)),  # for the targets, and once more after the step
}
LOUD: dict[str, tuple[Sequence[str], Sequence[int]]] = {
    "sup_only": (("branch1",), (0,)),
    "cps": (BRANCHES, (0, 1)),
    "cps_cutmix": (BRANCHES, (1, 0)),
    "mean_teacher": (("branch1",), (0, 1)),
    "gct": (BRANCHES, (0, 1)),
}


def loaders_of(name: Method) -> int:
    """How many loaders a method has."""
    return {"sup_only": 1, "cps_cutmix": 3}.get(name, 2)


def method_batches(cfg: Config, num_classes: int, dist: Dist) -> Batches:
    """Random batches of all loaders that the method has, the labeled one first."""
    images = plan_batch(cfg.optim, dist.world_size).per_forward
    made = (
        bench.random_batch(images, cfg.data.crop_size, num_classes, dist, cfg.run.channels_last)
        for _ in range(loaders_of(cfg.method.name))
    )
    return tuple(Batch(x, y, torch.arange(images)) for x, y in made)


def trivial_losses(run: Run, xs: Sequence[Tensor]) -> list[Tensor]:
    """Means of what the networks give in a step's forwards, one per backward pass; the graphs are the method's."""
    cfg, modules, precision = run.cfg, run.nets.modules, run.cfg.run.precision
    name = cfg.method.name
    if name == "cct":
        features = [modules["branch1"](x) for x in xs]
        feature, _ = features[1]
        scores = modules["auxiliary"]([feature] * len(cfg.method.cct.decoders))
        outputs = [times_four(one) for one in (*(logits for _, logits in features), *scores)]
        return [torch.stack([one.mean() for one in outputs]).sum()]
    networks, batches = QUIET.get(name, ((), ()))
    with torch.no_grad():
        quiet = [[segment(modules[key], xs[i], precision) for i in batches] for key in networks]
    networks, batches = LOUD[name]
    branches = Branches([modules[key] for key in networks], cfg.quirks.separate_statistics, precision)
    loud = branches(*(xs[i] for i in batches))
    total = torch.stack([one.mean() for scores in loud for one in scores]).sum()
    if name != "gct":
        return [total]
    images, detector = torch.cat(list(xs)), modules["detector"]
    probs = [torch.cat(scores).softmax(dim=1) for scores in loud]
    before = [torch.cat(scores[:2]).softmax(dim=1) for scores in quiet]
    with torch.no_grad():
        detector(images, *before)
    total = total + torch.stack([one.mean() for one in frozen(detector, images, *probs)]).sum()
    return [total, torch.stack([one.mean() for one in detector(images, *before)]).sum()]


def networks_alone(run: Run, batch: Batches) -> Callable[[], object]:
    """A step without the method: forwards, trivial losses, backward passes, optimizers."""

    def step() -> None:
        for one in run.optimizers.values():
            one.zero_grad(set_to_none=True)
        for loss in trivial_losses(run, [part.image for part in batch]):
            loss.backward()
        for one in run.optimizers.values():
            one.step()

    return step


def full_step(run: Run, batch: Batches) -> Callable[[], object]:
    """A step as the training loop makes it."""
    at = Progress(1000, 100, 100)

    def step() -> None:
        before_step(at, run)
        for phase in phases(run):
            for one in phase.optimizers:
                one.zero_grad(set_to_none=True)
            phase.step(batch, at, run).total.backward()
            for one in phase.optimizers:
                one.step()

    return step


def with_method(cfg: Config, name: Method, separate: bool = True) -> Config:
    """The configuration for another method."""
    quirks = dataclasses.replace(cfg.quirks, separate_statistics=separate)
    method = dataclasses.replace(cfg.method, name=name)
    return dataclasses.replace(cfg, method=method, quirks=quirks)


def step_functions(cfg: Config, name: Method, dist: Dist) -> dict[str, Callable[[], object]]:
    """The parts of one method, each on networks of its own, which start alike."""
    classes = load_spec(cfg.data.dataset, cfg.data.root).num_classes

    def built(separate: bool) -> tuple[Run, Batches]:
        torch.manual_seed(0)
        ours = with_method(cfg, name, separate)
        nets = build_networks(ours, classes, dist)
        nets.train()
        scaler, draws = grad_scaler(ours.run.precision, dist), build_draws(ours, dist)
        run = Run(ours, dist, NO_DATA, nets, draws, build_optimizers(ours, nets), scaler)
        return run, method_batches(ours, classes, dist)

    parts = {"networks alone": networks_alone(*built(True)), "full step": full_step(*built(True))}
    if name != "sup_only":
        parts["full step, joined statistics"] = full_step(*built(False))
    return parts


def main(argv: Sequence[str]) -> int:
    """Print images/s of the loader and of every method's parts, and their ratios to the networks alone."""
    parser = bench.parser(HERE / "configs" / "shapes.yaml")
    parser.add_argument("--methods", nargs="+", choices=get_args(Method), default=get_args(Method))
    args = parser.parse_intermixed_args(argv)

    def figures(cfg: Config, dist: Dist) -> bench.Figures:
        found: bench.Figures = {}
        for name in args.methods:
            images = plan_batch(cfg.optim, dist.world_size).per_forward * loaders_of(name)
            seconds = bench.measure(step_functions(cfg, name, dist), args.steps, dist)
            found |= {f"{name}: {part}": value for part, value in bench.compare(seconds, images).items()}
        return found

    return bench.run(args, Config, figures, build_training_data)


if __name__ == "__main__":
    run_main(main)
