"""The training step as a whole: who labels, what is pasted, weights of the terms, edges, values of the switches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from common.data.spec import IGNORE
from common.numerics.losses import Losses
from common.run.progress import Progress
from projects.unimatch import train
from projects.unimatch.data import roles
from projects.unimatch.model import average_buffers, build_student
from projects.unimatch.tests import toys
from tests.each import for_each


def network(cfg: Any, seed: int = 0, dpt: bool = False) -> Any:
    torch.manual_seed(seed)
    return toys.tiny_dpt(3) if dpt else toys.tiny_deeplab(3)


def run_of(variant: str, dpt: bool = False, quirks: Any = None, **method: Any) -> Any:
    sections = {"method": {"threshold": 0.35} | toys.VARIANTS[variant] | method, "quirks": quirks or {}}
    cfg = toys.config(**sections)
    has_teacher = cfg.method.teacher and cfg.method.mode == "semi"
    teacher = network(cfg, 1, dpt).eval().requires_grad_(False) if has_teacher else None
    return toys.run_of(cfg, toys.networks(cfg, network(cfg, 0, dpt).train(), teacher))


def one_step(run: Any, batch: Any = None, step: int = 1) -> Losses:
    side = 28 if hasattr(run.nets.student, "levels") else 16
    result = train.train_step(batch or toys.batch(0, run.cfg, side=side), Progress(step, 10, 2), run)
    result.total.backward()
    return result


@for_each(
    ("variant", "dpt"),
    [*((name, False) for name in toys.VARIANTS), ("unimatch_v2", True), ("unimatch", True)],
)
def test_every_parameter_learns_and_the_teacher_does_not(variant: str, dpt: bool) -> None:
    run = run_of(variant, dpt)
    result = one_step(run)
    assert all(value.isfinite() for value in (result.total, *result.terms.values()))
    idle = {id(p) for p in run.nets.student.idle()} if dpt else set()
    for name, p in run.nets.student.named_parameters():
        assert (p.grad is None) == (id(p) in idle), name
    assert run.nets.teacher is None or all(p.grad is None for p in run.nets.teacher.parameters())


@for_each(
    ("variant", "names", "shares"),
    [
        ("unimatch", ("loss_strong_1", "loss_strong_2", "loss_fp"), (0.25, 0.25, 0.5)),
        ("unimatch_v2", ("loss_strong_1", "loss_strong_2"), (0.5, 0.5)),
        ("fixmatch", ("loss_strong_1",), (1.0,)),
        ("fixmatch_v2", ("loss_strong_1",), (1.0,)),
        ("sup_only", (), ()),
    ],
)
def test_weights_of_the_terms(variant: str, names: tuple[str, ...], shares: tuple[float, ...]) -> None:
    found = one_step(run_of(variant, unsup_weight=3.0))
    assert set(found.terms) == {"loss_sup", *names, *(["kept"] if names else [])}
    unsup = sum(share * found.terms[name] for name, share in zip(names, shares, strict=True))
    expected = (found.terms["loss_sup"] + 3.0 * unsup) / 2 if names else found.terms["loss_sup"]
    torch.testing.assert_close(found.total, expected)
    assert all(found.terms[name] > 0 for name in names)
    doubled = one_step(run_of(variant, unsup_weight=3.0, loss_weight=1.0)).total
    torch.testing.assert_close(doubled, 2 * expected if names else expected)


@pytest.mark.parametrize("variant", ["unimatch", "unimatch_v2"])
@pytest.mark.parametrize("nan", [False, True])
def test_nothing_but_padding_and_no_labels(variant: str, nan: bool) -> None:
    """QUIRK quirks.nan_without_pixels: zero, connected to the graph, or undefined as in the original."""
    run = run_of(variant, quirks={"nan_without_pixels": nan})
    labeled, *others = toys.batch(0, run.cfg)
    labeled = labeled._replace(label=torch.full_like(labeled.label, IGNORE))
    for one in others:
        one.label[:, 0] = 1
    found = one_step(run, (labeled, *others))
    assert bool(found.total.isnan()) == nan
    if not nan:
        assert found.total == 0
        assert all(p.grad is not None and not p.grad.any() for p in run.nets.student.parameters())


def test_labels_in_a_box_are_those_of_the_partner() -> None:
    """V1: of the second loader's photo; V2: of the photo at the mirrored position, by the same teacher."""
    for variant in ("unimatch", "unimatch_v2"):
        run, seen = run_of(variant, threshold=0.0), []
        batch = toys.batch(0, run.cfg)
        batch[1].label[:] = torch.tensor([0, 1, 1]).view(1, 3, 1, 1)  # no padding, boxes everywhere
        for one in batch[2:]:
            one.label[:, 0] = 0
        label = run.nets.label
        run.nets.label = lambda x, label=label, seen=seen: seen.append(x) or label(x)
        strong = train.teacher_forwards if variant.endswith("v2") else train.student_forwards
        inputs: list[Any] = []

        def noted(*args: Any, strong: Any = strong, inputs: Any = inputs) -> Any:
            inputs.append(args)
            return strong(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, strong.__name__, noted)
            one_step(run, batch)
        others = batch[1].image.flip(0) if variant.endswith("v2") else batch[2].image
        weak, first, second = others.chunk(3, dim=1)
        assert torch.equal(seen[0], batch[1].image[:, :3] if variant.endswith("v2") else weak)
        assert torch.equal(inputs[0][-2], torch.cat((first, second)))


def test_v1_labels_by_the_statistics_of_its_own_batch() -> None:
    """One forward in evaluation mode for the boxes, two in training mode that move the statistics."""
    run = run_of("unimatch")
    one_step(run)
    assert run.nets.student.training
    assert int(run.nets.student.backbone.bn1.num_batches_tracked) == 2
    assert int(run_of("sup_only").nets.student.backbone.bn1.num_batches_tracked) == 0


def test_the_teacher_begins_as_the_student_and_averages_buffers_too() -> None:
    run = run_of("unimatch_v2")
    student, teacher = run.nets.student, run.nets.teacher
    train.before_step(Progress(0, 10, 2), run)
    assert all(
        torch.equal(a, b)
        for a, b in zip(student.state_dict().values(), teacher.state_dict().values(), strict=True)
    )
    with torch.no_grad():
        student.backbone.bn1.running_mean += 1.0
        student.backbone.bn1.num_batches_tracked += 5
    before = teacher.backbone.bn1.running_mean.clone()
    average_buffers(teacher, student, 0.5)
    torch.testing.assert_close(teacher.backbone.bn1.running_mean, before + 0.5)
    assert int(teacher.backbone.bn1.num_batches_tracked) == 2  # QUIRK averaged_buffers
    train.after_step(Progress(0, 10, 2), run)  # decay 0: as the student
    assert torch.equal(teacher.backbone.bn1.running_mean, student.backbone.bn1.running_mean)


@for_each(("late", "rates"), [(True, (1.0, 1.0, 0.95)), (False, (1.0, 0.95, 0.9))])
def test_late_rate(late: bool, rates: tuple[float, ...]) -> None:
    run = run_of("sup_only", quirks={"late_rate": late})
    found = [train.set_rates(Progress(step, 10, 2), run) for step in range(3)]
    assert found == pytest.approx([0.1 * rate**0.9 for rate in rates])


@for_each(
    ("quirks", "same", "paired"),
    [({}, True, True), ({"same_photo": False}, False, True), ({"paired_lists": False}, True, False)],
)
def test_orders_of_the_lists(quirks: dict[str, bool], same: bool, paired: bool) -> None:
    """QUIRK quirks.same_photo and quirks.paired_lists, by the seeds of the loaders."""
    seeds = roles(toys.config(quirks=quirks))
    assert (seeds["partner"] == seeds["unlabeled"]) == same
    assert (seeds["labeled"] == seeds["unlabeled"]) == paired
    assert set(roles(toys.config(method=toys.V2))) == {"labeled", "unlabeled"}
    assert set(roles(toys.config(method={"mode": "sup_only"}))) == {"labeled"}


def test_dropped_channels_are_those_of_the_draws() -> None:
    """Half of them, doubled where they stay; complementary ones add up to two, untouched pairs to twice one."""
    draws = toys.Draws(3, 0, toys.CPU)
    first, second = draws.dropped(64, (50, 20), 0.5)
    assert (first.shape, second.shape) == ((64, 50), (64, 20))
    assert set(first.unique().tolist()) == {0.0, 2.0}
    assert float(first.mean()) == pytest.approx(1.0, abs=0.05)
    for one in (True, False):
        found = draws.complementary(7, (30, 30), 0.5, one)
        assert torch.equal(*found) == one
        for factor in found:
            a, b = factor.chunk(2)
            assert torch.equal(a + b, torch.full_like(a, 2.0))
            assert int((a == 1).all(dim=1).sum()) == 3


@for_each(("decoder", "backbone", "one"), [("fpn", "test_convnext", False), ("dpt", "test_vit", True)])
def test_the_generic_network_loses_channels_at_every_level(decoder: str, backbone: str, one: bool) -> None:
    """By masks of their own where the levels have other widths; in a plain transformer by one, as in V2."""
    sections: dict[str, Any] = {
        "data": {"dataset": "shapes", "split": "none", "crop_size": [64, 64]},
        "model": {"network": "generic", "backbone": backbone, "decoder": decoder, "inner_planes": 32},
    }
    for variant in ("unimatch", "unimatch_v2"):
        cfg = toys.config(method=toys.VARIANTS[variant] | {"threshold": 0.2}, **sections)
        student, teacher = (build_student(cfg, 3) for _ in range(2))
        assert (len(student.level_planes), student.one_factor) == (4, one)
        nets = toys.networks(cfg, student.train(), teacher.eval() if cfg.method.teacher else None)
        found = one_step(toys.run_of(cfg, nets), toys.batch(0, cfg, side=64))
        assert found.terms["loss_strong_2"] > 0
        assert all(p.grad is not None for p in student.parameters())
