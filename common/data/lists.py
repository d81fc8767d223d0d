"""List files: one reader for every format the original repositories ship, and the hashes that identify a list.

A line names an image and, in some families, its label: bare ids, paths, two fields separated by a blank or a
tab, paths with a leading slash, any line ending, with or without a final newline. The pickled index
permutations of s4GAN are read by an interpreter of the few instructions they need; nothing in them is executed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.data.safe_pickle import load_plain_pickle
from common.errors import UserError

IMAGE_ENDINGS = frozenset({"jpg", "jpeg", "png", "bmp", "tif", "tiff", "webp"})
CITYSCAPES_SUFFIX = "_leftImg8bit"
MAX_LIST_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Entry:
    """One line of a list: line number from 1, the image field and, if the line has one, the label field."""

    line: int
    image: str
    label: str | None

    @property
    def id(self) -> str:
        """The normalized id, see `normalize_id`."""
        return _field_id(self.image)


def strip_suffix(name: str) -> str:
    """`name` without the ending of an image file (.jpg, .png, ...), in either case; other dots stay."""
    stem, _, ending = name.rpartition(".")
    return stem if stem and ending.lower() in IMAGE_ENDINGS else name


def split_fields(line: str) -> list[str]:
    """Fields of a list line: separated by tabs if it has one, else by blanks.

    A tab allows file names that contain blanks.
    """
    parts = line.strip().split("\t") if "\t" in line.strip() else line.split()
    return [part.strip() for part in parts if part.strip()]


def normalize_id(line: str) -> str:
    """The id of a list line, the same for every way of writing it.

    The first field without folder, without image file ending, without the Cityscapes ending
    `_leftImg8bit`: `leftImg8bit/train/ulm/ulm_000079_000019_leftImg8bit.png` -> `ulm_000079_000019`.
    An empty line gives an empty string.
    """
    fields = split_fields(line)
    return _field_id(fields[0]) if fields else ""


def _field_id(image: str) -> str:
    name = strip_suffix(image.rsplit("/", 1)[-1])
    return name[: -len(CITYSCAPES_SUFFIX)] if name.endswith(CITYSCAPES_SUFFIX) else name


def _text(path: Path) -> str:
    """The decoded text of a list file; `UserError` where it is absent, too large or not text."""
    try:
        if path.stat().st_size > MAX_LIST_BYTES:
            raise UserError(f"{path}: larger than {MAX_LIST_BYTES >> 20} MiB; this is not a list file")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; save the list as UTF-8, one image per line") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path}: list file cannot be read ({reason}); check the path") from None


def parse_entries(text: str, where: str = "list") -> list[Entry]:
    """Entries of a list's text in file order; empty lines are skipped, line numbers count them.

    Args:
        text: The content of a list file, any line ending.
        where: The file's name for error messages.

    Raises:
        UserError: A line has more than two fields.
    """
    entries = []
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), start=1):
        fields = split_fields(line)
        if not fields:
            continue
        if len(fields) > 2:
            raise UserError(
                f"{where}:{number}: {len(fields)} fields; a line is an image or an image and its label, "
                "separated by a blank, or by a tab where names contain blanks"
            )
        entries.append(Entry(number, fields[0], fields[1] if len(fields) == 2 else None))
    return entries


def read_entries(path: Path) -> list[Entry]:
    """Entries of the list file `path` in file order.

    Raises:
        UserError: The file is absent, unreadable, not text, or a line has more than two fields.
    """
    return parse_entries(_text(path), str(path))


def read_ids(path: Path) -> list[str]:
    """Normalized ids of the list file `path` in file order, repetitions kept."""
    return [entry.id for entry in read_entries(path)]


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
        (number, line.split()) for number, line in enumerate(_text(path).splitlines(), 1) if line.strip()
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


def sha256_ids(ids: Iterable[str]) -> str:
    """Hash of a set of ids: sorted by code point, unique, joined by a newline, none at the end."""
    return hashlib.sha256("\n".join(sorted(set(ids))).encode()).hexdigest()


def sha256_order(ids: Iterable[object]) -> str:
    """Hash of ids or indices in the given order, repetitions kept, joined by a newline."""
    return hashlib.sha256("\n".join(map(str, ids)).encode()).hexdigest()


def sha256_bytes(data: bytes) -> str:
    """Hash of a file's content."""
    return hashlib.sha256(data).hexdigest()


def git_blob_id(data: bytes) -> str:
    """The id git gives to a file of this content (sha1 of a header and the bytes)."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def parse_integer_pickle(data: bytes, where: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The one-dimensional integer array or list of integers pickled in `data`, as int64 (N,).

    Nothing in the pickle is executed, see `common.data.safe_pickle`.

    Args:
        data: The file's content.
        where: The file's name for error messages.

    Raises:
        UserError: The pickle is damaged or holds anything but integers.
    """
    value = load_plain_pickle(data, where, "an array or a list of integers")
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.ndim == 1:
        return value.astype(np.int64)
    if isinstance(value, list | tuple) and all(type(item) is int for item in value):
        if any(abs(item) >= 2**63 for item in value):
            raise UserError(f"{where}: a number does not fit 64 bits; expected indices")
        return np.array(value, dtype=np.int64)
    raise UserError(
        f"{where}: refused, the pickle does not hold integers; only an array or a list of integers is accepted"
    )


def read_permutation(path: Path) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The pickled permutation of 0..N-1 in `path` as int64 (N,), as s4GAN ships and saves its splits.

    Raises:
        UserError: The file is absent, unsafe, damaged, or not a permutation.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    return parse_permutation(data, str(path))


def parse_permutation(data: bytes, where: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """As `read_permutation`, from the file's content."""
    indices = parse_integer_pickle(data, where)
    if not np.array_equal(np.sort(indices), np.arange(len(indices))):
        raise UserError(f"{where}: not a permutation of 0..{len(indices) - 1}; get the file again")
    return indices


def split_by_permutation(
    ids: Sequence[str], permutation: Sequence[int] | np.ndarray[Any, Any], ratio: float
) -> tuple[list[str], list[str]]:
    """Labeled and unlabeled ids of a permutation, in its order: the first `int(ratio * N)` and the rest.

    Truncation, not rounding, as in s4GAN's training scripts (1/8 of 10582 gives 1322).

    Raises:
        UserError: The permutation is not as long as `ids`, or the ratio leaves no labeled image.
    """
    if len(permutation) != len(ids):
        raise UserError(
            f"permutation: {len(permutation)} entries for a list of {len(ids)} images; "
            "use the list the permutation was made for"
        )
    count = int(ratio * len(ids))
    if not 0 < count <= len(ids):
        raise UserError(f"ratio {ratio}: gives {count} of {len(ids)} images; choose a ratio in (0, 1]")
    ordered = [ids[int(index)] for index in permutation]
    return ordered[:count], ordered[count:]
