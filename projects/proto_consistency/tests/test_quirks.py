"""Every switch of an oddity or of an open point of the reconstruction: all values do what they say, and they differ."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from common.config import build
from common.data.spec import IGNORE
from projects.proto_consistency import step
from projects.proto_consistency.augment import Draws
from projects.proto_consistency.config import ProtoConfig, QuirkConfig, proto_start
from projects.proto_consistency.draws import gather_points
from projects.proto_consistency.tests import toys
from tests.runs import launch_script
from tests.steps import assert_border_label


def test_every_switch_is_tested_here() -> None:
    quirks = {
        "pad_label_zero", "own_teacher_statistics", "border_never_sampled", "one_mask", "raw_update",
    }  # fmt: skip
    assert {field.name for field in dataclasses.fields(QuirkConfig)} == quirks


# --- the border of a crop --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("zero", "border"), [(True, 0), (False, IGNORE)])
def test_pad_label_zero(zero: bool, border: int) -> None:
    cfg = toys.config(
        data={"scale_range": [1.0, 1.0], "flip": False, "crop_size": [12, 12]},
        quirks={"pad_label_zero": zero},
    )
    assert_border_label(cfg, border)


# --- first epoch of the teacher, its statistics ----------------------------------------------------------------


def difference(loop: toys.Loop) -> float:
    pairs = zip(loop.nets.require_teacher().parameters(), loop.nets.student.parameters(), strict=True)
    return max(float((t - s).detach().abs().max()) for t, s in pairs)


def student_of(loop: toys.Loop) -> dict[str, torch.Tensor]:
    return {key: p.detach().clone() for key, p in loop.nets.student.named_parameters()}


def assert_before(loop: toys.Loop, expected: dict[str, torch.Tensor]) -> None:
    """The teacher entered the last step with these values."""
    assert all(torch.equal(loop.before[key], value) for key, value in expected.items())


def assert_average(loop: toys.Loop, old: dict[str, torch.Tensor], m: float) -> None:
    """The teacher is `m * old + (1 - m) * student` now, its prototypes too."""
    now = student_of(loop)
    assert "proto_net.proto_list" in now
    for key, p in loop.nets.require_teacher().named_parameters():
        torch.testing.assert_close(p, m * old[key] + (1 - m) * now[key], rtol=1e-12, atol=1e-15)


def test_teacher_copied_all_through_its_first_epoch() -> None:
    """Averaging begins with the first step of epoch 2; the prototypes go with the weights."""
    loop = toys.Loop(toys.config(method={"teacher_copy": "epoch"}))
    for _ in range(3):
        loop.advance()
    assert difference(loop) > 0.1  # never touched before epoch S
    for _ in range(3):
        old = student_of(loop)
        loop.advance()
        assert_before(loop, old)
        assert difference(loop) < 1e-15  # and after the optimizer step
    old = student_of(loop)
    loop.advance()
    assert_average(loop, old, 1 - 1 / (3 + 1))  # the fourth update
    assert difference(loop) > 1e-6


def test_teacher_copied_once() -> None:
    """It starts as a copy and is averaged from the second update on."""
    loop = toys.Loop(toys.config(method={"teacher_copy": "once"}))
    for _ in range(3):
        loop.advance()
    old = student_of(loop)
    loop.advance()
    assert_before(loop, old)
    assert difference(loop) == 0.0  # the first update copies: decay 0
    old = student_of(loop)
    loop.advance()
    assert_average(loop, old, 0.5)
    assert difference(loop) > 1e-6


def buffers(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in network.named_buffers()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[key], second[key]) for key in first)


def test_statistics_of_the_teacher_are_its_own() -> None:
    """They come from its own train-mode forwards, in the supervised epochs as well, and are never copied."""
    loop = toys.Loop(toys.config())
    teacher = loop.nets.require_teacher()
    first = buffers(teacher)
    loop.advance()
    assert not same(first, buffers(teacher))
    for _ in range(2):
        loop.advance()
    own = buffers(teacher)
    loop.advance()
    assert_before(loop, own)


def test_statistics_taken_over_from_the_student() -> None:
    loop = toys.Loop(toys.config(quirks={"own_teacher_statistics": False}))
    teacher = loop.nets.require_teacher()
    first = buffers(teacher)
    for _ in range(3):
        loop.advance()
    assert same(first, buffers(teacher))  # it has seen nothing in the supervised epochs
    students = buffers(loop.nets.student)
    loop.advance()
    assert_before(loop, students)
    own = buffers(teacher)
    loop.advance()
    assert_before(loop, own)  # only once: from then on its own forwards count


# --- drawn places ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_corner", [True, False])
def test_border_never_sampled(at_corner: bool) -> None:
    """A crop of 35 rows and 33 columns has patches of 4: the last 3 rows and the last column are left over."""
    draws, quirks = Draws(0, 0, toys.CPU), QuirkConfig(border_never_sampled=at_corner)
    rows, cols = zip(*(draws.points((35, 33), 8, 2, quirks) for _ in range(60)), strict=True)
    reach = (int(torch.stack(rows).max()), int(torch.stack(cols).max()))
    assert reach == ((31, 31) if at_corner else (34, 32))
    assert (int(torch.stack(rows).min()), int(torch.stack(cols).min())) == (0, 0)
    for row, col in zip(rows, cols, strict=True):  # one per patch, wherever the patches are
        assert len(row) == len(col) == 64
        assert len(set(zip(row.tolist(), col.tolist(), strict=True))) == 64


@pytest.mark.parametrize("one", [True, False])
def test_one_mask(one: bool) -> None:
    """All images in the same places, or each in its own; features and labels go together."""
    cfg = toys.config(quirks={"one_mask": one})
    feats = torch.randn(3, toys.DIM, 9, 9, dtype=torch.float64)
    sampled = step.sample_pixels(feats, toys.SIZE, toys.run_of(cfg))
    assert sampled.rows.shape == ((64,) if one else (3, 64))
    places = torch.arange(17 * 17).view(1, 17, 17).expand(3, -1, -1)
    found = sampled.at(places).view(3, 64)
    assert torch.equal(found[0], found[1]) is one
    dense = F.interpolate(feats, size=toys.SIZE, mode="bilinear", align_corners=True).flatten(2)
    for i in range(3):
        torch.testing.assert_close(sampled.feats.view(3, 64, -1)[i], dense[i][:, found[i]].t())


# --- what moves the prototypes ---------------------------------------------------------------------------------


def moved(**sections: Any) -> tuple[toys.Loop, torch.Tensor]:
    """A toy run after its first semi-supervised step, and how far the student's prototypes went in it."""
    loop = toys.Loop(toys.config(**({"method": {"sup_only_epochs": 0}} | sections)))
    loop.advance()
    assert loop.old is not None
    return loop, loop.nets.student.require_prototypes().proto_list - loop.old


@pytest.mark.parametrize("raw", [True, False])
def test_raw_update(monkeypatch: pytest.MonkeyPatch, raw: bool) -> None:
    """Means of features as they are, or of features of unit length."""
    lengths: list[torch.Tensor] = []
    original = step.note_movement

    def note(*args: Any) -> None:
        movement = args[-1].require_movement()
        add = movement.add
        movement.add = lambda feats, *rest: (lengths.append(feats.norm(dim=1)), add(feats, *rest))
        original(*args)

    monkeypatch.setattr(step, "note_movement", note)
    _, way = moved(quirks={"raw_update": raw})
    assert way.any()
    assert torch.allclose(lengths[0], torch.ones_like(lengths[0])) is not raw


@pytest.mark.parametrize("source", ["student", "teacher"])
def test_features_that_move_the_prototypes(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """Features of either network at the same pixels, each with its own match to the student's prototypes."""
    cfg = toys.config(proto={"update_source": source}, method={"sup_only_epochs": 0})
    run = toys.run_of(cfg)
    movement = run.require_movement()
    student, teacher = (torch.randn(2, toys.DIM, 9, 9, dtype=torch.float64) for _ in range(2))
    sampled = step.sample_pixels(student, toys.SIZE, run)
    target = torch.arange(len(sampled.feats)) % toys.CLASSES
    given: list[Any] = []
    monkeypatch.setattr(movement, "add", lambda *args: given.extend(args))
    every = torch.ones_like(target, dtype=torch.bool)
    step.note_movement(sampled, target, every, teacher, run)
    own = {"student": student, "teacher": teacher}[source]
    picked = gather_points(own, sampled.rows, sampled.cols, toys.SIZE)
    torch.testing.assert_close(given[0], picked)
    assert torch.equal(given[1], movement.head.match(picked).nearest)
    assert torch.equal(given[1], sampled.match) is (source == "student")


def test_unlabeled_pixels_in_the_update() -> None:
    used = []
    for value in (True, False):
        loop, _ = moved(proto={"update_unlabeled": value})
        used.append(float(loop.run.require_movement().usage.sum()))
    labels = toys.batch(0)[1]
    draws = Draws(0, 0, toys.CPU)
    rows, cols = draws.points(toys.SIZE, 8, 4, QuirkConfig())
    assert used[1] == (labels[:, rows, cols] != IGNORE).sum()
    assert used[0] > used[1]


def test_selection_of_the_prototype_loss_leaves_the_update_alone() -> None:
    """With `none` more pixels are in the loss of unlabeled images, and the prototypes move as before."""
    results = {}
    for value in ("same", "none"):
        loop = toys.Loop(toys.config(method={"sup_only_epochs": 0}, proto={"select": value}))
        terms = loop.advance().terms
        results[value] = (
            float(terms["loss_proto_unsup"].detach()),
            loop.nets.student.require_prototypes().proto_list,
        )
    assert results["none"][0] > results["same"][0]
    assert torch.equal(results["none"][1], results["same"][1])


# --- first epoch of the prototypes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "given", "start"),
    [("file", None, 0), ("random", None, 2), ("warmup_end", None, 2), ("file", 3, 3), ("random", 0, 0)],
)
def test_start_epoch(source: str, given: int | None, start: int) -> None:
    cfg = toys.config(method={"sup_only_epochs": 2}, proto={"source": source, "start_epoch": given})
    assert proto_start(cfg.method) == start
    loop = toys.Loop(cfg, steps_per_epoch=1)
    for epoch in range(4):
        terms = loop.advance().terms
        assert ("loss_proto_sup" in terms) == (epoch >= start)
        assert ("loss_proto_unsup" in terms) == (epoch >= max(start, 2))
        assert loop.old is not None
        now = loop.nets.student.require_prototypes().proto_list
        assert torch.equal(now, loop.old) == (epoch < start)


def test_no_start_without_prototypes() -> None:
    with pytest.raises(ValueError, match=r"method\.proto is null"):
        proto_start(toys.config(method={"proto": None}).method)


# --- prototypes of the teacher, frozen prototypes --------------------------------------------------------------


@pytest.mark.parametrize("how", ["ema", "copy"])
def test_prototypes_of_the_teacher(how: str) -> None:
    loop = toys.Loop(toys.config(method={"teacher_copy": "once"}, proto={"teacher_proto": how}))
    for _ in range(6):
        loop.advance()
    one, two = (n.require_prototypes().proto_list for n in (loop.nets.student, loop.nets.require_teacher()))
    assert torch.equal(one, two) is (how == "copy")


@pytest.mark.parametrize("update", [True, False])
def test_frozen_prototypes(update: bool) -> None:
    """They stay, but it is still counted which pixels they get."""
    loop, way = moved(proto={"update": update})
    assert bool(way.any()) is update
    assert loop.run.require_movement().usage.sum() > 0


def test_momentum_is_the_share_that_stays() -> None:
    ways = [moved(proto={"momentum": m})[1] for m in (0.9, 0.8, 1.0)]
    torch.testing.assert_close(2 * ways[0], ways[1])
    assert not ways[2].any()


# --- prototypes of several processes ---------------------------------------------------------------------------

SCRIPT = """
    import torch
    from common.distributed import Dist, all_gather_padded
    from tools.processes import start, stop
    from common.errors import run_main
    from projects.proto_consistency.config import ProtoConfig
    from projects.proto_consistency.evaluate import prototypes_of_first
    from projects.proto_consistency.prototypes import Movement
    from projects.proto_consistency.tests import toys

    def main(argv):
        dist = start("cpu")
        generator = torch.Generator().manual_seed(0)
        feats = torch.randn(64, toys.DIM, generator=generator, dtype=torch.float64)
        match = torch.randint(3, (64, toys.CLASSES), generator=generator)
        target = torch.randint(toys.CLASSES, (64,), generator=generator)
        cond = torch.rand(64, generator=generator) < 0.5
        half = slice(32 * dist.rank, 32 * dist.rank + 32)
        found = {}
        for sync in ("local", "gather", "alone"):
            nets = toys.networks(toys.config())
            head = nets.student.require_prototypes()
            part = slice(0, 64) if sync == "alone" else half
            proto = ProtoConfig(per_class=3, momentum=0.9, sync="gather" if sync == "gather" else "local")
            movement = Movement(head, proto)
            movement.add(feats[part], match[part], target[part], cond[part])
            movement.apply(Dist() if sync == "alone" else dist, toys.GOOD)
            used = movement.take_usage(Dist() if sync == "alone" else dist)
            found[sync] = head.proto_list.detach().clone(), used
            if sync == "local":
                with prototypes_of_first(nets.student, dist):
                    both = all_gather_padded(head.proto_list, dist)
                    assert torch.equal(both[0], both[1])
                assert torch.equal(head.proto_list, found[sync][0])
        both = all_gather_padded(found["local"][0], dist)
        assert not torch.equal(both[0], both[1])
        torch.testing.assert_close(found["gather"][0], found["alone"][0], rtol=1e-12, atol=1e-14)
        both = all_gather_padded(found["gather"][0], dist)
        assert torch.equal(both[0], both[1])
        assert all(torch.equal(used, found["alone"][1]) for _, used in found.values())
        print("prototypes hold on rank", dist.rank, flush=True)
        stop()

    if __name__ == "__main__":
        run_main(main)
"""


def test_prototypes_of_several_processes(tmp_path) -> None:
    """`local`: each its own, evaluation takes the first one's. `gather`: as one process with all pixels."""
    assert launch_script(tmp_path, SCRIPT).count("prototypes hold on rank") == 2


def test_one_process_does_not_tell_local_from_gather() -> None:
    loops = [toys.Loop(toys.config(proto={"sync": sync})) for sync in ("local", "gather")]
    for loop in loops:
        for _ in range(4):
            loop.advance()
    one, two = (loop.nets.student.require_prototypes().proto_list for loop in loops)
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"per_class": 0}, "'per_class' is 0"),
        ({"momentum": 1.5}, "'momentum' is 1.5"),
        ({"temperature": 0.0}, "'temperature' is 0.0"),
        ({"start_epoch": -1}, "'start_epoch' is -1"),
        ({"weight": -1.0}, "'weight' is -1.0"),
    ],
)
def test_impossible_values(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(ProtoConfig, values)
