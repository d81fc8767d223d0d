"""Optimizer groups, rates that survive a resume, and the guard against losses that are not finite."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from common.config import OptimConfig
from common.distributed import Dist
from common.errors import UserError
from common.numerics.losses import Losses
from common.numerics.optim import Group, build_optimizer, set_learning_rate
from common.run.guard import FiniteGuard

NAN, INF = float("nan"), float("inf")


def optim(**values) -> OptimConfig:
    return OptimConfig(**{"lr": 0.1, "head_lr_factor": 10.0, "epochs": 2, "batch_size": 1} | values)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def built(cfg: OptimConfig, net: nn.Sequential) -> torch.optim.Optimizer:
    heads = [*net[1].parameters(), *net[2].parameters()]
    return build_optimizer(cfg, [Group(net[0].parameters()), Group(heads, cfg.head_lr_factor)])


def state_of(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of all parameters and of everything the optimizer keeps, in a fixed order."""
    tensors = [p.detach().clone() for p in net.parameters()]
    for p in net.parameters():
        kept = optimizer.state.get(p, {})
        tensors += [v.clone() for _, v in sorted(kept.items()) if isinstance(v, Tensor)]
    return tensors


def identical(first: Iterable[Tensor], second: Iterable[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- groups and rates ------------------------------------------------------------------------------------------


def test_groups_have_their_rates_and_share_the_decay():
    optimizer = built(optim(weight_decay=0.01, momentum=0.8), network())
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 1.0]
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 4]
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.01}
    assert {group["momentum"] for group in optimizer.param_groups} == {0.8}
    assert not any(group["nesterov"] for group in optimizer.param_groups)


def test_momentum_may_look_ahead() -> None:
    ours, theirs = network(), network()
    cfg = optim(momentum=0.8, weight_decay=0.01)
    optimizers = [
        build_optimizer(cfg, [Group(ours.parameters())], nesterov=True),
        torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.8, weight_decay=0.01, nesterov=True),
    ]
    x = torch.randn(5, 3)
    for _ in range(3):
        for net, one in zip((ours, theirs), optimizers, strict=True):
            one.zero_grad()
            net(x).square().sum().backward()
            one.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_steps_are_those_of_the_plain_optimizer(kind):
    """Against torch's unfused loop, several steps, BatchNorm and biases decayed like everything else."""
    ours, theirs = network().double(), network().double()
    cfg = optim(optimizer=kind, weight_decay=0.05, momentum=0.7)
    first = built(cfg, ours)
    groups = [
        {"params": theirs[0].parameters(), "lr": 0.1},
        {"params": [*theirs[1].parameters(), *theirs[2].parameters()], "lr": 1.0},
    ]
    if kind == "sgd":
        second = torch.optim.SGD(groups, lr=0.1, momentum=0.7, weight_decay=0.05, foreach=False)
    else:
        second = torch.optim.Adam(groups, lr=0.1, weight_decay=0.05, foreach=False)
    for step in range(5):
        x = torch.randn(6, 3, generator=torch.Generator().manual_seed(step)).double()
        for net, optimizer in ((ours, first), (theirs, second)):
            optimizer.zero_grad()
            net(x).pow(2).mean().backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_adamw_decays_beside_the_gradient():
    """Without one, weights shrink by their rate times the decay, and by nothing else."""
    net = network()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = built(optim(optimizer="adamw", lr=0.01, weight_decay=0.5), net)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for p, old in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old * (1 - 0.5 * rates[id(p)]))


@pytest.mark.parametrize(
    ("schedule", "table"),
    [
        (
            "poly",
            [(0, 0.1, 1.0), (1, 0.0909532576083, 0.9095325760830), (9, 0.0125892541179, 0.1258925411794)],
        ),
        ("cosine", [(0, 0.1, 1.0), (5, 0.06, 0.51), (9, 0.02195773934819, 0.04398230701537)]),
    ],
)
def test_rates_per_step(schedule, table):
    cfg = optim(schedule=schedule, target_lr=0.02)
    optimizer = built(cfg, network())
    for step, encoder, heads in table:
        rates = set_learning_rate(optimizer, cfg, step, 10)
        assert rates == pytest.approx([encoder, heads], rel=1e-8)
        assert [group["lr"] for group in optimizer.param_groups] == rates


def test_the_rate_rises_to_that_of_the_schedule():
    cfg, plain = optim(warmup_steps=4), optim()
    optimizer = built(cfg, network())
    for step, share in enumerate((0.25, 0.5, 0.75, 1.0, 1.0)):
        rates = set_learning_rate(optimizer, plain, step, 10)
        assert set_learning_rate(optimizer, cfg, step, 10) == pytest.approx([share * rate for rate in rates])


def test_rates_reach_the_optimizer_after_a_resume():
    """In the original the schedule lost the optimizer once its state had been loaded."""
    cfg = optim(momentum=0.0, weight_decay=0.0)
    old = built(cfg, network())
    set_learning_rate(old, cfg, 4, 10)
    net = network()
    optimizer = built(cfg, net)
    optimizer.load_state_dict(copy.deepcopy(old.state_dict()))
    rates = set_learning_rate(optimizer, cfg, 5, 10)
    assert rates == pytest.approx([0.1 * 0.5**0.9, 0.5**0.9], rel=1e-12)
    before = [p.detach().clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = [float((a - b).detach().mean()) for a, b in zip(before, net.parameters(), strict=True)]
    assert moved == pytest.approx([rates[0]] * 2 + [rates[1]] * 4, rel=1e-4)


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_a_resumed_optimizer_continues_bit_for_bit(kind):
    cfg = optim(optimizer=kind)

    def run(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            set_learning_rate(optimizer, cfg, step, 10)
            optimizer.zero_grad()
            net(torch.randn(6, 3, generator=torch.Generator().manual_seed(step))).pow(2).mean().backward()
            optimizer.step()

    whole, half = network(), network()
    one, two = built(cfg, whole), built(cfg, half)
    run(whole, one, range(6))
    run(half, two, range(3))
    rest = network()
    rest.load_state_dict(half.state_dict())
    three = built(cfg, rest)
    three.load_state_dict(copy.deepcopy(two.state_dict()))
    run(rest, three, range(3, 6))
    assert identical(state_of(whole, one), state_of(rest, three))


# --- the guard -------------------------------------------------------------------------------------------------


class Trainer:
    """A few steps of a loop with the guard, as `train_epoch` uses it on a GPU: checked at the end only."""

    def __init__(self, mode: str, kind: str = "sgd", memory: int = 10, scaled: bool = False) -> None:
        self.net = network()
        self.cfg = optim(optimizer=kind, momentum=0.9, weight_decay=1e-4, lr=0.01)
        self.optimizer = built(self.cfg, self.net)
        self.guard = FiniteGuard(mode, Dist(), memory)
        self.scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=4.0, growth_interval=1000)
        self.asked: list[int] = []

    def step(self, step: int, factor: float = 1.0, extra: float = 0.0) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        x = torch.randn(6, 3, generator=torch.Generator().manual_seed(step))
        sup = self.net(x).pow(2).mean()
        unsup = factor * sup
        total = sup + unsup
        self.scaler.scale(total).backward()

        def images() -> str:
            self.asked.append(step)
            return f"image{step}"

        terms = {"loss_sup": sup, "loss_unsup": unsup, "kept": torch.tensor(extra)}
        self.bad = self.guard.watch(step, Losses(total, terms), images)
        self.guard.step(self.scaler, self.optimizer)

    def state(self) -> list[Tensor]:
        return state_of(self.net, self.optimizer)


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("factor", [NAN, INF, -INF])
@pytest.mark.parametrize("scaled", [False, True])
def test_stop_freezes_everything_from_the_bad_step_on(kind, factor, scaled):
    trainer = Trainer("stop", kind, scaled=scaled)
    trainer.step(1)
    trainer.step(2)
    trainer.guard.check()  # nothing to complain about
    before = trainer.state()
    trainer.step(3, factor)
    assert identical(trainer.state(), before)
    trainer.step(4)  # good again, but the run is over: the host has just not noticed yet
    trainer.step(5, factor)
    assert identical(trainer.state(), before)
    assert trainer.guard.cancelled == 3
    assert all(p.isfinite().all() for p in trainer.net.parameters())


def test_the_error_names_step_term_images_and_checkpoint():
    trainer = Trainer("stop")
    trainer.step(1)
    trainer.step(2, NAN)
    trainer.step(3)
    trainer.step(4, INF)
    trainer.guard.last_saved = Path("runs/a/last.pt")
    assert trainer.asked == []  # nobody looks for names in a healthy run
    with pytest.raises(UserError) as caught:
        trainer.guard.check()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("step 2: loss_unsup is nan; images image2;")
    assert "last good checkpoint: runs/a/last.pt" in message
    assert "loss_sup" not in message
    assert "run.on_nonfinite=skip" in message
    assert trainer.asked == [2]


def test_the_error_without_checkpoint_and_beyond_the_memory():
    trainer = Trainer("stop", memory=2)
    trainer.step(1, INF)
    with pytest.raises(UserError, match=r"step 1: loss_unsup is inf; .*last good checkpoint: none yet"):
        trainer.guard.check()
    trainer.step(2)
    trainer.step(3)
    with pytest.raises(UserError, match=r"a loss was not finite; .*run.on_nonfinite=skip"):
        trainer.guard.check()


def test_on_the_cpu_the_first_bad_step_stops_at_once():
    guard = FiniteGuard("stop", Dist(), 5, at_once=True)
    guard.watch(1, Losses(torch.tensor(1.0), {}), lambda: "a")
    with pytest.raises(UserError, match="step 2: loss is nan; images b;"):
        guard.watch(2, Losses(torch.tensor(NAN), {}), lambda: "b")


def test_a_bad_total_of_good_terms_is_noticed():
    guard = FiniteGuard("stop", Dist(), 5)
    guard.watch(1, Losses(torch.tensor(INF), {"loss_sup": torch.tensor(1.0)}), lambda: "a")
    with pytest.raises(UserError, match="step 1: loss is inf; images a;"):
        guard.check()


def test_all_ranks_name_the_images_of_the_bad_one(monkeypatch):
    """The first rank speaks for all; a good loss and good images of its own would mislead."""
    monkeypatch.setattr("common.run.guard.max_over_ranks", lambda tensor, dist: torch.ones_like(tensor))
    monkeypatch.setattr(
        "common.run.guard.gather_objects", lambda own, dist: [own, "loss_sup is nan; images theirs"]
    )
    guard = FiniteGuard("stop", Dist(world_size=2), 5)
    guard.watch(1, Losses(torch.tensor(1.0), {"loss_sup": torch.tensor(1.0)}), lambda: "ours")
    with pytest.raises(UserError) as caught:
        guard.check()
    assert "loss_sup is nan; images theirs" in str(caught.value)
    assert "ours" not in str(caught.value)


def test_figures_that_are_no_losses_may_be_anything():
    trainer = Trainer("stop")
    trainer.step(1, extra=NAN)
    assert trainer.bad == 0
    trainer.guard.check()
    assert trainer.guard.cancelled == 0


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("bad", [(1,), (3,), (1, 2, 5), (6,)])
def test_skip_leaves_the_bad_steps_out(kind, scaled, bad):
    """Bit for bit the run that never met those steps, also where the very first one is bad."""
    skipping, clean = Trainer("skip", kind, scaled=scaled), Trainer("skip", kind, scaled=scaled)
    for step in range(1, 7):
        skipping.step(step, NAN if step in bad else 1.0)
        assert skipping.bad == (step in bad)
        if step not in bad:
            clean.step(step)
        skipping.guard.check()  # never complains
    assert skipping.guard.cancelled == len(bad)
    assert clean.guard.cancelled == 0
    assert identical(skipping.state(), clean.state())


def test_momentum_starts_from_zero_even_if_the_first_step_is_cancelled():
    """The fused step leaves its new momentum uninitialized when it is cancelled; ours must not."""
    trash = torch.full((10_000,), 1e30)  # what an uninitialized buffer may find
    del trash
    trainer = Trainer("skip")
    trainer.step(1, NAN)
    for p in trainer.net.parameters():
        assert not trainer.optimizer.state[p]["momentum_buffer"].any()


@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_without_trouble_the_guard_changes_nothing(mode):
    guarded, plain = Trainer(mode), network()
    optimizer = built(guarded.cfg, plain)
    for step in range(1, 5):
        guarded.step(step)
        optimizer.zero_grad()
        x = torch.randn(6, 3, generator=torch.Generator().manual_seed(step))
        sup = plain(x).pow(2).mean()
        (sup + 1.0 * sup).backward()
        optimizer.step()
    assert identical(guarded.state(), state_of(plain, optimizer))
    assert not hasattr(guarded.optimizer, "found_inf")


def test_watching_waits_for_nothing(monkeypatch):
    """No tensor is asked for its value while steps are watched and taken."""

    def forbidden(*args, **kwargs):
        raise AssertionError("the host has read a tensor")

    trainer = Trainer("stop")
    trainer.step(1)
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu"):
        monkeypatch.setattr(Tensor, name, forbidden)
    trainer.guard.watch(2, Losses(torch.tensor(NAN), {"loss_sup": torch.tensor(NAN)}), lambda: "a")


def test_a_group_may_have_its_own_decay() -> None:
    net = nn.Linear(2, 2)
    optim = OptimConfig(lr=0.1, epochs=1, batch_size=1, weight_decay=0.5)
    optimizer = build_optimizer(optim, [Group([net.weight]), Group([net.bias], weight_decay=0.0)])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]


@pytest.mark.parametrize("enabled", [False, True])
def test_all_optimizers_of_a_bad_loss_are_cancelled(enabled: bool) -> None:
    nets = [nn.Linear(2, 1), nn.Linear(2, 1)]
    optim = OptimConfig(lr=0.1, epochs=1, batch_size=1)
    optimizers = [build_optimizer(optim, [Group(net.parameters())]) for net in nets]
    scaler = torch.amp.GradScaler("cpu", enabled=enabled)
    guard = FiniteGuard("skip", Dist(), 5)
    before = [net.weight.detach().clone() for net in nets]
    x = torch.ones(1, 2)
    loss = nets[0](x).sum() * NAN + nets[1](x).sum()  # the second network's gradient is finite
    scaler.scale(loss).backward()
    guard.watch(1, Losses(loss, {}), lambda: "a")
    guard.step(scaler, *optimizers)
    assert all(torch.equal(a, net.weight) for a, net in zip(before, nets, strict=True))
