"""The optimizer step as the loop makes it: rates, accumulation, several processes, broken and empty batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.config import load_config
from common.data.loaders import Batch
from common.data.spec import IGNORE
from common.errors import UserError
from common.numerics.optim import poly
from projects.cps import losses, masks, methods, train
from projects.cps.arithmetic import warmup_poly
from projects.cps.tests import toys
from tests.runs import launch_script

# two of the authors' processes, so that groups are pairs of images; and perturbations of CCT that draw nothing
SPLIT: dict[str, dict[str, Any]] = {
    "optim": {"lr": 0.05, "paper_processes": 2},
    "method": {"cct": {"decoders": ["context_masking", "object_masking"]}},
}


def fixed_boxes(settings: object, n: int, height: int, width: int, rng: object) -> np.ndarray:
    """One box for every mask, whatever the batch, for draws of a batch of four are not two of two."""
    return np.array([[[2, 3, height - 4, width - 2]]] * n)


# --- ordinary steps --------------------------------------------------------------------------------------------


def assert_healthy(run: toys.Loop, result: Any) -> None:
    assert result.total.isfinite()
    assert all(value.isfinite() for value in result.terms.values()), result.terms
    trained = [p for one in run.optimizers.values() for g in one.param_groups for p in g["params"]]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert all(value.isfinite().all() for value in run.weights().values())


@pytest.mark.parametrize("images", [2, 3])
@pytest.mark.parametrize("method", toys.METHODS)
def test_ordinary_steps(method: str, images: int) -> None:
    run = toys.Loop(toys.config(method))
    for seed in range(3):
        result = run.advance([toys.batches(run.cfg, seed, images)])
        assert_healthy(run, result)
        assert result.terms["nonfinite"] == 0
        losses = [value for key, value in result.terms.items() if key.startswith("loss_")]
        same = method == "mean_teacher" and seed == 0  # the teacher is still the student
        assert [value > 0 for value in losses] == ([True, False] if same else [True] * len(losses))
        torch.testing.assert_close(result.total, sum(losses), check_dtype=False)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cps", "cps_cutmix", "cct"])
def test_compiled_losses_are_the_others(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As graphs without a break, by a backend that needs no C++ compiler; the networks are compiled elsewhere."""
    used, original = set(), torch.compile

    def compile_(function: Any, **settings: Any) -> Any:
        assert settings["fullgraph"]
        used.add(function.__name__)
        return original(function, **settings, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(methods, "wrapped", lambda module, *_, **__: module)
    losses._compiled.cache_clear()
    found = []
    sections = {"optim": SPLIT["optim"], "method": {"criterion": "ohem", "ohem_min_kept": 50}}
    for compile_it in (False, True):
        run = toys.Loop(toys.config(method, **sections, run={"compile": compile_it, "channels_last": False}))
        found.append([run.advance() for _ in range(2)])
    losses._compiled.cache_clear()  # holds what is built with this backend
    assert used == {"criterion", "distance" if method == "cct" else "mutual_losses"}
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("method", toys.METHODS)
def test_labels_all_ignored(method: str) -> None:
    run = toys.Loop(toys.config(method))
    for seed in range(2):
        labeled, *others = toys.batches(run.cfg, seed)
        empty = labeled._replace(label=torch.full_like(labeled.label, IGNORE))
        result = run.advance([(empty, *others)])
        assert result.terms["loss_sup"] == 0
        assert_healthy(run, result)


@pytest.mark.parametrize("criterion", ["ce", "ohem"])
@pytest.mark.parametrize("method", ["sup_only", "cps", "mean_teacher", "gct"])
def test_criterion(method: str, criterion: str) -> None:
    ohem = {"ohem_min_kept": 20, "ohem_thresh": 0.1}
    values = [
        toys.Loop(toys.config(method, method=some)).advance().terms["loss_sup"]
        for some in (ohem | {"criterion": criterion}, {"criterion": "ce"})
    ]
    assert bool(values[0] > values[1]) is (criterion == "ohem")  # the hard pixels alone


@pytest.mark.parametrize(("method", "key", "name"), [
    ("cps", "loss_cps", "cps_weight"), ("cps_cutmix", "loss_cps", "cps_weight"),
    ("mean_teacher", "loss_unsup", "mean_teacher"), ("cct", "loss_unsup", "cct"),
])  # fmt: skip
def test_weights_scale_their_terms(method: str, key: str, name: str) -> None:
    values = []
    for weight in (1.0, 2.0, 0.0):
        changed = weight if name == "cps_weight" else {"weight": weight}
        run = toys.Loop(toys.config(method, method={name: changed}))
        if method == "mean_teacher":
            run.advance()  # in the first step the teacher is the student
            run.modules["branch2"].load_state_dict(toys.Loop(run.cfg, seed=9).modules["branch2"].state_dict())
        values.append(run.advance().terms[key])
    assert values[0] > 0
    if method != "mean_teacher":  # its second step depends on the weight through the first
        torch.testing.assert_close(values[1], 2 * values[0])
    assert values[2] == 0


def test_a_step_touches_neither_inputs_nor_global_generators() -> None:
    for method in toys.METHODS:
        run = toys.Loop(toys.config(method))
        group = toys.batches(run.cfg, 0)
        before = [Batch(*(x.clone() for x in one)) for one in group]
        torch.manual_seed(0)
        states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        run.advance([group])
        assert all(
            torch.equal(x, y) for a, b in zip(before, group, strict=True) for x, y in zip(a, b, strict=True)
        )
        assert torch.equal(torch.get_rng_state(), states[0])
        assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002


# --- rates -----------------------------------------------------------------------------------------------------


def test_the_rate_is_that_of_the_step_for_both_networks() -> None:
    run = toys.Loop(toys.config())
    for _ in range(4):
        run.advance()
    expected = [poly(0.1, k, 30, 0.9) for k in range(4)]
    assert [rates["branch1"] for rates in run.rates] == expected
    assert all(rates["branch1"] == rates["branch2"] for rates in run.rates)
    for one in run.optimizers.values():
        assert len({group["lr"] for group in one.param_groups}) == 1  # heads and backbone alike


def test_warm_up_rises_from_zero_and_the_schedule_is_not_shifted() -> None:
    cfg = toys.config(optim={"lr": 0.1, "epochs": 10, "batch_size": 4, "warmup_epochs": 2})
    run = toys.Loop(cfg)
    for _ in range(8):
        run.advance()
    rates = [rates["branch2"] for rates in run.rates]
    assert rates == pytest.approx(
        [0.1 * k / 6 for k in range(6)] + [poly(0.1, k, 30, 0.9) for k in (6, 7)], rel=1e-12
    )
    assert rates == [warmup_poly(0.1, k, 30, 0.9, 6) for k in range(8)]


def test_no_warm_up_reaches_the_end(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("data: {dataset: shapes, split: x}\noptim: {lr: 1, epochs: 2, batch_size: 2}\n")
    for key, words in (
        ("optim.warmup_epochs=2", "'warmup_epochs' is 2"),
        ("optim.paper_processes=3", "a multiple of"),
    ):
        with pytest.raises(UserError, match=words):
            load_config(toys.Config, path, [key])


# --- accumulation and processes --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", toys.METHODS)
def test_two_forwards_are_one_where_statistics_stand_still(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With statistics of the batch they are not, since these are of half as many images then.

    Nor is the mean teacher that is averaged between its batches: a second forward sees it averaged throughout.
    """
    monkeypatch.setattr(masks, "draw_boxes", fixed_boxes)
    changes = SPLIT["method"] | {"mean_teacher": {"ema_between_batches": False}}
    cfg = toys.config(method, optim=SPLIT["optim"], method=changes)
    found = {}
    for frozen in (True, False):
        whole, halves = (toys.Loop(cfg, frozen=frozen) for _ in range(2))
        for seed in range(3):
            group = toys.batches(cfg, seed)
            one, two = whole.advance([group]), halves.advance(toys.cut(group, 2))
        found[frozen] = toys.furthest(whole.weights(), halves.weights())
        if frozen:
            for key in one.terms:
                torch.testing.assert_close(one.terms[key], two.terms[key], rtol=1e-9, atol=1e-12)
    assert found[True] < 1e-7
    assert found[False] > 1e-6


TWO_PROCESSES = """
    import sys
    from tools.processes import start, stop
    from common.errors import run_main
    from projects.cps import masks
    from projects.cps.tests import toys
    from projects.cps.tests.test_step import SPLIT, fixed_boxes

    def main(argv):
        masks.draw_boxes = fixed_boxes
        dist = start("cpu")
        for method in toys.METHODS:
            cfg = toys.config(method, **SPLIT)
            ours, alone = toys.Loop(cfg, frozen=True, dist=dist), toys.Loop(cfg, frozen=True)
            for seed in range(3):
                group = toys.batches(cfg, seed)
                ours.advance([toys.cut(group, 2)[dist.rank]])
                alone.advance([group])
            gap = toys.furthest(ours.weights(), alone.weights())
            assert gap < 1e-7, (method, gap)
            moved = toys.furthest(ours.weights(), toys.Loop(cfg).weights())
            assert moved > 1e-3, (method, moved)
            sys.stdout.write(f"{method} agrees on rank {dist.rank}\\n")  # at once: both ranks write
            sys.stdout.flush()
        stop()

    if __name__ == "__main__":
        run_main(main)
"""


@pytest.mark.slow
def test_two_processes_are_one_with_the_same_global_batch(tmp_path: Path) -> None:
    """Frozen statistics; the supervised loss is taken over pairs of images either way, so uneven labels agree too."""
    said = launch_script(tmp_path, TWO_PROCESSES)
    for method in toys.METHODS:
        assert said.count(f"{method} agrees on rank") == 2


# --- losses that are not finite --------------------------------------------------------------------------------


def spoiled(group: Any, which: int) -> Any:
    one = group[which]
    return (*group[:which], one._replace(image=one.image * torch.nan), *group[which + 1 :])


@pytest.mark.parametrize("method", toys.METHODS)
def test_a_skipped_step_leaves_no_trace(method: str) -> None:
    """`run.on_nonfinite=skip`: weights, statistics and momentum go on from where they were."""
    cfg = toys.config(method, run={"on_nonfinite": "skip", "device": "cpu"})
    run = toys.Loop(cfg)
    run.advance()
    before = run.weights()
    for which in range(len(toys.batches(cfg, 1))):
        result = run.advance([spoiled(toys.batches(cfg, 1), which)])
        assert result.terms["nonfinite"] == 1
        after = run.weights()
        teacher = [key for key in before if method == "mean_teacher" and key.startswith("branch2")]
        assert all(after[key].isfinite().all() for key in teacher)  # averaged before the loss is known
        assert all(torch.equal(before[key], after[key]) for key in before if key not in teacher)
    assert run.guard.cancelled == len(toys.batches(cfg, 1))
    assert run.advance().terms["nonfinite"] == 0
    assert not any(
        torch.equal(value, before[key]) for key, value in run.weights().items() if key.endswith("weight")
    )


def test_a_broken_first_phase_is_seen_although_the_second_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """GCT: the loop is told about both phases."""
    cfg = toys.config("gct", run={"on_nonfinite": "skip", "device": "cpu"})
    run = toys.Loop(cfg)
    original = train.train_step

    def broken(*args: Any) -> Any:
        result = original(*args)
        return result._replace(total=result.total * torch.nan)

    monkeypatch.setattr(train, "train_step", broken)
    assert run.advance().terms["nonfinite"] == 1
    assert run.guard.cancelled == 1


@pytest.mark.parametrize("method", toys.METHODS)
def test_the_loop_stops_before_the_step_and_names_the_images(method: str) -> None:
    run = toys.Loop(toys.config(method))
    run.advance()
    before = run.weights(lambda name: name in run.optimizers)
    parameters = [
        f"{n}.{k}" for n, m in run.modules.items() for k, _ in m.named_parameters() if n in run.optimizers
    ]
    with pytest.raises(
        UserError, match=r"step 2: loss_\w+ is nan.*; images a, b; stopped before the optimizer step"
    ):
        run.advance([spoiled(toys.batches(run.cfg, 1), 0)])
    after = run.weights()
    assert all(torch.equal(before[key], after[key]) for key in parameters)
