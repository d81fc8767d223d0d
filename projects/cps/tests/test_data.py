from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.config import BatchPlan, build, plan_batch
from common.data.dataset_yaml import load_spec
from common.data.lists import read_entries, read_ids
from common.data.loaders import Batch, Loader
from common.data.split import resolve_split
from common.data.streams import TrainingData
from common.distributed import Dist
from common.errors import UserError
from projects.cps.config import Config
from projects.cps.data import build_training_data, epoch_images, never_used, train_transform
from splits.prepare.archives import write_index_mask
from tests.tiny import write_dataset

ROOT = Path(__file__).resolve().parents[3]
CITY = "DATA/city/config_new"
VOC = "DATA/pascal_voc/subset_train_aug"


def config(dataset: Path | str, **sections: Mapping[str, Any]) -> Config:
    tree: dict[str, dict[str, Any]] = {
        "data": {"dataset": str(dataset), "split": "few", "crop_size": [32, 32], "workers": 0},
        "optim": {"lr": 0.01, "epochs": 3, "batch_size": 2},
    }
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | dict(values)
    return build(Config, tree)


def training(dataset: Path | str, dist: Dist | None = None, **sections: Mapping[str, Any]) -> TrainingData:
    dist = dist or Dist()
    cfg = config(dataset, **sections)
    return build_training_data(cfg, dist, plan_batch(cfg.optim, dist.world_size))


def groups(
    data: TrainingData, epoch: int, start: int = 0, dist: Dist | None = None
) -> list[tuple[Batch, ...]]:
    return [batches for group in data.epoch(epoch, start, dist or Dist(), False) for batches in group]


def positions(loader: Loader, epoch: int) -> list[int]:
    loader.set_epoch(epoch)
    return [key.position for keys in loader.sampler for key in keys]


def assert_same(left: list[tuple[Batch, ...]], right: list[tuple[Batch, ...]]) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0)


@pytest.fixture
def farm(tmp_path: Path) -> Path:
    """6 labeled photos and 10 unlabeled ones without masks."""
    return write_dataset(tmp_path, masks=False)


CUTMIX = {"name": "cps_cutmix"}


# loaders and lengths


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("sup_only", ["labeled"]),
        ("cps", ["labeled", "unlabeled"]),
        ("cps_cutmix", ["labeled", "unlabeled_0", "unlabeled_1"]),
        ("mean_teacher", ["labeled", "unlabeled"]),
        ("cct", ["labeled", "unlabeled"]),
        ("gct", ["labeled", "unlabeled"]),
    ],
)
def test_every_method_has_its_loaders_and_the_same_epoch(farm: Path, name: str, roles: list[str]) -> None:
    data = training(farm, method={"name": name})
    assert list(data.loaders) == roles
    assert {len(loader.dataset) for loader in data.loaders.values()} == {10}
    assert data.steps_per_epoch == 5
    for batches in groups(data, 1):
        for role, batch in zip(roles, batches, strict=True):
            assert (batch.image.shape, batch.image.dtype) == ((2, 3, 32, 32), torch.float32)
            assert (batch.label is not None) == (role == "labeled")
        label = batches[0].label
        assert (label.shape, label.dtype) == ((2, 32, 32), torch.int64)
        assert bool((label != 255).any())


def test_epoch_is_the_longer_list_or_as_configured(farm: Path, tmp_path: Path) -> None:
    split = resolve_split(load_spec(farm), "few")
    assert epoch_images(config(farm), split) == 10
    assert epoch_images(config(farm, data={"epoch_images": 13}), split) == 13
    longer = write_dataset(tmp_path / "longer", labeled=9, unlabeled=4)
    assert epoch_images(config(longer), resolve_split(load_spec(longer), "few")) == 9
    data = training(farm, data={"epoch_images": 13})
    assert data.steps_per_epoch == 6
    assert {len(loader.dataset) for loader in data.loaders.values()} == {13}


@pytest.mark.parametrize("labeled", [1, 2])
def test_a_single_labeled_photo_suffices(tmp_path: Path, labeled: int) -> None:
    data = training(write_dataset(tmp_path, labeled=labeled, unlabeled=7))
    seen = groups(data, 0)
    assert len(seen) == 3
    assert {int(i) for batch, _ in seen for i in batch.index} == set(range(labeled))
    first = seen[0][0]
    assert not torch.equal(first.image[0], first.image[1])


def test_every_image_comes_equally_often_but_for_the_random_rest(farm: Path) -> None:
    data = training(farm, data={"epoch_images": 62}, optim={"batch_size": 31})
    counts = [Counter(int(i) for batches in groups(data, 0) for i in batches[k].index) for k in range(2)]
    assert sorted(counts[0]) == list(range(6))
    assert min(counts[0].values()) >= 10
    assert sorted(counts[1]) == list(range(10))
    assert min(counts[1].values()) >= 6
    assert [count.total() for count in counts] == [62, 62]


def test_images_beyond_a_short_epoch_are_reported(farm: Path) -> None:
    data = training(farm, data={"epoch_images": 6})
    assert never_used(data) == ["data.epoch_images=6: the other 4 unlabeled images are never used"]
    assert never_used(training(farm)) == []
    assert {int(i) for epoch in range(4) for batch in groups(data, epoch) for i in batch[1].index} == set(
        range(6)
    )


def test_accumulation_groups_forwards(farm: Path) -> None:
    data = training(farm, optim={"batch_size": 4, "device_batch": 2})
    assert (data.accumulate, data.steps_per_epoch) == (2, 2)
    assert [len(group) for group in data.epoch(0, 0, Dist(), False)] == [2, 2]


# order


@pytest.mark.parametrize("fixed", [True, False])
def test_unlabeled_order_of_the_first_epoch_is_kept_or_not(farm: Path, fixed: bool) -> None:
    data = training(farm, method=CUTMIX, quirks={"fixed_unlabeled_order": fixed})
    orders = {role: [positions(loader, epoch) for epoch in range(3)] for role, loader in data.loaders.items()}
    expected = [
        torch.randperm(10, generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(3)
    ]
    assert orders["labeled"] == expected
    for role in ("unlabeled_0", "unlabeled_1"):
        assert orders[role] == ([expected[0]] * 3 if fixed else expected)
    first, later = (groups(data, epoch) for epoch in (0, 1))
    if fixed:
        for a, b in zip(first, later, strict=True):
            assert torch.equal(a[1].index, b[1].index)
            assert not torch.equal(a[1].image, b[1].image)  # the draws change all the same


def test_same_index_pairs_two_views_of_one_photo(farm: Path) -> None:
    data = training(farm, method=CUTMIX)
    for epoch in (0, 1):
        for _, x_0, x_1 in groups(data, epoch):
            assert torch.equal(x_0.index, x_1.index)
            assert not torch.equal(x_0.image, x_1.image)


def test_same_index_tail_is_drawn_for_each_view(farm: Path) -> None:
    data = training(farm, method=CUTMIX, data={"epoch_images": 19})
    differ = equal = 0
    for epoch in range(4):
        for _, x_0, x_1 in groups(data, epoch):
            differ += int((x_0.index != x_1.index).sum())
            equal += int((x_0.index == x_1.index).sum())
    assert 0 < differ <= 4 * 9  # positions 10 to 18 stand for random photos
    assert equal >= 4 * 9


@pytest.mark.parametrize("fixed", [True, False])
def test_independent_pairs_are_different_photos(farm: Path, fixed: bool) -> None:
    quirks = {"unlabeled_pairing": "independent", "fixed_unlabeled_order": fixed}
    data = training(farm, method=CUTMIX, quirks=quirks)
    zero, one = data.loaders["unlabeled_0"], data.loaders["unlabeled_1"]
    for epoch in range(3):
        assert sorted(positions(one, epoch)) == list(range(10))
        assert positions(zero, epoch) != positions(one, epoch)
    assert (positions(one, 0) == positions(one, 1)) == fixed
    same = training(farm, method=CUTMIX).loaders["unlabeled_0"]
    assert positions(zero, 0) == positions(same, 0)  # the switch concerns the second loader only


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_depend_on_neither_workers_nor_resume(farm: Path, workers: int) -> None:
    sections = {"method": CUTMIX, "optim": {"batch_size": 4, "device_batch": 2}}
    reference = training(farm, data={"epoch_images": 17}, **sections)
    data = training(farm, data={"epoch_images": 17, "workers": workers}, **sections)
    for epoch in (0, 2):
        whole = groups(reference, epoch)
        assert len(whole) == 8
        assert_same(whole, groups(data, epoch))
        for step in range(1, 4):
            assert_same(whole[2 * step :], groups(data, epoch, start=step))
    data.close()


@pytest.mark.parametrize("length", [10, 11])
def test_two_processes_share_the_samples_of_one(farm: Path, length: int) -> None:
    sections = {"method": CUTMIX, "data": {"epoch_images": length}, "optim": {"batch_size": 4}}
    whole = groups(training(farm, **sections), 1)
    halves = [groups(training(farm, Dist(rank, 2), **sections), 1) for rank in range(2)]
    assert len(whole) == len(halves[0]) == len(halves[1]) == 2
    for step, batches in enumerate(whole):
        for role, batch in enumerate(batches):
            for rank in range(2):  # every second slot
                share = [part if part is None else part[rank::2] for part in batch]
                torch.testing.assert_close(share, list(halves[rank][step][role]), rtol=0, atol=0)


def test_seed_changes_the_draws_and_not_the_order(farm: Path) -> None:
    ours, theirs = (groups(training(farm, run={"seed": seed}), 0) for seed in (0, 1))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a[1].index, b[1].index)
        assert not torch.equal(a[1].image, b[1].image)


def test_steps_do_not_depend_on_the_number_of_processes(farm: Path) -> None:
    lengths = {}
    for world in (1, 2, 4, 8):
        for rank in {0, world - 1}:
            data = training(
                farm,
                Dist(rank, world, device=torch.device("cuda")),
                data={"epoch_images": 30},
                optim={"batch_size": 8},
            )
            lengths[world, rank] = data.steps_per_epoch
            assert {len(loader) for loader in data.loaders.values()} == {3}
    assert set(lengths.values()) == {3}  # with 8 the padded order has 32 entries, which would give 4


# settings


def test_transform_is_as_configured(farm: Path) -> None:
    default = train_transform(config(farm))
    assert default.scales == (0.5, 0.75, 1.0, 1.5, 1.75, 2.0)
    assert default.inclusive_crop
    assert default.crop_size == (32, 32)
    other = train_transform(
        config(
            farm,
            data={"scales": None, "scale_range": [0.8, 1.25], "flip": False, "resize": [20, 24]},
            quirks={"inclusive_crop": False},
        )
    )
    assert (other.scales, other.scale_range, other.flip) == (None, (0.8, 1.25), False)
    assert (other.resize, other.inclusive_crop) == ((20, 24), False)
    assert groups(training(farm, data={"scales": None, "scale_range": [0.8, 1.25]}), 0)


@pytest.mark.parametrize("values", [{"rotation": [-10, 10]}, {"blur": True}], ids=str)
def test_augmentations_that_cps_lacks_are_refused(farm: Path, values: dict) -> None:
    with pytest.raises(UserError, match=rf"data\..*{next(iter(values))}"):
        training(farm, data=values)


def test_cache_gives_the_same_samples(farm: Path) -> None:
    cached, plain = training(farm, data={"cache": True}), training(farm)
    for epoch in (0, 1):
        assert_same(groups(cached, epoch), groups(plain, epoch))


# trouble


def test_masks_of_unlabeled_photos_are_never_read(tmp_path: Path) -> None:
    path = write_dataset(tmp_path)
    for name in (tmp_path / "splits/few/unlabeled.txt").read_text().split():
        (tmp_path / "mask" / f"{name}.png").write_bytes(b"not a mask")
    for _, x_u in groups(training(path), 0):
        assert x_u.label is None


def test_broken_photo_stops_or_is_replaced(farm: Path) -> None:
    broken = farm.parent / "img" / "p007.jpg"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(UserError, match=r"p007\.jpg.*data\.on_error=skip"):
        groups(training(farm), 0)
    data = training(farm, data={"on_error": "skip"})
    assert 1 not in {int(i) for _, x_u in groups(data, 0) for i in x_u.index}
    assert data.skipped == 1


@pytest.mark.parametrize("role", ["labeled", "unlabeled"])
def test_empty_lists_are_named(farm: Path, role: str) -> None:
    (farm.parent / "splits/few" / f"{role}.txt").write_text("\n")
    with pytest.raises(UserError, match=f"the {role} list is empty"):
        training(farm)


def test_split_without_unlabeled_images_serves_supervised_training_only(farm: Path) -> None:
    data = training(farm, data={"split": "full"}, method={"name": "sup_only"})
    assert len(data.loaders["labeled"].dataset) == 6
    with pytest.raises(UserError, match=r"data\.split=full: .*method\.name=cps needs"):
        training(farm, data={"split": "full"})


def test_one_image_per_forward_needs_synchronized_statistics(farm: Path) -> None:
    for sections in (
        {"optim": {"batch_size": 1}},
        {"optim": {"batch_size": 2, "device_batch": 1}},
    ):
        with pytest.raises(UserError, match="one image per process and forward, on which BatchNorm"):
            training(farm, **sections)
    cfg = config(farm)
    two_gpus = Dist(0, 2, device=torch.device("cuda"))
    assert build_training_data(cfg, two_gpus, BatchPlan(1, 1)).steps_per_epoch == 5
    with pytest.raises(UserError, match="one image per process"):
        build_training_data(config(farm, model={"sync_bn": False}), two_gpus, BatchPlan(1, 1))


def test_batch_larger_than_an_epoch_is_refused(farm: Path) -> None:
    with pytest.raises(UserError, match="10 labeled images on 1 processes do not fill one batch of 12"):
        training(farm, optim={"batch_size": 12})
    with pytest.raises(UserError, match=r"optim\.batch_size=12: larger than an epoch of 10"):
        training(farm, optim={"batch_size": 12, "device_batch": 4})


def test_missing_folder_and_split_are_named(farm: Path) -> None:
    with pytest.raises(UserError, match=r"data\.root=.*nowhere"):
        training(farm, data={"root": str(farm.parent / "nowhere")})
    with pytest.raises(UserError, match=r"no labeled\.txt"):
        training(farm, data={"split": "fewer"})


# published settings


def write_photo(path: Path, label: Path | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 16, 3), 90, np.uint8)).save(path)
    if label is not None:
        label.parent.mkdir(parents=True, exist_ok=True)
        write_index_mask(label, np.full((8, 16), 7, np.uint8))


def city_files(root: Path, layout: str, part: str, name: str) -> None:
    """A photo of Cityscapes, with its mask but for the coarse part."""
    city, fine = name.split("_", maxsplit=1)[0], part != "train_extra"
    if layout == "official":
        mask = root / f"gtFine/{part}/{city}/{name}_gtFine_labelIds.png"
        write_photo(root / f"leftImg8bit/{part}/{city}/{name}_leftImg8bit.png", mask if fine else None)
    else:
        mask = root / f"segmentation/{part}/{name}_gtFine.png"
        write_photo(root / f"images/{part}/{name}.png", mask if fine else None)


@pytest.mark.parametrize("layout", ["official", "flat"])
def test_coarse_photos_of_cityscapes_are_unlabeled(tmp_path: Path, layout: str) -> None:
    fine = ["aachen_000000_000019", "ulm_000001_000019"]
    coarse = [f"bad-honnef_000000_{i:06d}" for i in range(3)] + ["konigswinter_000000_000000"]
    for part, names in (("train", fine), ("train_extra", coarse)):
        for name in names:
            city_files(tmp_path, layout, part, name)
    split = tmp_path / "splits" / "coarse"
    split.mkdir(parents=True)
    lines = {  # as in the authors' lists
        "labeled": [f"/images/train/{name}.png\t/segmentation/train/{name}_gtFine.png" for name in fine],
        "unlabeled": [
            f"/images/train_extra/{name}.png\t/segmentation/train_extra/{name}_gtCoarse.png"
            for name in coarse
        ],
    }
    for role, listed in lines.items():
        (split / f"{role}.txt").write_text("\n".join(listed))
    data = training("cityscapes", data={"root": str(tmp_path), "split": "coarse", "crop_size": [8, 8]})
    assert [item.id for item in data.split.unlabeled] == coarse
    value = 0 if layout == "official" else 7  # label id 7 is road; the flat layout holds train ids
    for labeled, unlabeled in groups(data, 0):
        assert set(labeled.label.unique().tolist()) <= {value, 255}
        assert bool((labeled.label == value).any())
        assert unlabeled.label is None


def test_labeled_photos_may_be_unlabeled_too(farm: Path) -> None:
    folder = farm.parent / "splits" / "few"
    (folder / "unlabeled.txt").write_text((farm.parent / "train.txt").read_text())
    data = training(farm)
    assert (len(data.split.labeled), len(data.split.unlabeled)) == (6, 16)
    for labeled, unlabeled in groups(data, 0):
        assert bool((labeled.label != 255).any())
        assert unlabeled.label is None


@pytest.fixture(scope="session")
def published_lists() -> Path:
    folder = Path(os.environ.get("SSS_PUBLISHED_LISTS", ROOT.parent / "shared" / "data" / "published_lists"))
    if not folder.is_dir():
        pytest.skip(f"published lists are not there: {folder} (set SSS_PUBLISHED_LISTS)")
    return folder / "TorchSemiSeg"


def published(root: Path, lists: dict[str, list[str]]) -> None:
    """A split `authors` below `root`, put together from the authors' lists."""
    split = root / "splits" / "authors"
    split.mkdir(parents=True)
    for role, files in lists.items():
        (split / f"{role}.txt").write_text("\n".join(Path(file).read_text() for file in files))


@pytest.mark.parametrize("count", [3000, 6000, 9000])
def test_published_coarse_lists_resolve(published_lists: Path, tmp_path: Path, count: int) -> None:
    folder = published_lists / CITY
    coarse = folder / "coarse_split" / f"train_extra_{count}.txt"
    published(tmp_path, {"labeled": [str(folder / "train.txt")], "unlabeled": [str(coarse)]})
    for part, file in (("train", folder / "train.txt"), ("train_extra", coarse)):
        for entry in read_entries(file):
            for line in (entry.image, entry.label if part == "train" else None):
                if line is not None:
                    path = tmp_path / line.lstrip("/")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.touch()
    cfg = config("cityscapes", data={"root": str(tmp_path), "split": "authors"}, optim={"batch_size": 8})
    data = build_training_data(cfg, Dist(), plan_batch(cfg.optim, 1))
    assert (len(data.split.labeled), len(data.split.unlabeled)) == (2975, count)
    assert data.steps_per_epoch == count // 8


@pytest.mark.parametrize(
    ("labeled", "unlabeled", "length", "counts", "steps"),
    [
        ("train_aug_labeled_1-8", ["train_aug_unlabeled_1-8"], 9260, (1323, 9259), 1157),
        ("train_aug_labeled_1-16", ["train_aug_unlabeled_1-16"], 9921, (662, 9920), 1240),
        ("train_aug_labeled_1-2", ["train_aug_unlabeled_1-2"], 5291, (5291, 5291), 661),
        (
            "pseudoseg_labeled_1-16",
            ["train_aug_labeled_1-2", "train_aug_unlabeled_1-2"],
            None,
            (92, 10582),
            1322,
        ),
    ],
)
def test_published_pascal_lists_give_the_authors_epochs(
    published_lists: Path,
    tmp_path: Path,
    labeled: str,
    unlabeled: list[str],
    length: int | None,
    counts: tuple[int, int],
    steps: int,
) -> None:
    folder = published_lists / VOC
    files = {"labeled": [labeled], "unlabeled": unlabeled}
    paths = {role: [str(folder / f"{name}.txt") for name in names] for role, names in files.items()}
    published(tmp_path, paths)
    for kind, ending in (("JPEGImages", "jpg"), ("SegmentationClassAug", "png")):
        (tmp_path / kind).mkdir()
        for name in {i for role in paths.values() for path in role for i in read_ids(Path(path))}:
            (tmp_path / kind / f"{name}.{ending}").touch()
    settings = {"root": str(tmp_path), "split": "authors", "epoch_images": length}
    cfg = config("voc", data=settings, optim={"batch_size": 8}, method=CUTMIX)
    data = build_training_data(cfg, Dist(), plan_batch(cfg.optim, 1))
    assert (len(data.split.labeled), len(data.split.unlabeled)) == counts
    assert data.steps_per_epoch == steps


def test_no_loader_process_is_left(farm: Path) -> None:
    data = training(farm, data={"workers": 1})
    stream: Iterator[Any] = data.epoch(0, 0, Dist(), False)
    next(stream)
    processes = [p for loader in data.loaders.values() for p in loader._loader._iterator._workers]
    data.close()
    assert len(processes) == 2
    assert not any(process.is_alive() for process in processes)
