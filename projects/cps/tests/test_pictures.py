"""Colours and file names of the original and the port."""

from __future__ import annotations

import numpy as np
import pytest

from common.data.files import voc_colormap
from common.errors import UserError
from projects.cps.compat.pictures import (
    LEGACY_VOC_PALETTE,
    port_overlay,
    port_palette,
)
from splits.pictures import colorize


def test_the_legacy_palette_draws_background_as_aeroplane() -> None:
    label = np.array([[0, 1, 19, 20]], dtype=np.uint8)
    legacy = colorize(label, LEGACY_VOC_PALETTE, fill=(0, 0, 0))
    right = colorize(label, voc_colormap(21))
    assert legacy[0, 0].tolist() == [128, 0, 0] == right[0, 1].tolist()
    assert right[0, 0].tolist() == [0, 0, 0]
    assert legacy[0, 2].tolist() == right[0, 3].tolist()
    assert legacy[0, 3].tolist() == [0, 0, 0]  # the table is one colour short


def test_the_ports_palette_lacks_the_first_colour_and_takes_custom_ones() -> None:
    palette = port_palette()
    assert palette.shape == (256, 3)
    assert np.array_equal(palette[:255], voc_colormap(256)[1:])
    assert palette[:2].tolist() == [[128, 0, 0], [0, 128, 0]]
    custom = port_palette([10, 20, 30, 0, 255, 7])
    assert custom[:2].tolist() == [[10, 20, 30], [0, 255, 7]]
    assert np.array_equal(custom[2:], palette[2:])


@pytest.mark.parametrize("custom", [[1, 2], [1, 2, 256], [-1, 0, 0], [0] * 771])
def test_custom_colours_must_be_triples(custom: list[int]) -> None:
    with pytest.raises(UserError, match=r"--custom_color: .*give red, green and blue in 0..255"):
        port_palette(custom)


def test_the_overlay_is_six_tenths_image() -> None:
    image = np.full((1, 2, 3), 100, dtype=np.uint8)
    palette = port_palette([0, 255, 11])
    blended = port_overlay(image, np.array([[0, 1]], dtype=np.uint8), palette)
    assert blended.tolist() == [[[60, 162, 64], [60, 111, 60]]]
