"""Loaders and views: what the batches hold, how lists are brought together, what is refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.config import load_config, plan_batch
from common.distributed import Dist
from common.errors import UserError
from projects.unimatch.augment import Views, draw_box, unlabeled_of
from projects.unimatch.config import BoxSettings, Config
from projects.unimatch.data import build_training_data, smallest_forward
from projects.unimatch.tests import toys
from tests.each import for_each
from tests.tiny import write_dataset

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def data_of(folder: Path, dataset: Path, **sections: Any) -> Any:
    cfg = load_config(Config, toys.write_config(folder / "c.yaml", dataset, "few", **sections))
    return build_training_data(cfg, Dist(), plan_batch(cfg.optim, 1))


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 labeled, 10 unlabeled photos; these have no masks."""
    return write_dataset(tmp_path_factory.mktemp("farm"), masks=False)


@for_each(
    ("variant", "loaders", "views"),
    [("unimatch", 3, 3), ("unimatch_v2", 2, 3), ("fixmatch", 3, 2), ("sup_only", 1, 0)],
)
def test_batches_of_every_variant(farm: Path, tmp_path: Path, variant: str, loaders: int, views: int) -> None:
    found = data_of(tmp_path, farm, method=toys.VARIANTS[variant])
    assert found.steps_per_epoch == (3 if variant == "sup_only" else 5)
    group = next(iter(found.epoch(0, 0, Dist(), False)))[0]
    assert len(group) == loaders
    assert group[0].image.shape == (2, 3, 32, 32)
    assert group[0].label.dtype == torch.int64
    for one in group[1:]:
        assert one.image.shape == (2, 3 * views, 32, 32)
        assert one.label.shape == (2, views, 32, 32)
        assert one.label.dtype == torch.uint8
    found.close()


def test_the_second_loader_shows_the_same_photos_otherwise(farm: Path, tmp_path: Path) -> None:
    """QUIRK quirks.same_photo."""
    for same in (True, False):
        found = data_of(tmp_path, farm, quirks={"same_photo": same})
        groups = [group[0] for group in found.epoch(0, 0, Dist(), False)]
        assert all(torch.equal(own.index, other.index) for _, own, other in groups) == same
        assert not any(torch.equal(own.image, other.image) for _, own, other in groups)
        found.close()


def test_an_epoch_of_v2_supervised(farm: Path, tmp_path: Path) -> None:
    found = data_of(
        tmp_path, farm, method={"mode": "sup_only"}, data={"dataset": str(farm), "epoch_images": 21}
    )
    assert found.steps_per_epoch == 10
    items = found.loaders["labeled"].dataset.items
    assert [item.id for item in items[:7]] == [*(item.id for item in items[6:12]), items[0].id]


def photo(height: int = 30, width: int = 44) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (height, width, 3)).astype(np.uint8)


def test_views_of_one_window() -> None:
    views = Views(MEAN, STD, (40, 36), strong=2)
    changed = 0
    for seed in range(30):
        x, maps = views(photo(), None, random.Random(seed))
        assert (x.shape, maps.shape) == ((9, 40, 36), (3, 40, 36))
        batch = unlabeled_of(toys.Batch(x[None], maps[None], torch.zeros(1)))
        black = -torch.tensor(MEAN) / torch.tensor(STD)
        assert torch.allclose(batch.weak.movedim(1, -1)[batch.padding], black)  # all that is padded is black
        changed += not torch.equal(*batch.strong)
        again, _ = views(photo(), None, random.Random(seed))
        assert torch.equal(x, again)
    assert changed > 25


def test_labels_follow_their_photo() -> None:
    label = (photo()[..., 0] > 127).astype(np.uint8)
    image = np.repeat(255 * label[..., None], 3, axis=2).astype(np.uint8)
    views = Views((0.0, 0.0, 0.0), (255.0, 255.0, 255.0), (24, 24), scale_range=(1.0, 1.0))
    for seed in range(5):
        x, y = views(image, label, random.Random(seed))
        assert torch.equal(x[0], y.float())


def test_boxes_lie_inside_at_every_form() -> None:
    rng = random.Random(0)
    for height, width in ((64, 64), (32, 320), (321, 100), (8, 8)):
        boxes = [draw_box(rng, height, width, BoxSettings()) for _ in range(300)]
        for box in boxes:
            assert 0 <= box.row0 <= box.row1 <= height
            assert 0 <= box.col0 <= box.col1 <= width
        shares = np.array([(b.row1 - b.row0) * (b.col1 - b.col0) / (height * width) for b in boxes])
        assert 0.4 < np.mean(shares > 0) < 0.6
        assert shares.max() <= 0.4


def test_one_image_per_forward_is_refused(farm: Path, tmp_path: Path) -> None:
    """Where BatchNorm could not train; V1's two views and DPT can."""
    cases = {"unimatch": 2, "unimatch_v2": 1, "fixmatch": 1, "sup_only": 1}
    for variant, images in cases.items():
        assert smallest_forward(toys.config(method=toys.VARIANTS[variant]), 1) == images
        if images == 1:
            with pytest.raises(UserError, match="one image per process and forward"):
                data_of(tmp_path, farm, method=toys.VARIANTS[variant], optim={"batch_size": 1})
    model = {"backbone": "dinov2_tiny"}
    data_of(
        tmp_path,
        farm,
        method=toys.V2,
        optim={"batch_size": 1},
        model=model,
        data={"crop_size": [28, 28], "dataset": str(farm)},
    )


def test_augmentations_that_unimatch_has_not(farm: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="UniMatch has neither"):
        data_of(tmp_path, farm, data={"dataset": str(farm), "blur": True})
