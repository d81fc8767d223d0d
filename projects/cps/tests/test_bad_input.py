"""Every mistake ends in one clear line and a non-zero exit code, before anything is lost."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.data.streams import TrainingData
from common.errors import run_main
from projects.cps import eval as evaluation
from projects.cps import train
from projects.cps.tests.test_resume import write
from tests.tiny import write_dataset

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def farm(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "farm")


def failure(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], program, *arguments: str
) -> str:
    """The one error line of a program in this process."""
    monkeypatch.setattr(sys, "argv", ["program.py", *arguments])
    monkeypatch.delenv("SSS_DATA", raising=False)
    with pytest.raises(SystemExit) as stop:
        run_main(program)
    lines = [line for line in capfd.readouterr().err.splitlines() if "warning" not in line.lower()]
    assert stop.value.code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def expect(line: str, *parts: str) -> None:
    missing = [part for part in parts if part not in line]
    assert not missing, f"{missing} not in: {line}"


def small(path: Path, dataset: Path, method: str = "cps", **sections: dict) -> Path:
    data = {"dataset": str(dataset), "split": "few", "val": "val"}
    eval_ = {"protocol": "whole_image", "during_training": "whole_image", "list": "val"}
    return write(path, dataset.parent, method, **({"data": data, "eval": eval_} | sections))


@pytest.fixture
def fails(monkeypatch, capfd, tmp_path, farm):
    """Runs the tiny configuration with changed sections or overrides and returns the error line."""

    def run(*overrides: str, method: str = "cps", dataset: Path = farm, **sections: dict) -> str:
        config = small(tmp_path / "c.yaml", dataset, method, **sections)
        words = ["--config", str(config), f"run.dir={tmp_path / 'run'}", *overrides]
        return failure(monkeypatch, capfd, train.main, *words)

    return run


def test_missing_data_root(fails) -> None:
    line = fails("data.dataset=voc", "data.root=/nowhere/voc", "data.split=cps/1323")
    expect(line, "/nowhere/voc", "SSS_DATA")


def test_missing_list_names_the_command(fails, tmp_path: Path) -> None:
    for part in ("JPEGImages", "SegmentationClassAug"):
        (tmp_path / "voc" / part).mkdir(parents=True)
    line = fails("data.dataset=voc", f"data.root={tmp_path / 'voc'}", "data.split=cps/1323")
    expect(line, "python -m common.data.splits get voc/cps/1323")


def test_missing_own_split_names_the_command(fails) -> None:
    expect(fails("data.split=half"), "half", "python -m common.data.splits make")


def test_nothing_unlabeled(fails, farm: Path) -> None:
    (farm.parent / "splits" / "few" / "unlabeled.txt").write_text("")
    expect(fails(), "unlabeled.txt", "is empty", "split 'full'")


def test_split_without_unlabeled_images(fails) -> None:
    line = fails("data.dataset=shapes", "data.split=full")
    expect(line, "data.split=full", "no unlabeled images", "method.name=cps")


def test_id_without_a_file(fails, farm: Path) -> None:
    (farm.parent / "img" / "p002.jpg").unlink()
    expect(fails(), "labeled.txt:3", "p002")


def test_truncated_jpeg(fails, farm: Path) -> None:
    path = farm.parent / "img" / "p001.jpg"
    path.write_bytes(path.read_bytes()[:300])
    expect(fails(), "p001.jpg")


@pytest.mark.parametrize(
    "override", ["optim.momentun=0.9", "quirks.train_mode_label=false", "method.cps_wieght=1"]
)
def test_unknown_key(fails, override: str) -> None:
    section, _, key = override.partition("=")[0].partition(".")
    expect(fails(override), f"unknown key '{section}.{key}'", f"did you mean '{section}.")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optim.epochs=many", ["optim.epochs", "many", "whole number"]),
        ("method.name=ccc", ["'method.name' is 'ccc'", "cps_cutmix"]),
        ("method.cps_weight=-1", ["'cps_weight' is -1"]),
        ("method.cutmix.prop_range=[0.5,0.2]", ["'prop_range' is (0.5, 0.2)"]),
        ("keep.newest=0", ["'newest' is 0"]),
        ("quirks.loss_world_size=0", ["'loss_world_size' is 0"]),
        ("optim.paper_processes=4", ["'optim.batch_size' is 2", "multiple of optim.paper_processes=4"]),
        ("model.weights=imagenet.pth", ["imagenet.pth", "SSS_WEIGHTS", "model.weights=none"]),
        ("optim.batch_size=64", ["10 labeled images", "one batch of 64"]),
        ("optim.batch_size=1", ["optim.batch_size=1", "one image per process", "BatchNorm"]),
        ("data.epoch_images=0", ["data.epoch_images=0"]),
        ("data.rotation=[-10,10]", ["data.rotation", "CPS has neither"]),
    ],
)  # fmt: skip
def test_settings(fails, override: str, parts: list[str]) -> None:
    expect(fails(override), *parts)


@pytest.mark.parametrize("method", ["sup_only", "cct"])
def test_a_network_that_the_method_lacks(fails, method: str) -> None:
    """Said before the training, not after it."""
    line = fails("eval.network=branch2", method=method)
    expect(line, "eval.network=branch2", f"method {method}", "use one of branch1")


def test_crops_that_cct_and_gct_cannot_take(fails) -> None:
    expect(fails("data.crop_size=[33,33]", method="cct"), "cct", "33x33", "multiples of 4")
    published = "method.gct.detector_strides=[2,2,1,2,1,2,1,2]"
    expect(fails(published, method="gct"), "gct", "32x32", "at least 60", "detector_strides")


def one_step(tmp_path: Path, farm: Path) -> Path:
    config = small(tmp_path / "a.yaml", farm)
    assert train.main(["--config", str(config), f"run.dir={tmp_path / 'first'}", "run.max_steps=1"]) == 0
    return tmp_path / "first"


def test_checkpoint_of_another_architecture_or_setting(fails, tmp_path: Path, farm: Path) -> None:
    first = one_step(tmp_path, farm)
    expect(fails(f"run.init={first}", "model.inner_planes=24"), "last.pt", "do not fit", "8", "24")
    expect(fails(f"run.resume={first}", "optim.lr=0.5"), "optim.lr", "0.02", "0.5")


def test_checkpoint_cut_in_half(fails, tmp_path: Path, farm: Path) -> None:
    first = one_step(tmp_path, farm)
    data = (first / "last.pt").read_bytes()
    (first / "last.pt").write_bytes(data[: len(data) // 2])
    expect(fails(f"run.resume={first}"), "last.pt", "readable")
    expect(fails(f"run.init={first / 'last.pt'}"), "last.pt", "damaged")


def test_backbone_weights_of_another_network(fails, tmp_path: Path) -> None:
    """Q14: the original loads whatever fits and says nothing."""
    torch.save({"features.0.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "other.pth")
    expect(fails(f"model.weights={tmp_path / 'other.pth'}"), "other.pth")


def test_unwritable_run_directory(fails, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    expect(fails(f"run.dir={tmp_path / 'file' / 'run'}"), "file/run", "choose")


def test_nan_image_stops_before_the_step_and_is_named(
    fails, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original, names = TrainingData.epoch, []

    def broken(self: TrainingData, *args):
        for i, group in enumerate(original(self, *args)):
            if i == 2:
                ((_labeled, unlabeled),) = group
                unlabeled.image[1] = torch.nan
                names.append(self.loaders["unlabeled"].dataset.items[int(unlabeled.index[1])].id)
            yield group

    monkeypatch.setattr(TrainingData, "epoch", broken)
    line = fails(run={"save_interval": 1, "log_interval": 1, "panels": False, "device": "cpu"})
    expect(line, "step 3", "loss_cps is nan", "images p0", *names, "last.pt", "run.on_nonfinite=skip")
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert saved["step"] == 2  # the good checkpoint is the one before the bad step
    assert all(v.isfinite().all() for network in saved["networks"].values() for v in network.values())


def test_nothing_to_measure(monkeypatch, capfd, tmp_path: Path, farm: Path) -> None:
    """Q13: the original goes on with random weights."""
    first = one_step(tmp_path, farm)
    capfd.readouterr()
    line = failure(monkeypatch, capfd, evaluation.main, "--run", str(first), "--epochs", "1-2")
    expect(line, "--epochs 1-2", "has kept none", "keep.every_epochs=1")
    line = failure(monkeypatch, capfd, evaluation.main, "--run", str(tmp_path / "nowhere"))
    expect(line, "nowhere")


def shell(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(ROOT / "projects/cps/train.sh"), *arguments],
        capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip


@pytest.mark.smoke
def test_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = shell("2", str(taken.getsockname()[1]), "configs/smoke.yaml")
    assert done.returncode != 0
    expect(done.stderr, "error: ", "in use")
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.smoke
def test_bad_process_count_and_missing_config() -> None:
    done = shell("two", "29500", "configs/smoke.yaml")
    assert done.returncode != 0
    expect(done.stderr, "error: ", "two")
    done = shell("1", "29500", "configs/nowhere.yaml")
    assert done.returncode != 0
    expect(done.stderr, "configs/nowhere.yaml")
    assert len(done.stderr.strip().splitlines()) == 1
