"""How much of a training step is the method, and how much the networks.

    python -m projects.proto_consistency.bench [--config FILE] [--steps N] [--json FILE] [section.key=value ...]

All parts are timed in turns within one run, so that their ratios hold whatever else the machine does. Images and
labels are random numbers at the configured crop; only the loader needs the dataset. The part "prototype branch" takes
the features as given: drawing of places, reading of features, similarity, losses backwards to the features, update.
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
from projects.proto_consistency.augment import Draws
from projects.proto_consistency.config import Config
from projects.proto_consistency.data import build_training_data
from projects.proto_consistency.model import build_networks
from projects.proto_consistency.prototypes import Movement
from projects.proto_consistency.state import Run
from projects.proto_consistency.step import prototype_terms
from projects.proto_consistency.train import after_step, before_step, train_step
from tools import bench

HERE = Path(__file__).resolve().parent
BRANCH = "prototype branch"
NO_DATA: Any = None  # the steps read no loader


def step_functions(cfg: Config, dist: Dist) -> dict[str, Callable[[], object]]:
    """One iteration of the networks alone, one of the whole method on the same networks, and the branch by itself."""
    torch.manual_seed(0)
    classes = load_spec(cfg.data.dataset, cfg.data.root).num_classes
    nets = build_networks(cfg, classes, dist)
    draws = Draws(0, 0, dist.device)
    draws.coin = lambda: 0.0  # type: ignore[method-assign]  # always the strong augmentation
    optimizer = build_optimizer(cfg.optim, [Group(p for p in nets.student.parameters() if p.requires_grad)])
    images = plan_batch(cfg.optim, dist.world_size).per_forward
    (x_l, y_l), (x_u, y_u) = (
        bench.random_batch(images, cfg.data.crop_size, classes, dist, cfg.run.channels_last) for _ in range(2)
    )
    proto = cfg.prototypes
    movement = None if proto is None else Movement(nets.student.require_prototypes(), proto)
    run = Run(cfg, dist, NO_DATA, nets, draws, optimizer, grad_scaler(cfg.run.precision, dist), movement)
    batch = (Batch(x_l, y_l, NO_DATA), Batch(x_u, NO_DATA, NO_DATA))
    epoch = cfg.method.sup_only_epochs + 1
    if proto is not None and proto.start_epoch is not None:
        epoch = max(epoch, proto.start_epoch)
    at, good = Progress(epoch * 1000, 1000, cfg.optim.epochs), torch.zeros((), device=dist.device)

    def networks() -> None:
        nets.student.train()
        optimizer.zero_grad(set_to_none=True)
        nets.teach(x_u, train=False)
        x = torch.cat((x_l, x_u))
        out = nets.forward(x)
        nets.teach(x, train=True)
        total = out.logits.mean()  # a trivial loss with the same graph behind it
        for more in (out.feats, out.aux):
            total = total if more is None else total + more.mean()
        total.backward()
        optimizer.step()
        after_step(at, run, good)

    def full() -> None:
        nets.student.train()
        optimizer.zero_grad(set_to_none=True)
        before_step(at, run)
        train_step(batch, at, run).total.backward()
        optimizer.step()
        after_step(at, run, good)

    parts: dict[str, Callable[[], object]] = {"networks alone": networks, "full step": full}
    if movement is None:
        return parts
    labels = torch.cat((y_l, y_u))
    sure = torch.ones_like(labels, dtype=torch.bool)
    with torch.no_grad():
        features = nets.forward(torch.cat((x_l, x_u))).feats
    assert features is not None
    feats = features.detach().requires_grad_()

    def branch() -> None:
        terms = prototype_terms(feats, None, labels, sure, len(y_l), run)
        if terms:
            torch.stack(list(terms.values())).sum().backward()
        feats.grad = None
        run.require_movement().apply(dist, good)

    return parts | {BRANCH: branch}


def main(argv: Sequence[str]) -> int:
    """Print images/s of the loader, of the networks and of the full step, and what the method adds to them."""
    args = bench.parser(HERE / "configs" / "shapes.yaml").parse_args(argv)

    def figures(cfg: Config, dist: Dist) -> bench.Figures:
        if cfg.method.mode != "semi":
            raise UserError(f"{args.config}: supervised-only; benchmark a semi-supervised configuration")
        seconds = bench.measure(step_functions(cfg, dist), args.steps, dist)
        return bench.compare(seconds, 2 * plan_batch(cfg.optim, dist.world_size).per_forward, BRANCH)

    return bench.run(args, Config, figures, build_training_data)


if __name__ == "__main__":
    run_main(main)
