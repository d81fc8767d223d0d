"""Reading official archives and unpacked folders alike, and putting their files in place.

Nothing is unpacked as a whole: a rule names the place of each wanted file, so that no archive decides where its
files land. A file that is there is left alone, and a new one appears under its name only when it is complete.
"""

from __future__ import annotations

import contextlib
import io
import lzma
import os
import re
import shutil
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from common.data.files import Uint8, replacing, write_bytes
from common.data.lists import sha256_ids
from common.data.spec import DatasetSpec, check_pair
from common.errors import UserError, writing
from splits.published import load_published

Rule = Callable[[str], str | None]
Counts = dict[str, tuple[int, ...]]
T = TypeVar("T")

_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError)
WORKERS = 4
SAMPLED = 200  # photos and masks that `--check` decodes; `splits check` decodes all


@dataclass(frozen=True)
class Download:
    """A file that anybody may download: address, file name and the md5 its publisher or torchvision states."""

    url: str
    name: str
    md5: str


@dataclass(frozen=True)
class FoundFile:
    """A file of a source: its name with forward slashes, its size, how to read it, its path if it is on disk."""

    name: str
    size: int
    read: Callable[[], bytes]
    path: Path | None = None


class Source:
    """A folder or an archive (zip, tar, tar.gz) that files are taken from."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def files(self, wanted: Rule) -> Iterator[FoundFile]:
        """The regular files for which `wanted` gives a place, in the order in which they are stored.

        Raises:
            UserError: The archive is damaged, or names a file outside of itself.
        """
        if self.path.is_dir():
            yield from self._from_folder(wanted)
            return
        try:
            if zipfile.is_zipfile(self.path):
                yield from self._from_zip(wanted)
            else:
                yield from self._from_tar(wanted)
        except _DAMAGED as error:
            raise self._damaged(error) from None

    def count(self, wanted: Rule) -> int | None:
        """How many files that will be; None of a compressed tar, which would have to be read for it."""
        if self.path.is_dir():
            return sum(1 for _ in self._from_folder(wanted))
        with contextlib.suppress(*_DAMAGED):
            if zipfile.is_zipfile(self.path):
                with zipfile.ZipFile(self.path) as file:
                    return sum(not info.is_dir() and bool(wanted(info.filename)) for info in file.infolist())
            with tarfile.open(self.path, "r:") as archive:
                return sum(member.isreg() and bool(wanted(member.name)) for member in archive)
        return None

    def _from_folder(self, wanted: Rule) -> Iterator[FoundFile]:
        for folder, subfolders, names in os.walk(self.path, followlinks=True):
            subfolders.sort()
            for name in sorted(names):
                path = Path(folder) / name
                relative = path.relative_to(self.path).as_posix()
                if wanted(relative):
                    yield FoundFile(relative, path.stat().st_size, path.read_bytes, path)

    def _from_zip(self, wanted: Rule) -> Iterator[FoundFile]:
        with zipfile.ZipFile(self.path) as archive:
            for info in archive.infolist():
                self._refuse_escape(info.filename)
                if not info.is_dir() and wanted(info.filename):
                    yield FoundFile(info.filename, info.file_size, self._reader(archive.read, info))

    def _from_tar(self, wanted: Rule) -> Iterator[FoundFile]:
        with tarfile.open(self.path) as archive:
            for member in archive:
                self._refuse_escape(member.name)
                if member.isreg() and wanted(member.name):  # links and devices are not part of any data set
                    yield FoundFile(member.name, member.size, self._reader(_read_member, archive, member))

    def _reader(self, function: Callable[..., bytes], *arguments: Any) -> Callable[[], bytes]:
        def read() -> bytes:
            try:
                return function(*arguments)
            except _DAMAGED as error:
                raise self._damaged(error) from None

        return read

    def _damaged(self, error: Exception) -> UserError:
        return UserError(f"{self.path}: damaged archive ({error}); get it again")

    def _refuse_escape(self, name: str) -> None:
        parts = PurePosixPath(name.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts or re.match(r"[A-Za-z]:", name):
            raise UserError(
                f"{self.path}: names '{name}', a place outside of the archive; this is not the official file"
            )


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    return file.read() if file else b""


def find_source(
    source: Path, what: str, folders: Sequence[str], marker: str, archives: Sequence[str], remedy: str
) -> Source:
    """The unpacked folder or the archive that holds `what`.

    Args:
        source: Folder given by the user.
        what: For the error message.
        folders: Places below `source` to look for `marker`.
        marker: A folder or file that shows that this is it; may hold `*`.
        archives: Names of archives below `source`, looked for where no folder is there.
        remedy: What to do if nothing is there.

    Raises:
        UserError: Neither is there.
    """
    for folder in folders:
        base = source / folder
        if base.is_dir() and next(base.glob(marker), None) is not None:
            return Source(base)
    for name in archives:
        if (source / name).is_file():
            return Source(source / name)
    raise UserError(
        f"{source}: holds no {what}: neither a folder with '{marker}' nor {' or '.join(archives)}; {remedy}"
    )


def place(source: Source, out: Path, rule: Rule, what: str) -> int:
    """Put the files of a source where a rule wants them; how many there are.

    A file of the right size is left alone; files of a folder become hard links where the disk allows it.

    Args:
        source: The folder or archive.
        out: Folder to put them in.
        rule: The place of a file below `out` by its name in the source, or None.
        what: For the progress bar.
    """
    count = 0
    for found in reading(source, rule, what):
        target = out / str(rule(found.name))
        count += 1
        if target.is_file() and target.stat().st_size == found.size:
            continue
        if found.path is None:
            write_bytes(target, found.read())
        else:
            link(found.path, target)
    return count


def link(path: Path, target: Path) -> None:
    """Put a file at `target` as a hard link, or as a copy where the disk does not allow one.

    Raises:
        UserError: Neither can be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with writing(target, "check free space and permissions"), replacing(target) as partial:
        partial.unlink(missing_ok=True)
        try:
            os.link(path, partial)
        except OSError:  # another disk, or one without links
            shutil.copyfile(path, partial)


def by_pattern(pattern: str, target: str) -> Rule:
    """A rule: names that end in the regular expression go to `target`, a template of its groups."""
    regex = re.compile(rf"(?:^|/){pattern}$")

    def rule(name: str) -> str | None:
        match = regex.search(name)
        return match.expand(target) if match else None

    return rule


def for_each(work: Callable[[T], None], items: Sequence[T], what: str) -> None:
    """Do `work` for every item, several at a time, with a progress bar; the first error stops it."""
    with ThreadPoolExecutor(max_workers=WORKERS) as pool:
        try:
            for _ in progress(pool.map(work, items), what, len(items)):
                pass
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def reading(source: Source, wanted: Rule, what: str) -> Iterable[FoundFile]:
    """The wanted files of a source, counted on a progress bar."""
    return progress(source.files(wanted), what, source.count(wanted))


def progress(values: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """`values`, counted on a progress bar with the time left where stderr is a terminal."""
    return tqdm(values, desc=what, total=total, leave=False, disable=not sys.stderr.isatty())


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Write a list file atomically, unless it holds the same lines."""
    data = ("\n".join(lines) + "\n").encode()
    if not path.is_file() or path.read_bytes() != data:
        write_bytes(path, data)


def download_files(files: Sequence[Download], source: Path) -> None:
    """Download official archives to `source` through torchvision, verified by md5; those that are there are kept.

    Raises:
        UserError: A download fails or has another md5.
    """
    from torchvision.datasets.utils import check_integrity, download_url

    for file in files:
        if check_integrity(str(source / file.name), file.md5):
            continue
        source.mkdir(parents=True, exist_ok=True)
        try:
            download_url(file.url, str(source), file.name, file.md5)
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{file.url}: download failed ({reason}); check the network, or put {file.name} into {source} by hand"
            ) from None


def check_folder(
    spec: DatasetSpec, lists: dict[str, Path], expected: Counts, published: dict[str, str]
) -> list[str]:
    """What is wrong with a prepared folder; an empty list if nothing is.

    Every photo and mask must be there; a sample of them is opened.

    Args:
        spec: The dataset, rooted at the folder.
        lists: The folder's list files by name.
        expected: Accepted numbers of photos per list.
        published: Name of the published list that each list must equal, where there is one.

    Raises:
        UserError: Folder, list or photo is missing.
    """
    problems = []
    known = {record.name: record.sha256_ids for record in load_published() if record.sha256_ids}
    for name, path in lists.items():
        items = spec.read_list(path, labels=name != "test")
        if len(items) not in expected[name]:
            numbers = " or ".join(map(str, expected[name]))
            problems.append(
                f"{path}: {len(items)} photos instead of {numbers}; prepare again from complete sources"
            )
        elif published.get(name) in known and sha256_ids(item.id for item in items) != known[published[name]]:
            problems.append(
                f"{path}: other photos than the published list {published[name]}; get the lists again"
            )
        for item in items[:: max(1, len(items) // SAMPLED)]:
            try:
                image = spec.load_image(item)
                if item.label is not None:
                    check_pair(item, image, spec.load_label(item))
            except UserError as error:
                problems.append(str(error))
    return problems


def write_index_mask(path: Path, mask: Uint8) -> None:
    """Write a mask uint8 (H, W) as grey PNG atomically, which the original loaders need; the values are unchanged."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(mask, dtype=np.uint8)).save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())
