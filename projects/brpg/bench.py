"""How much of a training step is the method, and how much the networks.

    python -m projects.brpg.bench [--config FILE] [--steps N] [--json FILE] [section.key=value ...]

All parts are timed in turns within one run, so that their ratios hold whatever else the machine does. Images and
labels are random numbers at the configured crop; only the loader needs the dataset.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from common.config import plan_batch
from common.data.dataset_yaml import load_spec
from common.data.loaders import Batch
from common.distributed import Dist
from common.errors import UserError, run_main
from common.numerics.optim import Group, build_optimizer
from common.numerics.precision import grad_scaler
from common.run.progress import Progress
from projects.brpg.augment import Draws
from projects.brpg.config import Config
from projects.brpg.data import build_training_data
from projects.brpg.model import build_networks
from projects.brpg.state import MethodState, Run
from projects.brpg.train import after_step, before_step, train_step
from tools import bench

HERE = Path(__file__).resolve().parent
NO_DATA: Any = None  # the steps read no loader


def step_functions(cfg: Config, dist: Dist) -> dict[str, Callable[[], object]]:
    """One iteration of the networks alone and one of every later phase, on the same networks."""
    torch.manual_seed(0)
    classes = load_spec(cfg.data.dataset, cfg.data.root).num_classes
    nets, method = build_networks(cfg, classes, dist), cfg.method
    collecting = MethodState(method, classes, cfg.model.inner_planes).to(dist.device)
    using = MethodState(method, classes, cfg.model.inner_planes).to(dist.device)
    using.memory = None
    using.prototypes.set(torch.randn_like(using.prototypes.centres).unbind())
    draws = Draws(0, 0, dist.device)
    draws.coin = lambda: 0.0  # type: ignore[method-assign]  # always the strong augmentation
    optimizer = build_optimizer(cfg.optim, [Group(nets.student.parameters())])
    images = plan_batch(cfg.optim, dist.world_size).per_forward
    (x_l, y_l), (x_weak, _), (x_strong, _) = (
        bench.random_batch(images, cfg.data.crop_size, classes, dist, cfg.run.channels_last) for _ in range(3)
    )
    batch = (Batch(x_l, y_l, NO_DATA), Batch(torch.cat((x_weak, x_strong), dim=1), NO_DATA, NO_DATA))
    run = Run(cfg, dist, NO_DATA, nets, draws, optimizer, grad_scaler(cfg.run.precision, dist), None)

    def networks() -> None:
        nets.student.train()
        optimizer.zero_grad(set_to_none=True)
        nets.teach(x_weak, train=False)
        x = torch.cat((x_l, x_strong))
        out = nets.forward(x)
        nets.teach(x, train=True)
        (
            out.logits.mean() + (0.0 if out.feats is None else out.feats.mean())
        ).backward()  # a trivial loss with the same graph behind it
        optimizer.step()
        after_step(middle_of(method.sup_only_epochs), run)

    def middle_of(epoch: int) -> Progress:
        return Progress(epoch * 1000 + 500, 1000, cfg.optim.epochs)

    def phase(epoch: int, state: MethodState) -> Callable[[], object]:
        at = middle_of(epoch)

        def full() -> None:
            run.state = state
            nets.student.train()
            optimizer.zero_grad(set_to_none=True)
            before_step(at, run)
            train_step(batch, at, run).total.backward()
            optimizer.step()
            after_step(at, run)

        return full

    functions: dict[str, Callable[[], object]] = {"networks alone": networks}
    if method.prototypes:
        functions["collection step"] = phase(method.collect_start, collecting)
        functions["prototype step"] = phase(method.prototype_start, using)
    else:
        functions["full step"] = phase(method.sup_only_epochs, using)
    return functions


def main(argv: Sequence[str]) -> int:
    """Print images/s of the loader, of the networks and of the steps of every phase, and their ratios."""
    args = bench.parser(HERE / "configs" / "shapes.yaml").parse_args(argv)

    def figures(cfg: Config, dist: Dist) -> bench.Figures:
        if cfg.method.mode != "semi":
            raise UserError(f"{args.config}: supervised-only; benchmark a semi-supervised configuration")
        seconds = bench.measure(step_functions(cfg, dist), args.steps, dist)
        return bench.compare(seconds, 2 * plan_batch(cfg.optim, dist.world_size).per_forward)

    return bench.run(args, Config, figures, build_training_data)


if __name__ == "__main__":
    run_main(main)
