"""SGD that visits a parameter several times: against plain loops, cancelled, scaled, resumed; and what it is given."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.config import OptimConfig
from common.distributed import Dist
from common.numerics.losses import Losses
from common.numerics.optim import set_learning_rate
from common.run.guard import FiniteGuard
from projects.s4gan_mlmt.config import ModelConfig
from projects.s4gan_mlmt.deeplabv2 import DeepLabV2
from projects.s4gan_mlmt.discriminator import Discriminator
from projects.s4gan_mlmt.model import LogitsOnly
from projects.s4gan_mlmt.optimizer import (
    VisitedSgd,
    build_discriminator_optimizer,
    build_generator_optimizer,
    visited_groups,
)
from projects.s4gan_mlmt.wrn38 import DeepLabV3PlusWrn38

MODES = ("repeated_0_4", "repeated_1_5", "once")
VISITS = [1, 3, 4, 3]
OPTIM = OptimConfig(lr=0.1, head_lr_factor=10.0, weight_decay=0.05, epochs=1, batch_size=1)


def parameters(seed: int = 0) -> list[nn.Parameter]:
    rng = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(2, 3, generator=rng, dtype=torch.float64)) for _ in VISITS]


def gradients(step: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(100 + step)
    return [torch.randn(2, 3, generator=rng, dtype=torch.float64) for _ in VISITS]


def optimizer_of(params: list[nn.Parameter], mode: Any, **more: Any) -> VisitedSgd:
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05} | more
    return VisitedSgd([{"params": params, "visits": VISITS}], mode=mode, **settings)


def steps(optimizer: VisitedSgd, params: list[nn.Parameter], numbers: range) -> None:
    for number in numbers:
        for p, grad in zip(params, gradients(number), strict=True):
            p.grad = grad
        optimizer.step()


def by_hand(mode: str, count: int, momentum: float = 0.9, decay: float = 0.05) -> list[Tensor]:
    """The rules as they are written, one parameter and visit at a time."""
    params = [p.detach().clone() for p in parameters()]
    buffers: list[Tensor | None] = [None] * len(params)
    for number in range(count):
        for i, grad in enumerate(gradients(number)):
            g, first = grad.clone(), buffers[i] is None
            for _ in range(1 if mode == "once" else VISITS[i]):
                if mode == "repeated_0_4":
                    g = d = g + decay * params[i]
                else:
                    d = g + decay * params[i]
                empty = buffers[i] is None or (mode == "repeated_1_5" and first)
                buffers[i] = d.clone() if empty else momentum * buffers[i] + d
                params[i] = params[i] - 0.1 * buffers[i]
    return params


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("momentum", "decay"), [(0.9, 0.05), (0.0, 0.05), (0.9, 0.0), (0.0, 0.0)])
def test_visits_are_sequential_updates(mode: str, momentum: float, decay: float) -> None:
    params = parameters()
    steps(optimizer_of(params, mode, momentum=momentum, weight_decay=decay), params, range(4))
    for ours, expected in zip(params, by_hand(mode, 4, momentum, decay), strict=True):
        torch.testing.assert_close(ours.detach(), expected, rtol=1e-12, atol=1e-12)


def test_the_three_modes_differ_where_there_are_visits() -> None:
    results = {mode: by_hand(mode, 3) for mode in MODES}
    for other in MODES[1:]:
        assert torch.equal(results["repeated_0_4"][0], results[other][0])  # visited once by all
        assert not torch.allclose(results["repeated_0_4"][1], results[other][1])
    assert not torch.allclose(results["repeated_1_5"][1], results["once"][1])


@pytest.mark.parametrize("mode", MODES)
def test_parameters_without_gradient_stay(mode: str) -> None:
    params = parameters()
    optimizer, before = optimizer_of(params, mode), params[1].detach().clone()
    for p, grad in zip(params, gradients(0), strict=True):
        p.grad = grad
    params[1].grad = None
    optimizer.step()
    assert torch.equal(params[1], before)  # not even decayed
    assert not torch.equal(params[2], parameters()[2])
    for p in params:
        p.grad = None
    optimizer.step()  # nothing to do


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("before", [0, 2])
def test_resumed_steps_equal_continued_ones(mode: str, before: int) -> None:
    params = parameters()
    optimizer = optimizer_of(params, mode)
    steps(optimizer, params, range(before))
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": [p.detach().clone() for p in params]}, file)
    steps(optimizer, params, range(before, before + 3))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh = [nn.Parameter(p) for p in saved["params"]]
    resumed = optimizer_of(fresh, mode)
    resumed.load_state_dict(saved["optimizer"])
    steps(resumed, fresh, range(before, before + 3))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(fresh, params, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_a_copy_goes_on_alike(mode: str) -> None:
    params = parameters()
    optimizer = optimizer_of(params, mode)
    twin = copy.deepcopy(optimizer)
    twins = twin.param_groups[0]["params"]
    steps(optimizer, params, range(3))
    steps(twin, twins, range(3))
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cancelled", [0, 1])
def test_cancelled_steps_leave_no_trace(mode: str, cancelled: int) -> None:
    """`found_inf` cancels on the device, also the very first step, whose gradients are not finite."""
    params, expected = parameters(), parameters()
    optimizer, plain = optimizer_of(params, mode), optimizer_of(expected, mode)
    steps(optimizer, params, range(cancelled))
    for p in params:
        p.grad = torch.full_like(p, torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    optimizer.found_inf = torch.zeros(())
    steps(optimizer, params, range(cancelled, 3))
    steps(plain, expected, range(3))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(params, expected, strict=True))
    assert all(value.isfinite().all() for state in optimizer.state.values() for value in state.values())


@pytest.mark.parametrize("mode", MODES)
def test_scaled_losses_give_the_same_steps(mode: str) -> None:
    params, expected = parameters(), parameters()
    optimizer, plain = optimizer_of(params, mode), optimizer_of(expected, mode)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number in range(4):
        optimizer.zero_grad()
        loss = sum((p * grad).sum() for p, grad in zip(params, gradients(number), strict=True))
        scaler.scale(loss * (torch.inf if number == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        if number != 1:
            steps(plain, expected, range(number, number + 1))
    assert scaler.get_scale() == 512.0
    for ours, theirs in zip(params, expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scaled", [False, True])
def test_guard_skips_steps_that_are_not_finite(mode: str, scaled: bool) -> None:
    params, expected = parameters(), parameters()
    critic = nn.Linear(2, 1).double()
    optimizer, plain = optimizer_of(params, mode), optimizer_of(expected, mode)
    adam = build_discriminator_optimizer(critic, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=8.0)
    guard, good = FiniteGuard("skip", Dist(), 4), []
    for number in range(4):
        bad = number in (0, 2)
        optimizer.zero_grad()
        adam.zero_grad()
        loss = sum((p * grad).sum() for p, grad in zip(params, gradients(number), strict=True))
        loss = (loss + critic(torch.ones(1, 2).double()).sum()) * (torch.nan if bad else 1.0)
        scaler.scale(loss).backward()
        guard.watch(number, Losses(loss, {"loss_sup": loss}), str)
        weight = critic.weight.detach().clone()
        guard.step(scaler, optimizer, adam)
        assert torch.equal(critic.weight, weight) == bad
        good += [] if bad else [number]
    for number in good:
        steps(plain, expected, range(number, number + 1))
    assert guard.cancelled == 2
    for ours, theirs in zip(params, expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-12, atol=1e-12)


def test_visits_must_fit_the_parameters() -> None:
    for visits in ([1, 1], [1, 1, 1, 0]):
        with pytest.raises(ValueError, match="visits"):
            VisitedSgd([{"params": parameters(), "visits": visits}], lr=0.1)


# --- of the networks -------------------------------------------------------------------------------------------


def tiny(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "deeplabv2":
        return DeepLabV2(3, layers=(1, 1, 2, 1), width=2)
    if kind == "wrn38":
        return DeepLabV3PlusWrn38(3, layers=(1, 1, 2, 1, 1, 1), width=2, inner_planes=4, low_planes=3)
    model = ModelConfig(network="deeplabv3plus", backbone="resnet_tiny", inner_planes=4, low_planes=3)
    return LogitsOnly(3, model)


@pytest.mark.parametrize("kind", ["deeplabv2", "wrn38", "house"])
def test_every_trainable_parameter_is_in_one_group(kind: str) -> None:
    network = tiny(kind)
    groups = visited_groups(network, 10.0)
    listed = [name for group in groups for name in group.names]
    assert sorted(listed) == sorted(name for name, p in network.named_parameters() if p.requires_grad)
    assert [group.lr_factor for group in groups] == [1.0, 10.0]
    own = dict(network.named_parameters())
    for group in groups:
        assert all(own[name] is p for name, p in zip(group.names, group.parameters, strict=True))
    if kind == "house":
        assert {visits for group in groups for visits in group.visits} == {1}
        assert all(name.startswith("encoder.") for name in groups[0].names)


def walked(network: nn.Module, parts: list[nn.Module]) -> dict[str, int]:
    """How often a walk over all modules that takes the parameters of each meets a parameter."""
    names = {p: name for name, p in network.named_parameters()}
    counts: dict[str, int] = {}
    for part in parts:
        for module in part.modules():
            for p in module.parameters():
                if p.requires_grad:
                    counts[names[p]] = counts.get(names[p], 0) + 1
    return counts


@pytest.mark.parametrize("affine", [True, False])
def test_visits_are_those_of_a_walk_over_modules(affine: bool) -> None:
    deeplabv2 = DeepLabV2(3, layers=(1, 1, 2, 1), width=2, frozen_affine=affine)
    backbone = [getattr(deeplabv2, name) for name in ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")]
    group, head = visited_groups(deeplabv2, 10.0)
    assert dict(zip(group.names, group.visits, strict=True)) == walked(deeplabv2, backbone)
    assert set(head.visits) == {1}
    wrn = tiny("wrn38")
    group, head = visited_groups(wrn, 10.0)
    assert dict(zip(group.names, group.visits, strict=True)) == walked(wrn, [wrn.backbone])
    parts = [wrn.aspp, wrn.bot_aspp, wrn.bot_fine, wrn.final]
    assert dict(zip(head.names, head.visits, strict=True)) == walked(wrn, parts)


@pytest.mark.parametrize("kind", ["deeplabv2", "wrn38", "house"])
@pytest.mark.parametrize("mode", MODES)
def test_a_network_learns(kind: str, mode: Any) -> None:
    network, x = tiny(kind).train(), torch.randn(2, 3, 33, 33)
    optimizer = build_generator_optimizer(OPTIM, network, mode)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    network(x).square().mean().backward()
    grads = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    rates = set_learning_rate(optimizer, OPTIM, 5, 10)
    assert rates == [0.1 * 0.5**0.9, 1.0 * 0.5**0.9]
    optimizer.step()
    for group, rate in zip(visited_groups(network, 10.0), rates, strict=True):
        for name, p, visits in zip(group.names, group.parameters, group.visits, strict=True):
            if name not in grads:  # DeepLabV2's branches that are not added
                assert kind == "deeplabv2"
                assert name.startswith(("layer5.conv2d_list.2", "layer5.conv2d_list.3"))
                assert torch.equal(p, before[name])
                continue
            once = before[name] - rate * (grads[name] + 0.05 * before[name])
            repeated = visits > 1 and mode != "once" and bool((once - before[name]).abs().max() > 0)
            assert torch.allclose(p, once, rtol=1e-5, atol=1e-7) != repeated, name


def test_adam_of_the_discriminator() -> None:
    critic = Discriminator(4, width=2)
    adam = build_discriminator_optimizer(critic, lr=1e-5, betas=(0.8, 0.95))
    (group,) = adam.param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-5, (0.8, 0.95), 1e-8, 0)
    assert len(group["params"]) == 10
    assert build_discriminator_optimizer(critic, lr=1e-4).param_groups[0]["betas"] == (0.9, 0.99)
    assert set_learning_rate(adam, OPTIM, 5, 10) == [1e-5 * 0.5**0.9]
