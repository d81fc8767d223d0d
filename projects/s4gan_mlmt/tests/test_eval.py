"""Evaluation of runs: with and without the image-level branch, which weights, mistakes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.data.dataset_yaml import load_spec
from common.data.transforms import EvalTransform
from common.distributed import Dist
from common.errors import UserError
from common.measure.evaluation import Evaluation, Protocol, evaluate_list
from common.models.deeplab import upsample
from common.run.checkpoint import load, save
from projects.s4gan_mlmt import bench
from projects.s4gan_mlmt import eval as script
from projects.s4gan_mlmt.evaluation import original_protocol
from projects.s4gan_mlmt.mlmt.fusion import Fusion, write_scores
from projects.s4gan_mlmt.tests.checkpoints import (
    METHODS,
    SMOKE,
    contents,
    few_images,
    random_scores,
    run_directory,
    segmentation,
    smoke,
    teacher,
)  # fmt: skip

PROJECT = SMOKE.parents[1]
FUSED, ALONE = "eval_whole_image_few.json", "eval_whole_image_few_segmentation.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: run_directory(tmp_path_factory.mktemp(name) / "run", name) for name in METHODS}


@pytest.fixture
def run_of(made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A copy of the run of a method; its list is the one it was made with."""
    monkeypatch.setenv("SSS_DEVICE", "cpu")
    return lambda method: Path(shutil.copytree(made[method], tmp_path / method))


def report(run: Path, name: str = FUSED) -> dict[str, Any]:
    return json.loads((run / name).read_text(encoding="utf-8"))


def measured(
    seed: int, images: Path, how: Protocol | None = None, scores: np.ndarray[Any, Any] | None = None
) -> Evaluation:
    """Figures by the code of all projects, without anything of the script."""
    cfg, spec, network = smoke(), load_spec("shapes"), segmentation(seed)
    refine = None
    if scores is not None:
        refine = Fusion([item.id for item in spec.read_list(str(images))], scores, "zero_logits", 0.2)

    def forward(x: Tensor) -> Tensor:
        return upsample(network(x), x.shape[-2:])

    return evaluate_list(
        forward, cfg.data, spec, str(images), how or Protocol(), Dist(), precision="fp32", refine=refine
    )


@pytest.mark.parametrize("method", ["sup_only", "s4gan"])
def test_one_branch(
    run_of: Callable[[str], Path], made: dict[str, Path], method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(method)
    assert script.main(["--run", str(run)]) == 0
    ours = report(run)
    assert (ours["method"], ours["network"], ours["project"]) == (method, "segmentation", "s4gan_mlmt")
    for label, seed in (("best", 0), ("last", 10)):
        assert ours[f"miou_{label}"] == measured(seed, made[method].parent / "few.txt").miou
    assert not (run / ALONE).exists()
    cells = capsys.readouterr().out.splitlines()[-1].split("\t")
    assert cells[1:3] + cells[4:5] == ["segmentation", "whole_image", "6"]


def test_both_branches_have_a_figure_with_and_without_the_fusion(
    run_of: Callable[[str], Path], made: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run, few = run_of("s4gan_mlmt"), made["s4gan_mlmt"].parent / "few.txt"
    assert script.main(["--run", str(run)]) == 0
    fused, alone = report(run), report(run, ALONE)
    assert (fused["network"], alone["network"]) == ("fused", "segmentation")
    for label, seed in (("best", 0), ("last", 10)):
        assert fused[f"miou_{label}"] == measured(seed, few, scores=random_scores()).miou
        assert alone[f"miou_{label}"] == measured(seed, few).miou
        assert fused[f"miou_{label}"] != alone[f"miou_{label}"]
    assert [line.split("\t")[1] for line in capsys.readouterr().out.splitlines() if "\t" in line] == [
        "fused",
        "segmentation",
    ]


def test_one_of_both_figures(run_of: Callable[[str], Path]) -> None:
    run = run_of("s4gan_mlmt")
    assert script.main(["--run", str(run), "--network", "segmentation"]) == 0
    assert (run / ALONE).exists()
    assert not (run / FUSED).exists()
    (run / ALONE).unlink()
    assert script.main(["--run", str(run), "--network", "fused"]) == 0
    assert (run / FUSED).exists()
    assert not (run / ALONE).exists()


def test_the_mode_and_the_threshold_are_those_of_the_configuration(
    run_of: Callable[[str], Path], made: dict[str, Path]
) -> None:
    run = run_of("s4gan_mlmt")
    found = {}
    for mode in ("zero_logits", "mask"):
        script.main(["--run", str(run), "--network", "fused", f"quirks.fusion={mode}"])
        found[mode] = report(run)["miou_best"]
    assert found["zero_logits"] != found["mask"]
    script.main(["--run", str(run), "--network", "fused", "mlmt.keep_threshold=0"])
    assert report(run)["miou_best"] == measured(0, made["s4gan_mlmt"].parent / "few.txt").miou


def expected_rows(images: Path) -> np.ndarray[Any, Any]:
    """The teacher's scores as the text file would hold them, by the definition: sigmoid, flattened roll, six digits."""
    cfg, spec = smoke(), load_spec("shapes")
    view = EvalTransform(mean=cfg.data.mean, std=cfg.data.std, resize=None)
    photos = [view(spec.load_image(item), None)[0] for item in spec.read_list(str(images))]
    assert photos[0].shape[-1] == cfg.mlmt.size
    with torch.no_grad():
        rows = teacher(2)(torch.stack(photos)).sigmoid()
    return rows.roll(1).double().numpy().round(6)


def test_another_list_is_scored_by_the_teacher(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Rows of one list never meet the images of another, even where their numbers agree."""
    run = run_of("s4gan_mlmt")
    other = few_images(tmp_path, name="other")
    assert script.main(["--run", str(run), "--network", "fused", other]) == 0
    images = tmp_path / "other.txt"
    ours = report(run, "eval_whole_image_other.json")["miou_best"]
    assert ours == measured(0, images, scores=expected_rows(images)).miou
    assert ours != measured(0, images, scores=random_scores()).miou
    (run / "mlmt" / "last.pt").unlink()
    with pytest.raises(
        UserError, match="holds no image-level branch of this run; train it, give --mlmt-file"
    ):
        script.main(["--run", str(run), other])


def test_scores_from_a_file_for_any_run(
    run_of: Callable[[str], Path], made: dict[str, Path], tmp_path: Path
) -> None:
    run, few = run_of("s4gan"), made["s4gan"].parent / "few.txt"
    write_scores(tmp_path / "scores.txt", random_scores(3))
    words = ["--mlmt-file", str(tmp_path / "scores.txt")]
    assert script.main(["--run", str(run), *words]) == 0
    expected = measured(0, few, scores=random_scores(3)).miou
    assert report(run)["miou_best"] == expected
    assert report(run, ALONE)["miou_best"] == measured(0, few).miou
    assert script.main(["--checkpoint", str(run / "best.pt"), "--save", str(tmp_path / "out"), *words]) == 0
    assert report(tmp_path / "out")["miou_checkpoint"] == expected


def test_a_file_alone_is_measured_without_the_branch(
    run_of: Callable[[str], Path], made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_of("s4gan_mlmt") / "best.pt"
    assert script.main(["--checkpoint", str(path), "--save", str(tmp_path / "out")]) == 0
    assert "without the image-level branch" in capsys.readouterr().err
    found = report(tmp_path / "out")
    assert found["network"] == "segmentation"
    assert found["miou_checkpoint"] == measured(0, made["s4gan_mlmt"].parent / "few.txt").miou
    assert len(list((tmp_path / "out" / "gray").iterdir())) == 6


def test_the_weights_of_the_main_figure_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSS_DEVICE", "cpu")
    run = run_directory(tmp_path / "run", labels=("last", "step_3", "step_5"), eval__after_steps="3")
    assert script.main(["--run", str(run), "--check", "expect.tolerance=100", "expect.miou=50"]) == 0
    found = report(run)
    assert list(found["checkpoints"]) == ["step_3", "last", "step_5"]
    assert found["miou_step_3"] == measured(10, tmp_path / "few.txt").miou
    reached = 100 * found["miou_step_3"]
    assert script.main(["--run", str(run), "--check", "expect.tolerance=0.01", f"expect.miou={reached}"]) == 0
    assert (
        script.main(["--run", str(run), "--check", "expect.tolerance=0.01", f"expect.miou={reached + 1}"])
        == 1
    )


def test_protocol_of_the_authors(run_of: Callable[[str], Path], made: dict[str, Path]) -> None:
    """On the photos of this pipeline it is the whole image; on Pascal VOC's they are padded."""
    run = run_of("s4gan")
    script.main(["--run", str(run), "eval.protocol=original"])
    few = made["s4gan"].parent / "few.txt"
    assert report(run)["miou_best"] == measured(0, few, original_protocol(smoke())).miou


def test_mistakes_are_named(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    run = run_of("s4gan_mlmt")
    short, foreign = tmp_path / "short.txt", tmp_path / "other.pt"
    write_scores(short, random_scores(images=5))
    wide = tmp_path / "wide.txt"
    write_scores(wide, random_scores(classes=21))
    save(foreign, load(run / "best.pt") | {"project": "cps"})
    authors = tmp_path / "VOC_5.pth"
    torch.save(segmentation(0).state_dict(), authors)
    here = ["--run", str(run)]
    mistakes = [
        ([*here, "--mlmt-file", str(tmp_path / "gone.txt")], "scores file cannot be read"),
        ([*here, "--mlmt-file", str(short)], "5 rows for 6 images"),
        ([*here, "--mlmt-file", str(wide)], "21 scores instead of 5"),
        (
            ["--checkpoint", str(run / "best.pt"), "--network", "fused"],
            "a file has no scores of the image-level",
        ),
        (["--checkpoint", str(foreign)], "other.pt: made by project 'cps'"),
        (["--checkpoint", str(authors)], "convert a file of the authors first: python convert.py"),
        (["--checkpoint", str(run / "mlmt" / "last.pt")], "holds no segmentation"),
        ([*here, "model.inner_planes=8"], "do not fit"),
        (["--run", str(tmp_path / "nowhere")], "no config.yaml there"),
    ]
    for command, message in mistakes:
        with pytest.raises(UserError) as error:
            script.main(command)
        assert message in str(error.value), command
        assert "\n" not in str(error.value)


def test_a_supervised_file(run_of: Callable[[str], Path]) -> None:
    """It has no discriminator, which evaluation does not miss."""
    path = run_of("sup_only") / "sup.pt"
    save(path, contents(smoke(method="sup_only"), 5))
    assert list(load(path)["networks"]) == ["segmentation"]
    assert script.main(["--checkpoint", str(path), few_images(path.parent)]) == 0


@pytest.mark.smoke
@pytest.mark.slow
def test_shell_script_with_two_processes(run_of: Callable[[str], Path]) -> None:
    run = run_of("s4gan_mlmt")
    script.main(["--run", str(run)])
    alone = {name: report(run, name) for name in (FUSED, ALONE)}
    for name in alone:
        (run / name).unlink()
    environment = os.environ | {
        "PYTHON": sys.executable, "PROCESSES": "2", "OMP_NUM_THREADS": "1", "SSS_DEVICE": "cpu"
    }  # fmt: skip
    done = subprocess.run(
        ["sh", "eval.sh", str(run)], cwd=PROJECT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name, expected in alone.items():
        assert [report(run, name)[key] for key in ("miou_best", "miou_last")] == [
            expected[key] for key in ("miou_best", "miou_last")
        ]


@pytest.mark.smoke
def test_bench_gives_both_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSS_DEVICE", "cpu")
    monkeypatch.setattr("tools.bench.loader_speed", lambda *_: 100.0)
    path = tmp_path / "bench.json"
    assert bench.main(["--config", str(SMOKE), "--steps", "1", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())["figures"]
    for branch in ("s4gan", "mlmt"):
        assert figures[f"{branch}: ratio full / networks"] > 0.3
    assert figures["loader alone, images/s"] == 100
