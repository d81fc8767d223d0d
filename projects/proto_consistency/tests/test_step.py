"""The training step as a whole: loss terms at their edges, what reaches which network, the prototypes' movement."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.data.spec import IGNORE
from common.distributed import Dist
from common.models.deeplab import upsample
from common.numerics.losses import Losses
from common.numerics.mixing import mix_with_next
from common.run.guard import FiniteGuard
from projects.proto_consistency import train
from projects.proto_consistency.augment import Draws, strong_augment
from projects.proto_consistency.config import Config, QuirkConfig
from projects.proto_consistency.model import Networks
from projects.proto_consistency.state import Run
from projects.proto_consistency.tests import toys

ABLATIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "no labeled term": {"supervised": False},
    "no unlabeled term": {"unsupervised": False},
    "frozen": {"update": False},
    "no unlabeled pixels in the update": {"update_unlabeled": False},
    "all pixels": {"select": "none"},
    "teacher's features": {"update_source": "teacher"},
    "gather": {"sync": "gather"},
    "copied": {"teacher_proto": "copy"},
    "one per class": {"per_class": 1},
}


def one_step(
    cfg: Config, x_l, y_l, x_u, epoch: int = 1, update: int = 0, nets: Networks | None = None, draws=None
) -> tuple[Losses, Run]:
    """Losses and run after the backward pass of one semi-supervised step."""
    run, at = toys.run_of(cfg, nets, draws), toys.at(cfg, epoch, update)
    run.nets.student.train()
    train.before_step(at, run)
    result = train.train_step(toys.batches(x_l, y_l, x_u), at, run)
    result.total.backward()
    return result, run


def assert_healthy(result: Losses, nets: Networks) -> None:
    assert result.total.isfinite()
    assert all(value.isfinite() for value in result.terms.values()), result.terms
    for name, p in nets.student.named_parameters():
        if name == "proto_net.proto_list":
            assert p.grad is None
            continue
        assert p.grad is not None, f"{name} is not in the graph, so several processes would wait for it"
        assert p.grad.isfinite().all(), name
    assert all(p.grad is None for p in nets.require_teacher().parameters())
    for network in (nets.student, nets.require_teacher()):
        assert all(value.isfinite().all() for value in network.state_dict().values())


# --- terms at their edges --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["none", "cutmix", "cutout", "classmix"])
@pytest.mark.parametrize(("labeled", "unlabeled"), [(2, 2), (1, 1), (1, 3), (3, 1)])
def test_ordinary_steps_of_all_batch_shapes(labeled, unlabeled, mode) -> None:
    cfg = toys.config(method={"strong_augmentation": mode, "cutmix_probability": 1.0})
    result, run = one_step(cfg, *toys.batch(1, labeled, unlabeled))
    assert_healthy(result, run.nets)
    assert {k for k in result.terms if k.startswith("loss_")} == {
        "loss_sup", "loss_unsup", "loss_proto_sup", "loss_proto_unsup"
    }  # fmt: skip
    assert all(value > 0 for value in result.terms.values())
    torch.testing.assert_close(result.total, sum(v for k, v in result.terms.items() if k.startswith("loss_")))


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_trains(name: str) -> None:
    loop = toys.Loop(toys.config(proto=ABLATIONS[name], method={"teacher_copy": "once"}))
    for _ in range(5):
        result = loop.advance()
        assert_healthy(result, loop.nets)
    assert ("loss_proto_sup" in result.terms) == (name != "no labeled term")
    assert ("loss_proto_unsup" in result.terms) == (name != "no unlabeled term")


@pytest.mark.parametrize("select", ["confidence", "entropy", "none"])
@pytest.mark.parametrize("norm", ["all", "valid", "u2pl"])
def test_every_selection_and_divisor(select: str, norm: str) -> None:
    cfg = toys.config(method={"select": select, "norm": norm})
    result, run = one_step(cfg, *toys.batch(0))
    assert_healthy(result, run.nets)
    share = float(result.terms["confident"])
    expected = {"none": (1.0, 1.0), "entropy": (0.75, 0.9), "confidence": (0.05, 0.95)}[select]
    assert expected[0] <= share <= expected[1]
    # the three divisors of one sum
    results = {
        one: one_step(toys.config(method={"select": select, "norm": one}), *toys.batch(0))[0]
        for one in ("all", "valid", "u2pl")
    }
    sums = {one: float(r.terms["loss_unsup"].detach()) for one, r in results.items()}
    assert sums["valid"] * share == pytest.approx(sums["all"])
    assert sums["u2pl"] * share == pytest.approx(sums["valid"])


def test_nothing_confident() -> None:
    cfg = toys.config(method={"confid_thresh": 1.0})
    result, run = one_step(cfg, *toys.batch(0))
    assert_healthy(result, run.nets)
    assert result.terms["confident"] == 0
    assert result.terms["loss_unsup"] == 0
    assert result.terms["loss_proto_unsup"] == 0
    assert result.terms["loss_proto_sup"] > 0


def test_neither_labels_nor_confidence_leave_the_prototypes_alone() -> None:
    cfg = toys.config(method={"confid_thresh": 1.0})
    x_l, y_l, x_u = toys.batch(0)
    nets = toys.networks(cfg)
    before = nets.student.require_prototypes().proto_list.clone()
    result, run = one_step(cfg, x_l, torch.full_like(y_l, IGNORE), x_u, nets=nets)
    assert_healthy(result, nets)
    assert result.total == 0
    train.after_step(toys.at(cfg, 1), run, toys.GOOD)
    assert torch.equal(nets.student.require_prototypes().proto_list, before)
    assert not run.require_movement().usage.any()


def test_classes_absent_from_the_labels_keep_their_prototypes() -> None:
    cfg = toys.config(method={"confid_thresh": 1.0})
    x_l, y_l, x_u = toys.batch(0)
    nets = toys.networks(cfg)
    head = nets.student.require_prototypes()
    before = head.proto_list.clone()
    _, run = one_step(cfg, x_l, torch.full_like(y_l, 2), x_u, nets=nets)
    train.after_step(toys.at(cfg, 1), run, toys.GOOD)
    moved = (head.proto_list != before).any(dim=1).view(toys.CLASSES, -1).any(dim=1)
    assert moved.tolist() == [False, False, True, False, False]


def test_a_mean_teacher_has_no_prototype_terms() -> None:
    cfg = toys.config(method={"proto": None})
    result, run = one_step(cfg, *toys.batch(0))
    assert_healthy(result, run.nets)
    assert set(result.terms) == {"loss_sup", "loss_unsup", "confident"}
    full, _ = one_step(toys.config(), *toys.batch(0))
    for key, value in result.terms.items():  # the same images, networks and mixing
        torch.testing.assert_close(full.terms[key], value)


@pytest.mark.parametrize("criterion", ["ce", "ohem"])
def test_auxiliary_head_and_criterion(criterion: str) -> None:
    cfg = toys.config(model={"aux_weight": 0.4}, method={"criterion": criterion, "ohem_min_kept": 20})
    x_l, y_l, x_u = toys.batch(0)
    for labels in (y_l, torch.full_like(y_l, IGNORE)):
        result, run = one_step(cfg, x_l, labels, x_u)
        assert_healthy(result, run.nets)
    without, _ = one_step(toys.config(), x_l, y_l, x_u)
    assert without.terms["loss_sup"] != result.terms["loss_sup"]


def test_one_labeled_image_in_epoch_0() -> None:
    cfg = toys.config()
    nets = toys.networks(cfg)
    nets.student.train()
    x_l, y_l, _ = toys.batch(0, labeled=1)
    result = train.train_step(toys.batches(x_l, y_l), toys.at(cfg, 0), toys.run_of(cfg, nets))
    result.total.backward()
    assert_healthy(result, nets)
    assert set(result.terms) == {"loss_sup", "loss_proto_sup"}


def test_weights_scale_their_terms() -> None:
    batch = toys.batch(0)
    full, _ = one_step(toys.config(), *batch)
    half, _ = one_step(toys.config(method={"unsup_weight": 0.5}, proto={"weight": 0.25}), *batch)
    torch.testing.assert_close(2 * half.terms["loss_unsup"], full.terms["loss_unsup"])
    for key in ("loss_proto_sup", "loss_proto_unsup"):
        torch.testing.assert_close(4 * half.terms[key], full.terms[key])
    torch.testing.assert_close(half.total, sum(v for k, v in half.terms.items() if k.startswith("loss_")))


@pytest.mark.parametrize(("epoch", "share"), [(1, 0.82), (5, 0.9), (9, 0.98)])
def test_the_share_that_passes_the_entropy_rises_with_the_epochs(epoch: int, share: float) -> None:
    cfg = toys.config(method={"select": "entropy", "strong_augmentation": "none"})
    result, _ = one_step(cfg, *toys.batch(0), epoch=epoch)
    assert float(result.terms["confident"]) == pytest.approx(share, abs=0.004)


# --- against the definition, on dense maps ---------------------------------------------------------------------


class Fixed(Draws):
    """Draws of known places, and a mask that is given."""

    def __init__(self, rows: torch.Tensor, cols: torch.Tensor, keep: torch.Tensor) -> None:
        super().__init__(0, 0, toys.CPU)
        self.fixed, self.mask = (rows, cols), keep

    def coin(self) -> float:
        return 0.0

    def mix(
        self, mode: str, labels: torch.Tensor, *batches: tuple[torch.Tensor, float | None]
    ) -> list[torch.Tensor]:
        return [mix_with_next(batch, self.mask) for batch, _ in batches]

    def points(
        self, size: tuple[int, int], granularity: int, images: int, quirks: QuirkConfig
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.fixed


def test_prototype_terms_and_movement_are_those_of_the_definition() -> None:
    """By loops over a feature map that is resized as a whole."""
    cfg = toys.config()
    generator = torch.Generator().manual_seed(4)
    places = torch.randperm(17 * 17, generator=generator)[:64].sort().values
    rows, cols = places // 17, places % 17
    keep = torch.rand(2, 17, 17, generator=generator) < 0.5
    nets = toys.networks(cfg)
    x_l, y_l, x_u = toys.batch(3)
    teacher, head = nets.require_teacher(), nets.student.require_prototypes()
    old = head.proto_list.clone()
    train.before_step(toys.at(cfg, 1, 1), toys.run_of(cfg, nets))
    with torch.no_grad():
        logits = upsample(teacher.eval()(x_u).logits, toys.SIZE)
        conf, lab = logits.softmax(dim=1).max(dim=1)
        mixed_x, mixed_lab, mixed_conf = (
            torch.where(keep if a.dim() == 3 else keep[:, None], a, a[[1, 0]]) for a in (x_u, lab, conf)
        )
        nets.student.train()
        out = nets.student(torch.cat((x_l, mixed_x)))
        dense = upsample(out.feats, toys.SIZE)
        linear = upsample(out.logits, toys.SIZE)
    target, sure = torch.cat((y_l, mixed_lab)), mixed_conf >= cfg.method.confid_thresh
    unit = F.normalize(old, dim=1).view(toys.CLASSES, 3, -1)
    sup, unsup, labeled = 0.0, 0.0, 0
    members: dict[tuple[int, int], list[torch.Tensor]] = {}
    for i in range(4):
        for row, col in zip(rows.tolist(), cols.tolist(), strict=True):
            z, c = dense[i, :, row, col], int(target[i, row, col])
            cosines = unit @ F.normalize(z, dim=0)
            loss = (
                0.0
                if c == IGNORE
                else float(F.cross_entropy(cosines.max(dim=1).values / 0.1, torch.tensor(c)))
            )
            if i < 2:
                sup, labeled = sup + loss, labeled + (c != IGNORE)
            elif sure[i - 2, row, col]:
                unsup += loss
            if c != IGNORE and (i < 2 or sure[i - 2, row, col]):
                members.setdefault((c, int(cosines[c].argmax())), []).append(z)
    new = old.clone()
    for (c, k), own in members.items():
        new[3 * c + k] = 0.9 * old[3 * c + k] + 0.1 * torch.stack(own).mean(dim=0)
    everywhere = F.cross_entropy(linear[2:], mixed_lab, reduction="none")
    nets = toys.networks(cfg)
    result, run = one_step(cfg, x_l, y_l, x_u, update=1, nets=nets, draws=Fixed(rows, cols, keep))
    terms = {key: float(value.detach()) for key, value in result.terms.items()}
    train.after_step(toys.at(cfg, 1, 1), run, toys.GOOD)
    assert terms["loss_proto_sup"] == pytest.approx(sup / labeled, rel=1e-9)
    assert terms["loss_proto_unsup"] == pytest.approx(unsup / (2 * 64), rel=1e-9)
    assert terms["loss_unsup"] == pytest.approx(float((everywhere * sure).mean()), rel=1e-9)
    assert len(members) > 7
    torch.testing.assert_close(nets.student.require_prototypes().proto_list, new, rtol=1e-10, atol=1e-12)
    assert run.require_movement().take_usage(Dist()).tolist() == [
        [len(members.get((c, k), [])) for k in range(3)] for c in range(toys.CLASSES)
    ]
    assert not run.require_movement().usage.any()


def test_the_forwards_of_a_step_move_the_prototypes_once() -> None:
    """Two forwards are as one of both: with accumulation a prototype does not move twice per step."""
    cfg = toys.config()
    nets = toys.networks(cfg)
    head = nets.student.require_prototypes()
    feats = torch.randn(40, toys.DIM, dtype=torch.float64)
    match = head.match(feats)[1]
    target, cond = torch.arange(40) % toys.CLASSES, torch.rand(40) < 0.7
    start, movement = head.proto_list.clone(), toys.run_of(cfg, nets).require_movement()
    results = []
    for parts in ([slice(0, 40)], [slice(0, 13), slice(13, 40)]):
        head.set(start)
        for part in parts:
            movement.add(feats[part], match[part], target[part], cond[part])
        movement.apply(Dist(), toys.GOOD)
        results.append(head.proto_list.clone())
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-14)
    assert not torch.equal(results[0], start)


# --- networks, draws -------------------------------------------------------------------------------------------


def test_a_coin_is_thrown_for_every_batch_whatever_the_mode() -> None:
    rng = np.random.RandomState(3)
    coins = [rng.uniform(0, 1) for _ in range(2)]
    for mode in ("none", "classmix"):
        draws = Draws(3, 0, toys.CPU)
        one_step(toys.config(method={"strong_augmentation": mode}), *toys.batch(0), draws=draws)
        assert draws.coin() == coins[1]


@pytest.mark.parametrize(
    ("probability", "counts"), [(0.5, [1, 2, 2, 2]), (1.0, [1, 2, 3, 4]), (0.0, [0] * 4)]
)
def test_the_share_of_mixed_batches(monkeypatch, probability: float, counts: list[int]) -> None:
    calls: list[str] = []
    monkeypatch.setattr(train, "strong_augment", lambda x, y, c, mode, draws: calls.append(mode) or (x, y, c))
    cfg, coins = toys.config(method={"cutmix_probability": probability}), iter([0.0, 0.4999, 0.5, 0.9])
    draws = Draws(0, 0, toys.CPU)
    monkeypatch.setattr(draws, "coin", lambda: next(coins))
    found = []
    for _ in range(4):
        one_step(cfg, *toys.batch(0), draws=draws)
        found.append(len(calls))
    assert found == counts


def test_confidence_is_mixed_with_the_labels() -> None:
    """A label from the next image brings the confidence it had there."""
    images = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 9, 9).clone()
    labels = torch.arange(2).view(2, 1, 1).expand(2, 9, 9).clone()
    confidence = 0.25 + labels / 2
    x, y, c = strong_augment(images, labels, confidence, "cutmix", Draws(0, 0, toys.CPU))
    assert torch.equal(x[:, 0], y.float())
    assert torch.equal(c, 0.25 + y / 2)
    assert set(y[0].unique().tolist()) == {0, 1}


def test_pseudo_labels_come_from_clean_images_in_evaluation_mode() -> None:
    cfg = toys.config()
    nets, seen = toys.networks(cfg), []
    x_l, y_l, x_u = toys.batch(0)
    teacher = nets.require_teacher()
    original = teacher.forward

    def forward(x):
        seen.append((teacher.training, len(x), torch.equal(x[-len(x_u) :], x_u)))
        return original(x)

    teacher.forward = forward  # type: ignore[method-assign]
    draws = Draws(0, 0, toys.CPU)
    draws.coin = lambda: 0.0  # type: ignore[method-assign]
    one_step(cfg, x_l, y_l, x_u, nets=nets, draws=draws)
    assert seen == [(False, 2, True), (True, 4, False)]


def test_steps_do_not_touch_the_inputs_or_the_global_generators() -> None:
    cfg = toys.config(method={"strong_augmentation": "cutout", "cutmix_probability": 1.0})
    x_l, y_l, x_u = toys.batch(0)
    before = [t.clone() for t in (x_l, y_l, x_u)]
    nets = toys.networks(cfg)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one_step(cfg, x_l, y_l, x_u, nets=nets)
    assert all(torch.equal(a, b) for a, b in zip(before, (x_l, y_l, x_u), strict=True))
    assert torch.equal(torch.get_rng_state(), state)  # the toy has no dropout


@pytest.mark.parametrize("mode", ["skip", "stop"])
def test_a_cancelled_step_leaves_no_trace(mode: str) -> None:
    """One broken image: neither weights nor prototypes nor their use know of it."""
    loop = toys.Loop(toys.config(method={"sup_only_epochs": 0}))
    loop.advance()
    guard = FiniteGuard(mode, Dist(), 5)
    nets, run, at = loop.nets, loop.run, toys.at(loop.cfg, 0, 1)
    head, movement = nets.student.require_prototypes(), run.require_movement()
    old, used = head.proto_list.clone(), movement.usage.clone()
    x_l, y_l, x_u = toys.batch(1)
    x_l[0] = float("inf")  # the second image's features are finite, its loss is not bad by itself
    run.optimizer.zero_grad()
    guard.protect(nets.student, nets.teacher)
    result = train.train_step(toys.batches(x_l, y_l, x_u), at, run)
    result.total.backward()
    bad = guard.watch(2, result, lambda: "")
    assert bad == 1
    guard.step(torch.amp.GradScaler("cpu", enabled=False), run.optimizer)
    train.after_step(at, run, bad)
    assert torch.equal(head.proto_list, old)
    assert torch.equal(movement.usage, used)
    for network in (nets.student, nets.require_teacher()) if mode == "skip" else ():
        assert all(value.isfinite().all() for value in network.state_dict().values())


def test_draws_continue_where_they_were_saved() -> None:
    draws = Draws(5, 1, toys.CPU)
    labels = torch.zeros(2, 3, 3, dtype=torch.long)
    quirks = QuirkConfig(border_never_sampled=False)

    def some(source: Draws) -> list[Any]:
        points = torch.stack(source.points((33, 47), 4, 2, quirks)).tolist()
        return [source.coin(), source.box(33, 47), source.class_order(labels).tolist(), points]

    some(draws)
    state = draws.state_dict()
    expected = [some(draws) for _ in range(200)]  # beyond one block of the generator
    other = Draws(0, 0, toys.CPU)
    other.load_state_dict(state)
    assert [some(other) for _ in range(200)] == expected


def test_ranks_share_coins_boxes_and_places_but_not_the_rest() -> None:
    first, second = Draws(2, 0, toys.CPU), Draws(2, 1, toys.CPU)
    labels, quirks = torch.zeros(1, 3, 3, dtype=torch.long), QuirkConfig()
    assert [first.coin(), first.box(9, 9)] == [second.coin(), second.box(9, 9)]
    one, two = (torch.stack(draws.points((33, 33), 8, 2, quirks)) for draws in (first, second))
    assert torch.equal(one, two)
    assert not torch.equal(first.class_order(labels), second.class_order(labels))
