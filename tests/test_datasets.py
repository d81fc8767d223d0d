"""Datasets from a dataset.yaml: finding files, decoding labels, resolving splits, and what users get wrong."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from common.data import dataset_yaml, shapes, split
from common.data import spec as datasets
from common.data.dataset_yaml import load_spec
from common.data.files import read_index_mask, read_rgb, voc_colormap
from common.data.spec import Item, check_pair
from common.data.split import resolve_split
from common.errors import UserError
from common.measure.pictures import save_palette_png
from splits.prepare.archives import write_index_mask

PETS = {
    "name": "pets",
    "images": "img/{id}.jpg",
    "labels": "mask/{id}.png",
    "classes": ["background", "cat", "dog"],
    "lists": {"train": "train.txt", "val": "val.txt"},
}


def mask(*rows: list[int], dtype: Any = np.uint8) -> Any:
    return np.array(rows, dtype=dtype)


def pets(folder: Path, labels: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A dataset of photos a..f, of which f has no mask; train a..f without e, val e."""
    for name in "abcdef":
        (folder / "img").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((2, 3, 3), 9, np.uint8)).save(folder / "img" / f"{name}.jpg")
    default = {name: mask([0, 1, 2], [255, 0, 0]) for name in "abcde"}
    for name, values in {**default, **(labels or {})}.items():
        (folder / "mask").mkdir(exist_ok=True)
        Image.fromarray(values).save(folder / "mask" / f"{name}.png")
    (folder / "train.txt").write_text("a\nb\nc\nd\nf\n")
    (folder / "val.txt").write_text("e\n")
    path = folder / "dataset.yaml"
    path.write_text(yaml.safe_dump({**PETS, **changes}))
    return path


def write_split(folder: Path, labeled: str, unlabeled: str | None) -> Path:
    folder.mkdir(parents=True)
    (folder / "labeled.txt").write_text(labeled)
    if unlabeled is not None:
        (folder / "unlabeled.txt").write_text(unlabeled)
    return folder


def label_of(spec: datasets.DatasetSpec, name: str) -> list[list[int]]:
    (item,) = [item for item in spec.read_list("train") if item.id == name]
    return spec.load_label(item).tolist()


# built-in datasets


@pytest.mark.parametrize(
    ("name", "classes"),
    [("voc", 21), ("cityscapes", 19), ("coco", 81), ("pascal_context", 60), ("camvid", 11), ("shapes", 5)],
)
def test_built_in_datasets_load_without_their_files(name: str, classes: int) -> None:
    spec = load_spec(name)
    assert (spec.name, spec.num_classes) == (name, classes)
    assert spec.palette.shape == (classes, 3)
    assert len(set(spec.classes)) == classes
    assert {"train", "val"} <= set(spec.list_names)
    assert pickle.loads(pickle.dumps(spec)).classes == spec.classes  # goes to worker processes


def test_voc_colour_map() -> None:
    colors = voc_colormap()
    assert colors.shape == (256, 3)
    assert colors[[0, 1, 15, 20, 255]].tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [192, 128, 128],
        [0, 64, 128],
        [224, 224, 192],
    ]


@pytest.mark.parametrize("below", [".", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc_is_found_at_each_usual_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    home = tmp_path / "voc" / below
    for folder in ("JPEGImages", "SegmentationClassAug", "SegmentationClass", "ImageSets/Segmentation"):
        (home / folder).mkdir(parents=True)
    for name in ("2007_000001", "2007_000002"):
        Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(home / "JPEGImages" / f"{name}.jpg")
    write_index_mask(home / "SegmentationClassAug/2007_000001.png", np.full((4, 5), 20, np.uint8))
    write_index_mask(home / "SegmentationClass/2007_000002.png", np.full((4, 5), 255, np.uint8))
    (home / "list.txt").write_text(
        "2007_000001\nJPEGImages/2007_000002.jpg SegmentationClass/2007_000002.png\n"
    )
    monkeypatch.setenv("SSS_DATA", str(tmp_path))
    for spec in (load_spec("voc"), load_spec("voc", tmp_path / "voc")):
        assert spec.root == home
        items = spec.read_list("list.txt", labels=True)
        assert [item.id for item in items] == ["2007_000001", "2007_000002"]
        assert [np.unique(spec.load_label(item)).tolist() for item in items] == [[20], [255]]
    monkeypatch.setenv("SSS_DATA", str(tmp_path / "voc"))
    assert load_spec("voc").root == home


def test_genuine_voc_masks_are_raw_palette_indices(shared_data: Path) -> None:
    spec = load_spec("voc", shared_data / "voc_slice")
    train = spec.read_list("train", labels=True)
    val = spec.read_list("val")
    assert (len(train), len(val)) == (24, 12)
    values: set[int] = set()
    for item in [*train, *val]:
        image, label = spec.load_image(item), spec.load_label(item)
        check_pair(item, image, label)
        assert image.dtype == label.dtype == np.uint8
        assert image.flags.c_contiguous
        values |= set(np.unique(label).tolist())
    assert {0, 15, 255} <= values <= {*range(21), 255}


def test_genuine_cityscapes_label_ids_become_train_ids(shared_data: Path, tmp_path: Path) -> None:
    root = shared_data / "cityscapes_slice"
    spec = load_spec("cityscapes", root)
    ids = ["aachen_000000_000019", "aachen_000004_000019"]
    lines = tmp_path / "list.txt"
    lines.write_text(f"leftImg8bit/train/aachen/{ids[0]}_leftImg8bit.png\n{ids[1]}\n")
    items = spec.read_list(lines, labels=True)
    assert [item.id for item in items] == ids
    for item in items:
        raw = np.array(Image.open(root / f"gtFine/train/aachen/{item.id}_gtFine_labelIds.png"))
        label = spec.load_label(item)
        assert (label[raw == 7] == 0).all()
        assert (label[raw == 26] == 13).all()
        assert (label[np.isin(raw, [*range(7), 9, 10, 14, 15, 16, 18, 29, 30])] == 255).all()
        assert set(np.unique(label).tolist()) <= {*range(19), 255}


def test_cityscapes_prefers_train_ids_and_reads_the_flat_layout(tmp_path: Path) -> None:
    ids = ["ulm_000000_000019", "ulm_000001_000019"]
    for name in ids:
        path = tmp_path / f"leftImg8bit/train/ulm/{name}_leftImg8bit.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(path)
        write_index_mask(
            tmp_path / f"gtFine/train/ulm/{name}_gtFine_labelIds.png", np.full((2, 2), 7, np.uint8)
        )
    write_index_mask(
        tmp_path / f"gtFine/train/ulm/{ids[1]}_gtFine_labelTrainIds.png", np.full((2, 2), 7, np.uint8)
    )
    flat = tmp_path / "images/train/jena_000000_000019.png"
    flat.parent.mkdir(parents=True)
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(flat)
    write_index_mask(
        tmp_path / "segmentation/train/jena_000000_000019_gtFine.png", np.full((2, 2), 8, np.uint8)
    )
    lines = tmp_path / "list.txt"
    lines.write_text(
        "\n".join(ids) + "\n/images/train/jena_000000_000019.png\t"
        "/segmentation/train/jena_000000_000019_gtFine.png"
    )
    spec = load_spec("cityscapes", tmp_path)
    labels = [int(spec.load_label(item)[0, 0]) for item in spec.read_list(lines, labels=True)]
    assert labels == [0, 7, 8]


def test_camvid_with_its_own_lists_and_splits(shared_data: Path) -> None:
    spec = load_spec("camvid", shared_data / "camvid")
    assert [len(spec.read_list(name)) for name in ("train", "val", "test")] == [367, 101, 233]
    classes = yaml.safe_load((shared_data / "camvid" / "classes.yaml").read_text())
    assert list(spec.classes) == classes["names"]
    assert spec.palette.tolist() == classes["palette"]
    split = resolve_split(spec, "seed0/46")
    assert (len(split.labeled), len(split.unlabeled)) == (46, 321)
    assert split.hash == resolve_split(spec, "splits/seed0/46").hash
    assert split.hash != resolve_split(spec, "seed1/46").hash


def test_shapes_needs_no_files_and_agrees_with_its_generator() -> None:
    spec = load_spec("shapes")
    assert spec.root is None
    assert spec.classes == shapes.CLASSES
    assert spec.palette.tolist() == shapes.PALETTE.tolist()
    assert spec.ranges == shapes.RANGES
    item = spec.read_list("val")[3]
    image, label = shapes.render(int(item.id))
    assert item.image == Path("shapes") / item.id
    assert np.array_equal(spec.load_image(item), image)
    assert np.array_equal(spec.load_label(item), label)
    with pytest.raises(UserError, match="generated dataset"):
        load_spec("shapes", "/data")


def test_shapes_splits_are_drawn_nested_and_cover_the_classes() -> None:
    spec = load_spec("shapes")
    small, large = resolve_split(spec, "random/8"), resolve_split(spec, "random/1_8")
    other = resolve_split(spec, "random_seed1/8")
    assert [len(small.labeled), len(small.unlabeled)] == [8, len(spec.ranges["train"]) - 8]
    assert [item.id for item in large.labeled[:8]] == [item.id for item in small.labeled]
    assert small.hash == resolve_split(spec, "random/8").hash != other.hash
    seen = {value for item in small.labeled for value in np.unique(spec.load_label(item)).tolist()}
    assert seen - {255} == set(range(spec.num_classes))
    assert all(item.label is None for item in small.unlabeled)


# decoding


@pytest.mark.parametrize("mode", ["grey", "palette", "16 bit"])
def test_stored_values_are_read_raw_in_every_mode(tmp_path: Path, mode: str) -> None:
    values = mask([0, 1, 2], [255, 2, 1])
    path = tmp_path / "m.png"
    if mode == "palette":
        save_palette_png(path, values, voc_colormap())
        assert Image.open(path).mode == "P"
    else:
        Image.fromarray(values.astype(np.uint16) if mode == "16 bit" else values).save(path)
    assert read_index_mask(path).tolist() == values.tolist()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_masks_of_few_bits_are_not_stretched(tmp_path: Path, bits: int) -> None:
    import struct
    import zlib

    values = np.arange(8).reshape(1, 8) % (1 << bits)
    packed = np.packbits((values[..., None] >> np.arange(bits)[::-1]) & 1).tobytes()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    path = tmp_path / "m.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 1, bits, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" + packed))
        + chunk(b"IEND", b"")
    )
    assert read_index_mask(path).tolist() == values.tolist()


def test_ignore_values_and_label_map(tmp_path: Path) -> None:
    stored = {"a": mask([0, 100, 200], [250, 65535, 7], dtype=np.uint16)}
    path = pets(tmp_path, stored, ignore=[250, -1], label_map={100: 1, 200: 2, 7: "ignore"})
    assert label_of(load_spec(path), "a") == [[0, 1, 2], [255, 255, 255]]


def test_a_complete_label_map_leaves_no_value_to_chance(tmp_path: Path) -> None:
    stored = {"a": mask([10, 20, 30], [10, 1, 255])}
    path = pets(tmp_path, stored, label_map={10: 0, 20: 1, 30: 2})
    with pytest.raises(
        UserError, match=r"a\.png: label value 1 \(1 pixels\) belongs to none of the 3 classes"
    ):
        label_of(load_spec(path), "a")
    path = pets(tmp_path, stored, label_map={10: 0, 20: 1, 30: 2}, others="ignore")
    assert label_of(load_spec(path), "a") == [[0, 1, 2], [0, 255, 255]]


def test_values_out_of_range_name_file_value_classes_and_remedy(tmp_path: Path) -> None:
    path = pets(tmp_path, {"b": mask([0, 3, 3], [7, 0, 255])})
    with pytest.raises(UserError) as error:
        label_of(load_spec(path), "b")
    text = str(error.value)
    assert "b.png: label value 3 (2 pixels; also 7)" in text
    assert "3 classes (0..2; ignored: 255)" in text
    assert f"'label_map' or 'ignore' of {path}" in text


def test_masks_of_0_and_255_in_a_two_class_dataset(tmp_path: Path) -> None:
    stored = {name: mask([0, 255, 255], [0, 0, 0]) for name in "abcde"}
    two: dict[str, Any] = {"classes": ["background", "pet"]}
    with pytest.raises(UserError, match=r"no pixel is 'pet'; set 'label_map: \{255: 1\}'"):
        label_of(load_spec(pets(tmp_path, stored, **two)), "a")
    expected = [[0, 1, 1], [0, 0, 0]]
    for more in ({"ignore": "none"}, {}):
        path = pets(tmp_path, stored, **two, label_map={255: 1}, **more)
        assert label_of(load_spec(path), "a") == expected
    path = pets(tmp_path, stored, **two, confirm_0_255=True)
    assert label_of(load_spec(path), "a") == [[0, 255, 255], [0, 0, 0]]


def test_colour_masks(tmp_path: Path) -> None:
    palette = [[0, 0, 0], [255, 0, 0], [0, 255, 0]]
    painted = np.array([[[0, 0, 0], [255, 0, 0], [0, 255, 0]], [[9, 9, 9], [0, 0, 0], [0, 0, 0]]], np.uint8)
    path = pets(tmp_path, {"a": painted}, palette=palette)
    with pytest.raises(UserError, match=r"a\.png: is no index mask \(mode RGB\).*label_format: color"):
        label_of(load_spec(path), "a")
    path = pets(tmp_path, {"a": painted}, palette=palette, label_format="color")
    with pytest.raises(UserError, match=r"colour \(9, 9, 9\) of 1 pixels is not in the palette"):
        label_of(load_spec(path), "a")
    path = pets(tmp_path, {"a": painted}, palette=palette, label_format="color", ignore_colors=[[9, 9, 9]])
    assert label_of(load_spec(path), "a") == [[0, 1, 2], [255, 0, 0]]


def test_images_are_rgb_without_turning_them(tmp_path: Path) -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[:, :3] = (200, 10, 10)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_rgb(tmp_path / "a.png"), pixels)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    assert read_rgb(tmp_path / "grey.png").shape == (4, 6, 3)


@pytest.mark.parametrize("kind", ["image", "mask"])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_damaged_files_are_named_with_a_remedy(tmp_path: Path, kind: str, damage: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    path = tmp_path / ("a.jpg" if kind == "image" else "a.png")
    Image.fromarray(noise if kind == "image" else noise[..., 0]).save(path)
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "garbage": b"GIF" * 100, "empty": b""}[damage])
    with pytest.raises(UserError, match=rf"{path.name}: {kind} cannot be read \(.*\); restore the file"):
        read_rgb(path) if kind == "image" else read_index_mask(path)


def test_mask_of_another_size(tmp_path: Path) -> None:
    item = Item("a", Path("a.jpg"), Path("a.png"))
    check_pair(item, np.zeros((2, 3, 3), np.uint8), np.zeros((2, 3), np.uint8))
    with pytest.raises(UserError, match=r"a\.png: mask is 2x3 pixels but a\.jpg is 3x2; replace"):
        check_pair(item, np.zeros((2, 3, 3), np.uint8), np.zeros((3, 2), np.uint8))


# lists and roots


def test_a_photo_without_mask_is_an_item_but_cannot_be_labeled_or_evaluated(tmp_path: Path) -> None:
    path = pets(tmp_path)
    spec = load_spec(path)
    last = spec.read_list("train")[-1]
    assert (last.id, last.label) == ("f", None)
    with pytest.raises(UserError, match=r"f\.jpg: has no mask"):
        spec.load_label(last)
    (tmp_path / "val.txt").write_text("e\nf\n")
    with pytest.raises(UserError, match=r"val\.txt:2: no mask for 'f' \(tried .*mask/f\.png\)"):
        load_spec(path).read_list("val")


def test_missing_files_name_list_line_and_paths(tmp_path: Path) -> None:
    spec = load_spec(pets(tmp_path))
    (tmp_path / "train.txt").write_text("a\n\nzebra\n")
    with pytest.raises(UserError, match=r"train\.txt:3: no image for 'zebra' \(tried .*img/zebra\.jpg\)"):
        spec.read_list("train")


def test_missing_data_is_said_where_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSS_DATA", raising=False)
    spec = load_spec("voc", tmp_path / "nowhere")
    with pytest.raises(
        UserError, match=r"data\.root=.*nowhere: no such folder .* set SSS_DATA or data\.root"
    ):
        spec.read_list("train")
    (tmp_path / "other").mkdir()
    spec = load_spec("voc", tmp_path / "other")
    with pytest.raises(UserError, match=r"expected folder 'JPEGImages' is missing"):
        spec.read_list("train")


def test_missing_list_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built_in = datasets.SPLITS
    for module in (datasets, dataset_yaml, split):
        monkeypatch.setattr(module, "SPLITS", tmp_path / "splits")
    (tmp_path / "splits/voc").mkdir(parents=True)
    for name in ("published.yaml", "voc/dataset.yaml"):
        (tmp_path / "splits" / name).write_bytes((built_in / name).read_bytes())
    (tmp_path / "JPEGImages").mkdir()
    spec = load_spec("voc", tmp_path)
    with pytest.raises(
        UserError,
        match=r"the 'train' list is missing; run 'python -m splits get voc/train_aug'",
    ):
        spec.read_list("train")
    with pytest.raises(UserError, match=r"run 'python -m splits get voc/classic/366'"):
        resolve_split(spec, "classic/366")
    with pytest.raises(UserError, match=r"run 'python -m splits get voc/s4gan/0\.3'"):
        resolve_split(spec, "voc/s4gan/0.3")
    with pytest.raises(UserError, match=r"splits make voc --fraction 1/16 --seed 3'"):
        resolve_split(spec, "random_seed3/1_16")


def test_sss_data_folder_wins_over_the_yaml_unless_it_holds_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pets(tmp_path / "own")
    (tmp_path / "data/voc/JPEGImages").mkdir(parents=True)
    monkeypatch.setenv("SSS_DATA", str(tmp_path / "data"))
    assert load_spec(path).root == tmp_path / "own"
    pets(tmp_path / "data" / "pets")
    assert load_spec(path).root == tmp_path / "data/pets"
    assert load_spec(path, tmp_path / "own").root == tmp_path / "own"


def test_paths_in_lists_need_no_patterns(tmp_path: Path) -> None:
    path = pets(tmp_path)
    values = {key: value for key, value in PETS.items() if key not in ("images", "labels")}
    path.write_text(yaml.safe_dump(values))
    (tmp_path / "train.txt").write_text("img/a.jpg mask/a.png\nimg/f.jpg\n")
    first, second = load_spec(path).read_list("train")
    assert (first.id, first.label, second.label) == ("a", tmp_path / "mask/a.png", None)
    assert load_spec(path).load_label(first).tolist() == [[0, 1, 2], [255, 0, 0]]


def test_same_names_in_different_folders(tmp_path: Path) -> None:
    path = pets(tmp_path)
    for place in ("img/x", "img/y", "mask/x", "mask/y"):
        (tmp_path / place).mkdir()
        suffix = "jpg" if place.startswith("img") else "png"
        Image.fromarray(np.zeros((2, 3), np.uint8)).save(tmp_path / place / f"1.{suffix}")
    (tmp_path / "train.txt").write_text("x/1\ny/1\n")
    with pytest.raises(UserError, match=r"train\.txt:2: '1' names both .*set 'ids: path'"):
        load_spec(path).read_list("train")
    path = pets(tmp_path, ids="path")
    (tmp_path / "train.txt").write_text("x/1\ny/1\n")
    items = load_spec(path).read_list("train", labels=True)
    assert [item.id for item in items] == ["x/1", "y/1"]
    assert [item.label for item in items] == [tmp_path / "mask/x/1.png", tmp_path / "mask/y/1.png"]


def test_coco_spellings_of_a_list_give_the_same_split(tmp_path: Path) -> None:
    for name in ("000000000009", "000000000025", "000000000030"):
        (tmp_path / "train2017").mkdir(exist_ok=True)
        Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(tmp_path / f"train2017/{name}.jpg")
        write_index_mask(tmp_path / f"masks/{name}.png", np.full((2, 3), 80, np.uint8))
    spec = load_spec("coco", tmp_path)
    one = write_split(tmp_path / "one", "000000000009", "000000000025\n000000000030")
    other = write_split(
        tmp_path / "other",
        "train2017/000000000009.jpg masks/000000000009.png",
        "train2017/000000000030.jpg masks/000000000030.png\ntrain2017/000000000025.jpg masks/000000000025.png\n",
    )
    assert resolve_split(spec, str(one)).hash == resolve_split(spec, str(other)).hash


# splits


def test_split_roles(tmp_path: Path) -> None:
    spec = load_spec(pets(tmp_path))
    write_split(tmp_path / "mine/2", "a\nb\n", "f\nc\n")
    split = resolve_split(spec, "mine/2")
    assert [item.id for item in split.labeled] == ["a", "b"]
    assert [(item.id, item.label) for item in split.unlabeled] == [("f", None), ("c", None)]
    write_split(tmp_path / "mine/1", "b\n", None)
    rest = resolve_split(spec, str(tmp_path / "mine/1"))
    assert [item.id for item in rest.unlabeled] == ["a", "c", "d", "f"]
    full = resolve_split(spec, "full")
    assert [item.id for item in full.labeled] == ["a", "b", "c", "d"]  # f has no mask
    assert full.unlabeled == []
    assert len({split.hash, rest.hash, full.hash}) == 3


@pytest.mark.parametrize(
    ("labeled", "unlabeled", "message"),
    [
        (
            "a\ne\n",
            "b\n",
            r"labeled\.txt:2: 'e' is also in val\.txt; a split may not contain evaluation images",
        ),
        ("a\n", "b\n\ne\n", r"unlabeled\.txt:3: 'e' is also in val\.txt"),
        ("", "b\n", r"labeled\.txt: the labeled list is empty"),
        ("a\n", "", r"unlabeled\.txt: the unlabeled list is empty; .*'full'"),
        ("a\nb\nc\nd\nf\n", None, r"labeled\.txt:5: no mask for 'f'"),
        ("a\nzebra\n", "b\n", r"labeled\.txt:2: no image for 'zebra'"),
    ],
)
def test_broken_splits(tmp_path: Path, labeled: str, unlabeled: str | None, message: str) -> None:
    spec = load_spec(pets(tmp_path))
    write_split(tmp_path / "bad", labeled, unlabeled)
    with pytest.raises(UserError, match=message):
        resolve_split(spec, "bad")


def test_nothing_left_to_be_unlabeled(tmp_path: Path) -> None:
    spec = load_spec(pets(tmp_path))
    (tmp_path / "train.txt").write_text("a\nb\n")
    write_split(tmp_path / "all", "a\nb\n", None)
    with pytest.raises(UserError, match="nothing of the 'train' list is left"):
        resolve_split(spec, "all")


# mistakes in a dataset.yaml


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": "x/{id}.jpg"}, "unknown key 'image'; did you mean 'images'"),
        ({"images": "x/{name}.jpg"}, r"'\{name\}' in 'x/\{name\}\.jpg' is unknown; name it in 'variables'"),
        ({"images": "x/all.jpg"}, r"lacks '\{id\}'"),
        ({"classes": ["one"]}, "classes: 1 names; give 2 to 254"),
        ({"classes": None}, "classes: None; give a text or a list of texts"),
        ({"palette": [[0, 0, 0]]}, "palette: 1 colours for 3 classes"),
        ({"palette": [[0, 0, 0], [0, 0, 300], [1, 1, 1]]}, r"palette: not a list of colours"),
        ({"label_map": {5: 3}}, r"label_map: 5: 3; targets are 0\.\.2 or 'ignore'"),
        ({"label_map": {"x": 1}}, r"label_map: stored value 'x'"),
        ({"ignore": "void"}, "ignore: 'void'; give stored values"),
        ({"others": "zero"}, "others: 'zero'"),
        ({"label_format": "rgb"}, "label_format: 'rgb'; choose one of index, color"),
        ({"variables": {"part": "("}}, "variables.part: not a regular expression"),
        ({"label_format": "color", "palette": [[0, 0, 0]] * 3}, "two classes share a colour"),
    ],
)
def test_mistakes_in_the_yaml(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = pets(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as error:
        load_spec(path)
    assert str(error.value).startswith(str(path))


def test_yaml_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "dataset.yaml"
    for text, message in (
        ("a: [", "not valid YAML"),
        ("- a", "expected 'key: value' lines"),
        ("{}", "key 'classes' is missing"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load_spec(path)


def test_unknown_dataset_suggests_a_known_one() -> None:
    with pytest.raises(UserError, match=r"dataset 'cityscape': unknown .* did you mean 'cityscapes'"):
        load_spec("cityscape")
