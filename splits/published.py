"""The published split lists: what `splits/published.yaml` records of them, their download and their verification.

The lists themselves are not part of this project. A download counts only when its bytes (sha256, or git's blob id
where only that is known) and the set of its ids are those on record.
"""

from __future__ import annotations

import difflib
import hashlib
import http.client
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import yaml

from common.data.files import write_bytes
from common.data.lists import (
    MAX_LIST_BYTES,
    parse_entries,
    sha256_ids,
    sha256_order,
)
from common.data.safe_pickle import load_permutation
from common.data.spec import SPLITS
from common.errors import UserError

BASE_URL = "https://raw.githubusercontent.com"
TIMEOUT_S = 60


@dataclass(frozen=True)
class Source:
    """One place a list can be downloaded from, and what the file must be.

    Attributes:
        repository: GitHub owner and name.
        branch: Branch of that repository.
        path: Path in that repository.
        sha256_file: Hash of the file's bytes; None where only the blob id is known.
        git_blob: git's id of the file, where that is what is known.
    """

    repository: str
    branch: str
    path: str
    sha256_file: str | None = None
    git_blob: str | None = None

    def url(self, base: str) -> str:
        """The address below `base`, which serves raw files as GitHub does."""
        return f"{base.rstrip('/')}/{self.repository}/{self.branch}/{urllib.parse.quote(self.path)}"


@dataclass(frozen=True)
class Published:
    """One published list: one role of one named setting.

    Attributes:
        name: `<dataset>/<family>/<fraction>`, or `<dataset>/<list>` for official lists.
        role: labeled, unlabeled, train, val, test, permutation, flags.
        dataset: Built-in dataset.
        protocol: Which family of lists.
        count: Number of ids, of indices or of rows.
        fraction: Number or share of labeled images, as the authors call it; None for official lists.
        sha256_ids: Hash of the set of ids; None where it is not known or not defined.
        sha256_indices: Hash of a permutation's indices in order.
        sources: Where to download it, the paper's own repository first; empty for a derived list.
        permutation: For a derived list: the name of the permutation it is the beginning or the rest of.
        order: For a permutation: the name of the list that its indices count.
        file: Path below the folder of splits where it is not `<name>/<role>.txt` or `<name>.txt`.
        note: What a user should know.
    """

    name: str
    role: str
    dataset: str
    protocol: str
    count: int
    fraction: str | None = None
    sha256_ids: str | None = None
    sha256_indices: str | None = None
    sources: tuple[Source, ...] = ()
    permutation: str | None = None
    order: str | None = None
    file: str | None = None
    note: str | None = None

    @property
    def target(self) -> PurePosixPath:
        """Where the list lies below the folder of splits."""
        if self.file:
            return PurePosixPath(self.file)
        if self.role in {"labeled", "unlabeled"}:
            return PurePosixPath(self.name) / f"{self.role}.txt"
        return PurePosixPath(f"{self.name}.txt")

    def contradiction(self, content: Content, source: Source | None = None) -> str | None:
        """Why a file is not this list, or None if it is.

        Args:
            content: The file.
            source: The place it came from: then the bytes must be those on record, too.
        """
        if source is not None:
            wrong_bytes = content.wrong_bytes(source)
            if wrong_bytes or not source.sha256_file:
                return wrong_bytes  # the blob id fixes every byte; the count on record is then an expectation
        if self.role == "flags":
            known_bytes = any(content.wrong_bytes(place) is None for place in self.sources)
            return None if known_bytes else "other bytes than upstream"
        permutation = self.role == "permutation"
        unit = "indices" if permutation else "ids"
        known = self.sha256_indices if permutation else self.sha256_ids
        count, found = content.indices if permutation else content.ids
        if count != self.count:
            return f"{count} {unit} instead of {self.count}"
        return None if known in (None, found) else f"{count} {unit} as expected, but not the same ones"

    def is_known(self, content: Content) -> bool:
        """Whether a file is this list beyond doubt: its bytes, its ids or its indices are those on record."""
        if any(content.wrong_bytes(source) is None for source in self.sources):
            return True
        if self.role == "flags" or not (self.sha256_ids or self.sha256_indices):
            return False
        return self.contradiction(content) is None


class Content:
    """The bytes of a list file and what identifies them, each computed once."""

    def __init__(self, data: bytes, where: str) -> None:
        self.data, self.where = data, where

    @cached_property
    def sha256(self) -> str:
        """Hash of the bytes."""
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def git_blob(self) -> str:
        """The id git gives to a file of these bytes."""
        head = b"blob %d\0" % len(self.data)
        return hashlib.sha1(head + self.data, usedforsecurity=False).hexdigest()

    @cached_property
    def ids(self) -> tuple[int, str]:
        """Number and hash of the different ids.

        Raises:
            UserError: Not a text list.
        """
        ids = set(list_ids(self.data, self.where))
        return len(ids), sha256_ids(ids)

    @cached_property
    def indices(self) -> tuple[int, str]:
        """Number and hash of the indices of a pickled permutation.

        Raises:
            UserError: Not such a pickle.
        """
        indices = load_permutation(self.data, self.where)
        return len(indices), sha256_order(indices)

    def wrong_bytes(self, source: Source) -> str | None:
        """Why these are not the bytes that `source` has on record, or None if they are."""
        if source.sha256_file:
            return (
                None
                if self.sha256 == source.sha256_file
                else f"sha256 {self.sha256} instead of {source.sha256_file}"
            )
        return (
            None
            if self.git_blob == source.git_blob
            else f"git blob {self.git_blob} instead of {source.git_blob}"
        )


def say(line: str) -> None:
    """Print one line of a command's answer."""
    sys.stdout.write(f"{line}\n")


def list_ids(data: bytes, where: str) -> list[str]:
    """Normalized ids of a list file's content, in order.

    Raises:
        UserError: It is not UTF-8 text, or a line has more than two fields.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8 text; get the list again") from None
    return [entry.id for entry in parse_entries(text, where)]


def load_published(path: Path | None = None) -> list[Published]:
    """All records of `splits/published.yaml` in file order.

    Raises:
        UserError: The file is absent.
    """
    path = path or SPLITS / "published.yaml"
    if not path.is_file():
        raise UserError(f"{path}: missing; run from a complete copy of the repository")
    records = yaml.load(
        path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    )
    return [_record(dict(values)) for values in records["lists"]]


def _record(values: dict[str, object]) -> Published:
    origin = {
        key: values.pop(key, None) for key in ("repository", "branch", "path", "sha256_file", "git_blob")
    }
    mirrors = values.pop("mirrors", None) or []
    places = [origin] if origin["repository"] else []
    sources = tuple(Source(**place) for place in [*places, *mirrors])  # type: ignore[misc]
    return Published(**values, sources=sources)  # type: ignore[arg-type]


def find_published(name: str, records: Sequence[Published]) -> list[Published]:
    """The records of a name, or of all names below it.

    `<dataset>/s4gan/<ratio>` exists for every ratio in (0, 1).

    Raises:
        UserError: Nothing has that name.
    """
    name = name.strip("/")
    exact = [record for record in records if record.name == name]
    below = [record for record in records if record.name.startswith(f"{name}/")]
    if exact or below:
        return exact or below
    match = re.fullmatch(r"(\w+/s4gan)/(0?\.\d+)", name)
    whole = next((record for record in records if match and record.name == match.group(1)), None)
    if match and whole:
        count = int(float(match.group(2)) * whole.count)
        rest = {"labeled": count, "unlabeled": whole.count - count}
        return [
            Published(name, role, whole.dataset, "s4gan", size, match.group(2), permutation=whole.name)
            for role, size in rest.items()
        ]
    names = sorted({record.name for record in records})
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean '{close[0]}'?" if close else "'python -m splits list' prints all names"
    raise UserError(f"split '{name}': not a published list; {hint}")


def download(url: str) -> bytes:
    """The content at an http(s) address.

    Raises:
        UserError: It cannot be had, or is larger than any list.
    """
    if urllib.parse.urlsplit(url).scheme not in {"http", "https"}:
        raise UserError(f"{url}: only http and https addresses are fetched; correct --base-url")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            data: bytes = answer.read(MAX_LIST_BYTES + 1)
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise UserError(f"{url}: download failed ({error}); check the network or --base-url") from None
    if len(data) > MAX_LIST_BYTES:
        raise UserError(f"{url}: larger than {MAX_LIST_BYTES >> 20} MiB; this is not a list")
    return data


def fetch(record: Published, base_url: str = BASE_URL) -> bytes:
    """The verified bytes of a list, from the first of its sources that delivers them.

    Raises:
        UserError: No source delivers the list on record.
    """
    reasons = []
    for source in record.sources:
        url = source.url(base_url)
        try:
            data = download(url)
        except UserError as error:
            reasons.append(str(error).split(";", maxsplit=1)[0])
            continue
        wrong = record.contradiction(Content(data, url), source)
        if wrong is None:
            return data
        reasons.append(f"{url}: {wrong}")
    more = f" (and {len(reasons) - 1} mirrors failed)" if len(reasons) > 1 else ""
    raise UserError(
        f"{record.name} {record.role}: cannot be downloaded: {reasons[0]}{more}; check the network or --base-url, or "
        "copy the file by hand and run 'python -m splits verify DIR'"
    )


def derive(record: Published, permutation: bytes, order: Sequence[str]) -> list[str]:
    """The ids of a list that is the beginning or the rest of a pickled permutation.

    Args:
        record: The derived list; its fraction is the ratio.
        permutation: The pickle.
        order: The ids that the indices count, in order.

    Raises:
        UserError: `order` has another length than the permutation, or the ids are not those on record.
    """
    indices = load_permutation(permutation, str(record.permutation))
    if len(indices) != len(order):
        raise UserError(
            f"permutation: {len(indices)} entries for a list of {len(order)} images; "
            "use the list the permutation was made for"
        )
    count = int(float(str(record.fraction)) * len(order))  # truncated, as in s4GAN's training scripts
    ids = [order[i] for i in (indices[:count] if record.role == "labeled" else indices[count:])]
    if record.sha256_ids not in (None, sha256_ids(ids)):
        raise UserError(
            f"{record.name} {record.role}: the ids are not those on record; the list that the indices count is not "
            "the one the permutation was made for"
        )
    return ids


def store(path: Path, data: bytes, record: Published, *, force: bool) -> bool:
    """Write a list atomically; False where the same list is there already.

    Raises:
        UserError: Another list is there and `force` is not set.
    """
    if path.is_file() and not force:
        there = path.read_bytes()
        if there == data or record.is_known(Content(there, str(path))):
            return False
        raise UserError(f"{path}: holds another list than {record.name}; move it away or use --force")
    write_bytes(path, data)
    return True
