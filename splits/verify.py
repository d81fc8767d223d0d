"""`python -m splits verify`: which published list a file is, or which one it contradicts."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from splits.published import (
    Content,
    Published,
    load_published,
    say,
)


@dataclass(frozen=True)
class Recognized:
    """What a list file turned out to be.

    Attributes:
        names: Published names it equals, with their role.
        verdict: One line about it.
    """

    names: tuple[tuple[str, str], ...]
    verdict: str


def recognize(path: Path, records: Sequence[Published]) -> Recognized:
    """Which published list a file is, or which one it contradicts.

    Raises:
        UserError: The file cannot be read as a list.
    """
    if any(re.fullmatch(r"random(_seed\d+)?", part) for part in path.parts):
        return Recognized((("random", path.stem),), "drawn by 'make', not a published list")
    content = Content(path.read_bytes(), str(path))
    pickled = path.suffix == ".pkl"
    candidates = [record for record in records if pickled == (record.role == "permutation")]
    upstream = [
        record
        for record in candidates
        if any(content.wrong_bytes(source) is None for source in record.sources)
    ]
    matches = upstream or [record for record in candidates if record.is_known(content)]
    if matches:
        names = ", ".join(dict.fromkeys(f"{record.name} {record.role}" for record in matches))
        how = "identical to an upstream file" if upstream else "the ids on record"
        return Recognized(
            tuple((record.name, record.role) for record in matches),
            f"{names}: {matches[0].count} entries, {how}",
        )
    meant = max(candidates, key=lambda record: _common_ending(path, record))
    if _common_ending(path, meant) >= 2:
        wrong = meant.contradiction(content) or "other bytes than upstream, and its ids are not on record"
        return Recognized((), f"CONTRADICTS {meant.name} {meant.role}: {wrong}")
    count = (content.indices if pickled else content.ids)[0]
    alike = next(
        (record for record in candidates if record.count == count and record.role == path.stem), None
    )
    if alike is None:
        return Recognized((), "no published list has these entries")
    return Recognized((), f"CONTRADICTS {alike.name} {alike.role}, which has as many entries, but not these")


def _common_ending(path: Path, record: Published) -> int:
    """How many trailing parts of the path are those of the record's place here or upstream."""
    places = [record.target.parts, *(tuple(source.path.split("/")) for source in record.sources)]
    own = path.resolve().parts

    def shared(place: Sequence[str]) -> int:
        pairs = zip(reversed(own), reversed(place), strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(own), len(place)))

    return max(shared(place) for place in places)


def verify(folder: Path) -> int:
    """Print what each list below `folder` (or the list `folder`) is; 1 if any is not a published one.

    Raises:
        UserError: There is no list.
    """
    files = [folder] if folder.is_file() else sorted([*folder.rglob("*.txt"), *folder.rglob("*.pkl")])
    if not files:
        raise UserError(f"{folder}: no list (*.txt, *.pkl) there; give a folder with split lists or one list")
    records = load_published()
    wrong = 0
    names: dict[Path, dict[str, set[str]]] = defaultdict(dict)
    for path in files:
        try:
            found = recognize(path, records)
        except UserError as error:
            found = Recognized((), f"unreadable ({error})")
        say(f"{path}: {found.verdict}")
        wrong += not found.names
        if found.names and path.stem in {"labeled", "unlabeled"}:
            names[path.parent][path.stem] = {name for name, role in found.names if role == path.stem}
    for parent, roles in names.items():
        if len(roles) == 2 and not roles["labeled"] & roles["unlabeled"]:
            say(f"{parent}: the labeled and the unlabeled list belong to different settings")
            wrong += 1
    return 1 if wrong else 0
