"""Palettes, overlays, palette PNG files and panels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.dataset_yaml import load_spec
from common.data.files import voc_colormap
from common.errors import UserError
from splits.pictures import BLACK, colorize, full_palette, panel, save_picture
from tools.pictures import heatmap, overlay, save_palette_png


def test_voc_colours():
    colors = voc_colormap()
    assert colors.shape == (256, 3)
    known = {
        0: (0, 0, 0),
        1: (128, 0, 0),
        7: (128, 128, 128),
        8: (64, 0, 0),
        15: (192, 128, 128),
        20: (0, 64, 128),
    }
    assert {k: tuple(colors[k].tolist()) for k in known} == known
    assert colors[255].tolist() == [224, 224, 192]
    assert len({tuple(row) for row in colors.tolist()}) == 256


def test_tables_of_the_datasets():
    pascal, city = (load_spec(name).palette for name in ("voc", "cityscapes"))
    assert np.array_equal(pascal, voc_colormap(21))
    assert city[[0, 13, 18]].tolist() == [[128, 64, 128], [0, 0, 142], [119, 11, 32]]
    assert len(city) == 19
    assert full_palette(pascal).shape == full_palette(city).shape == (256, 3)
    assert np.array_equal(full_palette(pascal)[:21], pascal)
    assert (full_palette(pascal)[21:] == 255).all()
    assert not full_palette(city, BLACK)[19:].any()


def test_colorize_marks_ids_beyond_the_palette():
    label = torch.tensor([[0, 1], [2, 255]])
    picture = colorize(label, [(1, 2, 3), (4, 5, 6)], fill=(7, 8, 9))
    assert picture.dtype == np.uint8
    assert picture.tolist() == [[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [7, 8, 9]]]
    assert np.array_equal(colorize(label.numpy().astype(np.uint8), voc_colormap(21), BLACK)[1, 1], [0, 0, 0])
    with pytest.raises(UserError, match=r"ids -1\.\.3"):
        colorize(np.array([[-1, 3]]), voc_colormap(21))


@pytest.mark.parametrize("colors", [np.zeros((257, 3)), np.zeros((4, 4)), [(0, 0, 256)], [(-1, 0, 0)]])
def test_unusable_palettes(colors):
    with pytest.raises(UserError, match="up to 256 rows"):
        full_palette(colors)


def test_overlay_mixes_by_alpha():
    image = np.full((2, 2, 3), 100, dtype=np.uint8)
    mixed = overlay(image, np.array([[0, 1], [1, 255]]), [(0, 0, 0), (200, 50, 255)], alpha=0.4)
    assert mixed.tolist() == [[[60] * 3, [140, 80, 162]], [[140, 80, 162], [162] * 3]]
    assert np.array_equal(overlay(image, np.zeros((2, 2), dtype=int), [(9, 9, 9)], alpha=0.0), image)
    with pytest.raises(UserError, match="differ in size"):
        overlay(image, np.zeros((2, 3), dtype=int), [(0, 0, 0)])


def test_palette_png_holds_ids_and_shows_colours(tmp_path):
    label = np.random.default_rng(0).integers(0, 21, (13, 17))
    label[0, 0] = 255
    path = tmp_path / "new" / "a.png"
    save_palette_png(path, torch.from_numpy(label), voc_colormap(21))
    with Image.open(path) as picture:
        assert picture.mode == "P"
        assert np.array_equal(np.asarray(picture), label)
        assert np.array_equal(np.asarray(picture.convert("RGB")), colorize(label, voc_colormap(21)))


def test_failed_writes_say_where(tmp_path):
    (tmp_path / "file").write_text("")
    picture = np.zeros((2, 2, 3), dtype=np.uint8)
    with pytest.raises(UserError, match=r"a\.png: cannot be written"):
        save_picture(tmp_path / "file" / "a.png", picture)
    with pytest.raises(UserError, match="suffix"):
        save_picture(tmp_path / "a.unknown", picture)


def test_heatmap_brightens_with_the_value():
    values = torch.tensor([[0.0, 0.25, 0.5, 0.75, 1.0, float("nan"), 2.0]])
    picture = heatmap(values)
    brightness = picture[0].astype(int).sum(axis=1).tolist()
    assert brightness[:5] == sorted(brightness[:5])
    assert brightness[0] < brightness[4]
    assert picture[0, 0, 2] > picture[0, 0, 0]  # RGB order: the low end is blue
    assert picture[0, 5].tolist() == [0, 0, 0]
    assert picture[0, 6].tolist() == picture[0, 4].tolist()


def test_panel_puts_pictures_side_by_side():
    a = np.zeros((20, 30, 3), dtype=np.uint8)
    b = np.full((10, 10, 3), 90, dtype=np.uint8)
    joined = panel([a, b])
    assert joined.shape == (32, 6 + 30 + 6 + 20 + 6, 3)
    assert np.array_equal(joined[6:26, 6:36], a)
    assert (joined[6:26, 42:62] == 90).all()
    assert (joined[:, 36:42] == 255).all()
    titled = panel([a, b], ["Größe", "a title that is much too long"])
    assert titled.shape == (48, 68, 3)
    assert np.array_equal(titled[16:], joined[:32])  # the captions stand above
    assert (titled[6:22] < 128).any()
    assert (titled[:22, 62:] == 255).all()
    assert panel([a, b], height=10).shape[0] == 22
