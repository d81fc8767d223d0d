"""Text files of image-level class flags, as the authors ship them for the image-level branch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.data.lists import read_text
from common.errors import UserError


def read_flags(
    path: Path, columns: int | None = None, rows: Sequence[int] | None = None, total: int | None = None
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Image-level class flags, one row per image: uint8 (N, C) of 0 and 1, as MLMT's `*_label.txt` hold them.

    Row i belongs to image i of the list beside it; the 20 object classes come first, background last.

    Args:
        path: The file, blank-separated flags in each line.
        columns: The expected number of flags per row; None takes that of the first row.
        rows: Numbers (from 0) of the wanted rows, which the result has in this order; the others are counted but not
            looked into. None takes all.
        total: The expected number of rows; None takes any but 0.

    Raises:
        UserError: Another number of rows, a wanted row that the file lacks, one with another number of flags, or a
            value other than 0 and 1.
    """
    lines = [
        (number, line.split()) for number, line in enumerate(read_text(path).splitlines(), 1) if line.strip()
    ]
    if not lines:
        raise UserError(f"{path}: no rows; expected one row of 0/1 flags per image")
    if total is not None and len(lines) != total:
        raise UserError(
            f"{path}: {len(lines)} rows for a list of {total} images; use the list and the file that belong together"
        )
    flags: list[list[int]] = []
    for row in range(len(lines)) if rows is None else rows:
        if not 0 <= row < len(lines):
            raise UserError(f"{path}: {len(lines)} rows, but row {row + 1} is wanted; get the file again")
        number, fields = lines[row]
        columns = columns or len(fields)
        if len(fields) != columns:
            raise UserError(f"{path}:{number}: {len(fields)} flags instead of {columns}; one row per image")
        if not set(fields) <= {"0", "1"}:
            wrong = next(field for field in fields if field not in {"0", "1"})
            raise UserError(f"{path}:{number}: '{wrong}' is not a flag; rows hold 0 and 1 only")
        flags.append([int(field) for field in fields])
    return np.array(flags, dtype=np.uint8)
