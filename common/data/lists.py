"""List files: one reader for every format the original repositories ship, and the hashes that identify a list.

A line names an image and, in some families, its label: bare ids, paths, two fields separated by a blank or a
tab, paths with a leading slash or with the separators of Windows, any line ending, with or without a final newline.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError

IMAGE_ENDINGS = frozenset(
    ["jpg", "jpeg", "jfif", "png", "bmp", "tif", "tiff", "webp", "ppm", "pgm", "gif", "jp2"]
)
CITYSCAPES_SUFFIX = "_leftImg8bit"
MAX_LIST_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Entry:
    """One line of a list: line number from 1, the image field and, if the line has one, the label field.

    Names may hold blanks, so only the files can tell what a line with blanks and no tab means: see `readings`.
    """

    line: int
    image: str
    label: str | None
    text: str = field(default="", compare=False)

    @property
    def id(self) -> str:
        """The id, the same for every way of writing the line; see `id_of`."""
        return id_of(self.image)

    @property
    def readings(self) -> list[tuple[str, str | None]]:
        """Every image with its label that the line can mean, what is likeliest first."""
        cuts = [] if "\t" in self.text else list(re.finditer(r"\s+", self.text))
        if not cuts:
            return [(self.image, self.label)]
        pairs: list[tuple[str, str | None]] = [(self.text[: c.start()], self.text[c.end() :]) for c in cuts]
        whole = (self.text, None)
        return [*pairs, whole] if "/" in self.text[cuts[0].end() :] else [whole, *pairs]


def id_of(image: str) -> str:
    """The id of an image field: without folder, without image file ending and without the Cityscapes ending
    `_leftImg8bit`, `leftImg8bit/train/ulm/ulm_19_leftImg8bit.png` -> `ulm_19`.
    """
    return strip_suffix(image.rsplit("/", 1)[-1]).removesuffix(CITYSCAPES_SUFFIX)


def strip_suffix(name: str) -> str:
    """`name` without the ending of an image file (.jpg, .png, ...), in either case; other dots stay."""
    stem, _, ending = name.rpartition(".")
    return stem if stem and ending.lower() in IMAGE_ENDINGS else name


def read_text(path: Path) -> str:
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

    Two fields are separated by a tab, or by the only blank of a line; a line of more blanks is one name until its
    files say otherwise. Names are in Unicode's composed form, and have slashes. Any line ending will do; `where` begins
    messages.

    Raises:
        UserError: A line has more than two fields separated by tabs.
    """
    entries = []
    composed = unicodedata.normalize("NFC", text.removeprefix("\ufeff")).replace("\\", "/")
    for number, line in enumerate(re.split(r"\r\n|\n|\r", composed), start=1):
        whole = line.strip()
        fields = (
            [part.strip() for part in whole.split("\t") if part.strip()] if "\t" in whole else whole.split()
        )
        if "\t" not in whole and len(fields) > 2:
            fields = [whole]
        if len(fields) > 2:
            raise UserError(
                f"{where}:{number}: {len(fields)} fields; a line is an image or an image and its label, "
                "separated by a blank, or by a tab where names contain blanks"
            )
        if fields:
            entries.append(Entry(number, fields[0], fields[1] if len(fields) == 2 else None, whole))
    return entries


def read_entries(path: Path) -> list[Entry]:
    """Entries of the list file `path` in file order.

    Raises:
        UserError: The file is absent, unreadable or not text, or see `parse_entries`.
    """
    return parse_entries(read_text(path), str(path))


def read_ids(path: Path) -> list[str]:
    """Normalized ids of the list file `path` in file order, repetitions kept."""
    return [entry.id for entry in read_entries(path)]


def sha256_ids(ids: Iterable[str]) -> str:
    """Hash of a set of ids: sorted by code point, unique, joined by a newline, none at the end."""
    return hashlib.sha256("\n".join(sorted(set(ids))).encode()).hexdigest()


def sha256_order(ids: Iterable[object]) -> str:
    """Hash of ids or indices in the given order, repetitions kept, joined by a newline."""
    return hashlib.sha256("\n".join(map(str, ids)).encode()).hexdigest()
