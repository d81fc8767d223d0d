"""What the benchmarks of all projects share: parts timed in turns, speed of the loaders, the report."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from common.data.streams import TrainingData
from common.distributed import Dist
from common.run.log import environment, write_json


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
