"""Prediction with small networks: masks and overlays, channels of the pipelines, runs of both branches, mistakes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from common.models.deeplab import upsample
from common.run.checkpoint import load, save
from projects.s4gan_mlmt import predict
from projects.s4gan_mlmt.config import STATISTICS, Pipeline
from projects.s4gan_mlmt.tests.checkpoints import SMOKE, contents, run_directory, segmentation, smoke
from tests.predictions import mask

PROJECT = SMOKE.parents[1]
Ids = np.ndarray[Any, Any]


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSS_DEVICE", "cpu")


def checkpoint(path: Path, pipeline: Pipeline = "house", seed: int = 0) -> Path:
    """Its dataset is nowhere: classes and colours are in the file."""
    saved = contents(smoke(f"data.pipeline={pipeline}", "eval.protocol=original"), seed)
    saved["config"]["data"]["dataset"] = "/nowhere/dataset.yaml"
    save(path, saved)
    return path


def photo(path: Path, seed: int = 0, size: tuple[int, int] = (37, 50)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size[::-1]).save(path)
    return path


@torch.inference_mode()
def ids(path: Path, pipeline: Pipeline = "house", seed: int = 0) -> Ids:
    """Classes by the definition: normalized photo in the pipeline's order of channels, scores, the highest."""
    data = smoke().data if pipeline == "house" else STATISTICS[pipeline]
    with Image.open(path) as file:
        x = torch.from_numpy(np.array(file.convert("RGB"))).float()
    x = ((x - torch.tensor(data.mean)) / torch.tensor(data.std)).permute(2, 0, 1)[None]
    if pipeline == "cityscapes":
        x = x.flip(1)
    height, width = x.shape[-2:]
    if pipeline == "voc":
        x = torch.nn.functional.pad(x, (0, 505 - width, 0, 505 - height))
    scores = upsample(segmentation(seed)(x), x.shape[-2:])
    return scores[0, :, :height, :width].argmax(dim=0).numpy()


@pytest.mark.parametrize("pipeline", ["house", "voc", "pascal_context", "cityscapes"])
def test_masks_are_those_of_the_definition(pipeline: Pipeline, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "run" / "best.pt", pipeline)
    source = photo(tmp_path / "photos" / "a" / "x.png", seed=3)
    command = ["--checkpoint", str(path), "--input", str(source.parents[1]), "--out", str(tmp_path / "out")]
    assert predict.main(command) == 0
    found, expected = mask(tmp_path / "out" / "a" / "x.png"), ids(source, pipeline)
    assert len(np.unique(expected)) > 1
    assert (found == expected).mean() > 0.999
    assert (tmp_path / "out" / "a" / "x_overlay.jpg").is_file()
    with Image.open(tmp_path / "out" / "a" / "x.png") as file:
        palette = np.array(load(path)["palette"])
        np.testing.assert_array_equal(np.array(file.convert("RGB")), palette[found])


def test_a_photo_larger_than_the_padded_size(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "best.pt", "voc")
    source = photo(tmp_path / "x.png", size=(40, 600))
    assert (
        predict.main(["--checkpoint", str(path), "--input", str(source), "--out", str(tmp_path / "out")]) == 0
    )
    assert mask(tmp_path / "out" / "x.png").shape == (40, 600)


def test_of_a_run_of_both_branches_the_segmentation_network_predicts(tmp_path: Path) -> None:
    """From its main weights; scores of a list say nothing of these photos."""
    run = run_directory(tmp_path / "run", "s4gan_mlmt", ("last", "step_3"), eval__after_steps="3")
    source = photo(tmp_path / "x.png", seed=5, size=(64, 64))
    assert predict.main(["--run", str(run), "--input", str(source), "--out", str(tmp_path / "out")]) == 0
    expected = ids(source, seed=10)
    assert (mask(tmp_path / "out" / "x.png") == expected).mean() > 0.999
    assert (ids(source, seed=0) != expected).any()


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, source = checkpoint(tmp_path / "best.pt"), photo(tmp_path / "x.png")
    authors = tmp_path / "VOC_5.pth"
    torch.save(segmentation(0).state_dict(), authors)
    out = ["--input", str(source), "--out", str(tmp_path / "out")]
    mistakes = [
        (["--checkpoint", str(authors), *out], "convert a file of the authors first"),
        (["--checkpoint", str(tmp_path / "gone.pt"), *out], "gone.pt: no such checkpoint"),
        (["--checkpoint", str(path), *out, "model.inner_planes=8"], "do not fit"),
        (["--run", str(tmp_path / "none"), *out], "holds neither"),
        (
            ["--checkpoint", str(path), "--input", str(tmp_path / "gone"), "--out", "o"],
            "no such file or folder",
        ),
    ]
    for command, message in mistakes:
        with pytest.raises(UserError) as error:
            predict.main(command)
        assert message in str(error.value), command
        assert "\n" not in str(error.value)
    with pytest.raises(SystemExit):
        predict.main(["--checkpoint", str(path), *out, "--network", "fused"])
    assert "fused" in capsys.readouterr().err


@pytest.mark.smoke
def test_as_a_program_from_anywhere(tmp_path: Path) -> None:
    checkpoint(tmp_path / "best.pt")
    photo(tmp_path / "a.jpg")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(PROJECT / "predict.py"), "--checkpoint", "best.pt", "--input", "a.jpg", "--out", "out"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "out: 1 of 1 photos predicted\n"), done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a.png",
        "a_overlay.jpg",
        "classes.csv",
    ]
