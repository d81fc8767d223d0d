"""Prediction with small networks of CPS: the files of both forms, networks, protocols, mistakes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.files import voc_colormap
from common.errors import UserError
from common.run.checkpoint import load, save
from projects.cps.compat import predict
from projects.cps.inference import port_windows
from projects.cps.model import build_branch
from projects.cps.tests.checkpoints import SMOKE, contents, smoke, weights
from tests.predictions import mask, written

PROJECT = SMOKE.parents[1]
Ids = np.ndarray[Any, Any]
SHIFTED = voc_colormap(257)[1:]
SLIDE = ("--is_slide", "--crop_size", "32", "24", "--stride", "20", "16")


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two networks that see different things; their dataset is nowhere."""
    monkeypatch.setenv("SSS_DEVICE", "cpu")
    saved = contents(smoke(), 0, 1)
    saved["config"]["data"]["dataset"] = "/nowhere/dataset.yaml"
    path = tmp_path / "run" / "last.pt"
    save(path, saved)
    return path


@pytest.fixture
def port(checkpoint: Path, tmp_path: Path) -> Callable[..., int]:
    """predict.py by the port's names."""

    def run(source: Path, *arguments: str, out: Path = tmp_path / "out") -> int:
        command = ["--config", str(SMOKE), "--model_path", str(checkpoint), "--image_path", str(source)]
        return predict.main([*command, "--save_dir", str(out), *arguments])

    return run


def photo(path: Path, seed: int = 0, size: tuple[int, int] = (37, 50), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size[::-1]).convert(mode).save(path)
    return path


def pixels(path: Path) -> Ids:
    with Image.open(path) as file:
        return np.array(file.convert("RGB"))


def network(seed: int) -> Callable[[torch.Tensor], torch.Tensor]:
    made = build_branch(smoke(), 5)
    made.load_state_dict(weights(seed))
    return made.eval().predict


@torch.inference_mode()
def ids(path: Path, *seeds: int, windows: bool = False) -> Ids:
    """Classes by the definition: normalized photo, scores, highest mean."""
    data = smoke().data
    x = (torch.from_numpy(pixels(path)).float() - torch.tensor(data.mean)) / torch.tensor(data.std)
    x = x.permute(2, 0, 1)[None]
    scores = [
        port_windows(network(seed), x, (24, 32), (16, 20)) if windows else network(seed)(x) for seed in seeds
    ]
    return torch.stack(scores).mean(dim=0)[0].argmax(dim=0).numpy()


def agreement(found: Ids, expected: Ids) -> float:
    assert len(np.unique(expected)) > 1
    return float((found == expected).mean())


def test_port_form_writes_the_files_of_the_port(port: Callable[..., int], tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for name in ("a/x.png", "b/x.png", "y.bmp"):
        photo(photos / name, seed=len(name))
    assert port(photos) == 0
    assert written(tmp_path / "out") == [
        "added_prediction/a/x.png",
        "added_prediction/b/x.png",
        "added_prediction/y.bmp",
        "pseudo_color_prediction/a/x.png",
        "pseudo_color_prediction/b/x.png",
        "pseudo_color_prediction/y.png",
    ]
    pseudo = tmp_path / "out" / "pseudo_color_prediction" / "y.png"
    found = mask(pseudo)
    assert agreement(found, ids(photos / "y.bmp", 0)) > 0.999
    np.testing.assert_array_equal(pixels(pseudo), SHIFTED[found])
    assert (SHIFTED[0] == (128, 0, 0)).all()
    mixed = 0.6 * pixels(photos / "y.bmp") + 0.4 * SHIFTED[found]
    added = pixels(tmp_path / "out" / "added_prediction" / "y.bmp")
    assert np.abs(added - mixed).max() <= 0.51


def test_port_windows_are_given_as_width_and_height(port: Callable[..., int], tmp_path: Path) -> None:
    source = photo(tmp_path / "photo.png", seed=5, size=(48, 64))
    assert port(source, *SLIDE) == 0
    found = mask(tmp_path / "out" / "pseudo_color_prediction" / "photo.png")
    assert agreement(found, ids(source, 0, windows=True)) > 0.999
    assert agreement(found, ids(source, 0)) < 0.999


def test_configuration_replaces_that_of_the_checkpoint(
    port: Callable[..., int], checkpoint: Path, tmp_path: Path
) -> None:
    source = photo(tmp_path / "photo.png", seed=5, size=(48, 64))
    saved = load(checkpoint)
    saved["config"]["eval"] |= {"protocol": "port", "crop_size": [24, 32], "stride": [16, 20]}
    save(checkpoint, saved)
    assert port(source) == 0  # smoke.yaml: whole images
    found = mask(tmp_path / "out" / "pseudo_color_prediction" / "photo.png")
    assert agreement(found, ids(source, 0)) > 0.999
    own = ["--checkpoint", str(checkpoint), "--input", str(source), "--out", str(tmp_path / "own")]
    assert predict.main(own) == 0
    assert agreement(mask(tmp_path / "own" / "photo.png"), ids(source, 0, windows=True)) > 0.999
    changed = ("eval.protocol=port", "eval.crop_size=[24, 32]", "--opts", "eval.stride=[16, 20]")
    assert port(source, *changed, out=tmp_path / "changed") == 0
    found = mask(tmp_path / "changed" / "pseudo_color_prediction" / "photo.png")
    assert agreement(found, ids(source, 0, windows=True)) > 0.999


def test_several_scales_and_mirrored_images(port: Callable[..., int], tmp_path: Path) -> None:
    source = photo(tmp_path / "photo.png", seed=5, size=(48, 64))
    assert port(source, "--aug_pred", "--scales", "0.5", "1.0", "--flip_horizontal") == 0
    found = mask(tmp_path / "out" / "pseudo_color_prediction" / "photo.png")
    assert 0.2 < agreement(found, ids(source, 0)) < 0.999


def test_custom_colours_replace_the_first(port: Callable[..., int], tmp_path: Path) -> None:
    source = photo(tmp_path / "photo.png", seed=3)
    assert port(source, "--custom_color", "1", "2", "3", "4", "5", "6") == 0
    path = tmp_path / "out" / "pseudo_color_prediction" / "photo.png"
    palette = SHIFTED.copy()
    palette[:2] = [[1, 2, 3], [4, 5, 6]]
    np.testing.assert_array_equal(pixels(path), palette[mask(path)])


def test_own_form_has_own_files_and_colours(checkpoint: Path, tmp_path: Path) -> None:
    source = photo(tmp_path / "photo.png", seed=3)
    command = ["--run", str(checkpoint.parent), "--input", str(source), "--out", str(tmp_path / "out")]
    assert predict.main(command) == 0
    assert written(tmp_path / "out") == ["photo.png", "photo_overlay.jpg"]
    found = mask(tmp_path / "out" / "photo.png")
    palette = np.array(load(checkpoint)["palette"])
    np.testing.assert_array_equal(pixels(tmp_path / "out" / "photo.png"), palette[found])
    assert predict.main([*command, "--legacy_palette"]) == 0
    legacy = voc_colormap(21)[1:]
    np.testing.assert_array_equal(pixels(tmp_path / "out" / "photo.png"), legacy[found])


@pytest.mark.parametrize(("name", "seeds"), [("branch1", (0,)), ("branch2", (1,)), ("mean", (0, 1))])
def test_network_is_chosen(checkpoint: Path, tmp_path: Path, name: str, seeds: tuple[int, ...]) -> None:
    source = photo(tmp_path / "photo.png", seed=6)
    command = ["--checkpoint", str(checkpoint), "--input", str(source), "--out", str(tmp_path / "out")]
    assert predict.main([*command, "--network", name]) == 0
    found = mask(tmp_path / "out" / "photo.png")
    assert agreement(found, ids(source, *seeds)) > 0.999
    others = {(0,), (1,), (0, 1)} - {seeds}
    assert all(agreement(found, ids(source, *other)) < 0.98 for other in others)


def test_nothing_is_overwritten(port: Callable[..., int], tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    names = ["x.bmp", "x.png", "a/x.png"]
    for i, name in enumerate(names):
        photo(photos / name, seed=i)
    assert port(photos) == 0
    pseudo = ("a/x", "x_bmp", "x_png")
    assert written(tmp_path / "out") == [
        *(f"added_prediction/{name}" for name in sorted(names)),
        *(f"pseudo_color_prediction/{name}.png" for name in pseudo),
    ]
    listed = tmp_path / "list.txt"
    listed.write_text(f"{photos / 'x.png'}\n{photos / 'a/x.png'}\n")  # both are called x.png
    assert port(listed, out=tmp_path / "list") == 0
    assert len(written(tmp_path / "list")) == 4


def test_a_list_may_name_labels(port: Callable[..., int], tmp_path: Path) -> None:
    for name in ("images/a.png", "images/b c.png"):
        photo(tmp_path / name)
    (tmp_path / "val.txt").write_text(
        "images/a.png labels/a.png\nimages/b c.png\nimages/a.png\tlabels/a.png\n"
    )
    assert port(tmp_path / "val.txt") == 0
    assert [name for name in written(tmp_path / "out") if name.startswith("pseudo")] == [
        "pseudo_color_prediction/images/a_png.png",
        "pseudo_color_prediction/images/a_png_2.png",
        "pseudo_color_prediction/images/b c.png",
    ]


def test_unreadable_images_are_skipped_and_named(
    port: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photo(photos / "a.png")
    (photos / "broken.jpg").write_bytes(b"no image")
    photo(photos / "z.png")
    assert port(photos) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path / 'out'}: 2 of 3 photos predicted"
    assert lines[1].startswith(f"skipped: {photos / 'broken.jpg'}: image cannot be read")
    assert len(lines) == 2
    assert len(written(tmp_path / "out")) == 4


def test_results_have_a_default_place(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = photo(tmp_path / "photo.png")
    assert predict.main(["--model_path", str(checkpoint), "--image_path", str(source)]) == 0
    assert written(tmp_path / "output/result") == [
        "added_prediction/photo.png",
        "pseudo_color_prediction/photo.png",
    ]


def test_mistakes_are_named(port: Callable[..., int], checkpoint: Path, tmp_path: Path) -> None:
    source = photo(tmp_path / "photos" / "a.png")
    (tmp_path / "none").mkdir()
    (tmp_path / "model.pdparams").touch()
    torch.save({"model": weights(0), "epoch": 33}, tmp_path / "epoch-33.pth")
    foreign = tmp_path / "port.yml"
    foreign.write_text("test_config: {is_slide: true}\n")
    mistakes: list[tuple[list[str], str]] = [
        (["--is_slide", "--crop_size", "32", "32", "--stride", "8", "33"],
         "--stride 8 33: larger than the window 32 32"),
        (["--is_slide", "--stride", "0", "1"], "--stride 0 1: give two positive numbers"),
        (["--crop_size", "8", "8"], "--crop_size 8 8: has no meaning without --is_slide"),
        (["--flip_vertical"], "--flip_vertical: not part of any protocol"),
        (["--custom_color", "1", "2"], "--custom_color: 2 numbers"),
        (["--custom_color", "1", "2", "256"], "give red, green and blue in 0..255"),
        (["--model_path", str(tmp_path / "gone.pt")], "gone.pt: no such checkpoint"),
        (["--model_path", str(tmp_path / "model.pdparams")], "PaddlePaddle weights of the port"),
        (["--model_path", str(tmp_path / "epoch-33.pth")], "convert a file of the authors first"),
        (["--config", str(foreign)], "is written for the PaddleSeg port"),
        (["--image_path", str(tmp_path / "gone")], "gone: no such file or folder"),
        (["--image_path", str(tmp_path / "none")], "none: holds no image"),
        (["--device", "mlu"], "--device mlu: not supported"),
        (["--opts", "model.inner_planes=8"], "do not fit"),
        (["--opts", "eval.protocol=best"], "'eval.protocol' is 'best'; expected one of"),
    ]  # fmt: skip
    for arguments, message in mistakes:
        with pytest.raises(UserError) as error:
            port(source, *arguments)
        assert message in str(error.value), arguments
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"none: holds neither best\.pt nor last\.pt"):
        predict.main(
            ["--run", str(tmp_path / "none"), "--input", str(source), "--out", str(tmp_path / "out")]
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.smoke
def test_documented_command_from_anywhere(checkpoint: Path, tmp_path: Path) -> None:
    photo(tmp_path / "a.jpg")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = ["--config", str(SMOKE), "--model_path", str(checkpoint), "--image_path", "a.jpg"]
    done = subprocess.run(
        [sys.executable, str(PROJECT / "predict.py"), *command, "--save_dir", "out", *SLIDE],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "out: 1 of 1 photos predicted\n"), done.stderr
    assert written(tmp_path / "out") == ["added_prediction/a.jpg", "pseudo_color_prediction/a.png"]
