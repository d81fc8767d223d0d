"""The step of the image-level branch, its teacher, and the files that validation writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.config import build
from common.distributed import Dist
from common.errors import UserError
from projects.s4gan_mlmt.config import Config
from projects.s4gan_mlmt.mlmt import state
from projects.s4gan_mlmt.mlmt.config import MlmtConfig
from projects.s4gan_mlmt.mlmt.data import branch_spec, build_score_data
from projects.s4gan_mlmt.mlmt.fusion import read_scores
from projects.s4gan_mlmt.mlmt.losses import cosine_consistency, multi_label_loss
from projects.s4gan_mlmt.mlmt.model import build_networks, load_backbone
from projects.s4gan_mlmt.mlmt.scores import score, score_files, validate
from projects.s4gan_mlmt.mlmt.train import evaluation_due, set_rate
from projects.s4gan_mlmt.tests.mlmt_toys import (
    CLASSES,
    Loop,
    StepBatches,
    Toy,
    config,
    cut,
    flags,
    step_batches,
    toy,
    write_voc,
)

BN = ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")


def loop(cfg: Config | None = None, dtype: torch.dtype = torch.float64) -> Loop:
    return Loop(cfg or config(), toy(0, dtype=dtype), toy(1, dtype=dtype))


def go(made: Loop, epoch: int = 0, batches: StepBatches | None = None) -> dict[str, Tensor]:
    return made.advance(batches or step_batches(made.run.step), epoch)


def tensors(network: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def changed(before: Mapping[str, Tensor], network: torch.nn.Module) -> set[str]:
    return {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}


# --- the step --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epoch", "weight"), [(0, 0.0), (1, 2 / 3)])
def test_the_student_takes_a_nesterov_step_along_both_losses(epoch: int, weight: float) -> None:
    """Two steps, recomputed with PyTorch's plain optimizer."""
    made, other = loop(config(mlmt={"eta_min": 0.02})), loop().nets
    optimizer = torch.optim.SGD(
        other.student.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-5, nesterov=True
    )
    for step in range(2):
        batches = step_batches(step)
        found = go(made, epoch, batches)
        x, views = batches.labeled.image, batches.unlabeled.image
        optimizer.zero_grad()
        with torch.no_grad():
            other.teacher(x)
            taught = other.teacher(views[:, :3])
        classes = multi_label_loss(other.student(x), batches.labeled.label)
        consistency = cosine_consistency(other.student(views[:, 3:]), taught)
        loss = classes + weight * consistency
        loss.backward()
        optimizer.step()
        alpha = min(1 - 1 / (step + 2), 0.999)
        with torch.no_grad():
            for t, s in zip(other.teacher.parameters(), other.student.parameters(), strict=True):
                t.copy_(alpha * t + (1 - alpha) * s)
        for name, value in (("loss", loss), ("loss_class", classes), ("loss_consistency", consistency)):
            torch.testing.assert_close(found[name], value.detach())
    for name, network in made.nets.bare.items():
        torch.testing.assert_close(tensors(network), tensors(other.bare[name]))


def test_every_forward_moves_statistics_even_at_weight_zero() -> None:
    made = loop()
    nets = made.nets
    before = [tensors(network) for network in nets.bare.values()]
    go(made)
    for network, was in zip(nets.bare.values(), before, strict=True):
        assert set(BN) <= changed(was, network)
        assert int(network.norm.num_batches_tracked) == 2  # labeled, then unlabeled
    assert not torch.equal(nets.student.norm.running_mean, nets.teacher.norm.running_mean)


def test_the_teacher_is_the_plain_average_and_keeps_its_statistics() -> None:
    made = loop()
    nets = made.nets
    start = torch.nn.utils.parameters_to_vector(nets.teacher.parameters())
    students = []
    for _ in range(5):
        go(made)
        students.append(torch.nn.utils.parameters_to_vector(nets.student.parameters()).detach())
    found = torch.nn.utils.parameters_to_vector(nets.teacher.parameters())
    torch.testing.assert_close(found, (start + sum(students)) / 6)
    assert not any(p.requires_grad or p.grad is not None for p in nets.teacher.parameters())


def test_the_average_stops_short_of_the_largest_decay() -> None:
    made = loop(config(mlmt={"ema_decay": 0.25}))
    start = made.nets.teacher.fc.bias.clone()
    go(made)  # 1 - 1/2 would be more
    torch.testing.assert_close(made.nets.teacher.fc.bias, 0.25 * start + 0.75 * made.nets.student.fc.bias)


def test_rates_fall_epoch_by_epoch() -> None:
    run = loop(config(mlmt={"lr": 0.03, "eta_min": 1e-4, "epochs": 4})).run
    rates = [set_rate(epoch, run) for epoch in range(4)]
    np.testing.assert_allclose(rates, [0.03, 0.02562125, 0.01505, 0.00447875], rtol=1e-6)
    assert run.optimizer.param_groups[0]["lr"] == rates[-1]


def test_the_loss_of_a_step_is_that_of_its_parts() -> None:
    """What two processes see, their gradients averaged, is the step of one: without live BatchNorm statistics."""
    whole = step_batches(3, labeled=5, unlabeled=7)
    networks = toy(0, frozen=True), toy(1, frozen=True)
    gradients, losses = [], []
    for parts in ([whole], cut(whole, 2), cut(whole, 3)):
        sums = [torch.zeros_like(p) for p in networks[0].parameters()]
        total = 0.0
        for part in parts:
            student = toy(0, frozen=True)
            found = go(Loop(config(), student, toy(1, frozen=True)), epoch=2, batches=part)
            total += float(found["loss"]) / len(parts)
            for kept, p in zip(sums, student.parameters(), strict=True):
                kept += p.grad / len(parts)
        gradients.append(torch.nn.utils.parameters_to_vector(sums))
        losses.append(total)
    assert losses[1:] == pytest.approx([losses[0]] * 2)
    for found in gradients[1:]:
        torch.testing.assert_close(found, gradients[0])


@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_a_loss_that_is_not_finite_moves_no_weight(mode: str) -> None:
    made = loop(config(run={"on_nonfinite": mode}))
    student, teacher = made.nets.student, made.nets.teacher
    go(made)
    before = tensors(student)
    bad = step_batches(1)
    bad.labeled.image[0, 0, 0, 0] = float("nan")
    if mode == "stop":
        with pytest.raises(UserError, match=r"step 2: loss_class is nan.*images a, b; .*last good"):
            go(made, batches=bad)
        assert changed(before, student) <= set(BN)
    else:
        assert float(go(made, batches=bad)["nonfinite"]) == 1
        assert not changed(before, student) - {BN[2]}  # the count of batches may go on
        assert all(p.isfinite().all() for p in teacher.parameters())
        assert float(go(made)["nonfinite"]) == 0
        assert changed(before, student)


def test_labels_of_unlabeled_photos_cannot_matter() -> None:
    made = [loop(), loop()]
    for i, one in enumerate(made):
        batches = step_batches(0)
        unlabeled = batches.unlabeled._replace(label=torch.full((6, CLASSES), float(i)))
        go(one, 2, batches._replace(unlabeled=unlabeled))
    torch.testing.assert_close(tensors(made[0].nets.student), tensors(made[1].nets.student), rtol=0, atol=0)


# --- the start -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [False, True])
def test_the_teacher_starts_with_numbers_of_its_own_or_as_a_copy(copied: bool) -> None:
    made = build_networks(config(mlmt={"copy_teacher": copied}), 5, Dist())
    same = torch.equal(made.student.fc.weight, made.teacher.fc.weight)
    assert same == copied
    assert made.student.fc.out_features == 5


def test_a_weight_file_gives_both_all_but_the_last_layer(tmp_path: Path) -> None:
    torch.manual_seed(3)
    weights = dict(build_networks(config(), 7, Dist()).student.state_dict())
    torch.save(weights, tmp_path / "w.pth")
    lines: list[str] = []
    log = SimpleNamespace(info=lines.append)
    cfg = config(mlmt={"weights": str(tmp_path / "w.pth")})
    made = build_networks(cfg, 5, Dist())
    load_backbone(cfg.mlmt, made.bare.values(), log)
    assert len(lines) == 1
    for network in made.bare.values():
        assert torch.equal(network.conv1.weight, weights["conv1.weight"])
    assert not torch.equal(made.student.fc.weight, made.teacher.fc.weight)
    with pytest.raises(UserError, match=r"mlmt.weights=no.pth: no such file.*mlmt.weights=none"):
        load_backbone(MlmtConfig(weights="no.pth"), made.bare.values(), log)


def test_every_parameter_learns_with_the_same_decay() -> None:
    made = loop(config(mlmt={"weight_decay": 0.5, "momentum": 0.8, "nesterov": False}))
    (group,) = made.run.optimizer.param_groups
    assert len(group["params"]) == len(list(made.nets.student.parameters()))
    assert (group["weight_decay"], group["momentum"], group["nesterov"]) == (0.5, 0.8, False)


# --- validation ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_voc(tmp_path_factory.mktemp("data") / "voc")


def scores_of(cfg: Config, network: torch.nn.Module) -> Any:
    return score(cfg, network, build_score_data(cfg, branch_spec(cfg), "val", Dist()), Dist())


@pytest.mark.parametrize("flat", [True, False])
def test_scores_follow_the_list_and_the_roll(voc: Path, flat: bool) -> None:
    """Five images in batches of 2: flat, column 0 is the background of the image before, in the batch."""
    cfg = config(voc, mlmt={"flat_roll": flat})
    network = toy(0, dtype=torch.float32)
    found = scores_of(cfg, network)
    assert network.training  # as it was
    assert found.vectors.tolist() == [flags(i) for i in range(10, 15)]
    assert torch.equal(found.rows[:, 1:], found.sigmoids[:, :-1])
    order = [1, 0, 3, 2, 4] if flat else list(range(5))
    assert torch.equal(found.rows[:, 0], found.sigmoids[order, -1])


def test_scoring_changes_nothing(voc: Path) -> None:
    network = toy(0, dtype=torch.float32)
    before = tensors(network)
    scores_of(config(voc), network)
    assert not changed(before, network)


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_the_batch_matters_to_the_flat_roll_alone(voc: Path, size: int) -> None:
    network = toy(0, dtype=torch.float32)
    rows = [
        scores_of(config(voc, mlmt={"flat_roll": False, "val_batch": n}), network).rows for n in (3, size)
    ]
    torch.testing.assert_close(*rows)


def test_the_files_have_the_authors_format(voc: Path, tmp_path: Path) -> None:
    cfg, networks = config(voc), loop(dtype=torch.float32).nets.bare
    scored = build_score_data(cfg, branch_spec(cfg), "val", Dist())
    files = score_files(tmp_path, 5)
    assert [path.name for path in files.values()] == [
        "output_val_raw_5.txt", "output_val_bin_5.txt", "output_ema_raw_5.txt", "output_ema_bin_5.txt"
    ]  # fmt: skip
    for _ in range(2):  # a second time: replaced, where the authors append
        figures = validate(cfg, networks, scored, tmp_path, 5, Dist())
    for role, network in networks.items():
        name = {"student": "val", "teacher": "ema"}[role]
        found = score(cfg, network, scored, Dist())
        raw, binary = (files[f"{name}_{kind}"].read_bytes() for kind in ("raw", "bin"))
        assert len(raw) == 5 * 189
        assert raw.decode() == "".join(" ".join(f"{v:f}" for v in row) + "\n" for row in found.rows.tolist())
        assert binary.decode() == "".join(
            " ".join(str(int(v > 0.5)) for v in row) + "\n" for row in found.rows.tolist()
        )
        np.testing.assert_allclose(read_scores(files[f"{name}_raw"], 5, 21), found.rows, atol=5.1e-7)
    assert set(figures) == {
        f"{name}_{key}" for name in ("val", "ema")
        for key in ("loss_class", "accuracy_balanced", "accuracy_zeros", "accuracy_ones", "accuracy_total")
    }  # fmt: skip


def test_figures_are_about_images_with_known_vectors(tmp_path: Path) -> None:
    folder = write_voc(tmp_path / "voc", 4, 3)
    (folder / "SegmentationClassAug" / "p005.png").unlink()
    (folder / "some.txt").write_text("p004\np005\n")
    (folder / "none.txt").write_text("p005\n")
    cfg, networks = config(folder), loop(dtype=torch.float32).nets.bare
    spec = branch_spec(cfg)
    figures = [
        validate(cfg, networks, build_score_data(cfg, spec, name, Dist()), tmp_path, 1, Dist())
        for name in ("some.txt", "none.txt")
    ]
    target = torch.tensor([flags(4)], dtype=torch.float32)
    image = next(build_score_data(cfg, spec, "some.txt", Dist()).batches(Dist(), False)).image[:1]
    expected = multi_label_loss(networks["student"].eval()(image), target)
    assert figures[0]["val_loss_class"] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert figures[1] == {}
    assert len(files_lines(score_files(tmp_path, 1)["ema_raw"])) == 1


def files_lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_scores_that_are_not_finite_are_refused(voc: Path, tmp_path: Path) -> None:
    cfg, networks = config(voc), loop(dtype=torch.float32).nets.bare
    networks["teacher"].fc.bias[0] = float("nan")
    with pytest.raises(UserError, match="the teacher's scores after epoch 3 are not finite"):
        validate(cfg, networks, build_score_data(cfg, branch_spec(cfg), "val", Dist()), tmp_path, 3, Dist())
    assert not score_files(tmp_path, 3)["ema_raw"].exists()


def test_when_scores_are_written() -> None:
    run = loop(config(mlmt={"epochs": 12, "evaluation_epochs": 5})).run
    assert [epochs for epochs in range(1, 13) if evaluation_due(epochs - 1, run)] == [5, 10, 12]


# --- the configuration -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 32}, "'size' is 32; expected 33 or more"),
        ({"epochs": 0}, "'epochs' is 0"),
        ({"w_cons": -1}, "'w_cons' is -1"),
        ({"lr": 0}, "'lr' is 0"),
        ({"ema_decay": 1}, "'ema_decay' is 1"),
        ({"threshold": 1.5}, "'threshold' is 1.5"),
        ({"momentum": 0}, "'nesterov' is true with 'momentum' 0"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(MlmtConfig, values)


def test_classes_may_be_any_number() -> None:
    for classes in (1, 2, 60):
        made = Loop(config(), Toy(classes), Toy(classes))
        batches = step_batches(0)
        vectors = (torch.rand(4, classes) < 0.5).float()
        views = batches.unlabeled._replace(image=batches.unlabeled.image.float())
        labeled = batches.labeled._replace(image=batches.labeled.image.float(), label=vectors)
        assert go(made, 2, batches._replace(labeled=labeled, unlabeled=views))["loss"].isfinite()


def test_the_state_module_names_the_branch() -> None:
    assert state.BRANCH == "mlmt"
    assert len(state.SUMMED) == 5
