"""Evaluation of a real run: the figures of training again, networks, options, mistakes; the rest is in `tests/`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.config import load_config
from common.data.dataset_yaml import load_spec
from common.distributed import Dist
from common.errors import UserError
from common.mean_teacher.evaluation import protocol, reported_network
from common.run.checkpoint import load, save
from projects.brpg import eval as script
from projects.brpg import infer
from projects.brpg.config import Config, method_name
from tests import smoke
from tools import mean_teacher_scripts
from tools.eval_script import config_of, find_target

PROJECT = Path(__file__).resolve().parents[1]
SMOKE = PROJECT / "configs" / "smoke.yaml"
ENVIRONMENT = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "SSS_DEVICE": "cpu"}

FIGURES = ("miou", "miou_present", "pixel_accuracy", "iou", "images", "images_not_finite")


def shell(*command: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        ["sh", *command], cwd=cwd, env=ENVIRONMENT | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Training and evaluation compute with one thread on the CPU: that is part of the digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSS_DEVICE", "cpu")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    return smoke.trained(tmp_path_factory, "brpg")


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run for one test."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text(encoding="utf-8"))


def report(run: Path, name: str = "eval_whole_image_few.json") -> dict[str, Any]:
    return json.loads((run / name).read_text(encoding="utf-8"))


def same_figures(ours: dict[str, Any], training: dict[str, Any]) -> bool:
    return all(ours[who][key] == training[who][key] for who in ("best", "last") for key in FIGURES)


# --- figures ---------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_figures_are_those_of_training_to_the_last_digit(run: Path) -> None:
    assert script.main(["--run", str(run)]) == 0
    ours, training = report(run), result(run)
    assert same_figures(ours, training)
    assert (ours["miou_best"], ours["miou_last"]) == (training["miou_best"], training["miou_last"])
    shared = ("project", "method", "network", "list", "split", "seed", "config_hash", "commit", "protocol")
    assert {key: ours[key] for key in shared} == {key: training[key] for key in shared}
    assert (ours["project"], ours["method"], ours["network"]) == ("brpg", "brpg", "teacher")


@pytest.mark.smoke
@pytest.mark.slow
def test_two_processes_give_the_same_figures(run: Path) -> None:
    shown = shell("eval.sh", str(run), cwd=PROJECT, PROCESSES="2")
    assert same_figures(report(run), result(run))
    assert shown.count("mIoU, classes present") == 1


@pytest.mark.smoke
def test_student_is_measured_and_kept_apart(run: Path) -> None:
    script.main(["--run", str(run), "--network", "student"])
    ours = report(run, "eval_whole_image_few_student.json")
    assert ours["network"] == "student"
    assert ours["last"]["iou"] != result(run)["last"]["iou"]
    assert not (run / "eval_whole_image_few.json").exists()


@pytest.mark.smoke
def test_a_single_checkpoint_and_its_configuration(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    script.main(["--checkpoint", str(run / "best.pt")])
    alone = capsys.readouterr().out
    script.main(["--config", str(SMOKE), "--checkpoint", str(run / "best.pt")])
    assert capsys.readouterr().out == alone
    assert alone.splitlines()[-1].split("\t")[5] == f"{100 * result(run)['miou_best']:.2f}"


# --- what is measured ------------------------------------------------------------------------------------------


def test_network_and_name_of_the_method() -> None:
    cases = [
        ((), "teacher", "brpg"),
        (("method.prototypes=false",), "teacher", "mean_teacher"),
        (("method.mode=sup_only",), "student", "sup_only"),
    ]
    for overrides, network, method in cases:
        cfg = load_config(Config, SMOKE, overrides)
        assert (reported_network(cfg), method_name(cfg)) == (network, method)


@pytest.mark.parametrize(
    ("name", "training", "measured"),
    [
        ("voc_classic_366_r101", ("center_crop", (513, 513)), ("center_crop", (513, 513))),
        ("cityscapes_372_r101", ("center_crop", (769, 769)), ("sliding_window", (769, 769))),
        ("coco_1_32_x65", ("center_crop", (641, 641)), ("center_crop", (641, 641))),
    ],
)
@pytest.mark.parametrize("zero", [True, False])
def test_protocols_of_the_published_settings(name: str, training: Any, measured: Any, zero: bool) -> None:
    """QUIRK quirks.pad_label_zero: the border of a centre crop counts as class 0, or not at all."""
    cfg = load_config(Config, SMOKE.with_name(f"{name}.yaml"), [f"quirks.pad_label_zero={zero}".lower()])
    found = [protocol(cfg, "training"), protocol(cfg, "script")]
    assert [(how.kind, how.crop_size) for how in found] == [training, measured]
    assert {how.pad_label for how in found} == {0 if zero else 255}


def target(*arguments: str) -> Config:
    args = mean_teacher_scripts.parser(script.PROJECT).parse_intermixed_args(list(arguments))
    return find_target(script.PROJECT, args, mean_teacher_scripts.original_flags).cfg  # type: ignore[return-value]


@pytest.mark.smoke
def test_flags_of_the_original(run: Path) -> None:
    best = str(run / "best.pt")
    original = ("--model_path", best, "--base_size", "2048", "--scales", "0.5", "1.0", "--crop")
    windows = target("--config", str(SMOKE), *original, "--names_path", "nowhere.mat", "--save_folder", "x")
    assert (windows.eval.base_size, windows.eval.scales) == (2048, (0.5, 1.0))
    assert windows.eval.protocol == "whole_image"
    for name in ("voc_classic_366_r101", "coco_1_32_x65"):  # has no base size in the original either
        found = target("--config", str(SMOKE.with_name(f"{name}.yaml")), *original).eval
        assert (found.protocol, found.scales, found.base_size) == ("whole_image", (0.5, 1.0), None)
    city = target("--config", str(SMOKE.with_name("cityscapes_372_r101.yaml")), *original).eval
    assert (city.protocol, city.scales, city.base_size) == ("sliding_window", (0.5, 1.0), 2048)
    explicit = target("--checkpoint", best, "--scales", "2.0", "--crop", "eval.scales=[1.5]")
    assert explicit.eval.scales == (1.5,)


# --- mistakes --------------------------------------------------------------------------------------------------


def changed(run: Path, tmp_path: Path, **values: Any) -> str:
    path = tmp_path / "changed.pt"
    save(path, load(run / "best.pt") | values)
    return str(path)


@pytest.mark.smoke
def test_mistakes_are_named(run: Path, tmp_path: Path) -> None:
    best = str(run / "best.pt")
    other = changed(run, tmp_path, project="u2pl")
    mistakes = [
        ([], "eval.py: nothing to measure; give --run RUN_DIR"),
        (["--config", str(SMOKE), "run.dir=/nowhere"], f"{SMOKE}: no run of it in /nowhere; train it first"),
        (["--checkpoint", best, "model.inner_planes=8"], "do not fit"),
        (["--checkpoint", best, "model.backbone=xception65", "model.width=8"], "do not fit"),
        (["--checkpoint", best, "method.mode=sup_only"], "are unknown to the network: decoder.representation"),
        (["--checkpoint", best, "data.dataset=camvid"], "not on the 11 of dataset 'camvid'"),
        (["--checkpoint", other], "changed.pt: made by project 'u2pl'; give a checkpoint of brpg, or convert a file"),
    ]  # fmt: skip
    for command, message in mistakes:
        with pytest.raises(UserError) as error:
            script.main(command)
        assert message in str(error.value), command
    networks = {"student": load(run / "best.pt")["networks"]["student"]}
    path = changed(run, tmp_path, networks=networks)
    with pytest.raises(UserError, match=r"changed\.pt: holds no teacher; use --network student"):
        script.main(["--checkpoint", path])


def test_files_of_the_authors_are_pointed_to_convert(tmp_path: Path) -> None:
    for number in (0.7, np.float64(0.7)):
        path = tmp_path / "ckpt_best.pth"
        torch.save({"epoch": 3, "teacher_state": {"a": torch.zeros(1)}, "best_miou": number}, path)
        with pytest.raises(UserError, match=r"convert a file of the authors first: python convert\.py"):
            script.main(["--checkpoint", str(path)])


# --- infer.py --------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_infer_squeezes_photos_as_the_original(run: Path, tmp_path: Path, precision: str) -> None:
    folder = tmp_path / "viewer"
    command = ["--config", str(SMOKE), "--model_path", str(run / "best.pt"), "--save_folder", str(folder)]
    assert infer.main([*command, "data.crop_size=[40, 40]", f"run.precision={precision}"]) == 0
    spec = load_spec("shapes")
    item = spec.read_list("few")[3]
    saved = load(run / "best.pt")
    cfg = config_of(Config, saved, [], "best.pt")
    network = script.load_network(cfg, saved, "teacher", Dist().device, "best.pt")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (cfg.data.mean, cfg.data.std))
    x = ((torch.from_numpy(spec.load_image(item)).permute(2, 0, 1).double() - mean) / std)[None].float()
    with torch.inference_mode():
        small_x = torch.nn.functional.interpolate(x, (40, 40), mode="bilinear", align_corners=True)
        scores = network(small_x).logits
        scores = torch.nn.functional.interpolate(scores, (64, 64), mode="bilinear", align_corners=True)
    ids = np.array(Image.open(folder / "gray" / f"{item.id}.png"))
    assert (ids == scores.argmax(dim=1)[0].numpy()).mean() > (0.999 if precision == "fp32" else 0.9)
    assert len(list((folder / "color").iterdir())) == 8
