"""The AEL variant: its losses, memory, masks and choices at their edges, and every switch of an oddity."""

from __future__ import annotations

import dataclasses
import math
import random

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from common.config import build
from common.data.spec import IGNORE
from common.distributed import Dist
from common.errors import UserError
from common.mean_teacher.contrast import ContrastInputs
from common.mean_teacher.queues import ClassQueues
from common.models.deeplab import Outputs, upsample
from common.numerics.losses import entropy
from common.numerics.mixing import Box
from common.run.progress import Progress
from projects.u2pl import train
from projects.u2pl.ael import boxes as boxes_module
from projects.u2pl.ael.boxes import adaptive_box, components, grow_box, random_box, shrink_box
from projects.u2pl.ael.config import AelConfig
from projects.u2pl.ael.data import labeled_pass
from projects.u2pl.ael.draws import AelDraws, BoxUniforms
from projects.u2pl.ael.losses import (
    consistency_loss,
    reverse_cross_entropy,
    sampled_pixels,
    unlabeled_targets,
)
from projects.u2pl.ael.memory import (
    AelMemory,
    Choice,
    Pair,
    batch_confidence,
    choose,
    class_probabilities,
    class_totals,
    covered_classes,
    moved_confidence,
    paste_probabilities,
    write_columns,
)
from projects.u2pl.ael.step import AelBatch, ael_step, copy_paste
from projects.u2pl.contrast import contrast, weighted_centres
from projects.u2pl.state import Run
from projects.u2pl.tests import toys
from projects.u2pl.tests.test_memory import run_on_two_processes
from tests.properties import few_examples
from tests.runs import differences

IMAGES = 7  # unlabeled images in the list


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_logits(seed: int, batch: int = 2, classes: int = 5, size: int = 9) -> Tensor:
    return 2 * torch.randn(batch, classes, size, size, generator=generator(seed), dtype=torch.float64)


def random_labels(seed: int, batch: int = 2, classes: int = 5, size: int = 9) -> Tensor:
    labels = torch.randint(0, classes, (batch, size, size), generator=generator(seed))
    return labels.where(torch.rand(labels.shape, generator=generator(seed)) > 0.1, IGNORE)


# --- configuration ---------------------------------------------------------------------------------------------


def test_the_published_setting_is_the_default() -> None:
    ael = build(AelConfig, {})
    assert (ael.conf_init, ael.drop_low_entropy, ael.banks, ael.divide_by_ranks) == (
        "rand", True, "local", True,
    )  # fmt: skip
    assert (ael.area_thresh, ael.area_thresh2, ael.momentum, ael.start_epoch) == (0.005, 0.01, 0.999, 20)
    assert ael.common_classes == (0, 1, 2, 8, 10)


@pytest.mark.parametrize(
    "values",
    [
        {"momentum": 1.5},
        {"paste_prob": -0.1},
        {"area_thresh": 2.0},
        {"area_thresh2": -1.0},
        {"threshold": 1.1},
        {"high_entropy_threshold": 101.0},
        {"paste_resize": [0.0, 1.0]},
        {"paste_resize": [2.0, 1.0]},
        {"banks": "global"},
        {"conf_init": "ones"},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused_by_name(values) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        build(AelConfig, values)


# --- consistency -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma2", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_sampled_pixels_go_by_the_predicted_class(seed, gamma2) -> None:
    logits, uniform = random_logits(seed), torch.rand(5, 9, 9, generator=generator(seed)).double()
    conf = torch.rand(5, generator=generator(seed + 9)).double()
    rate = ((1 - conf) / (1 - conf).max()) ** gamma2
    keep, predicted = sampled_pixels(logits, conf, uniform, gamma2), logits.argmax(dim=1)
    for b, i, j in np.ndindex(*predicted.shape):
        k = predicted[b, i, j]
        assert keep[b, i, j] == (uniform[k, i, j] > 1 - rate[k])


def test_the_least_known_class_keeps_all_its_pixels_and_a_known_one_none() -> None:
    logits = F.one_hot(torch.tensor([[[0, 1, 2]]]), 3).movedim(-1, 1).double()
    uniform = torch.full((3, 1, 3), 0.5).double()
    keep = sampled_pixels(logits, torch.tensor([0.2, 1.0, 0.7]).double(), uniform)
    assert keep.tolist() == [[[True, False, False]]]  # rates 1, 0 and 0.375


def test_nothing_is_kept_when_every_class_is_known() -> None:
    logits = random_logits(0).requires_grad_()
    keep = sampled_pixels(logits, torch.ones(5).double(), torch.rand(5, 9, 9).double())
    assert not keep.any()
    loss = consistency_loss(logits, torch.rand(2, 9, 9).double(), random_labels(0), 2.0, keep)
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_ignored_pixels_count_among_the_weights() -> None:
    logits, target, conf = random_logits(1), random_labels(1), torch.rand(2, 9, 9).double()
    assert (target == IGNORE).any()
    log_probs = logits.log_softmax(dim=1)
    expected = 0.0
    for b, i, j in np.ndindex(*target.shape):
        if target[b, i, j] != IGNORE:
            expected -= conf[b, i, j] ** 3 * log_probs[b, target[b, i, j], i, j]
    expected = expected / (conf**3).sum()
    assert torch.allclose(consistency_loss(logits, conf, target, 3.0), expected)


def test_labels_that_are_all_ignored_give_zero_and_finite_gradients() -> None:
    logits = random_logits(1).requires_grad_()
    target = torch.full((2, 9, 9), IGNORE)
    loss = consistency_loss(logits, torch.rand(2, 9, 9).double(), target, 2.0)
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


# --- reverse cross entropy -------------------------------------------------------------------------------------


def test_reverse_cross_entropy_by_hand() -> None:
    logits, target = random_logits(4), random_labels(4)
    before, total, count = torch.get_rng_state(), 0.0, 0
    for b, i, j in (target != IGNORE).nonzero().tolist():
        probs = logits[b, :, i, j].softmax(0)
        total += float((1 - probs[target[b, i, j]]) * -math.log(1e-4))
        count += 1
    assert float(reverse_cross_entropy(logits, target)) == pytest.approx(total / count, rel=1e-12)
    assert float(reverse_cross_entropy(logits, torch.full_like(target, IGNORE))) == 0.0
    assert torch.equal(torch.get_rng_state(), before)


# --- pseudo-labels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_low", [True, False])
@pytest.mark.parametrize("percent", [0.0, 3.7, 20.0, 100.0])
def test_drop_low_entropy(drop_low, percent) -> None:
    logits = random_logits(3, batch=1, size=20)
    values = entropy(logits.softmax(dim=1))
    targets = unlabeled_targets(logits, percent, 20.0, 80.0, drop_low)
    flat = values.numpy().ravel()
    low, high = (float(np.percentile(flat, p)) for p in (percent, 100 - percent))
    dropped = values < low if drop_low else values >= high
    assert torch.equal(targets.pseudo == IGNORE, dropped)
    assert torch.equal(targets.pseudo[~dropped], logits.argmax(dim=1)[~dropped])
    assert torch.equal(targets.confidence, logits.softmax(dim=1).amax(dim=1))
    allowed = ~dropped if drop_low else torch.ones_like(dropped)
    split = targets.split
    assert torch.equal(split.pseudo, logits.argmax(dim=1).where(allowed, IGNORE))
    assert torch.equal(split.reliable, allowed & (values <= np.percentile(flat, 20.0)))
    assert torch.equal(split.unreliable, allowed & (values >= np.percentile(flat, 80.0)))
    assert split.unreliable.any()


def test_equal_entropies_drop_nothing_or_everything() -> None:
    """The bounds are the one value there is: nothing is below it, everything reaches it."""
    logits = torch.zeros(1, 4, 6, 6)
    assert (unlabeled_targets(logits, 20.0, 20.0, 80.0, True).pseudo == 0).all()
    assert (unlabeled_targets(logits, 20.0, 20.0, 80.0, False).pseudo == IGNORE).all()


# --- copy-paste ------------------------------------------------------------------------------------------------


def test_copy_paste() -> None:
    images, other = torch.zeros(3, 3, 1, 4), torch.ones(3, 3, 1, 4)
    labels = torch.tensor([[[5, 5, 5, IGNORE]]]).repeat(3, 1, 1)
    partners = torch.tensor([[[0, 3, IGNORE, 7]], [[0, 0, 0, 0]], [[1, 1, 1, 1]]])
    mixed, mixed_labels = copy_paste(images, labels, other, partners, [0, 7])
    assert mixed_labels.tolist() == [[[0, 5, 5, 7]], [[5, 5, 5, IGNORE]], [[5, 5, 5, IGNORE]]]
    assert mixed[:, :, 0].tolist() == [[[1.0, 0, 0, 1.0]] * 3, [[0.0] * 4] * 3, [[0.0] * 4] * 3]


def test_without_classes_nothing_is_pasted() -> None:
    images, labels = torch.rand(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    mixed, mixed_labels = copy_paste(images, labels, torch.rand(2, 3, 4, 4), 2 - labels, [])
    assert torch.equal(mixed, images)
    assert torch.equal(mixed_labels, labels)


# --- class confidence and bank ---------------------------------------------------------------------------------


def test_class_confidence_of_a_batch() -> None:
    logits, labels = random_logits(2), random_labels(2)
    labels[labels == 3] = 1  # class 3 is absent
    found, probs = batch_confidence(class_totals(logits, labels)), logits.softmax(dim=1)
    for k in range(5):
        expected = probs[:, k][labels == k].mean() if k != 3 else torch.tensor(0.0).double()
        assert torch.allclose(found[k], expected)


def test_labels_that_are_all_ignored_have_no_confidence() -> None:
    totals = class_totals(random_logits(2), torch.full((2, 9, 9), IGNORE))
    assert batch_confidence(totals).tolist() == [0.0] * 5


def test_confidence_that_is_not_finite_leaves_no_trace() -> None:
    state, batch = torch.tensor([0.5, 0.5, 0.5]), torch.tensor([1.0, torch.nan, torch.inf])
    moved = moved_confidence(state, batch, 0.9)
    assert torch.allclose(moved, torch.tensor([0.55, 0.5, 0.5]))


@pytest.mark.parametrize(("thresh", "expected"), [(0.0, [1, 1, 0]), (0.25, [1, 1, 0]), (0.26, [1, 0, 0])])
def test_covered_classes(thresh, expected) -> None:
    labels = torch.tensor([[[0, 0], [1, 0]]])  # an absent class never enters, even at a threshold of 0
    assert covered_classes(labels, 3, thresh).int().tolist() == [expected]


def test_of_two_equal_ids_the_second_column_wins() -> None:
    bank = torch.ones(2, 3, dtype=torch.bool)
    write_columns(bank, torch.tensor([[True, True], [False, True]]), torch.tensor([2, 2]))
    assert bank.int().tolist() == [[1, 1, 0], [1, 1, 1]]


def test_a_column_that_is_not_known_stays() -> None:
    bank, ones = torch.zeros(2, 3, dtype=torch.bool), torch.ones(2, 2, dtype=torch.bool)
    write_columns(bank, ones, torch.tensor([0, 2]), torch.tensor([False, True]))
    assert bank.int().tolist() == [[0, 0, 1], [0, 0, 1]]


# --- boxes -----------------------------------------------------------------------------------------------------


def flood(mask: np.ndarray) -> tuple[list[Box], list[int]]:
    """Components by walking over all neighbours, numbered by their first pixel."""
    left, boxes, pixels = mask.copy(), [], []
    for start in zip(*np.nonzero(mask), strict=True):
        if not left[start]:
            continue
        left[start], members, ahead = False, [start], [start]
        while ahead:
            i, j = ahead.pop()
            for a in range(max(i - 1, 0), min(i + 2, len(mask))):
                for b in range(max(j - 1, 0), min(j + 2, mask.shape[1])):
                    if left[a, b]:
                        left[a, b] = False
                        members.append((a, b))
                        ahead.append((a, b))
        rows, cols = np.array(members).T
        boxes.append(Box(rows.min(), cols.min(), rows.max() + 1, cols.max() + 1))
        pixels.append(len(members))
    return boxes, pixels


@few_examples
@given(st.integers(0, 2**16))
def test_components_are_numbered_by_their_first_pixel(seed) -> None:
    rng = np.random.RandomState(seed)
    mask = rng.rand(rng.randint(1, 30), rng.randint(1, 30)) < rng.choice([0.1, 0.3, 0.5, 0.9])
    assert components(mask) == flood(mask)


def test_the_default_algorithm_of_opencv_would_number_otherwise() -> None:
    mask = np.array([[0, 0, 0, 1], [1, 0, 0, 0]], dtype=bool)
    _, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    assert labels[1, 0] == 1  # by blocks of two rows
    assert components(mask)[0] == [Box(0, 3, 1, 4), Box(1, 0, 2, 1)]


@pytest.mark.parametrize("fill", [False, True])
def test_no_component_and_one_that_fills_everything(fill) -> None:
    mask = np.full((6, 6), fill)
    assert components(mask) == (([Box(0, 0, 6, 6)], [36]) if fill else ([], []))


class FixedDraws(AelDraws):
    """Components in reverse order, a random box in the middle."""

    def component_order(self, count: int) -> list[int]:
        return list(range(count, 0, -1))

    def box_uniforms(self) -> BoxUniforms:
        return BoxUniforms(0.5, 0.5, 0.5)

    def growth(self) -> float:
        return 0.5


def cut(labels: np.ndarray, k: int, thresh: float, no_pad: bool = True, no_slim: bool = True) -> Box:
    return adaptive_box(
        labels.astype(np.uint8), k, thresh, FixedDraws(0, 0, toys.CPU), no_pad=no_pad, no_slim=no_slim
    )


MIDDLE = random_box(10, BoxUniforms(0.5, 0.5, 0.5))


def two_squares() -> np.ndarray:
    labels = np.zeros((10, 10))
    labels[1:4, 1:4] = 1  # 9 pixels
    labels[6:10, 5:9] = 1  # 16 pixels
    return labels


@pytest.mark.parametrize(
    ("thresh", "expected"),
    [(0.08, Box(6, 5, 10, 9)), (0.09, Box(6, 5, 10, 9)), (0.16, MIDDLE), (1.0, MIDDLE)],
)
def test_the_first_large_enough_component_gives_the_box(thresh, expected) -> None:
    assert cut(two_squares(), 1, thresh) == expected


def test_an_order_that_begins_with_the_small_one() -> None:
    draws = AelDraws(0, 0, toys.CPU)
    draws.component_order = lambda count: [1, 2]
    found = adaptive_box(two_squares().astype(np.uint8), 1, 0.08, draws, no_pad=True, no_slim=True)
    assert found == Box(1, 1, 4, 4)


@pytest.mark.parametrize("labels", [np.zeros((10, 10)), np.full((10, 10), 4)], ids=["absent", "everywhere"])
def test_an_absent_class_and_one_that_fills_the_map_get_a_random_box(labels) -> None:
    """Neither draws an order; the original takes the only component of a full map for the background."""
    draws = AelDraws(3, 0, toys.CPU)
    found = adaptive_box(labels.astype(np.uint8), 4, 0.01, draws, no_pad=False, no_slim=False)
    assert draws.python.getstate() == random.Random(3).getstate()
    rng = np.random.RandomState(3)
    rng.uniform()
    assert found == random_box(10, BoxUniforms(*rng.uniform(size=3)))


@pytest.mark.parametrize("seed", range(20))
def test_random_boxes_cover_half_the_square_and_stay_inside(seed) -> None:
    size = 100 + 33 * seed
    box = random_box(size, AelDraws(seed, 0, toys.CPU).box_uniforms())
    assert 0 <= box.row0 < box.row1 <= size
    assert 0 <= box.col0 < box.col1 <= size
    assert abs((box.row1 - box.row0) * (box.col1 - box.col0) / size**2 - 0.5) < 2 / size


def test_grow_box_shares_the_strips_by_the_distance_to_the_borders() -> None:
    # height int(100 * 0.5^0.5) = 70, width int(5000 / 70) = 71; 50 rows more at the ratio 10 : 71, 51 columns more
    assert grow_box(Box(10, 0, 30, 20), 100, 0.5) == Box(4, 0, 73, 71)
    # a wide box of 90 columns loses 19 of them, each part cut towards zero
    assert grow_box(Box(0, 5, 2, 95), 100, 0.5) == Box(0, 13, 70, 85)


@few_examples
@given(st.integers(0, 2**16))
def test_grown_boxes_stay_inside(seed) -> None:
    rng = np.random.RandomState(seed)
    rows, cols = np.sort(rng.randint(0, 41, (2, 2)), axis=1)
    box = grow_box(Box(rows[0], cols[0], rows[1] + 1, cols[1] + 1), 42, rng.rand())
    assert 0 <= box.row0 <= box.row1 <= 42
    assert 0 <= box.col0 <= box.col1 <= 42


class Scripted(random.Random):
    """Integers at the low or at the high end of their range, and one side."""

    def __init__(self, high: bool, coin: float) -> None:
        super().__init__(0)
        self.high, self.coin = high, coin

    def randint(self, a: int, b: int) -> int:
        return b if self.high else a

    def random(self) -> float:
        return self.coin


@pytest.mark.parametrize(
    ("high", "coin", "expected"),
    [
        # least height int(200 / 18) = 11 of 16 rows and then int(200 / 11) = 18 of 18 columns, or 16 and 12
        (False, 0.9, Box(2, 1, 13, 19)),
        (False, 0.1, Box(2, 1, 13, 19)),
        (True, 0.9, Box(2, 7, 18, 19)),
        (True, 0.1, Box(2, 7, 18, 19)),
    ],
)
def test_shrink_box(high, coin, expected) -> None:
    assert shrink_box(Box(2, 1, 18, 19), 20, Scripted(high, coin)) == expected


@few_examples
@given(st.integers(0, 2**16))
def test_shrunk_boxes_are_parts_of_half_the_square(seed) -> None:
    rng = np.random.RandomState(seed)
    row0, col0 = rng.randint(0, 8, 2)
    box = Box(row0, col0, 40 - rng.randint(0, 4), 40 - rng.randint(0, 4))
    part = shrink_box(box, 40, random.Random(seed))
    assert box.row0 <= part.row0 < part.row1 <= box.row1
    assert box.col0 <= part.col0 < part.col1 <= box.col1
    assert 700 < (part.row1 - part.row0) * (part.col1 - part.col0) <= 800


@pytest.mark.parametrize("no_slim", [True, False])
@pytest.mark.parametrize("no_pad", [True, False])
def test_each_rule_concerns_its_boxes(no_pad, no_slim) -> None:
    small = cut(two_squares(), 1, 0.1, no_pad, no_slim)
    assert (small == Box(6, 5, 10, 9)) == no_pad
    large = np.zeros((10, 10))
    large[:, 0] = large[9] = 1  # an L: few pixels, but its box is everything
    assert (cut(large, 1, 0.1, no_pad, no_slim) == Box(0, 0, 10, 10)) == no_slim


# --- draws and choices -----------------------------------------------------------------------------------------


def some_numbers(draws: AelDraws) -> list[object]:
    return [
        draws.coin(), draws.classes([3, 4, 5], np.full(3, 1 / 3), 4), draws.image([], 100), draws.image([7, 8, 9], 1),
        draws.component_order(6), draws.box_uniforms(), draws.growth(), draws.class_maps(2, 3, 3).tolist(),
    ]  # fmt: skip


def test_draws_are_those_of_the_originals_generators() -> None:
    """numpy's global and python's global generator, call for call."""
    draws, rng, python = AelDraws(11, 0, toys.CPU), np.random.RandomState(11), random.Random(11)
    coin, classes, anywhere, among, order, box, growth, _ = some_numbers(draws)
    assert coin == python.random()
    assert classes == [rng.choice([3, 4, 5], p=np.full(3, 1 / 3)) for _ in range(4)]
    assert anywhere == python.randint(0, 99)
    assert among == python.choice([7, 8, 9])
    expected = np.arange(1, 7)
    python.shuffle(expected)
    assert order == expected.tolist()
    rng.uniform(0.5, 0.5, size=(1, 1))
    assert box == BoxUniforms(*rng.uniform(size=3))
    assert growth == rng.uniform()


def test_draws_go_on_where_their_state_was_taken() -> None:
    draws = AelDraws(1, 0, toys.CPU)
    some_numbers(draws)
    state = draws.state_dict()
    expected = some_numbers(draws)
    other = AelDraws(2, 0, toys.CPU)
    other.load_state_dict(state)
    assert some_numbers(other) == expected


def test_what_was_drawn_ahead_is_drawn_again_from_a_state_taken_before_its_step() -> None:
    draws = AelDraws(1, 0, toys.CPU)
    draws.look_ahead()
    numbers, maps = (
        some_numbers(draws)[:-1],
        draws.class_maps(2, 3, 3),
    )  # those of the device belong to this step
    early = draws.state_dict()
    draws.catch_up()
    late, after = draws.state_dict(), some_numbers(draws)
    other = AelDraws(2, 0, toys.CPU)
    other.load_state_dict(early)
    assert not torch.equal(other.class_maps(2, 3, 3), maps)
    other.load_state_dict(early)
    assert some_numbers(other)[:-1] == numbers
    other.look_ahead()
    other.load_state_dict(late)
    assert some_numbers(other) == after


@pytest.mark.parametrize("apart", [True, False])
def test_ranks_choose_alike_unless_apart(apart) -> None:
    first, second = (AelDraws(5, rank, toys.CPU, apart) for rank in (0, 1))
    assert ([first.coin() for _ in range(3)] == [second.coin() for _ in range(3)]) != apart
    assert (first.box_uniforms() == second.box_uniforms()) != apart


def test_probabilities() -> None:
    conf = np.array([0.0, 1.0, 0.75])
    weights = np.exp([1.0, 0.0, 0.25])
    assert np.allclose(class_probabilities(conf), weights / weights.sum())
    weights = np.exp([0.0, 0.5])
    assert np.allclose(paste_probabilities(conf, [1, 2]), weights / weights.sum())


def test_a_confidence_that_rounding_lifted_over_one_is_still_drawn_from() -> None:
    conf = np.array([1.0000001, 0.5], dtype=np.float32)
    assert np.isfinite(paste_probabilities(conf, [0, 1])).all()
    choose(conf, np.zeros((2, 4), bool), [0, 1], 3, AelDraws(0, 0, toys.CPU))


def test_an_empty_bank_gives_every_image() -> None:
    draws, conf = AelDraws(0, 0, toys.CPU), np.full(3, 0.5)
    found = [choose(conf, np.zeros((3, 6), bool), [2], 3, draws) for _ in range(200)]
    assert {c.pairs[0].second for c in found} == set(range(6))
    assert {c.pairs[0].k for c in found} == {0, 1, 2}
    assert {c.pairs[0].first for c in found} == {0, 1}
    assert all(c.paste_classes == [2] for c in found)


def test_the_second_image_has_an_object_of_the_class() -> None:
    draws, conf, bank = AelDraws(0, 0, toys.CPU), np.array([0.1, 0.9, 0.5]), np.zeros((3, 6), bool)
    bank[0, [1, 4]] = bank[1, 5] = True
    seen = {0: set(), 1: set(), 2: set()}
    for _ in range(300):
        for pair in choose(conf, bank, [1, 2], 2, draws).pairs:
            seen[pair.k].add(pair.second)
    assert seen == {0: {1, 4}, 1: {5}, 2: set(range(6))}


def test_several_pairs_take_one_of_every_two_images() -> None:
    draws = AelDraws(0, 0, toys.CPU)
    for _ in range(20):
        pairs = choose(np.full(3, 0.5), np.zeros((3, 6), bool), [2], 1, draws, pairs=3).pairs
        assert [pair.first // 2 for pair in pairs] == [0, 1, 2]


@pytest.mark.parametrize(
    ("steps", "batches", "expected"),
    [
        (3, 2, [(0, 0), (0, 1), (1, 0), (1, 0), (1, 1), (2, 0)]),
        (2, 2, [(0, 0), (0, 1), (0, 0), (0, 1)]),
        (2, 5, [(0, 0), (0, 1), (0, 0), (0, 1)]),
        (2, 1, [(0, 0), (1, 0), (1, 0), (2, 0)]),
    ],
)
def test_labeled_pass(steps, batches, expected) -> None:
    assert [labeled_pass(e, s, steps, batches) for e in range(2) for s in range(steps)] == expected


# --- memory ----------------------------------------------------------------------------------------------------


def config(**sections):
    """Toys whose teacher averages from the start, as the variant's does."""
    method = {
        "sup_only_epochs": 0,
        "average_from_start": True,
        "low_entropy_threshold": 30.0,
    } | sections.pop("method", {})
    quirks = {"shared_first_epoch": False} | sections.pop("quirks", {})
    return toys.config(method=method, quirks=quirks, **sections)


def settings(**values) -> AelConfig:
    return build(AelConfig, {"start_epoch": 1, "common_classes": [0], "area_thresh": 0.01} | values)


def memory(cfg, ael: AelConfig, seed: int = 0) -> AelMemory:
    cfg = dataclasses.replace(cfg, method=dataclasses.replace(cfg.method, ael=ael))
    return AelMemory(cfg, toys.CLASSES, IMAGES, toys.DIM, seed).double()


def test_conf_init() -> None:
    start = memory(config(), settings(conf_init="zeros")).class_confidence
    assert start.tolist() == [0.0] * toys.CLASSES
    one, same, other = (memory(config(), settings(), seed).class_confidence for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert ((one >= 0) & (one < 1)).all()


def test_a_dataset_without_a_class_to_paste_is_refused() -> None:
    with pytest.raises(UserError, match=r"method\.ael\.common_classes"):
        memory(config(), settings(common_classes=list(range(toys.CLASSES))))


def learn(bank: AelMemory, seed: int, ids=(1, 4)) -> None:
    found = random_logits(seed + 50, size=8).argmax(dim=1)
    bank.learn(random_logits(seed), random_labels(seed), found, torch.ones(2, dtype=torch.bool), ids, Dist())


def test_memory_learns_a_step() -> None:
    bank = memory(config(), settings(momentum=0.9, area_thresh2=0.2, conf_init="zeros"))
    learn(bank, 0)
    expected = 0.1 * batch_confidence(class_totals(random_logits(0), random_labels(0)))
    assert torch.allclose(bank.class_confidence, expected)
    columns = covered_classes(random_logits(50, size=8).argmax(dim=1), toys.CLASSES, 0.2)
    assert columns.any()
    assert not columns.all()
    assert torch.equal(bank.cutmix_bank[:, [1, 4]].T, columns)
    assert not bank.cutmix_bank[:, [0, 2, 3, 5, 6]].any()


def test_a_choice_sees_the_step_before_and_a_loaded_memory_its_checkpoint() -> None:
    bank, draws = memory(config(), settings(area_thresh2=0.0)), AelDraws(0, 0, toys.CPU)
    bank.choose(draws)
    learn(bank, 0, ids=(3, 3))
    assert {bank.choose(draws).pairs[0].second for _ in range(50)} == {3}
    other = memory(config(), settings(area_thresh2=0.0), seed=9)
    learn(other, 1, ids=(5, 5))
    other.choose(draws)
    other.load_state_dict(bank.state_dict())
    assert {other.choose(draws).pairs[0].second for _ in range(50)} == {3}
    assert torch.equal(other.class_confidence, bank.class_confidence)


def test_a_choice_made_ahead_is_the_one_that_would_be_made_later() -> None:
    choices = []
    for ahead in (False, True):
        bank, draws = memory(config(), settings(area_thresh2=0.0)), AelDraws(0, 0, toys.CPU)
        learn(bank, 0)
        before = draws.state_dict()
        given = bank.choose_ahead(draws, 2) if ahead else None
        assert not differences(draws.state_dict(), before)
        choices += [(bank.choose(draws, 2), bank.choose(draws, 2), draws.coin())]
        assert given in (None, choices[-1][0])
    assert choices[0] == choices[1]
    bank.choose_ahead(draws, 2)
    bank.load_state_dict(bank.state_dict())
    draws.load_state_dict(before)
    assert (bank.choose(draws, 2), bank.choose(draws, 2), draws.coin()) == choices[0]


BANKS_SCRIPT = """
    import torch
    from tools.processes import start, stop
    from projects.u2pl.ael.memory import batch_confidence, class_totals
    from projects.u2pl.tests import test_ael as t

    def main(argv):
        dist = start("cpu")
        logits, labels = [t.random_logits(r) for r in (0, 1)], [t.random_labels(r) for r in (0, 1)]
        labels[1][labels[1] == 2] = 255  # class 2 is known to one rank only
        maps, known = [torch.full((2, 8, 8), k) for k in (1, 3)], torch.ones(2, dtype=torch.bool)
        for banks in ("local", "shared"):
            memory = t.memory(t.config(), t.settings(banks=banks, conf_init="zeros", momentum=0.0))
            memory.learn(logits[dist.rank], labels[dist.rank], maps[dist.rank], known, (dist.rank, 6), dist)
            if banks == "local":
                seen, own = [(dist.rank, 6)], slice(dist.rank, dist.rank + 1)
                expected = {(2 * dist.rank + 1, dist.rank), (2 * dist.rank + 1, 6)}
            else:  # the last rank wins where both write
                own, expected = slice(0, 2), {(1, 0), (3, 1), (3, 6)}
            conf = batch_confidence(class_totals(torch.cat(logits[own]), torch.cat(labels[own])))
            assert torch.allclose(memory.class_confidence, conf), banks
            assert {tuple(x) for x in memory.cutmix_bank.nonzero().tolist()} == expected, banks
        print(f"banks hold on rank {dist.rank}", flush=True)
        stop()
"""


def test_banks_are_local_or_shared(tmp_path) -> None:
    script = BANKS_SCRIPT + '\n    if __name__ == "__main__":\n        main([])\n'
    assert run_on_two_processes(tmp_path, script).count("banks hold on rank") == 2


# --- the step --------------------------------------------------------------------------------------------------


def batch(seed: int, pairs: int = 1, ids=None) -> AelBatch:
    x_l, y_l, x_u = toys.batch(seed, unlabeled=2 * pairs)
    x_paste, y_paste, _ = toys.batch(seed + 100)
    return AelBatch(x_l, y_l, x_paste, y_paste, x_u[:pairs], x_u[pairs:], ids or list(range(pairs)))


class Loop:
    """A loop over toy steps of the variant."""

    def __init__(self, ael: AelConfig, cfg=None, seed: int = 0, pairs: int = 1, length: int = 2) -> None:
        cfg = cfg or config()
        self.cfg = dataclasses.replace(cfg, method=dataclasses.replace(cfg.method, ael=ael))
        self.length, self.pairs = length, pairs
        self.nets, self.memory = toys.networks(self.cfg, seed), memory(self.cfg, ael, seed)
        self.draws, self.step = AelDraws(seed, 0, toys.CPU), 0
        self.optimizer = torch.optim.SGD(self.nets.student.parameters(), 0.1)

    @property
    def at(self) -> Progress:
        return Progress(self.step, self.length, self.cfg.optim.epochs)

    def run(self, dist: Dist | None = None) -> Run:
        return toys.run_of(self.cfg, self.nets, self.memory, self.draws, dist)

    def losses(self, images: AelBatch | None = None, choice: Choice | None = None, dist: Dist | None = None):
        self.nets.student.train()
        choice = choice or self.memory.choose(self.draws, self.pairs)
        return ael_step(images or batch(self.step, self.pairs), choice, self.at, self.run(dist))

    def advance(self, *given):
        train.before_step(self.at, self.run())
        result = self.losses(*given)
        self.optimizer.zero_grad(set_to_none=True)
        result.total.backward()
        assert_healthy(result, self.nets)
        self.optimizer.step()
        train.after_step(self.at, self.run())
        self.step += 1
        return result

    def weights(self) -> Tensor:
        return torch.cat([p.flatten() for p in self.nets.student.parameters()]).detach()


def assert_healthy(result, nets) -> None:
    assert result.total.isfinite()
    assert all(value.isfinite() for value in result.terms.values()), result.terms
    for name, p in nets.student.named_parameters():
        assert p.grad is not None, f"{name} is not in the graph, so several processes would wait for it"
        assert p.grad.isfinite().all(), name
    assert all(p.grad is None for p in nets.teacher.parameters())


@pytest.mark.parametrize("pairs", [1, 2])
def test_the_contrast_starts_at_its_epoch(pairs) -> None:
    run = Loop(settings(), pairs=pairs)
    results = [run.advance() for _ in range(8)]
    assert ["loss_contra" in r.terms for r in results] == [False] * 2 + [True] * 6
    assert results[-1].terms["loss_contra"] > 0
    for r in results:
        total = sum(value for name, value in r.terms.items() if name.startswith("loss_"))
        assert torch.allclose(r.total, total.to(r.total.dtype))
    assert run.memory.cutmix_bank.any()


def test_equal_seeds_give_equal_runs_and_others_do_not() -> None:
    runs = [Loop(settings()), Loop(settings()), Loop(settings())]
    runs[2].draws = AelDraws(1, 0, toys.CPU)
    for run in runs:
        for _ in range(4):
            run.advance()
    assert torch.equal(runs[0].weights(), runs[1].weights())
    assert not torch.equal(runs[0].weights(), runs[2].weights())


@pytest.mark.parametrize("epoch", [0, 3, 9])
def test_the_share_of_dropped_pixels_shrinks_with_the_epochs(epoch) -> None:
    run = Loop(settings(start_epoch=99), length=1)
    run.step = epoch
    dropped = 1 - float(run.losses().terms["kept"])
    assert abs(dropped - 0.3 * (1 - epoch / run.cfg.optim.epochs)) < 1.5 / toys.SIZE[0] ** 2


@pytest.mark.parametrize(
    "values",
    [
        {"drop_low_entropy": False},
        {"conf_init": "zeros"},
        {"cons": False},
        {"cons_sample": False},
        {"cons_gamma": 1.0},
        {"cons_gamma2": 2.0},
        {"threshold": 0.9},
        {"sym_ce_l": True},
        {"sym_ce_u": True},
        {"consist_weight": 0.5},
        {"high_entropy_threshold": 40.0},
        {"conf_weight": True},
        {"momentum": 0.5},
        {"area_thresh": 0.9},
        {"no_pad": False},
        {"paste_number": 0},
        {"start_epoch": 9},
    ],
    ids=str,
)
def test_every_setting_reaches_the_training_step(values) -> None:
    runs = [Loop(settings()), Loop(settings(**values))]
    for run in runs:
        for _ in range(6):
            run.advance()
    assert not torch.allclose(runs[0].weights(), runs[1].weights(), rtol=1e-9, atol=1e-12)


def test_the_box_comes_from_the_second_image_and_the_mix_follows_it(monkeypatch) -> None:
    asked, weak, mixed = [], [], []

    def box(labels: np.ndarray, k: int, *rest: object, **kwargs: object) -> Box:
        asked.append((torch.from_numpy(labels).long(), k))
        return Box(2, 3, 9, 16)

    monkeypatch.setattr(boxes_module, "adaptive_box", box)
    run, images = Loop(settings(area_thresh2=0.1)), batch(0)
    images = images._replace(x_second=images.x_second + 2.0)  # so that other classes are seen there
    teach, forward = run.nets.teach, run.nets.student.forward

    def teaching(x: Tensor, train: bool) -> Outputs:
        out = teach(x, train)
        weak.extend([] if train else [out.logits])
        return out

    run.nets.teach = teaching
    run.nets.student.forward = lambda x: (mixed.append(x), forward(x))[1]
    run.losses(images, Choice([1], [Pair(0, 3, 5)]))
    found = upsample(weak[0], images.y_l.shape[-2:]).argmax(dim=1)
    ((seen, k),) = asked
    assert k == 3
    assert torch.equal(seen, found[1])
    expected = images.x_u.clone()
    expected[:, :, 2:9, 3:16] = images.x_second[:, :, 2:9, 3:16]
    assert torch.equal(mixed[1], expected)
    columns = covered_classes(found, toys.CLASSES, 0.1)
    assert not torch.equal(*columns)
    assert torch.equal(run.memory.cutmix_bank[:, [0, 5]].T, columns)


def test_the_teacher_sees_labeled_images_then_weak_ones_then_the_mix() -> None:
    run, calls = Loop(settings()), []
    teach = run.nets.teach
    run.nets.teach = lambda x, train: (calls.append((len(x), train)), teach(x, train))[1]
    run.losses()
    assert calls == [(2, True), (2, False), (1, True)]


def edge(name: str) -> AelBatch:
    images = batch(0)
    y_l = images.y_l
    return {
        "no partner": images._replace(
            x_paste=torch.zeros_like(images.x_paste), y_paste=torch.zeros_like(y_l)
        ),
        "class absent": images._replace(y_l=y_l.where(y_l != 3, 1), y_paste=torch.ones_like(y_l)),
        "one class": images._replace(
            y_l=torch.full_like(y_l, 2), y_paste=torch.full_like(y_l, 2)
        ),
        "all ignored": images._replace(
            y_l=torch.full_like(y_l, IGNORE), y_paste=torch.full_like(y_l, IGNORE)
        ),
        "same image twice": images._replace(x_second=images.x_u, ids=[4]),
        "one labeled image": AelBatch(*(x[:1] for x in images[:4]), *images[4:]),
        "constant images": images._replace(
            x_u=torch.zeros_like(images.x_u), x_second=torch.zeros_like(images.x_u)
        ),
    }[name]  # fmt: skip


@pytest.mark.parametrize("drop_low", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        "no partner", "class absent", "one class", "all ignored", "same image twice", "one labeled image",
        "constant images",
    ],
)  # fmt: skip
def test_nothing_breaks_at_the_edges(name, drop_low) -> None:
    run = Loop(settings(drop_low_entropy=drop_low, conf_weight=True, sym_ce_l=True, sym_ce_u=True), length=1)
    run.advance()
    run.advance(edge(name), Choice([1, 3], [Pair(0, 3, 4)]))
    assert run.memory.class_confidence.isfinite().all()
    run.advance()


@pytest.mark.parametrize("cons", [True, False])
def test_pixels_that_are_all_dropped_cost_nothing(cons) -> None:
    """No labeled pixel is sure enough, and equal entropies drop every unlabeled one."""
    run = Loop(settings(threshold=1.0, drop_low_entropy=False, cons=cons, sym_ce_u=True))
    for p in run.nets.teacher.decoder["classifier"].parameters():
        p.data.zero_()
    result = run.losses()
    result.total.backward()
    assert_healthy(result, run.nets)
    assert result.terms["loss_unsup"] == 0
    assert result.terms["kept"] == 0


def test_a_loss_that_is_not_finite_does_not_reach_the_memory() -> None:
    run = Loop(settings())
    run.advance()
    before = {key: value.clone() for key, value in run.memory.state_dict().items()}
    images = batch(1)
    images.x_l[:], images.x_u[:] = torch.nan, torch.nan
    assert not before["cutmix_bank"][0, 6]  # NaN everywhere would count as class 0 everywhere
    assert not run.losses(images, Choice([], [Pair(0, 3, 6)])).total.isfinite()
    for key, value in run.memory.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("reduce", ["sum_forward_only", "mean"])
@pytest.mark.parametrize("divide", [True, False])
def test_divide_by_ranks(divide, reduce, monkeypatch) -> None:
    collect = AelMemory.collect  # no other process is there to exchange with
    monkeypatch.setattr(AelMemory, "collect", lambda self, inputs, n, dist: collect(self, inputs, n, Dist()))
    run = Loop(settings(divide_by_ranks=divide), config(quirks={"contra_reduce": reduce}))
    for _ in range(4):
        run.advance()
    result = run.losses(dist=Dist(world_size=4))
    terms = result.terms
    assert terms["loss_contra"] > 0
    share, again = 4 if divide else 1, 4 if reduce == "sum_forward_only" else 1
    expected = (terms["loss_sup"] + terms["loss_unsup"]) / share + terms["loss_contra"] / (share * again)
    assert torch.allclose(result.total, expected)


# --- weighted centres ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [True, False])
def test_conf_weight(weighted) -> None:
    """A centre leans towards the pixel that the teacher is sure of; the loss falls when the anchor is that pixel."""
    feats = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).double().T.reshape(1, 3, 1, 3)
    feats = torch.cat((feats, feats))
    probs = torch.tensor([[0.9, 0.3, 0.1], [0.1, 0.3, 0.8], [0.0, 0.4, 0.1]]).double().reshape(1, 3, 1, 3)
    masks = torch.zeros(2, 3, 1, 3, dtype=torch.bool)
    masks[0, 0, 0, :2] = masks[0, 1, 0, 2] = True
    on = torch.ones(2, 1, 3, dtype=torch.bool)
    inputs = ContrastInputs(feats, feats, torch.cat((probs, probs)), masks, on, ~on, 1)
    thresholds = {"low_rank": 1, "high_rank": 3, "current_class_threshold": 0.5}
    numbers = {"num_queries": 1, "num_negatives": 1, "temperature": 0.5}
    cfg = config(method=thresholds | numbers | {"ael": {"conf_weight": weighted}})
    queues = ClassQueues([2] * 3, 3).double()
    queues.push(torch.arange(3), -torch.ones(3, 3).double())
    found = contrast(inputs, queues, cfg).loss  # anchors: the sure pixel of class 0, that of class 1
    centre = torch.tensor([0.9, 0.4, 0.0] if weighted else [0.5, 0.5, 0.0]).double()
    terms = []
    for similar in (centre[0] / centre.norm(), torch.tensor(1.0).double()):
        scores = torch.stack((similar, -torch.tensor(1 / 3).double().sqrt())) / cfg.method.temperature
        terms.append(-scores.log_softmax(dim=0)[0])
    assert torch.allclose(found, sum(terms) / 2)


def test_averaged_centres_know_no_weights() -> None:
    ael = {"conf_weight": True}
    assert weighted_centres(config(method={"ael": ael}).method)
    assert not weighted_centres(config(method={"ael": ael, "anchor_ema": True}).method)
