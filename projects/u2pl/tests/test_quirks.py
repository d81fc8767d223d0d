"""Every switch of an oddity of the original: both values do what they say, and they differ."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from common.config import build
from common.data.spec import IGNORE
from common.mean_teacher.contrast import class_masks
from common.mean_teacher.queues import ClassQueues
from projects.u2pl.config import QuirkConfig
from projects.u2pl.contrast import contrast, contrast_inputs
from projects.u2pl.losses import EntropySplit
from projects.u2pl.tests import toys
from projects.u2pl.tests.golden_adapters import negatives
from projects.u2pl.tests.test_contrast import config_of, rules_of, scene
from projects.u2pl.tests.test_memory import run_on_two_processes
from tests.steps import assert_border_label


def test_every_switch_is_tested_here() -> None:
    tested = {
        "onehot_first_image", "slot_index", "own_label_negatives", "pad_label_zero", "own_teacher_statistics",
        "shared_first_epoch", "contra_reduce",
    }  # fmt: skip
    assert {f.name for f in dataclasses.fields(QuirkConfig)} == tested


def test_the_originals_behaviour_is_the_default() -> None:
    assert build(QuirkConfig, {}) == QuirkConfig(
        onehot_first_image=True,
        slot_index=True,
        own_label_negatives=True,
        pad_label_zero=True,
        own_teacher_statistics=True,
        shared_first_epoch=True,
        contra_reduce="sum_forward_only",
    )


@pytest.mark.parametrize(
    "quirks",
    [
        {"onehot_first_image": False},
        {"slot_index": False},
        {"own_label_negatives": False},
        {"own_teacher_statistics": False},
        {"shared_first_epoch": False},
    ],
    ids=str,
)
def test_the_switch_reaches_the_training_step(quirks) -> None:
    """The same start, batches and draws: only the switch differs, and the weights notice."""
    # few reliable unlabeled pixels, so that class 0 is really absent and slots differ from classes
    method = {"low_entropy_threshold": 0.0, "negative_high_entropy": False}
    cfgs = [toys.config(method=method, quirks=values) for values in ({}, {}, quirks)]
    runs = [toys.Loop(cfg, absent=0) for cfg in cfgs]
    for _ in range(9):
        losses = [run.advance() for run in runs]
    assert losses[0].terms["loss_contra"] > 0
    weights = [torch.cat([p.flatten() for p in run.nets.student.parameters()]).detach() for run in runs]
    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2], rtol=1e-6)


# --- quirks.onehot_first_image -----------------------------------------------------------------------------------


def test_onehot_first_image() -> None:
    labels = torch.tensor([[[0, 1, IGNORE, 2]], [[1, IGNORE, 2, 2]]])  # two images of four pixels
    collapsed = class_masks(labels, 3, True)
    assert collapsed[0, :, 0].T.tolist() == [
        [True, True, False],  # 0 of the first image, 1 of the second
        [True, True, False],  # 1, and the ignored pixel of the second counts as class 0
        [False, False, False],  # ignored in the first image
        [False, False, True],
    ]
    assert not collapsed[1].any()
    proper = class_masks(labels, 3, False)
    assert proper[0, :, 0].T.int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert proper[1, :, 0].T.int().tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 1], [0, 0, 1]]


@pytest.mark.parametrize("first", [True, False])
def test_onehot_decides_which_images_give_anchors(first) -> None:
    data = scene(1, 5, "plain", 2, 2)
    feats = data["rep"].clone().requires_grad_()
    split = EntropySplit(data["y_u"], data["reliable"], data["unreliable"])
    cfg = config_of(rules_of(5, num_queries=64, positive=0.05, first_image=first))
    inputs = contrast_inputs(feats, data["rep_teacher"], data["logits"], data["y_l"], data["y_u"], split, cfg)
    queues = ClassQueues([9] * 5, 6).double()
    queues.push(torch.arange(5), torch.randn(5, 6, dtype=torch.float64))
    contrast(inputs, queues, cfg).loss.backward()
    touched = feats.grad.abs().amax(dim=(1, 2, 3)) > 0
    assert touched.tolist() == [True, not first, True, not first]


# --- quirks.slot_index -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slot_index", [True, False])
def test_slot_index(slot_index) -> None:
    """Classes 1 and 3 of four are present: by slot only class 1 is an anchor, against the queue of class 3."""
    y = torch.tensor([[[1, 3]]])
    feats = (
        torch.eye(4, dtype=torch.float64)[[1, 3]].T.reshape(1, 4, 1, 2).repeat(2, 1, 1, 1).requires_grad_()
    )
    split = EntropySplit(y, torch.ones_like(y, dtype=torch.bool), torch.zeros_like(y, dtype=torch.bool))
    cfg = config_of(rules_of(5, num_queries=2, num_negatives=1, positive=0.1, slot_index=slot_index))
    inputs = contrast_inputs(feats, feats.detach(), torch.zeros(2, 4, 1, 2).double(), y, y, split, cfg)
    queues = ClassQueues([2] * 4, 4).double()
    queues.push(torch.tensor([1, 3]), torch.tensor([[-2.0, 0, 0, 0], [0, 0, -3.0, 0]]).double())
    result = contrast(inputs, queues, cfg)
    (gradient,) = torch.autograd.grad(result.loss, feats)
    assert result.valid.tolist() == [False, True, False, True]
    one, two = gradient[:, :, 0, 0].abs().sum(), gradient[:, :, 0, 1].abs().sum()
    channels = gradient.abs().sum(dim=(0, 2, 3)) > 0  # an anchor's gradient points along its negatives
    if slot_index:
        assert one > 0 == two
        assert channels.tolist() == [False, False, True, False]  # class 1 against the queue of class 3
    else:
        assert one > 0 < two
        assert channels.tolist() == [True, False, True, False]  # each against its own


# --- quirks.own_label_negatives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [True, False])
def test_own_label_negatives(own) -> None:
    y_l, y_u = torch.tensor([[[0, 1, IGNORE]]]), torch.tensor([[[0, 2, 2]]])
    logits = torch.zeros(2, 3, 1, 3).double()
    logits[0] += torch.tensor([3.0, 2.0, 1.0]).view(3, 1, 1)  # labeled: ranks 0, 1, 2 for the classes 0, 1, 2
    logits[1] += torch.tensor([1.0, 3.0, 2.0]).view(3, 1, 1)  # unlabeled: class 1, then 2, then 0
    feats = torch.arange(2 * 3, dtype=torch.float64).view(2, 1, 1, 3)
    everything = torch.ones_like(y_u, dtype=torch.bool)
    cfg = config_of(rules_of(5, low_rank=1, high_rank=3, own_label=own))
    inputs = contrast_inputs(feats, feats, logits, y_l, y_u, EntropySplit(y_u, everything, everything), cfg)
    classes, keys = negatives(inputs, cfg, 3, exact=True)
    found = sorted(zip(classes.tolist(), keys.flatten().tolist(), strict=True))
    if own:  # labeled pixels never, unlabeled ones only of the class they carry
        assert found == [(0, 3.0), (2, 4.0), (2, 5.0)]
    else:  # labeled: class 0 comes first but is not the label; unlabeled: every class of the window
        assert found == [(0, 1.0), (0, 3.0), (0, 4.0), (0, 5.0), (2, 3.0), (2, 4.0), (2, 5.0)]


# --- quirks.pad_label_zero ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("zero", "border"), [(True, 0), (False, IGNORE)])
def test_pad_label_zero(zero, border) -> None:
    cfg = toys.config(
        data={"scale_range": [1.0, 1.0], "flip": False, "crop_size": [12, 12]},
        quirks={"pad_label_zero": zero},
    )
    assert_border_label(cfg, border)


# --- quirks.shared_first_epoch -----------------------------------------------------------------------------------


def difference(run: toys.Loop) -> float:
    pairs = zip(run.nets.teacher.parameters(), run.nets.student.parameters(), strict=True)
    return max(float((t - s).detach().abs().max()) for t, s in pairs)


def student_of(run: toys.Loop) -> dict[str, torch.Tensor]:
    return {key: p.detach().clone() for key, p in run.nets.student.named_parameters()}


def assert_before(run: toys.Loop, expected: dict[str, torch.Tensor]) -> None:
    """The teacher entered the last step with these values."""
    assert all(torch.equal(run.before[key], value) for key, value in expected.items())


def assert_average(run: toys.Loop, old: dict[str, torch.Tensor], m: float) -> None:
    """The teacher is `m * old + (1 - m) * student` now."""
    now = student_of(run)
    for key, p in run.nets.teacher.named_parameters():
        torch.testing.assert_close(p, m * old[key] + (1 - m) * now[key], rtol=1e-12, atol=1e-15)


def test_shared_first_epoch() -> None:
    """The teacher is the student all through epoch S = 1; averaging begins with the first step of epoch 2."""
    run = toys.Loop(toys.config(method={"ema_decay": 0.99}), steps_per_epoch=3)
    for _ in range(3):
        run.advance()
    assert difference(run) > 0.1  # never touched before epoch S
    for _ in range(3):
        old = student_of(run)
        run.advance()
        assert_before(run, old)
        assert difference(run) < 1e-15  # and after the optimizer step
    old = student_of(run)
    run.advance()
    assert_average(run, old, 1 - 1 / (3 + 1))  # the fourth update
    assert difference(run) > 1e-6


def test_averaged_from_the_start() -> None:
    """Without the switch the teacher starts as a copy and is averaged from the second update on."""
    run = toys.Loop(toys.config(quirks={"shared_first_epoch": False}), steps_per_epoch=3)
    for _ in range(3):
        run.advance()
    old = student_of(run)
    run.advance()
    assert_before(run, old)
    assert difference(run) == 0.0  # the first update copies: decay 0
    old = student_of(run)
    run.advance()
    assert_average(run, old, 0.5)
    assert difference(run) > 1e-6


@pytest.mark.parametrize("shared", [True, False])
def test_without_burn_in_the_first_epoch_is_the_shared_one(shared) -> None:
    run = toys.Loop(toys.config(method={"sup_only_epochs": 0}, quirks={"shared_first_epoch": shared}))
    run.advance()
    run.advance()
    assert (difference(run) < 1e-15) is shared


# --- quirks.own_teacher_statistics -------------------------------------------------------------------------------


def buffers(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in network.named_buffers()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[key], second[key]) for key in first)


def test_statistics_of_the_teacher_are_its_own() -> None:
    """They come from its own train-mode forwards, in the burn-in as well, and are never copied."""
    run = toys.Loop(toys.config())
    first = buffers(run.nets.teacher)
    run.advance()
    assert not same(first, buffers(run.nets.teacher))
    for _ in range(2):
        run.advance()
    own = buffers(run.nets.teacher)
    run.advance()
    assert_before(run, own)
    run.advance()
    student, teacher = run.nets.student.encoder[1], run.nets.teacher.encoder[1]
    assert not torch.allclose(student.running_mean, teacher.running_mean)
    assert (
        teacher.num_batches_tracked == student.num_batches_tracked == 5
    )  # one train-mode forward each per step


def test_statistics_taken_over_from_the_student() -> None:
    run = toys.Loop(toys.config(quirks={"own_teacher_statistics": False}))
    first = buffers(run.nets.teacher)
    for _ in range(3):
        run.advance()
    assert same(first, buffers(run.nets.teacher))  # it has seen nothing in the burn-in
    students = buffers(run.nets.student)
    run.advance()
    assert_before(run, students)
    own = buffers(run.nets.teacher)
    run.advance()
    assert_before(run, own)  # only once: from then on its own forwards count
    assert not same(own, buffers(run.nets.student))


# --- quirks.contra_reduce ----------------------------------------------------------------------------------------

SCRIPT = """
    import torch
    from torch.nn.parallel import DistributedDataParallel
    from common.distributed import Dist, all_gather_padded, mean_over_ranks
    from tools.processes import start, stop
    from common.errors import run_main
    from projects.u2pl import train
    from projects.u2pl.augment import Draws
    from projects.u2pl.tests import toys

    def gradient(dist, reduce, weight, wrap=True):
        cfg = toys.config(method={"contra_weight": weight, "sup_only_epochs": 0}, quirks={"contra_reduce": reduce})
        nets, memory, draws = toys.networks(cfg), toys.memory(cfg), Draws(0, dist.rank, toys.CPU)
        if wrap:
            nets.wrapped = DistributedDataParallel(nets.student, broadcast_buffers=False)
        for step in range(2):
            nets.student.zero_grad()
            x_l, y_l, x_u = toys.batch(10 * step + dist.rank)
            run, at = toys.run_of(cfg, nets, memory, draws, dist), toys.at(cfg, 0, step)
            train.before_step(at, run)
            result = train.train_step(toys.batches(x_l, y_l, x_u), at, run)
            result.total.backward()
        contra = result.terms.get("loss_contra", torch.zeros(()))
        return nets.student.decoder["representation"].weight.grad.clone(), contra.detach()

    def main(argv):
        dist = start("cpu")
        zero, _ = gradient(dist, "mean", 0.0)
        assert not zero.any()  # the representation head is trained by the contrast alone
        mean, loss_mean = gradient(dist, "mean", 1.0)
        summed, loss_summed = gradient(dist, "sum_forward_only", 1.0)
        own, _ = gradient(dist, "mean", 1.0, wrap=False)
        assert mean.abs().max() > 1e-6
        torch.testing.assert_close(mean, mean_over_ranks(own, dist), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(summed, mean / 2, rtol=1e-9, atol=1e-12)
        assert loss_mean == loss_summed  # what is logged does not depend on it
        both = all_gather_padded(own, dist)
        assert not torch.equal(both[0], both[1])
        nets = toys.networks(toys.config())
        nets.unsynchronized = (nets.student, nets.teacher)
        for network in (nets.student, nets.teacher):
            network.encoder[1].running_mean.fill_(dist.rank + 1.0)
        nets.share_statistics(dist)
        for network in (nets.student, nets.teacher):
            assert (network.encoder[1].running_mean == 1.0).all()
        print("ratio holds on rank", dist.rank, flush=True)
        stop()

    if __name__ == "__main__":
        run_main(main)
"""


def test_contra_reduce_divides_the_gradient_by_the_processes(tmp_path) -> None:
    assert run_on_two_processes(tmp_path, SCRIPT).count("ratio holds on rank") == 2


def test_contra_reduce_is_without_effect_for_one_process() -> None:
    results = []
    for reduce in ("mean", "sum_forward_only"):
        run = toys.Loop(toys.config(method={"sup_only_epochs": 0}, quirks={"contra_reduce": reduce}))
        for _ in range(4):
            last = run.advance()
        assert last.terms["loss_contra"] > 0
        results.append(torch.cat([p.flatten() for p in run.nets.student.parameters()]))
    assert torch.equal(*results)
