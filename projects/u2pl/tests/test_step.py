"""The training step as a whole: derived settings, loss terms at their edges, what reaches which network."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.config import load_config
from common.data.spec import IGNORE
from common.distributed import Dist
from common.errors import UserError
from common.numerics.losses import Losses
from common.run.guard import FiniteGuard
from common.run.progress import Progress
from projects.u2pl import train
from projects.u2pl.augment import Draws
from projects.u2pl.config import Config, MethodConfig
from projects.u2pl.contrast import rank_window
from projects.u2pl.memory import Memory
from projects.u2pl.tests import toys


def one_step(cfg: Config, x_l, y_l, x_u, epoch: int = 1, update: int = 0, nets=None, memory=None, draws=None):
    """Losses and networks after the backward pass of one semi-supervised step."""
    nets = nets or toys.networks(cfg)
    nets.student.train()
    memory = memory or toys.memory(cfg)
    run, at = toys.run_of(cfg, nets, memory, draws), toys.at(cfg, epoch, update)
    train.before_step(at, run)
    result = train.train_step(toys.batches(x_l, y_l, x_u), at, run)
    result.total.backward()
    return result, nets, memory


def assert_healthy(result: Losses, nets) -> None:
    assert result.total.isfinite()
    assert all(value.isfinite() for value in result.terms.values()), result.terms
    for name, p in nets.student.named_parameters():
        assert p.grad is not None, f"{name} is not in the graph, so several processes would wait for it"
        assert p.grad.isfinite().all(), name
    assert all(p.grad is None for p in nets.teacher.parameters())


# --- rank window -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", range(2, 22))
def test_rank_window_is_derived_from_the_class_count(num_classes):
    low, high = rank_window(MethodConfig(), num_classes)
    assert 1 <= low < high == num_classes  # never the most probable class, always some rank
    assert abs(low / num_classes - 3 / 21) <= max(0.5 / num_classes, 1 / num_classes - 3 / 21) + 1e-12
    assert {21: 3, 19: 3, 12: 2, 2: 1, 5: 1}.get(num_classes, low) == low


@pytest.mark.parametrize("num_classes", range(2, 22))
def test_the_papers_window_is_taken_or_refused(num_classes):
    published = MethodConfig(low_rank=3, high_rank=20)
    if num_classes > 3:  # "20" means to the end where there are fewer classes
        assert rank_window(published, num_classes) == (3, 20)
        return
    with pytest.raises(UserError, match=r"method\.low_rank=3, .*null"):
        Memory(toys.config(method={"low_rank": 3, "high_rank": 20}), num_classes, 4)


@pytest.mark.parametrize(("low", "high"), [(5, 5), (6, 4), (-1, 3), (21, None), (3, 3), (0, 0)])
def test_empty_windows_are_refused(low, high):
    with pytest.raises(UserError, match=r"method\.low_rank"):
        rank_window(MethodConfig(low_rank=low, high_rank=high), 21)


def test_one_side_may_be_given():
    assert rank_window(MethodConfig(low_rank=2), 5) == (2, 5)
    assert rank_window(MethodConfig(high_rank=3), 5) == (1, 3)


def test_binary_is_refused_with_its_reason(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("data: {dataset: shapes, split: x}\noptim: {lr: 1, epochs: 2, batch_size: 1}\n")
    with pytest.raises(UserError) as caught:
        load_config(Config, path, ["method.binary=true"])
    assert "'binary' is true, but the function it names was never published" in str(caught.value)
    load_config(Config, path, ["method.binary=false"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.sup_only_epochs=2", "expected less than optim.epochs=2"),
        ("method.drop_percent=101", "'drop_percent' is 101.0"),
        ("method.low_entropy_threshold=-1", "'low_entropy_threshold' is -1.0"),
        ("method.temperature=0", "'temperature' is 0.0"),
        ("method.class_weights=true", "needs the auxiliary head"),
    ],
)
def test_rules_across_settings(tmp_path, override, words):
    path = tmp_path / "c.yaml"
    path.write_text("data: {dataset: shapes, split: x}\noptim: {lr: 1, epochs: 2, batch_size: 1}\n")
    with pytest.raises(UserError) as caught:
        load_config(Config, path, [override])
    assert words in str(caught.value)


# --- terms at their edges --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["none", "cutmix", "cutout", "classmix"])
@pytest.mark.parametrize(("labeled", "unlabeled"), [(2, 2), (1, 1), (1, 3), (3, 1), (4, 2)])
def test_ordinary_steps_of_all_batch_shapes(labeled, unlabeled, mode):
    cfg = toys.config(method={"strong_augmentation": mode})
    draws = Draws(1, 0, toys.CPU)
    for seed in range(2):
        result, nets, _ = one_step(cfg, *toys.batch(seed, labeled, unlabeled), draws=draws)
        assert_healthy(result, nets)
        assert result.terms["loss_sup"] > 0
        assert result.terms["loss_unsup"] > 0


@pytest.mark.parametrize("classes", [2, 3, 21])
def test_other_class_counts(classes):
    cfg = toys.config(method={"low_rank": None, "current_class_threshold": 0.02})
    nets, memory = toys.networks(cfg, classes=classes), toys.memory(cfg, classes)
    for update in range(3):
        nets.student.zero_grad()
        result, *_ = one_step(
            cfg, *toys.batch(update, classes=classes), update=update, nets=nets, memory=memory
        )
        assert_healthy(result, nets)


def test_labels_all_ignored():
    cfg = toys.config()
    x_l, y_l, x_u = toys.batch(0)
    result, nets, _ = one_step(cfg, x_l, torch.full_like(y_l, IGNORE), x_u)
    assert_healthy(result, nets)
    assert result.terms["loss_sup"] == 0
    assert result.terms["loss_unsup"] > 0


def test_unlabeled_all_of_one_class():
    """Pseudo-labels of one class: no negatives outside it, at most its own slot, everything finite."""
    cfg = toys.config(method={"low_rank": None})
    nets = toys.networks(cfg)
    for network in (nets.student, nets.teacher):
        with torch.no_grad():
            network.decoder["classifier"].bias[2] += 100.0
    x_l, y_l, x_u = toys.batch(0)
    result, *_ = one_step(cfg, x_l, torch.full_like(y_l, 2), x_u, nets=nets)
    assert_healthy(result, nets)
    assert result.terms["anchor_classes"] == 1
    assert result.terms["loss_contra"] == 0
    assert result.terms["negatives"] == 0


def test_nothing_labeled_and_one_pseudo_class():
    cfg = toys.config()
    nets = toys.networks(cfg)
    for network in (nets.student, nets.teacher):
        with torch.no_grad():
            network.decoder[
                "classifier"
            ].weight.zero_()  # equal entropy everywhere: all pixels at the boundary
    x_l, y_l, x_u = toys.batch(0)
    result, *_ = one_step(cfg, x_l, torch.full_like(y_l, IGNORE), x_u, nets=nets)
    assert_healthy(result, nets)
    assert result.terms["loss_sup"] == 0
    assert result.terms["loss_unsup"] == 0  # every pixel is dropped
    assert result.terms["kept"] == 0


def test_one_labeled_image_in_the_burn_in():
    cfg = toys.config()
    nets = toys.networks(cfg)
    nets.student.train()
    x_l, y_l, _ = toys.batch(0, labeled=1)
    at = Progress(0, 10, cfg.optim.epochs)
    result = train.train_step(toys.batches(x_l, y_l), at, toys.run_of(cfg, nets, toys.memory(cfg)))
    result.total.backward()
    assert_healthy(result, nets)
    assert set(result.terms) == {"loss_sup"}
    assert not nets.student.decoder["representation"].weight.grad.any()


@pytest.mark.parametrize("criterion", ["ce", "ohem"])
def test_auxiliary_head_and_criterion(criterion):
    cfg = toys.config(model={"aux_weight": 0.4}, method={"criterion": criterion, "ohem_min_kept": 20})
    x_l, y_l, x_u = toys.batch(0)
    for labels in (y_l, torch.full_like(y_l, IGNORE)):
        result, nets, _ = one_step(cfg, x_l, labels, x_u)
        assert_healthy(result, nets)
    without, *_ = one_step(toys.config(), x_l, y_l, x_u)
    assert without.terms["loss_sup"] != result.terms["loss_sup"]


# --- weights, schedules, networks ------------------------------------------------------------------------------


def test_weights_scale_their_terms():
    batch = toys.batch(0)
    results = {}
    for name, method in (
        ("full", {}),
        ("half", {"unsup_weight": 0.5, "contra_weight": 0.5}),
        ("no contrast", {"contra_weight": 0.0}),
    ):
        cfg = toys.config(method=method, quirks={"own_label_negatives": False})
        results[name], nets, memory = one_step(cfg, *batch)
        assert_healthy(results[name], nets)
    full, half, none = results["full"], results["half"], results["no contrast"]
    assert full.terms["loss_contra"] > 0
    for key in ("loss_unsup", "loss_contra"):
        torch.testing.assert_close(2 * half.terms[key], full.terms[key])
    torch.testing.assert_close(full.total, sum(v for k, v in full.terms.items() if k.startswith("loss_")))
    assert "loss_contra" not in none.terms
    assert memory.queues.written.sum() == 0
    assert not nets.student.decoder["representation"].weight.grad.any()


@pytest.mark.parametrize(("epoch", "share"), [(0, 0.8), (2, 0.84), (5, 0.9), (9, 0.98)])
def test_the_kept_share_rises_with_the_epochs(epoch, share):
    """80 % at the start of 10 epochs, 98 % in the last; the boundary pixel is dropped."""
    cfg = toys.config(method={"strong_augmentation": "none", "sup_only_epochs": 0})
    result, *_ = one_step(cfg, *toys.batch(0), epoch=epoch)
    assert float(result.terms["kept"]) == pytest.approx(share, abs=0.004)


def test_a_coin_is_thrown_for_every_batch_whatever_the_mode():
    rng = np.random.RandomState(3)
    coins = [rng.uniform(0, 1) for _ in range(2)]
    for mode in ("none", "classmix"):
        draws = Draws(3, 0, toys.CPU)
        one_step(toys.config(method={"strong_augmentation": mode}), *toys.batch(0), draws=draws)
        assert draws.coin() == coins[1]


def test_half_of_the_batches_are_mixed(monkeypatch):
    calls = []
    monkeypatch.setattr(train, "strong_augment", lambda x, y, mode, draws: calls.append(mode) or (x, y))
    cfg, coins = toys.config(), iter([0.0, 0.4999, 0.5, 0.9])
    draws = Draws(0, 0, toys.CPU)
    monkeypatch.setattr(draws, "coin", lambda: next(coins))
    counts = []
    for _ in range(4):
        one_step(cfg, *toys.batch(0), draws=draws)
        counts.append(len(calls))
    assert counts == [1, 2, 2, 2]


def test_pseudo_labels_come_from_clean_images_in_evaluation_mode():
    cfg = toys.config()
    nets, seen = toys.networks(cfg), []
    x_l, y_l, x_u = toys.batch(0)
    original = nets.teacher.forward

    def forward(x):
        seen.append((nets.teacher.training, len(x), torch.equal(x[-len(x_u) :], x_u)))
        return original(x)

    nets.teacher.forward = forward
    draws = Draws(0, 0, toys.CPU)
    draws.coin = lambda: 0.0
    one_step(cfg, x_l, y_l, x_u, nets=nets, draws=draws)
    assert seen == [(False, 2, True), (True, 4, False)]


def test_steps_do_not_touch_the_inputs_or_the_global_generators():
    cfg = toys.config(method={"strong_augmentation": "cutout"})
    x_l, y_l, x_u = toys.batch(0)
    before = [t.clone() for t in (x_l, y_l, x_u)]
    nets = toys.networks(cfg)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    draws = Draws(0, 0, toys.CPU)
    draws.coin = lambda: 0.0
    one_step(cfg, x_l, y_l, x_u, nets=nets, draws=draws)
    assert all(torch.equal(a, b) for a, b in zip(before, (x_l, y_l, x_u), strict=True))
    assert torch.equal(torch.get_rng_state(), state)  # the toy has no dropout


def test_mean_of_several_forwards():
    one = Losses(torch.tensor(1.0, requires_grad=True), {"loss_sup": torch.tensor(1.0), "n": torch.tensor(3)})
    two = Losses(torch.tensor(4.0), {"loss_sup": torch.tensor(2.0), "n": torch.tensor(4)})
    total, terms = train.mean_of([one, two])
    assert (float(total), float(terms["loss_sup"]), float(terms["n"])) == (2.5, 1.5, 3.5)
    assert not total.requires_grad


def test_a_skipped_step_leaves_no_trace():
    """`run.on_nonfinite=skip`: one broken image, and training goes on from where it was."""
    run = toys.Loop(toys.config(method={"sup_only_epochs": 0}))
    run.advance()
    guard = FiniteGuard("skip", Dist(), 5)
    x_l, y_l, x_u = toys.batch(1)
    run.optimizer.zero_grad()
    guard.protect(run.nets.student, run.nets.teacher)
    result = train.train_step(toys.batches(x_l * float("inf"), y_l, x_u), toys.at(run.cfg, 0, 1), run.run)
    result.total.backward()
    assert guard.watch(2, result, lambda: "") == 1
    guard.step(torch.amp.GradScaler("cpu", enabled=False), run.optimizer)
    for network in (run.nets.student, run.nets.teacher, run.memory):
        assert all(value.isfinite().all() for value in network.state_dict().values())


# --- draws -----------------------------------------------------------------------------------------------------


def test_draws_continue_where_they_were_saved():
    draws = Draws(5, 1, toys.CPU)
    labels = torch.zeros(2, 3, 3, dtype=torch.long)

    def some(source: Draws) -> list:
        return [source.coin(), source.box(33, 47), source.class_order(labels).tolist(), source.coin()]

    some(draws)
    state = draws.state_dict()
    expected = [some(draws) for _ in range(200)]  # beyond one block of the generator
    other = Draws(0, 0, toys.CPU)
    other.load_state_dict(state)
    assert [some(other) for _ in range(200)] == expected


def test_ranks_share_coins_and_boxes_but_not_the_rest():
    """QUIRK shared_draws: the NumPy draws are in lockstep on all ranks."""
    first, second = Draws(2, 0, toys.CPU), Draws(2, 1, toys.CPU)
    labels = torch.zeros(1, 3, 3, dtype=torch.long)
    assert [first.coin(), first.box(9, 9)] == [second.coin(), second.box(9, 9)]
    assert not torch.equal(first.class_order(labels), second.class_order(labels))
