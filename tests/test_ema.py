"""The teacher is the formula of its parameters and keeps its own buffers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.numerics.ema import copy_buffers, copy_parameters, update_teacher, warmup_decay


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    net[1].running_mean.uniform_()
    net[1].running_var.uniform_(0.5, 2)
    net[1].num_batches_tracked.fill_(seed)
    return net


@pytest.mark.parametrize(
    ("update", "decay"),
    [(0, 0.0), (1, 0.5), (2, 2 / 3), (9, 0.9), (98, 98 / 99), (99, 0.99), (100, 0.99), (10**6, 0.99)],
)
def test_warmup(update, decay):
    assert warmup_decay(update, 0.99) == pytest.approx(decay, rel=1e-12)


def test_the_ceiling_may_be_below_the_ramp():
    assert [warmup_decay(i, 0.4) for i in range(3)] == [0.0, 0.4, 0.4]


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 0.999, 1.0])
def test_average_is_the_formula(decay):
    teacher, student = network(1), network(2)
    expected = [
        decay * t + (1 - decay) * s for t, s in zip(teacher.parameters(), student.parameters(), strict=True)
    ]
    before = [s.clone() for s in student.parameters()]
    update_teacher(teacher, student, decay)
    for ours, wanted in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-8)
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))


def test_many_averages_in_float64_follow_the_recursion():
    teacher, student = network(1).double(), network(2).double()
    value = teacher[0].weight.detach().clone()
    for update in range(200):
        with torch.no_grad():
            student[0].weight.add_(0.01)
        decay = warmup_decay(update, 0.99)
        value = decay * value + (1 - decay) * student[0].weight.detach()
        update_teacher(teacher, student, decay)
    torch.testing.assert_close(teacher[0].weight.detach(), value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rule", [copy_parameters, lambda t, s: update_teacher(t, s, 0.9)])
def test_buffers_are_left_alone(rule):
    teacher, student = network(1), network(2)
    before = {key: value.clone() for key, value in teacher.named_buffers()}
    rule(teacher, student)
    assert before
    for key, value in teacher.named_buffers():
        assert torch.equal(value, before[key]), key


def test_copied_buffers_are_exact_and_parameters_are_left_alone():
    teacher, student = network(1), network(2)
    before = [p.detach().clone() for p in teacher.parameters()]
    copy_buffers(teacher, student)
    theirs = dict(student.named_buffers())
    assert len(theirs) == 3
    for key, value in teacher.named_buffers():
        assert torch.equal(value, theirs[key]), key
        assert value.data_ptr() != theirs[key].data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))


def test_copy_is_exact_and_not_shared():
    teacher, student = network(1), network(2)
    copy_parameters(teacher, student)
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        assert torch.equal(t, s)
        assert t.data_ptr() != s.data_ptr()
    with torch.no_grad():
        student[0].weight.add_(1.0)
    assert not torch.equal(teacher[0].weight, student[0].weight)


def test_teacher_needs_no_graph():
    teacher, student = network(1).requires_grad_(False), network(2)
    update_teacher(teacher, student, 0.5)
    copy_parameters(teacher, student)
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())


def test_memory_format_does_not_matter():
    teacher, student = network(1), network(2).to(memory_format=torch.channels_last)
    expected = 0.9 * teacher[0].weight.detach() + 0.1 * student[0].weight.detach()
    update_teacher(teacher.to(memory_format=torch.channels_last), student, 0.9)
    torch.testing.assert_close(teacher[0].weight.detach(), expected)
    copy_parameters(network(3), student)
