"""Weight files into the networks, with an account of what was used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from projects.s4gan_mlmt.config import ModelConfig
from projects.s4gan_mlmt.deeplabv2 import DeepLabV2
from projects.s4gan_mlmt.discriminator import Discriminator
from projects.s4gan_mlmt.model import (
    LogitsOnly,
    load_discriminator,
    load_pretrained,
    load_segmentation,
)
from projects.s4gan_mlmt.wrn38 import DeepLabV3PlusWrn38

State = dict[str, Tensor]


def deeplabv2(classes: int = 3) -> DeepLabV2:
    return DeepLabV2(classes, layers=(1, 1, 1, 1), width=2)


def wrn38() -> DeepLabV3PlusWrn38:
    return DeepLabV3PlusWrn38(3, layers=(1,) * 6, width=2, inner_planes=4, low_planes=3)


def written(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def random_state(network: nn.Module) -> State:
    return {name: torch.rand_like(value.float()) for name, value in network.state_dict().items()}


def without_counters(state: State) -> State:
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


def imagenet_file(path: Path) -> tuple[Path, State]:
    """As torchvision's: bare names, no counters, a classifier of 1000 classes."""
    state = without_counters(random_state(deeplabv2()))
    backbone = {name: value for name, value in state.items() if not name.startswith("layer5.")}
    head = {"fc.weight": torch.rand(1000, 64), "fc.bias": torch.rand(1000)}
    return written(path, backbone | head), backbone


def snapshot(network: nn.Module) -> State:
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(network: nn.Module, values: State) -> bool:
    own = network.state_dict()
    return all(torch.equal(own[name], value) for name, value in values.items())


def test_imagenet_file_fills_all_but_the_classifier(tmp_path: Path) -> None:
    path, backbone = imagenet_file(tmp_path / "resnet.pth")
    network = deeplabv2()
    before = snapshot(network)
    report = load_segmentation(network, path)
    assert same(network, backbone)
    assert same(network, {name: value for name, value in before.items() if name.startswith("layer5.")})
    assert set(report.used) == set(backbone)
    assert report.unused == ("fc.weight", "fc.bias")
    assert report.missing == tuple(name for name in before if name.startswith("layer5."))
    assert not network.bn1.weight.requires_grad


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("classes", [3, 5])
def test_file_of_the_whole_network_fills_a_classifier_of_its_classes(
    tmp_path: Path, prefix: str, classes: int
) -> None:
    state = random_state(deeplabv2(classes))
    path = written(tmp_path / "coco.pth", {f"{prefix}{name}": value for name, value in state.items()})
    network = deeplabv2(3)
    before = snapshot(network)
    report = load_segmentation(network, path)
    head = {name: value for name, value in state.items() if name.startswith("layer5.")}
    assert same(network, {name: value for name, value in without_counters(state).items() if name not in head})
    assert same(network, head if classes == 3 else {name: before[name] for name in head})
    assert len(report.mismatched) == (0 if classes == 3 else 8)


def test_incomplete_backbone_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    path, backbone = imagenet_file(tmp_path / "resnet.pth")
    del backbone["layer3.0.conv2.weight"]
    network = deeplabv2()
    before = snapshot(network)
    with pytest.raises(UserError, match=r"1 of \d+ tensors are not in the file: layer3\.0\.conv2\.weight"):
        load_segmentation(network, written(path, backbone))
    with pytest.raises(UserError, match="tensors are not in the file"):  # the original says nothing
        load_segmentation(network, written(path, {"somewhere.weight": torch.rand(2)}))
    assert same(network, before)


def trunk_file(path: Path, **more: Tensor) -> tuple[Path, State]:
    """As the authors': an entry `state_dict`, prefixed names, the end of the ImageNet network."""
    trunk = without_counters(random_state(wrn38().backbone))
    rest = {"bn_out.0.weight": torch.rand(128), "classifier.fc.bias": torch.rand(1000)}
    state = {f"module.{name}": value for name, value in (trunk | rest | more).items()}
    return written(path, {"epoch": 90, "state_dict": state}), trunk


def test_trunk_of_wrn38(tmp_path: Path) -> None:
    path, trunk = trunk_file(tmp_path / "wider_resnet38.pth.tar")
    network = wrn38()
    before = snapshot(network)
    report = load_segmentation(network, path)
    assert same(network.backbone, trunk)
    assert same(network, {name: value for name, value in before.items() if not name.startswith("backbone.")})
    assert report.unused == ("bn_out.0.weight", "classifier.fc.bias")
    assert str(path) in report.summary()
    assert f"{len(trunk)} tensors used" in report.summary()


def test_trunk_of_wrn38_is_loaded_strictly(tmp_path: Path) -> None:
    network = wrn38()
    before = snapshot(network)
    path, _ = trunk_file(tmp_path / "more.pth", **{"mod8.block1.convs.conv1.weight": torch.rand(1)})
    with pytest.raises(UserError, match=r"1 tensors have no place in it, such as mod8\.block1"):
        load_segmentation(network, path)
    path, trunk = trunk_file(tmp_path / "less.pth")
    del trunk["mod5.block1.proj_conv.weight"]
    with pytest.raises(UserError, match=r"not in the file: mod5\.block1\.proj_conv\.weight"):
        load_segmentation(network, written(path, {"state_dict": trunk}))
    assert same(network, before)


def test_whole_network_of_wrn38(tmp_path: Path) -> None:
    network, state = wrn38(), random_state(wrn38())
    report = load_segmentation(
        network, written(tmp_path / "a.pth", {f"module.{k}": v for k, v in state.items()})
    )
    assert same(network, without_counters(state))
    assert (report.unused, report.missing) == ((), ())


def test_backbone_of_small_data() -> None:
    model = ModelConfig(network="deeplabv3plus", backbone="resnet_tiny", inner_planes=8, low_planes=4)
    network, lines = LogitsOnly(5, model), Log()
    before = snapshot(network)
    settings = ModelConfig(weights="resnet_tiny_other_shapes.pth")
    load_pretrained(settings, network, None, lines)
    changed = [name for name, value in before.items() if not torch.equal(network.state_dict()[name], value)]
    assert changed
    assert all(name.startswith("encoder.") for name in changed)
    assert "kept their initial values (decoder." in lines[0]


class Log(list[str]):
    """What a run's log is told."""

    def info(self, line: str) -> None:
        self.append(line)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_discriminator_takes_its_own_file_with_either_names(tmp_path: Path, prefix: str) -> None:
    network, state = Discriminator(6, width=2), random_state(Discriminator(6, width=2))
    path = written(tmp_path / "VOC_5_D.pth", {f"{prefix}{name}": value for name, value in state.items()})
    report = load_discriminator(network, path)
    assert same(network, state)
    assert (report.unused, report.missing) == ((), ())


def test_discriminator_takes_no_other_file(tmp_path: Path) -> None:
    network, state = Discriminator(6, width=2), random_state(Discriminator(6, width=2))
    before, path = snapshot(network), tmp_path / "a.pth"
    cases = [
        (state | {"conv5.weight": torch.rand(1)}, r"no file of a discriminator.*such as conv5\.weight"),
        ({name: value for name, value in state.items() if name != "fc.bias"}, r"not in the file: fc\.bias"),
        (random_state(Discriminator(8, width=2)), r"conv1\.weight \(2, 8, 4, 4\) vs \(2, 6, 4, 4\)"),
        (random_state(deeplabv2()), "no file of a discriminator"),
    ]
    for content, message in cases:
        with pytest.raises(UserError, match=message):
            load_discriminator(network, written(path, content))
    assert same(network, before)


def test_log_says_what_was_loaded(tmp_path: Path) -> None:
    path, backbone = imagenet_file(tmp_path / "resnet.pth")
    critic = Discriminator(6, width=2)
    path_d = written(tmp_path / "D.pth", random_state(critic))
    log = Log()
    load_pretrained(ModelConfig(), deeplabv2(), critic, log)
    load_pretrained(ModelConfig(weights=str(path), weights_d=str(path_d)), deeplabv2(), critic, log)
    load_pretrained(ModelConfig(weights_d=str(path_d)), deeplabv2(), None, log)  # nobody to give it to
    assert log[0] == log[3] == "segmentation network: random numbers (model.weights=none)"
    assert log[1].startswith(
        f"segmentation network: {path}: {len(backbone)} tensors used, 2 unused (fc.weight"
    )
    assert log[2].startswith(f"discriminator: {path_d}: 10 tensors used, 0 unused")
    assert len(log) == 4


def test_absent_file() -> None:
    with pytest.raises(UserError, match=r"model\.weights=absent\.pth: no such file"):
        load_pretrained(ModelConfig(weights="absent.pth"), deeplabv2(), None, Log())


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("load", [load_segmentation, load_discriminator])
def test_files_that_could_run_code_are_refused(tmp_path: Path, load: Any) -> None:
    path = written(tmp_path / "a.pth", {"state_dict": {}, "trap": Trap(tmp_path / "ran")})
    with pytest.raises(
        UserError, match="holds objects other than tensors and plain containers, which are never loaded"
    ):
        load(Discriminator(6, width=2), path)
    assert not (tmp_path / "ran").exists()
