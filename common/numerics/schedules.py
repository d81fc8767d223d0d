"""Schedules as plain functions of the step."""

from __future__ import annotations

import math


def poly(base: float, step: int, total_steps: int, power: float) -> float:
    """`base * (1 - step / total)^power`."""
    return base * (1.0 - step / total_steps) ** power


def cosine(base: float, step: int, total_steps: int, target: float) -> float:
    """Half a cosine from `base` at step 0 to `target` at `total_steps`."""
    return target + (base - target) * (1.0 + math.cos(math.pi * step / total_steps)) / 2.0


def linear_decay(epoch: float, total_epochs: float) -> float:
    """Share of the schedule that is left: 1 at epoch 0, 0 at the end."""
    return 1.0 - epoch / total_epochs
