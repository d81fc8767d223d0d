"""The step of s4GAN as the loop makes it: forwards, quirks, rates, several processes, broken and empty batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.data.loaders import Batch
from common.data.spec import IGNORE
from common.errors import UserError
from common.numerics.optim import poly
from projects.s4gan_mlmt.losses import above_threshold, real_maps
from projects.s4gan_mlmt.tests import toys
from tests.runs import launch_script

# --- ordinary steps --------------------------------------------------------------------------------------------


def threshold_between(cfg: Any, group: Any, **options: Any) -> float:
    """A threshold that the best half of the unlabeled images exceeds."""
    run = toys.Loop(cfg, **options)
    scores = toys.score_fakes(run.nets, group).sort().values
    middle = len(scores) // 2
    assert scores[middle] - scores[middle - 1] > 1e-4
    return float(scores[middle - 1 : middle + 1].mean())


@pytest.mark.parametrize("method", toys.METHODS)
def test_ordinary_steps(method: str) -> None:
    run = toys.Loop(toys.config(method, method={"dropout": 0.5, "st_threshold": 0.0}))
    before = run.weights()
    for step in range(3):
        result = run.advance()
        assert result.terms["nonfinite"] == 0
        losses = {key: value for key, value in result.terms.items() if key.startswith("loss_")}
        assert set(losses) == {"loss_sup", *(("loss_fm", "loss_st", "loss_d") if method == "s4gan" else ())}
        assert all(value > 0 for key, value in losses.items() if step > 0 or key != "loss_st")
        torch.testing.assert_close(result.total, sum(losses.values()), check_dtype=False)
    after = run.weights()
    assert all(value.isfinite().all() for value in after.values())
    still = [key for key in before if torch.equal(before[key], after[key])]
    idle = ("conv2d_list.2", "conv2d_list.3")  # quirks.aspp_branches
    affine = [k for k in before if ".bn" in k or "downsample.1" in k]  # quirks.frozen_affine
    assert set(still) == {k for k in before if any(name in k for name in idle)} | {
        k for k in affine if k.endswith((".weight", ".bias"))
    }


def test_the_first_iteration_has_no_self_training() -> None:
    run = toys.Loop(toys.config(method={"st_threshold": 0.0}))
    first, second = run.advance(), run.advance()
    assert first.terms["loss_st"] == 0
    assert first.terms["kept"] == 1
    assert second.terms["loss_st"] > 0
    run = toys.Loop(toys.config(method={"st_threshold": 0.0, "st_start": 0}))
    assert run.advance().terms["loss_st"] > 0


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_the_gate_decides_about_self_training(threshold: float) -> None:
    run = toys.Loop(toys.config(method={"st_threshold": threshold, "st_start": 0}))
    terms = run.advance().terms
    assert terms["kept"] == 1 - threshold
    assert bool(terms["loss_st"] > 0) is (threshold == 0)


def test_half_of_the_images_teach_themselves() -> None:
    cfg = toys.config()
    group = toys.batches(cfg, 0)
    cfg = toys.config(method={"st_threshold": threshold_between(cfg, group), "st_start": 0})
    terms = toys.Loop(cfg).advance([group]).terms
    assert terms["kept"] == 0.5
    assert terms["loss_st"] > 0


@pytest.mark.parametrize(("key", "name"), [("loss_fm", "fm_weight"), ("loss_st", "st_weight")])
def test_weights_scale_their_terms(key: str, name: str) -> None:
    method = {"st_threshold": 0.0, "st_start": 0}
    values = [
        toys.Loop(toys.config(method=method | {name: weight})).advance().terms[key]
        for weight in (1.0, 2.0, 0.0)
    ]
    assert values[0] > 0
    torch.testing.assert_close(values[1], 2 * values[0])
    assert values[2] == 0


def test_forwards_and_their_order() -> None:
    """Two of the segmentation network, shared by both steps; four of the discriminator, all in train mode."""
    run = toys.Loop(toys.config(method={"dropout": 0.5}))
    group = toys.batches(run.cfg, 0)
    calls: dict[str, list[Tensor]] = {"segmentation": [], "discriminator": []}
    for name, network in run.nets.bare.items():
        network.register_forward_pre_hook(lambda _, args, name=name: calls[name].append(args[0]))
        network.register_forward_pre_hook(
            lambda module, _: pytest.fail("mode") if not module.training else None
        )
    run.advance([group])
    assert [x is y.image for x, y in zip(calls["segmentation"], group, strict=False)] == [True, True]
    assert len(calls["segmentation"]) == 2
    fake, real, fake_again, real_again = calls["discriminator"]
    assert fake.requires_grad
    assert not fake_again.requires_grad
    assert torch.equal(fake, fake_again)
    assert torch.equal(real, real_again)
    assert torch.equal(real[:, : toys.CLASSES].sum(dim=1), (group[2].label != IGNORE).double())


def test_each_network_learns_from_its_own_loss_alone() -> None:
    """No gradient of the first phase reaches the discriminator, none of the second the segmentation network."""
    gradients = {}
    for weight in (0.0, 7.0):
        run = toys.Loop(toys.config(method={"fm_weight": weight, "st_threshold": 1.0}))
        gradients[weight] = run.gradients(toys.batches(run.cfg, 0))[1]
    for key, value in gradients[0.0].items():
        assert torch.equal(value, gradients[7.0][key]) is key.startswith("discriminator"), key
    assert all(p.requires_grad for p in run.nets.bare["discriminator"].parameters())


def test_labels_all_ignored() -> None:
    for method in toys.METHODS:
        run = toys.Loop(toys.config(method, method={"st_threshold": 0.0}))
        labeled, *others = toys.batches(run.cfg, 0)
        empty = labeled._replace(label=torch.full_like(labeled.label, IGNORE))
        for _ in range(2):
            result = run.advance([(empty, *others)])
            assert result.terms["loss_sup"] == 0
            assert all(value.isfinite() for value in result.terms.values())
        assert all(value.isfinite().all() for value in run.weights().values())


def test_images_of_one_grey_value() -> None:
    """A batch without any range: its scaled image is 0 instead of undefined."""
    run = toys.Loop(toys.config())
    flat = [one._replace(image=torch.full_like(one.image, 3.0)) for one in toys.batches(run.cfg, 0)]
    result = run.advance([tuple(flat)])
    assert all(value.isfinite() for value in result.terms.values())


def test_a_step_does_not_touch_its_inputs() -> None:
    run = toys.Loop(toys.config())
    group = toys.batches(run.cfg, 0)
    before = [Batch(*(x.clone() for x in one)) for one in group]
    run.advance([group])
    pairs = zip(before, group, strict=True)
    assert all(torch.equal(x, y) for a, b in pairs for x, y in zip(a, b, strict=True))


def test_rates_follow_one_schedule() -> None:
    run = toys.Loop(toys.config(optim={"lr": 0.001, "steps": 20, "epochs": 2, "batch_size": 4, "lr_d": 1e-3}))
    for _ in range(3):
        run.advance()
    expected = [[poly(base, t, 20, 0.9) for base in (0.001, 0.01, 1e-3)] for t in range(3)]
    assert run.rates == expected


def test_the_discriminator_s_two_rates_and_betas_are_the_configured_ones() -> None:
    run = toys.Loop(toys.config(optim={"steps": 2, "epochs": 1, "lr_d": 0.02, "betas_d": [0.5, 0.9]}))
    (group,) = run.run.optimizers["discriminator"].param_groups
    assert (group["lr"], group["betas"]) == (0.02, (0.5, 0.9))


# --- quirks ----------------------------------------------------------------------------------------------------


def quirk(**values: Any) -> toys.Loop:
    return toys.Loop(toys.config(quirks=values, method={"dropout": 0.0, "st_start": 0, "st_threshold": 0.0}))


def test_quirk_real_range() -> None:
    """The real images are divided by the range of the labeled batch, or by their own."""
    seen: dict[str, Tensor] = {}
    for value in ("labeled", "own"):
        run = quirk(real_range=value)
        labeled, unlabeled, real = toys.batches(run.cfg, 0)
        maps: list[Tensor] = []
        run.nets.bare["discriminator"].register_forward_pre_hook(
            lambda _, args, maps=maps: maps.append(args[0])
        )
        run.advance([(labeled, unlabeled, real._replace(image=2 * real.image))])
        seen[value] = maps[1][:, toys.CLASSES :]
    assert seen["own"].aminmax() == (0, 1)
    assert seen["labeled"].min() == 0
    assert seen["labeled"].max() > 1.5
    own = real_maps(real.label, 2 * real.image, toys.CLASSES)[:, toys.CLASSES :]
    torch.testing.assert_close(seen["own"], own, rtol=0, atol=0)


def test_quirk_separate_statistics() -> None:
    """Two BatchNorm batches one after the other, or one of all images."""
    counts = {}
    for value in (True, False):
        run = quirk(separate_statistics=value)
        run.advance()
        counts[value] = int(run.weights()["segmentation.bn1.num_batches_tracked"])
    assert counts == {True: 2, False: 1}


def test_separate_statistics_do_not_matter_where_they_stand_still() -> None:
    found = []
    for value in (True, False):
        cfg = toys.config(quirks={"separate_statistics": value}, method={"dropout": 0.0, "st_threshold": 0.0})
        run = toys.Loop(cfg, frozen=True)
        run.advance()
        run.advance()
        found.append(run.weights())
    assert toys.furthest(*found) < 1e-9


def test_quirk_gate_dropout() -> None:
    """With the quirk chance decides who passes; without it the same images pass whatever dropout draws."""
    kept: dict[bool, set[tuple[bool, ...]]] = {True: set(), False: set()}
    base = toys.config()
    group = toys.batches(base, 0, images=6)
    threshold = threshold_between(base, group)
    for value, found in kept.items():
        for seed in range(6):
            cfg = toys.config(
                quirks={"gate_dropout": value}, method={"dropout": 0.5, "st_threshold": threshold}
            )
            run = toys.Loop(cfg)
            torch.manual_seed(seed)
            scores: list[Tensor] = []
            discriminator = run.nets.bare["discriminator"]
            discriminator.register_forward_hook(lambda module, args, out, s=scores: s.append(out[0].detach()))
            result = run.advance([group])
            assert len(scores) == (4 if value else 5)
            gate = above_threshold(scores[0 if value else 1], threshold)
            assert result.terms["kept"] == gate.float().mean()
            assert all(module.training for module in discriminator.modules())
            found.add(tuple(gate.tolist()))
    assert len(kept[True]) > 1
    assert kept[False] == {tuple((toys.score_fakes(toys.Loop(base).nets, group) > threshold).tolist())}


@pytest.mark.parametrize("value", ["repeated_1_5", "once"])
def test_quirk_visits_reaches_the_optimizer(value: str) -> None:
    default, other = quirk(), quirk(visits=value)
    assert default.cfg.quirks.visits == "repeated_0_4"
    for run in (default, other):
        run.advance()
    moved = {
        key
        for key, weight in default.weights().items()
        if not torch.equal(weight, other.weights()[key]) and "running" not in key
    }
    backbone = {
        k
        for k in default.weights()
        if "conv" in k and k.startswith("segmentation.layer") and "layer5" not in k
    }
    assert backbone <= moved
    assert not any(key.startswith("discriminator") for key in moved)


@pytest.mark.parametrize(("value", "learning"), [(2, {0, 1}), (4, {0, 1, 2, 3})])
def test_quirk_aspp_branches_reaches_the_network(value: int, learning: set[int]) -> None:
    run = quirk(aspp_branches=value)
    found = run.gradients(toys.batches(run.cfg, 0))[1]
    assert {int(key.split(".")[3]) for key in found if "conv2d_list" in key} == learning


@pytest.mark.parametrize("value", [True, False])
def test_quirk_frozen_affine_reaches_the_network(value: bool) -> None:
    run = quirk(frozen_affine=value)
    found = run.gradients(toys.batches(run.cfg, 0))[1]
    assert any(".bn1." in key for key in found) is not value


# --- accumulation and processes --------------------------------------------------------------------------------


def test_two_forwards_average_their_losses() -> None:
    """Ranges and means of features are those of a forward, so two are not one; the supervised baseline's are."""
    cfg = toys.config("sup_only")
    group = toys.batches(cfg, 0)
    group = (
        group[0]._replace(label=group[0].label.clamp(max=toys.CLASSES - 1)),
    )  # equally many labels per half
    whole, halves = (toys.Loop(cfg, frozen=True) for _ in range(2))
    one, two = whole.advance([group]), halves.advance(toys.part(group, 2, 2))
    torch.testing.assert_close(one.total, two.total)
    assert toys.furthest(whole.weights(), halves.weights()) < 1e-9
    run = toys.Loop(toys.config())
    assert run.advance(toys.part(toys.batches(run.cfg, 0), 2, 2)).total.isfinite()


TWO_PROCESSES = """
    import sys
    import torch
    from common.distributed import mean_over_ranks
    from tools.processes import start, stop
    from common.errors import run_main
    from projects.s4gan_mlmt.tests import toys
    from projects.s4gan_mlmt.tests.test_step import threshold_between

    def agree(dist, method, sizes, images, steps, **quirks):
        cfg = toys.config(method, quirks=quirks)
        group = toys.batches(cfg, 0, images)
        threshold = threshold_between(cfg, group, frozen=True) if method == "s4gan" else 0.6
        more = {"dropout": 0.0, "st_threshold": threshold, "st_start": 0}
        cfg = toys.config(method, method=more, quirks=quirks)
        ours, alone = toys.Loop(cfg, frozen=True, dist=dist), toys.Loop(cfg, frozen=True)
        mine, (theirs, expected) = ours.gradients(toys.part(group, *sizes)[dist.rank]), alone.gradients(group)
        losses = [key for key in theirs.terms if key.startswith("loss_")]
        for key in losses:
            found = mean_over_ranks(mine[0].terms[key].detach(), dist)
            torch.testing.assert_close(found, theirs.terms[key].detach(), rtol=1e-12, atol=0)
            assert theirs.terms[key] > 0, key
        gap = toys.furthest(mine[1], expected)
        assert gap < 1e-9, (method, gap)
        for seed in range(steps):
            group = toys.batches(cfg, seed, images)
            ours.advance([toys.part(group, *sizes)[dist.rank]])
            alone.advance([group])
        gap = toys.furthest(ours.weights(), alone.weights())
        assert gap < 1e-7, (method, gap)
        moved = toys.furthest(ours.weights(), toys.Loop(cfg).weights())
        assert moved > 1e-3, (method, moved)
        sys.stdout.write(f"{method} agrees on rank {dist.rank}\\n")  # at once: both ranks write
        sys.stdout.flush()

    def main(argv):
        dist = start("cpu")
        agree(dist, "sup_only", (2, 2), 4, 2)
        agree(dist, "s4gan", (2, 2), 4, 2)
        agree(dist, "s4gan", (4, 1), 5, 2, real_range="own", aspp_branches=4, visits="once")
        stop()

    if __name__ == "__main__":
        run_main(main)
"""


@pytest.mark.slow
def test_two_processes_are_one_with_the_same_global_batch(tmp_path: Any) -> None:
    """Losses, gradients and steps; labels, accepted images and batch sizes are uneven over the processes."""
    said = launch_script(tmp_path, TWO_PROCESSES)
    assert said.count("sup_only agrees on rank") == 2
    assert said.count("s4gan agrees on rank") == 4


# --- losses that are not finite --------------------------------------------------------------------------------


def spoiled(group: Any, which: int) -> Any:
    one = group[which]
    return (*group[:which], one._replace(image=one.image * torch.nan), *group[which + 1 :])


@pytest.mark.parametrize("method", toys.METHODS)
def test_a_skipped_step_leaves_no_trace(method: str) -> None:
    """`run.on_nonfinite=skip`: both networks, statistics and both optimizers go on from where they were."""
    cfg = toys.config(method, run={"on_nonfinite": "skip", "device": "cpu"})
    run = toys.Loop(cfg)
    run.advance()
    before = run.weights()
    states = {
        k: [v.clone() for s in one.state.values() for v in s.values()]
        for k, one in run.run.optimizers.items()
    }
    roles = len(toys.batches(cfg, 1))
    for which in range(roles):
        result = run.advance([spoiled(toys.batches(cfg, 1), which)])
        assert result.terms["nonfinite"] == 1
        after = run.weights()
        counters = "num_batches_tracked"  # of no use here: the momentum is fixed
        assert all(torch.equal(before[key], after[key]) for key in before if not key.endswith(counters))
        for key, one in run.run.optimizers.items():
            now = [v for s in one.state.values() for v in s.values()]
            assert all(torch.equal(a, b) for a, b in zip(states[key], now, strict=True))
    assert run.guard.cancelled == roles
    assert run.advance().terms["nonfinite"] == 0
    assert not torch.equal(run.weights()["segmentation.conv1.weight"], before["segmentation.conv1.weight"])


@pytest.mark.parametrize("which", [0, 1, 2])
def test_the_loop_stops_before_the_step_and_names_the_images(which: int) -> None:
    run = toys.Loop(toys.config())
    run.advance()
    parameters = {
        f"{name}.{key}" for name, network in run.nets.bare.items() for key, _ in network.named_parameters()
    }
    before = run.weights()
    match = r"step 2: .*loss_\w+ is nan.*; images a, b; stopped before the optimizer step"
    with pytest.raises(UserError, match=match):
        run.advance([spoiled(toys.batches(run.cfg, 1), which)])
    after = run.weights()
    assert all(torch.equal(before[key], after[key]) for key in parameters)


def test_a_broken_discriminator_is_noticed() -> None:
    run = toys.Loop(toys.config())
    discriminator = run.nets.bare["discriminator"]
    assert isinstance(discriminator.fc, nn.Linear)
    with torch.no_grad():
        discriminator.fc.bias.fill_(torch.nan)
    with pytest.raises(UserError, match="loss_d is nan"):
        run.advance()
