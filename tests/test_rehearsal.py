"""Trainings on a GPU that is not there: the host waits once per log interval, and no batch outlives its step."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from common.data.streams import TrainingData
from common.measure.metrics import ConfusionMatrix
from tests.rehearsal import gpu
from tests.rehearsal.backward import Backward
from tests.rehearsal.gpu import BLOCKING, GPU, MIX, UNPINNED, WAIT, rehearsal
from tests.rehearsal.runs import (
    DEEPLABV2,
    MATRIX,
    ROOT,
    VAL,
    VIT,
    Case,
    Report,
    rehearse,
    rehearse_evaluation,
)

PROJECTS = sorted(path.parent.name for path in ROOT.glob("projects/*/train.py"))
FLUSH = "common/run/log.py:_flush"  # the one wait of an interval


class Allowed(NamedTuple):
    """What may be found in the cases whose text begins with `case`, and why."""

    case: str
    kind: str
    where: str
    why: str


ALLOWED = (
    Allowed(
        "u2pl cityscapes_744_r101_ael", WAIT, "projects/u2pl/ael/memory.py:read",
        "once a forward: where to cut the images that it mixes depends on the components that OpenCV finds in the "
        "teacher's labels of this step, whose number decides how many random numbers the host draws; the losses of "
        "labeled images are enqueued behind the copy. Once more at the start of a run, for the first choice",
    ),
    Allowed(
        "cps voc_662_r50_cct", WAIT, "projects/cps/baselines/cct.py:object_maps",
        "guided cut-out, once a forward: OpenCV finds the contours of objects on the host, and the auxiliary decoders "
        "need what is cut out; after the other perturbations, gradients would be summed in another order",
    ),
    Allowed(
        "cps voc_662_r50_gct", BLOCKING, "projects/cps/baselines/gct.py:gaussian_weights",
        "once per size of image: the result is kept on the device",
    ),
)  # fmt: skip
ALLOWED_IN_EVALUATION = {
    (
        WAIT,
        "projects/cps/inference.py:unnormalized",
    ): "the authors' protocol resizes photos with OpenCV, on the host",
}


def complaints(report: Report, case: Case) -> list[str]:
    """What a rehearsal shows that should not be, and what is allowed but does not occur."""
    allowed = {(one.kind, one.where) for one in ALLOWED if str(case).startswith(one.case)}
    flushes = sum((one.kind, one.where) == (WAIT, FLUSH) for one in report.watch.findings)
    lines = [] if flushes == 1 else [f"{flushes} waits at the end of the interval"]
    if report.outlived:
        lines.append(f"{report.outlived} tensors of batches outlive their step")
    found = Counter(one for one in report.watch.findings if one.where != FLUSH)
    lines += [f"{n} x {one}" for one, n in found.items() if (one.kind, one.where) not in allowed]
    unseen = allowed - {(one.kind, one.where) for one in found}
    return lines + [f"allowed, but not found: {kind} in {where}" for kind, where in sorted(unseen)]


@pytest.mark.parametrize("case", MATRIX, ids=str)
@pytest.mark.parametrize("processes", [1, 4])
def test_an_interval_waits_once(case: Case, processes: int, tmp_path: Path) -> None:
    lines = complaints(rehearse(case, tmp_path, processes), case)
    assert not lines, "\n".join(lines)


EVALUATIONS = [
    (Case("u2pl", "voc_classic_366_r101"), "training"),
    (Case("u2pl", "cityscapes_744_r101"), "script"),
    (Case("u2pl", "voc_classic_366_r101", ("eval.protocol=multi_scale_flip", "eval.flip=true")), "script"),
    (Case("brpg", "voc_classic_366_r101"), "training"),
    (Case("cps", "voc_662_r50_cps"), "training"),
    (Case("cps", "voc_662_r50_cps", ("eval.scales=[0.5,1.0]", "eval.flip=true")), "script"),
    (Case("cps", "voc_662_r50_cps", ("eval.protocol=port",)), "script"),
    (Case("s4gan_mlmt", "voc_529_r101", (DEEPLABV2,)), "training"),
    (Case("s4gan_mlmt", "cityscapes_743_r101", (DEEPLABV2,)), "script"),
    (Case("proto_consistency", "voc_classic_366_r101"), "script"),
    (Case("unimatch", "cityscapes_744_r101"), "training"),
    (Case("unimatch", "voc_classic_366_dinov2_small", VIT), "script"),
]


@pytest.mark.parametrize(("case", "when"), EVALUATIONS, ids=str)
def test_further_images_cost_no_wait(case: Case, when: str, tmp_path: Path) -> None:
    found = rehearse_evaluation(case, tmp_path, when)
    for key in ALLOWED_IN_EVALUATION:
        del found[key]
    assert not found, "\n".join(f"{n} x {kind} in {where}" for (kind, where), n in found.items())


def test_every_project_is_rehearsed() -> None:
    assert {case.project for case in MATRIX} == set(PROJECTS)
    assert {case.project for case, _ in EVALUATIONS} == set(PROJECTS)


# --- what the rehearsal sees -------------------------------------------------------------------------------------


class Things(NamedTuple):
    """Tensors of the device and of the host for the snippets below."""

    x: Tensor  # (6, 5)
    row: Tensor  # (6,)
    number: Tensor  # () int64
    mask: Tensor  # (6,)
    labels: Tensor  # (6,) int64
    host: Tensor  # (6, 5)
    pinned: Tensor  # (6, 5)


def things() -> Things:
    host = torch.zeros(6, 5)
    x, labels = torch.zeros(6, 5, device=GPU), torch.zeros(6, dtype=torch.long, device=GPU)
    return Things(x, x[:, 0].clone(), labels.sum(), labels > 0, labels, host, host.pin_memory())


Snippet = Callable[[Things], Any]
WAITS: dict[str, Snippet] = {
    "item": lambda t: t.x.sum().item(),
    "float()": lambda t: float(t.x.mean()),
    "int()": lambda t: int(t.number),
    "truth": lambda t: 1 if t.mask.any() else 2,
    "comparison": lambda t: min(t.x[0, 0], t.x[0, 1]),
    "in": lambda t: 3 in t.labels,
    "tolist": lambda t: t.x.tolist(),
    "cpu": lambda t: t.x.cpu(),
    "numpy": lambda t: t.x.cpu().numpy(),
    "copy to the host": lambda t: t.host.copy_(t.x),
    "asynchronous copy to pageable memory": lambda t: t.host.copy_(t.x, non_blocking=True),
    "index by a number of the device": lambda t: t.x[t.number],
    "write at a number of the device": lambda t: t.x.__setitem__(t.number, 0.0),
    "slice up to a number of the device": lambda t: t.x[: t.number],
    "range of a number of the device": lambda t: range(t.number),
    "full of a number of the device": lambda t: torch.full((3,), t.number),
    "linspace to a number of the device": lambda t: torch.linspace(0, t.x.max(), 4, device=GPU),
    "nonzero": lambda t: t.mask.nonzero(),
    "argwhere": lambda t: torch.argwhere(t.mask),
    "where of one argument": lambda t: torch.where(t.mask),
    "read of a mask": lambda t: t.x[t.mask],
    "masked_select": lambda t: t.x.masked_select(t.mask.unsqueeze(1)),
    "write of a tensor under a mask": lambda t: t.x.__setitem__(t.mask, t.x.clone()),
    "write under a mask and a slice": lambda t: t.x.__setitem__((t.mask, slice(0, 2)), t.x[:, :2].clone()),
    "write under a mask and a number": lambda t: t.x.__setitem__((t.mask, 1), t.row),
    "adding under a mask": lambda t: t.row.index_put_((t.mask,), t.x.sum(), accumulate=True),
    "indices of the host": lambda t: t.x[torch.arange(3)],
    "mask of the host": lambda t: t.x[torch.ones(6, dtype=torch.bool)],
    "bincount": lambda t: torch.bincount(t.labels, minlength=3),
    "histc between the extremes": lambda t: torch.histc(t.x, 4),
    "multinomial": lambda t: torch.multinomial(t.row, 1),
    "unique": lambda t: t.labels.unique(),
    "unique with counts": lambda t: t.labels.unique(return_counts=True),
    "unique rows": lambda t: t.x.unique(dim=0),
    "unique_consecutive": lambda t: torch.unique_consecutive(t.labels),
    "repeat_interleave": lambda t: torch.repeat_interleave(t.x, t.labels, dim=0),
    "one_hot of unknown width": lambda t: F.one_hot(t.labels),
    "equal": lambda t: torch.equal(t.x, t.x),
    "allclose": lambda t: torch.allclose(t.x, t.x),
    "inverse": lambda t: torch.linalg.inv(t.x[:5]),
    "solve": lambda t: torch.linalg.solve(t.x[:5], t.x[:5]),
    "event": lambda t: torch.cuda.Event().synchronize(),
    "synchronize": lambda t: torch.cuda.synchronize(),
}
COPIES: dict[str, Snippet] = {
    "tensor": lambda t: torch.tensor([1.0, 2.0], device=GPU),
    "new_tensor": lambda t: t.x.new_tensor([1.0, 2.0]),
    "as_tensor": lambda t: torch.as_tensor([1, 2], device=GPU),
    "list of indices": lambda t: t.x[[0, 2]],
    "write at a list of indices": lambda t: t.x.__setitem__([0, 2], 1.0),
    "to": lambda t: t.host.to(GPU),
    "cuda": lambda t: t.host.cuda(),
    "blocking copy of pinned memory": lambda t: t.pinned.to(GPU),
    "copy_": lambda t: t.x.copy_(t.host),
    "pageable memory": lambda t: t.host.to(GPU, non_blocking=True),
}
MIXES: dict[str, Snippet] = {
    "sum": lambda t: t.x + t.host,
    "cat": lambda t: torch.cat((t.x, t.host)),
    "stack of numbers": lambda t: torch.stack((t.row[0], torch.tensor(0.0))),
    "where": lambda t: torch.where(t.host > 0, t.x, t.x),
    "clamp by a number of the host": lambda t: t.x.clamp(min=torch.tensor(1.0)),
    "gather": lambda t: t.x.gather(0, torch.zeros(1, 5, dtype=torch.long)),
    "labels of the host": lambda t: F.cross_entropy(t.x, torch.zeros(6, dtype=torch.long)),
    "generator of the host": lambda t: torch.randperm(4, generator=torch.Generator(), device=GPU),
}
FREE: dict[str, Snippet] = {
    "write of a number under a mask": lambda t: t.x.__setitem__(t.mask, 0.0),
    "write of a number": lambda t: t.x.__setitem__(2, 0.0),
    "write of a scalar of the device": lambda t: t.row.__setitem__(1, t.x.sum()),
    "where": lambda t: torch.where(t.mask.unsqueeze(1), t.x, 0.0),
    "masked_fill": lambda t: t.x.masked_fill(t.mask.unsqueeze(1), 1.0),
    "index of one axis": lambda t: t.x[t.number.reshape(1)],
    "index_select": lambda t: t.x.index_select(0, t.labels),
    "one_hot of known width": lambda t: F.one_hot(t.labels, 4),
    "repeat_interleave of known size": lambda t: torch.repeat_interleave(
        t.x, t.labels, dim=0, output_size=12
    ),
    "full": lambda t: torch.full((), 3.0, device=GPU),
    "number of the host as an argument": lambda t: t.x * torch.tensor(2.0),
    "pinned memory": lambda t: t.pinned.to(GPU, non_blocking=True),
    "asynchronous copy to the host": lambda t: t.x.to("cpu", non_blocking=True),
    "cross entropy": lambda t: F.cross_entropy(t.x, t.labels, ignore_index=255),
    "histc between limits": lambda t: torch.histc(t.x, 4, 0, 1),
    "generator of the device": lambda t: torch.rand(3, generator=torch.Generator(device=GPU), device=GPU),
}
SEEN = {
    **{name: (snippet, (WAIT,)) for name, snippet in WAITS.items()},
    **{f"copy by {name}": (snippet, (BLOCKING, UNPINNED)) for name, snippet in COPIES.items()},
    **{f"mix in {name}": (snippet, (MIX,)) for name, snippet in MIXES.items()},
}


def kinds_of(snippet: Snippet, watch: Any) -> set[str]:
    """What the snippet is blamed for."""
    before = len(watch.findings)
    try:
        snippet(things())
    except RuntimeError:  # tensors of two devices end a training anyway
        assert watch.findings[-1].kind == MIX
    return {one.kind for one in watch.findings[before:]}


def test_every_kind_of_wait_copy_and_mix_is_seen() -> None:
    assert len(WAITS) >= 40
    with rehearsal() as watch:
        missed = [name for name, (snippet, kinds) in SEEN.items() if not kinds_of(snippet, watch) & {*kinds}]
        blamed = [name for name, snippet in FREE.items() if kinds_of(snippet, watch)]
    assert not missed
    assert not blamed


SHORT = Case("proto_consistency", "voc_classic_366_r101", phase="first")


def test_whatever_is_planted_in_a_step_is_complained_about(tmp_path: Path) -> None:
    from projects.proto_consistency import train

    original, planted = train.mean_of, iter(SEEN.values())

    def mean_of(results: Any) -> Any:
        for snippet, _ in planted:  # all in the first step
            with contextlib.suppress(RuntimeError):  # a mix would end the step
                snippet(things())
        return original(results)

    with mock.patch.object(train, "mean_of", mean_of):
        report = rehearse(SHORT, tmp_path, 1)
    lines = complaints(report, SHORT)
    lacking = [
        name
        for name, (snippet, _) in SEEN.items()
        if not any(f"(line {snippet.__code__.co_firstlineno})" in line for line in lines)
    ]
    assert not lacking


def test_a_wait_per_image_is_complained_about(tmp_path: Path) -> None:
    original = ConfusionMatrix.update

    def update(self: ConfusionMatrix, pred: Tensor, label: Tensor) -> None:
        original(self, pred, label)
        pred.amax().item()

    with mock.patch.object(ConfusionMatrix, "update", update):
        found = rehearse_evaluation(SHORT, tmp_path, "script")
    assert found == {(WAIT, "tests/test_rehearsal.py:update"): VAL - 1}


def test_a_closure_over_images_is_complained_about(tmp_path: Path) -> None:
    with mock.patch.object(TrainingData, "names", lambda self, group: lambda: str(group)):
        lines = complaints(rehearse(SHORT, tmp_path, 1), SHORT)
    assert [line for line in lines if "outlive" in line]


def test_memory_is_counted_while_it_lives() -> None:
    with rehearsal() as watch:
        x = torch.zeros(1 << 20, device=GPU)
        kept = x[:10]
        del x
        assert watch.live == 4 << 20
        del kept
        assert watch.live == 0
        assert watch.peak == 4 << 20


def test_results_that_are_known_are_those_of_the_first_time() -> None:
    def results() -> list[Tensor]:
        x = torch.zeros(2, 3, 8, 8, device=GPU).contiguous(memory_format=torch.channels_last)
        y = F.conv2d(x, torch.zeros(4, 3, 3, 3, device=GPU))
        made = [x, y, y[:, 1:], y.half().transpose(0, 1), *F.max_pool2d(y, 2, return_indices=True), y.add_(1)]
        assert made[-1] is y
        assert made[2].untyped_storage()._cdata == y.untyped_storage()._cdata
        return made

    with rehearsal() as watch:
        gpu.SHAPES.clear()
        first, live = results(), watch.live
        launches = watch.launches
        assert gpu.SHAPES
        original, worked_out = watch.fake.dispatch, []

        def dispatch(op: Any, *args: Any) -> Any:
            worked_out.append(op.name())
            return original(op, *args)

        with mock.patch.object(watch.fake, "dispatch", dispatch):
            second = results()
        assert set(worked_out) <= {"prim::device"}
        assert watch.launches == 2 * launches
        assert watch.live == 2 * live
        for ours, theirs in zip(second, first, strict=True):
            assert (ours.shape, ours.stride(), ours.dtype, ours.device) == (
                theirs.shape, theirs.stride(), theirs.dtype, theirs.device,
            )  # fmt: skip


def test_the_backward_pass_is_that_of_the_engine() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1))
    scale = nn.Parameter(torch.rand(5, 1, 1))
    parameters = [*net.parameters(), scale]
    x, y = torch.randn(2, 3, 9, 9), torch.randint(0, 5, (2, 7, 7))

    def loss() -> Tensor:
        first, second = net(x) * scale, checkpoint(net, x.flip(0), use_reentrant=False)
        return F.cross_entropy(first + second, y) + first[:, 1:3].exp().mean() + second.amax()

    class Sums(TorchDispatchMode):
        """Counts sums: where a gradient is brought to a shape that it has already, there is none."""

        count = 0

        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += op.name().startswith("aten::sum")
            return op(*args, **kwargs or {})

    with Sums() as theirs:
        torch.autograd.backward(loss())
    wanted = [one.grad for one in parameters]
    for one in parameters:
        one.grad = None
    ours = Backward()
    with ours.saved(), mock.patch.object(torch._C, "_current_graph_task_id", ours.task), Sums() as own:
        ours.run(loss())
    for one, grad in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(one.grad, grad)
    assert own.count == theirs.count > 0
