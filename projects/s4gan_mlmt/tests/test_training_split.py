"""Permutations: read, drawn, saved, cut; what is unsafe or does not fit is refused."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import build
from common.data.dataset_yaml import load_spec
from common.data.lists import sha256_order
from common.data.safe_pickle import load_permutation
from common.data.spec import SPLITS, DatasetSpec
from common.distributed import Dist
from common.errors import UserError
from projects.s4gan_mlmt.config import Config
from projects.s4gan_mlmt.training_split import (
    VOC_PERMUTATION,
    TrainingSplit,
    cut,
    dataset_order,
    draw_permutation,
    find_permutation,
    permutation_bytes,
    permutation_is_published,
    read_permutation,
    split_by_permutation,
    training_split,
    write_permutation,
)
from tests.tiny import write_dataset

IMAGES = 16  # of the tiny dataset's training list
GENUINE = {  # length, sha256 of the positions as little-endian int64
    "voc": (10582, "5ad4f766194c92546e1134cf6f41ab1436b5bd69ef27432d73433455f861d407"),
    "pc": (4996, "0b9ac4100c3e69c8e3d0c10362edf2fe2a998f1916c4b60162df0e182da5357b"),
    "city": (2975, "96f9d0b760bbce348510165918708493997397872ee7cc7701ff61672a2f134f"),
}


@pytest.fixture
def farm(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "farm")


def config(dataset: Path | str, method: str = "s4gan", seed: int = 2, **data: Any) -> Config:
    tree = {
        "data": {"dataset": str(dataset), "split": "full", "pipeline": "house", **data},
        "method": {"name": method},
        "run": {"seed": seed},
    }
    return build(Config, tree)


def ids(found: TrainingSplit) -> tuple[list[str], list[str]]:
    return [item.id for item in found.split.labeled], [item.id for item in found.split.unlabeled]


def names(permutation: Any) -> list[str]:
    return [f"p{i:03d}" for i in permutation]


# --- cutting ---------------------------------------------------------------------------------------------------


def test_the_first_images_of_the_file_are_labeled(farm: Path, tmp_path: Path) -> None:
    permutation = np.random.RandomState(5).permutation(IMAGES)
    path = tmp_path / "mine.pkl"
    write_permutation(path, permutation)
    found = training_split(config(farm, labeled_ratio=0.2, split_file=str(path)))  # int(3.2)
    assert ids(found) == (names(permutation[:3]), names(permutation[3:]))
    assert found.permutation is not None
    assert found.permutation.tolist() == permutation.tolist()
    assert all(item.label is not None for item in found.split.labeled)
    assert all(item.label is None for item in found.split.unlabeled)
    assert found.split.name == f"{path} at 0.2"


def test_without_a_file_one_is_drawn_as_numpy_would(farm: Path) -> None:
    found = training_split(config(farm, labeled_ratio=0.25, seed=7))
    order = np.arange(IMAGES)
    state = np.random.RandomState(7)  # np.random.seed(7); np.random.shuffle(order)
    state.shuffle(order)
    assert ids(found) == (names(order[:4]), names(order[4:]))
    assert found.split.name == "drawn with seed 7 at 0.25"


def test_three_random_splits(farm: Path) -> None:
    found = [training_split(config(farm, labeled_ratio=0.25, split_seed=seed)) for seed in (0, 1, 2, 1)]
    hashes = [one.split.hash for one in found]
    assert len(set(hashes)) == 3
    assert hashes[1] == hashes[3]
    again = training_split(config(farm, labeled_ratio=0.25, split_seed=1, seed=9))  # whatever the run's seed
    assert again.split.hash == hashes[1]
    smaller = training_split(config(farm, labeled_ratio=0.125, split_seed=1))
    assert ids(found[1])[0][:2] == ids(smaller)[0]  # nested


def test_the_saved_file_gives_the_same_split(farm: Path, tmp_path: Path) -> None:
    drawn = training_split(config(farm, labeled_ratio=0.25))
    path = drawn.save(tmp_path / "run", "s4gan", Dist())
    assert path == tmp_path / "run/train_voc_split.pkl"
    again = training_split(config(farm, labeled_ratio=0.25, split_file=str(path), seed=99))
    assert again.split.hash == drawn.split.hash
    assert ids(again) == ids(drawn)


def test_names_of_the_saved_file(farm: Path, tmp_path: Path) -> None:
    drawn = training_split(config(farm, "sup_only", labeled_ratio=0.25))
    assert drawn.save(tmp_path, "sup_only", Dist()) == tmp_path / "split.pkl"
    assert (tmp_path / "split.pkl").is_file()
    other = drawn.save(tmp_path / "rank1", "s4gan", Dist(rank=1, world_size=2))
    assert other == tmp_path / "rank1/train_voc_split.pkl"
    assert not other.exists()  # the first process writes it
    listed = training_split(config(farm, split="few"))
    assert listed.save(tmp_path, "s4gan", Dist()) is None


def test_the_file_is_what_the_authors_would_write(tmp_path: Path) -> None:
    permutation = draw_permutation(23, 0)
    data = permutation_bytes(permutation)
    assert data.startswith(b"\x80\x03cnumpy.core.multiarray\n_reconstruct\n")  # known to old and new NumPy
    assert b"_core" not in data
    read = pickle.loads(data)
    assert read.dtype == np.int64
    assert read.tolist() == permutation.tolist()
    path = tmp_path / "split.pkl"
    write_permutation(path, permutation.tolist())
    assert read_permutation(path).tolist() == permutation.tolist()


def test_lists_are_taken_where_no_share_is_given(farm: Path) -> None:
    found = training_split(config(farm, split="few"))
    assert found.permutation is None
    assert (len(found.split.labeled), len(found.split.unlabeled)) == (6, 10)


def test_without_a_share_all_roles_hold_all_images(farm: Path) -> None:
    labeled, unlabeled = ids(training_split(config(farm)))
    assert labeled == unlabeled == names(range(IMAGES))
    alone = training_split(config(farm, "sup_only"))
    assert ids(alone) == (labeled, [])


def test_full_supervision_of_a_share(farm: Path) -> None:
    found = training_split(config(farm, "sup_only", labeled_ratio=1.0))
    assert len(found.split.labeled) == IMAGES


# --- order -----------------------------------------------------------------------------------------------------


def test_cityscapes_counts_cities_then_files(tmp_path: Path) -> None:
    (tmp_path / "dataset.yaml").write_text((SPLITS / "cityscapes/dataset.yaml").read_text())
    listed = ["ulm_000001_000019", "aachen_000002_000019", "ulm_000000_000019", "aachen_000001_000019"]
    for name in listed:
        folder = tmp_path / "leftImg8bit/train" / name.split("_")[0]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}_leftImg8bit.png").touch()
    (tmp_path / "train.txt").write_text("\n".join(listed))
    spec = load_spec(str(tmp_path), root=tmp_path)
    assert [item.id for item in dataset_order(spec)] == sorted(listed)
    assert [item.id for item in spec.read_list("train")] == listed


def test_the_published_voc_permutation_needs_its_order(
    published_lists: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = published_lists / "semisup-semseg"
    (tmp_path / "dataset.yaml").write_text((SPLITS / "voc/dataset.yaml").read_text())
    listed = (folder / "data/voc_list/train_aug.txt").read_text().split()
    (tmp_path / "train_aug.txt").write_text("\n".join(reversed(listed)))
    for part in ("JPEGImages", "SegmentationClassAug"):
        (tmp_path / part).mkdir()
    ending = {"JPEGImages": "jpg", "SegmentationClassAug": "png"}
    monkeypatch.setattr(
        "common.data.spec.names_in",
        lambda path: {file: file for file in (f"{name}.{ending[Path(path).name]}" for name in listed)},
    )
    spec = load_spec(str(tmp_path), root=tmp_path)
    permutation = read_permutation(folder / "splits/voc/split_0.pkl")
    assert sha256_order(permutation.tolist()) == VOC_PERMUTATION
    assert permutation_is_published(spec, permutation)
    with pytest.raises(UserError, match="counts the training images of 'voc' in ascending order"):
        cut(spec, permutation, 0.125, "split_0.pkl")
    (tmp_path / "train_aug.txt").write_text("\n".join(listed))
    split = cut(load_spec(str(tmp_path), root=tmp_path), permutation, 0.125, "split_0.pkl")
    assert len(split.labeled) == 1322
    assert [item.id for item in split.labeled[:3]] == [listed[i] for i in (3458, 9682, 992)]
    drawn = draw_permutation(len(listed), 0)  # any other permutation counts whatever the list holds
    (tmp_path / "train_aug.txt").write_text("\n".join(reversed(listed)))
    cut(load_spec(str(tmp_path), root=tmp_path), drawn, 0.125, "drawn")


@pytest.mark.parametrize("name", list(GENUINE))
def test_genuine_files(name: str, published_lists: Path) -> None:
    permutation = read_permutation(published_lists / f"semisup-semseg/splits/{name}/split_0.pkl")
    digest = hashlib.sha256(permutation.astype("<i8").tobytes()).hexdigest()
    assert (len(permutation), digest) == GENUINE[name]
    assert load_permutation(permutation_bytes(permutation), "ours").tolist() == permutation.tolist()


def test_places_of_the_file(farm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec: DatasetSpec = load_spec(str(farm))
    with pytest.raises(UserError, match=r"no such file .*splits get farm/s4gan"):
        find_permutation(spec, "s4gan/split_0.pkl")
    place = spec.splits_dir / "s4gan/split_0.pkl"
    write_permutation(place, draw_permutation(IMAGES, 0))
    assert find_permutation(spec, "s4gan/split_0.pkl") == place
    assert (
        find_permutation(spec, "farm/s4gan/split_0.pkl") == spec.splits_dir.parent / "farm/s4gan/split_0.pkl"
    )
    assert find_permutation(spec, "./splits/voc/split_0.pkl") == place  # as the authors name it
    monkeypatch.chdir(tmp_path)
    write_permutation(tmp_path / "here.pkl", draw_permutation(IMAGES, 0))
    assert find_permutation(spec, "here.pkl") == Path("here.pkl")


# --- refusals --------------------------------------------------------------------------------------------------


class _Payload:
    """Creates a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_a_hostile_file_is_refused_and_not_executed(farm: Path, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "split.pkl"
    data = pickle.dumps([_Payload(marker), np.arange(IMAGES)], protocol=3)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"split\.pkl: refused, the pickle holds"):
        training_split(config(farm, labeled_ratio=0.25, split_file=str(path)))
    assert not marker.exists()
    pickle.loads(data)
    assert marker.exists()  # it would have been made


@pytest.mark.parametrize("count", [IMAGES - 1, IMAGES + 1])
def test_a_permutation_of_another_length_is_refused(farm: Path, tmp_path: Path, count: int) -> None:
    path = tmp_path / "split.pkl"
    write_permutation(path, draw_permutation(count, 0))
    message = f"a permutation of {count} images, but the training list of 'farm' has {IMAGES}"
    with pytest.raises(UserError, match=message):
        training_split(config(farm, labeled_ratio=0.25, split_file=str(path)))


def test_repeated_positions_are_refused(farm: Path, tmp_path: Path) -> None:
    path = tmp_path / "split.pkl"
    write_permutation(path, [0] * IMAGES)
    with pytest.raises(UserError, match=r"split\.pkl: not a permutation of 0\.\.15"):
        training_split(config(farm, labeled_ratio=0.25, split_file=str(path)))


@pytest.mark.parametrize(
    ("method", "data", "message"),
    [
        ("s4gan", {"labeled_ratio": 0.05}, r"data\.labeled_ratio: ratio 0\.05: gives 0 of 16 images"),
        ("s4gan", {"labeled_ratio": 1.0}, r"data\.labeled_ratio=1: leaves no unlabeled image"),
        ("s4gan", {"labeled_ratio": 0.25, "split": "few"}, r"data\.split=few names a split"),
        (
            "s4gan",
            {"labeled_ratio": 0.25, "split_file": "gone.pkl"},
            r"data\.split_file=gone\.pkl: no such file",
        ),
    ],
)
def test_impossible_shares_are_refused(farm: Path, method: str, data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        training_split(config(farm, method, **data))


def test_labeled_images_need_masks(tmp_path: Path) -> None:
    farm = write_dataset(tmp_path / "farm", masks=False)  # the last ten training images have none
    with pytest.raises(UserError, match="labeled, which has no mask"):
        training_split(config(farm, labeled_ratio=0.75))
    spec, order = load_spec(str(farm)), np.arange(IMAGES)
    assert len(cut(spec, order, 0.25, "in order").labeled) == 4
    with pytest.raises(UserError, match=r"p006\.jpg labeled, which has no mask"):
        cut(spec, order, 0.5, "in order")
    assert len(cut(spec, order, 0.5, "in order", masks=False).labeled) == 8  # MLMT with vectors from a file


def test_evaluation_images_are_refused(farm: Path) -> None:
    with (farm.parent / "train.txt").open("a") as file:
        file.write("p016\n")
    with pytest.raises(UserError, match=r"'p016' of the training list is also in val\.txt"):
        training_split(config(farm, labeled_ratio=0.25))


def test_labeled_part_of_a_permutation_is_truncated_not_rounded() -> None:
    ids = [f"{i}" for i in range(15)]
    labeled, unlabeled = split_by_permutation(ids, np.arange(15)[::-1], 0.125)  # 1.875
    assert labeled == ["14"]
    assert unlabeled == ids[:14][::-1]
    with pytest.raises(UserError, match="15 entries for a list of 14"):
        split_by_permutation(ids[:14], np.arange(15), 0.5)
    with pytest.raises(UserError, match=r"ratio 0\.01: gives 0 of 15"):
        split_by_permutation(ids, np.arange(15), 0.01)
