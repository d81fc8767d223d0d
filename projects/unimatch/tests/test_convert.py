"""The authors' checkpoints and weight files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.config import load_config
from common.errors import UserError
from projects.unimatch import convert
from projects.unimatch.config import Config, ModelConfig
from projects.unimatch.model import build_student, load_encoder, network_of
from tests.conversions import Converter, in_few_bytes, parallel, same

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def weights(name: str, seed: int, classes: int = 5) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return build_student(load_config(Config, CONFIGS / name), classes).state_dict()


def write(path: Path, **entries: object) -> Path:
    """As the authors save it: weights with the prefix of several processes beside numbers."""
    torch.save({"epoch": 79, "optimizer": {}, "previous_best": 75.2, **entries}, path)
    return path


def test_v1_gives_a_student_and_v2_both(tmp_path: Path) -> None:
    one = weights("smoke.yaml", 1)
    found = Converter(convert.main, CONFIGS / "smoke.yaml")(write(tmp_path / "v1.pth", model=parallel(one)))
    assert list(found["networks"]) == ["student"]
    assert same(found["networks"]["student"], one)
    student, teacher = weights("smoke_v2.yaml", 2), weights("smoke_v2.yaml", 3)
    converted = Converter(convert.main, CONFIGS / "smoke_v2.yaml")
    found = converted(write(tmp_path / "v2.pth", model=parallel(student), model_ema=parallel(teacher)))
    assert same(found["networks"]["student"], student)
    assert same(found["networks"]["teacher"], teacher)
    found = converted(write(tmp_path / "sup.pth", model=parallel(student)))  # a supervised-only file
    assert same(found["networks"]["teacher"], student)


def test_files_of_other_networks_are_refused(tmp_path: Path) -> None:
    small = write(tmp_path / "classes.pth", model=weights("smoke.yaml", 1, classes=7))
    other = write(tmp_path / "other.pth", model=weights("smoke_v2.yaml", 1))
    Converter(convert.main, CONFIGS / "smoke.yaml").refuses(
        [
            (small, [], "scores 7 classes, dataset 'shapes' of"),
            (other, [], "tensors are not in the file"),
            (tmp_path / "nowhere.pth", [], "no such weight file"),
        ]
    )


def test_a_released_file_of_full_size_fits(tmp_path: Path) -> None:
    """Keys and shapes of the networks; their values would be zeros."""
    for name in ("cityscapes_186_r50", "voc_classic_92_dinov2_small"):
        path = CONFIGS / f"{name}.yaml"
        classes = 19 if name.startswith("city") else 21
        network = build_student(load_config(Config, path), classes)
        source = write(tmp_path / f"{name}.pth", model=parallel(in_few_bytes(network.state_dict())))
        found = Converter(convert.main, path)(source)
        assert not any(value.any() for value in found["networks"]["student"].values())


def test_backbones_take_their_weight_files(tmp_path: Path) -> None:
    for model in (
        ModelConfig(backbone="resnet_tiny", width=4),
        ModelConfig(backbone="xception65", width=8),
        ModelConfig(backbone="dinov2_tiny"),
    ):
        torch.manual_seed(1)
        state = network_of(model, 3).backbone.state_dict()
        more = {"fc.weight": torch.zeros(2, 2)} if model.backbone == "resnet_tiny" else {}
        counters = {"itr": torch.zeros(1)} if model.backbone == "xception65" else {}
        torch.save(state | more | counters, tmp_path / "w.pth")
        torch.manual_seed(2)
        network = network_of(model, 3)
        report = load_encoder(network, tmp_path / "w.pth")
        assert same(network.backbone.state_dict(), state)
        assert report.unused == tuple(more)
        del state[next(iter(state))]
        torch.save(state, tmp_path / "w.pth")
        with pytest.raises(UserError, match="not in the file"):
            load_encoder(network, tmp_path / "w.pth")


def test_a_frozen_backbone_does_not_learn() -> None:
    network = network_of(ModelConfig(backbone="dinov2_tiny", freeze_encoder=True), 3)
    assert not any(p.requires_grad for p in network.backbone.parameters())
    assert all(p.requires_grad for p in network.head.parameters())
