"""The network of CPS: sizes, the head against its formula, initial values, optimizer groups."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import OptimConfig
from common.errors import UserError
from common.numerics.optim import build_optimizer
from projects.cps.config import ModelConfig
from projects.cps.network import Aspp, CpsNetwork, Head, build_cps_network, init_head, parameter_groups


def tiny(seed: int = 0, num_classes: int = 5) -> CpsNetwork:
    torch.manual_seed(seed)
    return build_cps_network(ModelConfig(backbone="resnet_tiny", inner_planes=16, low_planes=8), num_classes)


@pytest.mark.parametrize("backbone", ["resnet_tiny", "resnet18"])
@pytest.mark.parametrize("stem", ["deep", "plain"])
@pytest.mark.parametrize("size", [(64, 64), (65, 97), (33, 50)])
def test_features_and_logits_have_a_quarter_of_the_size(
    backbone: str, stem: str, size: tuple[int, int]
) -> None:
    net = build_cps_network(ModelConfig(backbone=backbone, stem=stem, inner_planes=24, low_planes=6), 7)
    x = torch.randn(2, 3, *size)
    feature, logits = net(x)
    quarter = tuple(math.ceil(side / 4) for side in size)
    assert feature.shape == (2, 24, *quarter)
    assert logits.shape == (2, 7, *quarter)
    assert net.predict(x).shape == (2, 7, *size)


def test_the_defaults_are_those_of_the_authors() -> None:
    net = build_cps_network(ModelConfig(), 21)
    blocks = net.backbone.layer4
    assert [block.conv2.dilation for block in blocks] == [(2, 2), (4, 4), (8, 8)]
    assert [block.conv2.stride for block in blocks] == [(1, 1)] * 3
    assert [net.backbone.layer3[0].conv2.stride, net.backbone.layer2[0].conv2.stride] == [(2, 2)] * 2
    assert [conv.dilation[0] for conv in net.head.aspp.map_convs] == [1, 6, 12, 18]
    assert not net.backbone.maxpool.ceil_mode
    assert net.classifier.bias is not None
    assert sum(p.numel() for p in net.parameters()) * 2 == 80_951_914
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-5, 0.1)}


def leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.01 * x)


def normalized(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    mean, var = (getattr(norm, f"running_{kind}").view(1, -1, 1, 1) for kind in ("mean", "var"))
    scaled = (x - mean) / (var + norm.eps).sqrt()
    return scaled * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)


def shuffled(module: nn.Module) -> nn.Module:
    """The module in float64 and evaluation mode with values that no default hides."""
    generator = torch.Generator().manual_seed(0)
    module = module.double().eval()
    with torch.no_grad():
        for value in module.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator).double() - 0.3)
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_var.abs_().add_(0.2)
    return module


def test_the_pooled_branch_is_added_not_concatenated() -> None:
    aspp = shuffled(Aspp(6, 4, (1, 2, 3)))
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    branches = [F.conv2d(x, aspp.map_convs[0].weight)]
    branches += [F.conv2d(x, aspp.map_convs[d].weight, padding=d, dilation=d) for d in (1, 2, 3)]
    local = F.conv2d(leaky(normalized(torch.cat(branches, dim=1), aspp.map_bn)), aspp.red_conv.weight)
    pooled = F.conv2d(x.mean(dim=(2, 3), keepdim=True), aspp.global_pooling_conv.weight)
    pooled = F.conv2d(leaky(normalized(pooled, aspp.global_pooling_bn)), aspp.pool_red_conv.weight)
    expected = leaky(normalized(local + pooled.expand_as(local), aspp.red_bn))
    assert (expected < 0).any()
    torch.testing.assert_close(aspp(x), expected)


def test_the_head_joins_aspp_and_first_stage_in_this_order() -> None:
    head = shuffled(Head((3, 9, 9, 6), 4, 2, (1, 2, 3)))
    stages = [torch.randn(2, planes, 9, 12, dtype=torch.float64) for planes in (3, 9, 9)]
    stages.append(torch.randn(2, 6, 3, 4, dtype=torch.float64))
    high = F.interpolate(head.aspp(stages[-1]), size=(9, 12), mode="bilinear", align_corners=True)
    low = normalized(F.conv2d(stages[0], head.reduce[0].weight), head.reduce[1]).relu()
    x = torch.cat((high, low), dim=1)
    for conv, norm in ((0, 1), (3, 4)):
        x = normalized(F.conv2d(x, head.last_conv[conv].weight, padding=1), head.last_conv[norm]).relu()
    torch.testing.assert_close(head(stages), x)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_the_aspp_are_those_of_its_values(training: bool) -> None:
    aspp = shuffled(Aspp(3, 2, (1, 2, 3))).train(training)
    for norm in (aspp.map_bn, aspp.global_pooling_bn, aspp.red_bn):
        norm.momentum = 0.0
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(aspp, (x,))


def test_one_image_cannot_train_the_pooled_branch() -> None:
    net = tiny()
    x = torch.randn(1, 3, 32, 48)
    with pytest.raises(UserError, match="use at least 2 images per process"):
        net(x)
    assert net.eval().predict(x).shape == (1, 5, 32, 48)


def test_synchronized_norms_are_not_refused() -> None:
    head = nn.SyncBatchNorm.convert_sync_batchnorm(Head((3, 6), 4, 2, (1, 2, 3)))
    with pytest.raises((RuntimeError, ValueError)) as failure:  # it asks for a GPU, not for more images
        head((torch.randn(1, 3, 4, 4), torch.randn(1, 6, 2, 2)))
    assert not isinstance(failure.value, UserError)


def test_float64_stays_float64() -> None:
    assert tiny().double().predict(torch.randn(2, 3, 32, 32, dtype=torch.float64)).dtype == torch.float64


# --- initial values --------------------------------------------------------------------------------------------


def test_the_head_starts_from_fan_in_and_identity_norms() -> None:
    net = build_cps_network(ModelConfig(backbone="resnet18"), 19)
    untouched = [value.clone() for value in net.backbone.state_dict().values()]
    bias = net.classifier.bias.detach().clone()
    with torch.no_grad():
        for norm in (m for m in net.head.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.fill_(3.0)
            norm.bias.fill_(4.0)
    init_head(net)
    for part in (net.head, net.classifier):
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                fan_in = module.weight[0].numel()
                spread = float(module.weight.detach().std()) / math.sqrt(2 / fan_in)
                assert abs(spread - 1) < 5 / math.sqrt(2 * module.weight.numel())
            elif isinstance(module, nn.BatchNorm2d):
                assert module.weight.eq(1).all()
                assert module.bias.eq(0).all()
    assert torch.equal(net.classifier.bias, bias)
    assert float(bias.abs().max().detach()) <= 1 / math.sqrt(256)
    assert all(torch.equal(a, b) for a, b in zip(untouched, net.backbone.state_dict().values(), strict=True))


def test_the_second_network_continues_the_random_stream() -> None:
    def heads() -> list[Tensor]:
        torch.manual_seed(3)
        nets = [tiny(1), tiny(1)]
        torch.manual_seed(3)
        for net in nets:
            init_head(net)
        return [net.head.aspp.red_conv.weight for net in nets]

    first, second = heads()
    assert not torch.equal(first, second)
    again = heads()
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])


# --- optimizer groups ------------------------------------------------------------------------------------------


def test_groups_hold_every_parameter_once_and_decay_convolution_weights_only() -> None:
    net = tiny()
    groups = parameter_groups(net, 1e-4)
    names = {p: name for name, p in net.named_parameters()}
    found = [[names[p] for p in group.parameters] for group in groups]
    assert sorted(name for part in found for name in part) == sorted(names.values())
    assert [group.weight_decay for group in groups] == [1e-4, 0.0] * 3
    assert [{name.split(".")[0] for name in part} for part in found] == [
        {part} for part in ("backbone", "backbone", "head", "head", "classifier", "classifier")
    ]
    order = [name for name, _ in net.named_parameters()]
    for part in found:
        assert part == [name for name in order if name in part]
    weights = {f"{name}.weight" for name, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    assert weights == {name for part in found[::2] for name in part}
    assert all(group.lr_factor == 1 for group in groups)


def test_parts_without_parameters_have_no_group() -> None:
    net = nn.Module()
    net.backbone = nn.Linear(2, 3)
    net.pool = nn.ReLU()
    groups = parameter_groups(net, 0.5)
    assert [len(list(group.parameters)) for group in groups] == [1, 1]


def test_decay_moves_convolution_weights_only() -> None:
    net = tiny()
    optimizer = build_optimizer(
        OptimConfig(lr=0.1, head_lr_factor=1.0, weight_decay=0.1, epochs=1, batch_size=2, momentum=0.0),
        parameter_groups(net, 0.1),
    )
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in net.named_parameters():
        factor = 0.99 if p.ndim == 4 else 1.0
        torch.testing.assert_close(p.detach(), factor * before[name])
