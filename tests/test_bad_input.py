"""Every mistake ends in one clear line and a non-zero exit code, before anything is lost: what holds for all projects.

What only one of them can be given wrongly is tested in its own `test_bad_input.py`.
"""

from __future__ import annotations

import importlib
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from common.errors import UserError
from tests.mistakes import ROOT, Fails, Writer, dataset, expect, shell
from tests.tiny import write_dataset


@dataclass(frozen=True)
class Project:
    """What the mistakes look like in a project.

    Attributes:
        writer: Module with `write_config(path, dataset, split, **sections)`.
        published: Lists of VOC that its papers use.
        wider: Override that makes another network, and what its refusal names.
        lr: Learning rate of the tiny configuration.
        large_batch: What the refusal of a batch of 64 names.
    """

    name: str
    writer: str
    published: str = "u2pl/5291"
    wider: tuple[str, ...] = ("model.inner_planes=24", "16", "24")
    lr: str = "0.01"
    large_batch: tuple[str, ...] = ("64",)

    @property
    def train(self) -> ModuleType:
        return importlib.import_module(f"projects.{self.name}.train")

    @property
    def write(self) -> Writer:
        return importlib.import_module(self.writer).write_config


PROJECTS = {
    project.name: project
    for project in (
        Project("brpg", "projects.brpg.tests.toys"),
        Project(
            "cps",
            "projects.cps.tests.toys",
            published="cps/1323",
            wider=("model.inner_planes=24", "8", "24"),
            lr="0.02",
            large_batch=("10 labeled images", "one batch of 64"),
        ),
        Project("proto_consistency", "projects.proto_consistency.tests.toys"),
        Project("s4gan_mlmt", "projects.s4gan_mlmt.tests.toys", wider=("model.width=8",), lr="0.002"),
        Project("u2pl", "tests.tiny"),
    )
}


@pytest.fixture(scope="module", params=PROJECTS)
def project(request: pytest.FixtureRequest) -> Project:
    return PROJECTS[request.param]


def all_but(**why: str) -> pytest.MarkDecorator:
    """The test is of every project but these, for the reason that is given."""
    return pytest.mark.parametrize("project", [name for name in PROJECTS if name not in why], indirect=True)


@pytest.fixture
def fails(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Fails:
    return Fails(project.train.main, project.write, tmp_path, monkeypatch, capfd)


@pytest.fixture(scope="module")
def one_step(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended after one step; not to be changed."""
    folder = tmp_path_factory.mktemp("first")
    config = project.write(folder / "c.yaml", dataset(folder / "farm"), "few")
    run = ["--config", str(config), f"run.dir={folder / 'run'}", "run.max_steps=1"]
    assert project.train.main(run) == 0
    return folder / "run"


def test_every_project_is_here() -> None:
    assert sorted(PROJECTS) == sorted(path.parent.name for path in ROOT.glob("projects/*/train.py"))


# --- data ------------------------------------------------------------------------------------------------------


def test_missing_data_root(project: Project, fails: Fails) -> None:
    line = fails("data.dataset=voc", "data.root=/nowhere/voc", f"data.split={project.published}")
    expect(line, "/nowhere/voc", "SSS_DATA")


def test_missing_list_names_the_command(project: Project, fails: Fails, tmp_path: Path) -> None:
    for part in ("JPEGImages", "SegmentationClassAug"):
        (tmp_path / "voc" / part).mkdir(parents=True)
    line = fails("data.dataset=voc", f"data.root={tmp_path / 'voc'}", f"data.split={project.published}")
    expect(line, f"python -m splits get voc/{project.published}")


def test_missing_own_split_names_the_command(fails: Fails) -> None:
    expect(fails(split="half"), "half", "python -m splits make")


def test_id_without_a_file(fails: Fails) -> None:
    (fails.farm.parent / "img" / "p002.jpg").unlink()
    expect(fails(), "labeled.txt:3", "p002")


def test_truncated_jpeg(fails: Fails) -> None:
    path = fails.farm.parent / "img" / "p001.jpg"
    path.write_bytes(path.read_bytes()[:300])
    expect(fails(), "p001.jpg")


def test_label_of_another_size(fails: Fails) -> None:
    Image.new("L", (20, 20)).save(fails.farm.parent / "mask" / "p003.png")
    expect(fails(), "p003.png", "20x20", "48x40")


def test_label_value_out_of_range(fails: Fails) -> None:
    Image.new("L", (48, 40), color=7).save(fails.farm.parent / "mask" / "p004.png")
    expect(fails(), "p004.png", "label value 7", "none of the 3 classes")


def test_mask_of_0_and_255(fails: Fails, tmp_path: Path) -> None:
    two = write_dataset(tmp_path / "two", classes=2)
    for path in (two.parent / "mask").glob("*.png"):
        with Image.open(path) as mask:
            binary = mask.point(lambda value: 255 * value)
        binary.save(path)
    expect(fails(dataset=two), "255", "label_map")


@all_but(
    cps="an epoch takes a number of images of each list, which are read as often as that needs",
    s4gan_mlmt="each list is read again and again, on its own",
)
def test_unlabeled_shorter_than_labeled(fails: Fails, tmp_path: Path) -> None:
    short = write_dataset(tmp_path / "short", labeled=8, unlabeled=3)
    expect(fails(dataset=short), "8 labeled and 3 unlabeled")


# --- settings --------------------------------------------------------------------------------------------------


def test_unknown_key(fails: Fails) -> None:
    expect(fails("optim.momentun=0.9"), "unknown key 'optim.momentun'", "did you mean 'optim.momentum'")


def test_wrong_type(fails: Fails) -> None:
    expect(fails("optim.epochs=many"), "optim.epochs", "many", "whole number")


def test_weights_that_are_not_there(fails: Fails) -> None:
    expect(fails("model.weights=imagenet.pth"), "imagenet.pth", "SSS_WEIGHTS", "model.weights=none")


def test_unwritable_run_directory(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    expect(fails(f"run.dir={tmp_path / 'file' / 'run'}"), "file/run", "choose")


def test_batch_that_cannot_be_shared(fails: Fails) -> None:
    expect(fails("optim.device_batch=3", "optim.batch_size=4"), "optim.device_batch=3", "divisor of 4")


@all_but(s4gan_mlmt="a list that is shorter than a batch is one batch")
def test_batch_larger_than_the_data(project: Project, fails: Fails) -> None:
    expect(fails("optim.batch_size=64"), *project.large_batch)


# --- checkpoints -----------------------------------------------------------------------------------------------


def test_checkpoint_of_another_architecture_or_setting(
    project: Project, fails: Fails, one_step: Path
) -> None:
    wider, *sizes = project.wider
    expect(fails(f"run.init={one_step}", wider), "last.pt", "do not fit", *sizes)
    expect(fails(f"run.resume={one_step}", "optim.lr=0.5"), "optim.lr", project.lr, "0.5")


def test_checkpoint_cut_in_half(fails: Fails, one_step: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(one_step, tmp_path / "first"))
    data = (copy / "last.pt").read_bytes()
    (copy / "last.pt").write_bytes(data[: len(data) // 2])
    expect(fails(f"run.resume={copy}"), "last.pt", "readable")
    expect(fails(f"run.init={copy / 'last.pt'}"), "last.pt", "damaged")


# --- numbers that are not finite -------------------------------------------------------------------------------

# a function of the training module, one of its losses, and the step at which it is called for the third time
LOSSES = {
    "brpg": ("supervised_step", "loss_sup", 3),
    "proto_consistency": ("train_step", "loss_unsup", 8),
    "u2pl": ("supervised_step", "loss_sup", 3),
}
# what gives the batches of the steps, and the loss that an unlabeled image spoils
BATCHES = {
    "cps": ("common.data.streams.TrainingData.epoch", "loss_cps"),
    "s4gan_mlmt": ("projects.s4gan_mlmt.data.TrainingStreams.steps", ""),
}
OFTEN = ("run.save_interval=1", "run.log_interval=1")


def assert_good_checkpoint(run_dir: Path, step: int) -> None:
    """It is the one before the bad step."""
    saved = torch.load(run_dir / "last.pt", weights_only=True)
    assert saved["step"] == step
    assert all(v.isfinite().all() for network in saved["networks"].values() for v in network.values())


def test_every_project_is_given_numbers_that_are_not_finite() -> None:
    assert sorted([*LOSSES, *BATCHES]) == sorted(PROJECTS)


@pytest.mark.parametrize("project", LOSSES, indirect=True)
def test_nan_loss_stops_before_the_step(
    project: Project, fails: Fails, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    function, loss, step = LOSSES[project.name]
    original, calls = getattr(project.train, function), []

    def broken(*args: Any) -> Any:
        result = original(*args)
        if loss in result.terms:  # not in the epochs before
            calls.append(1)
        if len(calls) < 3:
            return result
        nan = result.terms[loss] * torch.nan
        return result._replace(total=result.total + nan, terms=result.terms | {loss: nan})

    monkeypatch.setattr(project.train, function, broken)
    line = fails(*OFTEN)
    expect(line, f"step {step}", f"{loss} is nan", "images p0", "last.pt", "run.on_nonfinite=skip")
    assert_good_checkpoint(tmp_path / "run", step - 1)


@pytest.mark.parametrize("project", BATCHES, indirect=True)
def test_nan_image_stops_before_the_step_and_is_named(
    project: Project, fails: Fails, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name, loss = BATCHES[project.name]
    module, of_class, function = name.rsplit(".", 2)
    source = getattr(importlib.import_module(module), of_class)
    original, names = getattr(source, function), []

    def broken(self: Any, *args: Any) -> Iterator[Any]:
        for i, group in enumerate(original(self, *args)):
            if i == 2:
                ((_labeled, unlabeled, *_others),) = group
                unlabeled.image[1] = torch.nan
                names.append(self.loaders["unlabeled"].dataset.items[int(unlabeled.index[1])].id)
            yield group

    monkeypatch.setattr(source, function, broken)
    line = fails(*OFTEN)
    expect(line, "step 3", f"{loss} is nan", "images p0", *names, "last.pt", "run.on_nonfinite=skip")
    assert names
    assert_good_checkpoint(tmp_path / "run", 2)


# --- shell scripts ---------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_port_in_use(project: Project) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = shell(project.name, "2", str(taken.getsockname()[1]), "configs/smoke.yaml")
    assert done.returncode == 2
    expect(done.stderr, "error: ", "in use")
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.smoke
def test_process_count_that_is_no_number(project: Project) -> None:
    done = shell(project.name, "two", "29500", "configs/smoke.yaml")
    assert done.returncode == 2
    expect(done.stderr, "error: ", "two")


NOWHERE = "configs/nowhere.yaml: no such configuration file; the project's are in its folder 'configs'"


def test_missing_config_is_named(project: Project) -> None:
    with pytest.raises(UserError) as error:
        project.train.main(["--config", "configs/nowhere.yaml"])
    assert str(error.value) == NOWHERE


@pytest.mark.smoke
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "u2pl" else pytest.mark.slow) for name in PROJECTS]
)
def test_missing_config_is_one_line_and_exit_code_2(name: str) -> None:
    done = shell(name, "1", "29500", "configs/nowhere.yaml")
    assert done.returncode == 2
    assert done.stderr == f"error: {NOWHERE}\n"
