"""What the benchmarks of all projects share: command line, parts timed in turns, speed of the loaders, the report."""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.config import BatchPlan, load_config, plan_batch
from common.data.streams import TrainingData
from common.distributed import Dist
from common.errors import UserError
from common.run.log import write_json
from tools.environment import environment, peak_memory_bytes
from tools.processes import start, stop

Figures = dict[str, float | None]


def parser(config: Path) -> argparse.ArgumentParser:
    """The command line; `config` is the configuration where none is named. A project adds its own options."""
    result = argparse.ArgumentParser(prog="bench.py", description="How much of a step is the method.")
    result.add_argument("--config", default=str(config), help="YAML file, see the folder 'configs'")
    result.add_argument("--steps", type=int, default=10, help="rounds that are timed")
    result.add_argument("--json", type=Path, help="also write the figures there")
    result.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="changes to the configuration"
    )
    return result


def run(
    args: argparse.Namespace,
    config: type[Any],
    figures: Callable[[Any, Dist], Figures],
    load: Callable[[Any, Dist, BatchPlan], TrainingData],
) -> int:
    """Measure what the command line names, then the loaders, and print and write the figures.

    Args:
        args: of `parser`.
        config: the project's configuration class.
        figures: (cfg, process) -> figures of the steps by name.
        load: (cfg, process, batch plan) -> the loaders.

    Raises:
        UserError: a mistake in the configuration. A dataset that is not there is only noted.
    """
    cfg = load_config(config, args.config, args.overrides)
    dist = start(cfg.run.device)
    try:
        found = figures(cfg, dist) | {"peak memory, GiB": peak_memory_bytes(dist) / 2**30}
        speed, note = None, ""
        try:
            data = load(cfg, dist, plan_batch(cfg.optim, dist.world_size))
            speed = loader_speed(data, dist, cfg.run.channels_last, 5.0)
        except UserError as error:
            note = str(error)
        found["loader alone, images/s"] = speed
        report(f"{cfg.model.backbone}, crop {cfg.data.crop_size}", found, args.config, dist, note, args.json)
    finally:
        stop()
    return 0


def compare(seconds: Mapping[str, float], images: int, *apart: str) -> Figures:
    """Images per second of each part, and its ratio to the first one, the networks alone.

    Args:
        seconds: of each part.
        images: that a step takes.
        apart: parts of the step that are timed alone: their milliseconds and share of the last part instead.
    """
    parts = {name: value for name, value in seconds.items() if name not in apart}
    first, *steps = parts
    found: Figures = {f"{name}, images/s": images / value for name, value in parts.items()}
    for name in steps:
        found[f"ratio {name.removesuffix(' step')} / networks"] = parts[name] / parts[first]
    for name in apart:
        if name in seconds:
            found[f"{name}, ms"] = 1000 * seconds[name]
            found[f"{name}, % of the {steps[-1]}"] = 100 * seconds[name] / parts[steps[-1]]
    return found


def measure(functions: Mapping[str, Callable[[], object]], steps: int, dist: Dist) -> dict[str, float]:
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


def loader_speed(data: TrainingData, dist: Dist, channels_last: bool, seconds: float) -> float:
    """Images per second that the loaders alone deliver to the device, labeled and unlabeled together."""
    images, began = 0, None
    for epoch in itertools.count():
        for group in data.epoch(epoch, 0, dist, channels_last):
            if began is None:  # the first batch starts the workers
                began = time.perf_counter()
                continue
            images += sum(len(batch.image) for batches in group for batch in batches)
            if time.perf_counter() - began > seconds:
                return images / (time.perf_counter() - began)
    raise AssertionError


def random_batch(
    images: int, size: tuple[int, int], num_classes: int, dist: Dist, channels_last: bool
) -> tuple[Tensor, Tensor]:
    """Random images (B, 3, H, W) and labels (B, H, W) int64 of 8 x 8 blocks, on the device."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(images, 3, *size, device=dist.device).to(memory_format=layout)
    coarse = torch.randint(num_classes, (images, 1, 8, 8), device=dist.device).float()
    return x, torch.nn.functional.interpolate(coarse, size=size).squeeze(1).long()


def report(
    title: str, figures: Mapping[str, float | None], config: str, dist: Dist, note: str, path: Path | None
) -> None:
    """Print the figures, and write them to `path` if there is one.

    Args:
        title: what was measured.
        figures: by name; None for what could not be measured.
        config: name of the configuration.
        dist: this process.
        note: why something could not be measured.
        path: JSON file.
    """
    threads = f"CPU, {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if dist.device.type == "cuda" else threads
    print(f"{config} ({title}, {device})")  # noqa: T201
    for name, value in figures.items():
        print(f"  {name}: {'not measured, ' + note if value is None else f'{value:.3f}'}")  # noqa: T201
    if path:
        write_json(path, {"figures": dict(figures), "config": config, "environment": environment(dist)})
