"""How much of a training step is the method, and how much the networks.

    python -m projects.u2pl.bench [--config FILE] [--steps N] [--json FILE] [section.key=value ...]

All parts are timed in turns within one run, so that their ratios hold whatever else the machine does. Images and
labels are random numbers at the configured crop; only the loader needs the dataset.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from common.config import load_config, plan_batch
from common.data.datasets import load_spec
from common.distributed import Dist, start, stop
from common.errors import UserError, run_main
from common.optim import Group, build_optimizer
from common.runlog import environment, peak_memory_bytes, write_json
from projects.u2pl.augment import Draws
from projects.u2pl.config import Config
from projects.u2pl.data import build_training_data
from projects.u2pl.model import Memory, build_networks
from projects.u2pl.train import after_step, before_step, train_step

HERE = Path(__file__).resolve().parent


def loader_speed(cfg: Config, dist: Dist, seconds: float) -> float:
    """Images per second that the loaders alone deliver to the device, labeled and unlabeled together.

    Raises:
        UserError: the dataset or the split is missing.
    """
    data = build_training_data(cfg, dist, plan_batch(cfg.optim, dist.world_size))
    images, began = 0, None
    for epoch in itertools.count():
        for group in data.epoch(epoch, 0, dist, cfg.run.channels_last):
            if began is None:  # the first batch starts the workers
                began = time.perf_counter()
                continue
            images += sum(len(batch.image) for batches in group for batch in batches)
            if time.perf_counter() - began > seconds:
                return images / (time.perf_counter() - began)
    raise AssertionError


def step_functions(cfg: Config, dist: Dist) -> dict[str, Callable[[], object]]:
    """One iteration of the networks alone and one of the whole method, on the same networks."""
    torch.manual_seed(0)
    classes = load_spec(cfg.data.dataset, cfg.data.root).num_classes
    nets = build_networks(cfg, classes, dist)
    memory = Memory(cfg, classes, cfg.model.inner_planes).to(dist.device)
    draws = Draws(0, 0, dist.device)
    draws.coin = lambda: 0.0  # type: ignore[method-assign]  # always the strong augmentation
    optimizer = build_optimizer(cfg.optim, [Group(nets.student.parameters())])
    height, width = cfg.data.crop_size
    batch = plan_batch(cfg.optim, dist.world_size).per_forward
    layout = torch.channels_last if cfg.run.channels_last else torch.contiguous_format
    x_l, x_u = (
        torch.randn(batch, 3, height, width, device=dist.device).to(memory_format=layout) for _ in range(2)
    )
    coarse = torch.randint(classes, (batch, 1, 8, 8), device=dist.device).float()
    y_l = torch.nn.functional.interpolate(coarse, size=(height, width)).squeeze(1).long()
    first = cfg.method.sup_only_epochs

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
        after_step(first + 1, 1000, cfg, nets)

    def full() -> None:
        nets.student.train()
        optimizer.zero_grad(set_to_none=True)
        before_step(first + 1, 1000, cfg, nets)
        train_step(x_l, y_l, x_u, first + 1, 1000, cfg, nets, memory, draws, dist).total.backward()
        optimizer.step()
        after_step(first + 1, 1000, cfg, nets)

    return {"networks alone": networks, "full step": full}


def measure(functions: dict[str, Callable[[], object]], steps: int, dist: Dist) -> dict[str, float]:
    """Median seconds of each function, called in turns after two rounds of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(steps + 2):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if dist.device.type == "cuda":
                torch.cuda.synchronize(dist.device)
            if i >= 2:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def main(argv: Sequence[str]) -> int:
    """Print images/s of the loader, of the networks and of the full step, and the ratio full / networks."""
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(HERE / "configs" / "camvid_46_small.yaml"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args(argv)
    cfg = load_config(Config, args.config, args.overrides)
    if cfg.method.mode != "semi":
        raise UserError(f"{args.config}: supervised-only; benchmark a semi-supervised configuration")
    dist = start(cfg.run.device)
    seconds = measure(step_functions(cfg, dist), args.steps, dist)
    images = 2 * plan_batch(cfg.optim, dist.world_size).per_forward
    figures: dict[str, float | None] = {f"{name}, images/s": images / s for name, s in seconds.items()}
    figures["ratio full / networks"] = seconds["full step"] / seconds["networks alone"]
    figures["peak memory, GiB"] = peak_memory_bytes(dist) / 2**30
    note = ""
    try:
        figures["loader alone, images/s"] = loader_speed(cfg, dist, 5.0)
    except UserError as error:
        figures["loader alone, images/s"], note = None, str(error)
    device = (
        torch.cuda.get_device_name()
        if dist.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    print(f"{args.config} ({cfg.model.backbone}, crop {cfg.data.crop_size}, {device})")  # noqa: T201
    for name, value in figures.items():
        print(f"  {name}: {'not measured, ' + note if value is None else f'{value:.3f}'}")  # noqa: T201
    if args.json:
        write_json(args.json, {"figures": figures, "config": args.config, "environment": environment(dist)})
    stop()
    return 0


if __name__ == "__main__":
    run_main(main)
