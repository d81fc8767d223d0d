from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.data import transforms as T
from common.measure.evaluation import center_crop

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
GOLDEN = (
    Path(os.environ.get("SSS_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "golden" / "u2pl"
)


class Replay:
    """Recorded draws in order; a draw too many raises IndexError."""

    def __init__(self, uniform: list[float], integers: list[int]) -> None:
        self.uniform, self.integers, self.asked = uniform, integers, []

    def random(self) -> float:
        return self.uniform.pop(0)

    def randint(self, a: int, b: int, /) -> int:
        self.asked.append((a, b))
        return self.integers.pop(0)


def sample(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), np.uint8), rng.integers(0, 21, (height, width), np.uint8)


def resized(image: torch.Tensor, label: torch.Tensor, size: tuple[int, int]) -> list[torch.Tensor]:
    """Image (3, H, W) and label (H, W) resized by torch."""
    images = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)
    return [images[0], F.interpolate(label[None, None].float(), size=size, mode="nearest")[0, 0].long()]


def step_by_step(
    transform: T.TrainTransform, image: np.ndarray, label: np.ndarray, rng: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of a training sample: each operation on the whole image in turn."""
    x, y = T.to_normalized(image, MEAN, STD), torch.from_numpy(label).long()
    if transform.resize is not None:
        x, y = resized(x, y, transform.resize)
    if transform.scale_range is not None:
        scale = T.draw_scale(rng, transform.scale_range)
        x, y = resized(x, y, (int(y.shape[0] * scale), int(y.shape[1] * scale)))
    if transform.rotation is not None:
        low, high = transform.rotation
        x, y = T.rotate(x, y, low + (high - low) * rng.random())
    if transform.blur and rng.random() < 0.5:
        x = T.blur(x)
    if transform.flip and rng.random() < 0.5:
        x, y = x.flip(-1), y.flip(-1)
    offset, crop = T.draw_offset(rng, tuple(y.shape), transform.crop_size), transform.crop_size
    return T.crop(*T.pad_to(x, y, crop, transform.pad_label), offset, crop)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["down_pad", "up", "mixed"])
@pytest.mark.parametrize("path", [T.TrainTransform.__call__, step_by_step])
def test_training_pipeline_equals_the_originals(case: str, path: Callable[..., Any]) -> None:
    file = GOLDEN / f"pipeline_{case}.npz"
    if not file.is_file():
        pytest.skip(f"{file} is not there (set SSS_SHARED)")
    data = np.load(file, allow_pickle=False)
    draws = Replay(data["in_random"].tolist(), data["in_randint"].tolist())
    transform = T.TrainTransform(MEAN, STD, tuple(data["in_crop"].tolist()), pad_label=0)
    image, label = path(transform, data["in_image"], data["in_label"], draws)
    assert (draws.uniform, draws.integers) == ([], [])
    np.testing.assert_allclose(image.numpy(), data["out_image"], rtol=1e-5, atol=2e-5)
    np.testing.assert_array_equal(label.numpy(), data["out_label"])
    assert (image.dtype, label.dtype) == (torch.float32, torch.int64)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["val", "val_crop"])
def test_validation_pipeline_equals_the_originals(case: str) -> None:
    file = GOLDEN / f"pipeline_{case}.npz"
    if not file.is_file():
        pytest.skip(f"{file} is not there (set SSS_SHARED)")
    data = np.load(file, allow_pickle=False)
    whole = T.EvalTransform(MEAN, STD)(data["in_image"], data["in_label"])
    crop = tuple(data["in_crop"].tolist())
    image, label = (part[0] for part in center_crop(*(part[None] for part in whole), crop, 0))
    np.testing.assert_allclose(image.numpy(), data["out_image"], rtol=1e-5, atol=2e-5)
    np.testing.assert_array_equal(label.numpy(), data["out_label"])


@pytest.mark.parametrize("crop_size", [(33, 33), (64, 48), (90, 120), (1, 7)])
@pytest.mark.parametrize(
    "options",
    [{}, {"scale_range": None}, {"resize": (31, 60)}, {"flip": False}, {"blur": True}, {"rotation": (-9, 9)}],
    ids=str,
)
def test_fast_path_equals_the_definition(crop_size: tuple[int, int], options: dict) -> None:
    image, label = sample(47, 61)
    transform = T.TrainTransform(MEAN, STD, crop_size, pad_label=7, **options)
    for seed in range(12):
        fast, fast_label = transform(image, label, random.Random(seed))
        slow, slow_label = step_by_step(transform, image, label, random.Random(seed))
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=5e-5)
        assert torch.equal(fast_label, slow_label)
        assert fast.is_contiguous()
        assert fast_label.is_contiguous()


def test_fast_path_keeps_labels_exact_at_photo_size() -> None:
    image, label = sample(375, 500)
    transform = T.TrainTransform(MEAN, STD, (513, 513), pad_label=0)
    for seed in range(6):
        fast = transform(image, label, random.Random(seed))
        slow = step_by_step(transform, image, label, random.Random(seed))
        assert torch.equal(fast[1], slow[1])
        # a coordinate near 500 is rounded to 3e-5 of a pixel, and neighbours of noise differ by up to 4.5
        torch.testing.assert_close(fast[0], slow[0], rtol=0, atol=3e-4)


def test_nearest_resize_agrees_with_torch() -> None:
    generator = random.Random(0)
    for _ in range(60):
        old, new = ((generator.randint(1, 900), generator.randint(1, 300)) for _ in range(2))
        label = (np.arange(old[0])[:, None] * 1000 + np.arange(old[1])).astype(np.int64)
        found = T.EvalTransform(MEAN, STD, resize=new)(np.zeros((*old, 3), np.uint8), label)[1]
        expected = resized(torch.zeros(3, *old), torch.from_numpy(label), new)[1]
        assert torch.equal(found, expected), (old, new)


def test_scale_uses_two_draws_and_both_branches() -> None:
    assert T.draw_scale(Replay([0.49, 0.5], []), (0.5, 2.0)) == 0.75
    assert T.draw_scale(Replay([0.5, 0.5], []), (0.5, 2.0)) == 1.5


def test_draw_order_with_every_option() -> None:
    image, label = sample(40, 40)
    transform = T.TrainTransform(MEAN, STD, (30, 30), pad_label=0, rotation=(-10.0, 10.0), blur=True)
    draws = Replay([0.9, 0.25, 0.5, 0.6, 0.7], [4, 9])  # scale 1.25, angle 0, no blur, no flip
    result, result_label = transform(image, label, draws)
    assert draws.uniform == []
    assert draws.asked == [(0, 20), (0, 20)]
    x, y = resized(T.to_normalized(image, MEAN, STD), torch.from_numpy(label).long(), (50, 50))
    x, y = T.crop(x, y, (4, 9), (30, 30))
    torch.testing.assert_close(result, x, rtol=1e-4, atol=1e-3)  # angle 0 still resamples
    assert torch.equal(result_label, y)


def test_rotation_by_a_quarter_turn_moves_pixels_and_marks_the_outside() -> None:
    image, label = torch.randn(3, 8, 8), torch.randint(0, 20, (8, 8))
    turned, turned_label = T.rotate(image, label, 90.0)
    torch.testing.assert_close(turned, image.rot90(-1, (1, 2)), rtol=1e-4, atol=1e-5)
    assert torch.equal(turned_label, label.rot90(-1, (0, 1)))
    tilted, tilted_label = T.rotate(image, label, 45.0)
    assert tilted_label[0, 0] == 255
    assert tilted[:, 0, 0].abs().max() == 0
    assert set(tilted_label.unique().tolist()) <= {*label.unique().tolist(), 255}


def test_blur_kernel_sums_to_one_and_is_not_the_truncated_gaussian() -> None:
    kernel = T.blur_kernel()
    assert float(kernel.sum()) == pytest.approx(1.0, abs=1e-12)
    line = torch.exp(-(torch.arange(-2, 3).double() ** 2) / (2 * T.BLUR_SIGMA**2))
    truncated = torch.outer(line, line) / line.sum() ** 2
    assert float((kernel - truncated).abs().max()) > 1e-3
    flat = T.blur(torch.ones(3, 9, 9))
    torch.testing.assert_close(flat[:, 2:-2, 2:-2], torch.ones(3, 5, 5))
    assert float(flat[0, 0, 0]) < 1  # zeros outside


def test_padding_is_centred_with_the_odd_pixel_right_and_bottom() -> None:
    image, label = T.pad_to(torch.ones(3, 2, 5), torch.ones(2, 5, dtype=torch.int64), (5, 4), 9)
    assert image.shape == (3, 5, 5)
    assert label[:, 0].tolist() == [9, 1, 1, 9, 9]
    assert image[0, :, 0].tolist() == [0, 1, 1, 0, 0]


def test_photo_without_mask_gets_no_label_and_the_same_pixels() -> None:
    image, label = sample(20, 30)
    for blur in (False, True):
        transform = T.TrainTransform(MEAN, STD, (32, 32), pad_label=0, blur=blur)
        with_mask, _ = transform(image, label, random.Random(3))
        without, empty = transform(image, None, random.Random(3))
        assert torch.equal(with_mask, without)
        assert empty is None
    assert bool((T.EvalTransform(MEAN, STD)(image, None)[1] == 255).all())


def test_eval_without_crop_is_plain_normalization_and_resize_matches_torch() -> None:
    image, label = sample(20, 31)
    whole, whole_label = T.EvalTransform(MEAN, STD)(image, label)
    expected = T.to_normalized(image, MEAN, STD)
    assert torch.equal(whole, expected)
    exact = torch.from_numpy(((image - np.array(MEAN)) / np.array(STD)).transpose(2, 0, 1))
    torch.testing.assert_close(expected.double(), exact, rtol=3e-7, atol=1e-7)
    assert torch.equal(whole_label, torch.from_numpy(label).long())
    small, small_label = T.EvalTransform(MEAN, STD, resize=(13, 44))(image, label)
    x, y = resized(expected, whole_label, (13, 44))
    torch.testing.assert_close(small, x, rtol=1e-5, atol=5e-5)
    assert torch.equal(small_label, y)
