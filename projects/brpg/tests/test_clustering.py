"""Clustering and everything that decides what is clustered."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from common.distributed import Dist
from common.errors import UserError
from projects.brpg import clustering
from projects.brpg.clustering import (
    QueueRows,
    assign,
    cluster,
    compactness,
    confidence_weighted_centres,
    contents,
    least_compact,
    minibatch_kmeans,
    plan,
    refill,
)
from projects.brpg.memory import FeatureMemory, Rows
from projects.brpg.settings import MethodConfig


def groups(count: int, dim: int, centres: int, seed: int = 0) -> np.ndarray:
    rng = np.random.RandomState(seed)
    middle = 10 * rng.randn(centres, dim)
    return (middle[rng.randint(0, centres, count)] + rng.randn(count, dim)).astype(np.float32)


# --- k-means ---------------------------------------------------------------------------------------------------


def test_separate_groups_are_found():
    rows = groups(2000, 16, 4)
    centres = minibatch_kmeans(rows, 4).centres
    labels, cost = assign(rows, centres)
    means = np.stack([rows[labels == j].mean(axis=0) for j in range(4)])
    assert sorted(np.bincount(labels)) == sorted(np.bincount(assign(rows, means)[0]))
    assert cost < 1.05 * assign(rows, means)[1]


def test_the_same_rows_give_the_same_centres_and_no_global_generator_moves():
    rows = groups(500, 8, 3)
    before = random.getstate(), np.random.get_state()[1:3], torch.get_rng_state()  # noqa: NPY002
    first, second = minibatch_kmeans(rows, 3), minibatch_kmeans(rows, 3)
    after = random.getstate(), np.random.get_state()[1:3], torch.get_rng_state()  # noqa: NPY002
    assert before[0] == after[0]
    assert np.array_equal(before[1][0], after[1][0])
    assert before[1][1] == after[1][1]
    assert torch.equal(before[2], after[2])
    assert np.array_equal(first.centres, second.centres)
    assert first.steps == second.steps
    assert not np.array_equal(first.centres, minibatch_kmeans(rows, 3, seed=1).centres)


def test_half_precision_rows_cluster_as_their_values():
    rows = groups(400, 8, 2).astype(np.float16)
    assert np.array_equal(
        minibatch_kmeans(rows, 2).centres, minibatch_kmeans(rows.astype(np.float64), 2).centres
    )


@pytest.mark.parametrize("k", [1, 2, 3])
def test_as_many_rows_as_clusters(k):
    rows = np.arange(4.0 * k).reshape(k, 4)
    centres = minibatch_kmeans(rows, k).centres
    assert np.allclose(centres[np.lexsort(centres.T[::-1])], rows)


def test_too_few_rows():
    with pytest.raises(ValueError, match="2 rows cannot form 3 clusters"):
        minibatch_kmeans(np.zeros((2, 4)), 3)


def test_equal_rows_end_without_nan():
    """All distances are ties and all but one centre stay without rows."""
    found = minibatch_kmeans(np.ones((50, 4), np.float32), 3)
    assert np.allclose(found.centres, 1.0)
    assert found.steps == 11  # the cost is zero from the first step on and fails ten times to fall


def test_rare_centres_are_moved_to_rows_of_the_batch():
    rng = np.random.RandomState(0)
    batch, centres = np.arange(200.0).reshape(100, 2), np.full((3, 2), -1.0)
    weights = np.array([500.0, 1.0, 20.0])
    clustering._reassign_rare(batch, centres, weights, rng)
    chosen = np.random.RandomState(0).choice(100, size=1, replace=False)
    assert np.array_equal(centres[1], batch[chosen[0]])
    assert weights.tolist() == [500.0, 20.0, 20.0]
    assert (centres[[0, 2]] == -1).all()


def test_at_most_half_a_batch_of_centres_is_moved():
    rng = np.random.RandomState(0)
    batch, weights = np.arange(100.0)[:, None], np.r_[np.arange(99.0) / 1000, 1000.0]
    centres = np.full((100, 1), -1.0)
    clustering._reassign_rare(batch, centres, weights, rng)
    moved = centres[:, 0] >= 0
    assert moved.tolist() == [True] * 50 + [False] * 50


def test_no_rare_centre_takes_no_draw():
    rng = np.random.RandomState(0)
    clustering._reassign_rare(np.zeros((100, 2)), np.zeros((2, 2)), np.array([5.0, 4.0]), rng)
    assert rng.random_sample() == np.random.RandomState(0).random_sample()


def test_assignment_over_chunks(monkeypatch):
    rows, centres = groups(57, 5, 3), groups(3, 5, 3, seed=1).astype(np.float64)
    whole = assign(rows, centres)
    monkeypatch.setattr(clustering, "CHUNK", 10)
    parts = assign(rows, centres)
    assert np.array_equal(whole[0], parts[0])
    assert whole[1] == pytest.approx(parts[1], rel=1e-12)


def test_nearest_is_the_first_of_equals():
    labels, cost = assign(np.zeros((3, 2)), np.array([[1.0, 0.0], [0.0, 1.0]]))
    assert labels.tolist() == [0, 0, 0]
    assert cost == 3.0


def test_confidence_weighted_centres_without_rows_or_confidence_keep_theirs():
    feats, conf = np.array([[1.0], [3.0], [5.0]]), np.array([0.25, 0.75, 0.0])
    centres = np.array([[9.0], [8.0], [7.0]])
    found = confidence_weighted_centres(feats, conf, np.array([0, 0, 2]), centres)
    assert found.tolist() == [[2.5], [8.0], [7.0]]


# --- numbers ---------------------------------------------------------------------------------------------------


def test_compactness_is_what_its_names_say():
    feats = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)).double()
    mean = feats.mean(dim=0)
    cosine = torch.nn.functional.cosine_similarity(feats, mean.unsqueeze(0)).mean()
    unit, centre = feats / feats.norm(dim=1, keepdim=True), mean / mean.norm()
    assert compactness(feats, "cos_sim").item() == pytest.approx(cosine.item())
    assert compactness(feats, "l2").item() == pytest.approx((feats - mean).norm(dim=1).mean().item())
    assert compactness(feats, "l2_norm").item() == pytest.approx((unit - centre).norm(dim=1).mean().item())


def test_a_zero_vector_makes_scaled_measures_undefined():
    feats = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    assert compactness(feats, "cos_sim").isnan()
    assert compactness(feats, "l2_norm").isnan()
    assert compactness(feats, "l2").isfinite()


@pytest.mark.parametrize(("classes", "count"), [(21, 1), (19, 1), (81, 4), (4, 1), (30, 2), (50, 2), (70, 4)])
def test_number_of_less_compact_classes(classes, count):
    values = torch.linspace(0, 1, classes).double()
    assert least_compact(values, "cos_sim", 0.05).nonzero().flatten().tolist() == list(range(count))
    assert least_compact(values, "l2", 0.05).nonzero().flatten().tolist() == list(
        range(classes - count, classes)
    )


def test_ties_add_more_classes():
    values = torch.tensor([0.5, 0.2, 0.2, 0.9]).double()
    assert least_compact(values, "cos_sim", 0.25).tolist() == [False, True, True, False]
    assert least_compact(-values, "l2_norm", 0.25).tolist() == [False, True, True, False]


def test_an_undefined_class_is_not_chosen_by_cosine_and_blocks_the_distances():
    """As NumPy's sort puts NaN last, and nothing compares with it."""
    values = torch.tensor([0.5, torch.nan, 0.2]).double()
    assert least_compact(values, "cos_sim", 0.05).tolist() == [False, False, True]
    assert least_compact(values, "l2", 0.05).tolist() == [False, False, False]


# --- scarce classes --------------------------------------------------------------------------------------------


def numbered(count: int, start: float = 0.0) -> QueueRows:
    values = torch.arange(start, start + count)
    return QueueRows(values[:, None].repeat(1, 2), values / 1000)


@pytest.mark.parametrize(
    ("high", "low", "scarce", "capacity", "expected"),
    [
        (10, 10, 30, 20, ("high", "low")),
        (9, 10, 8, 20, ((0, 8), "low")),
        (9, 10, 10, 20, ((0, 10), "low")),
        (9, 10, 11, 20, ((1, 11), "low")),
        (9, 9, 7, 20, ((3, 7), (0, 3))),
        (0, 0, 0, 20, ((0, 0), (0, 0))),
        (0, 0, 1, 20, ((0, 1), (0, 0))),
    ],
)
def test_refill(high, low, scarce, capacity, expected):
    rows = {"high": numbered(high, 100), "low": numbered(low, 200)}
    spare = numbered(scarce)
    found = refill(rows["high"], rows["low"], spare, capacity)
    for one, what in zip(found, expected, strict=True):
        wanted = rows[what] if isinstance(what, str) else spare.part(*what)
        assert torch.equal(one.feats, wanted.feats)
        assert torch.equal(one.conf, wanted.conf)


def test_refill_has_no_rule_without_unsure_features():
    with pytest.raises(UserError, match="cat has 10 confident features but only 9 others"):
        refill(numbered(10), numbered(9), numbered(5), 20, "cat")


# --- all of it -------------------------------------------------------------------------------------------------


def filled(method: MethodConfig, counts: dict[str, list[int]], dim: int = 4, seed: int = 0) -> FeatureMemory:
    generator = torch.Generator().manual_seed(seed)
    memory = FeatureMemory(method, len(next(iter(counts.values()))), dim)
    for name, numbers in counts.items():
        classes = torch.repeat_interleave(torch.arange(len(numbers)), torch.tensor(numbers))
        feats = torch.randn(len(classes), dim, generator=generator) + classes[:, None]
        memory.push({name: Rows(feats, torch.rand(len(classes), generator=generator), classes)}, Dist())
    return memory


NAMES = ["sky", "road", "cat"]


def test_every_class_gets_its_prototypes_and_the_scattered_ones_more():
    method = MethodConfig(queue_size=50)
    memory = filled(method, {"high": [40, 30, 20], "low": [12, 11, 10]})
    found = cluster(memory, method, NAMES, Dist())
    numbers = {(one.k, one.kind): one.number for one in plan(memory, method, NAMES)}
    assert sum(number == 3 for number in numbers.values()) == 2  # one class of each kind
    assert [len(own) for own in found] == [numbers[k, "high"] + numbers[k, "low"] for k in range(3)]
    for k in range(3):
        high = contents(memory.queue("high"), k).feats.numpy()
        direct = minibatch_kmeans(high, numbers[k, "high"]).centres
        assert np.array_equal(found[k][: numbers[k, "high"]].numpy(), direct)


def test_no_addition_and_one_kind_only():
    method = MethodConfig(queue_size=50, add_prototypes=0, low_prototypes=0, high_prototypes=3)
    found = cluster(filled(method, {"high": [9, 9, 9], "low": [0, 0, 0]}), method, NAMES, Dist())
    assert [len(own) for own in found] == [3, 3, 3]


def test_weighted_prototypes():
    method = MethodConfig(queue_size=50, add_prototypes=0, prototype_kind="prob", high_prototypes=1)
    memory = filled(method, {"high": [9, 9, 9], "low": [4, 4, 4]})
    found = cluster(memory, method, NAMES, Dist())
    for k in range(3):
        rows = contents(memory.queue("high"), k)
        mean = (rows.conf[:, None] * rows.feats).sum(dim=0) / rows.conf.sum()
        assert torch.allclose(found[k][0].float(), mean, atol=1e-5)


def test_one_queue_without_regard_to_confidence():
    method = MethodConfig(queue_size=50, prototype_kind="random")
    found = cluster(filled(method, {"random": [20, 20, 20]}), method, NAMES, Dist())
    assert [len(own) for own in found] == [4, 4, 4]
    assert method.num_slots == 4


@pytest.mark.parametrize("kind", ["high", "low"])
def test_a_class_with_too_few_features_is_named(kind):
    method = MethodConfig(queue_size=50, add_prototypes=0)
    counts = {"high": [9, 9, 9], "low": [9, 9, 9]}
    counts[kind] = [9, 9, 1]
    with pytest.raises(UserError, match=f"class 'cat' has 1 features in the queue '{kind}' but needs 2"):
        cluster(filled(method, counts), method, NAMES, Dist())


def test_fewer_prototypes_where_that_is_allowed():
    method = MethodConfig(queue_size=50, scarce_classes="fewer")
    found = cluster(filled(method, {"high": [9, 1, 0], "low": [9, 9, 0]}), method, NAMES, Dist())
    assert [len(own) for own in found][1:] == [3 + (len(found[1]) > 3), 0]
    assert all(own.isfinite().all() for own in found)
    assert found[2].shape == (0, 4)


def test_scarce_queue_serves_classes_without_confident_features():
    method = MethodConfig(queue_size=50, scarce_queue=True, add_prototypes=0)
    counts = {"high": [20, 5, 0], "low": [20, 20, 0], "scarce": [30, 30, 9]}
    memory = filled(method, counts)
    found = cluster(memory, method, NAMES, Dist())
    assert [len(own) for own in found] == [4, 4, 4]
    spare = contents(memory.queue("scarce"), 2)
    assert (spare.conf.diff() >= 0).all()
    assert np.array_equal(found[2][:2].numpy(), minibatch_kmeans(spare.feats[4:].numpy(), 2).centres)
    with pytest.raises(UserError, match="class 'cat' has 12 confident features but only 3 others"):
        cluster(filled(method, counts | {"high": [20, 5, 12], "low": [20, 20, 3]}), method, NAMES, Dist())
    allowed = MethodConfig(queue_size=50, scarce_queue=True, add_prototypes=0, scarce_classes="fewer")
    found = cluster(
        filled(allowed, counts | {"high": [20, 5, 12], "low": [20, 20, 1]}), allowed, NAMES, Dist()
    )
    assert [len(own) for own in found] == [4, 4, 3]
