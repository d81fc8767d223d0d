"""The network has the tensors of the released checkpoints; its two predictors; the port's pooling; colours."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.data.files import voc_colormap
from projects.proto_consistency.config import ModelConfig
from projects.proto_consistency.network import SameMaxPool, build_network
from projects.proto_consistency.tests.palette import PROTOTYPE_COLORS, PROTOTYPE_PALETTE

GOLDEN = Path(__file__).resolve().parent / "golden"
TINY = ModelConfig(backbone="resnet_tiny", width=4, inner_planes=6, dilations=(1, 2, 3))


@pytest.mark.parametrize(
    ("case", "classes", "per_class", "aux_weight"), [("net_voc", 21, 4, 0.0), ("net_city", 19, 3, 0.4)]
)
def test_state_is_that_of_the_released_checkpoints(
    case: str, classes: int, per_class: int, aux_weight: float
) -> None:
    with torch.device("meta"):
        net = build_network(ModelConfig(aux_weight=aux_weight), classes, per_class)
    ours = {k: list(v.shape) for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    theirs = {key: shape for key, shape, *_ in json.loads((GOLDEN / f"{case}.keys.json").read_text())}
    ours.pop("auxor.aux.0.bias", None)  # the port leaves it out
    assert ours == theirs
    assert list(ours)[-1] == list(theirs)[-1] == "proto_net.proto_list"


def test_both_predictors_read_the_same_feature() -> None:
    torch.manual_seed(0)
    net, x = build_network(TINY, 3, 2).eval(), torch.randn(1, 3, 33, 41)
    with torch.inference_mode():
        out, (linear, proto) = net(x), net.predict_both(x)
        assert out.feats.shape == (1, TINY.feature_planes, 9, 11)
        assert torch.equal(net.feature_maps(x), out.feats)
        assert torch.equal(net.predict(x), linear)
        assert torch.equal(net.predict_prototypes(x), proto)
        full = F.interpolate(out.feats, x.shape[-2:], mode="bilinear", align_corners=True)
        rows = full.permute(0, 2, 3, 1).reshape(-1, TINY.feature_planes)
        expected = net.require_prototypes().match(rows).scores.view(1, 33, 41, 3).permute(0, 3, 1, 2)
    assert torch.allclose(proto, expected, atol=1e-4)
    assert linear.shape == proto.shape == (1, 3, 33, 41)


def test_without_prototypes_there_is_no_head() -> None:
    net = build_network(TINY, 3, None)
    assert net.proto_net is None
    assert not any(key.startswith("proto_net") for key in net.state_dict())
    with pytest.raises(AssertionError, match="without prototypes"):
        net.require_prototypes()


def test_temperature_reaches_the_head() -> None:
    assert build_network(TINY, 3, 2).require_prototypes().temperature == 0.1
    assert build_network(TINY, 3, 2, 0.5).require_prototypes().temperature == 0.5


@pytest.mark.parametrize("size", [(7, 9), (1, 3), (7, 8), (8, 7), (8, 8), (2, 2)])
def test_same_pooling_is_that_of_the_port(size: tuple[int, int]) -> None:
    """ceil(n / 2) values; with an even side the windows begin at 0, otherwise as in PyTorch."""
    x = torch.randn(1, 2, *size)
    found = SameMaxPool()(x)
    assert found.shape[-2:] == tuple(-(-side // 2) for side in size)
    row, col = (-(side % 2) for side in size)
    for i in range(found.shape[2]):
        for j in range(found.shape[3]):
            top, left = row + 2 * i, col + 2 * j
            window = x[:, :, max(top, 0) : top + 3, max(left, 0) : left + 3]
            assert torch.equal(found[:, :, i, j], window.amax(dim=(2, 3)))
    if all(side % 2 for side in size):
        assert torch.equal(found, F.max_pool2d(x, 3, 2, 1, ceil_mode=True))


def test_maxpool_switch_matters_for_even_sizes_only() -> None:
    models = [build_network(ModelConfig(**_fields(maxpool)), 3, 2).eval() for maxpool in ("ceil", "same")]
    models[1].load_state_dict(models[0].state_dict())
    with torch.inference_mode():
        odd, even = torch.randn(1, 3, 33, 33), torch.randn(1, 3, 32, 32)
        assert torch.equal(models[0](odd).logits, models[1](odd).logits)
        assert [tuple(m(even).logits.shape[-2:]) for m in models] == [(9, 9), (8, 8)]


def _fields(maxpool: str) -> dict:
    return {
        "backbone": "resnet_tiny",
        "width": 4,
        "inner_planes": 6,
        "dilations": (1, 2, 3),
        "maxpool": maxpool,
    }


def test_prototype_colours() -> None:
    assert len(PROTOTYPE_COLORS) == 84
    assert np.array_equal(
        PROTOTYPE_PALETTE[:84:4][1:7], voc_colormap(7)[1:]
    )  # the first of a class is its own
    assert (PROTOTYPE_PALETTE[84:] == 255).all()
