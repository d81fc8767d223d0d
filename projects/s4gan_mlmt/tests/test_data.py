"""The three streams: passes, resume, processes; and images in the original layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.config import build, plan_batch
from common.data.dataset_yaml import load_spec
from common.data.loaders import Batch
from common.data.spec import SPLITS
from common.distributed import Dist
from common.errors import UserError
from projects.s4gan_mlmt.config import Config
from projects.s4gan_mlmt.data import CyclingSampler, TrainingStreams, build_training_data, order_seed
from splits.prepare.pascal_context import CONTEXT_IDS
from splits.prepare.pascal_context import prepare as prepare_context
from tests.tiny import write_dataset

CITYSCAPES_IDS = (
    7,
    8,
    11,
    12,
    13,
    17,
    19,
    20,
    21,
    22,
    23,
    24,
    25,
    26,
    27,
    28,
    31,
    32,
    33,
)  # of the train ids
ROLES = ("labeled", "unlabeled", "real")


@pytest.fixture
def farm(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "farm", labeled=7, unlabeled=9)


def config(dataset: Path | str, **sections: dict[str, Any]) -> Config:
    tree: dict[str, dict[str, Any]] = {
        "data": {
            "dataset": str(dataset),
            "split": "few",
            "crop_size": [24, 32],
            "workers": 0,
            "random_mirror": True,
        },
        "optim": {"steps": 12, "epochs": 3, "batch_size": 4},
        "method": {"name": "s4gan"},
    }
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values
    return build(Config, tree)


def streams(dataset: Path | str, dist: Dist | None = None, **sections: dict[str, Any]) -> TrainingStreams:
    dist = dist or Dist()
    cfg = config(dataset, **sections)
    return build_training_data(cfg, dist, plan_batch(cfg.optim, dist.world_size))


def taken(
    data: TrainingStreams, start: int, stop: int, dist: Dist | None = None
) -> list[list[tuple[Batch, ...]]]:
    return list(data.steps(start, stop, dist or Dist(), False))


def assert_same(one: list[list[tuple[Batch, ...]]], other: list[list[tuple[Batch, ...]]]) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def positions(groups: list[list[tuple[Batch, ...]]], stream: int) -> list[list[int]]:
    return [batches[stream].index.tolist() for group in groups for batches in group]


def joined(lists: list[list[int]]) -> list[int]:
    return [one for part in lists for one in part]


# --- passes ----------------------------------------------------------------------------------------------------


def test_every_stream_starts_over_on_its_own(farm: Path) -> None:
    data = streams(farm)
    assert list(data.loaders) == list(ROLES)
    groups = taken(data, 0, 6)
    labeled, unlabeled, real = (positions(groups, i) for i in range(3))
    assert [len(one) for one in labeled] == [4, 3, 4, 3, 4, 3]  # 7 images: the short last batch stays
    assert [len(one) for one in unlabeled] == [4, 4, 1, 4, 4, 1]  # 9
    assert [len(one) for one in real] == [4, 3, 4, 3, 4, 3]
    for stream, size, batches in ((labeled, 7, 2), (unlabeled, 9, 3), (real, 7, 2)):
        passes = [joined(stream[i : i + batches]) for i in range(0, 6, batches)]
        assert all(sorted(one) == list(range(size)) for one in passes)
        assert passes[0] != passes[1]  # an order of its own
    assert labeled != real


def test_images_have_draws_of_their_own_in_every_stream_and_pass(farm: Path) -> None:
    data = streams(farm)
    seen: dict[tuple[str, int], list[torch.Tensor]] = {}
    for batches in (one for group in taken(data, 0, 6) for one in group):
        for role, batch in zip(ROLES, batches, strict=True):
            for position, image in zip(batch.index.tolist(), batch.image, strict=True):
                seen.setdefault((role, position), []).append(image)
    labeled = [seen["labeled", i] for i in range(7)]
    assert not all(torch.equal(images[0], images[1]) for images in labeled)
    assert not all(torch.equal(images[0], seen["real", i][0]) for i, images in enumerate(labeled))


def test_labels_reach_only_the_labeled_streams(farm: Path) -> None:
    labeled, unlabeled, real = taken(streams(farm), 0, 1)[0][0]
    assert unlabeled.label is None
    for batch in (labeled, real):
        assert batch.image.shape == (4, 3, 24, 32)
        assert set(batch.label.unique().tolist()) <= {0, 1, 2}


def test_drop_last_leaves_out_short_batches(farm: Path) -> None:
    groups = taken(streams(farm, data={"drop_last": True}), 0, 5)
    assert [len(one) for one in positions(groups, 0)] == [4] * 5
    assert [len(one) for one in positions(groups, 1)] == [4] * 5
    first = positions(groups, 1)
    assert not set(first[0]) & set(first[1])


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch", [8, 16])
def test_small_lists_are_repeated_to_fill_a_batch(farm: Path, drop_last: bool, batch: int) -> None:
    data = streams(farm, optim={"batch_size": batch}, data={"drop_last": drop_last})
    for stream, count in ((0, 7), (1, 9), (2, 7)):
        items = list(data.loaders.values())[stream].dataset.items
        assert len(items) == max(count, batch)
        assert len({item.id for item in items}) == count
    groups = taken(data, 0, 3)
    assert [len(one) for one in positions(groups, 0)] == [batch] * 3
    images = groups[0][0][0].image
    assert not torch.equal(images[0], images[-1])


def test_unlabeled_batches_may_have_a_size_of_their_own(farm: Path) -> None:
    groups = taken(streams(farm, optim={"unlabeled_batch_size": 3}), 0, 4)
    assert [len(one) for one in positions(groups, 1)] == [3, 3, 3, 3]
    with pytest.raises(UserError, match=r"optim\.unlabeled_batch_size=3: cannot be shared by 2 processes"):
        streams(farm, Dist(0, 2), optim={"unlabeled_batch_size": 3})


def test_the_baseline_reads_labeled_images_alone(farm: Path) -> None:
    data = streams(farm, method={"name": "sup_only"})
    assert list(data.loaders) == ["labeled"]
    alone, beside = taken(data, 0, 3), taken(streams(farm), 0, 3)
    for one, other in zip(alone, beside, strict=True):
        assert torch.equal(
            one[0][0].image, other[0][0].image
        )  # what it is compared with sees the same images


def test_without_a_share_all_three_streams_cover_everything(farm: Path) -> None:
    groups = taken(streams(farm, data={"split": "full"}), 0, 4)  # 16 images in 4 steps
    for stream in range(3):
        assert sorted(joined(positions(groups, stream))) == list(range(16))


def test_orders_depend_on_the_seed_and_the_role(farm: Path) -> None:
    one, other = (positions(taken(streams(farm, run={"seed": seed}), 0, 2), 0) for seed in (0, 1))
    assert one != other
    assert len({order_seed(seed, role) for seed in range(3) for role in ROLES}) == 9


def test_accumulation_takes_several_forwards_per_step(farm: Path) -> None:
    data = streams(farm, optim={"device_batch": 2})
    groups = taken(data, 0, 3)
    assert [len(group) for group in groups] == [2, 2, 2]
    assert [len(one) for one in positions(groups, 0)] == [2, 2, 2, 1, 2, 2]
    assert_same(groups[1:], taken(data, 1, 3))


def test_a_single_image_is_refused_where_a_network_pools_images(farm: Path) -> None:
    streams(farm)  # DeepLabV2 learns from one image: 9 = 4 + 4 + 1
    wide = {"network": "deeplabv3plus"}
    with pytest.raises(UserError, match=r"one of 9 unlabeled images .* deeplabv3plus"):
        streams(farm, model=wide)
    streams(farm, model=wide, data={"drop_last": True})
    streams(farm, model=wide, optim={"unlabeled_batch_size": 3})


# --- resume ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2])
def test_any_step_can_be_resumed_without_those_before(farm: Path, world_size: int) -> None:
    for rank in range(world_size):
        dist = Dist(rank, world_size)
        whole = taken(streams(farm, dist), 0, 9, dist)
        for start in (1, 2, 3, 5, 8):
            assert_same(whole[start:], taken(streams(farm, dist), start, 9, dist))


def test_an_iteration_may_be_left_and_begun_again(farm: Path) -> None:
    data = streams(farm)
    whole = taken(data, 0, 6)
    running = data.steps(0, 6, Dist(), False)
    first = [next(running), next(running)]
    running.close()
    assert_same(whole, first + taken(data, 2, 6))


def test_rounds_are_steps(farm: Path) -> None:
    data = streams(farm)
    assert data.steps_per_epoch == 4
    assert_same(taken(data, 5, 8), list(data.epoch(1, 1, Dist(), False)))
    assert taken(data, 4, 4) == []


def test_loader_processes_change_nothing(farm: Path) -> None:
    alone = streams(farm, method={"name": "sup_only"})
    helped = streams(farm, method={"name": "sup_only"}, data={"workers": 1})
    try:
        assert_same(taken(alone, 0, 3), taken(helped, 0, 3))
        assert_same(taken(alone, 3, 5), taken(helped, 3, 5))  # the processes stay
    finally:
        helped.close()


# --- processes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_the_batches_of_one(farm: Path, world_size: int) -> None:
    whole = taken(streams(farm), 0, 6)
    parts = []
    for rank in range(world_size):
        dist = Dist(rank, world_size)
        parts.append(taken(streams(farm, dist), 0, 6, dist))
    for step, group in enumerate(whole):
        for stream in range(3):
            expected = group[0][stream]
            shares = [part[step][0][stream] for part in parts]
            if len(expected.index) < world_size:
                continue  # filled up, see below
            assert sum(len(share.index) for share in shares) == len(expected.index)
            for i, position in enumerate(expected.index.tolist()):
                share, place = shares[i % world_size], i // world_size
                assert int(share.index[place]) == position
                assert torch.equal(share.image[place], expected.image[i])
                assert (share.label is None) == (expected.label is None) == (stream == 1)
                assert stream == 1 or torch.equal(share.label[place], expected.label[i])


def test_no_process_is_left_without_an_image() -> None:
    ranks = [list(keys_of(CyclingSampler(9, 1, rank, 4, seed=3), 0, 6)) for rank in range(4)]
    alone = list(keys_of(CyclingSampler(9, 4, seed=3), 0, 6))
    assert [len(batch) for batch in alone] == [4, 4, 1, 4, 4, 1]
    for step, batch in enumerate(alone):
        shares = [own[step] for own in ranks]
        assert [len(share) for share in shares] == [1, 1, 1, 1]
        keys = [share[0] for share in shares]
        assert [key.position for key in keys[: len(batch)]] == [key.position for key in batch]
        if len(batch) < 4:  # the first images of the pass once more, with draws of their own
            assert [key.position for key in keys[1:]] == [key.position for key in alone[step - 2][:3]]
            assert len({key.slot for key in keys}) == 4


def keys_of(sampler: CyclingSampler, start: int, stop: int) -> CyclingSampler:
    sampler.set_range(start, stop)
    return sampler


def test_smallest_share() -> None:
    assert CyclingSampler(9, 4).smallest == 1
    assert CyclingSampler(8, 4).smallest == 4
    assert CyclingSampler(9, 4, drop_last=True).smallest == 4
    assert CyclingSampler(15, 2, 0, 4).smallest == 1  # the last batch of 7
    assert CyclingSampler(9, 2, 0, 4).smallest == 1


# --- what the loop asks for ------------------------------------------------------------------------------------


def test_names_of_a_step(farm: Path) -> None:
    data = streams(farm, data={"split": "few", "drop_last": True})
    group = taken(data, 0, 1)[0]
    names = data.names(group)().split(", ")
    assert len(names) == 12
    labeled = [item.id for item in data.split.labeled]
    assert names[:4] == [labeled[i] for i in group[0][0].index.tolist()]
    assert set(names[8:]) <= set(labeled)


def test_the_permutation_is_saved_for_the_other_branch(farm: Path, tmp_path: Path) -> None:
    ratio = {"split": "full", "labeled_ratio": 0.5}
    path = streams(farm, data=ratio).save_split(tmp_path / "run", Dist())
    assert path == tmp_path / "run/train_voc_split.pkl"
    again = streams(farm, data={**ratio, "split_file": str(path)}, run={"seed": 50})
    assert again.split.hash == streams(farm, data=ratio).split.hash
    assert streams(farm).save_split(tmp_path / "other", Dist()) is None


def test_a_broken_image_stops_or_is_replaced(farm: Path) -> None:
    data = streams(farm, data={"on_error": "skip"})
    data.split.labeled[2].image.write_bytes(b"")
    assert len(taken(data, 0, 2)) == 2
    assert data.skipped == 2  # in both streams of labeled images
    with pytest.raises(UserError, match=r"p002\.jpg: image cannot be read"):
        taken(streams(farm), 0, 2)


# --- layouts ---------------------------------------------------------------------------------------------------


def copy_yaml(name: str, folder: Path) -> Path:
    """The description of a built-in dataset beside lists of the test's own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.yaml").write_text((SPLITS / name / "dataset.yaml").read_text())
    return folder


def picture(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def test_voc_in_the_original_layout(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"2007_{i:06d}" for i in range(6)]
    for name in names:
        picture(tmp_path / f"JPEGImages/{name}.jpg", rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        values = rng.integers(0, 21, (30, 40), dtype=np.uint8)
        values[0] = 255
        picture(tmp_path / f"SegmentationClassAug/{name}.png", values)
    folder = copy_yaml("voc", tmp_path / "lists")
    (folder / "train_aug.txt").write_text("\n".join(names))
    data = streams(
        folder, data={"root": str(tmp_path), "split": "full", "labeled_ratio": 0.5, "crop_size": [36, 36]}
    )
    batch = taken(data, 0, 1)[0][0][0]
    assert batch.image.shape == (4, 3, 36, 36)
    assert int(batch.label.min()) >= 0
    assert bool((batch.label[:, 30:] == 255).all())
    assert bool((batch.image[:, :, 30:] == 0).all())
    assert set(batch.label.unique().tolist()) <= {*range(21), 255}
    assert float(batch.image.min()) < -90
    assert float(batch.image.max()) > 110


def test_cityscapes_in_the_original_layout(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"{city}_{i:06d}_000019" for city in ("bochum", "aachen") for i in range(2)]
    for name in names:
        city = name.split("_")[0]
        values = rng.integers(0, 256, (64, 128, 3), dtype=np.uint8)
        picture(tmp_path / f"leftImg8bit/train/{city}/{name}_leftImg8bit.png", values)
        ids = rng.integers(0, 34, (64, 128), dtype=np.uint8)
        folder = tmp_path / f"gtFine_trainvaltest/gtFine/train/{city}"
        picture(folder / f"{name}_gtFine_labelIds.png", ids)
    folder = copy_yaml("cityscapes", tmp_path / "lists")
    (folder / "train.txt").write_text("\n".join(names))
    spec = load_spec(str(folder), root=tmp_path)
    item = spec.read_list("train")[0]
    assert item.label is not None
    with Image.open(item.label) as file:
        stored = np.asarray(file)
    expected = np.full_like(stored, 255)
    for train_id, label_id in enumerate(CITYSCAPES_IDS):
        expected[stored == label_id] = train_id
    assert np.array_equal(spec.load_label(item), expected)
    cityscapes = {"pipeline": "cityscapes", "random_mirror": False, "crop_size": [16, 32]}
    data = streams(folder, data={"root": str(tmp_path), "split": "full", "labeled_ratio": 0.5, **cityscapes})
    batch = taken(data, 0, 1)[0][0][0]
    assert batch.image.shape == (4, 3, 16, 32)
    assert set(batch.label.unique().tolist()) <= {*range(19), 255}
    assert -0.33 < float(batch.image.min()) < float(batch.image.max()) < 0.72


def test_context_from_the_annotation(tmp_path: Path) -> None:
    """From PASCAL in Detail's file to batches; positions count in the annotation's order."""
    rng = np.random.default_rng(0)
    source, out = tmp_path / "source", tmp_path / "out"
    names = ["2008_000009", "2008_000003", "2008_000007", "2008_000005"]
    images, regions = [], []
    for i, name in enumerate(names):
        picture(source / f"VOC2010/JPEGImages/{name}.jpg", rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
        phase = "val" if i == 3 else "train"
        images.append({"file_name": f"{name}.jpg", "image_id": i, "phase": phase, "height": 20, "width": 30})
        box = [[0, 0, 0, 19, 14, 19, 14, 0]]
        regions.append({"image_id": i, "category_id": CONTEXT_IDS[i + 1], "segmentation": box})
    detail = {"images": images, "annos_segmentation": regions}
    (source / "trainval_merged.json").write_text(json.dumps(detail))
    prepare_context(source, out)
    folder = copy_yaml("pascal_context", tmp_path / "lists")
    spec = load_spec(str(folder), root=out)
    assert [item.id for item in spec.read_list("train")] == names[:3]
    context = {"pipeline": "pascal_context", "random_mirror": False, "crop_size": [33, 33]}
    data = streams(folder, data={"root": str(out), "split": "full", "labeled_ratio": 0.67, **context})
    batch = taken(data, 0, 1)[0][0][0]
    assert batch.image.shape == (4, 3, 33, 33)
    assert set(batch.label.unique().tolist()) <= {0, 1, 2, 3}


def test_genuine_voc_images(shared_data: Path, tmp_path: Path) -> None:
    root = shared_data / "voc_slice/VOCdevkit/VOC2012"
    folder = copy_yaml("voc", tmp_path / "lists")
    names = (root / "ImageSets/Segmentation/train_aug.txt").read_text().split()
    (folder / "train_aug.txt").write_text("\n".join(names))
    data = streams(
        folder, data={"root": str(root), "split": "full", "labeled_ratio": 0.5, "crop_size": [321, 321]}
    )
    batches = taken(data, 0, 2)
    assert len(data.split.labeled) == len(names) // 2
    for group in batches:
        assert set(group[0][0].label.unique().tolist()) <= {*range(21), 255}
        assert -123 < float(group[0][0].image.min()) < float(group[0][0].image.max()) < 151


def test_genuine_cityscapes_images(shared_data: Path, tmp_path: Path) -> None:
    root = shared_data / "cityscapes_slice"
    folder = copy_yaml("cityscapes", tmp_path / "lists")
    names = [path.name.replace("_leftImg8bit.png", "") for path in root.rglob("*_leftImg8bit.png")]
    (folder / "train.txt").write_text("\n".join(names))
    cityscapes = {"pipeline": "cityscapes", "random_mirror": False, "crop_size": [256, 512]}
    data = streams(folder, data={"root": str(root), "split": "full", "labeled_ratio": 0.5, **cityscapes})
    batch = taken(data, 0, 1)[0][0][0]
    assert batch.image.shape == (4, 3, 256, 512)
    labels = set(batch.label.unique().tolist())
    assert labels <= {*range(19), 255}
    assert 0 in labels  # road
