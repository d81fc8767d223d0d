"""Every mistake ends in one clear line and a non-zero exit code, before anything is lost: what holds for all projects.

What only one of them can be given wrongly is tested in its own `test_bad_input.py`.
"""

from __future__ import annotations

import importlib
import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from common.config import load_config
from common.errors import UserError
from tests.mistakes import ROOT, Fails, Writer, dataset, expect, shell
from tests.tiny import write_dataset
from tools import ready


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
        Project("unimatch", "projects.unimatch.tests.toys", published="classic/92"),
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
    """What is missing on a fresh machine is said at once, each with its command, in a dry run too."""
    weights = "model.weights=resnet101_imagenet.pth"
    words = ("data.dataset=voc", "data.root=/nowhere/voc", f"data.split={project.published}", weights)
    for more in ((), ("run.dry_run=true",)):
        root, split, val, weight = fails.all(*words, "eval.list=val", *more)
        expect(root, "/nowhere/voc", "SSS_DATA", "python -m splits prepare voc --source DIR --out DIR")
        expect(split, project.published, f"run 'python -m splits get voc/{project.published}'")
        expect(val, "the 'val' list is missing", "run 'python -m splits get voc/val'")
        expect(weight, "model.weights=resnet101_imagenet.pth", "SSS_WEIGHTS")
    assert not (fails.folder / "run").exists()


def test_missing_list_names_the_command(project: Project, fails: Fails, tmp_path: Path) -> None:
    for part in ("JPEGImages", "SegmentationClassAug"):
        (tmp_path / "voc" / part).mkdir(parents=True)
    line, val = fails.all(
        "data.dataset=voc", f"data.root={tmp_path / 'voc'}", f"data.split={project.published}"
    )
    expect(line, f"python -m splits get voc/{project.published}")
    expect(val, "python -m splits get voc/val")


def test_everything_that_evaluation_will_need_is_looked_at_first(fails: Fails, tmp_path: Path) -> None:
    folder = fails.farm.parent
    text = (folder / "val.txt").read_text()
    (folder / "mask/p017.png").unlink()
    (folder / "img/p018.jpg").unlink()
    expect(fails(), "val.txt:2: no mask for 'p017'", "(1 more such lines)", "restore the file")
    (folder / "val.txt").unlink()
    expect(fails("run.dry_run=true"), "the 'val' list is missing; write it, one id per line")
    (folder / "val.txt").write_text(text.replace("p017", "p099"))
    (folder / "test.txt").write_text("p016\n")
    (folder / "file").write_text("")
    lines = fails.all(
        "data.val=test.txt", "eval.list=none.txt", f"run.dir={folder / 'file/run'}", "run.init=gone.pt"
    )
    for line, part in zip(lines, ("none.txt: no such list", "run.init=gone.pt", "is a file"), strict=True):
        assert part in line
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_seen_first(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    expect(fails(), "run.dir=", "1 MiB are free there; free space, or choose another run directory")
    monkeypatch.setattr(ready, "LEAST_SPACE", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    expect(fails(), "the checkpoints take about", "free space, or choose another run directory (run.dir=DIR)")


def test_damaged_evaluation_files_do_not_cost_the_training(
    project: Project, fails: Fails, tmp_path: Path
) -> None:
    """They cannot be seen without opening every file; the run is saved before it is measured for the first time."""
    path = fails.farm.parent / "mask/p018.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    expect(fails("eval.every_epochs=1"), "p018.png: mask cannot be read")
    assert (tmp_path / "run/last.pt").is_file()
    path.write_bytes(whole)
    run = ["--config", str(tmp_path / "c.yaml"), f"run.dir={tmp_path / 'run'}", "eval.every_epochs=1"]
    assert project.train.main(run) == 0
    assert (tmp_path / "run/result.json").is_file()


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


def swap(path: Path, one: str, other: str) -> Callable[[], object]:
    """Puts two texts of a file at each other's places; a second time, back."""

    def swapped() -> None:
        parts = [part.replace(other, one) for part in path.read_text().split(one)]
        path.write_text(other.join(parts))

    return swapped


def in_turn(*paths: Path) -> Callable[[], object]:
    """Gives each file the content of the next."""

    def turned() -> None:
        contents = [path.read_bytes() for path in paths]
        for path, content in zip(paths, contents[1:] + contents[:1], strict=True):
            path.write_bytes(content)

    return turned


def first_lines(one: Path, other: Path) -> None:
    """Exchanges the first lines of two lists."""
    (first, rest), (second, others) = (path.read_text().split("\n", 1) for path in (one, other))
    one.write_text(f"{second}\n{rest}")
    other.write_text(f"{first}\n{others}")


def other_truths(farm: Path) -> dict[str, tuple[Callable[[], object], str]]:
    """What may happen to data between two starts: how it is done, and what the refusal names."""
    few = farm.parent / "splits/few"

    def add(line: str) -> Callable[[], object]:
        return lambda: farm.write_text(f"{farm.read_text()}{line}\n")

    return {
        "other labeled photos": (
            lambda: first_lines(few / "labeled.txt", few / "unlabeled.txt"),
            "the labeled list",
        ),
        "another order": (swap(few / "labeled.txt", "p001", "p002"), "the labeled list"),
        "one photo less": (
            lambda: (few / "unlabeled.txt").write_text("p006\np007\np009\n" * 4),
            "the unlabeled list",
        ),
        "another mask": (swap(few / "labeled.txt", "p003", "p003.jpg mask/p004.png"), "the labeled list"),
        "class names": (swap(farm, "- meadow", "- pond"), "the class names"),
        "renamed class": (swap(farm, "- barn", "- shed"), "the class names"),
        "label map": (add("label_map: {7: 1}"), "the label map"),
        "ignored value": (swap(farm, "ignore: 255", "ignore: [255, 9]"), "the ignored values"),
        "orientation": (add("orientation: stored"), "how photos are read"),
        "range": (add("value_range: [0, 99]"), "how photos are read"),
        "photos": (in_turn(*sorted((farm.parent / "img").iterdir())), "the photos themselves"),
        "masks": (in_turn(*sorted((farm.parent / "mask").iterdir())), "the masks themselves"),
    }


def begin(project: Project, fails: Fails, *overrides: str) -> list[str]:
    """A run of one step in the test's own folder; its command line."""
    config = project.write(fails.folder / "c.yaml", fails.farm, "few")
    words = ["--config", str(config), f"run.dir={fails.folder / 'run'}"]
    assert project.train.main([*words, "run.max_steps=1", *overrides]) == 0
    return words


def test_a_run_is_not_continued_under_another_truth(project: Project, fails: Fails, tmp_path: Path) -> None:
    begin(project, fails)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("run/*.pt")}
    shutil.copytree(fails.farm.parent, tmp_path / "kept")
    for what, (happens, words) in other_truths(fails.farm).items():
        happens()
        line = fails()
        expect(
            line, "run/last.pt: ", words, "changed since it was made", "begin anew in another run directory"
        )
        for path in (tmp_path / "kept").rglob("*.*"):
            shutil.copyfile(path, fails.farm.parent / path.relative_to(tmp_path / "kept"))
        assert {path.name: path.read_bytes() for path in tmp_path.glob("run/*.pt")} == before, what
    expect(fails("optim.lr=0.5"), "made with other settings")  # nothing else is refused now


def test_data_may_move_and_a_file_may_be_mended(project: Project, fails: Fails, tmp_path: Path) -> None:
    words, run, moved = begin(project, fails), tmp_path / "run", tmp_path / "moved"
    shutil.copytree(fails.farm.parent, moved)
    shutil.copyfile(moved / "mask/p001.png", moved / "mask/p000.png")
    assert project.train.main([*words, "run.max_steps=2", f"data.root={moved}"]) == 0
    assert torch.load(run / "last.pt", weights_only=True)["step"] == 2
    assert f"root: {moved}" in (run / "config.yaml").read_text()
    assert f"data: {moved}" in (run / "train.log").read_text()


def test_checkpoints_from_before_the_record_are_continued_and_it_is_said(
    project: Project, fails: Fails, tmp_path: Path
) -> None:
    words, run = begin(project, fails), tmp_path / "run"
    state = torch.load(run / "last.pt", weights_only=True)
    del state["truth"]
    torch.save(state, run / "last.pt")
    rename = swap(fails.farm, "- meadow", "- pond")
    rename()
    expect(fails(), "last.pt: the class names changed")
    rename()
    assert project.train.main([*words, "run.max_steps=2"]) == 0
    assert "only the classes were compared" in (run / "train.log").read_text()


def configuration(project: Project, path: Path) -> Any:
    return load_config(importlib.import_module(f"projects.{project.name}.config").Config, path)


def test_a_result_keeps_its_meaning(project: Project, fails: Fails, tmp_path: Path) -> None:
    config, path = project.write(tmp_path / "c.yaml", fails.farm, "few"), tmp_path / "run/result.json"
    words = ["--config", str(config), f"run.dir={path.parent}"]
    assert project.train.main(words) == 0
    before = path.read_bytes()
    said = json.loads(before)["truth"]
    assert said["classes"] == ["meadow", "pond", "barn"]
    assert {len(said[key]) for key in ("labeled", "unlabeled", "label_map", "list")} == {64}
    assert ready.truth_of(configuration(project, config)) == said  # what studies compare
    shutil.copytree(fails.farm.parent, tmp_path / "kept")
    truths = other_truths(fails.farm)
    last = path.with_name("last.pt").read_bytes()
    changes = {name: truths[name] for name in ("other labeled photos", "class names", "ignored value")}
    changes["list"] = (
        swap(fails.farm.parent / "val.txt", "p017", "p018.jpg mask/p016.png"),
        "the evaluation list",
    )
    for happens, parts in changes.values():
        happens()
        expect(fails(), "run/result.json: ", parts, "changed since it was made", "run.dir=DIR")
        path.with_name("last.pt").unlink()  # even where the run would begin anew
        expect(fails(), "run/result.json: ", parts)
        path.with_name("last.pt").write_bytes(last)
        for kept in (tmp_path / "kept").rglob("*.*"):
            shutil.copyfile(kept, fails.farm.parent / kept.relative_to(tmp_path / "kept"))
        assert path.read_bytes() == before
    assert project.train.main([*words, "eval.protocol=whole_image"]) == 0  # measured anew, as asked for


# --- numbers that are not finite -------------------------------------------------------------------------------

# a function of the training module, one of its losses, and the step at which it is called for the third time
LOSSES = {
    "brpg": ("supervised_step", "loss_sup", 3),
    "proto_consistency": ("train_step", "loss_unsup", 8),
    "u2pl": ("supervised_step", "loss_sup", 3),
    "unimatch": ("train_step", "loss_sup", 3),
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


@pytest.mark.smoke
def test_a_fresh_machine_is_told_everything_before_torch_is_loaded(project: Project, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    weights = f"model.weights={tmp_path / 'weights.pth'}"
    words = ("data.dataset=voc", "data.root=/nowhere", f"data.split={project.published}", weights)
    began = time.perf_counter()
    done = shell(project.name, "4", "29500", "configs/smoke.yaml", *words, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    remedies = ("splits prepare voc", f"splits get voc/{project.published}", "model.weights=none")
    expect(done.stderr, *remedies)
    assert all(line.startswith("error: ") for line in done.stderr.splitlines()), done.stderr
    assert time.perf_counter() - began < 10  # 0.4 s on an idle machine


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
