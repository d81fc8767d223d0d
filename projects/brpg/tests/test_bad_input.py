"""Every mistake ends in one clear line and a non-zero exit code, before anything is lost."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from common.errors import run_main
from projects.brpg import train
from projects.brpg.tests.toys import write_config
from tests.tiny import write_dataset

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def farm(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "farm")


def failure(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one error line of a training run in this process."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    monkeypatch.delenv("SSS_DATA", raising=False)
    with pytest.raises(SystemExit) as stop:
        run_main(train.main)
    lines = [line for line in capfd.readouterr().err.splitlines() if "warning" not in line.lower()]
    assert stop.value.code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def expect(line: str, *parts: str) -> None:
    missing = [part for part in parts if part not in line]
    assert not missing, f"{missing} not in: {line}"


@pytest.fixture
def fails(monkeypatch, capfd, tmp_path, farm):
    """Runs the tiny configuration with changed sections or overrides and returns the error line."""

    def run(*overrides: str, split: str = "few", dataset: Path = farm, **sections: dict) -> str:
        config = write_config(tmp_path / "c.yaml", dataset, split, **sections)
        return failure(monkeypatch, capfd, "--config", str(config), f"run.dir={tmp_path / 'run'}", *overrides)

    return run


def test_missing_data_root(fails) -> None:
    expect(
        fails("data.dataset=voc", "data.root=/nowhere/voc", "data.split=classic/366"),
        "/nowhere/voc",
        "SSS_DATA",
    )


def test_missing_list_names_the_command(fails, tmp_path: Path) -> None:
    for part in ("JPEGImages", "SegmentationClassAug"):
        (tmp_path / "voc" / part).mkdir(parents=True)
    line = fails("data.dataset=voc", f"data.root={tmp_path / 'voc'}", "data.split=u2pl/5291")
    expect(line, "python -m common.data.splits get voc/u2pl/5291")


def test_missing_own_split_names_the_command(fails) -> None:
    expect(fails(split="half"), "half", "python -m common.data.splits make")


def test_id_without_a_file(fails, farm: Path) -> None:
    (farm.parent / "img" / "p002.jpg").unlink()
    expect(fails(), "labeled.txt:3", "p002")


def test_truncated_jpeg(fails, farm: Path) -> None:
    path = farm.parent / "img" / "p001.jpg"
    path.write_bytes(path.read_bytes()[:300])
    expect(fails(), "p001.jpg")


def test_label_of_another_size(fails, farm: Path) -> None:
    Image.new("L", (20, 20)).save(farm.parent / "mask" / "p003.png")
    expect(fails(), "p003.png", "20x20", "48x40")


def test_label_value_out_of_range(fails, farm: Path) -> None:
    Image.new("L", (48, 40), color=7).save(farm.parent / "mask" / "p004.png")
    expect(fails(), "p004.png", "7", "3 classes")


def test_mask_of_0_and_255(fails, tmp_path: Path) -> None:
    two = write_dataset(tmp_path / "two", classes=2)
    for path in (two.parent / "mask").glob("*.png"):
        with Image.open(path) as mask:
            binary = mask.point(lambda value: 255 * value)
        binary.save(path)
    expect(fails(dataset=two), "255", "label_map")


def test_unknown_key(fails) -> None:
    expect(fails("optim.momentun=0.9"), "optim.momentun", "did you mean 'optim.momentum'")


def test_wrong_type(fails) -> None:
    expect(fails("optim.epochs=many"), "optim.epochs", "many", "whole number")


def test_unlabeled_shorter_than_labeled(fails, tmp_path: Path) -> None:
    short = write_dataset(tmp_path / "short", labeled=8, unlabeled=3)
    expect(fails(dataset=short), "8 labeled and 3 unlabeled")


def test_checkpoint_of_another_architecture(fails, tmp_path: Path, farm: Path) -> None:
    first = tmp_path / "first"
    config = write_config(tmp_path / "a.yaml", farm, "few")
    assert train.main(["--config", str(config), f"run.dir={first}", "run.max_steps=1"]) == 0
    expect(fails(f"run.init={first}", "model.inner_planes=24"), "last.pt", "do not fit", "16", "24")
    expect(fails(f"run.resume={first}", "optim.lr=0.5"), "optim.lr", "0.01", "0.5")


def test_checkpoint_cut_in_half(fails, tmp_path: Path, farm: Path) -> None:
    first = tmp_path / "first"
    config = write_config(tmp_path / "a.yaml", farm, "few")
    assert train.main(["--config", str(config), f"run.dir={first}", "run.max_steps=1"]) == 0
    data = (first / "last.pt").read_bytes()
    (first / "last.pt").write_bytes(data[: len(data) // 2])
    expect(fails(f"run.resume={first}"), "last.pt", "readable")
    expect(fails(f"run.init={first / 'last.pt'}"), "last.pt", "damaged")


def test_weights_that_are_not_there(fails) -> None:
    expect(fails("model.weights=imagenet.pth"), "imagenet.pth", "SSS_WEIGHTS", "model.weights=none")


def test_unwritable_run_directory(fails, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    expect(fails(f"run.dir={tmp_path / 'file' / 'run'}"), "file/run", "choose")


def test_batch_that_cannot_be_shared(fails) -> None:
    expect(fails("optim.device_batch=3", "optim.batch_size=4"), "optim.device_batch=3", "divisor of 4")


def test_batch_larger_than_the_data(fails) -> None:
    expect(fails("optim.batch_size=64"), "64")


def test_class_that_does_not_exist(fails) -> None:
    expect(fails("method.fix_classes=[7]"), "method.fix_classes: class 7", "0 to 2")


def test_too_few_features_for_the_clustering(fails) -> None:
    line = fails("method.scarce_classes=stop", "method.high_threshold=1.1", "method.pseudo_threshold=1.1")
    expect(line, "clustering: class 'meadow'", "method.collect_epochs", "method.scarce_classes=fewer")


def test_nan_loss_stops_before_the_step(fails, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original, calls = train.supervised_step, []

    def broken(*args):
        result = original(*args)
        calls.append(1)
        if len(calls) < 3:
            return result
        return result._replace(
            total=result.total * torch.nan, terms={"loss_sup": result.terms["loss_sup"] * torch.nan}
        )

    monkeypatch.setattr(train, "supervised_step", broken)
    line = fails(run={"save_interval": 1, "log_interval": 1, "panels": False})
    expect(line, "step 3", "loss_sup is nan", "images p0", "last.pt", "run.on_nonfinite=skip")
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert saved["step"] == 2  # the good checkpoint is the one before the bad step
    assert all(value.isfinite().all() for value in saved["networks"]["student"].values())


def shell(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(ROOT / "projects/brpg/train.sh"), *arguments],
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
