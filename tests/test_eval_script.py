"""The evaluation script with a project of its own: which checkpoints, network and settings, what is written."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.config import save_config
from common.data.dataset_yaml import load_spec
from common.data.spec import DatasetSpec
from common.distributed import Dist
from common.errors import UserError
from common.measure.evaluation import Evaluation, evaluate_list, protocol_of
from common.run.checkpoint import save
from tests.fake_project import FakeConfig, epochs, fake_checkpoint, fake_config, fake_project, predictor
from tests.tiny import write_dataset
from tools import eval_script
from tools.eval_script import ScriptProject, Target, config_of, find_target

EPOCHS = ("epoch-9", "epoch-8", "epoch-7")


@pytest.fixture(autouse=True)
def _same_process_settings() -> Iterator[None]:
    """The script sets up its process; give it back."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "farm")


@pytest.fixture
def spec(dataset: Path) -> DatasetSpec:
    return load_spec(str(dataset))


@pytest.fixture
def cfg(dataset: Path) -> FakeConfig:
    return fake_config(dataset)


@pytest.fixture
def run(cfg: FakeConfig, spec: DatasetSpec, tmp_path: Path) -> Path:
    """A run with best and last weights and those of three epochs."""
    folder = tmp_path / "runs" / "some" / "seed2"
    folder.mkdir(parents=True)
    save_config(cfg, folder / "config.yaml")
    for seed, name in enumerate(("best", "last", *EPOCHS)):
        save(folder / f"{name}.pt", fake_checkpoint(cfg, spec, seed))
    return folder


@pytest.fixture
def project(tmp_path: Path) -> ScriptProject:
    return fake_project(tmp_path)


@pytest.fixture
def every(tmp_path: Path) -> ScriptProject:
    """A project that measures the weights of every epoch."""
    return fake_project(tmp_path, checkpoints=epochs)


def report(run: Path, name: str = "eval_whole_image_val.json") -> dict[str, Any]:
    return json.loads((run / name).read_text(encoding="utf-8"))


def measured(cfg: FakeConfig, spec: DatasetSpec, seed: int, role: str) -> Evaluation:
    forward = predictor(cfg, fake_checkpoint(cfg, spec, seed), role, torch.device("cpu"), "here")
    how = protocol_of(cfg.eval, cfg.data, "script")
    return evaluate_list(forward, cfg.data, spec, "val", how, Dist(), precision="fp32")


def test_best_and_last_by_default(
    run: Path, project: ScriptProject, cfg: FakeConfig, spec: DatasetSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    assert eval_script.main(project, ["--run", str(run)]) == 0
    ours = report(run)
    assert (ours["project"], ours["method"], ours["network"]) == ("fake", "fake method", "branch1")
    assert ours["checkpoints"] == {label: str(run / f"{label}.pt") for label in ("best", "last")}
    for seed, label in enumerate(("best", "last")):
        expected = measured(cfg, spec, seed, "branch1")
        assert ours[f"miou_{label}"] == ours[label]["miou"] == expected.miou
        assert list(ours[label]["iou"].values()) == list(expected.iou)
        assert ours[label]["images"] == 4
    assert ours["miou_best"] != ours["miou_last"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{run}: branch1, whole_image, list 'val' of farm, 4 images"
    assert lines[1].split()[-2:] == ["best", "last"]


def test_every_checkpoint_of_a_run_in_one_command(
    run: Path, every: ScriptProject, cfg: FakeConfig, spec: DatasetSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    assert eval_script.main(every, ["--run", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[-3:] == list(EPOCHS)
    ours = report(run)
    assert list(ours["checkpoints"]) == list(EPOCHS)
    expected = [measured(cfg, spec, seed, "branch1") for seed in (2, 3, 4)]
    assert [ours[f"miou_{label}"] for label in EPOCHS] == [e.miou for e in expected]
    figures = [f"{100 * v:.2f}" for e in expected for v in (e.miou, e.miou_present, e.pixel_accuracy)]
    assert lines[-1].split("\t")[5:] == figures


def test_contents_are_read_one_at_a_time(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run may have more checkpoints than fit into memory."""
    order: list[tuple[str, str]] = []
    original = eval_script.load

    def watched_load(path: Path) -> dict[str, Any]:
        order.append(("read", path.stem))
        return original(path)

    def watched_predictor(cfg: Any, saved: Any, role: str, device: torch.device, where: str) -> Any:
        order.append(("measured", Path(where).stem))
        return predictor(cfg, saved, role, device, where)

    monkeypatch.setattr(eval_script, "load", watched_load)
    watched = fake_project(tmp_path, checkpoints=epochs, predictor=watched_predictor)
    assert eval_script.main(watched, ["--run", str(run)]) == 0
    assert order == [(what, name) for name in EPOCHS for what in ("read", "measured")]


def test_all_checkpoints_are_checked_before_the_first_is_measured(run: Path, tmp_path: Path) -> None:
    def unexpected(*args: Any) -> Any:
        raise AssertionError

    watched = fake_project(tmp_path, checkpoints=epochs, predictor=unexpected)
    path = run / f"{EPOCHS[-1]}.pt"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"epoch-7\.pt: damaged"):
        eval_script.main(watched, ["--run", str(run)])


def test_damaged_newest_gives_way_to_the_one_before(
    run: Path, project: ScriptProject, cfg: FakeConfig, spec: DatasetSpec
) -> None:
    (run / "last.pt").rename(run / "last.prev.pt")
    (run / "last.pt").write_bytes(b"damaged")
    assert eval_script.main(project, ["--run", str(run)]) == 0
    assert report(run)["miou_last"] == measured(cfg, spec, 1, "branch1").miou
    assert report(run)["checkpoints"]["last"] == str(run / "last.pt")


@pytest.mark.parametrize("role", ["branch2", "both"])
def test_another_network_gets_a_report_of_its_own(
    run: Path, project: ScriptProject, cfg: FakeConfig, spec: DatasetSpec, role: str
) -> None:
    eval_script.main(project, ["--run", str(run), "--network", role])
    ours = report(run, f"eval_whole_image_val_{role}.json")
    assert ours["network"] == role
    assert ours["miou_best"] == measured(cfg, spec, 0, role).miou != measured(cfg, spec, 0, "branch1").miou
    assert not (run / "eval_whole_image_val.json").exists()


def test_pictures_are_those_of_the_first_checkpoint(
    run: Path, every: ScriptProject, spec: DatasetSpec, tmp_path: Path
) -> None:
    eval_script.main(every, ["--run", str(run), "--save", str(tmp_path / "pictures")])
    intersection, union = np.zeros(3), np.zeros(3)
    for item in spec.read_list("val"):
        pred = np.array(Image.open(tmp_path / "pictures" / "gray" / f"{item.id}.png"))
        color = np.array(Image.open(tmp_path / "pictures" / "color" / f"{item.id}.png"))
        np.testing.assert_array_equal(color, spec.palette[pred])
        label = spec.load_label(item)
        for k in range(3):
            intersection[k] += ((pred == k) & (label == k)).sum()
            union[k] += ((pred == k) | (label == k)).sum()
    assert (intersection / (union + 1e-10)).mean() == pytest.approx(report(run)["miou_epoch-9"], abs=1e-12)


def test_one_file_carries_its_configuration(
    run: Path, project: ScriptProject, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "epoch-8.pt"
    eval_script.main(project, ["--checkpoint", str(path)])
    alone = capsys.readouterr().out
    assert not list(run.glob("eval_*"))
    eval_script.main(project, ["--config", str(run / "config.yaml"), "--checkpoint", str(path)])
    assert capsys.readouterr().out == alone
    assert alone.startswith(f"{path}: branch1, whole_image")


def test_config_stands_for_its_run_below_the_project(
    run: Path, project: ScriptProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "some.yaml").write_text((run / "config.yaml").read_text())
    assert eval_script.main(project, ["--config", str(tmp_path / "some.yaml")]) == 0
    assert report(run)["checkpoints"]["best"] == str(run / "best.pt")
    with pytest.raises(UserError, match=r"some\.yaml: no run of it in runs/some/seed5 or .*runs/some/seed5;"):
        eval_script.main(project, ["--config", str(tmp_path / "some.yaml"), "run.seed=5"])


def test_flags_and_second_names_of_a_project(run: Path, project: ScriptProject) -> None:
    arguments = eval_script.parser(project, {"--checkpoint": ["--model_path"], "--save": ["--save_dir"]})
    arguments.add_argument("--is_slide", action="store_true")

    def flags(args: argparse.Namespace, cfg: FakeConfig) -> list[str]:
        side = cfg.data.crop_size[0] // 2
        return ["eval.protocol=sliding_window", f"eval.crop_size=[{side}, {side}]"] if args.is_slide else []

    def target(*words: str) -> Target:
        return find_target(project, arguments.parse_intermixed_args(list(words)), flags)

    for source in (("--run", str(run)), ("--model_path", str(run / "best.pt"))):
        assert target(*source).cfg.eval.protocol == "whole_image"
        slide = target(*source, "--is_slide").cfg.eval
        assert (slide.protocol, slide.crop_size) == ("sliding_window", (16, 16))
        own = target(*source, "data.crop_size=[64, 64]", "--is_slide").cfg.eval
        assert own.crop_size == (32, 32)  # the flags know the configuration with its overrides
        last = target(*source, "--is_slide", "eval.crop_size=[8, 8]").cfg.eval
        assert last.crop_size == (8, 8)  # which have the last word
    assert eval_script.main(project, ["--run", str(run), "--is_slide"], arguments, flags) == 0
    assert report(run, "eval_sliding_window_val.json")["protocol"]["crop_size"] == [16, 16]


def test_check_compares_the_first_checkpoint(run: Path, every: ScriptProject) -> None:
    eval_script.main(every, ["--run", str(run)])
    reached = 100 * report(run)["miou_epoch-9"]
    command = ["--run", str(run), "--check"]
    assert eval_script.main(every, [*command, f"expect.miou={reached + 0.09}", "expect.tolerance=0.1"]) == 0
    assert eval_script.main(every, [*command, f"expect.miou={reached + 0.11}", "expect.tolerance=0.1"]) == 1
    with pytest.raises(UserError, match=r"has no expect\.miou"):
        eval_script.main(every, command)


def test_mistakes_are_named(
    run: Path, project: ScriptProject, every: ScriptProject, cfg: FakeConfig, spec: DatasetSpec, tmp_path: Path
) -> None:  # fmt: skip
    best, contents = str(run / "best.pt"), fake_checkpoint(cfg, spec)
    other, alone, authors = (tmp_path / f"{name}.pt" for name in ("other", "alone", "authors"))
    save(other, contents | {"project": "somebody"})
    save(alone, contents | {"networks": {"branch1": contents["networks"]["branch1"]}})
    torch.save({"model": {"a": torch.zeros(1)}, "best": np.float64(0.7)}, authors)
    two = write_dataset(tmp_path / "two", classes=2)
    mistakes = [
        ([], "eval.py: nothing to measure; give --run RUN_DIR, --config configs/some.yaml or"),
        (["--run", str(tmp_path)], f"--run {tmp_path}: no config.yaml there"),
        (["--run", str(run), "--config", "x.yaml"], "name one of them"),
        (["--checkpoint", str(tmp_path / "no.pt")], "no.pt: no such checkpoint"),
        (["--checkpoint", best, "model.kernel=3"], "do not fit"),
        (["--checkpoint", best, "model.kernal=3"], "did you mean 'model.kernel'?"),
        (["--checkpoint", best, "modell.kernel=3"], "unknown key 'modell'; did you mean 'model'?"),
        (["--checkpoint", best, "model.kernel=[3"], "the value is not valid YAML"),
        (["--checkpoint", best, f"data.dataset={two}"], "was trained on 3 classes (meadow, pond, barn, ...)"),
        (["--checkpoint", str(alone), "--network", "branch2"], "holds no branch2; use --network branch1"),
        (
            ["--checkpoint", str(other)],
            "other.pt: made by project 'somebody'; give a checkpoint of fake, or convert a file",
        ),
        (
            ["--checkpoint", str(authors)],
            "made by project 'unknown'; give a checkpoint of fake, or convert a file of the authors",
        ),
    ]
    for command, message in mistakes:
        with pytest.raises(UserError) as error:
            eval_script.main(project, command)
        assert message in str(error.value), command
    save(run / "epoch-8.pt", contents | {"project": "somebody"})
    with pytest.raises(
        UserError, match=r"epoch-8\.pt: made by project 'somebody'; give a checkpoint of fake"
    ):
        eval_script.main(every, ["--run", str(run)])
    for weights in run.glob("*.pt"):
        weights.unlink()
    with pytest.raises(UserError, match=r"seed2: holds neither best\.pt nor last\.pt; train first"):
        eval_script.main(project, ["--run", str(run)])
    with pytest.raises(UserError, match=r"seed2: holds no checkpoint; train first"):
        eval_script.main(every, ["--run", str(run)])


def test_configuration_of_a_checkpoint(cfg: FakeConfig, spec: DatasetSpec) -> None:
    saved = fake_checkpoint(cfg, spec)
    assert config_of(FakeConfig, saved, [], "here") == cfg
    changed = config_of(FakeConfig, saved, ["model.kernel=5", "eval.scales=[0.5, 1.0]"], "here")
    assert (changed.model.kernel, changed.eval.scales) == (5, (0.5, 1.0))
    assert saved["config"]["model"]["kernel"] == 1


def test_further_networks_have_a_table_and_a_report_of_their_own(
    run: Path, tmp_path: Path, cfg: FakeConfig, spec: DatasetSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    first, other = fake_project(tmp_path).networks[:2]
    project = fake_project(tmp_path, further_networks=lambda cfg: (other,))
    assert eval_script.main(project, ["--run", str(run)]) == 0
    shown = capsys.readouterr().out
    assert shown.index(f"{run}: {first}, ") < shown.index(f"{run}: {other}, ")
    for name, role in (("eval_whole_image_val.json", first), (f"eval_whole_image_val_{other}.json", other)):
        assert report(run, name)["network"] == role
        assert report(run, name)["miou_best"] == measured(cfg, spec, 0, role).miou
    assert eval_script.main(project, ["--run", str(run), "--network", first]) == 0
    assert f"{run}: {other}, " not in capsys.readouterr().out


def test_a_project_may_change_the_scores_of_a_network(
    run: Path, tmp_path: Path, cfg: FakeConfig, spec: DatasetSpec
) -> None:
    """By the images' ids, for the networks it likes, with what lies in the run directory."""
    asked: list[tuple[str, Path | None]] = []
    ids: set[str] = set()

    def only_class_1(names: Any, scores: torch.Tensor) -> torch.Tensor:
        ids.update(names)
        return scores * 0 + torch.eye(scores.shape[1])[1][:, None, None]

    def refine(cfg: FakeConfig, given: DatasetSpec, role: str, run_dir: Path | None, dist: Dist) -> Any:
        assert given.name == spec.name
        asked.append((role, run_dir))
        return only_class_1 if role == "branch2" else None

    project = fake_project(tmp_path, refine=refine, further_networks=lambda cfg: ("branch2",))
    assert eval_script.main(project, ["--run", str(run)]) == 0
    assert asked == [(role, run) for role in ("branch1", "branch1", "branch2", "branch2")]
    assert ids == {item.id for item in spec.read_list("val")}
    assert report(run)["miou_best"] == measured(cfg, spec, 0, "branch1").miou
    changed = report(run, "eval_whole_image_val_branch2.json")["best"]["iou"]
    assert [name for name, iou in changed.items() if iou > 0] == [spec.classes[1]]
