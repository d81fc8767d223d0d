"""Mistakes end in one clear line and a non-zero exit code, before anything is lost."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from common.data.datasets import load_spec
from common.errors import run_main
from projects.proto_consistency import bench, train
from projects.proto_consistency.initial import save_prototypes
from projects.proto_consistency.tests.toys import write_config
from tests.tiny import CLASSES, write_dataset

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture
def farm(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "farm")


@pytest.fixture
def fails(monkeypatch, capfd, tmp_path, farm):
    """Runs the tiny configuration with changed sections or overrides and returns the error line."""

    def run(
        *overrides: str, split: str = "few", dataset: Path = farm, main=train.main, **sections: dict
    ) -> str:
        config = write_config(tmp_path / "c.yaml", dataset, split, **sections)
        monkeypatch.delenv("SSS_DATA", raising=False)
        where = [] if main is bench.main else [f"run.dir={tmp_path / 'run'}"]
        monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(config), *where, *overrides])
        with pytest.raises(SystemExit) as stop:
            run_main(main)
        lines = [line for line in capfd.readouterr().err.splitlines() if "warning" not in line.lower()]
        assert stop.value.code == 2
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0]

    return run


def expect(line: str, *parts: str) -> None:
    missing = [part for part in parts if part not in line]
    assert not missing, f"{missing} not in: {line}"


# --- prototypes ------------------------------------------------------------------------------------------------

FILE = "method.proto.source=file"


def test_no_file_of_prototypes_names_the_commands(fails) -> None:
    commands = ("_sup", "cluster", "method.proto.source=warmup_end")
    expect(fails(FILE), "method.proto.init_path", "not set", *commands)
    expect(fails(FILE, "method.proto.init_path=/nowhere/p.npz"), "/nowhere/p.npz: no such file", *commands)


@pytest.mark.parametrize(
    ("classes", "per_class", "dim", "words"),
    [(3, 4, 32, "method.proto.per_class=2"), (2, 2, 32, "3 classes"), (3, 2, 16, "32 channels")],
)
def test_prototypes_of_another_configuration(fails, tmp_path: Path, classes, per_class, dim, words) -> None:
    path = tmp_path / "p.npz"
    save_prototypes(path, torch.ones(classes * per_class, dim), CLASSES[:classes], {})
    expect(fails(FILE, f"method.proto.init_path={path}"), "p.npz", words)


def test_prototypes_that_are_not_finite(fails, tmp_path: Path) -> None:
    path = tmp_path / "p.npz"
    save_prototypes(path, torch.full((6, 32), torch.nan), CLASSES, {})
    expect(fails(FILE, f"method.proto.init_path={path}"), "p.npz", "not finite")


def test_a_pickle_that_runs_code(fails, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    path = tmp_path / "class_wise_protos_4_perpixel.pickle"
    path.write_bytes(pickle.dumps([[Evil()]]))
    expect(fails(FILE, f"method.proto.init_path={path}"), path.name)
    assert not (tmp_path / "executed").exists()


def test_masks_without_any_labeled_pixel(fails, farm: Path) -> None:
    for path in (farm.parent / "mask").glob("*.png"):
        Image.new("L", (48, 40), color=255).save(path)
    expect(fails(), "no labeled pixel", "method.proto.source=random")


def test_a_class_that_no_photo_has_is_said_and_trains(farm: Path, tmp_path: Path, monkeypatch) -> None:
    """Its prototypes are random numbers and stay; nothing becomes infinite."""
    monkeypatch.delenv("SSS_DATA", raising=False)
    for path in (farm.parent / "mask").glob("*.png"):
        with Image.open(path) as mask:
            without = mask.point(lambda value: 0 if value == 2 else value)
        without.save(path)
    config = write_config(tmp_path / "c.yaml", farm)
    assert train.main(["--config", str(config), f"run.dir={tmp_path / 'run'}"]) == 0
    text = (tmp_path / "run" / "train.log").read_text()
    assert "class 2 (barn) is on no labeled pixel; it gets 2 random vectors" in text
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert all(value.isfinite().all() for value in saved["networks"]["student"].values())
    assert saved["usage"] is not None
    assert list(saved["usage"]) == list(load_spec(str(farm)).classes)


# --- the rest --------------------------------------------------------------------------------------------------


def test_patches_that_the_crop_does_not_hold(fails) -> None:
    expect(fails("method.proto.granularity=40"), "'method.proto.granularity' is 40", "32")


def test_pooling_of_the_evaluation_code(fails) -> None:
    expect(fails("model.maxpool=same"), "model.maxpool=same", "model.maxpool=ceil")


def test_missing_data_and_lists(fails) -> None:
    line = fails("data.dataset=voc", "data.root=/nowhere/voc", "data.split=classic/366")
    expect(line, "/nowhere/voc", "SSS_DATA")
    expect(fails(split="half"), "half", "python -m common.data.splits make")


def test_batches_that_do_not_fit(fails) -> None:
    expect(fails("optim.batch_size=64"), "64")
    expect(fails("optim.device_batch=3", "optim.batch_size=4"), "optim.device_batch=3", "divisor of 4")


def test_benchmark_of_a_supervised_configuration(fails) -> None:
    expect(fails("method.mode=sup_only", main=bench.main), "supervised-only")


def test_nan_loss_stops_before_the_step(fails, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original, calls = train.train_step, []

    def broken(*args):
        result = original(*args)
        calls.append(1)
        if len(calls) < 3:
            return result
        unsup = result.terms["loss_unsup"] * torch.nan
        return result._replace(total=result.total + unsup, terms=result.terms | {"loss_unsup": unsup})

    monkeypatch.setattr(train, "train_step", broken)
    line = fails(run={"save_interval": 1, "log_interval": 1, "panels": False})
    expect(line, "step 8", "loss_unsup is nan", "images p0", "last.pt", "run.on_nonfinite=skip")
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert saved["step"] == 7  # the good checkpoint is the one before the bad step
    assert all(value.isfinite().all() for value in saved["networks"]["student"].values())


def test_a_config_of_the_original_is_named_as_such(fails, tmp_path: Path, monkeypatch, capfd) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("dataset: {type: pascal_semi}\ntrainer: {epochs: 80}\nnet: {num_classes: 21}\n")
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(path)])
    with pytest.raises(SystemExit):
        run_main(train.main)
    expect(capfd.readouterr().err, "config.yaml", "written for the original code", "folder 'configs'")


@pytest.mark.smoke
def test_shell_script_with_a_missing_config() -> None:
    done = subprocess.run(
        ["sh", str(PROJECT / "train.sh"), "1", "0", "configs/nowhere.yaml"],
        capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: configs/nowhere.yaml: no such configuration file")
