"""Mistakes that only s4GAN + MLMT can be given, and files that want to be executed: nothing in a file is.

What all projects refuse is tested by `tests/test_bad_input.py`.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from projects.s4gan_mlmt import (
    convert,
    evaluate,
    train,
    train_full,
    train_mlmt,
    train_s4GAN,
    train_s4GAN_wrn38,
)
from projects.s4gan_mlmt import eval as evaluation
from projects.s4gan_mlmt.tests.checkpoints import contents, run_directory, smoke, weights
from projects.s4gan_mlmt.tests.mlmt_toys import write_voc
from projects.s4gan_mlmt.tests.toys import write_config
from tests.mistakes import ROOT, Fails, expect


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_voc(tmp_path_factory.mktemp("data") / "voc", train=10, val=4)


@pytest.fixture
def fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Fails:
    """Programs start in an empty folder; notes about flags may stand beside the error."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("SSS_DEVICE", "cpu")
    return Fails(train.main, write_config, tmp_path, monkeypatch, capfd, besides=("note: ",))


@pytest.fixture
def failure(fails: Fails) -> Callable[..., str]:
    """The one error line of a program."""
    return fails.of


# --- files that want to be executed ----------------------------------------------------------------------------


class Payload:
    """Creates a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


SMALL = ("model.layers=[1,1,1,1]", "model.width=4", "model.weights=none")


@pytest.mark.parametrize("module", [train_full, train_s4GAN, train_s4GAN_wrn38, train_mlmt])
def test_a_hostile_split_is_refused_by_every_command(
    module: Any, failure: Callable[..., str], voc: Path, marker: Path, tmp_path: Path
) -> None:
    path = tmp_path / "split.pkl"
    path.write_bytes(pickle.dumps(Payload(marker)))
    flag = "--pkl-file" if module is train_mlmt else "--split-id"
    small = ("mlmt.backbone=resnet_tiny", "mlmt.weights=none") if module is train_mlmt else SMALL
    if module is train_s4GAN_wrn38:
        small = ("model.weights=none",)
    line = failure(module.main, "--data-dir", str(voc), "--labeled-ratio", "0.5", flag, str(path), *small)
    expect(line, "split.pkl", "refused", "only an array or a list of integers")
    assert list(Path.cwd().iterdir()) == []  # no run directory either


def test_a_hostile_split_of_a_configuration(fails: Fails, marker: Path, tmp_path: Path) -> None:
    path = tmp_path / "split.pkl"
    path.write_bytes(pickle.dumps([np.arange(16), Payload(marker)], protocol=3))
    expect(
        fails("data.split=full", "data.labeled_ratio=0.5", f"data.split_file={path}"), "split.pkl", "refused"
    )


@pytest.mark.parametrize("where", ["evaluate", "eval", "weights", "weights_d", "init", "convert"])
def test_hostile_weights_are_refused(
    where: str, fails: Fails, failure: Callable[..., str], marker: Path, tmp_path: Path
) -> None:
    path = tmp_path / "VOC_30000.pth"
    torch.save({"module.conv1.weight": torch.zeros(1), "more": Payload(marker)}, path)
    if where == "evaluate":
        line = failure(evaluate.main, "--restore-from", str(path))
    elif where == "eval":
        line = failure(evaluation.main, "--checkpoint", str(path))
    elif where == "convert":
        config = str(ROOT / "projects/s4gan_mlmt/configs/voc_1322_r101.yaml")
        line = failure(convert.main, str(path), "--config", config, "--out", str(tmp_path / "o.pt"))
    else:
        line = fails(f"{'run' if where == 'init' else 'model'}.{where}={path}")
    expect(line, "VOC_30000.pth")


# --- splits and data -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        (list(range(11)), ["permutation of 11 images", "'voc' has 10"]),
        (list(range(9)), ["permutation of 9 images", "'voc' has 10"]),
        ([0] * 10, ["not a permutation of 0..9"]),
    ],
)
@pytest.mark.parametrize("module", [train_full, train_s4GAN])
def test_a_split_of_another_dataset(
    module: Any, values: list[int], parts: list[str], failure: Callable[..., str], voc: Path, tmp_path: Path
) -> None:
    path = tmp_path / "split.pkl"
    path.write_bytes(pickle.dumps(np.array(values), protocol=3))
    words = ["--data-dir", str(voc), "--labeled-ratio", "0.5", "--split-id", str(path), *SMALL]
    expect(failure(module.main, *words), "split.pkl", *parts)


def test_the_published_split_is_named_where_it_is_missing(failure: Callable[..., str], voc: Path) -> None:
    words = ["--data-dir", str(voc), "--labeled-ratio", "0.125", *SMALL]
    line = failure(train_full.main, *words, "data.split_file=s4gan/nowhere.pkl")
    expect(line, "no such file", "python -m splits get voc/s4gan")


def test_another_training_list(failure: Callable[..., str], voc: Path, tmp_path: Path) -> None:
    """`--data-list` is the training list; ids without a photo are named with their line."""
    path = tmp_path / "mine.txt"
    path.write_text("p000\np099\n")
    line = failure(train_full.main, "--data-dir", str(voc), "--data-list", str(path), *SMALL)
    expect(line, "mine.txt:2", "p099")


def test_missing_data(fails: Fails, failure: Callable[..., str], voc: Path) -> None:
    root, *lists = fails.all_of(train_s4GAN.main, "--data-dir", "/nowhere/voc", *SMALL)
    expect(root, "/nowhere/voc", "SSS_DATA")
    for line, name in zip(lists, ("train_aug", "val"), strict=True):
        expect(line, f"run 'python -m splits get voc/{name}'")
    expect(
        failure(train_s4GAN.main, "--data-dir", str(voc)),
        "resnet101-5d3b4d8f.pth", "SSS_WEIGHTS", "model.weights=none",
    )  # fmt: skip


def test_nothing_unlabeled(fails: Fails) -> None:
    expect(fails("data.split=full", "data.labeled_ratio=1"), "leaves no unlabeled image", "method.name=s4gan")


# --- settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optim.stepss=4", ["unknown key 'optim.stepss'", "did you mean 'optim.steps'"]),
        ("method.name=s5gan", ["'method.name' is 's5gan'", "s4gan_mlmt"]),
        ("method.st_threshold=high", ["method.st_threshold", "a number"]),
        ("quirks.visits=twice", ["'quirks.visits' is 'twice'", "repeated_0_4"]),
        ("quirks.aspp_branches=3", ["'quirks.aspp_branches' is 3"]),
        ("data.crop_size=[8, 8]", ["data.crop_size=(8, 8)", "at least 16 pixels"]),
        ("model.d_pool=[20, 20]", ["model.d_pool=(20, 20)", "map 2x2", "crop of 32x32", "null"]),
        ("model.weights_d=VOC_5_D.pth", ["VOC_5_D.pth", "no such file"]),
        ("optim.steps=7", ["'steps' is 7", "a multiple of 'epochs', 2"]),
        ("eval.after_steps=9", ["'eval.after_steps' is 9"]),
        ("data.rotation=[-10,10]", ["data.rotation", "data.pipeline=house"]),
        ("keep.original_every=-1", ["'original_every' is -1"]),
    ],
)  # fmt: skip
def test_settings(fails: Fails, override: str, parts: list[str]) -> None:
    sections = {"data": {"pipeline": "voc"}} if "rotation" in override else {}
    expect(fails(override, **sections), *parts)


def test_settings_of_the_second_branch_are_said_before_the_first_is_trained(
    fails: Fails, tmp_path: Path
) -> None:
    line = fails("mlmt.size=16", method="s4gan_mlmt")
    expect(line, "'size' is 16", "33 or more")
    assert not (tmp_path / "run").exists()


# --- checkpoints -----------------------------------------------------------------------------------------------


def test_checkpoint_of_another_method(fails: Fails, tmp_path: Path) -> None:
    config, first = write_config(tmp_path / "a.yaml", fails.farm), tmp_path / "first"
    assert train.main(["--config", str(config), f"run.dir={first}", "run.max_steps=1"]) == 0
    expect(fails(f"run.resume={first}", method="sup_only"), "method.name", "s4gan", "sup_only")


def test_weights_of_another_network(fails: Fails, tmp_path: Path) -> None:
    """own_files: the original loads nothing and says nothing."""
    torch.save({"features.0.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "other.pth")
    expect(fails(f"model.weights={tmp_path / 'other.pth'}"), "other.pth")
    torch.save({"fc.weight": torch.zeros(1, 512)}, tmp_path / "d.pth")
    expect(fails(f"model.weights_d={tmp_path / 'd.pth'}"), "d.pth")


def test_class_counts(failure: Callable[..., str], tmp_path: Path, voc: Path) -> None:
    """Weights of five classes, scores of five classes, a flag of sixty."""
    state = weights(0, smoke(*SMALL, "model.network=deeplabv2"))
    torch.save(state, tmp_path / "VOC_5.pth")
    words = ["--data-dir", str(voc), "--restore-from", str(tmp_path / "VOC_5.pth"), *SMALL]
    expect(failure(evaluate.main, *words), "VOC_5.pth", "5", "21")
    expect(failure(evaluate.main, *words, "--num-classes", "60"), "--num-classes 60", "has 21")
    torch.save(weights(0, smoke(*SMALL, "model.network=deeplabv2"), 21), tmp_path / "VOC_5.pth")
    (tmp_path / "s.txt").write_text("0.5 0.5 0.5 0.5 0.5\n" * 4)
    line = failure(evaluate.main, *words, "--with-mlmt", "--mlmt-file", str(tmp_path / "s.txt"))
    expect(line, "s.txt:1", "5 scores instead of 21")
    torch.save({"x": contents(smoke(), 0)}, tmp_path / "wrapped.pth")
    line = failure(evaluate.main, "--data-dir", str(voc), "--restore-from", str(tmp_path / "wrapped.pth"))
    expect(line, "wrapped.pth")


def test_nothing_to_measure(failure: Callable[..., str], tmp_path: Path) -> None:
    expect(failure(evaluation.main, "--run", str(tmp_path / "nowhere")), "nowhere")
    run = run_directory(tmp_path / "run")
    for name in ("best.pt", "last.pt"):
        (run / name).unlink()
    expect(failure(evaluation.main, "--run", str(run)), "holds neither best.pt nor last.pt")
