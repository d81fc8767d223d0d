"""Each method as it is built: which networks are called how often, what learns, what starts equal."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from common.data.spec import IGNORE
from common.distributed import Dist
from common.numerics.losses import best_class
from projects.cps import train
from projects.cps.losses import mix
from projects.cps.masks import MaskDraws, draw_boxes, rasterize
from projects.cps.methods import build_networks
from projects.cps.network import parameter_groups
from projects.cps.tests import toys
from projects.cps.tests.checkpoints import smoke

# batches that a network sees in one forward of the method, in order: images, gradients; all in train mode
WITHOUT, WITH = toys.Call(4, True, False), toys.Call(4, True, True)
CALLS = {
    "sup_only": {"branch1": [WITH]},
    "cps": {key: [WITH, WITH] for key in ("branch1", "branch2")},
    "cps_cutmix": {key: [WITHOUT, WITHOUT, WITH, WITH] for key in ("branch1", "branch2")},
    "mean_teacher": {"branch1": [WITH, WITH], "branch2": [WITHOUT, WITHOUT]},
    "cct": {"branch1": [WITH, WITH], "auxiliary": [toys.Call(12, True, True)]},  # twelve features
    "gct": {
        **{key: [WITHOUT, WITHOUT, WITH, WITH, WITHOUT, WITHOUT] for key in ("branch1", "branch2")},
        "detector": [toys.Call(8, True, False), toys.Call(8, True, True), toys.Call(8, True, True)],
    },
}
TRAINED = {
    "sup_only": ["branch1"],
    "cps": ["branch1", "branch2"],
    "cps_cutmix": ["branch1", "branch2"],
    "mean_teacher": ["branch1"],
    "cct": ["branch1", "auxiliary"],
    "gct": ["branch1", "branch2", "detector"],
}


@pytest.mark.parametrize("method", toys.METHODS)
def test_networks_are_called_as_often_as_the_method_needs(method: str) -> None:
    run = toys.Loop(toys.config(method))
    calls = {name: toys.record_calls(module) for name, module in run.modules.items()}
    run.advance()
    assert calls == CALLS[method]


@pytest.mark.parametrize(
    ("method", "joined"), [("cps", [8]), ("cps_cutmix", [4, 4, 8]), ("mean_teacher", [8])]
)
def test_joined_statistics_save_a_forward(method: str, joined: list[int]) -> None:
    run = toys.Loop(toys.config(method, quirks={"separate_statistics": False}))
    calls = toys.record_calls(run.modules["branch1"])
    run.advance()
    assert [call.images for call in calls] == joined


@pytest.mark.parametrize("method", toys.METHODS)
def test_statistics_move_with_every_call(method: str) -> None:
    """Labeled and unlabeled images, with and without gradients: each call is one update of the running statistics."""
    run = toys.Loop(toys.config(method))
    for _ in range(2):
        run.advance()
    for name in ("branch1", "branch2"):
        if name in CALLS[method]:
            tracked = run.modules[name].backbone.bn1.num_batches_tracked
            assert tracked == 2 * len(CALLS[method][name])
    if method == "gct":  # each of its calls takes the predictions of both networks one after the other
        assert run.modules["detector"].ibn1.bnorm.num_batches_tracked == 2 * 2 * 3


@pytest.mark.parametrize("method", toys.METHODS)
def test_the_order_of_batches_within_a_network(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It decides what the running statistics remember best."""
    run = toys.Loop(toys.config(method))
    group, seen = toys.batches(run.cfg, 0), []
    named = {id(one.image): i for i, one in enumerate(group)}
    network = run.modules["branch1"]
    network.register_forward_pre_hook(lambda module, args: seen.append(named.get(id(args[0]), "mixed")))
    run.advance([group])
    expected = {"sup_only": [0], "cps_cutmix": [1, 2, "mixed", 0], "gct": [0, 1] * 3}
    assert seen == expected.get(method, [0, 1])


@pytest.mark.parametrize("method", toys.METHODS)
def test_what_learns(method: str) -> None:
    run = toys.Loop(toys.config(method))
    assert set(run.modules) == set(CALLS[method])
    names = {id(p): name for name, module in run.modules.items() for p in module.parameters()}
    learning = [
        names[id(p)] for one in run.optimizers.values() for group in one.param_groups for p in group["params"]
    ]
    assert list(dict.fromkeys(learning)) == TRAINED[method]
    whole = sum(1 for name in TRAINED[method] for _ in run.modules[name].parameters())
    assert len(learning) == whole  # each once
    before = run.weights(lambda name: name in TRAINED[method])
    run.advance()
    after = run.weights(lambda name: name in TRAINED[method])
    assert all(not torch.equal(before[key], after[key]) for key in before)


def test_every_network_has_six_groups_with_decay_on_convolutions_only() -> None:
    run = toys.Loop(toys.config(optim={"weight_decay": 5e-4}))
    for one in run.optimizers.values():
        assert [group["weight_decay"] for group in one.param_groups] == [5e-4, 0.0] * 3
        assert {group["initial_lr"] for group in one.param_groups} == {0.1}
    cct = toys.Loop(toys.config("cct")).optimizers
    assert list(cct) == ["branch1"]  # one optimizer for encoder and decoders
    assert len(cct["branch1"].param_groups) == 8


def test_the_networks_share_a_backbone_file_and_differ_in_their_heads() -> None:
    """Both draw from one stream, the first network first."""
    torch.manual_seed(3)
    method = build_networks(smoke("method.name=cps"), 5, Dist())
    torch.manual_seed(3)
    single = build_networks(smoke("method.name=sup_only"), 5, Dist())
    first, second = method.modules["branch1"], method.modules["branch2"]
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.parameters(), single.modules["branch1"].parameters(), strict=True)
    )
    assert not torch.equal(first.classifier.weight, second.classifier.weight)
    assert [len(list(group.parameters)) for group in parameter_groups(first, 0.0)] == [
        len(list(group.parameters)) for group in parameter_groups(second, 0.0)
    ]


# --- pseudo-labels and teachers --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["cps", "cps_cutmix"])
def test_a_network_gets_no_gradient_from_what_it_teaches(method: str) -> None:
    """The second network's gradient does not change when the first one's loss against its labels is taken away."""
    gradients = []
    for trained in (("branch1", "branch2"), ("branch2",)):
        run = toys.Loop(toys.config(method))
        for name in ("branch1", "branch2"):
            run.modules[name].requires_grad_(name in trained)
        run.advance()
        gradients.append({k: v for k, v in run.gradients().items() if k.startswith("branch2")})
    assert gradients[0]
    assert toys.furthest(*gradients) < 1e-12


@pytest.mark.parametrize("method", ["cps", "cps_cutmix"])
def test_cross_supervision_teaches_where_no_pixel_is_labeled(method: str) -> None:
    run = toys.Loop(toys.config(method))
    labeled, *others = toys.batches(run.cfg, 0)
    empty = labeled._replace(label=torch.full_like(labeled.label, IGNORE))
    result = run.advance([(empty, *others)])
    assert result.terms["loss_sup"] == result.terms["loss_sup_2"] == 0
    assert all(float(g.abs().sum()) > 0 for g in run.gradients().values())


def test_the_labeled_images_are_in_the_cross_supervision_of_cps_and_not_of_cutmix() -> None:
    for method, moved in (("cps", True), ("cps_cutmix", False)):
        cfg = toys.config(method)
        values = []
        for labeled in (toys.batch(0), toys.batch(1)):
            run = toys.Loop(cfg, frozen=True)
            group = toys.batches(cfg, 0)
            values.append(run.advance([(labeled, *group[1:])]).terms["loss_cps"])
        assert bool(values[0] != values[1]) is moved


def test_the_teacher_is_averaged_and_never_stepped() -> None:
    run = toys.Loop(toys.config("mean_teacher"))
    run.advance()
    for _ in range(3):
        before = run.weights()
        run.advance()
        after = run.weights()
        for key, _ in run.modules["branch2"].named_parameters():
            # QUIRK teacher_behind: with the student of before this step
            average = 0.99 * before[f"branch2.{key}"] + 0.01 * before[f"branch1.{key}"]
            torch.testing.assert_close(after[f"branch2.{key}"], average, rtol=1e-12, atol=1e-14)
    assert not any(key.startswith("branch2") for key in run.gradients())
    assert all(not p.requires_grad for p in run.modules["branch2"].parameters())


def test_a_step_that_is_accumulated_averages_the_teacher_once() -> None:
    run = toys.Loop(toys.config("mean_teacher"))
    run.advance()
    before = run.weights()
    run.advance(toys.cut(toys.batches(run.cfg, 1), 2))
    after, key = run.weights(), "classifier.weight"
    average = 0.99 * before[f"branch2.{key}"] + 0.01 * before[f"branch1.{key}"]
    torch.testing.assert_close(after[f"branch2.{key}"], average, rtol=1e-12, atol=1e-14)


def test_the_detector_learns_in_a_phase_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither phase moves what the other trains, and the detector sees the networks after their step."""
    run = toys.Loop(toys.config("gct"))
    both, detector = [run.optimizers[name] for name in ("branch1", "branch2")], run.optimizers["detector"]
    assert [phase.optimizers for phase in train.phases(run.run)] == [both, [detector]]
    run.advance()
    group = toys.batches(run.cfg, 1)
    seen: dict[str, dict[str, torch.Tensor]] = {}
    original = train.detector_step

    def between(*args):
        seen["between"] = run.weights()
        return original(*args)

    seen["before"] = run.weights()
    monkeypatch.setattr(train, "detector_step", between)
    run.advance([group])
    seen["after"] = run.weights()
    parameters = {f"{n}.{k}" for n, m in run.modules.items() for k, _ in m.named_parameters()}

    def moved(one: str, two: str) -> set[str]:
        return {k.partition(".")[0] for k in parameters if not torch.equal(seen[one][k], seen[two][k])}

    assert moved("before", "between") == {"branch1", "branch2"}
    assert moved("between", "after") == {"detector"}


# --- CutMix ----------------------------------------------------------------------------------------------------


def test_masks_are_drawn_once_a_forward_and_continue_after_a_checkpoint() -> None:
    cfg = toys.config("cps_cutmix")
    draws = MaskDraws(cfg.method.cutmix, 5, 1)
    first = draw_boxes(cfg.method.cutmix, 3, 16, 16, draws.rng)
    state = draws.state_dict()
    expected = [draw_boxes(cfg.method.cutmix, 3, 16, 16, draws.rng) for _ in range(200)]  # beyond one block
    other = MaskDraws(cfg.method.cutmix, 0, 0)
    other.load_state_dict(state)
    assert all(
        np.array_equal(draw_boxes(cfg.method.cutmix, 3, 16, 16, other.rng), boxes) for boxes in expected
    )
    again = MaskDraws(cfg.method.cutmix, 6, 0)  # seed and rank are added
    assert np.array_equal(draw_boxes(cfg.method.cutmix, 3, 16, 16, again.rng), first)
    assert not np.array_equal(expected[0], first)  # QUIRK repeated_masks, repaired: no mask comes twice


def test_one_mask_serves_both_networks_images_and_labels() -> None:
    """Written out: mix, label the mixed logits, learn them from the mixed image."""
    cfg = toys.config("cps_cutmix", method={"cps_weight": 2.0}, run={"log_interval": 1})
    run = toys.Loop(cfg, frozen=True)
    labeled, first, second = toys.batches(cfg, 0)
    draws = MaskDraws(cfg.method.cutmix, cfg.run.seed, 0)
    mask = rasterize(draw_boxes(cfg.method.cutmix, 4, *toys.SIZE, draws.rng), *toys.SIZE).double()
    networks = [run.modules[name].eval() for name in ("branch1", "branch2")]
    x = mix(first.image, second.image, mask)
    with torch.no_grad():
        mixed, logits = ([network.predict(images) for network in networks] for images in (x, labeled.image))
        pseudo = [
            best_class(mix(net.predict(first.image), net.predict(second.image), mask)) for net in networks
        ]
    expected = {
        "loss_sup": cross_entropy(logits[0], labeled.label, ignore_index=IGNORE),
        "loss_sup_2": cross_entropy(logits[1], labeled.label, ignore_index=IGNORE),
        "loss_cps": 2.0 * (cross_entropy(mixed[0], pseudo[1]) + cross_entropy(mixed[1], pseudo[0])),
        "agreement": (mixed[0].argmax(1) == mixed[1].argmax(1)).double().mean(),
    }
    assert 0 < mask.mean() < 1
    result = run.advance([(labeled, first, second)])
    for key, value in expected.items():
        torch.testing.assert_close(result.terms[key], value, check_dtype=False)


@pytest.mark.parametrize("inside", [0.0, 1.0])
def test_a_mask_of_nothing_or_everything_takes_one_of_the_images(inside: float) -> None:
    run = toys.Loop(toys.config("cps_cutmix"))
    group = toys.batches(run.cfg, 0)
    seen: list[torch.Tensor] = []
    forward = run.nets.forward

    def seeing(*xs: torch.Tensor) -> list[list[torch.Tensor]]:
        seen.append(xs[0])
        return forward(*xs)

    run.nets.forward = seeing
    run.run.draws.masks = lambda images: torch.full((4, 1, *toys.SIZE), inside, dtype=torch.float64)
    run.advance([group])
    assert torch.equal(seen[0], group[2 if inside else 1].image)
