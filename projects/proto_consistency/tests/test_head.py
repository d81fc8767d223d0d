"""Scores and matches of the prototype head against plain loops; the dense path against the sampled one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from projects.proto_consistency import head as module
from projects.proto_consistency.head import PrototypeHead, corner_weights

K, P, D = 3, 2, 5


def made(dtype: torch.dtype = torch.float64, temperature: float = 0.1, seed: int = 0) -> PrototypeHead:
    torch.manual_seed(seed)
    return PrototypeHead(K, P, D, temperature).to(dtype)


def plain_scores(head: PrototypeHead, feats: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel by pixel, class by class."""
    scores, nearest = torch.zeros(len(feats), K), torch.zeros(len(feats), K, dtype=torch.long)
    for i, z in enumerate(feats):
        for k in range(K):
            cosines = [
                float(z @ p / (z.norm() * p.norm())) for p in head.proto_list[k * P : (k + 1) * P].detach()
            ]
            nearest[i, k] = max(range(P), key=cosines.__getitem__)
            scores[i, k] = max(cosines) / head.temperature
    return scores, nearest


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_scores_and_nearest_are_those_of_a_loop(temperature: float) -> None:
    head, feats = made(temperature=temperature), torch.randn(17, D, dtype=torch.float64)
    scores, nearest = head.match(feats)
    expected, where = plain_scores(head, feats)
    assert torch.allclose(scores.float(), expected, atol=1e-5)
    assert torch.equal(nearest, where)
    assert (scores.abs() <= 1 / temperature + 1e-9).all()


def test_length_of_features_and_prototypes_does_not_matter() -> None:
    head, feats = made(), torch.randn(9, D, dtype=torch.float64)
    before = head.match(feats).scores
    with torch.no_grad():
        head.proto_list.mul_(torch.linspace(0.01, 50, K * P, dtype=torch.float64)[:, None])
    assert torch.allclose(head.match(feats * 37).scores, before)


def test_gradient_goes_to_the_features_alone_and_is_exact() -> None:
    head = made()
    feats = torch.randn(6, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: head.match(x).scores, feats)
    head.match(feats).scores.sum().backward()
    assert head.proto_list.grad is None
    assert not head.proto_list.requires_grad


def test_prototypes_may_move_between_forward_and_backward() -> None:
    """The order of update and backward is free, as in the original, whose head works on a copy."""
    gradients = []
    for moved in (False, True):
        head, feats = made(), torch.ones(4, D, dtype=torch.float64).cumsum(1).requires_grad_(True)
        loss = F.cross_entropy(head.match(feats).scores, torch.tensor([0, 1, 2, 0]))
        if moved:
            head.set(torch.randn_like(head.proto_list))
        loss.backward()
        gradients.append(feats.grad)
    assert torch.equal(*gradients)


def test_a_zero_vector_scores_zero_and_has_no_gradient() -> None:
    head, feats = made(torch.float32), torch.zeros(2, D)
    feats[1] = 1
    feats.requires_grad_(True)
    scores = head.match(feats).scores
    assert scores[0].eq(0).all()
    F.cross_entropy(scores, torch.tensor([1, 2])).backward()
    assert feats.grad[0].eq(0).all()
    assert feats.grad[1].abs().sum() > 0
    dense = head.dense(torch.zeros(1, D, 2, 2), (3, 3))
    assert dense.eq(0).all()


def test_no_pixel_gives_no_score() -> None:
    scores, nearest = made().match(torch.zeros(0, D, dtype=torch.float64))
    assert scores.shape == nearest.shape == (0, K)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("small", "size"),
    [
        ((4, 5), (13, 17)), ((4, 5), (4, 5)), ((1, 1), (6, 4)), ((1, 5), (3, 9)), ((9, 7), (4, 3)), ((3, 3), (1, 1)),
    ],
)  # fmt: skip
def test_dense_equals_resizing_and_matching_every_pixel(
    small: tuple[int, int], size: tuple[int, int], dtype: torch.dtype
) -> None:
    head, feats = made(dtype), torch.randn(2, D, *small, dtype=dtype)
    full = F.interpolate(feats, size, mode="bilinear", align_corners=True).permute(0, 2, 3, 1).reshape(-1, D)
    expected = head.match(full).scores.view(2, *size, K).permute(0, 3, 1, 2)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    assert (head.dense(feats, size) - expected).abs().max() < tolerance
    unit = F.normalize(head.proto_list, dim=1)
    assert torch.equal(head.nearest(feats, size).flatten(), (F.normalize(full, dim=1) @ unit.t()).argmax(1))


def test_dense_in_blocks_of_rows_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    head, feats = made(), torch.randn(1, D, 5, 4, dtype=torch.float64)
    whole = head.dense(feats, (11, 9))
    monkeypatch.setattr(module, "BLOCK", 1)
    assert torch.equal(head.dense(feats, (11, 9)), whole)
    assert head.nearest(feats, (11, 9)).shape == (1, 11, 9)


def test_opposite_neighbours_do_not_exceed_a_cosine_of_one() -> None:
    """Their mean is next to nothing, and its length is the small difference of large numbers."""
    head = made(torch.float32)
    z = torch.full((D,), 1e3)
    feats = torch.stack((z, -z + 1e-4), dim=1).view(1, D, 1, 2)
    scores = head.dense(feats, (1, 101))
    assert scores.isfinite().all()
    assert (scores.abs() <= 10).all()


def test_half_precision_is_widened_also_under_autocast() -> None:
    head, feats = made(torch.float32), torch.randn(8, D).bfloat16()
    expected = head.match(feats.float()).scores
    with torch.autocast("cpu", torch.bfloat16):
        found, dense = head.match(feats).scores, head.dense(feats.t().reshape(1, D, 2, 4), (2, 4))
    assert found.dtype == dense.dtype == torch.float32
    assert torch.equal(found, expected)
    assert torch.allclose(dense.flatten(2)[0].t(), expected, atol=1e-4)


def test_corners_of_coinciding_positions_take_one_sample() -> None:
    corners = corner_weights(torch.arange(513), 513, 129)
    assert corners.share[::4].eq(0).all()
    assert torch.equal(corners.low[::4], torch.arange(129))
    assert corners.high.max() == 128


def test_state_has_one_tensor_that_no_optimizer_moves() -> None:
    head = made()
    assert list(head.state_dict()) == ["proto_list"]
    assert head.proto_list.shape == (K * P, D)
    assert head.dim == D
    assert [p for p in head.parameters() if p.requires_grad] == []


@pytest.mark.parametrize("sizes", [(0, 1, 1, 0.1), (1, 0, 1, 0.1), (1, 1, 0, 0.1), (1, 1, 1, 0.0)])
def test_senseless_sizes_are_refused(sizes: tuple[int, int, int, float]) -> None:
    with pytest.raises(UserError, match="give positive numbers"):
        PrototypeHead(*sizes)


def test_prototypes_of_another_shape_are_refused() -> None:
    with pytest.raises(UserError, match=r"shape \(5, 5\), the network has \(6, 5\)"):
        made().set(torch.zeros(5, D))
