"""Mistakes that only prototype consistency can be given; what all projects refuse is in `tests/test_bad_input.py`."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image

from common.data.dataset_yaml import load_spec
from projects.proto_consistency import bench, train
from projects.proto_consistency.initial import save_prototypes
from projects.proto_consistency.tests.toys import write_config
from tests.mistakes import Fails, expect
from tests.tiny import CLASSES


@pytest.fixture
def fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Fails:
    return Fails(train.main, write_config, tmp_path, monkeypatch, capfd)


# --- prototypes ------------------------------------------------------------------------------------------------

FILE = "method.proto.source=file"


def test_no_file_of_prototypes_names_the_commands(fails: Fails) -> None:
    commands = ("_sup", "cluster", "method.proto.source=warmup_end")
    expect(fails(FILE), "method.proto.init_path", "not set", *commands)
    expect(fails(FILE, "method.proto.init_path=/nowhere/p.npz"), "/nowhere/p.npz: no such file", *commands)


@pytest.mark.parametrize(
    ("classes", "per_class", "dim", "words"),
    [(3, 4, 32, "method.proto.per_class=2"), (2, 2, 32, "3 classes"), (3, 2, 16, "32 channels")],
)
def test_prototypes_of_another_configuration(
    fails: Fails, tmp_path: Path, classes: int, per_class: int, dim: int, words: str
) -> None:
    path = tmp_path / "p.npz"
    save_prototypes(path, torch.ones(classes * per_class, dim), CLASSES[:classes], {})
    expect(fails(FILE, f"method.proto.init_path={path}"), "p.npz", words)


def test_prototypes_that_are_not_finite(fails: Fails, tmp_path: Path) -> None:
    path = tmp_path / "p.npz"
    save_prototypes(path, torch.full((6, 32), torch.nan), CLASSES, {})
    expect(fails(FILE, f"method.proto.init_path={path}"), "p.npz", "not finite")


def test_a_pickle_that_runs_code(fails: Fails, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    path = tmp_path / "class_wise_protos_4_perpixel.pickle"
    path.write_bytes(pickle.dumps([[Evil()]]))
    expect(fails(FILE, f"method.proto.init_path={path}"), path.name)
    assert not (tmp_path / "executed").exists()


def test_masks_without_any_labeled_pixel(fails: Fails) -> None:
    for path in (fails.farm.parent / "mask").glob("*.png"):
        Image.new("L", (48, 40), color=255).save(path)
    expect(fails(), "no labeled pixel", "method.proto.source=random")


def test_a_class_that_no_photo_has_is_said_and_trains(
    fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its prototypes are random numbers and stay; nothing becomes infinite."""
    monkeypatch.delenv("SSS_DATA", raising=False)
    for path in (fails.farm.parent / "mask").glob("*.png"):
        with Image.open(path) as mask:
            without = mask.point(lambda value: 0 if value == 2 else value)
        without.save(path)
    config = write_config(tmp_path / "c.yaml", fails.farm)
    assert train.main(["--config", str(config), f"run.dir={tmp_path / 'run'}"]) == 0
    text = (tmp_path / "run" / "train.log").read_text()
    assert "class 2 (barn) is on no labeled pixel; it gets 2 random vectors" in text
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert all(value.isfinite().all() for value in saved["networks"]["student"].values())
    assert saved["usage"] is not None
    assert list(saved["usage"]) == list(load_spec(str(fails.farm)).classes)


# --- the rest --------------------------------------------------------------------------------------------------


def test_patches_that_the_crop_does_not_hold(fails: Fails) -> None:
    expect(fails("method.proto.granularity=40"), "'method.proto.granularity' is 40", "32")


def test_pooling_of_the_evaluation_code(fails: Fails) -> None:
    expect(fails("model.maxpool=same"), "model.maxpool=same", "model.maxpool=ceil")


def test_benchmark_of_a_supervised_configuration(fails: Fails, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", fails.farm)
    expect(fails.of(bench.main, "--config", str(config), "method.mode=sup_only"), "supervised-only")


def test_a_config_of_the_original_is_named_as_such(fails: Fails, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("dataset: {type: pascal_semi}\ntrainer: {epochs: 80}\nnet: {num_classes: 21}\n")
    line = fails.of(train.main, "--config", str(path))
    expect(line, "config.yaml", "written for the original code", "folder 'configs'")
