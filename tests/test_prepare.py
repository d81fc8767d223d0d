"""From official archives to our layouts, on small archives built like the official ones and on genuine slices."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from common.data.dataset_yaml import load_spec
from common.data.files import read_index_mask, voc_colormap
from common.data.lists import read_ids
from common.errors import UserError
from splits.__main__ import _parser, main
from splits.prepare import ade20k, archives, cityscapes, coco, command, pascal_context, voc
from splits.prepare.archives import Download, Source, by_pattern, download_files
from splits.prepare.masks import decode_segmentation, unpack_counts

HEIGHT, WIDTH = 6, 8


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, format="JPEG")
    return buffer.getvalue()


def png(mask: Any, palette: bool = False) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(np.asarray(mask, dtype=np.uint8))
    if palette:
        image.putpalette(voc_colormap().tobytes())
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def full(value: int) -> Any:
    return np.full((HEIGHT, WIDTH), value, dtype=np.uint8)


def mat(**content: Any) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, content)
    return buffer.getvalue()


def write_zip(path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def unpack(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def state(folder: Path) -> dict[str, tuple[int, str]]:
    return {
        path.relative_to(folder).as_posix(): (
            path.stat().st_mtime_ns,
            hashlib.md5(path.read_bytes()).hexdigest(),
        )
        for path in folder.rglob("*")
        if path.is_file()
    }


def run(dataset: str, source: Path, out: Path, counts: dict[str, int], *more: str) -> int:
    expected = {name: (count,) for name, count in counts.items()}
    words = ["prepare", dataset, "--source", str(source), "--out", str(out), *more]
    return command.prepare(_parser().parse_args(words), expected)


# VOC and SBD

VOC_COUNTS = {"train": 2, "val": 1, "train_aug": 4}


def voc_files() -> tuple[dict[str, bytes], dict[str, bytes]]:
    """VOC with train 1, 2 and val 3; SBD with 2 (other mask), 3 (val) and the additional 4, 5."""
    home = "VOCdevkit/VOC2012"
    names = {k: f"2008_00000{k}" for k in range(1, 7)}
    official = {f"{home}/JPEGImages/{name}.jpg": jpeg(k) for k, name in names.items()}
    border = full(3)
    border[0] = 255
    for k in (1, 2, 3):
        official[f"{home}/SegmentationClass/{names[k]}.png"] = png(border, palette=True)
        official[f"{home}/SegmentationObject/{names[k]}.png"] = png(full(1))
    for name, members in {"train": (1, 2), "val": (3,), "trainval": (1, 2, 3)}.items():
        text = "".join(f"{names[k]}\n" for k in members)
        official[f"{home}/ImageSets/Segmentation/{name}.txt"] = text.encode()
    extended = {
        f"benchmark_RELEASE/dataset/cls/{names[k]}.mat": mat(
            GTcls={"Boundaries": np.zeros(20), "Segmentation": full(k), "CategoriesPresent": k}
        )
        for k in (2, 3, 4, 5)
    }
    extended["benchmark_RELEASE/dataset/img/2008_000004.jpg"] = jpeg(4)
    return official, extended


@pytest.fixture
def voc_archives(tmp_path: Path) -> Path:
    source = tmp_path / "official"
    source.mkdir()
    official, extended = voc_files()
    write_tar(source / "VOCtrainval_11-May-2012.tar", official)
    write_tar(source / "benchmark.tgz", extended, "w:gz")
    return source


def assert_voc(out: Path) -> None:
    lists = {name: read_ids(out / f"ImageSets/Segmentation/{name}.txt") for name in VOC_COUNTS}
    assert lists == {
        "train": ["2008_000001", "2008_000002"],
        "val": ["2008_000003"],
        "train_aug": ["2008_000001", "2008_000002", "2008_000004", "2008_000005"],
    }
    masks = {path.stem: read_index_mask(path) for path in (out / "SegmentationClassAug").glob("*.png")}
    assert sorted(masks) == lists["train_aug"]  # and not the validation photo
    assert {name: np.unique(mask).tolist() for name, mask in masks.items()} == {
        "2008_000001": [3, 255],
        "2008_000002": [3, 255],  # the official mask, not SBD's
        "2008_000004": [4],
        "2008_000005": [5],
    }
    assert all(Image.open(path).mode == "L" for path in (out / "SegmentationClassAug").glob("*.png"))
    assert len(list((out / "JPEGImages").glob("*.jpg"))) == 6


def test_voc_from_archives_is_complete_and_repeatable(voc_archives: Path, tmp_path: Path) -> None:
    out = tmp_path / "voc"
    assert run("voc", voc_archives, out, VOC_COUNTS) == 0
    assert_voc(out)
    before = state(out)
    assert not [name for name in before if name.endswith(".tmp")]
    assert run("voc", voc_archives, out, VOC_COUNTS) == 0
    assert state(out) == before  # nothing written again
    missing = ["JPEGImages/2008_000004.jpg", "SegmentationClassAug/2008_000005.png"]
    for name in missing:  # as after an interruption
        (out / name).unlink()
    with pytest.raises(UserError, match=r"no image for '2008_000004'"):
        run("voc", voc_archives, out, VOC_COUNTS, "--check")
    assert run("voc", voc_archives, out, VOC_COUNTS) == 0
    after = state(out)
    assert {name for name in after if after[name] != before[name]} == set(missing)
    assert {name: digest for name, (_, digest) in after.items()} == {
        name: digest for name, (_, digest) in before.items()
    }


def test_voc_from_unpacked_folders_and_in_place(tmp_path: Path) -> None:
    official, extended = voc_files()
    unpack(tmp_path, official)
    unpack(tmp_path, extended)
    out = tmp_path / "elsewhere"
    assert run("voc", tmp_path, out, VOC_COUNTS) == 0
    assert_voc(out)
    photo = "JPEGImages/2008_000001.jpg"
    assert (out / photo).read_bytes() == (tmp_path / "VOCdevkit/VOC2012" / photo).read_bytes()
    assert run("voc", tmp_path, tmp_path / "VOCdevkit/VOC2012", VOC_COUNTS) == 0
    assert_voc(tmp_path / "VOCdevkit/VOC2012")


def test_wrong_counts_and_values_are_reported(
    voc_archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "voc"
    assert run("voc", voc_archives, out, {**VOC_COUNTS, "train_aug": 10582}) == 1
    assert "train_aug.txt: 4 photos instead of 10582" in capsys.readouterr().out
    (out / "SegmentationClassAug/2008_000004.png").write_bytes(png(full(77)))
    assert run("voc", voc_archives, out, VOC_COUNTS, "--check") == 1
    assert "label value 77" in capsys.readouterr().out
    assert main(["prepare", "voc", "--out", str(out), "--check"]) == 1  # against the official numbers
    assert "2 photos instead of 1464" in capsys.readouterr().out


def test_official_numbers() -> None:
    assert voc.EXPECTED == {"train": (1464,), "val": (1449,), "train_aug": (10582,)}
    assert (cityscapes.EXPECTED["train"], cityscapes.EXPECTED["val"]) == ((2975,), (500,))
    assert coco.EXPECTED == {"train": (118287,), "val": (5000,)}
    assert 4996 in pascal_context.EXPECTED["train"]


def test_genuine_voc_slice(shared_data: Path, tmp_path: Path) -> None:
    home = shared_data / "voc_slice/VOCdevkit/VOC2012"
    lists = {name: read_ids(home / f"ImageSets/Segmentation/{name}.txt") for name in VOC_COUNTS}
    for name in {*lists["train_aug"], *lists["val"]} - set(lists["train"]):  # val too: it must be left out
        kind = "SegmentationClassAug"
        data = mat(GTcls={"Segmentation": read_index_mask(home / kind / f"{name}.png")})
        unpack(tmp_path, {f"benchmark_RELEASE/dataset/cls/{name}.mat": data})
    os.symlink(home.parent, tmp_path / "VOCdevkit")
    out = tmp_path / "out"
    assert run("voc", tmp_path, out, {name: len(ids) for name, ids in lists.items()}) == 0
    assert read_ids(out / "ImageSets/Segmentation/train_aug.txt") == sorted(lists["train_aug"])
    for name in lists["train_aug"]:
        ours = read_index_mask(out / f"SegmentationClassAug/{name}.png")
        assert np.array_equal(ours, read_index_mask(home / f"SegmentationClassAug/{name}.png"))
    assert not (out / f"SegmentationClassAug/{lists['val'][0]}.png").exists()


def test_damaged_sbd_masks_are_named() -> None:
    with pytest.raises(UserError, match=r"a\.mat: not an SBD mask"):
        voc.sbd_mask(b"nonsense", "a.mat")
    with pytest.raises(UserError, match=r"a\.mat: not an SBD mask \(values beyond"):
        voc.sbd_mask(mat(GTcls={"Segmentation": full(40)}), "a.mat")


# archives


@pytest.mark.parametrize(
    "name", ["../escaped.jpg", "/escaped.jpg", "JPEGImages/../../escaped.jpg", "C:/escaped.jpg"]
)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives_cannot_write_outside(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    write = write_zip if kind == "zip" else write_tar
    write(path, {"JPEGImages/good.jpg": b"1", name: b"2"})
    with pytest.raises(UserError, match="a place outside of the archive"):
        archives.place(Source(path), tmp_path / "out", lambda found: found, "photos")
    assert not list(tmp_path.rglob("escaped.jpg"))


def test_files_of_a_source_are_counted_for_the_time_left(tmp_path: Path) -> None:
    files = {f"JPEGImages/{i}.jpg": b"1" for i in range(5)} | {"notes/readme.txt": b"2"}
    wanted = archives.by_pattern(r"(JPEGImages/\d+\.jpg)", r"\1")
    unpack(tmp_path / "folder", files)
    write_zip(tmp_path / "a.zip", files)
    write_tar(tmp_path / "a.tar", files)
    write_tar(tmp_path / "a.tgz", files, "w:gz")
    (tmp_path / "b.zip").write_bytes(b"PK damaged")
    for name, count in (("folder", 5), ("a.zip", 5), ("a.tar", 5), ("a.tgz", None), ("b.zip", None)):
        source = Source(tmp_path / name)
        assert source.count(wanted) == count
        if name != "b.zip":
            assert len(list(source.files(wanted))) == 5


def test_links_in_archives_are_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("JPEGImages/x.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    assert archives.place(Source(path), tmp_path / "out", lambda name: name, "photos") == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["zip", "tgz"])
def test_damaged_archives_are_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    files = {f"JPEGImages/{k}.jpg": np.random.default_rng(k).bytes(5000) for k in range(5)}
    write_zip(path, files) if kind == "zip" else write_tar(path, files, "w:gz")
    data = bytearray(path.read_bytes())
    data[6000:6010] = bytes(10)
    path.write_bytes(data if kind == "zip" else data[: len(data) // 2])
    with pytest.raises(UserError, match=rf"a\.{kind}: damaged archive"):
        archives.place(Source(path), tmp_path / "out", lambda name: name, "photos")
    assert not [found for found in (tmp_path / "out").rglob("*") if found.name.endswith(".tmp")]


def test_missing_sources_say_what_to_get(tmp_path: Path) -> None:
    for dataset, text in {
        "voc": r"holds no VOC 2012: .*VOCtrainval_11-May-2012\.tar; give --download",
        "cityscapes": r"sign up at https://www\.cityscapes-dataset\.com",
        "coco": r"annotations_trainval2017\.zip",
        "pascal_context": r"trainval_merged\.json",
    }.items():
        with pytest.raises(UserError, match=text):
            main(["prepare", dataset, "--source", str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match=r"--source .*nowhere: no such folder"):
        main(["prepare", "voc", "--source", str(tmp_path / "nowhere"), "--out", str(tmp_path)])
    with pytest.raises(UserError, match="--source: missing"):
        main(["prepare", "voc", "--out", str(tmp_path)])
    with pytest.raises(UserError, match="Cityscapes cannot be downloaded for you"):
        main(["prepare", "cityscapes", "--source", str(tmp_path), "--out", str(tmp_path), "--download"])


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    import functools
    import http.server
    import threading

    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            return None

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as http_server:
        threading.Thread(target=http_server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{http_server.server_port}", folder
        http_server.shutdown()


def test_downloads_are_verified(
    server: tuple[str, Path], voc_archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, served = server
    files = []
    for path in voc_archives.iterdir():
        (served / path.name).write_bytes(path.read_bytes())
        files.append(Download(f"{base}/{path.name}", path.name, hashlib.md5(path.read_bytes()).hexdigest()))
    monkeypatch.setattr(voc, "downloads", lambda: files)
    source = tmp_path / "downloaded"
    assert run("voc", source, tmp_path / "voc", VOC_COUNTS, "--download") == 0
    assert_voc(tmp_path / "voc")
    for path in served.iterdir():
        path.unlink()
    download_files(files, source)  # all there: no request
    with pytest.raises(UserError, match=r"download failed .* or put x\.zip into"):
        download_files([Download(f"{base}/x.zip", "x.zip", "0" * 32)], source)
    (served / "x.zip").write_bytes(b"something else")
    with pytest.raises(UserError, match="download failed"):
        download_files([Download(f"{base}/x.zip", "x.zip", "0" * 32)], source)


def test_official_downloads_have_checksums() -> None:
    for file in (*voc.downloads(), *coco.DOWNLOADS, *ade20k.DOWNLOADS):
        assert len(file.md5) == 32
        assert file.url.endswith(file.name)


# Cityscapes


def test_cityscapes_from_zip_files(tmp_path: Path) -> None:
    label = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 34
    photos, masks = {}, {}
    for part, city, k in (
        ("train", "ulm", 0),
        ("train", "aachen", 1),
        ("val", "munster", 2),
        ("test", "bonn", 3),
    ):
        name = f"{part}/{city}/{city}_00000{k}_000019"
        photos[f"leftImg8bit/{name}_leftImg8bit.png"] = png(full(k))
        masks[f"gtFine/{name}_gtFine_labelIds.png"] = png(label)
        masks[f"gtFine/{name}_gtFine_polygons.json"] = b"{}"
    write_zip(tmp_path / "leftImg8bit_trainvaltest.zip", {**photos, "README": b"", "license.txt": b""})
    write_zip(tmp_path / "gtFine_trainvaltest.zip", masks)
    out = tmp_path / "out"
    counts = {"train": 2, "val": 1, "test": 1}
    assert run("cityscapes", tmp_path, out, counts) == 0
    assert (out / "train.txt").read_text().splitlines() == [
        "leftImg8bit/train/aachen/aachen_000001_000019_leftImg8bit.png",
        "leftImg8bit/train/ulm/ulm_000000_000019_leftImg8bit.png",
    ]
    train_ids = read_index_mask(out / "gtFine/train/ulm/ulm_000000_000019_gtFine_labelTrainIds.png")
    assert (train_ids[label == 7] == 0).all()
    assert (train_ids[label == 33] == 18).all()
    assert (train_ids[label == 0] == 255).all()
    assert not list(out.glob("gtFine/test/*/*"))
    assert not list(out.rglob("*.json"))
    before = state(out)
    assert run("cityscapes", tmp_path, out, counts) == 0
    assert state(out) == before
    spec = load_spec("cityscapes", out)
    assert [item.label.name for item in spec.read_list(out / "val.txt") if item.label] == [
        "munster_000002_000019_gtFine_labelTrainIds.png"
    ]


def test_cityscapes_check_compares_with_the_label_ids(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "train/ulm/ulm_000000_000019"
    unpack(
        tmp_path,
        {
            f"leftImg8bit/{name}_leftImg8bit.png": png(full(1)),
            f"gtFine/{name}_gtFine_labelIds.png": png(full(7)),
            f"gtFine/{name}_gtFine_labelTrainIds.png": png(full(7)),  # not converted
            "leftImg8bit/val/bonn/bonn_000000_000019_leftImg8bit.png": png(full(1)),
            "gtFine/val/bonn/bonn_000000_000019_gtFine_labelIds.png": png(full(7)),
        },
    )
    assert run("cityscapes", tmp_path, tmp_path, {"train": 1, "val": 1, "test": 0}) == 1
    assert "does not follow from ulm_000000_000019_gtFine_labelIds.png" in capsys.readouterr().out


def test_genuine_cityscapes_slice(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "cityscapes_slice"
    photo = by_pattern(r"(leftImg8bit/.+\.png)", r"\1")
    files = {found.name: found.read() for found in Source(source).files(photo)}
    name = "aachen_000000_000019"
    label = next(source.glob(f"gtFine/train/aachen/{name}_gtFine_labelIds.png"))
    files[f"leftImg8bit/val/aachen/{name}_leftImg8bit.png"] = next(iter(files.values()))
    unpack(tmp_path, files)
    for part in ("train", "val"):
        for path in source.glob("gtFine/train/aachen/*_labelIds.png"):
            unpack(tmp_path, {f"gtFine/{part}/aachen/{path.name}": path.read_bytes()})
    assert run("cityscapes", tmp_path, tmp_path, {"train": 2, "val": 1, "test": 0}) == 0
    raw = np.array(Image.open(label))
    ours = np.array(Image.open(tmp_path / f"gtFine/train/aachen/{name}_gtFine_labelTrainIds.png"))
    table = np.full(256, 255)
    table[[7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]] = range(19)
    assert np.array_equal(ours, table[raw])


# COCO

POLYGON = [
    10.75,
    16.74,
    14.07,
    1.95,
    3.6,
    16.22,
    -2.88,
    15.07,
    14.54,
    7.29,
    3.67,
    3.13,
    2.61,
    6.79,
    8.1,
    9.18,
    18.9,
    14.44,
]
POLYGON_PIXELS = [
    "................",
    "................",
    "................",
    "...##........#..",
    "...####.....#...",
    "...#######.##...",
    "...########.....",
    "....######...#..",
    ".......##...#...",
    "........####....",
    ".......#...#....",
    ".....##.....#...",
]
POLYGON_PACKED = "W14810OKM13OM23LM541NJN70J050L120MO001000i0"


def test_polygons_are_filled_as_by_pycocotools() -> None:
    # recorded with pycocotools 2.0.11: a star that crosses itself and leaves the photo of 16x12
    expected = np.array([[pixel == "#" for pixel in row] for row in POLYGON_PIXELS])
    assert np.array_equal(decode_segmentation([POLYGON], 12, 16, "a"), expected)
    packed = {"size": [12, 16], "counts": POLYGON_PACKED}
    assert np.array_equal(decode_segmentation(packed, 12, 16, "a"), expected)
    plain = {"size": [12, 16], "counts": unpack_counts(POLYGON_PACKED.encode()).tolist()}
    assert np.array_equal(decode_segmentation(plain, 12, 16, "a"), expected)


def test_several_polygons_are_united_and_rectangles_are_half_open() -> None:
    region = decode_segmentation([[2, 1, 6, 1, 6, 4, 2, 4], [0, 0, 1, 0, 1, 1, 0, 1]], 6, 8, "a")
    expected = np.zeros((6, 8), dtype=bool)
    expected[1:4, 2:6] = True
    expected[0, 0] = True
    assert np.array_equal(region, expected)


@pytest.mark.parametrize(
    "segmentation",
    [
        [[1, 2, 3, 4]],
        {"size": [9, 9], "counts": [81]},
        {"size": [6, 8], "counts": [40]},
        {"size": [6, 8], "counts": [50, -2]},
    ],
)
def test_broken_regions_are_refused(segmentation: Any) -> None:
    with pytest.raises(UserError, match=r"^annotation 5: "):
        decode_segmentation(segmentation, 6, 8, "annotation 5")


def test_genuine_coco_run_lengths_and_class_order(shared_data: Path) -> None:
    folder = shared_data / "coco_panoptic_slice/annotations"
    content = json.loads((folder / "panoptic_val2017_detection_format.json").read_text())
    panoptic = json.loads((folder / "panoptic_val2017.json").read_text())
    rgb = np.array(Image.open(folder / "panoptic_val2017/000000439180.png").convert("RGB")).astype(np.int64)
    segment_ids = rgb @ np.array([1, 256, 65536])
    height, width = segment_ids.shape
    (image,) = panoptic["annotations"]
    expected = np.zeros((height, width), dtype=np.int64)
    index = coco.class_index(panoptic["categories"])
    assert list(index.values()) == list(range(1, len(index) + 1))
    for segment in image["segments_info"]:
        expected[segment_ids == segment["id"]] = index[segment["category_id"]]
    mask = coco.semantic_mask(content["annotations"], height, width, index)
    assert np.array_equal(mask, expected)
    for annotation in content["annotations"]:
        region = decode_segmentation(annotation["segmentation"], height, width, "a")
        assert abs(int(region.sum()) - annotation["area"]) <= 1


def coco_files() -> dict[str, bytes]:
    """Two training photos and one for validation; categories with gaps; a crowd, a small object upon a large one."""
    categories = [
        {"id": number} for number in range(1, 91) if number not in {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    ]
    crowd = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}

    def annotation(
        number: int, image: int, category: int, segmentation: Any, area: float, iscrowd: int = 0
    ) -> Any:
        return {
            "id": number,
            "image_id": image,
            "category_id": category,
            "segmentation": segmentation,
            "area": area,
            "iscrowd": iscrowd,
        }

    train = {
        "categories": list(reversed(categories)),
        "images": [{"id": k, "height": HEIGHT, "width": WIDTH} for k in (25, 9)],
        "annotations": [
            annotation(1, 9, 90, [[2, 1, 4, 1, 4, 3, 2, 3]], 4),  # small, listed first
            annotation(2, 9, 13, [[0, 0, 6, 0, 6, 5, 0, 5]], 30),
            annotation(3, 9, 1, crowd, 1, iscrowd=1),
        ],
    }
    val = {**train, "images": [{"id": 139, "height": HEIGHT, "width": WIDTH}], "annotations": []}
    return {
        "annotations/instances_train2017.json": json.dumps(train).encode(),
        "annotations/instances_val2017.json": json.dumps(val).encode(),
        "train2017/000000000009.jpg": jpeg(9),
        "train2017/000000000025.jpg": jpeg(25),
        "val2017/000000000139.jpg": jpeg(139),
    }


@pytest.mark.parametrize("packed", [True, False])
def test_coco(tmp_path: Path, packed: bool) -> None:
    files = coco_files()
    if packed:
        for archive, start in {
            "annotations_trainval2017.zip": "annotations",
            "train2017.zip": "train2017",
            "val2017.zip": "val2017",
        }.items():
            write_zip(
                tmp_path / archive, {name: data for name, data in files.items() if name.startswith(start)}
            )
    else:
        unpack(tmp_path, files)
    out = tmp_path / "out"
    assert run("coco", tmp_path, out, {"train": 2, "val": 1}) == 0
    mask = read_index_mask(out / "masks/000000000009.png")
    expected = full(1)  # the crowd lies beneath
    expected[0:5, 0:6] = 12  # id 13 is the twelfth class: 12 does not exist
    expected[1:3, 2:4] = 80
    assert np.array_equal(mask, expected)
    assert not read_index_mask(out / "masks/000000000025.png").any()  # a photo without objects
    assert (out / "train.txt").read_text() == (
        "train2017/000000000009.jpg masks/000000000009.png\ntrain2017/000000000025.jpg masks/000000000025.png\n"
    )
    before = state(out)
    assert run("coco", tmp_path, out, {"train": 2, "val": 1}) == 0
    assert state(out) == before
    assert len(load_spec("coco", out).read_list(out / "val.txt", labels=True)) == 1


@pytest.mark.parametrize("packed", [True, False])
def test_ade20k(tmp_path: Path, packed: bool) -> None:
    """Numbers of the official masks become one lower, 0 becomes 255; the official folder itself is no target."""
    official = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 151
    files = {}
    for part, name in (("training", "ADE_train_00000002"), ("validation", "ADE_val_00000001")):
        files[f"ADEChallengeData2016/images/{part}/{name}.jpg"] = jpeg(2)
        files[f"ADEChallengeData2016/annotations/{part}/{name}.png"] = png(official)
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    if packed:
        write_zip(source / "ADEChallengeData2016.zip", files)
    else:
        unpack(source, files)
    assert run("ade20k", source, out, {"train": 1, "val": 1}) == 0
    mask = read_index_mask(out / "annotations/training/ADE_train_00000002.png")
    assert np.array_equal(mask, np.where(official == 0, 255, official - 1))
    item = "images/{0}/{1}.jpg annotations/{0}/{1}.png\n"
    assert (out / "train.txt").read_text() == item.format("training", "ADE_train_00000002")
    before = state(out)
    assert run("ade20k", source, out, {"train": 1, "val": 1}) == 0
    assert state(out) == before
    assert load_spec("ade20k", out).read_list("val")[0].id == "ADE_val_00000001"
    if not packed:
        with pytest.raises(UserError, match="choose another folder"):
            run("ade20k", source, source / "ADEChallengeData2016", {"train": 1, "val": 1})


def test_coco_has_80_classes_in_order() -> None:
    index = coco.class_index(json.loads(coco_files()["annotations/instances_val2017.json"])["categories"])
    names = load_spec("coco").classes
    assert len(index) == 80
    assert (names[index[1]], names[index[13]], names[index[90]]) == ("person", "stop sign", "toothbrush")


# PASCAL-Context


def context_photos() -> dict[str, bytes]:
    home = "VOCdevkit/VOC2010"
    files = {f"{home}/JPEGImages/2008_00000{k}.jpg": jpeg(k) for k in range(1, 5)}
    for name, members in {"train": (2, 1), "val": (3, 4)}.items():
        files[f"{home}/ImageSets/Main/{name}.txt"] = "".join(f"2008_00000{k}\n" for k in members).encode()
    return files


def test_context_from_pascal_in_detail(tmp_path: Path) -> None:
    write_tar(tmp_path / "VOCtrainval_03-May-2010.tar", context_photos())

    def region(number: int, image: int, category: int, counts: list[int]) -> dict[str, Any]:
        size = [HEIGHT, WIDTH]
        return {
            "id": number,
            "image_id": image,
            "category_id": category,
            "segmentation": {"size": size, "counts": counts},
        }

    images = [
        {"image_id": k, "file_name": f"2008_00000{k}.jpg", "phase": phase, "height": HEIGHT, "width": WIDTH}
        for k, phase in ((2, "train"), (3, "val"), (1, "train"))
    ]
    half = [0, 24, 24]
    detail = {
        "images": images,
        "annos_segmentation": [region(1, 2, 458, half), region(2, 2, 2, [0, 6, 42]), region(3, 3, 9, half)],
    }
    (tmp_path / "trainval_merged.json").write_text(json.dumps(detail))
    out = tmp_path / "out"
    assert run("pascal_context", tmp_path, out, {"train": 2, "val": 1}) == 0
    assert read_ids(out / "train.txt") == ["2008_000002", "2008_000001"]  # the annotation's order
    expected = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    expected[:, :4] = 59
    expected[:, 0] = 1
    assert np.array_equal(read_index_mask(out / "SegmentationClassContext/2008_000002.png"), expected)
    assert not (out / "JPEGImages/2008_000004.jpg").exists()
    detail["annos_segmentation"].append(region(4, 1, 3, half))
    (tmp_path / "trainval_merged.json").write_text(json.dumps(detail))
    with pytest.raises(UserError, match=r"2008_000001\.jpg: original id 3 is none of the 60"):
        run("pascal_context", tmp_path, tmp_path / "again", {"train": 2, "val": 1})


@pytest.mark.parametrize("packed", [True, False])
def test_context_from_the_original_masks(tmp_path: Path, packed: bool) -> None:
    ids = np.zeros((HEIGHT, WIDTH), dtype=np.uint16)
    ids[0], ids[1], ids[2] = 458, 459, 19
    masks = {f"trainval/2008_00000{k}.mat": mat(LabelMap=ids) for k in (1, 2, 3)}
    unpack(tmp_path, context_photos())
    if packed:
        write_tar(tmp_path / "trainval.tar.gz", masks, "w:gz")
    else:
        unpack(tmp_path, masks)
    out = tmp_path / "out"
    assert run("pascal_context", tmp_path, out, {"train": 2, "val": 1}) == 0
    assert read_ids(out / "train.txt") == ["2008_000002", "2008_000001"]
    mask = read_index_mask(out / "SegmentationClassContext/2008_000003.png")
    assert mask[:, 0].tolist() == [59, 0, 4, 0, 0, 0]  # 459 is not among the 60
    names = load_spec("pascal_context").classes
    assert (names[59], names[4], names[0]) == ("wood", "bedclothes", "background")


def test_context_classes_are_positions_among_the_ids_in_use() -> None:
    ids = np.array(pascal_context.CONTEXT_IDS)
    assert pascal_context.to_classes(ids, rest_is_background=False, where="").tolist() == list(range(60))


@pytest.mark.parametrize("function", [pascal_context.mat_mask, voc.sbd_mask])
def test_mat_files_of_another_kind(function: Callable[[bytes, str], Any]) -> None:
    with pytest.raises(UserError, match=r"x\.mat: not a"):
        function(mat(other=full(1)), "x.mat")
