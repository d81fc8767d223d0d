"""Xception-65, the networks built on it, and student and teacher as a step uses them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from common.errors import UserError
from common.models.deeplab import SegmentationNetwork
from common.models.xception import Block, Xception65, pretrained_state
from projects.brpg.config import ModelConfig
from projects.brpg.losses import Criterion
from projects.brpg.model import Networks, segmentation_of

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("rectified", [True, False])
def test_identity_shortcut(rectified):
    """QUIRK quirks.rectified_shortcut."""
    block = Block(4, 4, rectified_shortcut=rectified).eval()
    for module in (block.sepconv1, block.sepconv2, block.sepconv3):
        nn.init.zeros_(module.pointwise.weight)  # the branch gives zero
    x = torch.randn(1, 4, 5, 5)
    kept = x.clone()
    y, _ = block(x)
    assert torch.equal(y, x.relu() if rectified else x)
    assert torch.equal(x, kept)  # in-place rectifiers stay inside


@pytest.mark.parametrize("rectified", [True, False])
def test_projecting_shortcut_sees_the_input(rectified):
    block = Block(4, 6, stride=2, rectified_shortcut=rectified).eval()
    nn.init.zeros_(block.sepconv3.pointwise.weight)
    x = torch.randn(1, 4, 5, 5)
    y, tapped = block(x)
    assert torch.allclose(y, block.skipbn(block.skip(x)))
    assert tapped.shape == (1, 6, 5, 5)
    assert (tapped < 0).any()


@pytest.mark.parametrize(("stride", "size"), [(8, 8), (16, 4)])
def test_sizes_and_channels(stride, size):
    encoder = Xception65(stride, width=8).eval()
    outs = encoder(torch.randn(1, 3, 64, 64))
    assert [tuple(out.shape) for out in outs] == [(1, planes, side, side) for planes, side in zip(
        encoder.out_planes, (16, 16, size, size), strict=True
    )]  # fmt: skip
    assert encoder.out_planes == (32, 32, 256, 256)


def test_an_image_of_the_published_crop_keeps_its_ratios():
    low, _, x, _ = Xception65(width=8).eval()(torch.randn(1, 3, 65, 97))
    assert low.shape[-2:] == (17, 25)
    assert x.shape[-2:] == (9, 13)


def test_dilations_and_momentum():
    encoder = Xception65()
    rates = {name: m.dilation[0] for name, m in encoder.named_modules() if name.endswith("depthwise")}
    assert {rates[name] for name in rates if name.startswith(("block1.", "block2.", "block3."))} == {1}
    assert {rates[name] for name in rates if not name.startswith(("block1.", "block2.", "block3."))} == {2}
    assert {m.momentum for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)} == {0.0003}


def test_initial_weights():
    torch.manual_seed(0)
    encoder = Xception65()
    weight = encoder.block10.sepconv2.pointwise.weight
    assert weight.std().item() == pytest.approx((2 / 728) ** 0.5, rel=0.01)
    depthwise = encoder.block10.sepconv2.depthwise.weight
    assert depthwise.std().item() == pytest.approx((2 / (9 * 728)) ** 0.5, rel=0.05)


def test_keys_and_shapes_are_the_authors():
    net = segmentation_of(ModelConfig(backbone="xception65"), 81)
    ours = {key: list(value.shape) for key, value in net.state_dict().items()}
    recorded = json.loads((GOLDEN / "net_xception65.keys.json").read_text())
    assert ours == {key.removeprefix("module."): shape for key, shape, _ in recorded}


def test_pretrained_state_drops_counters():
    weights = {
        "conv1.weight": torch.zeros(1),
        "bn1.num_batches_tracked": torch.zeros(1),
        "tmp_a": torch.zeros(1),
    }
    assert list(pretrained_state(weights)) == ["conv1.weight"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "xception65", "output_stride": 32}, "model.output_stride=32: xception65 has 8 or 16"),
        ({"backbone": "xception65", "aux_weight": 0.4}, "no output for the auxiliary head"),
        ({"backbone": "xception65", "width": 12}, "needs a multiple of 8"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(UserError, match=message):
        segmentation_of(ModelConfig(**options), 3)


@pytest.mark.parametrize("backbone", ["xception65", "resnet_tiny"])
def test_gradients_reach_every_parameter(backbone):
    torch.manual_seed(0)
    model = ModelConfig(
        backbone=backbone,
        width=8,
        inner_planes=8,
        dilations=(1, 2, 3),
        zero_init_residual=False,
        multi_grid=(1,),
    )
    net = segmentation_of(model, 3)
    out = net.train()(torch.randn(2, 3, 33, 33))
    assert out.logits.shape == (2, 3, 9, 9)
    assert out.feats.shape == (2, 8, 9, 9)
    (out.logits.square().sum() + out.feats.square().sum()).backward()
    missing = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing


def test_heads_can_be_left_out():
    model = ModelConfig(backbone="resnet_tiny", width=8, inner_planes=8, aux_weight=0.4, multi_grid=(1,))
    net = segmentation_of(model, 3, rep_head=False)
    out = net.eval()(torch.randn(1, 3, 33, 33))
    assert out.feats is None
    assert out.aux.shape[1] == 3


# --- student and teacher -----------------------------------------------------------------------------------------


def tiny() -> SegmentationNetwork:
    return segmentation_of(ModelConfig(backbone="resnet_tiny", width=8, inner_planes=8, multi_grid=(1,)), 3)


def test_teacher_modes():
    torch.manual_seed(0)
    nets = Networks(tiny(), tiny(), lambda x: None, Criterion())
    x = torch.randn(2, 3, 33, 33)
    running = nets.teacher.encoder.bn1.running_mean
    before = running.clone()
    first = nets.teach(x, train=False)
    assert torch.equal(running, before)
    assert torch.equal(first.logits, nets.teach(x, train=False).logits)
    assert not first.logits.requires_grad
    nets.teach(x, train=True)
    assert not torch.equal(running, before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_outputs_are_single_precision(precision):
    student = tiny()
    out = Networks(student, None, student, Criterion(), precision).forward(torch.randn(2, 3, 33, 33))
    assert out.logits.dtype == out.feats.dtype == torch.float32
    assert out.logits.requires_grad


def test_a_supervised_run_has_no_teacher():
    student = tiny()
    with pytest.raises(AssertionError, match="no teacher"):
        Networks(student, None, student, Criterion()).teach(torch.randn(2, 3, 33, 33), train=True)
