"""Evaluation of one image: the authors' and the port's windows against plain loops."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import IMAGENET_MEAN, IMAGENET_STD
from common.data.transforms import to_normalized
from common.errors import UserError
from common.measure.evaluation import evaluate
from common.measure.inference import sliding_window
from projects.cps.inference import (
    OriginalProtocol,
    PortProtocol,
    original_scores,
    original_windows,
    port_geometry,
    port_windows,
    unnormalized,
)

K = 4
BLACK = tuple(-m / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True))
GENERATOR = torch.Generator().manual_seed(0)
WEIGHT, BIAS = torch.randn(K, 3, 3, 3, generator=GENERATOR), torch.randn(K, generator=GENERATOR)


def toy(x: Tensor) -> Tensor:
    """Scores that see the border of the window and the mean of all of it."""
    scores = F.conv2d(x, WEIGHT.to(x.dtype), BIAS.to(x.dtype), padding=1)
    return scores + x.mean(dim=(1, 2, 3), keepdim=True)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


def image_of(height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return to_normalized(picture(height, width), IMAGENET_MEAN, IMAGENET_STD)[None].to(dtype)


def padded_to(values: np.ndarray, crop: tuple[int, int], fill: float) -> tuple[np.ndarray, list[int]]:
    before = [max(c - s, 0) // 2 for c, s in zip(crop, values.shape, strict=False)]
    after = [max(c - s, 0) - b for c, s, b in zip(crop, values.shape, before, strict=False)]
    ends = [*zip(before, after, strict=True), (0, 0)]
    return np.pad(values, ends, constant_values=fill), before


def by_hand(raw: np.ndarray, crop: tuple[int, int], stride: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The authors' scores (K, H, W) from the 8-bit picture, window by window."""
    height, width = raw.shape[:2]

    def score(values: np.ndarray) -> Tensor:
        x = torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))[None]
        return toy(x.to(dtype))[0]

    def normalized(values: np.ndarray) -> np.ndarray:
        return (values.astype(np.float64) - IMAGENET_MEAN) / np.array(IMAGENET_STD)

    if max(height, width) <= min(crop):
        full, (top, left) = padded_to(normalized(raw), crop, 0.0)
        return score(full)[:, top : top + height, left : left + width]
    canvas, (top, left) = padded_to(raw, crop, 0)
    rows, cols = canvas.shape[:2]
    total = torch.zeros(K, rows, cols, dtype=dtype)
    for i in range(math.ceil((rows - crop[0]) / stride[0]) + 1):
        for j in range(math.ceil((cols - crop[1]) / stride[1]) + 1):
            row = min(i * stride[0] + crop[0], rows) - crop[0]
            col = min(j * stride[1] + crop[1], cols) - crop[1]
            window = (slice(row, row + crop[0]), slice(col, col + crop[1]))
            total[(slice(None), *window)] += score(normalized(canvas[window]))
    return total[:, top : top + height, left : left + width]


SIZES = [(24, 24), (17, 20), (23, 24), (25, 24), (33, 47), (18, 50), (50, 7), (1, 60), (48, 48)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("crop", "stride"), [((24, 24), (16, 16)), ((20, 32), (14, 9)), ((24, 24), (24, 24))]
)
def test_original_windows_are_those_of_a_plain_loop(
    size: tuple[int, int], crop: tuple[int, int], stride: tuple[int, int], dtype: torch.dtype
) -> None:
    ours = original_windows(toy, image_of(*size, dtype), crop, stride, black=BLACK)
    assert ours.dtype == dtype
    assert ours.shape == (1, K, *size)
    theirs = by_hand(picture(*size), crop, stride, dtype)
    torch.testing.assert_close(ours[0], theirs, rtol=1e-5, atol=2e-5 if dtype == torch.float32 else 5e-6)


def test_the_stride_is_two_thirds_of_the_window() -> None:
    x = image_of(33, 47)
    ours = original_windows(toy, x, (25, 25), black=BLACK)
    assert torch.equal(ours, original_windows(toy, x, (25, 25), (17, 17), black=BLACK))


def test_one_short_side_is_padded_with_black_and_a_small_image_with_the_mean() -> None:
    # QUIRK window_padding: the padding's colour depends on the other side
    narrow, small = image_of(18, 50), image_of(18, 20)
    black, mean = (
        [original_windows(toy, x, (24, 24), (16, 16), black=level) for x in (narrow, small)]
        for level in (BLACK, (0.0, 0.0, 0.0))
    )
    assert not torch.allclose(black[0], mean[0], atol=1e-2)
    assert torch.equal(black[1], mean[1])
    single = sliding_window(toy, small, (24, 24))
    assert torch.equal(black[1], single)


def test_scores_are_summed_where_the_port_averages_them() -> None:
    x = image_of(40, 56)
    summed = original_windows(toy, x, (24, 24), (16, 16), black=BLACK)
    averaged = port_windows(toy, x, (24, 24), (16, 16))
    visits = original_windows(lambda y: torch.ones_like(y[:, :1]), x, (24, 24), (16, 16), black=BLACK)
    assert set(visits.unique().tolist()) == {1.0, 2.0, 4.0}
    torch.testing.assert_close(summed, averaged * visits, rtol=1e-5, atol=1e-5)
    assert torch.equal(summed.argmax(dim=1), averaged.argmax(dim=1))


@pytest.mark.parametrize("windows", [original_windows, port_windows])
def test_windows_in_batches_give_the_same(windows) -> None:
    x = torch.cat((image_of(33, 47, torch.float64), image_of(33, 47, torch.float64).flip(-1)))
    more = {"black": BLACK} if windows is original_windows else {}
    alone = windows(toy, x, (24, 24), (16, 16), **more)
    for batch_size in (2, 3, 100):
        torch.testing.assert_close(windows(toy, x, (24, 24), (16, 16), batch_size=batch_size, **more), alone)
    first = windows(toy, x[:1], (24, 24), (16, 16), **more)
    torch.testing.assert_close(alone[:1], first)


def scores_of(x: Tensor, **more) -> Tensor:
    return original_scores(toy, x, (24, 24), (16, 16), mean=IMAGENET_MEAN, std=IMAGENET_STD, **more)


def test_mirrored_windows_are_added() -> None:
    x = image_of(30, 41, torch.float64)
    both = scores_of(x, flip=True)

    def mirrored(y: Tensor) -> Tensor:
        return toy(y.flip(-1)).flip(-1)

    alone, other = (original_windows(f, x, (24, 24), (16, 16), black=BLACK) for f in (toy, mirrored))
    torch.testing.assert_close(both, alone + other)
    # windows are mirrored, not the image: their places are not symmetric
    assert not torch.allclose(other, scores_of(x.flip(-1)).flip(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_resize_the_8_bit_picture_with_the_factor_and_add_up(dtype: torch.dtype) -> None:
    raw, x = picture(31, 37), image_of(31, 37, dtype)
    scales = (0.75, 1.0, 1.3)
    expected = np.zeros((31, 37, K))
    for scale in scales:
        scaled = cv2.resize(raw, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
        assert scaled.shape[:2] == (round(31 * scale), round(37 * scale))
        scores = by_hand(scaled, (24, 24), (16, 16), dtype).float().permute(1, 2, 0).contiguous()
        expected += cv2.resize(scores.numpy(), (37, 31), interpolation=cv2.INTER_LINEAR)
    ours = scores_of(x, scales=scales)
    assert ours.dtype == torch.float64
    np.testing.assert_allclose(ours[0].permute(1, 2, 0).numpy(), expected, rtol=1e-5, atol=2e-5)


def test_the_factor_is_not_the_ratio_of_the_sizes() -> None:
    raw = picture(31, 37)
    by_factor = cv2.resize(raw, None, fx=0.75, fy=0.75, interpolation=cv2.INTER_LINEAR)
    by_size = cv2.resize(raw, (28, 23), interpolation=cv2.INTER_LINEAR)
    assert by_factor.shape == by_size.shape
    assert not np.array_equal(by_factor, by_size)
    values = []
    scores_of_scaled = original_scores(
        lambda y: (values.append(y), toy(y))[1],
        image_of(31, 37),
        (40, 40),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        scales=(0.75,),
    )
    assert scores_of_scaled.shape == (1, K, 31, 37)
    seen = values[0][:, :, 8:31, 6:34]
    assert torch.equal(seen, to_normalized(by_factor, IMAGENET_MEAN, IMAGENET_STD)[None])


def test_several_images_are_scored_at_a_scale() -> None:
    x = torch.cat((image_of(20, 30, torch.float64), image_of(20, 30, torch.float64).flip(-1)))
    together = scores_of(x, scales=(0.5, 1.5))
    apart = [scores_of(one[None], scales=(0.5, 1.5)) for one in x]
    torch.testing.assert_close(together, torch.cat(apart))


def test_a_scale_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"scale 0.01 makes an image of 0x0; use a larger scale"):
        scores_of(image_of(20, 30), scales=(0.01,))


# --- the port --------------------------------------------------------------------------------------------------


def port_by_hand(x: Tensor, crop: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    height, width = x.shape[-2:]
    total, visits = torch.zeros(1, K, height, width, dtype=x.dtype), torch.zeros(height, width)
    rows = 1 if height <= crop[0] else math.ceil((height - crop[0]) / stride[0]) + 1
    cols = 1 if width <= crop[1] else math.ceil((width - crop[1]) / stride[1]) + 1
    for r in range(rows):
        for c in range(cols):
            bottom, right = min(r * stride[0] + crop[0], height), min(c * stride[1] + crop[1], width)
            part = (..., slice(max(bottom - crop[0], 0), bottom), slice(max(right - crop[1], 0), right))
            total[part] += toy(x[part])
            visits[part] += 1
    return total / visits


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("crop", "stride"), [((24, 24), (16, 16)), ((20, 32), (20, 9)), ((60, 60), (40, 40))]
)
def test_port_windows_are_those_of_a_plain_loop(
    size: tuple[int, int], crop: tuple[int, int], stride: tuple[int, int]
) -> None:
    x = image_of(*size, torch.float64)
    torch.testing.assert_close(port_windows(toy, x, crop, stride), port_by_hand(x, crop, stride))


def test_an_image_inside_the_window_is_one_smaller_window() -> None:
    assert port_geometry((300, 900), (400, 512), (200, 300)) == ([(0, 0), (0, 300), (0, 388)], (300, 512))
    assert port_geometry((30, 20), (400, 512)) == ([(0, 0)], (30, 20))
    x = image_of(30, 20)
    assert torch.equal(port_windows(toy, x, (40, 40)), toy(x))


def test_a_step_larger_than_the_window_is_refused() -> None:
    for size in ((50, 60), (10, 10)):
        with pytest.raises(UserError, match=r"larger than the window .* would leave pixels out"):
            port_windows(toy, image_of(*size), (24, 24), (25, 16))


def test_pictures_come_back_from_normalized_images() -> None:
    for mean, std in ((IMAGENET_MEAN, IMAGENET_STD), ((127.5, 127.5, 127.5), (1.0, 1.0, 1.0))):
        shown = picture(6, 5)
        assert np.array_equal(unnormalized(to_normalized(shown, mean, std), mean, std), shown)


# --- as protocols ----------------------------------------------------------------------------------------------


def test_protocols_score_as_their_functions_do() -> None:
    x = image_of(33, 47)
    original = OriginalProtocol(crop_size=(24, 24), stride=(16, 16), scales=(0.75, 1.0), flip=True)
    assert torch.equal(original.scores(toy, x), scores_of(x, scales=(0.75, 1.0), flip=True))
    port = PortProtocol(crop_size=(24, 24), stride=(16, 16))
    torch.testing.assert_close(port.scores(toy, x), port_windows(toy, x, (24, 24), (16, 16)))
    mirrored = PortProtocol(crop_size=(24, 24), stride=(16, 16), flip=True).scores(toy, x)
    torch.testing.assert_close(mirrored, (port.scores(toy, x) + port.scores(toy, x.flip(-1)).flip(-1)) / 2)


@pytest.mark.parametrize("protocol", [OriginalProtocol, PortProtocol])
def test_the_evaluator_takes_the_protocols(protocol: type) -> None:
    how = protocol(crop_size=(24, 24))
    samples = [
        (image_of(h, w), toy(image_of(h, w)).argmax(dim=1).fill_(label), name)
        for h, w, label, name in ((30, 41, 1, "a"), (20, 22, 2, "b"))
    ]
    seen: dict[str, tuple[int, ...]] = {}
    result = evaluate(
        lambda x: F.one_hot(torch.ones(len(x), *x.shape[-2:], dtype=torch.long), K).movedim(-1, 1).float(),
        samples,
        K,
        how,
        on_image=lambda name, scores, _: seen.update({name: tuple(scores.shape)}),
    )
    assert seen == {"a": (K, 30, 41), "b": (K, 20, 22)}
    pixels = 30 * 41 + 20 * 22
    assert result.intersection == (0, 30 * 41, 0, 0)
    assert result.union == (0, pixels, 20 * 22, 0)
    assert result.miou_present == pytest.approx(30 * 41 / pixels / 2, rel=1e-15)
    assert result.protocol.kind == how.kind


@pytest.mark.parametrize("protocol", [OriginalProtocol, PortProtocol])
def test_a_step_larger_than_the_window_is_refused_beforehand(protocol: type) -> None:
    with pytest.raises(UserError, match="larger than the window"):
        protocol(crop_size=(24, 24), stride=(25, 25))
