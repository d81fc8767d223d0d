"""Every switch of an oddity of the original: both values do what they say, and they differ."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.config import build, plan_batch
from common.data.spec import IGNORE
from common.data.streams import TrainingData
from common.distributed import Dist
from common.numerics.optim import poly
from common.run.progress import Progress
from projects.cps.baselines.gct import detector_step
from projects.cps.config import Config, MethodConfig, QuirkConfig, loss_divisor, loss_groups
from projects.cps.data import build_training_data, train_transform
from projects.cps.masks import BoxMaskSettings, draw_boxes
from projects.cps.reporting import deviations
from projects.cps.tests import toys
from tests.tiny import write_dataset

PROCESSES = {"lr": 0.1, "epochs": 10, "batch_size": 4, "paper_processes": 2}
# method, switch below `method` or in `quirks`, its other value
REACHING = [
    ("cps", "quirks.loss_world_size", 1),
    ("cps", "quirks.loss_per_process", False),
    ("cct", "quirks.loss_per_process", False),
    *((method, "quirks.separate_statistics", False) for method in toys.SEMI),
    ("cps_cutmix", "quirks.train_mode_labels", False),
    ("cps_cutmix", "cutmix.fixed_aspect_shrinks_twice", False),
    ("mean_teacher", "mean_teacher.ema_between_batches", False),
    ("gct", "gct.straight_through_clip", False),
    ("gct", "gct.late_rate", False),
    ("gct", "gct.constant_detector_rate", False),
]
ELSEWHERE = {"fixed_unlabeled_order", "unlabeled_pairing", "inclusive_crop", "nan_without_labels"}
OFF_DEFAULT: dict[str, dict[str, Any]] = {  # settings under which a switch has something to say
    "cutmix": {"random_aspect_ratio": False},
    "gct": {"detector_planes": 2, "detector_strides": [1] * 8},
}


def switched(method: str, path: str, value: object = None) -> Config:
    """The configuration with the switch at `value`, or as it is."""
    section, key = path.split(".")
    values = {} if value is None else {key: value}
    if section == "quirks":
        return toys.config(method, optim=PROCESSES, quirks=values)
    return toys.config(method, optim=PROCESSES, method={section: OFF_DEFAULT.get(section, {}) | values})


def test_every_switch_is_tested_here() -> None:
    tested = {path.split(".")[1] for _, path, _ in REACHING if path.startswith("quirks.")} | ELSEWHERE
    assert {f.name for f in dataclasses.fields(QuirkConfig)} == tested


def test_the_originals_behaviour_is_the_default() -> None:
    assert build(QuirkConfig, {}) == QuirkConfig(
        loss_world_size=None,
        loss_per_process=True,
        fixed_unlabeled_order=True,
        unlabeled_pairing="same_index",
        train_mode_labels=True,
        separate_statistics=True,
        inclusive_crop=True,
        nan_without_labels=False,
    )
    for _, path, value in REACHING:
        section, key = path.split(".")
        if section != "quirks":
            assert getattr(getattr(MethodConfig(), section), key) is (not value), path


@pytest.mark.parametrize(("method", "path", "value"), REACHING, ids=str)
def test_the_switch_reaches_the_training_step(method: str, path: str, value: object) -> None:
    """The same start, batches and draws: only the switch differs, and the weights notice."""
    runs = [toys.Loop(switched(method, path, some)) for some in (None, None, value)]
    for _ in range(4):
        for run in runs:
            run.advance()
    weights = [run.weights() for run in runs]
    assert all(torch.equal(one, weights[1][key]) for key, one in weights[0].items())
    assert toys.furthest(weights[0], weights[2]) > 1e-6


# --- division of the loss ----------------------------------------------------------------------------------------


def gradients(cfg: Config, method: str) -> tuple[dict[str, torch.Tensor], float]:
    run = toys.Loop(cfg)
    total = run.advance().total
    return run.gradients(), float(total)


@pytest.mark.parametrize("method", toys.METHODS)
def test_loss_world_size(method: str) -> None:
    """The gradient is divided by the authors' processes; what is logged is not."""
    (quartered, logged), (whole, same), (halved, _) = (
        gradients(
            toys.config(
                method, optim=PROCESSES | {"paper_processes": 4}, quirks={"loss_world_size": n} | once
            ),
            method,
        )
        for n in (None, 1, 2)
        for once in ({"loss_per_process": False},)
    )
    first_phase = [
        key for key in whole if not key.startswith("detector")
    ]  # which sees networks after their step
    for key in first_phase:
        torch.testing.assert_close(4 * quartered[key], whole[key], rtol=1e-10, atol=1e-15)
        torch.testing.assert_close(2 * halved[key], whole[key], rtol=1e-10, atol=1e-15)
    if method != "gct":
        assert logged == pytest.approx(same, rel=1e-12)


def test_the_rate_can_stand_for_the_division() -> None:
    """Spec of the quirk: loss / W with rate lr and decay wd is rate lr / W with decay W * wd."""
    divided = toys.Loop(toys.config(optim=PROCESSES | {"weight_decay": 1e-3}))
    optim = PROCESSES | {"lr": 0.05, "weight_decay": 2e-3}
    primed = toys.Loop(toys.config(optim=optim, quirks={"loss_world_size": 1}))
    for _ in range(4):
        divided.advance()
        primed.advance()
    assert toys.furthest(divided.weights(), primed.weights()) < 1e-9


def test_what_divides_the_loss() -> None:
    paper, own = (
        {"paper_processes": 4, **{k: v for k, v in PROCESSES.items() if k != "paper_processes"}},
        {"paper_processes": None},
    )
    assert loss_divisor(toys.config(optim=PROCESSES | paper)) == 4
    assert loss_divisor(toys.config(optim=PROCESSES | own)) == 1
    assert loss_divisor(toys.config(optim=PROCESSES | own, quirks={"loss_world_size": 8})) == 8
    assert loss_divisor(toys.config(optim=PROCESSES | paper, quirks={"loss_world_size": 1})) == 1
    said = deviations(toys.config(optim=PROCESSES, quirks={"loss_world_size": 8}), 1)
    assert said == ["the loss is divided by 8, the authors' by 2 processes"]


@pytest.mark.parametrize("per_process", [True, False])
def test_loss_per_process(per_process: bool) -> None:
    """Images with few labels weigh as much as others: the mean of two means, or one mean."""
    cfg = toys.config("sup_only", optim=PROCESSES, quirks={"loss_per_process": per_process})
    labeled = toys.batch(0)  # ignored pixels: 5 to 80 % of an image
    run = toys.Loop(cfg, frozen=True)
    with torch.no_grad():
        logits = run.modules["branch1"].eval().predict(labeled.image)
        pixels = torch.nn.functional.cross_entropy(
            logits, labeled.label, ignore_index=IGNORE, reduction="none"
        )
    kept = labeled.label != IGNORE
    pairs = [pixels[i : i + 2].sum() / kept[i : i + 2].sum() for i in (0, 2)]
    expected = torch.stack(pairs).mean() if per_process else pixels.sum() / kept.sum()
    assert abs(pairs[0] - pairs[1]) > 1e-4
    result = run.advance([(labeled,)])
    torch.testing.assert_close(result.terms["loss_sup"], expected, check_dtype=False)


def test_groups_of_a_forward() -> None:
    cfg = toys.config(optim=PROCESSES | {"batch_size": 8, "paper_processes": 4})
    assert [loss_groups(cfg, images) for images in (8, 4, 2, 3, 1)] == [4, 2, 1, 1, 1]
    assert not deviations(cfg, 1)
    assert not deviations(cfg, 4)
    said = deviations(cfg, 8)  # one image each
    assert said == [
        "the supervised loss is taken over 1 images at once, the authors' over 2 of each of 4 processes"
    ]


# --- unlabeled images --------------------------------------------------------------------------------------------


@pytest.fixture
def farm(tmp_path: Path) -> Path:
    return write_dataset(tmp_path, masks=False)


def training(farm: Path, method: str, **quirks: object) -> TrainingData:
    data: Mapping[str, Any] = {"dataset": str(farm), "split": "few", "crop_size": [32, 32], "workers": 0}
    cfg = toys.config(method, data=data, optim=PROCESSES | {"batch_size": 2}, quirks=quirks)
    return build_training_data(cfg, Dist(), plan_batch(cfg.optim, 1))


def order(data: TrainingData, role: str, epoch: int) -> list[int]:
    """Indices of the images in the order in which an epoch shows them."""
    loader = data.loaders[role]
    loader.set_epoch(epoch)
    return [key.position for keys in loader.sampler for key in keys]


@pytest.mark.parametrize("fixed", [True, False])
def test_fixed_unlabeled_order(farm: Path, fixed: bool) -> None:
    data = training(farm, "cps", fixed_unlabeled_order=fixed)
    assert (order(data, "unlabeled", 0) == order(data, "unlabeled", 3)) is fixed
    assert order(data, "labeled", 0) != order(data, "labeled", 3)


@pytest.mark.parametrize("pairing", ["same_index", "independent"])
def test_unlabeled_pairing(farm: Path, pairing: str) -> None:
    data = training(farm, "cps_cutmix", unlabeled_pairing=pairing)
    groups = [batches for group in data.epoch(1, 0, Dist(), False) for batches in group]
    pairs = [
        (int(i), int(j))
        for _, first, second in groups
        for i, j in zip(first.index, second.index, strict=True)
    ]
    assert all(i == j for i, j in pairs) is (pairing == "same_index")
    if pairing == "same_index":  # two views of one photo, not one view twice
        assert any(not torch.equal(first.image, second.image) for _, first, second in groups)


# --- mode of the labels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_mode", [True, False])
def test_train_mode_labels(train_mode: bool) -> None:
    """Who makes the labels, and what that does to the running statistics of both networks."""
    run = toys.Loop(toys.config("cps_cutmix", quirks={"train_mode_labels": train_mode}))
    calls = {name: toys.record_calls(module) for name, module in run.modules.items()}
    run.advance()
    for name, module in run.modules.items():
        assert [call.training for call in calls[name]] == [train_mode] * 2 + [True] * 2
        assert module.backbone.bn1.num_batches_tracked == (4 if train_mode else 2)
        assert all(part.training for part in module.modules())  # back in train mode


# --- BatchNorm of labeled and unlabeled images -------------------------------------------------------------------


@pytest.mark.parametrize("separate", [True, False])
def test_separate_statistics(separate: bool) -> None:
    """Whether unlabeled images change what the network says about labeled ones."""
    cfg = toys.config(quirks={"separate_statistics": separate})
    losses = [
        toys.Loop(cfg).advance([(toys.batch(0), toys.batch(seed, labels=False))]).terms["loss_sup"]
        for seed in (1, 2)
    ]
    assert bool(losses[0] == losses[1]) is separate


def test_where_statistics_stand_still_joining_changes_nothing() -> None:
    for method in toys.SEMI:
        runs = [
            toys.Loop(toys.config(method, quirks={"separate_statistics": some}), frozen=True)
            for some in (True, False)
        ]
        for _ in range(3):
            for run in runs:
                run.advance()
        assert toys.furthest(*(run.weights() for run in runs)) < 1e-7, method


# --- crop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inclusive", [True, False])
def test_inclusive_crop(inclusive: bool) -> None:
    """A photo of 40 pixels cut to 38: every fourth crop begins one row too low, where there are only 37 left."""
    data = {"crop_size": [38, 38], "scales": [1.0], "flip": False}
    transform = train_transform(toys.config(data=data, quirks={"inclusive_crop": inclusive}))
    image, label = np.full((40, 38, 3), 200, np.uint8), np.zeros((40, 38), np.uint8)
    rng, short = random.Random(0), 0
    for _ in range(400):
        x, y = transform(image, label, rng)
        assert (y[:-1] == 0).all()
        assert bool((y[-1] == IGNORE).all()) == bool((x[:, -1] == 0).all())  # padded after normalizing
        short += bool((y[-1] == IGNORE).all())
    assert (70 < short < 130) if inclusive else short == 0


# --- a batch without labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("undefined", [True, False])
@pytest.mark.parametrize("method", ["sup_only", "cps", "cps_cutmix", "mean_teacher", "gct"])
def test_nan_without_labels(method: str, undefined: bool) -> None:
    """CCT's own supervised loss is a sum over no pixel: zero in the original too."""
    cfg = toys.config(
        method, quirks={"nan_without_labels": undefined}, run={"on_nonfinite": "skip", "device": "cpu"}
    )
    run = toys.Loop(cfg)
    labeled, *others = toys.batches(cfg, 0)
    result = run.advance([(labeled._replace(label=torch.full_like(labeled.label, IGNORE)), *others)])
    assert bool(result.total.isnan()) is undefined
    assert float(result.terms["nonfinite"]) == float(undefined)


# --- switches of single methods ----------------------------------------------------------------------------------


@pytest.mark.parametrize("twice", [True, False])
def test_fixed_aspect_shrinks_twice(twice: bool) -> None:
    """Two boxes of together half the area with the image's form: a quarter of the area each, or an eighth."""
    settings = BoxMaskSettings(
        prop_range=(0.5, 0.5), n_boxes=2, random_aspect_ratio=False, fixed_aspect_shrinks_twice=twice
    )
    boxes = draw_boxes(settings, 3, 1000, 2000, np.random.RandomState(0))
    areas = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1]) / (1000 * 2000)
    np.testing.assert_allclose(areas, 0.125 if twice else 0.25, atol=2e-3)


@pytest.mark.parametrize("between", [True, False])
def test_ema_between_batches(between: bool) -> None:
    """The teacher judges labeled images before it is averaged, and unlabeled ones after it."""
    run = toys.Loop(toys.config("mean_teacher", method={"mean_teacher": {"ema_between_batches": between}}))
    run.advance()
    teacher, seen = run.modules["branch2"], []
    teacher.register_forward_pre_hook(
        lambda module, args: seen.append(module.classifier.weight.detach().clone())
    )
    before = teacher.classifier.weight.clone()
    run.advance()
    assert torch.equal(seen[0], before) is between
    assert torch.equal(seen[1], teacher.classifier.weight)


@pytest.mark.parametrize("late", [True, False])
def test_late_rate(late: bool) -> None:
    run = toys.Loop(toys.config("gct", method={"gct": OFF_DEFAULT["gct"] | {"late_rate": late}}))
    for _ in range(4):
        run.advance()
    steps = (0, 0, 1, 2) if late else (0, 1, 2, 3)
    expected = [poly(0.1, k, 30, 0.9) for k in steps]
    assert [rates["branch1"] for rates in run.rates] == expected
    assert [rates["branch2"] for rates in run.rates] == expected


@pytest.mark.parametrize("constant", [True, False])
def test_constant_detector_rate(constant: bool) -> None:
    values = OFF_DEFAULT["gct"] | {
        "constant_detector_rate": constant,
        "late_rate": False,
        "detector_lr": 1e-3,
    }
    run = toys.Loop(toys.config("gct", method={"gct": values}))
    for _ in range(3):
        run.advance()
    expected = [1e-3] * 3 if constant else [poly(1e-3, k, 30, 0.9) for k in range(3)]
    assert [rates["detector"] for rates in run.rates] == expected


@pytest.mark.parametrize("clip", [True, False])
def test_straight_through_clip(clip: bool) -> None:
    """A detector that says less than nothing is punished as for nothing, or for what it says."""
    values = OFF_DEFAULT["gct"] | {"straight_through_clip": clip}
    run = toys.Loop(toys.config("gct", method={"gct": values}))
    detector = run.modules["detector"]
    losses = []
    for bias in (-5.0, -50.0):
        with torch.no_grad():
            detector.classifier.weight.zero_()
            detector.classifier.bias.fill_(bias)
        flaws = detector_step(toys.batches(run.cfg, 0), Progress(0, 3, 10), run.run)
        losses.append(float(flaws.total.detach()))
    assert (losses[0] == losses[1]) is clip
