"""The mean teacher: where the teacher is averaged, what it sees, and what learns."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.config import build
from common.data.loaders import Batch
from common.data.spec import IGNORE
from common.numerics.losses import Losses
from common.run.progress import Progress
from projects.cps.baselines.config import MeanTeacherSettings
from projects.cps.baselines.mean_teacher import mean_teacher_before_step, mean_teacher_step, softmax_mse
from projects.cps.losses import supervised
from projects.cps.model import Branches, Networks
from projects.cps.tests import toys

K = 4


class Toy(nn.Module):
    """No features, and logits at image size; remembers its weight at every call."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, K, 3, padding=1), nn.BatchNorm2d(K)
        self.seen: list[torch.Tensor] = []
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> tuple[None, torch.Tensor]:
        self.seen.append(self.conv.weight.detach().clone())
        return None, self.norm(self.conv(x))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self(x)[1]


def pair(dtype: torch.dtype = torch.float64) -> tuple[Toy, Toy]:
    torch.manual_seed(0)
    return Toy(dtype), Toy(dtype).requires_grad_(False)


def batch(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_l, x_u = (torch.randn(n, 3, 6, 5, generator=generator, dtype=dtype) for n in (2, 3))
    y_l = torch.randint(0, K, (2, 6, 5), generator=generator)
    y_l[0, :3] = IGNORE
    return x_l, y_l, x_u


def run(
    student: Toy,
    teacher: Toy,
    step: int,
    y_l: torch.Tensor | None = None,
    forward: int = 0,
    **settings: object,
) -> Losses:
    """A forward of the optimizer step; before the first one stands what the loop does then."""
    x_l, labels, x_u = batch(student.conv.weight.dtype)
    cfg = toys.config("mean_teacher", method={"name": "mean_teacher", "mean_teacher": settings})
    nets = Networks({"branch1": student, "branch2": teacher}, Branches([student]), supervised)
    at, trained = Progress(step, 10, 1, forward), toys.run_of(cfg, nets)
    if forward == 0:
        mean_teacher_before_step(at, trained)
    labeled = Batch(x_l, labels if y_l is None else y_l, None)
    return mean_teacher_step((labeled, Batch(x_u, None, None)), at, trained)


@pytest.mark.parametrize("between", [True, False])
def test_the_first_step_uses_a_copy_for_both_batches(between: bool) -> None:
    student, teacher = pair()
    run(student, teacher, 0, ema_between_batches=between)
    assert len(teacher.seen) == 2
    assert torch.equal(teacher.seen[1], student.conv.weight)
    torch.testing.assert_close(teacher.seen[0], student.conv.weight.detach(), rtol=1e-15, atol=0)
    assert torch.equal(teacher.conv.weight, student.conv.weight)


@pytest.mark.parametrize("between", [True, False])
def test_the_average_is_taken_between_the_batches_or_before_both(between: bool) -> None:
    student, teacher = pair()
    before = teacher.conv.weight.clone()
    run(student, teacher, 1, ema_decay=0.9, ema_between_batches=between)
    after = 0.9 * before + 0.1 * student.conv.weight.detach()
    torch.testing.assert_close(teacher.seen[0], before if between else after)
    torch.testing.assert_close(teacher.seen[1], after)
    torch.testing.assert_close(teacher.conv.weight, after)


def test_a_step_that_is_accumulated_averages_once() -> None:
    student, teacher = pair()
    before = teacher.conv.weight.clone()
    run(student, teacher, 3, forward=1)
    assert torch.equal(teacher.conv.weight, before)


@pytest.mark.parametrize("step", [0, 5])
def test_statistics_are_the_teachers_own(step: int) -> None:
    student, teacher = pair()
    teacher.norm.running_mean.fill_(7.0)
    expected = copy.deepcopy(teacher)
    run(student, teacher, step, ema_decay=1.0)
    if step == 0:
        expected.load_state_dict({k: v for k, v in student.state_dict().items() if "running" not in k}, False)
    x_l, _, x_u = batch()
    expected(x_l), expected(x_u)
    assert int(teacher.norm.num_batches_tracked) == 2
    torch.testing.assert_close(teacher.norm.running_mean, expected.norm.running_mean)
    torch.testing.assert_close(teacher.norm.running_var, expected.norm.running_var)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_terms(dtype: torch.dtype) -> None:
    student, teacher = pair(dtype)
    twin, master = copy.deepcopy(student), copy.deepcopy(teacher)
    result = run(student, teacher, 2, ema_decay=1.0)
    x_l, y_l, x_u = batch(dtype)
    s, t = [twin.logits(x_l), twin.logits(x_u)], [master.logits(x_l), master.logits(x_u)]
    gaps = [(a.softmax(1) - b.softmax(1)).square().flatten() for a, b in zip(s, t, strict=True)]
    expected = F.cross_entropy(s[0], y_l, ignore_index=IGNORE) + 100 * torch.cat(gaps).mean()
    torch.testing.assert_close(result.total, expected)
    torch.testing.assert_close(result.total, result.terms["loss_sup"] + result.terms["loss_unsup"])
    torch.testing.assert_close(result.terms["sup_teacher"], F.cross_entropy(t[0], y_l, ignore_index=IGNORE))
    assert result.total.dtype == dtype
    result.total.backward()
    expected.backward()
    torch.testing.assert_close(student.conv.weight.grad, twin.conv.weight.grad)


def test_nothing_flows_into_the_teacher() -> None:
    student, teacher = pair()
    teacher.requires_grad_(True)
    result = run(student, teacher, 1)
    assert not result.terms["sup_teacher"].requires_grad
    result.total.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    target = torch.randn(1, K, 2, 2, requires_grad=True)
    softmax_mse(torch.randn(1, K, 2, 2, requires_grad=True), target).backward()
    assert target.grad is None


def test_dividing_the_total_divides_every_part() -> None:
    student, teacher = pair()
    result = run(student, teacher, 1)
    weight = student.conv.weight
    (whole,) = torch.autograd.grad(result.total / 4, weight, retain_graph=True)
    parts = sum(
        torch.autograd.grad(result.terms[name] / 4, weight, retain_graph=True)[0]
        for name in ("loss_sup", "loss_unsup")
    )
    torch.testing.assert_close(whole, parts)


def test_nothing_labeled_is_finite() -> None:
    student, teacher = pair()
    result = run(student, teacher, 1, y_l=torch.full((2, 6, 5), IGNORE))
    assert result.terms["loss_sup"] == 0
    result.total.backward()
    assert student.conv.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("key", "value"), [("weight", -1.0), ("ema_decay", 1.5), ("ema_decay", -0.1), ("decay", 0.9)]
)
def test_settings_out_of_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=key):
        build(MeanTeacherSettings, {key: value})
