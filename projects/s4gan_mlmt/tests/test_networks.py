"""Sizes, modes and edges of the networks; their values are those of the golden cases."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch import Tensor, nn

from common.config import build
from common.errors import UserError
from projects.s4gan_mlmt.config import Config, MethodConfig, ModelConfig, QuirkConfig, S4GanDataConfig
from projects.s4gan_mlmt.deeplabv2 import DeepLabV2
from projects.s4gan_mlmt.discriminator import Discriminator
from projects.s4gan_mlmt.mlmt.config import MlmtConfig
from projects.s4gan_mlmt.mlmt.model import MultiLabelClassifier, load_backbone
from projects.s4gan_mlmt.model import LogitsOnly, build_discriminator, build_segmentation
from projects.s4gan_mlmt.wrn38 import Aspp, DeepLabV3PlusWrn38

TINY_WRN = {"layers": (1,) * 6, "width": 2, "inner_planes": 4, "low_planes": 3}


def tiny_deeplabv2(**arguments: object) -> DeepLabV2:
    torch.manual_seed(0)
    return DeepLabV2(3, layers=(1, 1, 1, 1), width=4, **arguments)


def tiny_wrn() -> DeepLabV3PlusWrn38:
    torch.manual_seed(0)
    return DeepLabV3PlusWrn38(3, **TINY_WRN)


def count(network: nn.Module, trainable: bool = False) -> int:
    return sum(p.numel() for p in network.parameters() if p.requires_grad or not trainable)


def config(model: ModelConfig, quirks: QuirkConfig | None = None, dropout: float = 0.5) -> Config:
    data = S4GanDataConfig(dataset="shapes", split="few")
    return Config(
        data=data, model=model, quirks=quirks or QuirkConfig(), method=MethodConfig(dropout=dropout)
    )


# --- DeepLabV2 -------------------------------------------------------------------------------------------------


def test_published_sizes_of_deeplabv2() -> None:
    with torch.device("meta"):
        network = DeepLabV2(21)
    assert (count(network), count(network, trainable=True)) == (44_048_532, 43_943_188)
    assert len(network.state_dict()) == 632


@pytest.mark.parametrize(
    ("size", "expected"),
    [((321, 321), (41, 41)), ((505, 64), (64, 9)), ((256, 512), (33, 65)), ((63, 57), (9, 8))],
)
def test_sides_of_deeplabv2(size: tuple[int, int], expected: tuple[int, int]) -> None:
    network = DeepLabV2(2, layers=(1, 1, 1, 1), width=1).eval()
    x = torch.randn(1, 3, *size)
    with torch.inference_mode():
        assert network(x).shape == (1, 2, *expected)
        assert network.predict(x).shape == (1, 2, *size)


def test_two_or_all_branches() -> None:
    x, (two, four) = torch.randn(1, 3, 33, 33), (tiny_deeplabv2(aspp_branches=n) for n in (2, 4))
    seen: list[Tensor] = []
    two.layer4.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    logits = two.eval()(x)
    each = [conv(seen[0]) for conv in two.layer5.conv2d_list]
    torch.testing.assert_close(logits, each[0] + each[1])
    torch.testing.assert_close(four.eval()(x), sum(each))  # same seed, hence same weights
    logits.sum().backward()
    unused = {p for conv in two.layer5.conv2d_list[2:] for p in conv.parameters()}
    assert set(two.unused_parameters()) == unused
    assert {p for p in two.parameters() if p.requires_grad and p.grad is None} == unused
    assert four.unused_parameters() == []


def test_frozen_affine_leaves_statistics_alive() -> None:
    network = tiny_deeplabv2()
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 17
    before = [norm.running_mean.clone() for norm in norms]
    network.train()(torch.randn(2, 3, 33, 33)).sum().backward()
    assert all(norm.weight.grad is None and norm.bias.grad is None for norm in norms)
    assert not any(torch.equal(norm.running_mean, old) for norm, old in zip(norms, before, strict=True))
    assert all(p.requires_grad for p in tiny_deeplabv2(frozen_affine=False).parameters())


def test_convolutions_begin_small() -> None:
    network = DeepLabV2(21, layers=(1, 1, 1, 1), width=32)
    for name, p in network.named_parameters():
        if p.ndim == 4:
            assert 0.008 < p.std() < 0.012, name
    bias = network.layer5.conv2d_list[0].bias.abs()
    assert 0 < bias.max() <= (9 * 1024) ** -0.5


@pytest.mark.parametrize(
    "arguments", [{"layers": (1, 1, 1)}, {"layers": (0, 1, 1, 1)}, {"width": 0}, {"aspp_branches": 3}]
)
def test_impossible_deeplabv2(arguments: dict[str, object]) -> None:
    with pytest.raises(UserError):
        DeepLabV2(2, **arguments)


# --- Wide-ResNet-38 --------------------------------------------------------------------------------------------


def test_published_sizes_of_wrn38() -> None:
    dropout = nn.Dropout
    with torch.device("meta"):
        network = DeepLabV3PlusWrn38(19)
    assert count(network) == count(network, trainable=True) == 137_103_936
    assert len(network.state_dict()) == 268
    assert nn.Dropout is dropout  # which the original replaces for the whole process
    rates = {name: m.p for name, m in network.named_modules() if isinstance(m, nn.Dropout2d)}
    assert rates == {"backbone.mod6.block1.convs.dropout": 0.3, "backbone.mod7.block1.convs.dropout": 0.5}


def test_wrn38_predicts_at_image_size_and_learns_everywhere() -> None:
    network, x = tiny_wrn().train(), torch.randn(2, 3, 33, 40)
    logits = network(x)
    assert logits.shape == (2, 3, 17, 20)
    logits.square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    assert network.eval().predict(x).shape == (2, 3, 33, 40)


def test_dropout_of_wrn38_is_of_channels_and_only_in_training() -> None:
    network, x = tiny_wrn(), torch.randn(2, 3, 33, 33)
    trunk = network.backbone.eval()
    assert torch.equal(trunk(x)[1], trunk(x)[1])
    dropped: list[Tensor] = []
    layer = trunk.mod7.block1.convs.dropout
    layer.register_forward_hook(lambda _module, _inputs, output: dropped.append(output))
    layer.train()
    first, second = trunk(x)[1], trunk(x)[1]
    assert not torch.equal(first, second)
    silent = (dropped[0] == 0).flatten(2).all(dim=2)
    assert silent.any()
    assert not silent.all()


def test_one_image_trains_no_pooling_branch() -> None:
    network, x = tiny_wrn(), torch.randn(1, 3, 32, 32)
    with pytest.raises(UserError, match="at least 2 images per process"):
        network.train()(x)
    assert network.eval()(x).isfinite().all()


def test_memory_layout_does_not_move_aspp() -> None:
    torch.manual_seed(0)
    aspp, x = Aspp(6, 4).eval(), torch.randn(2, 6, 5, 7)
    out = aspp(x.to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, aspp(x))


@pytest.mark.parametrize("arguments", [{"layers": (1, 1, 1, 1)}, {"width": 0}])
def test_impossible_wrn38(arguments: dict[str, object]) -> None:
    with pytest.raises(UserError, match="wrn38"):
        DeepLabV3PlusWrn38(2, **arguments)


# --- discriminator ---------------------------------------------------------------------------------------------


def test_published_size_of_the_discriminator() -> None:
    assert count(Discriminator(24)) == 2_778_561


def test_pool_of_the_authors_and_of_the_whole_map() -> None:
    torch.manual_seed(0)
    network = Discriminator(4, width=2).eval()
    windowed = copy.deepcopy(network)
    windowed.pool = (20, 20)
    x = torch.rand(2, 4, 321, 321)
    with torch.no_grad():
        for ours, theirs in zip(network(x), windowed(x), strict=True):
            torch.testing.assert_close(ours, theirs)
        wide = torch.rand(2, 4, 336, 336)  # leaves 21x21, of which one window of 20x20 fits
        assert not torch.allclose(network(wide)[1], windowed(wide)[1])
        scores, feats = network(torch.rand(3, 4, 33, 70))  # the whole map takes any crop
    assert scores.shape == (3, 1)
    assert feats.shape == (3, 16, 1, 1)
    assert ((scores > 0) & (scores < 1)).all()


@pytest.mark.parametrize(
    ("pool", "size", "message"),
    [
        (None, (15, 64), "at least 16 pixels"),
        ((20, 20), (256, 512), r"does not fit the map 16x32"),
        ((16, 32), (321, 321), r"does not fit the map 20x20"),
        ((2, 2), (64, 64), r"does not fit the map 4x4"),
    ],
)
def test_crops_that_do_not_fit(pool: tuple[int, int] | None, size: tuple[int, int], message: str) -> None:
    cfg = config(ModelConfig(d_pool=pool, d_width=2))
    with pytest.raises(UserError, match=message):
        build_discriminator(cfg, 3, size)
    network = build_discriminator(cfg, 3)
    with pytest.raises(UserError, match=message):
        network(torch.rand(1, 6, *size))


def test_discriminator_drops_channels_in_training() -> None:
    torch.manual_seed(0)
    network, x = build_discriminator(config(ModelConfig(d_width=8)), 3, (32, 32)), torch.rand(2, 6, 32, 32)
    assert [m.p for m in network.modules() if isinstance(m, nn.Dropout2d)] == [0.5] * 3
    assert not torch.equal(network.train()(x)[0], network(x)[0])
    assert torch.equal(network.eval()(x)[0], network(x)[0])
    without = build_discriminator(config(ModelConfig(d_width=8), dropout=0.0), 3).train()
    assert torch.equal(without(x)[0], without(x)[0])


def test_score_is_wide_under_half_precision() -> None:
    torch.manual_seed(0)
    network, x = Discriminator(4, width=8).eval(), torch.rand(2, 4, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        scores, feats = network(x)
    assert scores.dtype == feats.dtype == torch.float32
    torch.testing.assert_close(scores, network(x)[0], rtol=2e-2, atol=2e-2)


# --- classifier ------------------------------------------------------------------------------------------------


def test_classifier_is_torchvisions() -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(num_classes=4).eval()
    ours = MultiLabelClassifier("resnet50", 4)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 50, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert ours(x).dtype == torch.float32


def classifier(
    backbone: str, classes: int, weights: str = "none", say: Callable[[str], object] = str
) -> MultiLabelClassifier:
    network = MultiLabelClassifier(backbone, classes)
    load_backbone(MlmtConfig(backbone=backbone, weights=weights), [network], SimpleNamespace(info=say))
    return network


def test_classifier_of_small_data() -> None:
    lines: list[str] = []
    network = classifier("resnet_tiny", 5, "resnet_tiny_other_shapes.pth", lines.append)
    assert network.train()(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    assert len(lines) == 1
    assert "2 kept their initial values (fc.weight, fc.bias)" in lines[0]
    classifier("resnet_tiny", 5, say=lines.append)
    assert lines[1] == "classifiers: resnet_tiny: random numbers (mlmt.weights=none)"


def test_two_classifiers_differ_in_their_last_layer_alone() -> None:
    student, teacher = (classifier("resnet_tiny", 3, "resnet_tiny_other_shapes.pth") for _ in range(2))
    different = [
        name
        for name, value in student.state_dict().items()
        if not torch.equal(value, teacher.state_dict()[name])
    ]
    assert different == ["fc.weight", "fc.bias"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet_tiny", 0), "at least 1"),
        (("resnet_tiny", 3, "absent.pth"), "absent.pth: no such file"),
        (("resnet50", 3, "resnet_tiny_other_shapes.pth"), "do not fit"),
    ],
)
def test_impossible_classifiers(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        classifier(*arguments)


# --- of a configuration ----------------------------------------------------------------------------------------


def test_networks_of_a_configuration() -> None:
    deeplabv2 = build_segmentation(config(ModelConfig(layers=(1, 1, 1, 1), width=2)), 3)
    assert isinstance(deeplabv2, DeepLabV2)
    assert deeplabv2.layer5.branches == 2
    assert not deeplabv2.bn1.weight.requires_grad
    others = QuirkConfig(aspp_branches=4, frozen_affine=False)
    deeplabv2 = build_segmentation(config(ModelConfig(layers=(1, 1, 1, 1), width=2), others), 3)
    assert deeplabv2.layer5.branches == 4
    assert deeplabv2.bn1.weight.requires_grad
    wrn = build_segmentation(config(ModelConfig(network="deeplabv3p_wrn38", **TINY_WRN)), 3)
    assert isinstance(wrn, DeepLabV3PlusWrn38)
    assert list(wrn.state_dict()) == list(tiny_wrn().state_dict())
    small = ModelConfig(network="deeplabv3plus", backbone="resnet_tiny", inner_planes=8, low_planes=4)
    house = build_segmentation(config(small), 3)
    assert isinstance(house, LogitsOnly)
    assert house.eval().predict(torch.randn(1, 3, 32, 40)).shape == (1, 3, 32, 40)
    assert house(torch.randn(1, 3, 32, 40)).shape == (1, 3, 9, 11)  # the max-pool rounds up


@pytest.mark.parametrize(
    "settings",
    [
        {"layers": (1, 1, 1)},
        {"network": "deeplabv3p_wrn38", "layers": (3, 4, 23, 3)},
        {"network": "deeplabv3plus", "layers": (3, 4, 23, 3)},
        {"width": 0},
        {"d_width": 0},
        {"d_pool": (0, 4)},
    ],
)
def test_impossible_settings(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        build(ModelConfig, settings)
