"""How much of a training step is the method, and how much the networks; for both branches.

    python -m projects.s4gan_mlmt.bench [--config FILE] [--steps N] [--json FILE] [section.key=value ...]

The parts of a branch are timed in turns within one run, so that their ratios hold whatever else the machine does.
"Networks alone" are the forwards that a step needs (the segmentation network on labeled and on unlabeled images, four
of the discriminator; two each of student and teacher), with and without gradients, trivial losses and the steps of the
optimizers. Images and labels are random numbers of the configured sizes; only the loader needs the dataset.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
from projects.s4gan_mlmt.config import Config
from projects.s4gan_mlmt.data import build_training_data
from projects.s4gan_mlmt.mlmt import state as branch
from projects.s4gan_mlmt.mlmt.losses import whole
from projects.s4gan_mlmt.mlmt.model import build_networks as build_classifiers
from projects.s4gan_mlmt.mlmt.train import after_step
from projects.s4gan_mlmt.mlmt.train import train_step as branch_step
from projects.s4gan_mlmt.model import Networks, build_networks, frozen
from projects.s4gan_mlmt.optimizer import build_optimizers
from projects.s4gan_mlmt.state import Run
from projects.s4gan_mlmt.train import discriminator_step, train_step
from tools import bench
from tools.bench import random_batch

HERE = Path(__file__).resolve().parent
NETWORKS, FULL = "networks alone", "full step"
NO_DATA: Any = None  # the steps read no loader
Parts = dict[str, Callable[[], object]]


def training_batches(cfg: Config, num_classes: int, dist: Dist) -> Batches:
    """Random batches of all loaders: labeled, and for an adversarial method unlabeled and real."""
    images = plan_batch(cfg.optim, dist.world_size).per_forward
    counts = (images, cfg.optim.unlabeled * images // cfg.optim.batch_size, images)
    made = (
        random_batch(count, cfg.data.crop_size, num_classes, dist, cfg.run.channels_last)
        for count in counts[: 3 if cfg.method.adversarial else 1]
    )
    return tuple(Batch(x, y, torch.arange(len(x))) for x, y in made)


def trivial_losses(nets: Networks, xs: Sequence[Tensor]) -> None:
    """Gradients of means of what the networks give; the graphs are those of the method."""
    logits = nets.segment(*xs[:2])
    total = torch.stack([one.mean() for one in logits]).sum()
    if nets.critic is None or nets.judge is None:
        total.backward()
        return
    fake, real = (torch.cat((logits[1], x), dim=1) for x in (xs[1], xs[2][: len(xs[1])]))
    with frozen(nets.critic):
        (judged,) = nets.critic(fake)
        with torch.no_grad():
            nets.critic(real)
        (total + judged.feats.mean() + judged.scores.mean()).backward()
    scores = [one.scores.mean() for one in nets.judge(fake.detach(), real.detach())]
    torch.stack(scores).sum().backward()


def segmentation_parts(cfg: Config, num_classes: int, dist: Dist) -> Parts:
    """A step of the networks alone and one of the method, each on networks of its own, which start alike."""
    batch = training_batches(cfg, num_classes, dist)
    at = Progress(cfg.method.st_start, cfg.optim.steps_per_round, cfg.optim.epochs)  # with self-training

    def built() -> Run:
        torch.manual_seed(0)
        nets = build_networks(cfg, num_classes, dist)
        optimizers, scaler = build_optimizers(cfg, nets.bare), grad_scaler(cfg.run.precision, dist)
        for network in nets.bare.values():
            network.train()
        return Run(cfg, dist, NO_DATA, nets, optimizers, scaler)

    bare, method = built(), built()

    def step(run: Run, backward: Callable[[], None]) -> None:
        for one in run.optimizers.values():
            one.zero_grad(set_to_none=True)
        backward()
        for one in run.optimizers.values():
            one.step()

    def whole_method() -> None:
        with frozen(method.nets.critic):
            losses, maps = train_step(batch, at, method)
            losses.total.backward()
        if maps is not None:
            discriminator_step(maps, at, method).total.backward()

    images = [one.image for one in batch]
    return {
        NETWORKS: lambda: step(bare, lambda: trivial_losses(bare.nets, images)),
        FULL: lambda: step(method, whole_method),
    }


def branch_batch(cfg: Config, num_classes: int, dist: Dist) -> Batches:
    """Random views and label vectors of a step of the image-level branch."""
    counts = (cfg.mlmt.labeled_batch // dist.world_size, cfg.mlmt.unlabeled_batch // dist.world_size)
    size = (cfg.mlmt.size, cfg.mlmt.size)
    labeled, clean, augmented = (
        random_batch(count, size, num_classes, dist, cfg.run.channels_last)[0]
        for count in (counts[0], counts[1], counts[1])
    )
    views, vectors = torch.cat((clean, augmented), dim=1), labeled.new_zeros(len(labeled), num_classes)
    vectors[:, -1] = 1
    return Batch(labeled, vectors, torch.arange(counts[0])), Batch(views, vectors, torch.arange(counts[1]))


def branch_parts(cfg: Config, num_classes: int, dist: Dist) -> Parts:
    """As `segmentation_parts`, for the image-level branch in an epoch with consistency."""
    batch = branch_batch(cfg, num_classes, dist)
    x_l, views = batch[0].image, batch[1].image
    at = Progress(cfg.mlmt.epochs - 1, 1, cfg.mlmt.epochs)
    data: Any = SimpleNamespace(shares=lambda _: (whole(x_l), whole(views)))

    def built() -> branch.Run:
        torch.manual_seed(0)
        nets = build_classifiers(cfg, num_classes, dist)
        optimizer = branch.build_student_optimizer(cfg.mlmt, nets.student)
        nets.student.train()
        nets.teacher.train()
        scaler = grad_scaler(cfg.run.precision, dist)
        return branch.Run(cfg, dist, data, nets, optimizer, scaler, branch.no_sums(dist))

    bare, method = built(), built()

    def networks() -> None:
        bare.optimizer.zero_grad(set_to_none=True)
        logits = bare.nets.learn(x_l, views[:, 3:])
        with torch.no_grad():
            bare.nets.teach(x_l, views[:, :3])
        torch.stack([one.mean() for one in logits]).sum().backward()
        bare.optimizer.step()

    def full() -> None:
        method.optimizer.zero_grad(set_to_none=True)
        branch_step(batch, at, method).total.backward()
        method.optimizer.step()
        after_step(at, method)

    return {NETWORKS: networks, FULL: full}


def main(argv: Sequence[str]) -> int:
    """Print images/s of the loader, of the networks and of the full step, and what the method adds to them."""
    args = bench.parser(HERE / "configs" / "shapes_mlmt.yaml").parse_intermixed_args(argv)

    def figures(cfg: Config, dist: Dist) -> bench.Figures:
        classes = load_spec(cfg.data.dataset, cfg.data.root).num_classes
        images = sum(len(batch.image) for batch in training_batches(cfg, classes, dist))
        branches = {"s4gan": (segmentation_parts(cfg, classes, dist), images)}
        if cfg.method.name == "s4gan_mlmt":
            views = (cfg.mlmt.labeled_batch + cfg.mlmt.unlabeled_batch) // dist.world_size
            branches["mlmt"] = (branch_parts(cfg, classes, dist), views)
        found: bench.Figures = {}
        for name, (parts, count) in branches.items():
            seconds = bench.measure(parts, args.steps, dist)
            found |= {f"{name}: {part}": value for part, value in bench.compare(seconds, count).items()}
        return found

    return bench.run(args, Config, figures, build_training_data)


if __name__ == "__main__":
    run_main(main)
