"""Text files of image-level class flags."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from projects.s4gan_mlmt.class_flags import read_flags


def test_flags(tmp_path: Path) -> None:
    path = tmp_path / "train_label.txt"
    path.write_text("0 1 1\n1 0 0")
    flags = read_flags(path, columns=3)
    assert flags.dtype == np.uint8
    assert flags.tolist() == [[0, 1, 1], [1, 0, 0]]
    path.write_text("0 1 1\n1 0\n")
    with pytest.raises(UserError, match=r":2: 2 flags instead of 3"):
        read_flags(path)
    path.write_text("0 2\n")
    with pytest.raises(UserError, match=r":1: '2' is not a flag"):
        read_flags(path)


def test_flags_of_some_images(tmp_path: Path) -> None:
    """The others are counted, but what they hold does not matter."""
    path = tmp_path / "train_label.txt"
    path.write_text("0 1 1\nunread\n1 0 0\n")
    assert read_flags(path, rows=[2, 0, 2], total=3).tolist() == [[1, 0, 0], [0, 1, 1], [1, 0, 0]]
    with pytest.raises(UserError, match=r":2: 1 flags instead of 3"):
        read_flags(path, columns=3, rows=[1])
    with pytest.raises(UserError, match=r"3 rows for a list of 4 images"):
        read_flags(path, rows=[0], total=4)
    with pytest.raises(UserError, match=r"3 rows, but row 4 is wanted"):
        read_flags(path, rows=[3])
    path.write_text("\n")
    with pytest.raises(UserError, match="no rows"):
        read_flags(path, rows=[])
