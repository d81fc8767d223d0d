"""Cross-consistency training: losses against plain renditions, perturbations, contours, draws, gradients."""

from __future__ import annotations

import dataclasses
import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.config import build
from common.data.loaders import Batch
from common.data.spec import IGNORE
from common.errors import UserError
from common.numerics.losses import Losses
from common.run.progress import Progress
from projects.cps.baselines import cct
from projects.cps.baselines.cct import AuxDecoders, CctModel, cct_step
from projects.cps.baselines.config import CctSettings
from projects.cps.baselines.draws import CctDraws
from projects.cps.losses import supervised
from projects.cps.model import Networks
from projects.cps.network import CpsNetwork, parameter_groups
from projects.cps.tests import toys

K, D = 4, 6
DTYPES = [torch.float32, torch.float64]
CPU = torch.device("cpu")


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def labels(seed: int, *shape: int, ignored: float = 0.3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(0, K, shape, generator=generator)
    found[torch.rand(shape, generator=generator) < ignored] = IGNORE
    return found


# --- supervised loss -------------------------------------------------------------------------------------------


def test_the_threshold_rises_and_stays() -> None:
    total = cct.annealing_steps(10, 50)
    assert total == pytest.approx(200)
    values = [cct.annealed_threshold(step, total, 5) for step in (0, 99, 199, 200, 499)]
    shares = [1 - math.exp(-5 * t) for t in (1 / 200, 0.5, 1, 1, 1)]
    assert values == pytest.approx([0.2 + share * 0.79 for share in shares])
    assert cct.annealed_threshold(0, 0.0, 5) == 0.99


def plain_bootstrapped(logits: torch.Tensor, target: torch.Tensor, threshold: float) -> float:
    rows = logits.movedim(1, -1)[target != IGNORE].double().softmax(dim=1).numpy()
    probs = sorted(rows[i, y] for i, y in enumerate(target[target != IGNORE].tolist()))
    if not probs:
        return 0.0
    limit = max(probs[min(len(target), len(probs) - 1)], threshold)
    chosen = [-math.log(p) for p in probs if p < limit]
    return sum(chosen) / len(chosen) if chosen else 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.6, 0.99])
@pytest.mark.parametrize("ignored", [0.0, 0.4, 0.97, 1.0])
def test_bootstrapped_cross_entropy(ignored: float, threshold: float, dtype: torch.dtype) -> None:
    logits, target = normal(1, 4, K, 5, 6, dtype=dtype) * 2, labels(2, 4, 5, 6, ignored=ignored)
    for groups in (1, 2, 4):
        ours = cct.bootstrapped_cross_entropy(logits, target, threshold, groups=groups)
        parts = zip(logits.chunk(groups), target.chunk(groups), strict=True)
        plain = np.mean([plain_bootstrapped(a, b, threshold) for a, b in parts])
        assert float(ours) == pytest.approx(plain, rel=1e-5, abs=1e-7)
        assert ours.dtype == dtype


def test_a_few_pixels_count_even_where_all_are_known() -> None:
    logits = torch.zeros(2, 2, 1, 3)
    logits[:, 0] = torch.tensor([3.0, 4.0, 5.0])
    logits[1] += torch.tensor([1.5, 0.0]).view(2, 1, 1)
    target = torch.zeros(2, 1, 3, dtype=torch.long)
    hardest = sorted(F.cross_entropy(logits, target, reduction="none").flatten().tolist())[-2:]
    assert float(cct.bootstrapped_cross_entropy(logits, target, 0.5)) == pytest.approx(np.mean(hardest))


def test_left_out_pixels_get_no_gradient() -> None:
    logits = normal(3, 1, K, 4, 4).mul(3).requires_grad_()
    target = labels(4, 1, 4, 4)
    cct.bootstrapped_cross_entropy(logits, target, 0.5).backward()
    known = logits.detach().softmax(1).gather(1, target.where(target != IGNORE, 0)[:, None])[:, 0] >= 0.5
    moved = logits.grad.abs().sum(1) > 0
    assert torch.equal(moved, (target != IGNORE) & ~known)
    assert moved.any()


def test_no_label_gives_a_zero_without_nan() -> None:
    logits = normal(3, 2, K, 4, 4).requires_grad_()
    loss = cct.bootstrapped_cross_entropy(logits, torch.full((2, 4, 4), IGNORE), 0.3, groups=2)
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


# --- consistency -----------------------------------------------------------------------------------------------


def plain_consistency(logits: torch.Tensor, target: torch.Tensor, kind: str, sure: float | None) -> float:
    q, t = logits.double().softmax(1).numpy(), target.double().numpy()
    if kind == "js":
        m = (q + t) / 2
        return float((m * (np.log(m) - np.log(q)) + m * (np.log(m) - np.log(t + 1e-5))).mean() / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        each = (q - t) ** 2 if kind == "mse" else np.where(t == 0, 0, t * (np.log(t) - np.log(q)))
    if sure is None:
        return float(each.mean())
    kept = t.max(axis=1) > sure
    if not kept.any():
        return 0.0
    chosen = np.moveaxis(each, 1, -1)[kept]
    return float(chosen.mean() if kind == "mse" else chosen.sum() / kept.size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sure", [None, 0.2, 0.5, 0.9999])
@pytest.mark.parametrize("kind", ["mse", "kl", "js"])
def test_consistency(kind: str, sure: float | None, dtype: torch.dtype) -> None:
    logits = normal(5, 2, K, 4, 5, dtype=dtype).requires_grad_()
    target = (normal(6, 2, K, 4, 5, dtype=dtype) * 2).softmax(1)
    target[0, :, 0, 0] = torch.eye(K)[1]
    target[0, :, 0, 0] *= 0.9  # below the highest threshold, and with zeros
    loss = cct.consistency_loss(logits, target, kind, sure)
    assert float(loss.detach()) == pytest.approx(
        plain_consistency(logits.detach(), target, kind, sure), rel=2e-5
    )
    loss.backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_nothing_confident_gives_zero(kind: str) -> None:
    logits = normal(5, 1, K, 3, 3).requires_grad_()
    loss = cct.consistency_loss(logits, torch.full((1, K, 3, 3), 1 / K, dtype=torch.float64), kind, 0.5)
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("kind", ["mse", "kl", "js"])
def test_extreme_scores_keep_the_gradient_finite(kind: str) -> None:
    logits = torch.tensor([200.0, -200.0]).view(1, 2, 1, 1).requires_grad_()
    target = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    loss = cct.consistency_loss(logits, target, kind)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_the_target_gets_no_gradient() -> None:
    logits, target = normal(1, 1, K, 2, 2).requires_grad_(), normal(2, 1, K, 2, 2).softmax(1).requires_grad_()
    for kind in ("mse", "kl", "js"):
        cct.consistency_loss(logits, target, kind).backward()
    assert target.grad is None


# --- perturbations ---------------------------------------------------------------------------------------------


def test_spatial_dropout_drops_whole_channels_and_keeps_the_mean() -> None:
    feature = normal(1, 2, D, 3, 4).abs() + 0.1
    uniform = torch.tensor([0.0, 0.29, 0.3, 0.9, 0.1, 0.5]).view(1, D, 1, 1).expand(2, D, 1, 1)
    out = cct.spatial_dropout(feature, uniform, 0.3)
    kept = [2, 3, 5]
    torch.testing.assert_close(out[:, kept], feature[:, kept] / 0.7)
    assert not out[:, [0, 1, 4]].any()


def test_masked_features_add_up() -> None:
    feature, objects = normal(1, 2, D, 3, 4), (normal(2, 2, 1, 12, 16) > 0)
    inside, outside = cct.context_masking(feature, objects), cct.object_masking(feature, objects)
    torch.testing.assert_close(inside + outside, feature)
    assert torch.equal(inside != 0, objects[..., ::4, ::4].expand_as(feature))


def test_feature_drop_takes_away_the_strongest_places_of_each_image() -> None:
    feature = (
        torch.tensor([[[1.0, 7.0, 8.0, 10.0]], [[0.1, 0.2, 0.3, 0.35]]]).view(2, 1, 1, 4).expand(2, D, 1, 4)
    )
    out = cct.feature_drop(feature, 0.8)
    assert (out[:, 0, 0] > 0).tolist() == [[True, True, False, False], [True, True, False, False]]
    assert not cct.feature_drop(torch.zeros(1, D, 2, 2), 0.8).any()


def test_noise_is_relative_and_shared_by_the_batch() -> None:
    feature, noise = normal(1, 2, D, 3, 4), normal(2, D, 3, 4)
    torch.testing.assert_close(cct.feature_noise(feature, noise), feature * (1 + noise))


def disc(height: int, width: int, row: int, col: int, radius: int) -> np.ndarray:
    rows, cols = np.mgrid[:height, :width]
    return ((rows - row) ** 2 + (cols - col) ** 2 <= radius**2).astype(np.uint8)


def test_only_contours_with_many_points_are_boxed() -> None:
    square = np.zeros((100, 90), np.uint8)
    square[10:80, 10:80] = 1  # four stored points
    assert cct.contour_boxes(square) == []
    assert cct.contour_boxes(np.zeros((100, 90), np.uint8)) == []
    ((left, right, top, bottom),) = cct.contour_boxes(disc(100, 90, 50, 40, 30))
    assert (left, right, top, bottom) == (10, 70, 20, 80)


def test_cutout_blanks_a_rectangle_inside_the_box() -> None:
    asked = []

    def place(low: int, high: int) -> int:
        asked.append((low, high))
        return high - len(asked)

    mask = cct.cutout_mask([[(10, 70, 20, 95)], []], 120, 100, 0.4, place)
    assert asked == [(0, 36), (0, 45)]  # column, then row
    expected = torch.ones(2, 1, 120, 100)
    expected[0, 0, 20 + 43 : 20 + 43 + 30, 10 + 35 : 10 + 35 + 24] = 0
    assert torch.equal(mask, expected)


def settings(*decoders: str, **changes: object) -> CctSettings:
    return build(CctSettings, {"decoders": decoders, **changes} if decoders else changes)


def scores_of(*maps: np.ndarray) -> torch.Tensor:
    objects = torch.from_numpy(np.stack(maps)).double().unsqueeze(1)
    return torch.cat((1 - objects, objects), dim=1)


def test_the_device_is_asked_once_for_all_cutouts(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = cct.object_maps
    monkeypatch.setattr(cct, "object_maps", lambda x: calls.append(x.shape) or original(x))
    logits, feature = scores_of(disc(80, 80, 40, 40, 35), disc(80, 80, 40, 40, 30)), torch.ones(2, D, 20, 20)
    draws = CctDraws(0, 0, CPU)
    first, second = cct.perturbed(feature, logits, settings("cutout", "cutout"), draws)
    assert calls == [(2, 1, 80, 80)]
    assert (first == 0).any()
    assert not torch.equal(first, second)
    cct.perturbed(feature, logits, settings("feature_drop", "context_masking"), draws)
    assert len(calls) == 1  # without a cut-out, nothing waits


def test_no_contour_leaves_features_alone_and_draws_nothing() -> None:
    draws, feature = CctDraws(0, 0, CPU), normal(1, 2, D, 5, 5)
    before = draws.state_dict()["places"].clone()
    (out,) = cct.perturbed(feature, torch.zeros(2, K, 20, 20), settings("cutout"), draws)
    assert torch.equal(out, feature)
    assert torch.equal(draws.state_dict()["places"], before)


def test_perturbations_come_in_the_order_of_the_settings() -> None:
    names = CctSettings().decoders
    assert len(names) == 12
    logits, feature = scores_of(disc(80, 80, 40, 40, 35)), normal(1, 1, D, 20, 20).abs()
    out = cct.perturbed(feature, logits, CctSettings(), CctDraws(0, 0, CPU))
    objects = logits.argmax(1, keepdim=True)
    for number, name in enumerate(names):
        ratio = out[number] / feature
        if name == "spatial_dropout":
            assert torch.equal(ratio.amin((2, 3)), ratio.amax((2, 3)))
            assert set(ratio.unique().tolist()) <= {0.0, 2.0}
        elif name == "context_masking":
            assert torch.equal(ratio > 0, objects[..., ::4, ::4].bool().expand_as(feature))
        elif name == "object_masking":
            assert torch.equal(ratio == 0, objects[..., ::4, ::4].bool().expand_as(feature))
        elif name == "feature_noise":
            assert (ratio - 1).abs().max() <= 0.3 + 1e-12
            assert (ratio - 1).abs().max() > 0.25
        else:
            assert set(ratio.unique().tolist()) == {0.0, 1.0}
            assert torch.equal(ratio.amin(1), ratio.amax(1))


# --- draws -----------------------------------------------------------------------------------------------------


def sequence(draws: CctDraws) -> list[object]:
    like = torch.zeros((), dtype=torch.float32)
    return [draws.place(0, 1000), draws.share(0.7, 0.9), draws.uniform(3, like=like).tolist()]


def test_draws_continue_after_a_checkpoint() -> None:
    draws = CctDraws(3, 1, CPU)
    sequence(draws)
    stored = io.BytesIO()
    torch.save(draws.state_dict(), stored)
    expected = [sequence(draws) for _ in range(3)]
    stored.seek(0)
    other = CctDraws(99, 0, CPU)
    other.load_state_dict(torch.load(stored, weights_only=True))
    assert [sequence(other) for _ in range(3)] == expected


def test_draws_differ_between_processes_and_repeat_with_the_seed() -> None:
    assert sequence(CctDraws(3, 0, CPU)) == sequence(CctDraws(3, 0, CPU))
    assert sequence(CctDraws(3, 0, CPU)) != sequence(CctDraws(3, 1, CPU))


# --- the model -------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, D, 7, 4, 3, bias=False), nn.BatchNorm2d(D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)).relu()


def model_of(cfg: CctSettings, separate: bool = True, dtype: torch.dtype = torch.float64) -> CctModel:
    torch.manual_seed(0)
    network = CpsNetwork(Encoder(), nn.Identity(), nn.Conv2d(D, K, 1))
    return CctModel(network, AuxDecoders(D, K, len(cfg.decoders)), cfg, separate).to(dtype).train()


def batch(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        normal(1, 2, 3, 24, 16, dtype=dtype),
        labels(2, 2, 24, 16),
        normal(3, 3, 3, 24, 16, dtype=dtype) + 1,
    )


def step(
    model: CctModel,
    x_l: torch.Tensor,
    y_l: torch.Tensor,
    x_u: torch.Tensor,
    *,
    seed: int = 0,
    processes: int = 1,
) -> Losses:
    """The third of ten steps."""
    cfg = toys.config("cct", optim={"lr": 0.1, "epochs": 2, "batch_size": 2, "paper_processes": processes})
    cfg = dataclasses.replace(cfg, method=dataclasses.replace(cfg.method, cct=model.settings))
    nets = Networks({"branch1": model.branch1, "auxiliary": model.auxiliary}, model, supervised)
    run = toys.run_of(cfg, nets, CctDraws(seed, 0, CPU))
    return cct_step((Batch(x_l, y_l, None), Batch(x_u, None, None)), Progress(2, 5, 2), run)


@pytest.mark.parametrize("dtype", DTYPES)
def test_terms_of_a_step(dtype: torch.dtype) -> None:
    cfg = settings("context_masking", "object_masking", weight=7.0)
    model, (x_l, y_l, x_u) = model_of(cfg, dtype=dtype), batch(dtype)
    result = step(model, x_l, y_l, x_u)
    threshold = cct.annealed_threshold(2, 4.0, K)  # 40 % of ten steps
    _, scores = model.branch1(x_l)
    sup = cct.bootstrapped_cross_entropy(cct.times_four(scores), y_l, threshold)
    torch.testing.assert_close(result.terms["loss_sup"], sup)
    feature, main = model.branch1(x_u)
    main = F.interpolate(main, scale_factor=4, mode="bilinear", align_corners=True)
    objects = F.interpolate((main.argmax(1, keepdim=True) > 0).to(dtype), scale_factor=0.25)
    plain = 0.0
    for decoder, x in zip(
        model.auxiliary.decoders, (feature * objects, feature * (1 - objects)), strict=True
    ):
        score = F.interpolate(decoder(x), scale_factor=4, mode="bilinear", align_corners=True)
        plain += F.mse_loss(score.softmax(1), main.softmax(1)) / 2
    torch.testing.assert_close(result.terms["loss_unsup"], 7.0 * plain)
    torch.testing.assert_close(result.total, result.terms["loss_sup"] + result.terms["loss_unsup"])
    assert result.total.dtype == dtype


def test_the_main_decoder_learns_from_labels_alone() -> None:
    cfg = CctSettings()
    model, (x_l, y_l, x_u) = model_of(cfg), batch()
    result = step(model, x_l, y_l, x_u)
    result.terms["loss_unsup"].backward()
    assert model.branch1.classifier.weight.grad is None
    assert all(decoder.bias.grad.abs().sum() > 0 for decoder in model.auxiliary.decoders)
    assert model.branch1.backbone.conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("separate", [True, False])
def test_statistics_of_labeled_and_unlabeled_images(separate: bool) -> None:
    model, (x_l, _, x_u) = model_of(CctSettings(), separate), batch()
    twin = model_of(CctSettings())
    out = model(x_l, x_u, CctDraws(0, 0, CPU))
    for x in (x_l, x_u) if separate else (torch.cat((x_l, x_u)),):
        _, logits = twin.branch1(x)
    norm, plain = model.branch1.backbone.norm, twin.branch1.backbone.norm
    assert int(norm.num_batches_tracked) == (2 if separate else 1)
    torch.testing.assert_close(norm.running_mean, plain.running_mean)
    torch.testing.assert_close(out.unlabeled, cct.times_four(logits[-3:]))
    assert out.labeled.shape == (2, K, 24, 16)
    assert [one.shape for one in out.auxiliary] == [(3, K, 6, 4)] * 12


def test_maps_of_the_auxiliary_decoders_are_not_kept_for_the_backward_pass() -> None:
    model, (x_l, y_l, x_u), saved = model_of(CctSettings()), batch(), []

    def note(x: torch.Tensor) -> torch.Tensor:
        saved.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        step(model, x_l, y_l, x_u)
    assert saved.count((3, K, 24, 16)) < len(model.auxiliary.decoders)


def test_confidence_masking_reaches_the_loss() -> None:
    changes = {"confidence_masking": True, "confidence_thresh": 1.0}
    cfg, (x_l, y_l, x_u) = settings(**changes), batch()
    result = step(model_of(cfg), x_l, y_l, x_u)
    assert result.terms["loss_unsup"] == 0
    cfg = settings(confidence_thresh=1.0)
    result = step(model_of(cfg), x_l, y_l, x_u)
    assert result.terms["loss_unsup"] > 0


def test_nothing_labeled_is_finite() -> None:
    cfg, (x_l, y_l, x_u) = CctSettings(), batch()
    model = model_of(cfg)
    result = step(model, x_l, torch.full_like(y_l, IGNORE), x_u, processes=2)
    assert result.terms["loss_sup"] == 0
    result.total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_run_repeats_with_its_seed() -> None:
    cfg, (x_l, y_l, x_u) = CctSettings(), batch()
    totals = {float(step(model_of(cfg), x_l, y_l, x_u, seed=seed).total.detach()) for seed in (1, 1, 2)}
    assert len(totals) == 2


def test_scores_of_half_precision_are_widened() -> None:
    cfg, (x_l, y_l, x_u) = CctSettings(), batch(torch.float32)
    model = model_of(cfg, dtype=torch.float32)
    model.precision = "bf16"
    out = model(x_l, x_u, CctDraws(0, 0, CPU))
    assert {one.dtype for one in (out.labeled, out.unlabeled, *out.auxiliary)} == {torch.float32}
    result = step(model, x_l, y_l, x_u)
    result.total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_sides_must_be_multiples_of_four() -> None:
    model = model_of(CctSettings())
    with pytest.raises(UserError, match="multiples of 4"):
        model(torch.zeros(2, 3, 24, 16), torch.zeros(2, 3, 24, 18), CctDraws(0, 0, CPU))


def test_the_auxiliary_decoders_form_two_parameter_groups() -> None:
    weights, biases = parameter_groups(AuxDecoders(D, K, 3), 1e-4)
    assert [len(list(g.parameters)) for g in (weights, biases)] == [3, 3]
    assert (weights.weight_decay, biases.weight_decay) == (1e-4, 0.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight", -1.0),
        ("decoders", []),
        ("decoders", ["cutout", "vat"]),
        ("drop_rate", 1.0),
        ("erase", 1.5),
        ("drop_range", [0.9, 0.7]),
        ("consistency", "ce"),
    ],
)
def test_settings_out_of_range_are_refused(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=key):
        build(CctSettings, {key: value})
