"""How much of a training step is the method, and how much the networks.

    python -m projects.u2pl.bench [--config FILE] [--steps N] [--json FILE] [section.key=value ...]

All parts are timed in turns within one run, so that their ratios hold whatever else the machine does. Images and
labels are random numbers at the configured crop; only the loader needs the dataset. For a configuration of the AEL
variant the part "banks and masks" is timed too: class confidence, CutMix bank, the choice of classes and images, the
boxes. It works on labels of 8 x 8 blocks, and on a bank of `IMAGES` images.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from common.config import plan_batch
from common.data.dataset_yaml import load_spec
from common.data.loaders import Batch
from common.distributed import Dist
from common.errors import UserError, run_main
from common.numerics.mixing import box_masks
from common.numerics.optim import Group, build_optimizer
from common.numerics.precision import grad_scaler
from common.run.progress import Progress
from projects.u2pl.ael.boxes import adaptive_boxes
from projects.u2pl.ael.config import AelConfig
from projects.u2pl.ael.draws import AelDraws
from projects.u2pl.ael.memory import AelMemory, HostCopy
from projects.u2pl.ael.step import AelBatch, ael_step
from projects.u2pl.augment import Draws
from projects.u2pl.config import Config
from projects.u2pl.data import build_training_data
from projects.u2pl.memory import Memory
from projects.u2pl.model import Networks, build_networks
from projects.u2pl.state import Run
from projects.u2pl.train import after_step, before_step, train_step
from tools import bench

HERE = Path(__file__).resolve().parent
BANKS = "banks and masks"
NO_DATA: Any = None  # the steps read no loader
IMAGES = 2231  # unlabeled ones of Cityscapes with 744 labels


def step_functions(cfg: Config, dist: Dist) -> dict[str, Callable[[], object]]:
    """One iteration of the networks alone and one of the whole method, on the same networks."""
    torch.manual_seed(0)
    classes = load_spec(cfg.data.dataset, cfg.data.root).num_classes
    nets = build_networks(cfg, classes, dist)
    memory = Memory(cfg, classes, cfg.model.inner_planes).to(dist.device)
    draws = Draws(0, 0, dist.device)
    draws.coin = lambda: 0.0  # type: ignore[method-assign]  # always the strong augmentation
    optimizer = build_optimizer(cfg.optim, [Group(nets.student.parameters())])
    images = plan_batch(cfg.optim, dist.world_size).per_forward
    (x_l, y_l), (x_u, _) = (
        bench.random_batch(images, cfg.data.crop_size, classes, dist, cfg.run.channels_last) for _ in range(2)
    )
    if cfg.method.ael is not None:
        return ael_functions(cfg, cfg.method.ael, nets, optimizer, x_l, x_u, y_l, dist)
    run = Run(cfg, dist, NO_DATA, nets, draws, optimizer, grad_scaler(cfg.run.precision, dist), memory)
    batch = (Batch(x_l, y_l, NO_DATA), Batch(x_u, NO_DATA, NO_DATA))
    at = Progress((cfg.method.sup_only_epochs + 1) * 1000, 1000, cfg.optim.epochs)

    def networks() -> None:
        nets.student.train()
        optimizer.zero_grad(set_to_none=True)
        nets.teach(x_u, train=False)
        x = torch.cat((x_l, x_u))
        out = nets.forward(x)
        nets.teach(x, train=True)
        (
            out.logits.mean() + (0.0 if out.feats is None else out.feats.mean())
        ).backward()  # a trivial loss with the same graph behind it
        optimizer.step()
        after_step(at, run)

    def full() -> None:
        nets.student.train()
        optimizer.zero_grad(set_to_none=True)
        before_step(at, run)
        train_step(batch, at, run).total.backward()
        optimizer.step()
        after_step(at, run)

    return {"networks alone": networks, "full step": full}


def ael_functions(
    cfg: Config, ael: AelConfig, nets: Networks, optimizer: torch.optim.Optimizer, x_l: Tensor, x_u: Tensor,
    y_l: Tensor, dist: Dist,
) -> dict[str, Callable[[], object]]:  # fmt: skip
    """As `step_functions`, for the AEL variant; also what its banks and boxes cost."""
    classes = load_spec(cfg.data.dataset, cfg.data.root).num_classes
    pairs, epoch = len(x_u) // 2, min(ael.start_epoch, cfg.optim.epochs - 1)
    memory = AelMemory(cfg, classes, IMAGES, cfg.model.inner_planes, 0).to(dist.device)
    draws = AelDraws(0, 0, dist.device)
    places = list(range(pairs))
    batch = AelBatch(x_l, y_l, x_l.flip(0), y_l.flip(0), x_u[:pairs], x_u[pairs:], places)
    _, seen = bench.random_batch(2 * pairs, cfg.data.crop_size, classes, dist, cfg.run.channels_last)
    run = Run(cfg, dist, NO_DATA, nets, draws, optimizer, grad_scaler(cfg.run.precision, dist), memory)
    at = Progress(epoch * 1000 + 500, 1000, cfg.optim.epochs)
    known = torch.ones(len(seen), dtype=torch.bool, device=dist.device)
    logits = torch.nn.functional.one_hot(y_l, classes).movedim(-1, 1).float().contiguous()

    def networks() -> None:
        nets.student.train()
        optimizer.zero_grad(set_to_none=True)
        outs = [nets.forward(x_l)]
        nets.teach(x_l, train=True)
        nets.teach(x_u, train=False)
        nets.teach(batch.x_u, train=True)
        outs.append(nets.forward(batch.x_u))
        terms = [out.logits.mean() + (0.0 if out.feats is None else out.feats.mean()) for out in outs]
        torch.stack(terms).sum().backward()
        optimizer.step()
        after_step(at, run)

    def full() -> None:
        nets.student.train()
        optimizer.zero_grad(set_to_none=True)
        choice = memory.choose(draws, pairs)
        ael_step(batch, choice, at, run).total.backward()
        optimizer.step()
        after_step(at, run)

    def banks() -> None:
        choice = memory.choose(draws, pairs)
        ids = [*places, *(pair.second for pair in choice.pairs)]
        memory.learn(logits, y_l, seen, known, ids, dist)
        maps = HostCopy(seen[pairs:].to(torch.uint8)).read()[0]
        boxes = adaptive_boxes(maps, [pair.k for pair in choice.pairs], ael, draws)
        box_masks(boxes, *cfg.data.crop_size, dist.device)

    return {"networks alone": networks, "full step": full, BANKS: banks}


def main(argv: Sequence[str]) -> int:
    """Print images/s of the loader, of the networks and of the full step, and what the method adds to them."""
    args = bench.parser(HERE / "configs" / "camvid_46_small.yaml").parse_args(argv)

    def figures(cfg: Config, dist: Dist) -> bench.Figures:
        if cfg.method.mode != "semi":
            raise UserError(f"{args.config}: supervised-only; benchmark a semi-supervised configuration")
        seconds = bench.measure(step_functions(cfg, dist), args.steps, dist)
        return bench.compare(seconds, 2 * plan_batch(cfg.optim, dist.world_size).per_forward, BANKS)

    return bench.run(args, Config, figures, build_training_data)


if __name__ == "__main__":
    run_main(main)
