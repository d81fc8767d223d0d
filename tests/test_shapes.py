from __future__ import annotations

import hashlib
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from common.data.dataset_yaml import load_spec
from common.data.files import write_bytes
from splits import shapes_images as shapes
from tools import pretrain_shapes
from tools.pictures import save_palette_png
from tools.pretrain_shapes import PRETRAIN

# sha256 of image bytes + label bytes: any change of a single grey level on any platform shows
DIGESTS = {
    ("render", 0, 0, 64): "69a1bab5c835b0bb4ef0aa613fcceeab547f992bb7438f5be3c8e4967283c59b",
    ("render", 499, 3, 64): "b61f5c7ef60f5f0f3c8b8397e53afc7a2ccefa5e4f1c338d991a1df2888a60df",
    ("render", 7, 0, 96): "015d9218684bdc2ee7e3971654b585883092a4c32b2422c980d1b9511f23901e",
    ("render_pretrain", 12, 0, 64): "9dc1d2c6708078ac04098ec23ce2fd71d0e3a22ccbf5455df0d06b291e91da3c",
}


def digest(image: np.ndarray, label: np.ndarray) -> str:
    return hashlib.sha256(image.tobytes() + label.tobytes()).hexdigest()


@pytest.mark.parametrize("key", DIGESTS, ids=str)
def test_bytes_are_the_same_everywhere(key: tuple[str, int, int, int]) -> None:
    pretrain = key[0] == "render_pretrain"
    image, label = shapes.render_family(PRETRAIN, *key[1:]) if pretrain else shapes.render(*key[1:])
    assert (image.shape, image.dtype) == ((key[3], key[3], 3), np.uint8)
    assert (label.shape, label.dtype) == ((key[3], key[3]), np.uint8)
    assert digest(image, label) == DIGESTS[key]


def test_vector_and_scalar_draws_are_one_sequence() -> None:
    one, other = shapes._Stream(5, 7), shapes._Stream(5, 7)
    expected = b"".join(other.next().to_bytes(8, "little") for _ in range(3))
    assert one.bytes(20).tobytes() == expected[:20]
    assert one.next() == other.next()


def test_images_differ_by_index_seed_and_family() -> None:
    digests = {
        digest(*shapes.render(0)),
        digest(*shapes.render(1)),
        digest(*shapes.render(0, seed=1)),
        digest(*pretrain_shapes.render(0)),
    }
    assert len(digests) == 4


def test_a_caller_may_change_what_it_gets() -> None:
    image, label = shapes.render(3)
    before = digest(image, label)
    image[:], label[:] = 0, 0
    assert digest(*shapes.render(3)) == before


@pytest.mark.parametrize(
    ("render", "classes"),
    [(shapes.render, shapes.CLASSES), (pretrain_shapes.render, pretrain_shapes.CLASSES)],
)
def test_every_class_is_frequent_and_no_label_lies_outside(render, classes) -> None:
    labels = np.stack([render(index)[1] for index in range(60)])
    share = np.bincount(labels.ravel(), minlength=len(classes)) / labels.size
    assert len(share) == len(classes)
    assert share[1:].min() > 0.02
    assert 0.3 < share[0] < 0.7


def test_families_share_neither_names_silhouettes_nor_patterns() -> None:
    assert set(shapes.CLASSES) & set(pretrain_shapes.CLASSES) == {"background"}
    for part in ("patterns", "silhouettes"):
        assert not set(getattr(shapes.SHAPES, part)) & set(getattr(PRETRAIN, part))
    assert len({silhouette for _, silhouette in (*shapes.SHAPES.silhouettes, *PRETRAIN.silhouettes)}) == 12


def test_lists_are_disjoint_and_of_the_stated_sizes() -> None:
    assert {name: len(indices) for name, indices in shapes.RANGES.items()} == {
        "train": 400,
        "val": 100,
        "test": 200,
    }
    assert len(set().union(*shapes.RANGES.values())) == 700
    assert len(shapes.PALETTE) == len(shapes.CLASSES)


def test_silhouettes_look_as_they_are_called() -> None:
    v, u = np.mgrid[-1024:1025:8, -1024:1025:8].astype(np.int32)
    area = {name: inside(u, v).mean() for name, inside in shapes.SHAPES.silhouettes + PRETRAIN.silhouettes}
    assert area["disc"] == pytest.approx(np.pi / 4, abs=0.03)
    assert area["ring"] == pytest.approx(np.pi / 4 * (1 - (500 / 1024) ** 2), abs=0.03)
    assert area["square"] == pytest.approx((840 / 1024) ** 2, abs=0.05)
    inside = dict(shapes.SHAPES.silhouettes + PRETRAIN.silhouettes)
    centre = np.zeros(1, np.int32)
    assert [name for name, f in inside.items() if not f(centre, centre)[0]] == [
        "ring",
        "corner",
        "crescent",
        "arch",
    ]


def test_difficulty_changes_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as changed:
        changed.setattr(shapes, "NOISE", 0)
        changed.setattr(shapes, "CLUTTER", 0)
        image, label = shapes.render_family(shapes.SHAPES, 0)
    assert digest(image, label) != digest(*shapes.render(0))
    background = image[label == 0].astype(int)
    assert np.abs(np.diff(background, axis=0)).mean() < 12  # soft without noise


def test_rendering_is_fast() -> None:
    start = time.process_time()
    for index in range(10_000, 10_100):
        shapes.render(index)
    assert (time.process_time() - start) / 100 < 0.01  # about 1 ms; ten times that on a slow machine


def write(folder: Path) -> None:
    """The dataset below `folder` as files: images, label maps, lists and the `dataset.yaml` naming them."""
    for name, indices in shapes.RANGES.items():
        for index in indices:
            image, label = shapes.render(index)
            _, encoded = cv2.imencode(".png", image[..., ::-1])
            write_bytes(folder / "images" / f"{index:06d}.png", encoded.tobytes())
            save_palette_png(folder / "labels" / f"{index:06d}.png", label, shapes.PALETTE)
        write_bytes(folder / f"{name}.txt", "".join(f"{index:06d}\n" for index in indices).encode())
    description = {
        "name": "shapes_files",
        "root": ".",
        "images": "images/{id}.png",
        "labels": "labels/{id}.png",
        "classes": list(shapes.CLASSES),
        "palette": shapes.PALETTE.tolist(),
        "lists": {name: f"{name}.txt" for name in shapes.RANGES},
    }
    write_bytes(folder / "dataset.yaml", yaml.safe_dump(description, sort_keys=False).encode())


def test_written_files_read_back_as_the_generated_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "RANGES", {"train": range(6), "val": range(400, 402)})
    write(tmp_path / "set")
    spec = load_spec(str(tmp_path / "set" / "dataset.yaml"))
    assert spec.classes == shapes.CLASSES
    assert spec.palette.tolist() == shapes.PALETTE.tolist()
    for name, indices in shapes.RANGES.items():
        items = spec.read_list(name, labels=True)
        assert [int(item.id) for item in items] == list(indices)
        for item in items:
            image, label = shapes.render(int(item.id))
            assert np.array_equal(spec.load_image(item), image)
            assert np.array_equal(spec.load_label(item), label)
