"""Generated odd and damaged photos, masks and lists: read as a viewer or an editor does, or refused in a line."""

from __future__ import annotations

import io
import random
import unicodedata
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from common.data.dataset_yaml import load_spec
from common.data.files import read_index_mask, read_rgb, remarks
from common.errors import UserError
from tests.test_datasets import pets

KINDS = {  # how each is stored, by ending
    "jpg": ("RGB", "L", "CMYK"),
    "png": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"),
    "tif": ("RGB", "RGBA", "L", "1", "CMYK", "I;16", "F"),
    "webp": ("RGB", "RGBA"),
    "bmp": ("RGB", "L", "1"),
    "gif": ("P",),
}


def stored(rng: random.Random, pixels: Any, ending: str, mode: str) -> bytes:
    """A file of a photo (H, W, 3), with an EXIF orientation where the format has one."""
    grey = np.asarray(Image.fromarray(pixels).convert("L"))
    deep = {"I;16": grey.astype(np.uint16) * 257, "F": grey.astype(np.float32) / 255}
    image = Image.fromarray(deep[mode]) if mode in deep else Image.fromarray(pixels).convert(mode)
    more: dict[str, Any] = {"exif": Image.Exif()} if ending in ("jpg", "png", "tif", "webp") else {}
    for exif in more.values():
        exif[0x0112] = rng.choice([1, 1, *range(10)])
    out = io.BytesIO()
    image.save(out, {"jpg": "jpeg", "tif": "tiff"}.get(ending, ending), **more)
    return out.getvalue()


def damaged(rng: random.Random, data: bytes) -> bytes:
    """The file cut off, with wrong bytes, with another's beginning, or with more behind it."""
    at = rng.randrange(len(data))
    wrong = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        wrong[rng.randrange(len(wrong))] = rng.randrange(256)
    return rng.choice([data[:at], bytes(wrong), b"\xff\xd8\xff" + data[at:], data + b"\0" * at, b""])


def viewed(path: Path) -> Any:
    """RGB (H, W, 3) as a viewer shows it, by Pillow alone."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I") or image.mode == "F":
            scale = 255 if image.mode == "F" else 1 / 257
            grey = np.rint(np.asarray(image).astype(np.float64) * scale).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=2)
        return np.asarray(image.convert("RGB"))


def one_line(error: UserError, path: Path) -> None:
    assert "\n" not in str(error)
    assert str(error).startswith(str(path))


def test_200_odd_or_damaged_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1 << 16)  # damage can ask for gigabytes
    rng, came = random.Random(15), Counter[str]()
    for i in range(200):
        ending = rng.choice(list(KINDS))
        pixels = np.random.default_rng(i).integers(
            0, 256, (rng.randint(1, 9), rng.randint(1, 9), 3), np.uint8
        )
        data = stored(rng, pixels, ending, rng.choice(KINDS[ending]))
        broken = rng.random() < 0.4
        path = tmp_path / f"{i}.{rng.choice([ending, ending.upper(), 'jpg'])}"  # the content says what it is
        path.write_bytes(damaged(rng, data) if broken else data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about damaged metadata
            remarks(path)
            try:
                found = read_rgb(path)
            except UserError as error:
                one_line(error, path)
                came["refused" if broken else f"refused without need: {error}"] += 1
            else:
                assert (found == viewed(path)).all(), (path, broken)
                came["read"] += 1
    assert len(came) == 2
    assert min(came.values()) > 30


def test_100_odd_or_damaged_masks(tmp_path: Path) -> None:
    rng, came = random.Random(16), Counter[str]()
    for i in range(100):
        top, mode = rng.choice([(2, "1"), (256, "L"), (256, "P"), (65536, "I;16")])
        numbers = (
            np.random.default_rng(i).integers(0, top, (5, 7)).astype(np.uint16 if top > 256 else np.uint8)
        )
        image = Image.fromarray(numbers * 255).convert("1") if mode == "1" else Image.fromarray(numbers)
        if mode == "P":
            image.putpalette(list(np.random.default_rng(i).integers(0, 256, 768)))
        out, broken = io.BytesIO(), rng.random() < 0.4
        image.save(out, rng.choice(["png", "tiff"]))
        path = tmp_path / f"{i}.png"
        path.write_bytes(damaged(rng, out.getvalue()) if broken else out.getvalue())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = read_index_mask(path)
            except UserError as error:
                one_line(error, path)
                came["refused" if broken else f"refused without need: {error}"] += 1
            else:
                if not broken:
                    assert (found == numbers).all()
                came["read"] += 1
    assert len(came) == 2
    assert min(came.values()) > 15


def written(rng: random.Random, name: str) -> str:
    """A line that names a photo of `pets`, as one of the ways in which people write it."""
    shown = unicodedata.normalize(rng.choice(["NFC", "NFD"]), name)
    image, mask = f"img/{shown}.jpg", f"mask/{shown}.png"
    line = rng.choice([shown, f"{shown}.jpg", image, f"/{image}", f"{image}\t{mask}", f"{image} {mask}"])
    return rng.choice(["", " "]) + line.replace("/", rng.choice(["/", "\\"])) + rng.choice(["", " ", "\t"])


def test_200_odd_or_damaged_lists(tmp_path: Path) -> None:
    rng, came = random.Random(17), Counter[str]()
    path = pets(tmp_path)
    names = ["a", "IMG 007", "leaf (1)", "Äpfel über", "x.y.z", "7", "b-2_c"]
    for name in names:
        for folder, ending in (("img", "jpg"), ("mask", "png")):
            stands_for = (tmp_path / folder / f"b.{ending}").read_bytes()
            (tmp_path / folder / f"{name}.{ending}").write_bytes(stands_for)
    listed = tmp_path / "train.txt"
    for _ in range(200):
        chosen = rng.sample(names, rng.randint(1, len(names)))
        lines = [written(rng, name) for name in chosen]
        broken = rng.random() < 0.3
        if broken:
            lines.insert(
                rng.randint(0, len(lines)),
                rng.choice(["nowhere", "img/none.jpg", "a\tb\tc", "img/a.jpg\tmask/none.png", "../img/zz"]),
            )
        text = (
            rng.choice(["", "\ufeff"])
            + rng.choice(["\n", "\r\n", "\r", "\n\n"]).join(lines)
            + rng.choice(["", "\n"])
        )
        listed.write_bytes(text.encode())
        try:
            items = load_spec(path).read_list("train", labels=True)
        except UserError as error:
            one_line(error, listed)
            came["refused" if broken else f"refused without need: {error}"] += 1
        else:
            assert not broken, text
            assert [item.image.name for item in items] == [f"{name}.jpg" for name in chosen], text
            assert [item.label and item.label.name for item in items] == [f"{name}.png" for name in chosen]
            came["read"] += 1
    assert len(came) == 2
    assert min(came.values()) > 40
