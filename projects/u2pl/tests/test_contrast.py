"""The contrast, value and gradient, against plain renditions of the description on random and on edge cases."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.data.spec import IGNORE
from common.mean_teacher.contrast import ContrastInputs, class_masks, compact, nearest, pixel_rows
from common.mean_teacher.queues import ClassQueues
from projects.u2pl.config import Config
from projects.u2pl.contrast import (
    ContrastDraws,
    InfoNce,
    _choose,
    contrast,
    contrast_inputs,
)
from projects.u2pl.losses import EntropySplit, split_by_entropy
from projects.u2pl.tests import reference, toys
from projects.u2pl.tests.golden_adapters import negatives
from projects.u2pl.tests.test_losses import TIGHT, labels_of, uniform

# --- class masks and nearest reduction -------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("images", "num_classes"), [(1, 2), (2, 5), (4, 3), (6, 2), (3, 21)])
def test_class_masks(images, num_classes, first):
    for seed in range(5):
        labels = labels_of(seed, num_classes, images, 4, 5, ignored=0.4)
        expected = reference.onehot(labels, num_classes, first)
        assert torch.equal(class_masks(labels, num_classes, first), expected)


def test_one_image_has_an_ordinary_onehot_either_way():
    labels = labels_of(0, 4, 1, 5, 5)
    assert torch.equal(class_masks(labels, 4, True), class_masks(labels, 4, False))


@pytest.mark.parametrize(
    ("large", "small"),
    [
        ((513, 513), (129, 129)),
        ((769, 769), (193, 193)),
        ((65, 33), (17, 9)),
        ((7, 5), (7, 5)),
        ((4, 6), (9, 7)),
    ],
)
@pytest.mark.parametrize("kind", ["labels", "mask"])
def test_nearest_is_the_floor_rule(large, small, kind):
    maps = torch.randint(0, 256, (2, *large), generator=torch.Generator().manual_seed(0))
    maps = maps > 100 if kind == "mask" else maps
    found = nearest(maps, small)
    assert found.dtype == maps.dtype
    assert torch.equal(found, reference.reduced(maps, small))


# --- compaction and gathering ----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("size", [0, 1, 7, 200])
def test_compact_lists_the_true_places_in_order(share, size):
    mask = torch.rand(100, generator=torch.Generator().manual_seed(3)) < share
    places = mask.nonzero().flatten().tolist()
    assert compact(mask, size).tolist() == (places + [100] * size)[:size]


def test_pixel_rows_walk_image_row_column():
    feats = torch.arange(2 * 3 * 2 * 4).view(2, 3, 2, 4)
    rows = pixel_rows(feats, torch.arange(16))
    expected = torch.stack([feats[b, :, i, j] for b in range(2) for i in range(2) for j in range(4)])
    assert torch.equal(rows, expected)
    assert pixel_rows(feats, torch.zeros(2, 3, dtype=torch.long)).shape == (2, 3, 3)


# --- contrast --------------------------------------------------------------------------------------------------


def scene(seed: int, num_classes: int, kind: str, images_l: int, images_u: int) -> dict[str, torch.Tensor]:
    """Inputs of the contrastive part; `kind` names what is special about them."""
    size, small, dim = (9, 7), (4, 3), 6
    images = images_l + images_u
    y_l = labels_of(seed, num_classes, images_l, *size)
    y_u = labels_of(seed + 7, num_classes, images_u, *size, ignored=0.1)
    if kind == "labels ignored":
        y_l[:] = IGNORE
    elif kind == "pseudo ignored":
        y_u[:] = IGNORE
    elif kind == "both ignored":
        y_l[:], y_u[:] = IGNORE, IGNORE
    elif kind == "one class":
        y_l[:], y_u[:] = num_classes - 1, num_classes - 1  # an ignored pixel would count as class 0
    elif kind == "absent classes":
        y_l[(y_l != IGNORE) & (y_l % 2 == 0)] = 1
        y_u[(y_u != IGNORE) & (y_u % 2 == 0)] = 1
    elif kind == "first ignored":
        y_l[0], y_u[0] = IGNORE, IGNORE
    elif kind == "others ignored":
        y_l[1:], y_u[1:] = IGNORE, IGNORE
    teacher = uniform(seed + 3, images_u, num_classes, *size, scale=2)
    split = split_by_entropy(teacher, y_u, 80.0, 40.0)
    return {
        "rep": uniform(seed + 1, images, dim, *small),
        "rep_teacher": uniform(seed + 2, images, dim, *small) + 0.5,
        "logits": uniform(seed + 4, images, num_classes, *small, scale=0.7 if num_classes > 2 else 0.3),
        "y_l": y_l,
        "y_u": y_u,
        "reliable": split.reliable,
        "unreliable": split.unreliable,
    }


def compare(
    data: dict[str, torch.Tensor],
    rules: reference.Rules,
    queues: list[reference.Queue],
    ours: ClassQueues,
    seed: int,
    prototypes: torch.Tensor | None = None,
    decay: float = 0.0,
    exact: bool = True,
):
    """One step by the description and one by our functions; both queues move on."""
    rep = data["rep"].clone().requires_grad_()
    plain = reference.contrastive_step(
        rep, data["rep_teacher"], data["logits"], data["y_l"], data["y_u"], data["reliable"], data["unreliable"],
        queues, rules, np.random.RandomState(seed), prototypes, decay,
    )  # fmt: skip
    cfg = config_of(rules)
    feats = data["rep"].clone().requires_grad_()
    inputs = contrast_inputs(
        feats, data["rep_teacher"], data["logits"], data["y_l"], data["y_u"],
        EntropySplit(data["y_u"], data["reliable"], data["unreliable"]), cfg,
    )  # fmt: skip
    counts = ours.push(*negatives(inputs, cfg, len(ours.written), exact))
    draws = ContrastDraws(
        torch.tensor(plain.anchor_draws).view(-1, rules.num_queries),
        torch.tensor(plain.negative_draws).view(-1, rules.num_queries * rules.num_negatives),
    )
    result = contrast(inputs, ours, cfg, ContrastDraws(*(d.long() for d in draws)), prototypes, decay)

    assert counts.tolist() == [len(rows) for rows in plain.keys]
    for k, queue in enumerate(queues):
        expected = torch.stack(queue.rows) if queue.rows else torch.zeros(0, rep.shape[1]).double()
        assert torch.equal(ours.contents(k), expected)
    assert result.valid.nonzero().flatten().tolist() == plain.valid
    assert result.candidates.tolist() == plain.candidates
    torch.testing.assert_close(result.loss, plain.loss, **TIGHT)
    (mine,) = torch.autograd.grad(result.loss, feats)
    (theirs,) = torch.autograd.grad(plain.loss, rep)
    torch.testing.assert_close(mine, theirs, **TIGHT)
    if prototypes is not None:
        torch.testing.assert_close(result.prototypes, plain.prototypes, **TIGHT)
    return plain, result


def config_of(rules: reference.Rules) -> Config:
    return toys.config(
        method={
            "num_queries": rules.num_queries,
            "num_negatives": rules.num_negatives,
            "temperature": rules.temperature,
            "low_rank": rules.low_rank,
            "high_rank": rules.high_rank,
            "current_class_threshold": rules.positive,
            "current_class_negative_threshold": rules.negative,
            "negative_high_entropy": rules.negative_high_entropy,
        },
        quirks={
            "onehot_first_image": rules.first_image,
            "slot_index": rules.slot_index,
            "own_label_negatives": rules.own_label,
        },
    )


def rules_of(num_classes: int, **changes) -> reference.Rules:
    low, high = {2: (1, 2), 5: (1, 4), 21: (3, 20)}[num_classes]
    positive = 0.3 if num_classes < 21 else 0.08
    return reference.Rules(**{"num_queries": 4, "num_negatives": 3, "temperature": 0.5, "low_rank": low,
                              "high_rank": high, "positive": positive} | changes)  # fmt: skip


def empty_queues(num_classes: int, capacity: int = 40, first: int = 60):
    sizes = [first] + [capacity] * (num_classes - 1)
    return [reference.Queue(size) for size in sizes], ClassQueues(sizes, 6).double()


KINDS = [
    "plain", "labels ignored", "pseudo ignored", "both ignored", "one class", "absent classes", "first ignored",
    "others ignored",
]  # fmt: skip
SHAPES = [(2, 2), (1, 1), (3, 2), (1, 3)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_classes", [2, 5, 21])
def test_contrast_as_described(num_classes, kind):
    """The authors' rules, over steps with growing queues, batches of all shapes, value and gradient."""
    alive = 0
    for images_l, images_u in SHAPES[: 3 if num_classes == 21 else None]:
        queues, ours = empty_queues(num_classes)
        for step in range(2):
            seed = 31 * step + images_l + 5 * images_u + 100 * num_classes
            data = scene(seed, num_classes, kind, images_l, images_u)
            plain, _ = compare(data, rules_of(num_classes), queues, ours, seed)
            alive += bool(plain.loss)
    if kind in ("plain", "others ignored") or (kind == "absent classes" and num_classes == 5):
        assert alive, "no case reached the loss itself"


@pytest.mark.parametrize("own_label", [True, False])
@pytest.mark.parametrize("slot_index", [True, False])
@pytest.mark.parametrize("first_image", [True, False])
@pytest.mark.parametrize("num_classes", [5, 21])
def test_contrast_under_every_switch(num_classes, first_image, slot_index, own_label):
    alive = 0
    shapes = SHAPES[: 2 if num_classes == 21 else None]
    for images_l, images_u in shapes if not first_image or own_label else [(1, 1)]:
        queues, ours = empty_queues(num_classes)
        for step, high in itertools.product(range(2), (True, False)):
            seed = 17 * step + images_l + 5 * images_u
            rules = rules_of(
                num_classes, first_image=first_image, slot_index=slot_index, own_label=own_label,
                negative_high_entropy=high,
            )  # fmt: skip
            data = scene(seed, num_classes, "absent classes" if step else "plain", images_l, images_u)
            plain, _ = compare(data, rules, queues, ours, seed, exact=bool(step))
            alive += bool(plain.loss)
    assert alive >= 2


@pytest.mark.parametrize("first_image", [True, False])
def test_thresholds_of_the_probability(first_image):
    """A class that is sure enough is no negative; an unsure pixel is no anchor but counts for the centre."""
    negatives, anchors = [], []
    for positive, negative in ((0.0, 1.0), (0.3, 0.15), (0.6, 0.05)):
        queues, ours = empty_queues(5)
        rules = rules_of(
            5, positive=positive, negative=negative, first_image=first_image, own_label=first_image
        )
        for seed in (4, 5):
            plain, result = compare(scene(seed, 5, "plain", 2, 2), rules, queues, ours, seed)
        negatives.append(sum(len(rows) for rows in plain.keys))
        anchors.append(int(result.candidates.sum()))
    assert negatives[0] > negatives[1] > negatives[2]
    assert anchors[0] > anchors[1] > anchors[2]


def test_queues_overflow_within_one_step():
    queues, ours = empty_queues(5, capacity=2, first=3)
    longest = 0
    for seed in range(4):
        plain, _ = compare(scene(seed, 5, "plain", 2, 2), rules_of(5), queues, ours, seed)
        longest = max(longest, *(len(rows) for rows in plain.keys[1:]))
    assert longest > 2


@pytest.mark.parametrize("slot_index", [True, False])
def test_averaged_centres(slot_index):
    """The variant `anchor_ema`: first use copies, later ones blend, classes without a slot are forgotten."""
    queues, ours = empty_queues(5)
    for k, queue in enumerate(queues):
        rows = uniform(k, 3, 6)
        queue.push(list(rows))
        ours.push(torch.full((3,), k), rows)
    prototypes = torch.zeros(5, 4, 1, 6, dtype=torch.float64)
    forgotten = moved = False
    kinds = ("one class", "plain", "plain", "absent classes", "one class", "absent classes", "plain")
    for step, kind in enumerate(kinds):
        rules = rules_of(5, slot_index=slot_index, positive=0.02)
        decay = min(1 - 1 / (step + 1), 0.999)  # not 0 any more when the centres are first used
        data = scene(step, 5, kind, 1, 1) if kind == "absent classes" else scene(step, 5, kind, 2, 2)
        _, result = compare(data, rules, queues, ours, step, prototypes, decay)
        if kind == "one class":
            assert torch.equal(result.prototypes, prototypes)
        if kind == "absent classes":  # classes 1 and 3
            forgotten |= bool(prototypes[0].any()) and not result.prototypes[0].any()
            moved |= bool(result.prototypes[3].any())
        prototypes = result.prototypes
    assert forgotten
    assert moved or slot_index
    assert prototypes.any()


def test_images_without_class_masks_may_be_left_out():
    """The shortcut of `contrast_inputs` against the whole batch: same queues, same loss, same gradient."""
    for seed in range(4):
        data, results = scene(seed, 5, "plain", 3, 3), []
        for whole in (False, True):
            feats = data["rep"].clone().requires_grad_()
            split = EntropySplit(data["y_u"], data["reliable"], data["unreliable"])
            inputs = contrast_inputs(
                feats,
                data["rep_teacher"],
                data["logits"],
                data["y_l"],
                data["y_u"],
                split,
                config_of(rules_of(5, own_label=not whole)),
            )
            assert len(inputs.masks) == (6 if whole else 2)
            _, ours = empty_queues(5)
            ours.push(*negatives(inputs, config_of(rules_of(5)), 5, exact=True))
            generator = torch.Generator().manual_seed(0)
            loss = contrast(inputs, ours, config_of(rules_of(5)), generator).loss
            results.append((loss, torch.autograd.grad(loss, feats)[0], ours.rows[:-1]))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, **TIGHT)


def test_padding_changes_nothing_and_never_cuts():
    """With the fixed bound of several processes the same rows come, then class K, for every bound that is claimed."""
    for seed, (first, own) in itertools.product(range(3), itertools.product((True, False), repeat=2)):
        data = scene(seed, 5, "plain", 2, 3)
        split = EntropySplit(data["y_u"], data["reliable"], torch.ones_like(data["unreliable"]))
        inputs = contrast_inputs(
            data["rep"],
            data["rep_teacher"],
            data["logits"],
            data["y_l"],
            data["y_u"],
            split,
            config_of(rules_of(5, own_label=own, first_image=first)),
        )
        rules = rules_of(5, own_label=own, high_rank=5, low_rank=0)
        bound = 5 if not own else 3 if first else 1
        classes, keys = negatives(inputs, config_of(rules), bound, exact=True)
        padded, padded_keys = negatives(inputs, config_of(rules), bound, exact=False)
        count = len(classes)
        assert count > 0
        assert torch.equal(padded[:count], classes)
        assert torch.equal(padded_keys[:count], keys)
        assert (padded[count:] == 5).all()


def test_gradients_reach_only_the_anchors():
    data = scene(0, 5, "plain", 2, 2)
    tensors = {key: data[key].clone().requires_grad_() for key in ("rep", "rep_teacher", "logits")}
    split = EntropySplit(data["y_u"], data["reliable"], data["unreliable"])
    inputs = contrast_inputs(
        tensors["rep"],
        tensors["rep_teacher"],
        tensors["logits"],
        data["y_l"],
        data["y_u"],
        split,
        config_of(rules_of(5)),
    )
    _, ours = empty_queues(5)
    ours.push(*negatives(inputs, config_of(rules_of(5)), 5, exact=True))
    contrast(inputs, ours, config_of(rules_of(5))).loss.backward()
    assert tensors["rep"].grad.any()
    assert tensors["rep_teacher"].grad is None
    assert tensors["logits"].grad is None
    assert not tensors["rep"].grad[1].any()  # the second labeled image has no class masks


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_the_gradient_taken_with_the_value_is_that_of_the_formula(temperature):
    source = torch.Generator().manual_seed(0)
    anchors, positives, rows = (
        torch.randn(shape, dtype=torch.float64, generator=source) for shape in ((3, 4, 5), (3, 4, 5), (20, 5))
    )
    positives, rows[0] = F.normalize(positives, dim=-1), 0.0
    negatives = torch.randint(0, 20, (3, 4 * 6), generator=source)
    weight = torch.rand(3, dtype=torch.float64, generator=source)

    def formula(anchors):
        picked = F.normalize(rows[negatives].view(3, 4, 6, 5), dim=-1, eps=1e-8)
        every = torch.cat((positives.unsqueeze(2), picked), dim=2)
        logits = torch.einsum("sqd,sqnd->sqn", F.normalize(anchors, dim=-1, eps=1e-8), every) / temperature
        return (logits.logsumexp(dim=2) - logits[..., 0]).mean(dim=1)

    def ours(anchors):
        return InfoNce.apply(anchors, positives, rows, negatives, temperature)

    torch.testing.assert_close(ours(anchors), formula(anchors), rtol=1e-12, atol=1e-12)
    leaf = anchors.requires_grad_()
    found, expected = (torch.autograd.grad((f(leaf) * weight).sum(), leaf)[0] for f in (ours, formula))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(ours, leaf)


def test_at_most_one_valid_class_gives_a_zero_in_the_graph():
    data = scene(0, 5, "one class", 2, 2)
    feats = data["rep"].clone().requires_grad_()
    split = EntropySplit(data["y_u"], data["reliable"], data["unreliable"])
    cfg = config_of(rules_of(5))
    inputs = contrast_inputs(feats, data["rep_teacher"], data["logits"], data["y_l"], data["y_u"], split, cfg)
    _, ours = empty_queues(5)
    for k in range(5):
        ours.push(torch.full((3,), k), torch.randn(3, 6, dtype=torch.float64))
    result = contrast(inputs, ours, cfg)
    result.loss.backward()
    assert result.valid.sum() == 1
    assert result.loss.item() == 0.0
    assert feats.grad is not None
    assert not feats.grad.any()


def test_ties_between_probabilities_have_a_defined_order():
    """Equal probabilities rank by class number, on every device alike."""
    probs = torch.full((1, 4, 1, 1), 0.25)
    inputs = ContrastInputs(
        torch.zeros(2, 3, 1, 1), torch.ones(2, 3, 1, 1), probs.expand(2, -1, -1, -1),
        torch.ones(2, 4, 1, 1, dtype=torch.bool), torch.ones(2, 1, 1, dtype=torch.bool),
        torch.ones(2, 1, 1, dtype=torch.bool), 1,
    )  # fmt: skip
    rules = reference.Rules(2, 2, 0.5, low_rank=2, high_rank=4)
    classes, _ = negatives(inputs, config_of(rules), 4, exact=True)
    assert classes.tolist() == [2, 3]


# --- random choices --------------------------------------------------------------------------------------------


def test_choices_cover_their_range_evenly():
    method = config_of(rules_of(5, num_queries=3000, num_negatives=2)).method
    limits = torch.tensor([1, 4, 50, 0, 3])
    anchors, negatives = _choose(
        method, torch.ones(5, dtype=torch.bool), limits, limits.flip(0), torch.Generator().manual_seed(0)
    )
    assert anchors.shape == (5, 3000)
    assert negatives.shape == (5, 6000)
    for chosen, bounds in ((anchors, limits), (negatives, limits.flip(0))):
        for row, bound in zip(chosen, bounds.tolist(), strict=True):
            counts = torch.bincount(row, minlength=max(bound, 1))
            assert len(counts) == max(bound, 1)
            expected = len(row) / max(bound, 1)
            assert ((counts - expected).abs() < 5 * expected**0.5 + 1).all()


def test_choices_come_from_the_given_generator_alone():
    data = scene(0, 5, "plain", 2, 2)
    split = EntropySplit(data["y_u"], data["reliable"], data["unreliable"])
    cfg = config_of(rules_of(5, num_queries=64))
    inputs = contrast_inputs(
        data["rep"], data["rep_teacher"], data["logits"], data["y_l"], data["y_u"], split, cfg
    )
    _, ours = empty_queues(5)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    ours.push(*negatives(inputs, cfg, 5, exact=True))
    losses = [
        float(contrast(inputs, copy.deepcopy(ours), cfg, torch.Generator().manual_seed(seed)).loss)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert losses[0] == losses[1] != losses[2]
