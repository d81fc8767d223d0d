"""What predict.py has written, for the tests of all projects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def written(folder: Path) -> list[str]:
    """Files below a folder of predictions, but for the legend that lies in every one."""
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert "classes.csv" in found
    return [name for name in found if name != "classes.csv"]


def mask(path: Path) -> np.ndarray[Any, Any]:
    """Class ids of a file that has a palette."""
    with Image.open(path) as file:
        assert file.mode == "P"
        return np.array(file)
