"""The port's val.py: what its flags mean, and that it measures what eval.py measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.run.checkpoint import save
from projects.cps import eval as script
from projects.cps.compat import val
from projects.cps.config import Config
from projects.cps.tests.checkpoints import CONFIGS, SMOKE, contents, few_images, smoke
from tools.eval_script import find_target

CITY = CONFIGS / "cityscapes_1488_r50_cps_cutmix.yaml"


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SSS_DEVICE", "cpu")
    path = tmp_path / "best.pt"
    save(path, contents(smoke(), 0, 1))
    return str(path)


def target(checkpoint: str, *arguments: str, config: Path = CITY) -> Config:
    command = ["--config", str(config), "--model_path", checkpoint, *arguments]
    args = val.parser().parse_intermixed_args(command)
    found = find_target(val.PROJECT, args, val.port_flags)
    assert [str(path) for path in found.files.values()] == [checkpoint]
    assert isinstance(found.cfg, Config)
    return found.cfg


def test_without_flags_the_configuration_counts(checkpoint: str) -> None:
    settings = target(checkpoint).eval
    assert (settings.protocol, settings.crop_size, settings.stride) == ("original", None, None)
    cfg = target(checkpoint, "--num_workers", "3", "--device", "cpu", "--data_format", "NCHW")
    assert cfg.eval == settings
    assert (cfg.data.workers, cfg.run.device) == (3, "cpu")


def test_windows_are_given_as_width_and_height(checkpoint: str) -> None:
    settings = target(checkpoint, "--is_slide", "--crop_size", "769", "800", "--stride", "513", "532").eval
    assert (settings.protocol, settings.crop_size, settings.stride) == ("port", (800, 769), (532, 513))
    settings = target(checkpoint, "--is_slide").eval
    assert (settings.protocol, settings.crop_size, settings.stride) == ("port", (800, 800), None)


def test_scales_and_mirrored_images(checkpoint: str) -> None:
    aug = ("--aug_eval", "--scales", "0.5", "1.0", "--flip_horizontal")
    for slide, kind in (((), "original"), (("--is_slide",), "port")):
        settings = target(checkpoint, *aug, *slide).eval
        assert (settings.protocol, settings.scales, settings.flip) == (kind, (0.5, 1.0), True)
    whole = target(checkpoint, *aug, config=SMOKE).eval
    assert (whole.protocol, whole.scales, whole.flip) == ("multi_scale_flip", (0.5, 1.0), True)
    assert whole.crop_size is None
    windows = target(checkpoint, *aug, "eval.protocol=sliding_window", config=SMOKE).eval
    assert windows.crop_size == (32, 32)
    assert target(checkpoint, "--aug_eval").eval.scales == (1.0,)


def test_overrides_come_last(checkpoint: str) -> None:
    cfg = target(checkpoint, "--is_slide", "--num_workers", "3", "--opts", "eval.protocol=original")
    assert (cfg.eval.protocol, cfg.data.workers) == ("original", 3)
    assert target(checkpoint, "--is_slide", "eval.stride=[100, 90]").eval.stride == (100, 90)


def last_line(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()[-1].split("\t")


def test_measures_what_eval_measures(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = few_images(tmp_path)
    command = ["--config", str(SMOKE), "--model_path", checkpoint, "--device", "cpu"]
    slide = ["--is_slide", "--crop_size", "32", "48", "--stride", "20", "24"]
    assert val.main([*command, *slide, few]) == 0
    ours = last_line(capsys)
    assert ours[:3] == [checkpoint, "branch1", "port"]
    overrides = ["eval.protocol=port", "eval.crop_size=[48, 32]", "eval.stride=[24, 20]", few]
    script.main(["--checkpoint", checkpoint, *overrides])
    assert last_line(capsys) == ours
    assert val.main([*command, "--opts", few, "eval.network=mean"]) == 0
    whole = last_line(capsys)
    assert whole[1:3] == ["mean", "whole_image"]
    assert whole[5] != ours[5]


def mistakes(checkpoint: str, folder: Path) -> list[tuple[list[str], str]]:
    port = folder / "port.yml"
    port.write_text("test_config: {is_slide: true}\nmodel: {num_classes: 19}\n")
    (folder / "model.pdparams").touch()
    city: list[Any] = ["--config", str(CITY), "--model_path"]
    here = [*city, checkpoint]
    return [
        ([*here, "--is_slide", "--crop_size", "800", "769", "--stride", "801", "1"],
         "--stride 801 1: larger than the window 800 769, which would leave pixels out"),
        ([*here, "--is_slide", "--stride", "1", "900"], "--stride 1 900: larger than the window 800 800"),
        ([*here, "--is_slide", "--crop_size", "0", "8"], "--crop_size 0 8: give two positive numbers"),
        ([*here, "--crop_size", "8", "8"], "--crop_size 8 8: has no meaning without --is_slide"),
        ([*here, "--stride", "8", "8"], "--stride 8 8: has no meaning without --is_slide"),
        ([*here, "--scales", "0.5"], "--scales: has no meaning without --aug_eval"),
        ([*here, "--flip_horizontal"], "--flip_horizontal: has no meaning without --aug_eval"),
        ([*here, "--aug_eval", "--flip_vertical"], "--flip_vertical: not part of any protocol here"),
        ([*here, "--aug_eval", "--scales", "-1"], "'scales' is (-1.0,); expected positive numbers"),
        ([*here, "--auc_roc"], "--auc_roc: is not measured here"),
        ([*here, "--device", "xpu"], "--device xpu: not supported"),
        ([*city, str(folder / "gone.pt")], "gone.pt: no such checkpoint; check the path"),
        ([*city, str(folder / "model.pdparams")], "PaddlePaddle weights of the port"),
        (["--config", str(port), "--model_path", checkpoint], "is written for the PaddleSeg port"),
        (["--config", str(folder / "no.yaml"), "--model_path", checkpoint], "no such configuration file"),
    ]  # fmt: skip


def test_mistakes_are_named(checkpoint: str, tmp_path: Path) -> None:
    for command, message in mistakes(checkpoint, tmp_path):
        with pytest.raises(UserError) as error:
            val.main(command)
        assert message in str(error.value), command
        assert "\n" not in str(error.value)
