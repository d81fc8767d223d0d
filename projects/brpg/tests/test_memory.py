"""Choice of features, queues against plain lists, confidence of the classes, and two processes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from common.distributed import Dist
from common.mean_teacher.contrast import pixel_rows
from common.mean_teacher.queues import finite_rows
from common.models.deeplab import Outputs
from projects.brpg.clustering import contents
from projects.brpg.memory import (
    ClassConfidence,
    FeatureMemory,
    FeatureQueues,
    RankedQueues,
    Rows,
    balanced_sample,
    class_weights,
    collect,
    confidence_thresholds,
    confidences,
    first_in_order,
    labeled_pixels,
    nearest,
    rounded,
    rows_of_both,
    scarce_rows,
    true_class_confidence,
    uniform_sample,
)
from projects.brpg.settings import MethodConfig
from projects.brpg.tests.processes import run_on_two_processes


def identity(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.float64)


def random_keys(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda count: torch.rand(count, generator=generator)


# --- samples ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [3, 10**6])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 1.0])
def test_first_in_order_is_the_beginning_of_a_stable_sort(kinds, share):
    keys = torch.randint(0, kinds, (200,)) / kinds
    mask = torch.rand(200) < share
    for size in (0, 1, 30, 150, 300):
        place = keys.masked_fill(~mask, torch.inf).argsort(stable=True)[:size]
        assert torch.equal(first_in_order(mask, keys, size), place.where(mask[place], -1))


def test_first_in_order():
    mask = torch.tensor([True, False, True, True, False])
    keys = torch.tensor([0.9, 0.0, 0.1, 0.5, 0.2])
    assert first_in_order(mask, keys, 2).tolist() == [2, 3]
    assert first_in_order(mask, keys, 4).tolist() == [2, 3, 0, -1]
    assert first_in_order(mask, keys, 9).tolist() == [2, 3, 0, -1, -1]
    assert first_in_order(torch.zeros(5, dtype=torch.bool), keys, 2).tolist() == [-1, -1]


@pytest.mark.parametrize("size", [3, 4])
def test_uniform_sample_keeps_the_order_unless_something_is_left_out(size):
    mask = torch.tensor([True, False, True, True, True])
    keys = torch.tensor([0.9, 0.0, 0.1, 0.5, 0.2])
    assert uniform_sample(mask, keys, size).tolist() == ([2, 4, 3] if size == 3 else [0, 2, 3, 4])


def test_uniform_sample_is_uniform():
    mask, keys = torch.arange(6) != 2, random_keys(0)
    hits = torch.zeros(6)
    for _ in range(2000):
        hits[uniform_sample(mask, keys(6), 2)] += 1
    assert hits[2] == 0
    assert torch.allclose(hits[mask] / 2000, torch.full((5,), 0.4), atol=0.04)


def test_class_weights():
    classes, mask = torch.tensor([0, 0, 0, 0, 3, 1]), torch.tensor([True] * 5 + [False])
    counts, weights = class_weights(classes, mask, 5, 0.5)
    assert counts.tolist() == [4, 0, 0, 1, 0]
    assert weights.tolist() == pytest.approx([1 / 3, 0, 0, 2 / 3, 0])
    assert class_weights(classes, mask & False, 5, 0.5)[1].tolist() == [0.0] * 5


def test_balanced_sample_draws_rows_with_the_weight_of_their_class():
    classes = torch.tensor([0] * 16 + [1] * 4)  # weights 1/4 and 1/2 before normalization
    mask, keys = torch.ones(20, dtype=torch.bool), random_keys(0)
    hits, first = torch.zeros(20), torch.zeros(20)
    for _ in range(3000):
        place = balanced_sample(classes, mask, keys(20), 3, 2, 0.5)
        assert len(place.unique()) == 3
        hits[place] += 1
        first[place[0]] += 1
    share = 0.5 / (16 * 0.25 + 4 * 0.5)
    assert torch.allclose(first[16:] / 3000, torch.full((4,), share), atol=0.025)
    assert hits[16:].mean() > 1.5 * hits[:16].mean()


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_balanced_sample_of_few_rows_is_all_of_them(rows):
    classes, mask = torch.tensor([2, 0, 1, 1, 0]), torch.arange(5) >= 5 - rows
    place = balanced_sample(classes, mask, torch.rand(5), 3, 3, 0.5)
    assert place.tolist() == list(range(5 - rows, 5)) + [-1] * (3 - rows)


# --- which pixels ----------------------------------------------------------------------------------------------


def test_thresholds_include_the_high_and_exclude_the_low_end():
    conf = torch.tensor([0.8, 0.79, 0.3, 0.31, 0.9, 0.9])
    classes, truth = torch.tensor([1, 1, 1, 1, 1, 1]), torch.tensor([1, 1, 1, 1, 0, 255])
    pixels = labeled_pixels(conf, classes, truth, 0.8, 0.3)
    assert pixels.high.tolist() == [True, False, False, False, False, False]
    assert pixels.low.tolist() == [False, True, False, True, False, False]
    assert labeled_pixels(conf, classes, truth, 0.8, None).low.tolist() == [
        False,
        True,
        True,
        True,
        False,
        False,
    ]
    limits = torch.tensor([0.5, 0.305])
    assert labeled_pixels(conf, classes, truth, limits, None).high.tolist()[:4] == [True, True, False, True]


def test_thresholds_that_follow_the_classes():
    method = MethodConfig(threshold_type="csp", fix_classes=(2,), high_threshold=0.85)
    confidence = torch.tensor([0.2, 0.75, 0.2, 0.99], dtype=torch.float64)
    assert confidence_thresholds(method, confidence).tolist() == [0.7, 0.75, 0.85, 0.9]
    assert confidence.tolist() == [0.2, 0.75, 0.2, 0.99]


def test_confidence_in_half_precision():
    """0.7999 rounds to the fp16 neighbour of 0.8, to which the threshold rounds too."""
    logits = torch.tensor([0.7999, 0.2001]).log().view(1, 2, 1, 1)
    for as_half in (False, True):
        _, conf, _ = confidences(logits, as_half)
        assert bool(conf >= rounded(0.8, as_half)) is as_half
    assert rounded(0.8, True) == torch.tensor(0.8).half().item()
    assert rounded(0.8, False) == 0.8


def test_nearest_takes_the_floor():
    labels = torch.arange(17).repeat(17, 1)[None]
    assert nearest(labels, (5, 5))[0, 0].tolist() == [0, 3, 6, 10, 13]


def make_step(seed: int = 0, classes: int = 4, scale: float = 3.0):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (2, 17, 17), generator=g)
    y[0, :4] = 255
    logits = scale * torch.randn(2, classes, 5, 5, generator=g)
    logits += 4 * torch.nn.functional.one_hot(nearest(y, (5, 5)).clamp(max=classes - 1), classes).movedim(
        -1, 1
    )
    feats = torch.randn(2, 6, 5, 5, generator=g)
    feats_u = torch.randn(2, 6, 5, 5, generator=g)
    return (
        Outputs(logits, feats, None),
        y,
        Outputs(scale * torch.randn(2, classes, 5, 5, generator=g), feats_u, None),
    )


def held(rows: Rows) -> Tensor:
    return torch.cat((rows.feats, rows.conf[:, None], rows.classes[:, None].to(rows.feats)), dim=1)[
        rows.classes >= 0
    ]


def reference(step, method: MethodConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Pixel by pixel: rows of high and low labeled features and of high unlabeled ones."""
    student, y, teacher = step
    found = ([], [], [])
    truth = nearest(y, (5, 5))
    for kind, (logits, feats, _) in ((0, student), (2, teacher)):
        probs = logits.softmax(dim=1)
        for b in range(2):
            for r in range(5):
                for c in range(5):
                    p, k = probs[b, :, r, c].max(dim=0)
                    row = torch.cat((feats[b, :, r, c], torch.stack((p, k.to(p)))))
                    if kind == 2:
                        if p >= method.pseudo_threshold:
                            found[2].append(row)
                    elif k == truth[b, r, c]:
                        if p >= method.high_threshold:
                            found[0].append(row)
                        elif p > method.low_threshold:
                            found[1].append(row)
    return tuple(torch.stack(rows) for rows in found)


@pytest.mark.parametrize("seed", range(3))
def test_collection_pixel_by_pixel(seed):
    method, step = MethodConfig(low_threshold=0.4), make_step(seed)
    high_l, low_l, high_u = reference(step, method)
    got = collect(*step, method, identity)
    assert torch.allclose(held(got["high"]), torch.cat((high_l, high_u)))
    assert torch.allclose(held(got["low"]), low_l)
    one = collect(*step, dataclasses.replace(method, prototype_kind="random"), identity)
    assert torch.allclose(held(one["random"]), torch.cat((high_l, low_l, high_u)))


def test_confident_rows_are_shuffled_always_and_the_others_only_when_too_many():
    method, step = MethodConfig(), make_step()
    high_l, low_l, high_u = reference(step, method)
    got = collect(*step, method, random_keys(1))
    everything = torch.cat((high_l, high_u))
    assert not torch.allclose(held(got["high"]), everything)
    assert torch.allclose(held(got["high"]).sort(dim=0).values, everything.sort(dim=0).values)
    assert torch.allclose(held(got["low"]), low_l)
    few = dataclasses.replace(method, sample_per_image=2)
    got = collect(*step, few, random_keys(1))
    assert len(held(got["high"])) == 8
    assert len(held(got["low"])) == 4
    got = collect(*step, dataclasses.replace(few, prototype_kind="random"), random_keys(1))
    assert len(held(got["random"])) == 12


def test_balanced_collection_has_caps_of_its_own():
    method, step = MethodConfig(class_balanced=True, sample_per_image=2), make_step()
    got = collect(*step, method, random_keys(1))
    assert [len(held(got[name])) for name in ("high", "low")] == [8, 4]
    large = collect(*step, MethodConfig(class_balanced=True), random_keys(1))
    high_l, _, high_u = reference(step, method)
    assert torch.allclose(held(large["high"]), torch.cat((high_l, high_u)))
    one = collect(
        *step, MethodConfig(class_balanced=True, sample_per_image=2, prototype_kind="random"), random_keys(1)
    )
    assert len(held(one["random"])) == 12


@pytest.mark.parametrize("kind", ["cluster", "random"])
@pytest.mark.parametrize("balanced", [False, True])
def test_nothing_to_collect(kind, balanced):
    """All labels ignored, no confident pseudo-label, no confident class."""
    student, y, teacher = make_step()
    method = MethodConfig(prototype_kind=kind, class_balanced=balanced, scarce_queue=kind == "cluster")
    got = collect(
        student, torch.full_like(y, 255), teacher._replace(logits=0 * teacher.logits), method, random_keys(0)
    )
    memory = FeatureMemory(method, 4, 6)
    counts = memory.push(got, Dist())
    assert all(not count.any() for count in counts.values())
    assert all(not memory.queue(name).lengths.any() for name in got)


def test_one_labeled_image():
    student, y, teacher = make_step()
    first = [Outputs(out.logits[:1], out.feats[:1], None) for out in (student, teacher)]
    got = collect(first[0], y[:1], first[1], MethodConfig(), identity)
    assert len(held(got["high"])) > 0


def test_scarce_rows_carry_the_probability_of_the_label_and_skip_ignored_pixels():
    (logits, feats, _), y, _ = make_step()
    probs, truth = logits.softmax(dim=1), nearest(y, (5, 5))
    rows = scarce_rows(feats, probs, truth, identity(50))
    table, expected = held(rows), []
    for k in range(4):
        for b, r, c in (truth == k).nonzero().tolist():
            tail = torch.tensor([probs[b, k, r, c], k])
            expected.append(torch.cat((feats[b, :, r, c], tail)))
    assert (truth == 255).any()
    assert torch.allclose(table, torch.stack(expected))
    few = held(scarce_rows(feats, probs, truth, random_keys(0)(50), per_class=3))
    assert few[:, -1].long().bincount().tolist() == [3, 3, 3, 3]
    assert all(any(torch.equal(row, other) for other in table) for row in few)


# --- queues ----------------------------------------------------------------------------------------------------


def random_rows(generator: torch.Generator, classes: int, count: int, dim: int = 2) -> Rows:
    return Rows(
        torch.randn(count, dim, generator=generator),
        torch.randint(0, 7, (count,), generator=generator) / 8,  # many ties
        torch.randint(-1, classes, (count,), generator=generator),
    )


@pytest.mark.parametrize("sizes", [[1], [5], [7, 3, 1, 4], [2] * 6])
@pytest.mark.parametrize("ranked", [False, True])
def test_long_random_sequences(sizes, ranked):
    generator = torch.Generator().manual_seed(len(sizes))
    queues = (RankedQueues if ranked else FeatureQueues)(sizes, 2)
    lists: list[list[tuple[float, Tensor]]] = [[] for _ in sizes]
    for _ in range(80):
        rows = random_rows(generator, len(sizes), int(torch.randint(0, 30, (), generator=generator)))
        counts = [0] * len(sizes)
        for feat, conf, k in zip(rows.feats, rows.conf.tolist(), rows.classes.tolist(), strict=True):
            if k >= 0:
                lists[k].append((conf, feat))
                counts[k] += 1
        if ranked:
            lists = [sorted(own, key=lambda one: one[0]) for own in lists]
        lists = [own[-size:] for own, size in zip(lists, sizes, strict=True)]
        assert queues.append(rows).tolist() == counts
        assert queues.lengths.tolist() == [len(own) for own in lists]
        for k, own in enumerate(lists):
            now = contents(queues, k)
            assert now.conf.tolist() == [conf for conf, _ in own]
            expected = torch.stack([feat for _, feat in own]) if own else torch.zeros(0, 2)
            assert torch.equal(now.feats, expected)


@pytest.mark.parametrize("kind", [FeatureQueues, RankedQueues])
def test_rows_that_are_not_finite_and_padding_are_left_out(kind):
    queues = kind([3, 3], 2)
    feats = torch.tensor([[1.0, 1.0], [torch.nan, 0.0], [2.0, 2.0], [3.0, 3.0]])
    conf = torch.tensor([0.5, 0.5, torch.inf, 0.5])
    assert queues.append(Rows(feats, conf, torch.tensor([0, 0, 1, -1]))).tolist() == [1, 0]
    assert contents(queues, 0).feats.tolist() == [[1.0, 1.0]]
    assert contents(queues, 1).feats.shape == (0, 2)


@pytest.mark.parametrize("kind", [FeatureQueues, RankedQueues])
def test_queues_round_trip(kind):
    generator = torch.Generator().manual_seed(0)
    queues = kind([4, 3], 2)
    for _ in range(4):
        queues.append(random_rows(generator, 2, 5))
    other = kind([4, 3], 2)
    other.load_state_dict({key: value.clone() for key, value in queues.state_dict().items()})
    rows = random_rows(generator, 2, 5)
    queues.append(rows)
    other.append(rows)
    for k in range(2):
        assert torch.equal(contents(queues, k).feats, contents(other, k).feats)


def test_half_precision_storage_keeps_fp16_features_whole():
    method = MethodConfig(queue_size=5, queue_dtype="float16", scarce_queue=True)
    memory = FeatureMemory(method, 2, 3)
    feats = torch.randn(4, 3).half().float()
    rows = Rows(feats, torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0, 0, 0, 0]))
    memory.push({"high": rows, "scarce": rows}, Dist())
    for name in ("high", "scarce"):
        now = contents(memory.queue(name), 0)
        assert now.feats.dtype == torch.float16
        assert torch.equal(now.feats.float(), feats)
        assert torch.equal(now.conf, rows.conf)


def test_which_queues_exist():
    def sizes(**changes) -> dict[str, list[int]]:
        memory = FeatureMemory(MethodConfig(queue_size=6, **changes), 2, 3)
        return {name: memory.queue(name).capacity.tolist() for name in memory}

    assert sizes() == {"high": [6, 6], "low": [6, 6]}
    assert sizes(scarce_queue=True) == {"high": [6, 6], "low": [6, 6], "scarce": [12, 12]}
    assert sizes(prototype_kind="random") == {"random": [12, 12]}


# --- confidence of the classes ---------------------------------------------------------------------------------


def test_true_class_confidence():
    logits = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[[0, 0, 1], [255, 1, 1], [0, 0, 0]], [[255] * 3] * 3])
    probs = logits.softmax(dim=1)
    expected = [probs[:, k][labels == k].mean().item() if (labels == k).any() else -1.0 for k in range(4)]
    assert true_class_confidence(logits, labels).tolist() == pytest.approx(expected)


def test_confidence_blends_what_is_present():
    confidence = ClassConfidence(3, 0.9, 0.8)
    confidence.update(torch.tensor([0.5, -1.0, torch.nan]).double())
    assert confidence.value.tolist() == pytest.approx([0.77, 0.8, 0.8])
    confidence.update(torch.tensor([0.0, -1.0, -1.0]).double())
    assert confidence.value.tolist() == pytest.approx([0.693, 0.8, 0.8])


def test_confidence_for_pasting_starts_with_what_it_sees():
    confidence = ClassConfidence(3, 0.9, None)
    confidence.update(torch.tensor([0.5, 0.0, -1.0]).double())
    assert confidence.value.tolist() == [0.5, 0.0, 0.0]
    confidence.update(torch.tensor([1.0, 0.25, -1.0]).double())
    assert confidence.value.tolist() == pytest.approx([0.55, 0.25, 0.0])


# --- two processes ---------------------------------------------------------------------------------------------

SCRIPT = """
    import sys

    import torch
    from common.distributed import Dist, all_gather_padded
    from tools.processes import start, stop
    from common.errors import run_main
    from projects.brpg.clustering import cluster, contents
    from projects.brpg.memory import FeatureMemory, Rows
    from projects.brpg.prototypes import Prototypes
    from projects.brpg.settings import MethodConfig

    METHOD = MethodConfig(queue_size=11, scarce_queue=True)

    def rows_of(rank, step, name):
        g = torch.Generator().manual_seed(100 * step + 10 * rank + len(name))
        classes = torch.randint(-1, 3, (20,), generator=g)
        if rank == 0 and step == 1:
            classes[:] = -1  # one process has nothing to bring
        return Rows(torch.randn(20, 4, generator=g), torch.rand(20, generator=g), classes)

    def main(argv):
        dist = start("cpu")
        shared, alone = FeatureMemory(METHOD, 3, 4), FeatureMemory(METHOD, 3, 4)
        for step in range(4):
            for name in ("high", "low", "scarce"):
                shared.push({name: rows_of(dist.rank, step, name)}, dist)
                parts = [rows_of(rank, step, name) for rank in range(2)]
                alone.push({name: Rows(*map(torch.cat, zip(*parts)))}, Dist())
        for name in shared:
            for k in range(3):
                a, b = contents(shared.queue(name), k), contents(alone.queue(name), k)
                assert torch.equal(a.feats, b.feats) and torch.equal(a.conf, b.conf), (name, k)
        found = cluster(shared, METHOD, ["a", "b", "c"], dist)
        single = cluster(alone, METHOD, ["a", "b", "c"], Dist())
        assert all(torch.equal(a, b) for a, b in zip(found, single, strict=True))

        g = torch.Generator().manual_seed(0)
        feats, labels = torch.randn(2, 9, 4, generator=g), torch.randint(0, 3, (2, 9), generator=g)
        for own in (True, False):  # QUIRK quirks.own_prototypes
            prototypes, both = Prototypes(3, 6, 4), Prototypes(3, 6, 4)
            prototypes.set(found)
            both.set(found)
            mine = feats[dist.rank]
            slot = prototypes.similarity(mine).slot
            prototypes.update(mine, labels[dist.rank], slot, 0.9, None if own else dist)
            everywhere = all_gather_padded(prototypes.centres, dist)
            assert torch.equal(everywhere[0], everywhere[1]) is not own
            if not own:
                joint = feats.flatten(0, 1)
                both.update(joint, labels.flatten(), both.similarity(joint).slot, 0.9)
                assert torch.allclose(prototypes.centres, both.centres, atol=1e-6)
        sys.stdout.write(f"all equal on rank {dist.rank}" + chr(10))
        sys.stdout.flush()
        stop()

    if __name__ == "__main__":
        run_main(main)
"""


def test_two_processes_fill_equal_queues_and_find_equal_prototypes(tmp_path):
    out = run_on_two_processes(tmp_path, SCRIPT)
    assert out.count("all equal on rank") == 2


def test_rows_of_two_maps_are_those_of_the_joined_one():
    first, second = torch.randn(2, 3, 4, 5), torch.randn(1, 3, 4, 5)
    for index in (torch.randint(0, 60, (50,)), torch.arange(40), torch.arange(40, 60), torch.arange(0)):
        expected = pixel_rows(torch.cat((first, second)), index)
        assert torch.equal(rows_of_both(first, second, index), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_row_is_finite_if_all_its_values_are(dtype):
    keys = torch.full((5, 3), torch.finfo(dtype).max, dtype=dtype)
    keys[1, 0], keys[2, 1], keys[3, 2] = torch.nan, torch.inf, -torch.inf
    assert finite_rows(torch.arange(5), keys).tolist() == [0, -1, -1, -1, 4]
