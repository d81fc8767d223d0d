"""The phases of a training step, with a tiny network and real random numbers."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from common.config import build
from common.data.streams import Batches
from common.distributed import Dist
from common.errors import UserError
from common.models.deeplab import Outputs
from common.numerics.losses import Losses
from projects.brpg import step, train
from projects.brpg.augment import Draws
from projects.brpg.losses import Criterion
from projects.brpg.model import Networks
from projects.brpg.settings import MethodConfig, QuirkConfig
from projects.brpg.state import MethodState
from projects.brpg.tests import toys

NAMES = ["a", "b", "c"]
DIM, SIZE = 6, 33
CPU = torch.device("cpu")
METHOD = MethodConfig(
    high_threshold=0.4, pseudo_threshold=0.4, pseudo_threshold_end=0.5, queue_size=40, ohem_min_kept=50,
    grid_steps=4, unsup_points=20, scarce_classes="fewer",
)  # fmt: skip


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.logits, self.feats = nn.Conv2d(8, 3, 1), nn.Conv2d(8, DIM, 1)

    def forward(self, x: Tensor) -> Outputs:
        x = self.encoder(x)
        return Outputs(self.logits(x), self.feats(x), None)


def networks(burn_in: bool = True) -> Networks:
    torch.manual_seed(0)
    student, teacher = Toy(), Toy().requires_grad_(False)
    return Networks(student, teacher, student, Criterion(min_kept=50), teacher_burn_in=burn_in)


def batch(seed: int, copy_paste: bool = False) -> Batches:
    g = torch.Generator().manual_seed(seed)
    y = (
        torch.randint(0, 3, (2, 5, 5), generator=g)
        .repeat_interleave(7, 1)
        .repeat_interleave(7, 2)[:, :33, :33]
    )
    x = torch.randn(2, 3, SIZE, SIZE, generator=g) + torch.stack((y, -y, 1 - y), dim=1)
    u = torch.randn(2, 3, SIZE, SIZE, generator=g)
    y[0, :3] = 255
    if copy_paste:
        x, y = torch.cat((x, x.flip(0)), dim=1), torch.cat((y, y.flip(0)), dim=1)
    return toys.batches(x, y, u, u + 0.1 * torch.randn(u.shape, generator=g))


class Loop:
    """A loop as the training script has it, without data files."""

    def __init__(
        self, method: MethodConfig, quirks: QuirkConfig | None = None, length: int = 2, epochs: int = 8
    ):
        cfg = toys.settings(method, quirks, epochs)
        self.nets = networks(cfg.quirks.own_teacher_statistics)
        self.state, self.draws = MethodState(method, 3, DIM), Draws(0, 0, CPU)
        self.optimizer = torch.optim.SGD(self.nets.student.parameters(), lr=0.02, momentum=0.9)
        self.run = toys.run_of(cfg, self.nets, self.state, NAMES, self.draws, self.optimizer)
        self.length, self.epochs, self.done = length, epochs, 0

    def one(self) -> Losses:
        at = toys.at(0, self.done, self.length, self.epochs)
        train.before_step(at, self.run)
        step.make_prototypes(at, self.run)
        result = train.train_step(batch(self.done, self.run.cfg.method.copy_paste), at, self.run)
        self.optimizer.zero_grad(set_to_none=True)
        result.total.backward()
        self.optimizer.step()
        train.after_step(at, self.run)
        self.done += 1
        return result

    def many(self, count: int) -> list[dict[str, float]]:
        return [{k: float(v.detach()) for k, v in self.one().terms.items()} for _ in range(count)]


def test_phases():
    cityscapes = MethodConfig(collect_start=3, collect_epochs=3)
    assert [step.phase_of(e, MethodConfig()) for e in range(4)] == [
        "supervised",
        "collect",
        "prototypes",
        "prototypes",
    ]
    assert [step.phase_of(e, cityscapes) for e in (0, 1, 2, 3, 5, 6)] == [
        "supervised", "semi", "semi", "collect", "collect", "prototypes",
    ]  # fmt: skip


def test_every_phase_has_its_terms():
    loop = Loop(dataclasses.replace(METHOD, collect_start=2))
    found = loop.many(8)
    assert set(found[0]) == set(found[1]) == {"loss_sup"}
    assert set(found[2]) == set(found[3]) == {"loss_sup", "loss_unsup", "kept"}
    assert (
        set(found[4])
        == set(found[5])
        == {"loss_sup", "loss_unsup", "kept", "collected_high", "collected_low"}
    )
    assert set(found[6]) == set(found[7]) == {"loss_sup", "loss_unsup", "kept", "loss_proto"}
    assert found[4]["collected_high"] > 0
    assert found[6]["loss_proto"] > 0
    assert loop.state.memory is None


VARIANTS = {
    "published": {},
    "prob": {"prototype_kind": "prob"},
    "random": {"prototype_kind": "random"},
    "csp": {"threshold_type": "csp", "thre_min": 0.3, "thre_max": 0.6, "fix_classes": (1,)},
    "balanced": {"class_balanced": True, "sample_per_image": 5},
    "scarce": {"scarce_queue": True, "high_threshold": 0.99},
    "cutout": {"strong_augmentation": "cutout", "augment_probability": 1.0},
    "classmix": {"strong_augmentation": "classmix", "augment_probability": 1.0},
    "unmixed": {"strong_augmentation": "none"},
    "contrast": {"contra_weight": 1.0, "low_rank": 1, "high_rank": 3, "num_queries": 8, "num_negatives": 4,
                 "contra_queue": 50, "contra_queue_first": 60},
    "copy_paste": {"copy_paste": True, "paste_ignore": (0,), "paste_promote": 2},
    "half": {"queue_dtype": "float16"},
    "impossible": {"high_threshold": 1.1, "pseudo_threshold": 1.2, "pseudo_threshold_end": 1.3, "low_threshold": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_stay_finite(name):
    loop = Loop(dataclasses.replace(METHOD, **VARIANTS[name]))
    for terms in loop.many(7):
        assert all(torch.tensor(v).isfinite() for v in terms.values()), terms
    assert all(p.isfinite().all() for p in loop.nets.student.parameters())
    assert loop.state.prototypes.centres.isfinite().all()
    assert bool(loop.state.prototypes.real.any()) is (name != "impossible")


def test_contrast_is_alive():
    terms = Loop(dataclasses.replace(METHOD, **VARIANTS["contrast"])).many(7)[-1]
    assert terms["loss_contra"] > 0


def test_too_few_features_stop_the_run_at_the_clustering():
    loop = Loop(dataclasses.replace(METHOD, high_threshold=1.1, pseudo_threshold=1.2, scarce_classes="stop"))
    loop.many(4)
    with pytest.raises(UserError, match="class 'a' has 0 features in the queue 'high'"):
        loop.one()


def test_clustering_happens_once():
    loop = Loop(METHOD)
    loop.many(5)
    at = toys.at(2, 1)
    assert step.make_prototypes(at, loop.run) is None
    collecting = Loop(METHOD)
    collecting.many(2)
    assert step.make_prototypes(toys.at(1, 1), collecting.run) is None
    collecting.many(2)
    numbers = step.make_prototypes(at, collecting.run)
    assert numbers is not None
    assert sum(numbers) == int(collecting.state.prototypes.real.sum())


@pytest.mark.parametrize("own", [True, False])
def test_statistics_of_the_teacher(own):
    """QUIRK quirks.own_teacher_statistics."""
    loop = Loop(METHOD, QuirkConfig(own_teacher_statistics=own))
    loop.many(2)
    student, teacher = loop.nets.student.encoder[1], loop.nets.teacher.encoder[1]
    assert torch.equal(teacher.running_mean, torch.zeros(8)) is not own
    train.before_step(toys.at(1), loop.run)
    assert torch.equal(teacher.running_mean, student.running_mean) is not own
    for a, b in zip(loop.nets.teacher.parameters(), loop.nets.student.parameters(), strict=True):
        assert torch.equal(a, b)


def test_teacher_is_copied_once_and_then_averaged():
    loop = Loop(METHOD)
    loop.many(3)
    for a, b in zip(loop.nets.teacher.parameters(), loop.nets.student.parameters(), strict=True):
        assert torch.equal(a, b)  # the first average has weight 0
    before = [p.clone() for p in loop.nets.teacher.parameters()]
    train.before_step(toys.at(1, 1), loop.run)
    assert all(torch.equal(a, b) for a, b in zip(loop.nets.teacher.parameters(), before, strict=True))
    loop.one()
    for old, a, b in zip(before, loop.nets.teacher.parameters(), loop.nets.student.parameters(), strict=True):
        assert torch.allclose(a, (old + b) / 2, atol=1e-6)


def test_supervised_epochs_leave_the_teacher_parameters_alone():
    loop = Loop(METHOD)
    before = [p.clone() for p in loop.nets.teacher.parameters()]
    loop.many(2)
    assert all(torch.equal(a, b) for a, b in zip(loop.nets.teacher.parameters(), before, strict=True))


def test_representation_head_always_has_a_gradient():
    for count in (1, 3, 5):
        loop = Loop(METHOD)
        loop.many(count)
        grad = loop.nets.student.feats.weight.grad
        assert grad is not None
        assert bool(grad.any()) is (count == 5)


@pytest.mark.parametrize(("reduce", "share"), [("sum_forward_only", 0.5), ("mean", 1.0)])
def test_prototype_gradient_on_two_processes(reduce, share, monkeypatch):
    """QUIRK quirks.proto_reduce; the value that is reported does not depend on it."""
    monkeypatch.setattr(step, "mean_over_ranks", lambda value, dist: value)

    def gradient(dist: Dist, quirks: QuirkConfig) -> tuple[Tensor, float]:
        loop = Loop(METHOD, quirks)
        loop.many(5)
        at, loop.run.dist = toys.at(2, 1), dist
        _, seen = step.semi_step(batch(5), at, loop.run)
        part = step.prototype_step(seen, at, loop.run)
        (found,) = torch.autograd.grad(part.total, seen.student.feats)
        return found, float(part.terms["loss_proto"])

    alone, value = gradient(Dist(), QuirkConfig())
    shared, same = gradient(Dist(world_size=2), QuirkConfig(proto_reduce=reduce))
    assert torch.allclose(shared, share * alone, atol=1e-8)
    assert same == pytest.approx(value)


@pytest.mark.parametrize("ramp_from_five", [True, False])
def test_threshold_ramp(ramp_from_five, monkeypatch):
    """QUIRK quirks.ramp_from_five."""
    seen = []
    original = step.pseudo_threshold
    monkeypatch.setattr(step, "pseudo_threshold", lambda *a: seen.append(original(*a)) or seen[-1])
    loop = Loop(METHOD, QuirkConfig(ramp_from_five=ramp_from_five))
    loop.many(5)
    assert seen[0] == pytest.approx(0.4 - 0.1 if ramp_from_five else 0.4)


@pytest.mark.parametrize(("precision", "as_half"), [("fp16", True), ("bf16", False), ("fp32", False)])
def test_confidences_are_rounded_only_where_the_networks_run_in_fp16(precision, as_half, monkeypatch):
    """QUIRK quirks.half_confidence."""
    seen = []
    original = step.collect
    monkeypatch.setattr(step, "collect", lambda *a, **k: seen.append(k["as_half"]) or original(*a, **k))
    loop = Loop(METHOD)
    loop.many(2)
    _, found = step.semi_step(batch(2), toys.at(1), loop.run)
    loop.nets.precision = precision
    for quirks in (QuirkConfig(), QuirkConfig(half_confidence=False)):
        loop.run.cfg = toys.settings(METHOD, quirks)
        step.collect_step(found, loop.run)
    assert seen == [as_half, False]


@pytest.mark.parametrize("stop", [3, 5])
def test_a_run_goes_on_where_its_state_was_saved(stop):
    """Queues in the middle of the collection; prototypes after the clustering."""
    method = dataclasses.replace(METHOD, collect_epochs=2, **VARIANTS["csp"], scarce_queue=False)
    straight, first, second = Loop(method), Loop(method), Loop(method)
    expected = straight.many(8)
    first.many(stop)
    second.nets.student.load_state_dict(copy.deepcopy(first.nets.student.state_dict()))
    second.nets.teacher.load_state_dict(copy.deepcopy(first.nets.teacher.state_dict()))
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    if first.state.memory is None:
        second.state.memory = None
    second.state.load_state_dict(copy.deepcopy(first.state.state_dict()))
    second.draws.load_state_dict(first.draws.state_dict())
    second.done = stop
    assert second.many(8 - stop) == expected[stop:]


def test_only_what_is_needed_is_allocated():
    state = MethodState(METHOD, 3, DIM)
    assert state.confidence is None
    assert state.paste_confidence is None
    assert state.negatives is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop_percent": 120.0}, "'drop_percent' is 120.0"),
        ({"temperature": 0.0}, "'temperature' is 0.0"),
        ({"queue_size": 0}, "'queue_size' is 0"),
        ({"high_prototypes": 0, "low_prototypes": 0}, "at least one of them"),
        ({"collect_start": 0}, "'collect_start' is 0; expected sup_only_epochs=1"),
        ({"scarce_queue": True, "prototype_kind": "random"}, "'scarce_queue' needs"),
        ({"proto_weight": -1.0}, "expected 0 or more"),
    ],
)
def test_settings_that_contradict_themselves(changes, message):
    with pytest.raises(ValueError, match=message):
        build(MethodConfig, changes)
