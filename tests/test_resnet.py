"""Encoders: sizes, keys, dilation, initialization, agreement with torchvision."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from common.models.resnet import BACKBONES, BasicBlock, Bottleneck, ResNet


def small(block=Bottleneck, layers=(1, 2, 2, 3), **options) -> ResNet:
    torch.manual_seed(0)
    net = ResNet(block, layers, width=4, **options)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # distinct statistics, so that a swapped layer shows
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
    return net.eval()


@pytest.mark.parametrize(
    ("output_stride", "side", "sizes"),
    [
        (8, 513, (129, 65, 65, 65)),
        (16, 513, (129, 65, 33, 33)),
        (32, 513, (129, 65, 33, 17)),
        (8, 769, (193, 97, 97, 97)),
    ],
)
def test_feature_sizes(output_stride, side, sizes):
    net = small(layers=(1, 1, 1, 1), output_stride=output_stride)
    with torch.no_grad():
        features = net(torch.zeros(1, 3, side, side))
    assert tuple(f.shape[-1] for f in features) == sizes
    assert tuple(f.shape[1] for f in features) == net.out_planes == (16, 32, 64, 128)


@pytest.mark.parametrize(("ceil_pool", "side"), [(True, 17), (False, 16)])
def test_pool_rounding_shows_at_even_sizes(ceil_pool, side):
    net = small(ceil_pool=ceil_pool)
    assert net(torch.zeros(1, 3, 64, 64))[0].shape[-1] == side
    assert net(torch.zeros(1, 3, 65, 65))[0].shape[-1] == 17


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize(("output_stride", "step"), [(8, 4), (16, 2)])
def test_dilation_gives_the_strided_values_at_every_position(block, output_stride, step):
    dilated = small(block, output_stride=output_stride).double()
    strided = small(block, output_stride=32).double()
    strided.load_state_dict(dilated.state_dict())
    x = torch.randn(2, 3, 97, 65, dtype=torch.double)
    with torch.no_grad():
        dense, sparse = dilated(x)[3], strided(x)[3]
    torch.testing.assert_close(dense[..., ::step, ::step], sparse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("output_stride", "expected"), [(8, [4, 8, 16]), (16, [2, 4, 8])])
def test_multi_grid_dilations_of_the_last_stage(output_stride, expected):
    net = small(output_stride=output_stride, multi_grid=(2, 2, 4))
    assert [block.conv2.dilation[0] for block in net.layer4] == expected
    assert [block.conv2.stride[0] for block in net.layer4] == [1, 1, 1]
    third = 2 if output_stride == 8 else 1
    assert [block.conv2.dilation[0] for block in net.layer3] == [1, third]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_plain_stem_is_torchvisions_network(name):
    reference = getattr(torchvision.models, name)(weights=None).eval()
    ours = BACKBONES[name](stem="plain", output_stride=32, ceil_pool=False).eval()
    weights = {key: value for key, value in reference.state_dict().items() if not key.startswith("fc.")}
    assert list(weights) == list(ours.state_dict())
    ours.load_state_dict(weights)
    stem = nn.Sequential(reference.conv1, reference.bn1, reference.relu, reference.maxpool)
    x = torch.randn(1, 3, 64, 48)
    with torch.no_grad():
        expected = reference.layer4(reference.layer3(reference.layer2(reference.layer1(stem(x)))))
        torch.testing.assert_close(ours(x)[3], expected)


def test_dilated_plain_resnet50_is_torchvisions():
    reference = torchvision.models.resnet50(weights=None, replace_stride_with_dilation=[False, True, True])
    ours = BACKBONES["resnet50"](stem="plain", output_stride=8)
    mine = {n: (m.stride, m.dilation, m.padding) for n, m in ours.named_modules() if isinstance(m, nn.Conv2d)}
    theirs = {
        n: (m.stride, m.dilation, m.padding) for n, m in reference.named_modules() if isinstance(m, nn.Conv2d)
    }
    assert mine == theirs


def test_deep_stem_keys_and_widths():
    with torch.device("meta"):
        state = BACKBONES["resnet101"]().state_dict()
    stem = {
        key: tuple(value.shape)
        for key, value in state.items()
        if key.endswith("weight") and "layer" not in key
    }
    assert stem == {
        "conv1.0.weight": (64, 3, 3, 3),
        "conv1.1.weight": (64,),
        "conv1.3.weight": (64, 64, 3, 3),
        "conv1.4.weight": (64,),
        "conv1.6.weight": (128, 64, 3, 3),
        "bn1.weight": (128,),
    }
    assert state["layer1.0.downsample.0.weight"].shape == (256, 128, 1, 1)
    assert "layer3.22.conv3.weight" in state
    assert "layer3.23.conv3.weight" not in state


def test_initialization():
    torch.manual_seed(0)
    net = ResNet(Bottleneck, (1, 1, 1, 1), width=32, zero_init_residual=True)
    for module in net.modules():
        if isinstance(module, (BasicBlock, Bottleneck)):
            assert not module.bn3.weight.any()
            assert (module.bn2.weight == 1).all()
    weight = net.layer4[0].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (weight.shape[0] * 9)) ** 0.5, rel=0.02)
    kept = ResNet(BasicBlock, (1, 1, 1, 1), width=4).layer1[0]
    assert (kept.bn2.weight == 1).all()
