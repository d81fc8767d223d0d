"""Pre-train the small backbone of the embedded dataset on generated photos of *other* classes.

    python -m tools.pretrain_shapes [--steps N] [--out FILE]

The result stands for ImageNet weights, on which the gains of the papers rest: a first teacher that is mostly right
needs a backbone that has seen photos. Eight silhouettes and six patterns that `shapes` does not contain are learned
with full labels; only the encoder is kept. The file in `weights/` was made by this command with its defaults.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from common.config import IMAGENET_MEAN, IMAGENET_STD
from common.data.files import BUNDLED
from common.data.transforms import EvalTransform, TrainTransform
from common.errors import run_main
from common.mean_teacher.config import DeepLabConfig
from common.measure.metrics import ConfusionMatrix, mean_iou
from common.models.deeplab import SegmentationNetwork, build_network
from common.numerics.losses import best_class, cross_entropy_or_zero
from common.numerics.optim import poly
from splits.shapes_images import ONE, SIZE, Bytes, Family, Ints, render_family, two_tones

WEIGHTS = BUNDLED / "resnet_tiny_other_shapes.pth"
TRAIN_IMAGES = 3000
HELD_OUT = range(TRAIN_IMAGES, TRAIN_IMAGES + 100)


# Silhouettes and patterns as in `splits.shapes_images`.


def _ring(u: Ints, v: Ints) -> NDArray[np.bool_]:
    square = u * u + v * v
    return (square <= ONE * ONE) & (square >= 500 * 500)


def _bar(u: Ints, v: Ints) -> NDArray[np.bool_]:
    return (np.abs(u) <= ONE) & (np.abs(v) <= 380)


def _half_disc(u: Ints, v: Ints) -> NDArray[np.bool_]:
    return (u * u + v * v <= ONE * ONE) & (v >= -200)


def _corner(u: Ints, v: Ints) -> NDArray[np.bool_]:
    return (np.maximum(np.abs(u), np.abs(v)) <= 900) & ((u <= -200) | (v >= 200))


def _crescent(u: Ints, v: Ints) -> NDArray[np.bool_]:
    return (u * u + v * v <= ONE * ONE) & ((u - 450) * (u - 450) + v * v >= 700 * 700)


def _hourglass(u: Ints, v: Ints) -> NDArray[np.bool_]:
    return (np.abs(v) <= 900) & (np.abs(u) <= np.abs(v) + 150)


def _rhomb(u: Ints, v: Ints) -> NDArray[np.bool_]:
    return 2 * np.abs(u) + np.abs(v) <= 1300


def _arch(u: Ints, v: Ints) -> NDArray[np.bool_]:
    return (np.maximum(np.abs(u), np.abs(v)) <= 900) & ((np.abs(u) >= 400) | (v <= -350))


def _waves(p: Ints, q: Ints, period: int) -> Ints:
    bend = np.abs(q % (4 * period) - 2 * period)
    return two_tones((p + bend) // period & 1)


def _grid(p: Ints, q: Ints, period: int) -> Ints:
    width = 2 * period
    return two_tones((3 * (p % width) < width) | (3 * (q % width) < width))


def _bricks(p: Ints, q: Ints, period: int) -> Ints:
    offset = (q // period & 1) * period
    return two_tones((3 * (q % period) < period) | (4 * ((p + offset) % (2 * period)) < period))


def _circles(p: Ints, q: Ints, period: int) -> Ints:
    x, y = p % (4 * period) - 2 * period, q % (4 * period) - 2 * period
    return two_tones((x * x + y * y) // (period * period) & 1)


def _lozenges(p: Ints, q: Ints, period: int) -> Ints:
    return two_tones(np.abs(p % (2 * period) - period) + np.abs(q % (2 * period) - period) <= period)


def _steps(p: Ints, q: Ints, period: int) -> Ints:
    del q
    return p % (4 * period) // period * 85


PRETRAIN = Family(
    (
        ("ring", _ring),
        ("bar", _bar),
        ("half disc", _half_disc),
        ("corner", _corner),
        ("crescent", _crescent),
        ("hourglass", _hourglass),
        ("rhomb", _rhomb),
        ("arch", _arch),
    ),
    (_waves, _grid, _bricks, _circles, _lozenges, _steps),
    domain=2,
)
CLASSES = ("background", *(name for name, _ in PRETRAIN.silhouettes))


def render(index: int) -> tuple[Bytes, Bytes]:
    """Image and label map as `splits.shapes_images.render`, of the disjoint `CLASSES`."""
    return render_family(PRETRAIN, index)


def pretrain(steps: int, batch: int = 16, lr: float = 0.1, seed: int = 0) -> SegmentationNetwork:
    """A network trained for `steps` on the pre-training classes."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    transform = TrainTransform(IMAGENET_MEAN, IMAGENET_STD, (SIZE, SIZE), (0.7, 1.4))
    model = DeepLabConfig(
        backbone="resnet_tiny", stem="plain", multi_grid=(1, 1, 1), inner_planes=64, dilations=(1, 2, 3)
    )
    net = build_network(model, len(CLASSES))
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = poly(lr, step, steps, 0.9) * min(1.0, (step + 1) / 50)
        samples = [transform(*render(rng.randrange(TRAIN_IMAGES)), rng) for _ in range(batch)]
        x, y = (torch.stack(part) for part in zip(*samples, strict=True))
        out = net.train()(x).logits
        out = torch.nn.functional.interpolate(out, size=y.shape[-2:], mode="bilinear", align_corners=True)
        loss = cross_entropy_or_zero(out, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            sys.stdout.write(f"step {step + 1}/{steps} loss {float(loss.detach()):.3f}\n")
            sys.stdout.flush()
    return net


@torch.no_grad()
def held_out_miou(net: SegmentationNetwork) -> float:
    """MIoU (fraction) on pre-training images that were not trained on."""
    transform = EvalTransform(IMAGENET_MEAN, IMAGENET_STD)
    matrix = ConfusionMatrix(len(CLASSES))
    net.eval()
    for index in HELD_OUT:
        x, y = transform(*render(index))
        matrix.update(best_class(net.predict(x[None])), y[None])
    return mean_iou(*matrix.intersection_union())


def main(argv: Sequence[str]) -> None:
    """Train, report the held-out mIoU, save the encoder."""
    parser = argparse.ArgumentParser(
        prog="pretrain_shapes", description="Pre-train the backbone of 'shapes'."
    )
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args(argv)
    net = pretrain(args.steps)
    torch.save(net.encoder.state_dict(), args.out)
    sys.stdout.write(f"held-out mIoU {100 * held_out_miou(net):.2f}; saved {args.out}\n")


if __name__ == "__main__":
    run_main(main)
