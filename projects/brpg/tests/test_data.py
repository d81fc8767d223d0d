"""What the loaders of a run deliver: views, borders, lists, second photos, and what is refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from common.config import IMAGENET_MEAN, plan_batch
from common.data.loaders import oversample
from common.data.streams import Batches, TrainingData
from common.data.transforms import EvalTransform
from common.data.views import split_views
from common.distributed import Dist
from common.errors import UserError
from common.mean_teacher.data import train_transform
from common.mean_teacher.evaluation import pad_label, protocol, reported_network
from projects.brpg.augment import TwoViews
from projects.brpg.config import Config, method_name
from projects.brpg.data import build_training_data, unlabeled_transform
from projects.brpg.tests import toys
from tests.tiny import write_dataset


@pytest.fixture
def farm(tmp_path: Path) -> Path:
    """6 labeled and 10 unlabeled photos of 40 x 48 pixels."""
    return write_dataset(tmp_path / "farm")


def training(cfg: Config, dist: Dist | None = None) -> TrainingData:
    dist = dist or Dist()
    return build_training_data(cfg, dist, plan_batch(cfg.optim, dist.world_size))


def steps(data: TrainingData, epoch: int = 0) -> list[list[Batches]]:
    return list(data.epoch(epoch, 0, Dist(), False))


def test_a_batch_has_labeled_photos_and_two_views_of_unlabeled_ones(farm: Path) -> None:
    data = training(toys.config(farm))
    assert list(data.loaders) == ["labeled", "unlabeled"]
    assert data.steps_per_epoch == 5  # of the unlabeled list
    found = steps(data)
    assert len(found) == 5
    for ((labeled, unlabeled),) in found:
        assert labeled.image.shape == (2, 3, 32, 32)
        assert (labeled.label != 255).any()
        assert unlabeled.image.shape == (2, 6, 32, 32)
        assert unlabeled.label is None
    weak, strong = split_views(torch.cat([unlabeled.image for ((_, unlabeled),) in found]))
    assert not torch.equal(weak, strong)
    same = (weak == strong).flatten(1).all(dim=1)
    assert not same.all()  # 8 % of the strong views are the weak ones


def test_masks_of_unlabeled_photos_are_never_read(tmp_path: Path) -> None:
    farm = write_dataset(tmp_path)
    for name in (tmp_path / "splits/few/unlabeled.txt").read_text().split():
        (tmp_path / "mask" / f"{name}.png").write_bytes(b"not a mask")
    assert len(steps(training(toys.config(farm)))) == 5


@pytest.mark.parametrize("zero", [True, False])
def test_label_of_the_border(farm: Path, zero: bool) -> None:
    """QUIRK quirks.pad_label_zero, in training and in the evaluation while training."""
    cfg = toys.config(farm, data={"crop_size": [64, 64]}, quirks={"pad_label_zero": zero},
                      eval={"during_training": "center_crop"})  # fmt: skip
    assert pad_label(cfg) == (0 if zero else 255)
    assert protocol(cfg, "training").pad_label == pad_label(cfg)
    image, label = np.full((8, 8, 3), 90, np.uint8), np.ones((8, 8), np.uint8)
    _, y = train_transform(cfg)(image, label, random.Random(0))
    assert set(y.unique().tolist()) == {1, pad_label(cfg)}
    seen = {int(v) for ((labeled, _),) in steps(training(cfg)) for v in labeled.label.unique()}
    assert (255 in seen) is not zero


@pytest.mark.parametrize("black", [True, False])
def test_border_of_unlabeled_photos(farm: Path, black: bool) -> None:
    """QUIRK quirks.pad_black."""
    view = unlabeled_transform(toys.config(farm, data={"crop_size": [128, 128]}, quirks={"pad_black": black}))
    rng = np.random.RandomState(0)

    class Draws:
        random = staticmethod(lambda: 1.0)  # no mirror, colours as they are
        uniform = staticmethod(rng.uniform)
        shuffle = staticmethod(rng.shuffle)
        randint = staticmethod(lambda a, b: a)

    x, _ = view(np.full((20, 20, 3), 255, np.uint8), None, Draws())
    corner = x[:3, -1, -1] * torch.tensor(toys.config(farm).data.std) + torch.tensor(IMAGENET_MEAN)
    expected = torch.zeros(3) if black else torch.tensor([round(v) for v in IMAGENET_MEAN]).float()
    torch.testing.assert_close(corner, expected, atol=1e-3, rtol=0)


def test_a_fixed_size_comes_first(farm: Path) -> None:
    """Views of unlabeled photos begin where labeled ones and those of an evaluation do."""
    cfg = toys.config(
        farm, data={"resize": [20, 24], "crop_size": [20, 24], "scale_range": [1.0, 1.0], "flip": False}
    )
    image = cv2.imread(str(farm.parent / "img" / "p000.jpg"))
    _, unlabeled = steps(training(cfg))[0][0]
    assert unlabeled.image.shape == (2, 6, 20, 24)
    view = unlabeled_transform(cfg)
    assert isinstance(view, TwoViews)
    x, _ = view(image, None, random.Random(0))
    expected, _ = EvalTransform(mean=cfg.data.mean, std=cfg.data.std, resize=(20, 24))(image, None)
    assert (x[:3] - expected).abs().max() < 0.51 / min(cfg.data.std)  # 8 bits


@pytest.mark.parametrize("values", [{"rotation": [-10, 10]}, {"blur": True}], ids=str)
def test_augmentations_of_labeled_photos_alone_are_refused(farm: Path, values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"data\.rotation, data\.blur: .*method\.mode=sup_only"):
        training(toys.config(farm, data=values))
    assert steps(training(toys.config(farm, data=values, method={"mode": "sup_only"})))


# --- lists -----------------------------------------------------------------------------------------------------


def test_supervised_only_takes_the_labeled_list(farm: Path) -> None:
    data = training(toys.config(farm, method={"mode": "sup_only"}))
    assert list(data.loaders) == ["labeled"]
    assert data.steps_per_epoch == 3
    own = data.loaders["labeled"].dataset.items
    assert own == data.split.labeled
    sampled = training(toys.config(farm, method={"mode": "sup_only", "sup_only_order": "sampled"}))
    assert sampled.loaders["labeled"].dataset.items == oversample(own, len(own), 2)


def test_labeled_list_is_brought_to_the_length_of_the_other(farm: Path) -> None:
    data = training(toys.config(farm))
    items = data.loaders["labeled"].dataset.items
    assert len(items) == 10
    assert {item.id for item in items} == {item.id for item in data.split.labeled}


@pytest.mark.parametrize("count", [1, 2])
def test_as_few_labeled_photos_as_one(tmp_path: Path, count: int) -> None:
    data = training(toys.config(write_dataset(tmp_path, labeled=count)))
    for ((labeled, _),) in steps(data):
        assert len(labeled.image) == 2


def test_a_last_lonely_image_is_left_out(tmp_path: Path) -> None:
    """BatchNorm cannot learn from one."""
    cfg = toys.config(write_dataset(tmp_path, labeled=5), method={"mode": "sup_only"})
    assert training(cfg).steps_per_epoch == 2


def test_batch_larger_than_the_data_is_refused(farm: Path) -> None:
    with pytest.raises(UserError, match=r"optim\.batch_size=16: larger than an epoch of 10"):
        training(toys.config(farm, optim={"batch_size": 16, "device_batch": 4}))


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_depend_on_neither_workers_nor_resume(farm: Path, workers: int) -> None:
    whole = steps(training(toys.config(farm)), 1)
    data = training(toys.config(farm, data={"workers": workers}))
    rest = list(data.epoch(1, 2, Dist(), False))
    data.close()
    for ours, theirs in zip(rest, whole[2:], strict=True):
        torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0)


def test_two_processes_share_the_samples_of_one(farm: Path) -> None:
    cfg = toys.config(farm, optim={"batch_size": 4})
    whole = steps(training(cfg))
    halves = [steps(training(cfg, Dist(rank, 2))) for rank in range(2)]
    for step, (batches,) in enumerate(whole):
        for role, batch in enumerate(batches):
            for rank in range(2):
                assert torch.equal(batch.image[rank::2], halves[rank][step][0][role].image)


# --- copy-paste ------------------------------------------------------------------------------------------------


def test_second_photos_for_copy_paste(farm: Path) -> None:
    cfg = toys.config(farm, method={"copy_paste": True, "paste_skip": 0.5})
    with_second = 0
    for ((labeled, unlabeled),) in steps(training(cfg)):
        assert labeled.image.shape == (2, 6, 32, 32)
        assert labeled.label.shape == (2, 64, 32)
        assert unlabeled.image.shape == (2, 6, 32, 32)
        with_second += int(labeled.image[:, 3:].flatten(1).any(dim=1).sum())
    assert 0 < with_second < 10


def test_broken_second_photos_stop_or_are_replaced(farm: Path) -> None:
    Image.new("L", (20, 20)).save(farm.parent / "mask" / "p003.png")
    method = {"copy_paste": True, "paste_skip": 0.0}
    with pytest.raises(UserError, match=r"p003\.png"):
        steps(training(toys.config(farm, method=method)))
    data = training(toys.config(farm, method=method, data={"on_error": "skip"}))
    for epoch in range(3):
        assert len(steps(data, epoch)) == 5


# --- what a run calls itself -------------------------------------------------------------------------------------


def test_names(farm: Path) -> None:
    found = {
        (method_name(cfg), reported_network(cfg))
        for cfg in (
            toys.config(farm),
            toys.config(farm, method={"prototypes": False}),
            toys.config(farm, method={"mode": "sup_only"}),
        )
    }
    assert found == {("brpg", "teacher"), ("mean_teacher", "teacher"), ("sup_only", "student")}
