"""`python -m splits check`: open every file of a dataset or split and report what is wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from common.data.files import remarks
from common.data.lists import Entry, read_entries, sha256_ids
from common.data.spec import IGNORE, DatasetSpec, Finder, Item, check_pair
from common.data.split import find_split
from common.errors import UserError
from splits.prepare.archives import progress
from splits.published import (
    load_published,
    say,
)

SHOWN_PROBLEMS = 20


@dataclass
class RoleReport:
    """What one list holds.

    Attributes:
        count: Lines.
        masks: Photos with a mask.
        sizes: How often each (width, height) occurs.
        pixels: Pixels per class, the last entry counting ignored ones, int64 (K + 1,).
        images: Photos that show each class, int64 (K,).
        remarks: How often each remark on reading a photo is due.
    """

    count: int
    masks: int
    sizes: Counter[tuple[int, int]]
    pixels: np.ndarray[Any, np.dtype[np.int64]]
    images: np.ndarray[Any, np.dtype[np.int64]]
    remarks: Counter[str] = field(default_factory=Counter)


class Checker:
    """Opens the files of lists and collects what is wrong with them, instead of stopping at the first mistake."""

    def __init__(self, spec: DatasetSpec) -> None:
        self.spec = spec
        self.problems: list[str] = []
        self.ids: dict[str, list[str]] = {}
        self.photos: dict[str, dict[Path, str]] = {}
        self.reports: dict[str, RoleReport] = {}
        self.finder = None if spec.generator else Finder(spec)

    def role(self, name: str, entries: Sequence[tuple[str, Entry]], *, labels: bool) -> None:
        """Check one list.

        Args:
            name: Its role.
            entries: Its lines, each with its place for messages.
            labels: Whether masks are needed, and therefore read.
        """
        items = []
        for where, entry in entries:
            try:
                items.append((where, self._item(where, entry, labels=labels)))
            except UserError as error:
                self.problems.append(str(error))
        self.ids[name] = [item.id for _, item in items]
        self.photos[name] = {item.image: item.id for _, item in items}
        for repeated, times in Counter(item.image for _, item in items).items():
            if times > 1:
                self.problems.append(
                    f"{name}: '{self.photos[name][repeated]}' is listed {times} times; remove the repetitions"
                )
        if not entries:
            self.problems.append(f"{name}: the list is empty")
        k = self.spec.num_classes
        report = RoleReport(
            len(entries), 0, Counter(), np.zeros(k + 1, dtype=np.int64), np.zeros(k, dtype=np.int64)
        )
        with ThreadPoolExecutor(max_workers=4) as pool:
            if self.finder is not None:
                for found in pool.map(self._remarks, items):
                    report.remarks.update(found)
            results = pool.map(lambda pair: self._open(*pair, read_mask=labels or name != "unlabeled"), items)
            for size, counts, problem in progress(results, name, len(items)):
                if problem:
                    self.problems.append(problem)
                if size is not None:
                    report.sizes[size] += 1
                if counts is not None:
                    report.masks += 1
                    report.pixels += counts
                    report.images += counts[:k] > 0
        self.reports[name] = report

    def _item(self, where: str, entry: Entry, *, labels: bool) -> Item:
        if self.finder is None:
            return self.spec.find_items([entry], Path(where), labels)[0]
        return self.finder.item(entry, where, labels=labels)

    def _remarks(self, pair: tuple[str, Item]) -> list[str]:
        return remarks(pair[1].image, upright=self.spec.upright, value_range=self.spec.value_range)

    def _open(
        self, where: str, item: Item, *, read_mask: bool
    ) -> tuple[tuple[int, int] | None, np.ndarray[Any, np.dtype[np.int64]] | None, str | None]:
        """Size, pixels per class with the ignored last, and what is wrong with an item."""
        size = counts = None
        try:
            image = self.spec.load_image(item)
            size = (image.shape[1], image.shape[0])
            if item.label is not None and read_mask:
                label = self.spec.load_label(item)
                check_pair(item, image, label)
                histogram = np.bincount(label.ravel(), minlength=IGNORE + 1)
                counts = np.append(histogram[: self.spec.num_classes], histogram[IGNORE])
        except UserError as error:
            return size, counts, f"{where}: {error}"
        return size, counts, None

    def overlaps(self, allowed: Iterable[frozenset[str]] = ()) -> None:
        """Check that no photo is in two lists, apart from the pairs of lists in `allowed`."""
        for one, other in combinations(self.photos, 2):
            common = sorted(
                self.photos[one][path] for path in self.photos[one].keys() & self.photos[other].keys()
            )
            if common and frozenset((one, other)) not in set(allowed):
                shown = ", ".join(common[:3])
                self.problems.append(
                    f"{one} and {other}: {len(common)} photos are in both ({shown}); keep each in one list"
                )

    def warnings(self) -> list[str]:
        """What only the owner of the photos can decide."""
        met = {one for report in self.reports.values() for one in report.remarks}
        found, source = [], self.spec.source
        if any("dark" in one for one in met):
            found.append(
                "photos that are dark in the range of their type; if that is not theirs, set "
                f"'value_range: [low, high]' in {source}"
            )
        if any("orientation" in one for one in met) and any(report.masks for report in self.reports.values()):
            view, other = ("upright", "stored") if self.spec.upright else ("unturned", "upright")
            found.append(
                f"photos with an EXIF orientation: their masks must be drawn on the {view} view; otherwise set "
                f"'orientation: {other}' in {source}"
            )
        return found


def check(spec: DatasetSpec, split: str | None) -> int:
    """Open every file of the official lists, or of a split and the evaluation lists, and print a report.

    Returns:
        1 if anything is wrong, else 0.

    Raises:
        UserError: Data folder or lists are missing altogether.
    """
    checker = Checker(spec)
    allowed: list[frozenset[str]] = []
    if split is None:
        for name in spec.list_names:
            checker.role(name, _official(spec, name), labels=name == "val")
    else:
        folder = find_split(spec, split)
        checker.role("labeled", _lines_of(folder / "labeled.txt"), labels=True)
        if (folder / "unlabeled.txt").is_file():
            checker.role("unlabeled", _lines_of(folder / "unlabeled.txt"), labels=False)
            if _published_pair(checker.ids):
                allowed.append(frozenset(("labeled", "unlabeled")))
        for name in ("val", "test"):
            if name in spec.ranges or (name in spec.lists and spec.lists[name].is_file()):
                checker.role(name, _official(spec, name), labels=name == "val")
    checker.overlaps(allowed)
    for name, report in checker.reports.items():
        for line in _describe(spec, name, report):
            say(line)
    warnings = checker.warnings()
    for warning in warnings:
        say(f"WARNING {warning}")
    for problem in checker.problems[:SHOWN_PROBLEMS]:
        say(f"PROBLEM {problem}")
    if len(checker.problems) > SHOWN_PROBLEMS:
        say(f"... and {len(checker.problems) - SHOWN_PROBLEMS} more")
    doubts = f", {len(warnings)} warning(s)" if warnings else ""
    well = "no problem" if warnings else "all is well"
    say(f"{spec.name}: {f'{len(checker.problems)} problem(s)' if checker.problems else well}{doubts}")
    return 1 if checker.problems else 0


def _official(spec: DatasetSpec, name: str) -> list[tuple[str, Entry]]:
    if name in spec.ranges:
        return [
            (f"{name} list", Entry(i + 1, f"{index:06d}", None)) for i, index in enumerate(spec.ranges[name])
        ]
    if not spec.lists[name].is_file():
        spec.read_list(name)  # raises, with the command that gets the list
    return _lines_of(spec.lists[name])


def _lines_of(path: Path) -> list[tuple[str, Entry]]:
    return [(f"{path}:{entry.line}", entry) for entry in read_entries(path)]


def _published_pair(ids: dict[str, list[str]]) -> bool:
    """Whether the labeled and unlabeled ids are a published setting, overlap and all."""
    names = [
        {r.name for r in load_published() if r.role == role and r.sha256_ids == sha256_ids(ids[role])}
        for role in ("labeled", "unlabeled")
    ]
    return bool(names[0] & names[1])


def _describe(spec: DatasetSpec, name: str, report: RoleReport) -> list[str]:
    sizes = ", ".join(f"{w}x{h} ({n})" for (w, h), n in report.sizes.most_common(3))
    more = f" and {len(report.sizes) - 3} other sizes" if len(report.sizes) > 3 else ""
    lines = [
        f"{name}: {report.count} photos, {report.masks} masks read; {sizes or 'no readable photo'}{more}"
    ]
    lines += [f"  {times} photos: {remark}" for remark, times in report.remarks.most_common()]
    total = int(report.pixels.sum())
    if total:
        labeled = max(1, total - int(report.pixels[-1]))
        for k, label in enumerate(spec.classes):
            share = 100 * int(report.pixels[k]) / labeled
            lines.append(f"  {k:3} {label:20} {share:7.3f} % of labeled pixels, in {report.images[k]} photos")
        lines.append(f"      {'ignored':20} {100 * int(report.pixels[-1]) / total:7.3f} % of all pixels")
    return lines
