"""Prediction of photos with small networks of the projects that have student and teacher; files, names and skipping are
tested in `test_predict_script.py`."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.config import load_config
from common.data.dataset_yaml import load_spec
from common.errors import UserError
from common.run.checkpoint import describe, save
from tests.predictions import mask, written

ROOT = Path(__file__).resolve().parents[1]


class Project:
    """The modules of a project that take part, and its small configuration."""

    def __init__(self, name: str) -> None:
        self.folder = ROOT / "projects" / name
        self.convert, self.predict, self.model, config = (self._module(name, part) for part in
                                                          ("convert", "predict", "model", "config"))  # fmt: skip
        self.cfg = load_config(config.Config, self.folder / "configs" / "smoke.yaml")

    @staticmethod
    def _module(name: str, part: str) -> ModuleType:
        return importlib.import_module(f"projects.{name}.{part}")


@pytest.fixture(scope="module", params=["brpg", "u2pl"])
def project(request: pytest.FixtureRequest) -> Project:
    return Project(request.param)


@pytest.fixture(scope="module")
def contents(project: Project) -> dict[str, Any]:
    """A checkpoint whose networks see different things and whose dataset is nowhere."""
    cfg, spec = project.cfg, load_spec("shapes")
    networks = {}
    for seed, role in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        network = project.model.build_student(cfg, spec.num_classes)
        torch.nn.init.normal_(network.decoder.classifier[-1].weight, std=3.0)
        networks[role] = network.state_dict()
    saved = describe(project.convert.PROJECT, cfg, spec, 0, networks)
    saved["config"]["data"]["dataset"] = "/nowhere/dataset.yaml"
    return saved


@pytest.fixture
def checkpoint(contents: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "run" / "best.pt"
    save(path, contents)
    return path


def photo(path: Path, seed: int = 0, size: tuple[int, int] = (37, 50), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size[::-1]).convert(mode).save(path)
    return path


@pytest.fixture
def predicted(
    project: Project, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    monkeypatch.setenv("SSS_DEVICE", "cpu")

    def run(source: Path, *arguments: str, out: Path = tmp_path / "out") -> int:
        command = ["--checkpoint", str(checkpoint), "--input", str(source), "--out", str(out), *arguments]
        return project.predict.main(command)

    return run


def scores(project: Project, contents: dict[str, Any], path: Path, role: str = "teacher") -> torch.Tensor:
    """Scores of the network as the definition says: normalized photo in, upsampled scores out."""
    cfg = project.cfg
    network = project.model.build_student(cfg, len(contents["classes"]))
    network.load_state_dict(contents["networks"][role])
    with Image.open(path) as file:
        pixels = torch.from_numpy(np.array(file.convert("RGB"))).float()
    x = (pixels - torch.tensor(cfg.data.mean)) / torch.tensor(cfg.data.std)
    with torch.inference_mode():
        return network.eval().predict(x.permute(2, 0, 1)[None])[0]


def agreement(ids: np.ndarray[Any, Any], expected: torch.Tensor) -> float:
    return float((ids == expected.argmax(dim=0).numpy()).mean())


def test_mask_holds_the_best_class_and_overlay_its_colour(
    project: Project, predicted: Callable[..., int], contents: dict[str, Any], tmp_path: Path
) -> None:
    source = photo(tmp_path / "photo.png", seed=3)
    assert predicted(source) == 0
    assert written(tmp_path / "out") == ["photo.png", "photo_overlay.jpg"]
    ids = mask(tmp_path / "out" / "photo.png")
    assert ids.shape == (37, 50)
    assert len(np.unique(ids)) > 1
    assert agreement(ids, scores(project, contents, source)) > 0.999
    palette = np.array(contents["palette"])
    with Image.open(tmp_path / "out" / "photo.png") as file:
        np.testing.assert_array_equal(np.array(file.convert("RGB")), palette[ids])
    with Image.open(tmp_path / "out" / "photo_overlay.jpg") as file:
        shown = np.array(file).astype(float)
    with Image.open(source) as file:
        mixed = 0.5 * np.array(file) + 0.5 * palette[ids]
    assert np.abs(shown - mixed).mean() < 12  # JPEG


def test_student_and_share_of_the_colours(
    project: Project, predicted: Callable[..., int], contents: dict[str, Any], tmp_path: Path
) -> None:
    source = photo(tmp_path / "photo.png", seed=4)
    assert predicted(source, "--network", "student", "--alpha", "0") == 0
    ids = mask(tmp_path / "out" / "photo.png")
    assert agreement(ids, scores(project, contents, source, "student")) > 0.999
    assert agreement(ids, scores(project, contents, source, "teacher")) < 0.9
    with Image.open(tmp_path / "out" / "photo_overlay.jpg") as shown, Image.open(source) as original:
        assert np.abs(np.array(shown).astype(float) - np.array(original)).mean() < 12


def test_protocol_is_that_of_evaluation(
    project: Project, predicted: Callable[..., int], contents: dict[str, Any], tmp_path: Path
) -> None:
    source = photo(tmp_path / "photo.png", seed=5, size=(48, 64))
    flip = ("eval.protocol=multi_scale_flip", "eval.flip=true", "eval.scales=[0.5, 1.0]")
    assert predicted(source, *flip, out=tmp_path / "flip") == 0
    assert (
        predicted(source, "eval.protocol=sliding_window", "eval.crop_size=[32, 32]", out=tmp_path / "window")
        == 0
    )
    whole = scores(project, contents, source)
    found = [mask(tmp_path / folder / "photo.png") for folder in ("flip", "window")]
    assert all(0.3 < agreement(ids, whole) < 0.999 for ids in found)
    assert (found[0] != found[1]).any()


def test_run_directory_gives_its_best_then_its_last(
    project: Project,
    contents: dict[str, Any],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SSS_DEVICE", "cpu")
    source = photo(tmp_path / "photo.png", seed=6)
    swapped = {
        role: contents["networks"][other] for role, other in (("student", "teacher"), ("teacher", "student"))
    }
    save(checkpoint.with_name("last.pt"), contents | {"networks": swapped})

    def from_run() -> np.ndarray[Any, Any]:
        run = ["--run", str(checkpoint.parent), "--input", str(source), "--out", str(tmp_path / "out")]
        assert project.predict.main(run) == 0
        return mask(tmp_path / "out" / "photo.png")

    assert agreement(from_run(), scores(project, contents, source, "teacher")) > 0.999
    checkpoint.unlink()
    assert agreement(from_run(), scores(project, contents, source, "student")) > 0.999


def test_mistakes_are_named(
    project: Project, predicted: Callable[..., int], tmp_path: Path, checkpoint: Path
) -> None:
    source = photo(tmp_path / "photos" / "a.jpg")
    (tmp_path / "none").mkdir()
    (tmp_path / "blocked").touch()
    mistakes: list[tuple[Path, list[str], Path, str]] = [
        (
            tmp_path / "gone",
            [],
            tmp_path / "out",
            "gone: no such file or folder; give a folder, an image or a list",
        ),
        (tmp_path / "none", [], tmp_path / "out", "none: holds no image; give a folder"),
        (source.parent, [], source.parent, "is the input folder, whose files would be overwritten"),
        (source, ["eval.protocol=best"], tmp_path / "out", "'eval.protocol' is 'best'; expected one of"),
        (source, ["model.inner_planes=8"], tmp_path / "out", "do not fit"),
        (source, [], tmp_path / "blocked", "cannot be written"),
    ]
    for where, arguments, out, message in mistakes:
        with pytest.raises(UserError) as error:
            predicted(where, *arguments, out=out)
        assert message in str(error.value)
    assert source.is_file()
    with pytest.raises(UserError, match=r"none: holds neither best\.pt nor last\.pt"):
        project.predict.main(
            ["--run", str(tmp_path / "none"), "--input", str(source), "--out", str(tmp_path / "out")]
        )


@pytest.mark.smoke
def test_script_starts_from_anywhere_without_an_installed_project(
    project: Project, checkpoint: Path, tmp_path: Path
) -> None:
    photo(tmp_path / "a.jpg")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [
        sys.executable,
        str(project.folder / "predict.py"),
        "--checkpoint",
        str(checkpoint),
        "--input",
        "a.jpg",
    ]
    done = subprocess.run(
        [*command, "--out", "out", "run.device=cpu"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "out: 1 of 1 photos predicted\n"), done.stderr
    assert written(tmp_path / "out") == ["a.png", "a_overlay.jpg"]
