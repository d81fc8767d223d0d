"""Datasets from a dataset.yaml: finding files, decoding labels, resolving splits, and what users get wrong."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image, ImageOps

from common.data import dataset_yaml, split
from common.data import spec as datasets
from common.data.dataset_yaml import load_spec
from common.data.files import read_index_mask, read_rgb, remarks, voc_colormap
from common.data.spec import Item, check_pair
from common.data.split import resolve_split
from common.errors import UserError
from splits import shapes_images as shapes
from splits.prepare.archives import write_index_mask
from tools.pictures import save_palette_png

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


def oriented(path: Path, pixels: np.ndarray, tag: int) -> Path:
    exif = Image.Exif()
    exif[0x0112] = tag
    Image.fromarray(pixels).save(path, exif=exif, **({"quality": 100} if path.suffix == ".jpg" else {}))
    return path


@pytest.mark.parametrize("ending", ["png", "tif", "jpg"])
@pytest.mark.parametrize("tag", range(10))
def test_images_are_rgb_and_upright(tmp_path: Path, ending: str, tag: int) -> None:
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:8, :8] = 200
    path = oriented(tmp_path / f"a.{ending}", pixels, tag)
    turned = {1: 0, 3: 2, 6: -1, 8: 1}  # quarters to the left; the other tags mirror as well
    if tag in turned:
        assert np.allclose(read_rgb(path), np.rot90(pixels, turned[tag]), atol=20)
    with Image.open(path) as file:
        assert np.array_equal(read_rgb(path), np.array(ImageOps.exif_transpose(file)))
    assert np.allclose(read_rgb(path, upright=False), pixels, atol=20)
    seen = [f"turned upright (EXIF orientation {tag})"] if tag in range(2, 9) else []
    assert remarks(path) == seen
    assert all(f"orientation {tag} not applied" in one for one in remarks(path, upright=False))
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    assert read_rgb(tmp_path / "grey.png").shape == (16, 24, 3)


def test_photos_of_many_bits_keep_their_greys(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 240).reshape(12, 20)
    expected = np.rint(ramp / 257)
    colours = np.stack([ramp, ramp / 2, ramp / 4], axis=-1).astype(np.uint16)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "grey.png")
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "grey.tif")
    Image.fromarray((ramp / 65535).astype(np.float32)).save(tmp_path / "float.tif")
    for name in ("colour.png", "colour.tif"):
        cv2.imwrite(str(tmp_path / name), colours[..., ::-1])
    for name in ("grey.png", "grey.tif", "float.tif", "colour.png", "colour.tif"):
        assert np.abs(read_rgb(tmp_path / name)[..., 0] - expected).max() <= 1, name
        assert len(remarks(tmp_path / name)) == 1
        assert "become 0..255" in remarks(tmp_path / name)[0]
    assert read_rgb(tmp_path / "colour.png")[-1, -1].tolist() == [255, 127, 64]
    Image.fromarray((ramp / 16).astype(np.uint16)).save(tmp_path / "12 bits.png")
    assert any("dark" in one for one in remarks(tmp_path / "12 bits.png"))
    assert np.abs(read_rgb(tmp_path / "12 bits.png", value_range=(0, 4095))[..., 0] - expected).max() <= 1
    assert not any("dark" in one for one in remarks(tmp_path / "12 bits.png", value_range=(0, 4095)))


@pytest.mark.parametrize("values", [[0.0, 255.0], [-1.0, 1.0], [0.0, float("nan")], [0.0, 70000.0]])
def test_photos_whose_range_nothing_says_are_refused(tmp_path: Path, values: list[float]) -> None:
    kind = np.int32 if values[1] == 70000 else np.float32
    Image.fromarray(np.array([values] * 2, kind)).save(tmp_path / "a.tif")
    with pytest.raises(
        UserError, match=r"a\.tif: stores values .*set 'value_range: \[low, high\]' in dataset.yaml"
    ):
        read_rgb(tmp_path / "a.tif")
    if np.isfinite(values[1]):
        shown = read_rgb(tmp_path / "a.tif", value_range=(values[0], values[1]))
        assert shown[0, :, 0].tolist() == [0, 255]


def test_what_is_left_out_of_a_photo_is_named(tmp_path: Path) -> None:
    pixels = np.full((4, 6, 4), 90, np.uint8)
    pages = [Image.fromarray(pixels[..., :3] + i) for i in range(3)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "pages.gif", save_all=True, append_images=pages[1:])
    Image.fromarray(pixels).save(tmp_path / "alpha.png")
    Image.fromarray(pixels[..., :2]).save(tmp_path / "grey alpha.png")
    pages[0].convert("P").save(tmp_path / "palette.png", transparency=0)
    Image.fromarray(pixels).save(tmp_path / "alpha.tif")
    Image.frombytes("RGBX", (6, 4), pixels.tobytes()).save(tmp_path / "infrared.tif")
    for name, said in {
        "pages.tif": "pages beyond the first dropped",
        "pages.gif": "pages beyond the first dropped",
        "alpha.png": "alpha channel dropped",
        "grey alpha.png": "alpha channel dropped",
        "palette.png": "alpha channel dropped",
        "alpha.tif": "alpha channel dropped",
        "infrared.tif": "bands beyond the third dropped",
    }.items():
        assert remarks(tmp_path / name) == [said], name
        assert read_rgb(tmp_path / name).shape == (4, 6, 3)
    pages[0].save(tmp_path / "plain.jpg")
    Image.new("CMYK", (6, 4)).save(tmp_path / "print.jpg")
    (tmp_path / "no image.jpg").write_bytes(b"no")
    assert [remarks(tmp_path / f"{name}.jpg") for name in ("plain", "print", "no image")] == [[], [], []]


def test_the_dataset_says_how_photos_are_read(tmp_path: Path) -> None:
    """Photos turned by a camera (here by 180 degrees, which no size gives away) with masks drawn on either view."""
    for stored in (False, True):
        path = pets(tmp_path / str(stored), **({"orientation": "stored"} if stored else {}))
        folder, label = path.parent, np.zeros((16, 16), np.uint8)
        label[:8, :4] = 2
        photo = np.repeat(label[..., None] * 100, 3, axis=2)
        oriented(folder / "img/a.jpg", photo if stored else photo[::-1, ::-1], 3)
        Image.fromarray(label).save(folder / "mask/a.png")
        spec = load_spec(path)
        item = spec.read_list("train")[0]
        assert ((spec.load_image(item)[..., 0] > 100) == (spec.load_label(item) == 2)).all()
    path = pets(tmp_path / "deep", value_range=[0, 4095])
    Image.fromarray(np.full((2, 3), 4095, np.uint16)).save(tmp_path / "deep/img/a.jpg", format="png")
    spec = load_spec(path)
    assert (spec.load_image(spec.read_list("train")[0]) == 255).all()


def test_a_mask_that_fits_the_photo_before_it_was_turned(tmp_path: Path) -> None:
    photo = oriented(tmp_path / "a.jpg", np.zeros((16, 24, 3), np.uint8), 6)
    item = Item("a", photo, tmp_path / "a.png")
    message = r"mask is 24x16 pixels but .* is 16x24; .*'orientation' in dataset.yaml: .*EXIF orientation 6"
    with pytest.raises(UserError, match=message):
        check_pair(item, read_rgb(photo), np.zeros((16, 24), np.uint8))


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


def test_an_own_dataset_is_read_from_the_root_that_it_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pets(tmp_path / "data/pets")
    pets(tmp_path / "data")  # the folder itself has the layout, too
    monkeypatch.setenv("SSS_DATA", str(tmp_path / "data"))
    own = tmp_path / "own"
    for stated in (".", str(own), "../own", "$HERE/own"):
        monkeypatch.setenv("HERE", str(tmp_path))
        assert load_spec(pets(own, root=stated)).root == own
    gone = load_spec(pets(own, root="gone"))
    assert gone.root == own / "gone"  # nothing else stands in for it
    with pytest.raises(UserError, match=r"own/gone: no such folder"):
        gone.read_list("train")
    assert load_spec(pets(own, root="."), tmp_path / "data").root == tmp_path / "data"  # data.root


def test_where_a_dataset_without_root_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pets(tmp_path / "own")
    (tmp_path / "data/voc/JPEGImages").mkdir(parents=True)
    monkeypatch.setenv("SSS_DATA", str(tmp_path / "data"))
    assert load_spec(path).root == tmp_path / "own"
    pets(tmp_path / "data")
    assert load_spec(path).root == tmp_path / "own"  # not whatever happens to have such folders
    pets(tmp_path / "data" / "pets")
    assert load_spec(path).root == tmp_path / "data/pets"
    assert load_spec(path, tmp_path / "own").root == tmp_path / "own"
    assert load_spec("voc").root == tmp_path / "data/voc"  # of a built-in dataset the stated root comes last


@pytest.mark.parametrize(
    ("line", "image", "label"),
    [
        ("a", "img/a.jpg", "mask/a.png"),
        ("a.jpg", "img/a.jpg", "mask/a.png"),
        ("unlabeled/a.png", "unlabeled/a.png", None),  # the mask is that of img/a.jpg
        ("unlabeled\\a.png", "unlabeled/a.png", None),
        ("unlabeled/new.png", "unlabeled/new.png", "mask/new.png"),
        ("./img/a.jpg\t/mask_v2/a.png", "img/a.jpg", "mask_v2/a.png"),
        ("a.jpg mask_v2/a.png", "img/a.jpg", "mask_v2/a.png"),
        ("img/a.jpg mask/b.png", "img/a.jpg", "mask/b.png"),
        ("a b", "img/a.jpg", "mask/b.png"),
        ("a a_2.png", "img/a.jpg", "mask/a_2.png"),
        ("{root}/unlabeled/a.png {root}/mask_v2/a.png", "unlabeled/a.png", "mask_v2/a.png"),
        ("leaf (1).jpg", "img/leaf (1).jpg", "mask/leaf (1).png"),
        ("leaf (1)\t", "img/leaf (1).jpg", "mask/leaf (1).png"),
        ("IMG 007.jpg", "img/IMG 007.jpg", "mask/IMG 007.png"),
        ("img/IMG 007.jpg", "img/IMG 007.jpg", "mask/IMG 007.png"),
        ("IMG 007.jpg mask_v2/a.png", "img/IMG 007.jpg", "mask_v2/a.png"),
        ("img/IMG 007.jpg mask/leaf (1).png", "img/IMG 007.jpg", "mask/leaf (1).png"),
        ("se\u0301same", "img/s\u00e9same.jpg", None),
        ("img/s\u00e9same.jpg", "img/s\u00e9same.jpg", None),
        ("cafe\u0301 1.jpg", "img/cafe\u0301 1.jpg", None),
        ("caf\u00e9 1.jpg", "img/cafe\u0301 1.jpg", None),
    ],
)
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_line_is_the_files_that_it_names(
    tmp_path: Path, line: str, image: str, label: str | None, ending: str
) -> None:
    path = pets(
        tmp_path, labels={"a_2": mask([0]), "new": mask([0]), "leaf (1)": mask([0]), "IMG 007": mask([0])}
    )
    for name in ("img/leaf (1).jpg", "img/IMG 007.jpg", "img/s\u00e9same.jpg", "img/cafe\u0301 1.jpg",
                 "unlabeled/a.png", "unlabeled/new.png", "mask_v2/a.png"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "list.txt").write_bytes(f"\ufeff{line}{ending}b{ending}".format(root=tmp_path).encode())
    first, second = load_spec(path).read_list("list.txt", labels=False)
    assert (first.image, first.label) == (tmp_path / image, label and tmp_path / label)
    assert second.id == "b"


@pytest.mark.parametrize(
    "line",
    [
        "img2/a.jpg",
        "img/a.png",
        "/elsewhere/a.jpg",
        "a\tmask_v2/a.png",
        "a a_2.png",
        "a.jpg b.jpg c.png",
        "x/a",
    ],
)
def test_nothing_stands_in_for_a_file_that_is_named(tmp_path: Path, line: str) -> None:
    path = pets(tmp_path)
    (tmp_path / "list.txt").write_text(f"{line}\n")
    with pytest.raises(UserError, match=r"list\.txt:1: no (image|mask) for 'a"):
        load_spec(path).read_list("list.txt", labels=True)


def test_photos_of_one_name_in_folders_of_training_and_evaluation(tmp_path: Path) -> None:
    path = pets(tmp_path)
    for part in ("train", "val"):
        for kind, ending in (("img", "jpg"), ("mask", "png")):
            (tmp_path / kind / part).mkdir()
            for name in "abc":
                (tmp_path / kind / part / f"{name}.{ending}").write_bytes(
                    (tmp_path / kind / f"{name}.{ending}").read_bytes()
                )
    spec = load_spec(path)
    (tmp_path / "val.txt").write_text("img/val/a.jpg mask/val/a.png\n")
    write_split(tmp_path / "one", "img/train/a.jpg mask/train/a.png\n", "img/train/b.jpg\nimg/val/c.jpg\n")
    split = resolve_split(spec, "one")
    assert [item.image.parent.name for item in (*split.labeled, *split.unlabeled)] == [
        "train",
        "train",
        "val",
    ]
    write_split(tmp_path / "two", "train/a\n", "val/b\n")
    assert resolve_split(load_spec(path), "two").labeled[0].label == tmp_path / "mask/train/a.png"
    for number, line in enumerate(("img/val/a.jpg mask/train/a.png", "val/a", "val\\a.jpg")):
        write_split(tmp_path / f"bad{number}", line, "img/train/b.jpg\n")
        with pytest.raises(UserError, match=r"labeled\.txt:1: 'a' is also in val\.txt"):
            resolve_split(spec, f"bad{number}")


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
        ("a b c\n", "b\n", r"labeled\.txt:1: no image for 'a b c'"),
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
        ({"classes": None}, "'classes' is None; expected a list"),
        ({"palette": [[0, 0, 0]]}, "palette: 1 colours for 3 classes"),
        ({"palette": [[0, 0, 0], [0, 0, 300], [1, 1, 1]]}, r"palette: not a list of colours"),
        ({"label_map": {5: 3}}, r"label_map: 5: 3; targets are 0\.\.2 or 'ignore'"),
        ({"label_map": {"x": 1}}, r"label_map: stored value 'x'"),
        ({"ignore": "void"}, "ignore: 'void'; give stored values"),
        ({"others": "zero"}, "'others' is 'zero'; expected one of ignore"),
        ({"label_format": "rgb"}, "'label_format' is 'rgb'; expected one of index, color"),
        ({"variables": {"part": "("}}, "variables.part: not a regular expression"),
        ({"label_format": "color", "palette": [[0, 0, 0]] * 3}, "two classes share a colour"),
        (
            {"classes": [False, True, None, "dog"]},
            r"'classes\[0\]' is False; expected text; put .* in quotes",
        ),
        ({"classes": ["dog", None]}, r"'classes\[1\]' is None; expected text; put"),
        ({"classes": ["dog", 7]}, r"'classes\[1\]' is 7; expected text; put"),
        ({"classes": ["a", ["b"]]}, r"'classes\[1\]' is \['b'\]; expected text"),
        ({"classes": ["leaf", "stem", "leaf"]}, "classes: 'leaf' names two classes; give every class a name"),
        ({"classes": ["se\u0301same", "s\u00e9same"]}, "names two classes"),
        ({"classes": ["leaf", "leaf "]}, "names two classes"),
        ({"classes": ["leaf", ""]}, "classes: entry 1 is ''"),
        ({"classes": ["leaf", "a\nb"]}, r"classes: entry 1 is 'a\\nb'; give every class a name to print"),
        ({"orientation": "left"}, "'orientation' is 'left'; expected one of upright, stored"),
        ({"value_range": [9, 3]}, r"value_range: \(9.0, 3.0\); give \[low, high\]"),
    ],
)
def test_mistakes_in_the_yaml(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = pets(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as error:
        load_spec(path)
    assert str(error.value).startswith(str(path))


def test_words_that_yaml_takes_for_something_else(tmp_path: Path) -> None:
    path = pets(tmp_path)
    text = path.read_text().replace("- background\n- cat\n- dog\n", "HERE")
    for written in ("- off\n- on\n- no\n- null\n", "- sky\n- 2024-01-01\n- ~\n", "- yes\n- 1e3\n- 010\n"):
        path.write_text(text.replace("HERE", written))
        with pytest.raises(
            UserError, match="expected text; put names such as no, on, null and numbers in quotes"
        ):
            load_spec(path)
    path.write_text(text.replace("HERE", "- 'off'\n- \"on\"\n- n\n- 'null'\n"))
    assert load_spec(path).classes == ("off", "on", "n", "null")
    path.write_text(f"{path.read_text()}ignore: 3\n" * 2)
    with pytest.raises(UserError, match="is given twice"):
        load_spec(path)


def test_yaml_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "dataset.yaml"
    for text, message in (
        ("a: [", "not valid YAML"),
        ("- a", "expected 'key: value' lines"),
        ("{}", "missing key 'classes'"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load_spec(path)


def test_unknown_dataset_suggests_a_known_one() -> None:
    with pytest.raises(UserError, match=r"dataset 'cityscape': unknown .* did you mean 'cityscapes'"):
        load_spec("cityscape")
