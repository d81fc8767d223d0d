"""How much of a training step is the method, and how much the networks.

    python -m projects.unimatch.bench [--config FILE] [--steps N] [--json FILE] [section.key=value ...]

All parts are timed in turns within one run, so that their ratios hold whatever else the machine does. Images, labels
and boxes are random at the configured crop; only the loader needs the dataset.
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
from common.numerics.optim import build_optimizer
from common.numerics.precision import grad_scaler
from common.run.progress import Progress
from projects.unimatch.augment import Draws, unlabeled_of
from projects.unimatch.config import Config
from projects.unimatch.data import build_training_data, roles
from projects.unimatch.model import build_networks, parameter_groups
from projects.unimatch.state import Run
from projects.unimatch.train import after_step, before_step, student_forwards, teacher_forwards, train_step
from tools import bench

HERE = Path(__file__).resolve().parent
NO_DATA: Any = None  # the steps read no loader


def step_functions(cfg: Config, dist: Dist) -> dict[str, Callable[[], object]]:
    """One iteration of the networks alone and one of the whole method, on the same networks."""
    torch.manual_seed(0)
    classes = load_spec(cfg.data.dataset, cfg.data.root).num_classes
    nets, views = build_networks(cfg, classes, dist), 1 + cfg.method.strong_views
    optimizer = build_optimizer(cfg.optim, parameter_groups(nets.student, cfg.optim))
    scaler = grad_scaler(cfg.run.precision, dist)
    run = Run(cfg, dist, NO_DATA, nets, Draws(0, 0, dist.device), optimizer, scaler)
    images = plan_batch(cfg.optim, dist.world_size).per_forward

    def random_batch() -> tuple[Any, Any]:
        return bench.random_batch(images, cfg.data.crop_size, classes, dist, cfg.run.channels_last)

    def unlabeled() -> Batch:
        x = torch.cat([random_batch()[0] for _ in range(views)], dim=1)
        maps = torch.stack([random_batch()[1] == 0 for _ in range(views)], dim=1).to(torch.uint8)
        return Batch(x, maps, NO_DATA)

    batch = (Batch(*random_batch(), NO_DATA), *(unlabeled() for _ in list(roles(cfg))[1:]))
    at = Progress(1000, 1000, 2)

    def step(loss: Callable[[], torch.Tensor]) -> None:
        nets.student.train()
        optimizer.zero_grad(set_to_none=True)
        before_step(at, run)
        loss().backward()
        optimizer.step()
        after_step(at, run)

    def networks() -> torch.Tensor:
        own, x_l = unlabeled_of(batch[1]), batch[0].image
        nets.label(own.weak)
        strong = torch.cat(own.strong)
        found = (
            teacher_forwards(x_l, strong, run)
            if cfg.method.teacher
            else student_forwards(x_l, own.weak, strong, run)
        )
        return torch.stack([logits.mean() for logits in found]).sum()  # the same graph behind it

    return {
        "networks alone": lambda: step(networks),
        "full step": lambda: step(lambda: train_step(batch, at, run).total),
    }


def main(argv: Sequence[str]) -> int:
    """Print images/s of the loader, of the networks and of the full step, and what the method adds to them."""
    args = bench.parser(HERE / "configs" / "shapes.yaml").parse_args(argv)

    def figures(cfg: Config, dist: Dist) -> bench.Figures:
        if cfg.method.mode != "semi":
            raise UserError(f"{args.config}: supervised-only; benchmark a semi-supervised configuration")
        seconds = bench.measure(step_functions(cfg, dist), args.steps, dist)
        return bench.compare(seconds, 2 * plan_batch(cfg.optim, dist.world_size).per_forward)

    return bench.run(args, Config, figures, build_training_data)


if __name__ == "__main__":
    run_main(main)
