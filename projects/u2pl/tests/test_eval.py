"""Evaluation of a real run: the figures of training again, pictures, options, mistakes."""

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

from common.data.dataset_yaml import load_spec
from common.distributed import Dist
from common.errors import UserError
from common.run.checkpoint import load, save
from projects.u2pl import eval as script
from projects.u2pl import infer
from projects.u2pl.config import Config
from tests import smoke
from tools import mean_teacher_scripts
from tools.eval_script import config_of, find_target

PROJECT = Path(__file__).resolve().parents[1]
SMOKE = PROJECT / "configs" / "smoke.yaml"
ENVIRONMENT = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "SSS_DEVICE": "cpu"}
pytestmark = pytest.mark.smoke


def shell(*command: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        ["sh", *command], cwd=cwd, env=ENVIRONMENT | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smoke.trained(tmp_path_factory, "u2pl")


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the run for one test, which computes with one thread, as training did: that is part of the digits."""
    monkeypatch.setenv("SSS_DEVICE", "cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Path(shutil.copytree(trained, tmp_path / "run"))
    torch.set_num_threads(threads)


def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text(encoding="utf-8"))


def report(run: Path, name: str = "eval_whole_image_few.json") -> dict[str, Any]:
    return json.loads((run / name).read_text(encoding="utf-8"))


FIGURES = ("miou", "miou_present", "pixel_accuracy", "iou", "images", "images_not_finite")


def same_figures(ours: dict[str, Any], training: dict[str, Any]) -> bool:
    return all(ours[who][key] == training[who][key] for who in ("best", "last") for key in FIGURES)


def test_figures_are_those_of_training_to_the_last_digit(run: Path) -> None:
    assert script.main(["--run", str(run)]) == 0
    ours, training = report(run), result(run)
    assert same_figures(ours, training)
    assert ours["miou_best"] == training["miou_best"]
    assert ours["miou_last"] == training["miou_last"]
    assert ours["best"]["images"] == 8
    shared = ("project", "method", "network", "list", "split", "seed", "config_hash", "commit")
    assert {key: ours[key] for key in shared} == {key: training[key] for key in shared}
    assert ours["protocol"] == training["protocol"]


@pytest.mark.slow
def test_two_processes_give_the_same_figures(run: Path) -> None:
    shown = shell("eval.sh", str(run), cwd=PROJECT, PROCESSES="2")
    assert same_figures(report(run), result(run))
    assert shown.count("mIoU, classes present") == 1
    (run / "eval_whole_image_few.json").unlink()
    torchrun = '"$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2'
    shown = shell("-c", f'{torchrun} eval.py --run-dir "$RUN"', cwd=PROJECT, RUN=str(run))
    assert same_figures(report(run), result(run))
    assert shown.count("mIoU, classes present") == 1


def test_table_and_spreadsheet_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script.main(["--run", str(run)])
    lines = capsys.readouterr().out.splitlines()
    training = result(run)
    assert lines[0] == f"{run}: teacher, whole_image, list 'few' of shapes, 8 images"
    assert lines[1].split() == ["IoU", "in", "percent", "best", "last"]
    for line, (name, value) in zip(lines[2:], training["best"]["iou"].items(), strict=False):
        assert line.split()[:2] == [name, f"{100 * value:.2f}"]
    cells = lines[-1].split("\t")
    assert cells[:5] == [str(run), "teacher", "whole_image", "few", "8"]
    keys = ("miou", "miou_present", "pixel_accuracy")
    assert cells[5:] == [f"{100 * training[who][key]:.2f}" for who in ("best", "last") for key in keys]


def test_pictures_hold_the_measured_predictions(run: Path, tmp_path: Path) -> None:
    script.main(["--run", str(run), "--save", str(tmp_path / "pictures")])
    spec = load_spec("shapes")
    intersection, union = np.zeros(5), np.zeros(5)
    items = spec.read_list("few")
    for item in items:
        with Image.open(tmp_path / "pictures" / "gray" / f"{item.id}.png") as gray:
            assert gray.mode == "P"
            pred, shown = np.array(gray), np.array(gray.convert("RGB"))
        color = np.array(Image.open(tmp_path / "pictures" / "color" / f"{item.id}.png"))
        np.testing.assert_array_equal(color, spec.palette[pred])
        np.testing.assert_array_equal(shown, color)
        label = spec.load_label(item)
        for k in range(5):
            intersection[k] += ((pred == k) & (label == k)).sum()
            union[k] += ((pred == k) | (label == k)).sum()
    assert len(list((tmp_path / "pictures").rglob("*.png"))) == 2 * len(items)
    assert (intersection / (union + 1e-10)).mean() == pytest.approx(
        report(run, "eval_whole_image_few.json")["miou_best"], abs=1e-12
    )


def test_student_is_measured_and_kept_apart(run: Path) -> None:
    script.main(["--run", str(run), "--network", "student"])
    ours = report(run, "eval_whole_image_few_student.json")
    assert ours["network"] == "student"
    assert ours["last"]["iou"] != result(run)["last"]["iou"]
    assert not (run / "eval_whole_image_few.json").exists()


def test_best_and_last_are_read_from_their_own_files(run: Path) -> None:
    best = load(run / "best.pt")
    save(run / "best.pt", best | {"networks": best["networks"] | {"teacher": best["networks"]["student"]}})
    script.main(["--run", str(run)])
    assert report(run)["last"]["iou"] == result(run)["last"]["iou"]
    assert report(run)["best"]["iou"] != result(run)["best"]["iou"]


def test_other_protocol_and_list_get_a_report_of_their_own(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("000500\n000501\n000502\n")
    crop = "eval.crop_size=[32, 32]"
    script.main(["--run", str(run), "eval.protocol=sliding_window", crop, f"eval.list={other}"])
    ours = report(run, "eval_sliding_window_other.json")
    assert ours["protocol"]["kind"] == "sliding_window"
    assert ours["protocol"]["crop_size"] == [32, 32]
    assert ours["best"]["images"] == 3


def test_config_stands_for_its_run(run: Path) -> None:
    script.main(["--config", str(SMOKE), f"run.dir={run}"])
    assert report(run)["miou_best"] == result(run)["miou_best"]


def test_a_single_checkpoint_carries_its_configuration(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    script.main(["--checkpoint", str(run / "best.pt")])
    alone = capsys.readouterr().out
    assert not list(run.glob("eval_*"))
    script.main(["--config", str(SMOKE), "--checkpoint", str(run / "best.pt")])
    assert capsys.readouterr().out == alone
    assert alone.splitlines()[-1].split("\t")[5] == f"{100 * result(run)['miou_best']:.2f}"


def test_damaged_newest_checkpoint_gives_way_to_the_one_before(run: Path) -> None:
    shutil.copy(run / "last.pt", run / "last.prev.pt")
    (run / "last.pt").write_bytes((run / "last.pt").read_bytes()[:1000])
    script.main(["--run", str(run)])
    assert report(run)["miou_last"] == result(run)["miou_last"]


def test_check_compares_with_the_published_figure(run: Path) -> None:
    reached = 100 * result(run)["miou_best"]
    command = ["--run", str(run), "--check"]
    assert script.main([*command, f"expect.miou={reached + 0.9}", "expect.tolerance=1.0"]) == 0
    assert script.main([*command, f"expect.miou={reached + 1.1}", "expect.tolerance=1.0"]) == 1
    with pytest.raises(UserError, match=r"has no expect\.miou"):
        script.main(command)


def target(*arguments: str) -> Config:
    args = mean_teacher_scripts.parser(script.PROJECT).parse_intermixed_args(list(arguments))
    return find_target(script.PROJECT, args, mean_teacher_scripts.original_flags).cfg


def test_flags_of_the_original(run: Path) -> None:
    best = str(run / "best.pt")
    original = ("--model_path", best, "--base_size", "2048", "--scales", "0.5", "1.0", "--crop")
    ignored = ("--names_path", "nowhere.mat")
    windows = target("--config", str(SMOKE), *original, *ignored, "--save_folder", "x")
    assert (windows.eval.base_size, windows.eval.scales) == (2048, (0.5, 1.0))
    assert windows.eval.protocol == "whole_image"
    pascal = target("--config", str(SMOKE.with_name("voc_classic_1464_r101.yaml")), *original).eval
    assert (pascal.protocol, pascal.scales, pascal.base_size) == ("whole_image", (0.5, 1.0), None)
    city = target("--config", str(SMOKE.with_name("cityscapes_744_r101.yaml")), *original).eval
    assert (city.protocol, city.scales, city.base_size) == ("sliding_window", (0.5, 1.0), 2048)
    explicit = target("--checkpoint", best, "--scales", "2.0", "--crop", "eval.scales=[1.5]")
    assert explicit.eval.scales == (1.5,)


def changed(run: Path, tmp_path: Path, **values: Any) -> str:
    path = tmp_path / "changed.pt"
    save(path, load(run / "best.pt") | values)
    return str(path)


def test_mistakes_are_named(run: Path, tmp_path: Path) -> None:
    best = str(run / "best.pt")
    other = changed(run, tmp_path, project="brpg")
    mistakes = [
        ([], "eval.py: nothing to measure; give --run RUN_DIR"),
        (["--run", str(tmp_path)], f"--run {tmp_path}: no config.yaml there"),
        (["--run", str(run), "--config", str(SMOKE)], "name one of them"),
        (["--config", str(SMOKE), "run.dir=/nowhere"], f"{SMOKE}: no run of it in /nowhere; train it first"),
        (["--checkpoint", str(tmp_path / "no.pt")], "no.pt: no such checkpoint"),
        (["--checkpoint", best, "model.inner_planes=8"], "do not fit"),
        (["--checkpoint", best, "model.inner_plane=8"], "did you mean 'model.inner_planes'?"),
        (["--checkpoint", best, "modell.inner_planes=8"], "unknown key 'modell'; did you mean 'model'?"),
        (["--checkpoint", best, "data.dataset=camvid"], "not on the 11 of dataset 'camvid'"),
        (["--checkpoint", best, "eval.list=nothing.txt"], "nothing.txt: no such list"),
        (
            ["--checkpoint", other],
            "changed.pt: made by project 'brpg'; give a checkpoint of u2pl, or convert a file of the authors",
        ),
    ]
    for command, message in mistakes:
        with pytest.raises(UserError) as error:
            script.main(command)
        assert message in str(error.value), command


def test_a_run_without_checkpoints_and_a_missing_network_are_named(run: Path, tmp_path: Path) -> None:
    networks = {"student": load(run / "best.pt")["networks"]["student"]}
    path = changed(run, tmp_path, networks=networks)
    with pytest.raises(UserError, match=r"changed\.pt: holds no teacher; use --network student"):
        script.main(["--checkpoint", path])
    for weights in run.glob("*.pt"):
        weights.unlink()
    with pytest.raises(UserError, match=r"holds neither best\.pt nor last\.pt; train first"):
        script.main(["--run", str(run)])


def test_files_of_the_authors_are_pointed_to_convert(tmp_path: Path) -> None:
    for number in (0.7, np.float64(0.7)):
        path = tmp_path / "ckpt_best.pth"
        torch.save({"epoch": 3, "teacher_state": {"a": torch.zeros(1)}, "best_miou": number}, path)
        with pytest.raises(UserError, match=r"convert a file of the authors first: python convert\.py"):
            script.main(["--checkpoint", str(path)])


def test_infer_squeezes_photos_as_the_original(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "viewer"
    small = "data.crop_size=[40, 40]"
    command = [
        "--config",
        str(SMOKE),
        "--model_path",
        str(run / "best.pt"),
        "--save_folder",
        str(folder),
        small,
    ]
    assert infer.main(command) == 0
    spec = load_spec("shapes")
    item = spec.read_list("val")[3]
    saved = load(run / "best.pt")
    cfg = config_of(Config, saved, [], "best.pt")
    network = script.load_network(cfg, saved, "teacher", Dist().device, "best.pt")
    x = torch.from_numpy(spec.load_image(item)).permute(2, 0, 1).double() - torch.tensor(cfg.data.mean).view(
        3, 1, 1
    )
    x = (x / torch.tensor(cfg.data.std).view(3, 1, 1))[None].float()
    with torch.inference_mode():
        small_x = torch.nn.functional.interpolate(x, (40, 40), mode="bilinear", align_corners=True)
        scores = network(small_x).logits
        scores = torch.nn.functional.interpolate(scores, (64, 64), mode="bilinear", align_corners=True)
    ids = np.array(Image.open(folder / "gray" / f"{item.id}.png"))
    assert (ids == scores.argmax(dim=1)[0].numpy()).mean() > 0.999
    assert len(list((folder / "color").iterdir())) == 8
