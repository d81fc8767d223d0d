"""Conversion of the authors' checkpoints: made by the rule of the golden network cases, or from small networks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from common.config import load_config, to_dict
from common.data.dataset_yaml import load_spec
from common.distributed import Dist
from common.errors import UserError
from projects.s4gan_mlmt import convert
from projects.s4gan_mlmt.config import Config
from projects.s4gan_mlmt.model import build_discriminator, build_networks, build_segmentation
from projects.s4gan_mlmt.state import Run
from projects.s4gan_mlmt.tests.rules import rule_state
from tests.conversions import Converter, Trap, same

GOLDEN = Path(__file__).resolve().parent / "golden"
State = dict[str, Tensor]

SMALL: dict[str, Any] = {
    "data": {"dataset": "shapes", "split": "labeled_20_seed0", "crop_size": [64, 64], "pipeline": "house"},
    "model": {"layers": [1, 1, 1, 1], "width": 2, "d_width": 2},
    "run": {"device": "cpu", "channels_last": False},
}
WRN38 = {"network": "deeplabv3p_wrn38", "layers": [1] * 6, "width": 2, "inner_planes": 4, "low_planes": 3}


def config_file(folder: Path, model: dict[str, Any] | None = None) -> Path:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL | ({"model": model} if model else {})), encoding="utf-8")
    return path


def small(folder: Path, *overrides: str, model: dict[str, Any] | None = None) -> Config:
    return load_config(Config, config_file(folder, model), overrides)


def weights(cfg: Config, seed: int, classes: int = 5) -> State:
    torch.manual_seed(seed)
    return build_segmentation(cfg, classes).state_dict()


def weights_d(cfg: Config, seed: int, classes: int = 5) -> State:
    torch.manual_seed(seed)
    return build_discriminator(cfg, classes).state_dict()


def written(path: Path, tensors: State, prefix: str = "module.") -> Path:
    torch.save({f"{prefix}{key}": value for key, value in tensors.items()}, path)
    return path


def convert_files(source: Path, *arguments: str, model: dict[str, Any] | None = None) -> dict[str, Any]:
    return Converter(convert.main, config_file(source.parent, model))(source, *arguments)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("model", [None, WRN38], ids=["deeplabv2", "wrn38"])
def test_networks_keep_their_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prefix: str, model: dict[str, Any] | None
) -> None:
    cfg = small(tmp_path, "model.d_width=2", model=model)
    source = written(tmp_path / "VOC_30000.pth", weights(cfg, 1), prefix)
    beside = written(tmp_path / "VOC_30000_D.pth", weights_d(cfg, 2), prefix)
    saved = convert_files(source, "--discriminator", str(beside), "model.d_width=2", model=model)
    assert list(saved["networks"]) == ["segmentation", "discriminator"]
    assert same(saved["networks"]["segmentation"], weights(cfg, 1))
    assert same(saved["networks"]["discriminator"], weights_d(cfg, 2))
    count = f"{len(weights(cfg, 1))} tensors used, 0 unused, 0 kept their initial values"
    assert capsys.readouterr().out.splitlines() == [
        f"segmentation: {source}: {count}",
        f"discriminator: {beside}: 10 tensors used, 0 unused, 0 kept their initial values",
        f"{tmp_path / 'converted.pt'}: written (segmentation, discriminator)",
    ]


@pytest.mark.golden
@pytest.mark.slow
def test_converted_network_scores_as_the_authors(tmp_path: Path) -> None:
    keys = json.loads((GOLDEN / "deeplabv2_forward.keys.json").read_text())
    source = written(tmp_path / "VOC_30000.pth", rule_state(keys))
    cfg = load_config(Config, config_file(tmp_path, {"network": "deeplabv2"}), ["data.dataset=voc"])
    networks, reports = convert.convert(source, cfg, load_spec("voc"), "config")
    assert len(reports["segmentation"].used) == len(keys)
    network = build_segmentation(cfg, 21)
    network.load_state_dict(networks["segmentation"])
    with np.load(GOLDEN / "deeplabv2_forward.npz") as recorded, torch.inference_mode():
        expected = torch.from_numpy(recorded["out_up"])
        scores = network.eval().predict(torch.from_numpy(recorded["in_image"]))[..., ::4, ::4]
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def with_networks(cfg: Config) -> Run:
    """A run of nothing but networks."""
    absent: Any = None
    return Run(cfg, Dist(), absent, build_networks(cfg, 5, Dist()), {}, absent)


def test_result_starts_a_run_and_describes_itself(tmp_path: Path) -> None:
    cfg = small(tmp_path)
    source = written(tmp_path / "VOC_5.pth", weights(cfg, 1))
    beside = written(tmp_path / "VOC_5_D.pth", weights_d(cfg, 2))
    saved = convert_files(source, "--discriminator", str(beside))
    assert (saved["project"], saved["step"], saved["config"]) == ("s4gan_mlmt", 0, to_dict(cfg))
    assert saved["classes"] == list(load_spec("shapes").classes)
    run = with_networks(cfg)
    run.load_networks(saved, "converted.pt")  # as run.init does
    assert same(run.nets.bare["segmentation"].state_dict(), weights(cfg, 1))
    assert same(run.nets.bare["discriminator"].state_dict(), weights_d(cfg, 2))


def test_segmentation_network_alone_leaves_the_discriminator_of_a_run(tmp_path: Path) -> None:
    cfg = small(tmp_path)
    saved = convert_files(written(tmp_path / "VOC_5.pth", weights(cfg, 1)))
    assert list(saved["networks"]) == ["segmentation"]
    run = with_networks(cfg)
    before = {key: value.clone() for key, value in run.nets.bare["discriminator"].state_dict().items()}
    run.load_networks(saved, "converted.pt")
    assert same(run.nets.bare["segmentation"].state_dict(), weights(cfg, 1))
    assert same(run.nets.bare["discriminator"].state_dict(), before)


def test_report_lists_every_key(tmp_path: Path) -> None:
    cfg = small(tmp_path)
    tensors = weights(cfg, 1) | {"criterion.weight": torch.zeros(1)}
    del tensors["bn1.num_batches_tracked"]  # as files from before these counters existed
    source = written(tmp_path / "a.pth", tensors)
    beside = written(tmp_path / "a_D.pth", weights_d(cfg, 2))
    convert_files(source, "--discriminator", str(beside), "--report", str(tmp_path / "report.txt"))
    assert (tmp_path / "report.txt").read_text(encoding="utf-8").splitlines() == [
        f"# segmentation from {source}",
        *(f"used\t{key}" for key in weights(cfg, 1) if key != "bn1.num_batches_tracked"),
        "unused\tcriterion.weight",
        f"# discriminator from {beside}",
        *(f"used\t{key}" for key in weights_d(cfg, 2)),
    ]


def test_discriminators_that_could_run_code_are_refused(tmp_path: Path) -> None:
    good = written(tmp_path / "good.pth", weights(small(tmp_path), 1))
    trap = tmp_path / "trap.pth"
    torch.save({"a": torch.zeros(1), "trap": Trap(tmp_path / "ran")}, trap)
    with pytest.raises(UserError, match=r"trap\.pth: .*save it as a plain state dict"):
        convert_files(good, "--discriminator", str(trap))
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "converted.pt").exists()


def mistakes(folder: Path) -> list[tuple[Path, Sequence[str], str]]:
    cfg = small(folder)
    good, good_d = weights(cfg, 1), weights_d(cfg, 2)
    a, d = written(folder / "a.pth", good), written(folder / "a_D.pth", good_d)
    part = {key: value for key, value in good.items() if key != "layer2.0.conv1.weight"}
    imagenet = {key: value for key, value in good.items() if not key.startswith("layer5.")}
    imagenet |= {"fc.weight": torch.rand(1000, 64), "fc.bias": torch.rand(1000)}
    other = written(folder / "other_D.pth", weights_d(cfg, 2, classes=21))
    return [
        (a, ["data.dataset=voc"], "a.pth: is of 5 classes, dataset 'voc' of"),
        (a, ["model.width=4"], "do not fit (file vs network)"),
        (a, ["model.layers=[1,2,1,1]"], "tensors are not in the file: layer2.1.conv1.weight"),
        (a, ["--discriminator", str(d), "--out", str(d)], "a_D.pth: is the source; choose another file"),
        (a, ["--discriminator", str(a)], "no file of a discriminator"),
        (a, ["--discriminator", str(other)], "other_D.pth: is of 21 classes, dataset 'shapes' of"),
        (a, ["--discriminator", str(d), "model.d_width=4"], "do not fit (file vs network)"),
        (d, [], "a_D.pth: is a discriminator; give the segmentation network's file"),
        (written(folder / "imagenet.pth", imagenet), [], "imagenet.pth: is a classifier such as ImageNet's"),
        (written(folder / "part.pth", part), [], "1 of 110 tensors are not in the file: layer2.0.conv1.weight"),
    ]  # fmt: skip


def test_mistakes_are_named_and_leave_nothing_behind(tmp_path: Path) -> None:
    Converter(convert.main, config_file(tmp_path)).refuses(mistakes(tmp_path))
