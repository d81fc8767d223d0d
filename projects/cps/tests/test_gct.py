"""Guided collaborative training: maps against plain renditions, the detector, the two phases and their quirks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import nn

from common.config import build
from common.data.loaders import Batch
from common.data.spec import IGNORE
from common.errors import UserError
from common.numerics.losses import Losses
from common.run.progress import Progress
from projects.cps.baselines import gct
from projects.cps.baselines.config import DETECTOR_STRIDES, GctSettings
from projects.cps.baselines.gct import FlawDetector, detector_step, gct_step
from projects.cps.losses import supervised
from projects.cps.model import BRANCHES, Branches, Networks
from projects.cps.tests import toys

K, H, W = 4, 128, 100
DTYPES = [torch.float32, torch.float64]
CPU = torch.device("cpu")


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def labels(seed: int, *shape: int, ignored: float = 0.2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(0, K, shape, generator=generator)
    found[torch.rand(shape, generator=generator) < ignored] = IGNORE
    return found


# --- maps ------------------------------------------------------------------------------------------------------


def test_the_ramp() -> None:
    values = [gct.sigmoid_ramp(step, 10) for step in (0, 5, 10, 20)]
    assert values == pytest.approx([math.exp(-5), math.exp(-1.25), 1, 1])
    assert gct.sigmoid_ramp(0, 0) == 1.0


def test_sizes_of_blurs_are_odd() -> None:
    assert [gct.odd_size(512, d) for d in (16, 8, 4)] == [33, 65, 129]
    assert [gct.odd_size(side, 16) for side in (4, 16, 47, 48)] == [1, 1, 3, 3]


def plane_kernel(size: int) -> np.ndarray:
    impulse = np.zeros((size, size))
    impulse[size // 2, size // 2] = 1
    return gaussian_filter(impulse, 0.3 * ((size - 1) * 0.5 - 1) + 0.8)


@pytest.mark.parametrize("size", [1, 3, 7, 33, 65])
def test_the_kernel_is_that_of_the_plane(size: int) -> None:
    weights = gct.gaussian_weights(size, CPU, torch.float64)
    np.testing.assert_allclose(torch.outer(weights, weights).numpy(), plane_kernel(size), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 3, 9])
def test_blur_is_a_convolution_with_a_reflected_border(size: int, dtype: torch.dtype) -> None:
    maps, half = normal(0, 2, 1, 11, 6, dtype=dtype), size // 2
    kernel = torch.from_numpy(plane_kernel(size)).to(dtype).view(1, 1, size, size)
    plain = F.conv2d(F.pad(maps, (half,) * 4, mode="reflect"), kernel)
    torch.testing.assert_close(gct.blur(maps, size), plain)


def test_a_blur_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="less elongated"):
        gct.blur(torch.zeros(1, 1, 64, 8), 17)


@pytest.mark.parametrize("dtype", DTYPES)
def test_handled_maps(dtype: torch.dtype) -> None:
    flaws = normal(0, 3, 1, 48, 40, dtype=dtype)
    flaws[1] *= 0.05  # blurred, it stays below the limit
    flaws[2] = -1.0
    before = flaws.clone()
    out = gct.handled(flaws.requires_grad_(), 48)
    assert torch.equal(flaws.detach(), before)
    assert not out.requires_grad
    blurred = gct.blur(before.clamp(min=0), 3)
    low, high = blurred[:2].amin((1, 2, 3)), blurred[:2].amax((1, 2, 3))
    torch.testing.assert_close(out[0], (blurred[0] - low[0]) / (high[0] - low[0]))
    constant = (-low[1] / (high[1] - low[1])).item()
    assert constant <= 0
    assert out[1].unique().tolist() == pytest.approx([constant])
    assert not out[2].any()
    assert gct.handled(before, 96).isfinite().all()


def test_the_less_wrong_network_teaches_the_other() -> None:
    probs_l, probs_r = normal(1, 1, K, 1, 4).softmax(1), normal(2, 1, K, 1, 4).softmax(1)
    flaws_l = torch.tensor([0.1, 0.3, 0.7, 0.6]).view(1, 1, 1, 4).double()
    flaws_r = torch.tensor([0.2, 0.3, 0.9, 0.5]).view(1, 1, 1, 4).double()
    out = gct.consistency_targets(probs_l, probs_r, flaws_l, flaws_r, 0.6)
    left = torch.stack([probs_l[..., 0], probs_l[..., 1], probs_l[..., 2], probs_r[..., 3]], -1)
    right = torch.stack([probs_l[..., 0], probs_r[..., 1], probs_r[..., 2], probs_r[..., 3]], -1)
    assert torch.equal(out.left, left)  # equal ones, and ones beyond the threshold, keep their own
    assert torch.equal(out.right, right)
    assert out.both_wrong.flatten().tolist() == [0, 0, 1, 0]


def plain_true_flaws(
    probs: torch.Tensor, target: torch.Tensor, height: int, mu: float, nu: int
) -> torch.Tensor:
    error = torch.zeros(len(probs), 1, *probs.shape[-2:], dtype=probs.dtype)
    for c in range(probs.shape[1]):
        error[:, 0] += mu * ((target == c).to(probs.dtype) - probs[:, c]).abs()
    error = gct.blur(error, gct.odd_size(height, 8))
    for _ in range(nu):
        padded = F.pad(error, (1, 1, 1, 1), mode="reflect")
        shape = error.shape[-2:]
        views = [padded[..., i : i + shape[0], j : j + shape[1]] for i in range(3) for j in range(3)]
        error = gct.blur(torch.stack(views).amax(0), gct.odd_size(height, 4))
    return torch.stack([(e - e.min()) / (e.max() - e.min() + 1e-9) for e in error])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nu", [0, 1, 2])
def test_true_flaws(nu: int, dtype: torch.dtype) -> None:
    probs, target = normal(1, 2, K, 32, 28, dtype=dtype).mul(2).softmax(1), labels(2, 2, 32, 28)
    out = gct.true_flaws(probs, target, 32, 0.5, nu)
    torch.testing.assert_close(out, plain_true_flaws(probs, target, 32, 0.5, nu), rtol=1e-4, atol=1e-4)
    assert out.amin((1, 2, 3)).tolist() == [0, 0]
    assert out.amax((1, 2, 3)).tolist() == pytest.approx([1, 1])


def test_a_perfect_prediction_has_no_flaw() -> None:
    target = labels(2, 2, 32, 28, ignored=0)
    probs = F.one_hot(target, K).movedim(-1, 1).double()
    assert not gct.true_flaws(probs, target, 32, 0.5, 1).any()


def test_the_clip_lets_the_gradient_pass() -> None:
    flaws = torch.tensor([-2.0, -0.5, 0.0, 3.0], dtype=torch.float64, requires_grad=True)
    clipped = gct.clipped_straight_through(flaws)
    assert clipped.tolist() == [0, 0, 0, 3]
    (clipped - 1).square().sum().backward()
    assert flaws.grad.tolist() == [-2, -2, -2, 4]


def test_errors_are_per_image() -> None:
    flaws, target = normal(0, 2, 1, 3, 4), normal(1, 2, 1, 3, 4)
    expected = [F.mse_loss(a, b) for a, b in zip(flaws, target, strict=True)]
    torch.testing.assert_close(gct.flaw_errors(flaws, target), torch.stack(expected))


# --- the detector ----------------------------------------------------------------------------------------------


def detector_of(dtype: torch.dtype = torch.float64) -> FlawDetector:
    torch.manual_seed(0)
    detector = FlawDetector(K, planes=4)
    with torch.no_grad():
        detector.classifier.weight.mul_(10)  # maps that exceed the limit in places
    return detector.to(dtype).train()


def test_normalization_keeps_the_layout() -> None:
    layer, x = gct.HalfBatchNorm(5), normal(0, 3, 5, 4, 6, dtype=torch.float32)
    last = layer(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, layer(x))


def test_half_of_the_channels_is_normalized_over_the_batch() -> None:
    layer, x = gct.HalfBatchNorm(5).double().train(), normal(0, 3, 5, 4, 4)
    out = layer(x)
    torch.testing.assert_close(out[:, :3], F.batch_norm(x[:, :3], None, None, training=True))
    torch.testing.assert_close(out[:, 3:], F.instance_norm(x[:, 3:]))
    assert layer.bnorm.num_features == 3


@pytest.mark.parametrize(("height", "width"), [(60, 60), (64, 100)])
def test_maps_have_the_size_of_the_images(height: int, width: int) -> None:
    images, probs = normal(0, 2, 3, height, width), normal(1, 2, K, height, width).softmax(1)
    first, second = detector_of()(images, probs, 1 - probs)
    assert first.shape == second.shape == (2, 1, height, width)


@pytest.mark.parametrize(("strides", "smallest"), [(DETECTOR_STRIDES, 60), ((2, 2, 1, 1, 1, 1, 1, 1), 28)])
def test_small_images_are_refused(strides: tuple[int, ...], smallest: int) -> None:
    detector = FlawDetector(K, 4, strides)
    images, probs = torch.zeros(2, 3, smallest, 80), torch.zeros(2, K, smallest, 80)
    assert detector(images, probs)[0].shape == (2, 1, smallest, 80)
    with pytest.raises(UserError, match=f"at least {smallest},"):
        detector(images[..., 1:, :], probs[..., 1:, :])


def test_every_prediction_has_statistics_of_its_own() -> None:
    detector, twin, images = detector_of(), detector_of(), normal(0, 2, 3, H, W)
    predictions = [normal(seed, 2, K, H, W).softmax(1) for seed in (1, 2)]
    together = detector(images, *predictions)
    for one, probs in zip(together, predictions, strict=True):
        torch.testing.assert_close(one, twin(images, probs)[0])
    torch.testing.assert_close(detector.state_dict(), twin.state_dict())


def test_a_frozen_detector_passes_gradients_on() -> None:
    detector, images = detector_of(), normal(0, 2, 3, H, W)
    probs = normal(1, 2, K, H, W).softmax(1).requires_grad_()
    (flaws,) = gct.frozen(detector, images, probs)
    torch.testing.assert_close(flaws, detector_of()(images, probs)[0])
    assert int(detector.ibn1.bnorm.num_batches_tracked) == 1  # statistics move all the same
    flaws.square().sum().backward()
    assert probs.grad.abs().sum() > 0
    assert all(p.grad is None and p.requires_grad for p in detector.parameters())


def test_maps_of_half_precision_are_widened() -> None:
    detector, images = detector_of(torch.float32), normal(0, 2, 3, H, W, dtype=torch.float32)
    probs = normal(1, 2, K, H, W, dtype=torch.float32).softmax(1)
    (full,) = detector(images, probs)
    detector.precision = "bf16"
    (half,) = detector(images, probs)
    assert half.dtype == torch.float32
    assert 0 < (half - full).abs().max() < 0.1 * full.abs().max()


def test_the_detectors_optimizer() -> None:
    optimizer = gct.detector_optimizer(detector_of(), GctSettings())
    (group,) = optimizer.param_groups
    assert (group["lr"], group["initial_lr"]) == (4e-4, 4e-4)
    assert (group["betas"], group["weight_decay"], group["fused"]) == ((0.9, 0.99), 0, True)


# --- phases ----------------------------------------------------------------------------------------------------


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, K, 5, padding=2), nn.BatchNorm2d(K)

    def forward(self, x: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, self.norm(self.conv(x))


class Trio:
    """Two networks, a detector and a batch."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.detector = detector_of(dtype)
        self.networks = [Toy().to(dtype).train() for _ in range(2)]
        self.x_l, self.x_u = normal(1, 2, 3, H, W, dtype=dtype), normal(2, 1, 3, H, W, dtype=dtype)
        self.y_l = labels(3, 2, H, W)

    def forward(self, *batches: torch.Tensor) -> list[list[torch.Tensor]]:
        return [[network(x)[1] for x in batches] for network in self.networks]

    @torch.no_grad()
    def teach(self, *batches: torch.Tensor) -> list[list[torch.Tensor]]:
        return self.forward(*batches)

    def step(self, phase: Callable[..., Losses], changes: dict[str, object]) -> Losses:
        cfg = toys.config("gct", method={"name": "gct", "gct": changes})
        modules = {**dict(zip(BRANCHES, self.networks, strict=True)), "detector": self.detector}
        nets = Networks(modules, Branches(self.networks), supervised, detect=self.detector)
        batch = (Batch(self.x_l, self.y_l, None), Batch(self.x_u, None, None))
        return phase(batch, Progress(7, 10, 10), toys.run_of(cfg, nets))

    def task(self, ramp: float = 0.5, **changes: object) -> Losses:
        def given(step: int, length: int) -> float:
            assert (step, length) == (7, 30)  # three epochs
            return ramp

        with mock.patch.object(gct, "sigmoid_ramp", given):
            return self.step(gct_step, changes)

    def detect(self, **changes: object) -> Losses:
        return self.step(detector_step, changes)

    def gradients(self) -> list[bool]:
        """Whether the first network, the second and the detector have any."""
        return [
            any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())
            for module in (*self.networks, self.detector)
        ]

    def batches_seen(self) -> list[int]:
        norms = [*(network.norm for network in self.networks), self.detector.ibn1.bnorm]
        return [int(norm.num_batches_tracked) for norm in norms]


@pytest.mark.parametrize("dtype", DTYPES)
def test_terms_of_the_task_phase(dtype: torch.dtype) -> None:
    trio = Trio(dtype)
    twin = copy.deepcopy(trio)
    result = trio.task(ramp=0.5, dc_threshold=0.3, fc_weight=2.0)
    images = torch.cat((twin.x_l, twin.x_u))
    logits = [torch.cat(parts) for parts in twin.forward(twin.x_l, twin.x_u)]
    probs = [one.softmax(1) for one in logits]
    maps = [m.detach() for m in twin.detector(images, *probs)]
    handled = [gct.handled(m, H) for m in maps]
    targets = gct.consistency_targets(*[p.detach() for p in probs], *handled, 0.3)
    correction = 2.0 * sum((targets.both_wrong * m**2).mean() for m in maps)
    consistency = 50 * (F.mse_loss(probs[0], targets.left) + F.mse_loss(probs[1], targets.right))
    close = {"rtol": 1e-4, "atol": 1e-6}
    assert targets.both_wrong.any()
    torch.testing.assert_close(result.terms["loss_fc"].detach(), correction, **close)
    torch.testing.assert_close(result.terms["loss_dc"], consistency, **close)
    for name, one in zip(("loss_sup", "loss_sup_2"), logits, strict=True):
        expected = F.cross_entropy(one[:2], twin.y_l, ignore_index=IGNORE)
        torch.testing.assert_close(result.terms[name], expected, **close)
    parts = sum(result.terms[name] for name in ("loss_sup", "loss_sup_2", "loss_fc", "loss_dc"))
    torch.testing.assert_close(result.total, parts)
    assert result.total.dtype == dtype


def test_the_task_phase_trains_the_networks_alone() -> None:
    trio = Trio()
    trio.task().total.backward()
    assert trio.gradients() == [True, True, False]
    assert trio.batches_seen() == [4, 4, 4]  # everything is seen twice


def test_the_correction_reaches_the_networks_through_the_detector() -> None:
    trio = Trio()
    trio.task(dc_threshold=0.3).terms["loss_fc"].backward()
    assert trio.gradients() == [True, True, False]


def test_the_ramp_scales_the_consistency() -> None:
    start, end = (Trio().task(ramp=ramp).terms["loss_dc"] for ramp in (0.0, 1.0))
    assert start == 0
    torch.testing.assert_close(Trio().task(ramp=0.25).terms["loss_dc"], end / 4)


def test_the_detector_phase_trains_the_detector_alone() -> None:
    trio = Trio()
    trio.detect().total.backward()
    assert trio.gradients() == [False, False, True]
    assert trio.batches_seen() == [2, 2, 2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip", [True, False])
def test_the_detector_learns_from_clipped_or_whole_maps(clip: bool, dtype: torch.dtype) -> None:
    trio = Trio(dtype)
    twin = copy.deepcopy(trio)
    result = trio.detect(straight_through_clip=clip)
    probs = [torch.cat(parts).softmax(1) for parts in twin.teach(twin.x_l, twin.x_u)]
    maps = [m[:2] for m in twin.detector(torch.cat((twin.x_l, twin.x_u)), *probs)]
    assert any((m < 0).any() for m in maps)
    targets = [gct.true_flaws(p[:2], twin.y_l, H, 0.5, 1) for p in probs]
    seen = [m.detach().clamp(min=0) if clip else m.detach() for m in maps]
    expected = sum(10 * F.mse_loss(m, t) for m, t in zip(seen, targets, strict=True)) / 2
    torch.testing.assert_close(result.total.detach(), expected)
    result.total.backward()
    # the gradient at the map is that of the squared error of what was seen, negative or not
    slopes = [10 * (m - t) / m.numel() for m, t in zip(seen, targets, strict=True)]
    torch.autograd.backward(maps, slopes)
    ours, plain = trio.detector.conv1.weight.grad, twin.detector.conv1.weight.grad
    limit = (1e-3 if dtype == torch.float32 else 1e-9) * float(plain.abs().max())
    torch.testing.assert_close(ours, plain, rtol=0, atol=limit)
    assert result.terms["loss_d"] is result.total


def test_nothing_labeled_is_finite() -> None:
    trio = Trio()
    trio.y_l = torch.full_like(trio.y_l, IGNORE)
    for result in (trio.task(), trio.detect()):
        result.total.backward()
        assert result.total.isfinite()
    assert all(
        p.grad.isfinite().all() for module in (*trio.networks, trio.detector) for p in module.parameters()
    )


def test_a_detector_without_an_opinion_keeps_everything_finite() -> None:
    trio = Trio()
    nn.init.zeros_(trio.detector.classifier.weight)
    nn.init.zeros_(trio.detector.classifier.bias)
    result = trio.task(ramp=1.0)
    assert (result.terms["loss_fc"], result.terms["loss_dc"]) == (0, 0)  # ties: each keeps its own
    result.total.backward()
    assert all(p.grad.isfinite().all() for network in trio.networks for p in network.parameters())


def test_dividing_the_total_divides_every_part() -> None:
    trio = Trio()
    result, weight = trio.task(dc_threshold=0.3), trio.networks[1].conv.weight
    names = ("loss_sup_2", "loss_fc", "loss_dc")
    (whole,) = torch.autograd.grad(result.total / 4, weight, retain_graph=True)
    parts = [torch.autograd.grad(result.terms[n] / 4, weight, retain_graph=True)[0] for n in names]
    torch.testing.assert_close(whole, sum(parts))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dc_weight", -1.0),
        ("nu", -1),
        ("detector_planes", 3),
        ("detector_planes", 0),
        ("detector_lr", 0.0),
        ("detector_strides", [2] * 7 + [0]),
    ],
)
def test_settings_out_of_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=key):
        build(GctSettings, {key: value})
