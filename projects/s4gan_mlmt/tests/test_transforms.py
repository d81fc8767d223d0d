"""The three pipelines beyond their recordings: options, quirks, odd sizes, photos without masks."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from common.config import IMAGENET_MEAN, IMAGENET_STD, build, dump, to_dict
from common.data.loaders import Transform
from common.data.transforms import TrainTransform
from common.errors import UserError
from projects.s4gan_mlmt.config import STATISTICS, Config
from projects.s4gan_mlmt.data import train_transform
from projects.s4gan_mlmt.tests.adapters_data import Replay
from projects.s4gan_mlmt.transforms import (
    CITYSCAPES,
    CONTEXT,
    VOC,
    CityscapesEvaluation,
    CityscapesTransform,
    ContextEvaluation,
    ContextTransform,
    VocTransform,
    with_short_side,
)
from tests.tiny import photo


def config(**sections: dict[str, Any]) -> Config:
    tree: dict[str, dict[str, Any]] = {"data": {"dataset": "voc", "split": "full"}}
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values
    return build(Config, tree)


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    image, label = photo(3, height=50, width=70)
    label[:3] = 255
    return image, label


# --- configuration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", list(STATISTICS))
def test_a_pipeline_brings_its_statistics(pipeline: str) -> None:
    cfg = config(data={"pipeline": pipeline})
    assert (cfg.data.mean, cfg.data.std) == STATISTICS[pipeline]
    assert build(Config, to_dict(cfg)) == cfg  # as saved and read back
    with pytest.raises(ValueError, match=f"'mean' is .*pipeline={pipeline} has its own"):
        config(data={"pipeline": pipeline, "mean": [1.0, 2.0, 3.0]})


def test_the_house_pipeline_takes_statistics() -> None:
    cfg = config(data={"pipeline": "house", "mean": [1.0, 2.0, 3.0]})
    assert cfg.data.mean == (1.0, 2.0, 3.0)
    transform = train_transform(cfg)
    assert isinstance(transform, TrainTransform)
    assert transform.mean == (1.0, 2.0, 3.0)
    assert "pipeline: house" in dump(cfg)


def test_each_pipeline_has_its_transform() -> None:
    def made(**data: Any) -> Transform:
        return train_transform(config(data=data))

    assert made(crop_size=[9, 8]) == VocTransform((9, 8))
    assert made(random_scale=True, random_mirror=True) == VocTransform((321, 321), True, True)
    assert made(pipeline="cityscapes", crop_size=[256, 512]) == CityscapesTransform((256, 512))
    assert isinstance(made(pipeline="pascal_context"), ContextTransform)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"blur": True}, "pipeline voc has none"),
        ({"pipeline": "cityscapes", "rotation": [-5.0, 5.0]}, "pipeline cityscapes has none"),
        ({"pipeline": "pascal_context", "resize": [40, 40]}, "pipeline pascal_context has none"),
        ({"pipeline": "cityscapes", "random_mirror": True}, "are of pipeline voc"),
    ],
)
def test_augmentations_that_a_pipeline_lacks_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_transform(config(data=data))


@pytest.mark.parametrize(
    ("method", "quirk", "mean"),
    [
        ("s4gan", "reversed", IMAGENET_MEAN[::-1]),
        ("s4gan_mlmt", "reversed", IMAGENET_MEAN[::-1]),
        ("s4gan", "plain", IMAGENET_MEAN),
        ("sup_only", "reversed", IMAGENET_MEAN),  # train_full.py has the mean right
    ],
)
def test_contexts_mean_is_reversed_in_adversarial_training(
    method: str, quirk: str, mean: tuple[float, ...]
) -> None:
    cfg = config(data={"pipeline": "pascal_context"}, method={"name": method}, quirks={"context_mean": quirk})
    transform = train_transform(cfg)
    assert isinstance(transform, ContextTransform)
    assert transform.statistics == (mean, IMAGENET_STD)
    assert cfg.data.mean == IMAGENET_MEAN  # of evaluation


@pytest.mark.parametrize(("quirk", "pad_label"), [("background", 0), ("ignored", 255)])
def test_contexts_padding(quirk: str, pad_label: int, pair: tuple[np.ndarray, np.ndarray]) -> None:
    cfg = config(
        data={"pipeline": "pascal_context", "crop_size": [48, 48]}, quirks={"context_padding": quirk}
    )
    transform = train_transform(cfg)
    assert isinstance(transform, ContextTransform)
    small = ContextTransform((48, 48), 40, transform.statistics, transform.pad_label)
    # not mirrored, short side 30, hence 30 x 42, at the upper left, not blurred
    x, y = small(pair[0], np.ones_like(pair[1]), Replay((0.9, 30, 0, 0, 0.9)))
    assert bool((y[:30, :42] == 1).all())
    assert bool((y[30:] == pad_label).all())
    assert bool((y[:, 42:] == pad_label).all())
    black = -torch.tensor(transform.statistics.mean) / torch.tensor(transform.statistics.std)
    assert torch.allclose(x[:, 30:], black[:, None, None].expand(3, 18, 48))


# --- VOC -------------------------------------------------------------------------------------------------------


def test_voc_is_only_cropped_by_default(pair: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = VocTransform((20, 30))(*pair, Replay((7, 11)))
    expected = pair[0][7:27, 11:41].astype(np.float32) - np.array(VOC.mean, np.float32)
    assert np.allclose(x.numpy(), expected.transpose(2, 0, 1), atol=1e-5)
    assert np.array_equal(y.numpy(), pair[1][7:27, 11:41])
    assert y.dtype == torch.int64


def test_voc_is_padded_below_and_right(pair: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = VocTransform((60, 64))(*pair, Replay((0, 6)))
    assert bool((x[:, 50:] == 0).all())
    assert bool((y[50:] == 255).all())
    assert np.array_equal(y[:50].numpy(), pair[1][:, 6:])


@pytest.mark.parametrize(("draw", "mirrored"), [(0, True), (1, False)])
def test_voc_mirror(draw: int, mirrored: bool, pair: tuple[np.ndarray, np.ndarray]) -> None:
    plain = VocTransform((20, 30))(*pair, Replay((1, 2)))
    found = VocTransform((20, 30), random_mirror=True)(*pair, Replay((1, 2, draw)))
    for one, other in zip(plain, found, strict=True):
        assert torch.equal(one.flip(-1) if mirrored else one, other)


def test_voc_scales_by_the_factor_and_not_the_rounded_size(pair: tuple[np.ndarray, np.ndarray]) -> None:
    transform = VocTransform((20, 30), random_scale=True)
    x, _ = transform(*pair, Replay((4, 0, 0)))  # 0.9: 45 x 63
    scaled = cv2.resize(pair[0], None, fx=0.9, fy=0.9, interpolation=cv2.INTER_LINEAR)
    assert scaled.shape[:2] == (45, 63)
    assert np.allclose(
        x.numpy(),
        (scaled[:20, :30] - np.array(VOC.mean)).transpose(2, 0, 1),
        atol=1e-4,
    )


# --- Cityscapes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(64, 128), (65, 128), (64, 131)])
def test_cityscapes_is_halved_as_a_whole(height: int, width: int) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    label = rng.integers(0, 19, (height, width), dtype=np.uint8)
    x, y = CityscapesTransform((16, 24), order="rgb")(image, label, Replay((5, 9, 0.6)))
    half = (width // 2, height // 2)
    whole = np.asarray(Image.fromarray(image).resize(half, Image.Resampling.BILINEAR))[9:25, 5:29]
    values = torch.from_numpy(whole.copy()).permute(2, 0, 1)
    restored = x * 255 + torch.tensor(CITYSCAPES.mean)[:, None, None]
    assert torch.equal(restored.round().to(torch.uint8), values)
    nearest = np.asarray(Image.fromarray(label).resize(half, Image.Resampling.NEAREST))[9:25, 5:29]
    assert np.array_equal(y.numpy(), nearest)


def test_cityscapes_networks_see_blue_first(pair: tuple[np.ndarray, np.ndarray]) -> None:
    draws = (1, 2, 0.6)
    bgr, _ = CityscapesTransform((10, 12))(*pair, Replay(draws))
    rgb, _ = CityscapesTransform((10, 12), order="rgb")(*pair, Replay(draws))
    assert torch.equal(bgr, rgb.flip(0))
    assert not torch.equal(bgr, rgb)
    evaluated = [CityscapesEvaluation((20, 40), order=order)(*pair)[0] for order in ("bgr", "rgb")]
    assert torch.equal(evaluated[0], evaluated[1].flip(0))


def test_cityscapes_refuses_images_smaller_than_two_crops(pair: tuple[np.ndarray, np.ndarray]) -> None:
    with pytest.raises(UserError, match=r"data\.crop_size=\[26, 20\]: larger than half an image of 50x70"):
        CityscapesTransform((26, 20))(*pair, random.Random(0))


# --- Context ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "long", "expected"),
    [((70, 50), True, (42, 30)), ((50, 70), False, (30, 42)), ((60, 60), True, (30, 30))],
)
def test_short_sides(size: tuple[int, int], long: bool, expected: tuple[int, int]) -> None:
    assert with_short_side(size, 30, width_is_long=long) == expected


def test_context_blurs_pictures_and_not_masks(pair: tuple[np.ndarray, np.ndarray]) -> None:
    transform = ContextTransform((20, 20), 50)
    sharp = transform(*pair, Replay((0.9, 50, 3, 4, 0.5)))
    blurred = transform(*pair, Replay((0.9, 50, 3, 4, 0.49, 0.8)))
    assert not torch.equal(sharp[0], blurred[0])
    assert torch.equal(sharp[1], blurred[1])


def test_context_evaluation_cuts_the_centre() -> None:
    image, label = photo(1, height=40, width=80)
    x, y = ContextEvaluation(20)(image, label)  # 20 x 40, of which columns 10 to 29
    assert x.shape == (3, 20, 20)
    small = np.asarray(Image.fromarray(label).resize((40, 20), Image.Resampling.NEAREST))
    assert np.array_equal(y.numpy(), small[:, 10:30])
    assert ContextEvaluation().statistics == CONTEXT


# --- all -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transform",
    [
        VocTransform((30, 90), True, True),
        ContextTransform((30, 90), 40),
        CityscapesTransform((20, 30)),
        lambda image, label, _: ContextEvaluation(30)(image, label),
        lambda image, label, _: CityscapesEvaluation((30, 60))(image, label),
    ],
    ids=["voc", "context", "cityscapes", "context_evaluation", "cityscapes_evaluation"],
)
def test_a_photo_without_mask_is_cut_alike_and_ignored_in_evaluation(
    transform: Callable[..., Any], pair: tuple[np.ndarray, np.ndarray], request: pytest.FixtureRequest
) -> None:
    training = "evaluation" not in request.node.callspec.id
    for seed in range(4):
        x, y = transform(*pair, random.Random(seed))
        bare, ignored = transform(pair[0], None, random.Random(seed))
        assert torch.equal(x, bare)
        assert (ignored is None) == training
        assert training or torch.equal(ignored, torch.full_like(y, 255))
        assert x.is_contiguous()
        assert x.dtype == torch.float32
        assert y.dtype == torch.int64
        assert tuple(x.shape[1:]) == tuple(y.shape)
