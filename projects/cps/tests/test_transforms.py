from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from common.config import build
from common.data.transforms import draw_scale
from projects.cps.config import CpsDataConfig
from projects.cps.transforms import CpsTransform, scaled

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
SCALES = (0.5, 0.75, 1.0, 1.5, 1.75, 2.0)
GOLDEN = Path(__file__).with_name("golden") / "train_pre.npz"


class Recorder:
    """A generator that notes what was asked of it."""

    def __init__(self, seed: int) -> None:
        self.rng, self.asked = random.Random(seed), []

    def random(self) -> float:
        self.asked.append("random")
        return self.rng.random()

    def randint(self, a: int, b: int, /) -> int:
        self.asked.append((a, b))
        return self.rng.randint(a, b)

    def choice(self, seq: Sequence[float], /) -> float:
        self.asked.append(tuple(seq))
        return self.rng.choice(seq)


class Fixed(Recorder):
    """Given values instead of random ones: no mirror, factor 1, these integers."""

    def __init__(self, *integers: int) -> None:
        super().__init__(0)
        self.integers = list(integers)

    def random(self) -> float:
        return 0.0

    def choice(self, seq: Sequence[float], /) -> float:
        del seq
        return 1.0

    def randint(self, a: int, b: int, /) -> int:
        self.asked.append((a, b))
        return self.integers.pop(0)


def sample(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), np.uint8), rng.integers(0, 21, (height, width), np.uint8)


def described(
    image: np.ndarray,
    label: np.ndarray,
    crop: tuple[int, int],
    mirror: bool,
    scale: float,
    start: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """The description's own order: everything on the whole image, normalized in float64 before the crop."""
    height, width = label.shape
    if mirror:
        image, label = np.ascontiguousarray(image[:, ::-1]), np.ascontiguousarray(label[:, ::-1])
    size = (int(width * scale), int(height * scale))
    image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    label = cv2.resize(label, size, interpolation=cv2.INTER_NEAREST)
    values = (image.astype(np.float32) / 255).astype(np.float64)
    values = (values - np.array(MEAN) / 255) / (np.array(STD) / 255)
    window = tuple(slice(first, first + length) for first, length in zip(start, crop, strict=True))
    values, label = values[window], label[window]
    result = np.zeros((*crop, 3)), np.full(crop, 255)
    top, left = ((want - have) // 2 for want, have in zip(crop, label.shape, strict=True))
    rows, cols = slice(top, top + label.shape[0]), slice(left, left + label.shape[1])
    result[0][rows, cols], result[1][rows, cols] = values, label
    return result[0].transpose(2, 0, 1).astype(np.float32), result[1]


@pytest.mark.golden
@pytest.mark.parametrize("path", ["drawn", "given"])
def test_training_transform_equals_the_originals(path: str) -> None:
    data = np.load(GOLDEN, allow_pickle=False)
    names = [key[3 : -len("_img_rgb")] for key in data.files if key.endswith("_img_rgb")]
    assert names
    for name in names:
        image, label, scales, seed, mirror, scale, start = (
            data[f"in_{name}_{key}"]
            for key in ("img_rgb", "label", "scales", "random_seed", "draw_mirror", "draw_scale", "draw_crop")
        )
        transform = CpsTransform(MEAN, STD, tuple(data["in_crop"].tolist()), scales.tolist())
        if path == "drawn":
            x, y = transform(image, label, random.Random(int(seed)))
        else:
            x, y = transform.apply(image, label, bool(mirror >= 0.5), float(scale), *start.tolist())
        np.testing.assert_allclose(x.numpy(), data[f"out_{name}_image"], rtol=6e-6, atol=1.2e-6, err_msg=name)
        np.testing.assert_array_equal(y.numpy(), data[f"out_{name}_label"], err_msg=name)
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize("crop", [(33, 33), (64, 48), (95, 123), (130, 200), (1, 7)])
@pytest.mark.parametrize("scale", [0.5, 0.75, 1.0, 1.75])
@pytest.mark.parametrize("mirror", [False, True])
def test_crop_before_normalizing_equals_the_description(
    crop: tuple[int, int], scale: float, mirror: bool
) -> None:
    image, label = sample(47, 61)
    size = scaled((47, 61), scale)
    ends = [max(length - kept, 0) for length, kept in zip(size, crop, strict=True)]
    for start in {(0, 0), (ends[0] // 2, ends[1]), (min(ends[0] + 1, size[0] - 1) if ends[0] else 0, 0)}:
        x, y = CpsTransform(MEAN, STD, crop).apply(image, label, mirror, scale, *start)
        expected, expected_label = described(image, label, crop, mirror, scale, start)
        np.testing.assert_allclose(x.numpy(), expected, rtol=0, atol=2e-6)
        np.testing.assert_array_equal(y.numpy(), expected_label)
        assert x.is_contiguous()
        assert bool((x.numpy()[expected == 0] == 0).all())  # padding is exactly the mean colour


def test_draws_come_in_the_originals_order_and_only_where_needed() -> None:
    image, label = sample(40, 52)

    def asked(crop: tuple[int, int], **options) -> list:
        rng = Recorder(0)
        CpsTransform(MEAN, STD, crop, **{"scales": (1.0,), **options})(image, label, rng)
        return rng.asked

    assert asked((24, 32)) == ["random", (1.0,), (0, 17), (0, 21)]
    assert asked((24, 32), inclusive_crop=False) == ["random", (1.0,), (0, 16), (0, 20)]
    assert asked((40, 32)) == ["random", (1.0,), (0, 21)]
    assert asked((39, 52)) == ["random", (1.0,), (0, 2)]
    assert asked((60, 60)) == ["random", (1.0,)]
    assert asked((24, 32), flip=False) == [(1.0,), (0, 17), (0, 21)]
    assert asked((24, 32), scales=SCALES)[:2] == ["random", SCALES]
    assert asked((24, 32), scales=None) == ["random", (0, 17), (0, 21)]
    assert asked((40, 52), scales=None, scale_range=(0.5, 1.0)) == ["random"] * 3


@pytest.mark.parametrize("inclusive", [True, False])
def test_inclusive_bound_shortens_one_crop_in_side_minus_crop_plus_two(inclusive: bool) -> None:
    image, label = sample(10, 8)
    transform = CpsTransform(MEAN, STD, (8, 8), scales=None, flip=False, inclusive_crop=inclusive)
    short = Counter(
        int((transform(image, label, random.Random(seed))[1][-1] == 255).all()) for seed in range(400)
    )
    expected = 100 if inclusive else 0  # positions 0, 1, 2 and one too far
    assert abs(short[1] - expected) <= 30
    if not inclusive:
        assert short[1] == 0


def test_short_crops_are_padded_at_the_end_and_small_images_in_the_centre() -> None:
    image, label = sample(10, 10)
    transform = CpsTransform(MEAN, STD, (6, 6))
    x, y = transform(image, label, Fixed(5, 5))
    assert bool((y[-1] == 255).all())
    assert bool((y[:, -1] == 255).all())
    assert bool((x[:, -1] == 0).all())
    assert y[:5, :5].tolist() == label[5:, 5:].tolist()
    _, y = CpsTransform(MEAN, STD, (13, 12))(image, label, Fixed())
    assert y[1:11, 1:11].tolist() == label.tolist()
    assert int((y == 255).sum()) == 13 * 12 - 100  # 1 above and 2 below


def test_a_crop_of_one_pixel_never_misses_the_image() -> None:
    image, label = sample(3, 3)
    transform = CpsTransform(MEAN, STD, (1, 1), scales=(1.0,))
    assert all(int(transform(image, label, random.Random(seed))[1]) != 255 for seed in range(40))
    x, y = CpsTransform(MEAN, STD, (2, 2), scales=(0.5,))(image[:1, :1], label[:1, :1], random.Random(0))
    assert (x.shape, int(y[0, 0])) == ((3, 2, 2), int(label[0, 0]))


def test_mirror_of_one_half_and_factors_equally_often() -> None:
    label = np.arange(64, dtype=np.uint8).reshape(8, 8)
    image = np.repeat(label[..., None], 3, axis=2)
    transform = CpsTransform(MEAN, STD, (16, 16), scales=(1.0, 2.0))
    seen: Counter[tuple[bool, bool]] = Counter()
    for seed in range(800):
        y = transform(image, label, random.Random(seed))[1]
        large = bool((y != 255).all())
        row = (y[0] if large else y[4, 4:12]).tolist()
        seen[large, row == sorted(row)] += 1
    assert len(seen) == 4
    assert min(seen.values()) > 150


def test_continuous_factors_are_those_of_the_shared_transform() -> None:
    image, label = sample(20, 30)
    transform = CpsTransform(MEAN, STD, (90, 90), scales=None, scale_range=(0.5, 2.0), flip=False)
    for seed in range(20):
        y = transform(image, label, random.Random(seed))[1]
        height, width = scaled((20, 30), draw_scale(random.Random(seed), (0.5, 2.0)))
        kept = y != 255
        assert (int(kept.any(1).sum()), int(kept.any(0).sum())) == (height, width)


def test_photo_without_mask_gets_the_same_image_and_no_label() -> None:
    image, label = sample(40, 52)
    transform = CpsTransform(MEAN, STD, (48, 48))
    for seed in range(8):
        x, y = transform(image, None, random.Random(seed))
        assert torch.equal(x, transform(image, label, random.Random(seed))[0])
        assert y is None


def test_fixed_size_comes_first() -> None:
    image, label = sample(40, 52)
    small = (
        cv2.resize(image, (26, 20), interpolation=cv2.INTER_LINEAR),
        cv2.resize(label, (26, 20), interpolation=cv2.INTER_NEAREST),
    )
    for seed in range(6):
        x, y = CpsTransform(MEAN, STD, (16, 16), SCALES, resize=(20, 26))(image, label, random.Random(seed))
        expected = CpsTransform(MEAN, STD, (16, 16), SCALES)(*small, random.Random(seed))
        assert torch.equal(x, expected[0])
        assert torch.equal(y, expected[1])


def test_inputs_stay_as_they_are() -> None:
    image, label = sample(20, 20)
    kept = image.copy(), label.copy()
    for seed in range(4):
        x, y = CpsTransform(MEAN, STD, (20, 20), scales=(1.0,))(image, label, random.Random(seed))
        x.zero_()
        y.zero_()
    assert np.array_equal(image, kept[0])
    assert np.array_equal(label, kept[1])


@pytest.mark.parametrize("scales", [[], [1.0, 0.0], [-0.5]])
def test_impossible_factors_are_refused(scales: list[float]) -> None:
    with pytest.raises(ValueError, match=r"'scales' is .*expected (positive numbers|at least one entry)"):
        build(CpsDataConfig, {"dataset": "voc", "split": "full", "scales": scales})
