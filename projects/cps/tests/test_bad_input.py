"""Mistakes that only CPS can be given; what all projects refuse is tested by `tests/test_bad_input.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from projects.cps import eval as evaluation
from projects.cps import train
from projects.cps.tests.toys import write_config
from tests.mistakes import Fails, expect


@pytest.fixture
def fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Fails:
    return Fails(train.main, write_config, tmp_path, monkeypatch, capfd)


def test_nothing_unlabeled(fails: Fails) -> None:
    (fails.farm.parent / "splits" / "few" / "unlabeled.txt").write_text("")
    expect(fails(), "unlabeled.txt", "is empty", "split 'full'")


def test_split_without_unlabeled_images(fails: Fails) -> None:
    line = fails("data.dataset=shapes", "data.split=full")
    expect(line, "data.split=full", "no unlabeled images", "method.name=cps")


@pytest.mark.parametrize("override", ["quirks.train_mode_label=false", "method.cps_wieght=1"])
def test_unknown_key(fails: Fails, override: str) -> None:
    section, _, key = override.partition("=")[0].partition(".")
    expect(fails(override), f"unknown key '{section}.{key}'", f"did you mean '{section}.")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("method.name=ccc", ["'method.name' is 'ccc'", "cps_cutmix"]),
        ("method.cps_weight=-1", ["'cps_weight' is -1"]),
        ("method.cutmix.prop_range=[0.5,0.2]", ["'prop_range' is (0.5, 0.2)"]),
        ("keep.newest=0", ["'newest' is 0"]),
        ("quirks.loss_world_size=0", ["'loss_world_size' is 0"]),
        ("optim.paper_processes=4", ["'optim.batch_size' is 2", "multiple of optim.paper_processes=4"]),
        ("optim.batch_size=1", ["optim.batch_size=1", "one image per process", "BatchNorm"]),
        ("data.epoch_images=0", ["'epoch_images' is 0; expected 1 or more, or null"]),
        ("data.rotation=[-10,10]", ["data.rotation", "CPS has neither"]),
    ],
)  # fmt: skip
def test_settings(fails: Fails, override: str, parts: list[str]) -> None:
    expect(fails(override), *parts)


@pytest.mark.parametrize("method", ["sup_only", "cct"])
def test_a_network_that_the_method_lacks(fails: Fails, method: str) -> None:
    """Said before the training, not after it."""
    line = fails("eval.network=branch2", method=method)
    expect(line, "eval.network=branch2", f"method {method}", "use one of branch1")


def test_crops_that_cct_and_gct_cannot_take(fails: Fails) -> None:
    expect(fails("data.crop_size=[33,33]", method="cct"), "cct", "33x33", "multiples of 4")
    published = "method.gct.detector_strides=[2,2,1,2,1,2,1,2]"
    expect(fails(published, method="gct"), "gct", "32x32", "at least 60", "detector_strides")


def test_backbone_weights_of_another_network(fails: Fails, tmp_path: Path) -> None:
    """The original loads whatever fits and says nothing."""
    torch.save({"features.0.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "other.pth")
    expect(fails(f"model.weights={tmp_path / 'other.pth'}"), "other.pth")


def test_nothing_to_measure(fails: Fails, tmp_path: Path) -> None:
    """The original goes on with random weights."""
    config, first = write_config(tmp_path / "a.yaml", fails.farm), tmp_path / "first"
    assert train.main(["--config", str(config), f"run.dir={first}", "run.max_steps=1"]) == 0
    line = fails.of(evaluation.main, "--run", str(first), "--epochs", "1-2")
    expect(line, "--epochs 1-2", "has kept none", "keep.every_epochs=1")
    expect(fails.of(evaluation.main, "--run", str(tmp_path / "nowhere")), "nowhere")
