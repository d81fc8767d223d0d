"""What tests of training steps share: images and labels, the batches of loaders, the border of a crop."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.data.loaders import Batch
from common.mean_teacher.data import train_transform
from common.mean_teacher.evaluation import protocol


def random_batch(
    seed: int, size: Sequence[int], classes: int, labeled: int = 2, unlabeled: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Labeled images, their labels, unlabeled images in float64; some labels are ignored."""
    generator = torch.Generator().manual_seed(seed)
    x_l, x_u = (
        torch.randn(n, 3, *size, generator=generator, dtype=torch.float64) for n in (labeled, unlabeled)
    )
    y_l = torch.randint(0, classes, (labeled, *size), generator=generator)
    y_l[torch.rand(labeled, *size, generator=generator) < 0.1] = 255
    return x_l, y_l, x_u


def batches(x_l: Tensor, y_l: Tensor, x_u: Tensor | None = None) -> tuple[Batch, ...]:
    """What the loaders would give."""
    labeled = Batch(x_l, y_l, torch.arange(len(x_l)))
    return (labeled,) if x_u is None else (labeled, Batch(x_u, x_u[:, 0].long(), torch.arange(len(x_u))))


def assert_border_label(cfg: Any, border: int) -> None:
    """A photo of 8 x 8 pixels in a crop of 12 x 12 has this label around it, in training and in evaluations."""
    image, label = np.full((8, 8, 3), 200, np.uint8), np.full((8, 8), 3, np.uint8)
    x, y = train_transform(cfg)(image, label, random.Random(0))
    outside = torch.ones(12, 12, dtype=torch.bool)
    outside[2:10, 2:10] = False
    assert (y[outside] == border).all()
    assert (y[~outside] == 3).all()
    assert not x[:, outside].any()
    # training-time and final evaluation pad alike
    assert protocol(cfg, "training").pad_label == border
    assert protocol(cfg, "script").pad_label == border
