"""DeepLab heads and the joined network: keys, outputs, parameter counts, layout."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common.errors import UserError
from common.mean_teacher.config import DeepLabConfig
from common.models.deeplab import ASPP, AuxHead, DeepLabV3Plus, build_network, upsample

TINY = {"backbone": "resnet_tiny", "num_classes": 5, "inner_planes": 8}


def built(num_classes, **options):
    heads = {
        name: options.pop(name)
        for name in ("rep_head", "aux_head", "return_concat", "dropout")
        if name in options
    }
    return build_network(DeepLabConfig(**options), num_classes, **heads)


def tiny(**options):
    torch.manual_seed(0)
    return built(**{**TINY, **options}).eval()


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"num_classes": 21, "rep_head": True}, 64_459_989),
        ({"num_classes": 19, "rep_head": True, "aux_head": True}, 66_824_422),
        ({"num_classes": 19, "aux_head": True, "backbone": "resnet50"}, 45_995_494),
    ],
)
def test_parameter_counts_of_the_originals(options, count):
    with torch.device("meta"):
        net = built(**options)
    assert sum(p.numel() for p in net.parameters()) == count


def test_state_keys_of_the_heads():
    net = tiny(rep_head=True, aux_head=True)
    weights = [
        k.removesuffix(".weight") for k in net.state_dict() if k.endswith("weight") and "encoder" not in k
    ]
    branches = [f"decoder.aspp.conv{i}.{j}" for i in range(1, 6) for j in ((1, 2) if i == 1 else (0, 1))]
    classifiers = [
        f"decoder.{name}.{i}" for name in ("classifier", "representation") for i in (0, 1, 4, 5, 8)
    ]
    assert weights == [
        "decoder.low_conv.0",
        "decoder.low_conv.1",
        *branches,
        "decoder.head.0",
        "decoder.head.1",
        *classifiers,
        "auxor.aux.0",
        "auxor.aux.1",
        "auxor.aux.4",
    ]
    biased = {
        k.removesuffix(".0.bias") for k in net.state_dict() if k.endswith(".0.bias") and "encoder" not in k
    }
    assert biased == {"decoder.low_conv", "decoder.classifier", "decoder.representation", "auxor.aux"}


def test_outputs_and_their_sizes():
    x = torch.randn(2, 3, 65, 49)
    out = tiny(rep_head=True, aux_head=True)(x)
    assert out.logits.shape == (2, 5, 17, 13)
    assert out.feats.shape == (2, 8, 17, 13)
    assert out.aux.shape == (2, 5, 9, 7)
    bare = tiny()(x)
    assert bare.feats is None
    assert bare.aux is None


def test_concatenated_features_are_low_then_high():
    net = tiny(return_concat=True, low_planes=6)
    assert net.decoder.feats_planes == 14
    x = torch.randn(1, 3, 33, 33)
    features = net.encoder(x)
    feats = net(x).feats
    torch.testing.assert_close(feats[:, :6], net.decoder.low_conv(features[0]))
    high = net.decoder.head(net.decoder.aspp(features[3]))
    torch.testing.assert_close(feats[:, 6:], upsample(high, features[0].shape[-2:]))
    torch.testing.assert_close(net.decoder.classifier(feats), net(x).logits)


def test_aspp_branches_in_order():
    torch.manual_seed(0)
    aspp = ASPP(6, 3, (2, 4, 6)).eval()
    x = torch.randn(2, 6, 9, 7)

    def branch(module: nn.Sequential, dilation: int) -> torch.Tensor:
        conv, norm, _ = module
        y = F.conv2d(x, conv.weight, padding=dilation * (conv.kernel_size[0] // 2), dilation=dilation)
        return norm(y).relu()

    pooled = aspp.conv1[2](F.conv2d(x.mean((2, 3), keepdim=True), aspp.conv1[1].weight)).relu()
    pooled = F.interpolate(pooled, size=(9, 7), mode="bilinear", align_corners=True)
    parts = [branch(aspp.conv2, 1), branch(aspp.conv3, 2), branch(aspp.conv4, 4), branch(aspp.conv5, 6)]
    torch.testing.assert_close(aspp(x), torch.cat((pooled, *parts), dim=1))


def test_predict_gives_the_upsampled_logits_without_the_other_heads():
    net = tiny(rep_head=True, aux_head=True)
    x = torch.randn(2, 3, 41, 33)
    expected = upsample(net(x).logits, (41, 33))
    calls = []
    for head in (net.decoder.representation, net.auxor):
        head.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(net.predict(x), expected)
    assert not calls


def test_every_parameter_gets_a_gradient():
    net = tiny(rep_head=True, aux_head=True, zero_init_residual=False).train()
    out = net(torch.randn(2, 3, 33, 33))
    (out.logits.square().mean() + out.feats.square().mean() + out.aux.square().mean()).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


def test_channels_last_reaches_every_convolution():
    net = tiny(rep_head=True, aux_head=True).to(memory_format=torch.channels_last)
    wrong = []

    def check(module, inputs, _):
        if not inputs[0].is_contiguous(memory_format=torch.channels_last):
            wrong.append(module)

    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(check)
    x = torch.randn(2, 3, 65, 65)
    last = net(x.to(memory_format=torch.channels_last))
    assert not wrong
    torch.testing.assert_close(
        last.logits, tiny(rep_head=True, aux_head=True)(x).logits, rtol=1e-4, atol=1e-5
    )


def test_one_image_per_process_is_refused_in_training_only():
    net = tiny()
    x = torch.randn(1, 3, 33, 33)
    net(x)
    with pytest.raises(UserError, match="at least 2 images per process"):
        net.train()(x)


def test_dropout_probability_is_the_argument():
    net = tiny(dropout=0.0).train()
    x = torch.randn(2, 3, 33, 33)
    assert torch.equal(net(x).logits, net(x).logits)
    net = tiny(dropout=0.5).train()
    assert not torch.equal(net(x).logits, net(x).logits)


def test_small_backbones_work_dilated():
    with torch.device("meta"):
        for name in ("resnet18", "resnet34"):
            net = built(21, backbone=name, stem="plain", aux_head=True)
            out = net.eval()(torch.empty(1, 3, 65, 65))
            assert out.logits.shape == (1, 21, 17, 17)
            assert out.aux.shape == (1, 21, 9, 9)


def test_width_argument():
    assert tiny(width=4).encoder.out_planes == (4, 8, 16, 32)


def test_upsample_aligns_corners():
    x = torch.randn(1, 2, 3, 4)
    y = upsample(x, (9, 13))
    torch.testing.assert_close(y[..., [0, 0, -1, -1], [0, -1, 0, -1]], x[..., [0, 0, -1, -1], [0, -1, 0, -1]])
    assert upsample(x, (3, 4)) is x


def test_heads_stand_alone():
    head = DeepLabV3Plus((4, 8, 8, 16), 3, inner_planes=4).eval()
    features = [torch.randn(1, c, 9, 9) for c in (4, 8, 8, 16)]
    assert head(features)[0].shape == (1, 3, 9, 9)
    assert AuxHead(8, 3, inner_planes=4).eval()(features[2]).shape == (1, 3, 9, 9)
