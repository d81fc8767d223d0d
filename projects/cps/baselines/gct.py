"""Guided collaborative training as it is shipped beside CPS: two networks and a detector of their errors.

The flaw detector looks at images and predictions and maps where a prediction is wrong. Where one network seems less
wrong than the other, the other learns its probabilities (dynamic consistency); where both seem wrong, both are pushed
to predictions that the detector finds right (flaw correction). Then the detector learns the true errors on labeled
images. One optimizer step has two phases: `gct_step` for the networks, `detector_step` for the detector.

QUIRK method.gct.late_rate, method.gct.constant_detector_rate, which the loop acts on: the schedule reaches the networks
one step late and the detector not at all.

Legend: B images, the labeled ones first, K classes, (H, W) image size; flaw maps are (B, 1, H, W), 0 = right and 1 =
wrong. Nothing here waits for the device.

Source: `gct_util.py`, `network.py` and `train.py` of `voc8.res50v3+.GCT` in TorchSemiSeg.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter1d
from torch import Tensor, nn

from common.data.streams import Batches
from common.errors import UserError
from common.models.deeplab import upsample
from common.numerics.losses import Losses
from common.numerics.precision import autocast, widened
from common.run.progress import Progress
from projects.cps.baselines.config import DETECTOR_STRIDES, GctSettings
from projects.cps.state import Run

NO_FLAW = 0.1  # a blurred map that stays below counts as free of flaws


def sigmoid_ramp(step: int, length: int) -> float:
    """`exp(-5 (1 - t)^2)` with t = step / length, at most 1; 1 if there is no ramp."""
    if length == 0:
        return 1.0
    left = 1.0 - min(max(step, 0), length) / length
    return math.exp(-5.0 * left * left)


# --- the detector ----------------------------------------------------------------------------------------------


class HalfBatchNorm(nn.Module):
    """Normalizes the first half of the channels over the batch, the other half within each image."""

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.split = [planes - planes // 2, planes // 2]
        self.bnorm = nn.BatchNorm2d(self.split[0])
        self.inorm = nn.InstanceNorm2d(self.split[1], eps=1e-5, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, planes, h, w) -> the same shape."""
        over_batch, within_image = x.split(self.split, dim=1)
        first, second = self.bnorm(over_batch), self.inorm(within_image)
        if x.is_contiguous(memory_format=torch.channels_last):
            second = second.contiguous(memory_format=torch.channels_last)  # else cat falls back to NCHW
        return torch.cat((first, second), dim=1)


class FlawDetector(nn.Module):
    """Maps images and predictions to flaw maps that are not bounded.

    Args:
        num_classes: K.
        planes: channels of the first layer; later ones have 2, 4 and 8 times as many.
        strides: of the eight convolutions.
        precision: of the forward passes.
    """

    def __init__(
        self,
        num_classes: int,
        planes: int = 64,
        strides: Sequence[int] = DETECTOR_STRIDES,
        precision: str = "fp32",
    ) -> None:
        super().__init__()
        self.strides, self.precision = tuple(strides), precision
        self.layers = ("1", "2", "2_1", "3", "3_1", "4", "4_1")
        sizes = [num_classes + 3, *(planes * factor for factor in (1, 2, 2, 4, 4, 8, 8))]
        for i, name in enumerate(self.layers):
            conv = nn.Conv2d(sizes[i], sizes[i + 1], 4, stride=self.strides[i], padding=1)
            self.add_module(f"conv{name}", conv)
            self.add_module(f"ibn{name}", HalfBatchNorm(sizes[i + 1]))
        self.classifier = nn.Conv2d(sizes[-1], 1, 4, stride=self.strides[-1], padding=1)

    def forward(self, images: Tensor, *predictions: Tensor) -> list[Tensor]:
        """Flaw maps (B, 1, H, W) of several predictions on the same images, each with statistics of its own.

        Args:
            images: (B, 3, H, W).
            predictions: probabilities (B, K, H, W).

        Raises:
            UserError: the images are too small for the detector's strides.
        """
        smallest = self.smallest_side()
        if min(images.shape[-2:]) < smallest:
            raise UserError(
                f"gct: images of {images.shape[-2]}x{images.shape[-1]} are too small for the flaw detector; use a "
                f"data.crop_size of at least {smallest}, or smaller method.gct.detector_strides"
            )
        return [self._flaws(images, probs) for probs in predictions]

    def smallest_side(self) -> int:
        """Side of an image of which every convolution has something left."""
        side = 2
        for stride in reversed(self.strides[:-1]):
            side = (side - 1) * stride + 2
        return side

    def _flaws(self, images: Tensor, probs: Tensor) -> Tensor:
        with autocast(images.device, self.precision):
            x = torch.cat((images, probs), dim=1)
            for name in self.layers:
                x = getattr(self, f"ibn{name}")(getattr(self, f"conv{name}")(x))
                x = F.leaky_relu(x, 0.2, inplace=True)
            x = self.classifier(x)
        return upsample(widened(x), images.shape[-2:])


def detector_optimizer(detector: nn.Module, settings: GctSettings) -> torch.optim.Optimizer:
    """Adam with the authors' moments, without decay; fused, so that its steps can be cancelled on the device."""
    group = {
        "params": list(detector.parameters()),
        "lr": settings.detector_lr,
        "initial_lr": settings.detector_lr,
    }
    return torch.optim.Adam([group], lr=settings.detector_lr, betas=(0.9, 0.99), fused=True)


# --- maps ------------------------------------------------------------------------------------------------------


def odd_size(side: int, divisor: int) -> int:
    """`side // divisor`, made odd by adding 1: the size of a blur's kernel."""
    size = side // divisor
    return size + 1 - size % 2


@lru_cache(maxsize=64)
def gaussian_weights(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Weights (size,) of a blur along one axis; their outer product is the kernel of the plane.

    They are what SciPy's Gaussian filter makes of an impulse in the middle of `size` zeros, borders included.
    """
    sigma = 0.3 * ((size - 1) * 0.5 - 1) + 0.8
    impulse = [0.0] * size
    impulse[size // 2] = 1.0
    return torch.from_numpy(gaussian_filter1d(impulse, sigma)).to(device, dtype)


def blur(maps: Tensor, size: int) -> Tensor:
    """Gaussian blur of maps (B, 1, H, W), reflected at the border, with a kernel of odd `size`.

    The plane's kernel is an outer product, so two passes along one axis each give what one over the plane would.

    Raises:
        UserError: the kernel is too large for the map.
    """
    half = size // 2
    if half >= min(maps.shape[-2:]):
        raise UserError(
            f"gct: a blur of {size} pixels does not fit into maps of {maps.shape[-2]}x{maps.shape[-1]}; use a "
            "data.crop_size that is less elongated"
        )
    weights = gaussian_weights(size, maps.device, maps.dtype)
    padded = F.pad(maps, (half, half, half, half), mode="reflect")
    return F.conv2d(F.conv2d(padded, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))


def stretched(maps: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`maps` with `low` moved to 0 and `high` to 1, per image."""
    return (maps - low) / (high - low + 1e-9)


def handled(flaws: Tensor, height: int) -> Tensor:
    """Flaw maps (B, 1, H, W) ready to be compared: without negatives, blurred, each image stretched to 0..1.

    An image whose blurred map never exceeds 0.1 is set to zero before it is stretched with the range it had, so its
    value is a constant that is not positive. Carries no gradient.

    Args:
        flaws: of the detector.
        height: H of the training images, from which the blur's size follows.

    Source: `FlawmapHandler`.
    """
    blurred = blur(flaws.detach().clamp(min=0), odd_size(height, 16))
    low, high = blurred.amin(dim=(1, 2, 3), keepdim=True), blurred.amax(dim=(1, 2, 3), keepdim=True)
    return stretched(blurred * (high > NO_FLAW), low, high)


class ConsistencyTargets(NamedTuple):
    """What each network learns from the other.

    Attributes:
        left, right: probabilities (B, K, H, W).
        both_wrong: (B, 1, H, W), 1 where neither is to be trusted.
    """

    left: Tensor
    right: Tensor
    both_wrong: Tensor


def consistency_targets(
    probs_l: Tensor, probs_r: Tensor, flaws_l: Tensor, flaws_r: Tensor, threshold: float
) -> ConsistencyTargets:
    """The prediction of whichever network seems less wrong, pixel by pixel; each keeps its own on ties.

    Args:
        probs_l: probabilities (B, K, H, W) of the first network.
        probs_r: those of the second.
        flaws_l: handled flaw map (B, 1, H, W) of the first.
        flaws_r: that of the second.
        threshold: flaws above it are all equally bad.

    Source: `DCGTGenerator`.
    """
    bad_l, bad_r = flaws_l > threshold, flaws_r > threshold
    flaws_l, flaws_r = flaws_l.masked_fill(bad_l, 1.0), flaws_r.masked_fill(bad_r, 1.0)
    left = torch.where(flaws_l <= flaws_r, probs_l, probs_r)
    right = torch.where(flaws_r <= flaws_l, probs_r, probs_l)
    return ConsistencyTargets(left, right, (bad_l & bad_r).to(probs_l.dtype))


def true_flaws(probs: Tensor, target: Tensor, height: int, mu: float, nu: int) -> Tensor:
    """What the detector should say about predictions on labeled images: (B, 1, H, W) in 0..1.

    The error `mu * sum_c |onehot_c - prob_c|` is blurred, `nu` times dilated and blurred again, and stretched to 0..1
    per image. A pixel without a label (255) has an all-zero onehot, hence the error `mu`.

    Args:
        probs: probabilities (B, K, H, W).
        target: labels (B, H, W) int64, 255 = ignore.
        height: H of the training images, from which the blurs' sizes follow.
        mu: see `GctSettings`.
        nu: see `GctSettings`.

    Source: `FDGTGenerator` and `sslgct_prepare_task_gt_for_fdgt`.
    """
    classes = torch.arange(probs.shape[1], device=probs.device).view(1, -1, 1, 1)
    onehot = (target.unsqueeze(1) == classes).to(probs.dtype)
    error = mu * (onehot - probs.detach()).abs().sum(dim=1, keepdim=True)
    error = blur(error, odd_size(height, 8))
    for _ in range(nu):
        dilated = F.max_pool2d(F.pad(error, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
        error = blur(dilated, odd_size(height, 4))
    return stretched(error, error.amin(dim=(1, 2, 3), keepdim=True), error.amax(dim=(1, 2, 3), keepdim=True))


def clipped_straight_through(flaws: Tensor) -> Tensor:
    """`max(flaws, 0)` with the gradient of `flaws`."""
    return flaws + (flaws.clamp(min=0) - flaws).detach()


def flaw_errors(flaws: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of flaw maps (B, 1, H, W), per image: (B,)."""
    return (flaws - target).square().mean(dim=(1, 2, 3))


# --- the two phases --------------------------------------------------------------------------------------------


def predicted(scores: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """Logits of both networks on all images, the labeled ones first."""
    left, right = (torch.cat(parts) for parts in scores)
    return left, right


def frozen(detector: nn.Module, images: Tensor, *predictions: Tensor) -> list[Tensor]:
    """The detector's maps with gradients for the predictions and none for its parameters; its statistics move."""
    fixed = {name: parameter.detach() for name, parameter in detector.named_parameters()}
    return torch.func.functional_call(detector, fixed, (images, *predictions))


def gct_step(batch: Batches, at: Progress, run: Run) -> Losses:
    """Losses of the two networks in one forward; the detector passes gradients on and learns nothing.

    Every network and the detector go over the images twice, as in the original: without gradients for the targets,
    and with them for the losses. Both move the running statistics.
    """
    nets, settings, detector = run.nets, run.cfg.method.gct, run.nets.modules["detector"]
    (x_l, y_l), x_u = batch[0][:2], batch[1].image
    images = torch.cat((x_l, x_u))
    with torch.no_grad():
        probs_l, probs_r = (logits.softmax(dim=1) for logits in predicted(nets.teach(x_l, x_u)))
        flaws_l, flaws_r = (handled(flaws, images.shape[-2]) for flaws in detector(images, probs_l, probs_r))
        targets = consistency_targets(probs_l, probs_r, flaws_l, flaws_r, settings.dc_threshold)
    scores = nets.forward(x_l, x_u)
    # without a name the joined logits are freed before the detector runs
    probs_l, probs_r = (logits.softmax(dim=1) for logits in predicted(scores))
    flaws_l, flaws_r = frozen(detector, images, probs_l, probs_r)
    sup_l, sup_r = (nets.criterion(labeled, y_l) for labeled, _ in scores)
    correction = (targets.both_wrong * (flaws_l.square() + flaws_r.square())).mean()
    consistency = F.mse_loss(probs_l, targets.left) + F.mse_loss(probs_r, targets.right)
    ramp = sigmoid_ramp(at.step, settings.dc_ramp_epochs * at.length)
    fc, dc = settings.fc_weight * correction, ramp * settings.dc_weight * consistency
    terms = {"loss_sup": sup_l, "loss_sup_2": sup_r, "loss_fc": fc, "loss_dc": dc}
    return Losses(sup_l + sup_r + fc + dc, terms | {"both_wrong": targets.both_wrong.mean()})


def detector_step(batch: Batches, at: Progress, run: Run) -> Losses:
    """Loss of the detector against the true flaws of both networks, which have just made their step.

    The detector sees the unlabeled images too, for its statistics, but learns from the labeled ones alone.
    """
    del at  # all steps have one signature
    nets, settings = run.nets, run.cfg.method.gct
    (x_l, y_l), x_u = batch[0][:2], batch[1].image
    assert nets.detect is not None, "only GCT has a second phase"
    with torch.no_grad():
        probs = [logits.softmax(dim=1) for logits in predicted(nets.teach(x_l, x_u))]
        targets = [true_flaws(p[: len(x_l)], y_l, x_l.shape[-2], settings.mu, settings.nu) for p in probs]
    maps = [flaws[: len(x_l)] for flaws in nets.detect(torch.cat((x_l, x_u)), *probs)]
    if settings.straight_through_clip:
        maps = [clipped_straight_through(flaws) for flaws in maps]
    errors = [flaw_errors(flaws, target).mean() for flaws, target in zip(maps, targets, strict=True)]
    loss = settings.detector_weight * torch.stack(errors).mean()
    return Losses(loss, {"loss_d": loss})
