"""What predict.py has written, for the tests of all projects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def written(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def mask(path: Path) -> np.ndarray[Any, Any]:
    """Class ids of a file that has a palette."""
    with Image.open(path) as file:
        assert file.mode == "P"
        return np.array(file)
