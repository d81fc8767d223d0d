"""`python -m common.data.splits`: get, recognize, make and check split lists.

get NAME ...            download published lists and verify them
list                    print the names of all published lists
verify DIR              recognize the lists in a folder, or tell which published list they contradict
make DATASET            draw a random split: nested, covering the classes, from a seed
check DATASET [SPLIT]   open every file of a dataset or split and report what is wrong with it
"""

from __future__ import annotations

import argparse
import math
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.data.datasets import (
    IGNORE,
    SPLITS,
    DatasetSpec,
    Finder,
    Item,
    check_pair,
    evaluation_ids,
    find_split,
    load_spec,
    refuse_evaluation_images,
)
from common.data.files import write_bytes
from common.data.lists import Entry, read_entries, read_ids, sha256_ids
from common.data.published import (
    BASE_URL,
    Content,
    Published,
    derive,
    fetch,
    find_published,
    list_ids,
    load_published,
    store,
)
from common.errors import UserError, run_main

SHOWN_PROBLEMS = 20


def say(line: str) -> None:
    """Print one line of a command's answer."""
    sys.stdout.write(f"{line}\n")


# get


def get(names: Sequence[str], out: Path, base_url: str, order: Path | None, *, force: bool) -> None:
    """Download and verify published lists, and say of each where it is.

    With a setting come the official training and evaluation list of its dataset; those are no condition, as they may
    lie with the data already.

    Args:
        names: Names as `list` prints them, or the beginning of several.
        out: Folder of splits to write to.
        base_url: Where raw files are served, as GitHub does.
        order: For s4GAN's permutations: the list their indices count, where it is not a published one.
        force: Replace other lists that are in the way.

    Raises:
        UserError: An unknown name, a failed download, contents other than on record.
    """
    records = load_published()
    wanted = [record for name in names for record in find_published(name, records)]
    for record in wanted:
        if record.permutation is None:
            data = fetch(record, base_url)
        else:
            data = _derived(record, records, out, base_url, order)
        path = out / record.target
        state = "written" if store(path, data, record, force=force) else "already there"
        note = f" ({record.note})" if record.note else ""
        say(f"{path}: {record.count} {_unit(record)}, verified, {state}{note}")
    for record in records:
        if not _accompanies(record, wanted) or (out / record.target).is_file():
            continue
        try:
            store(out / record.target, fetch(record, base_url), record, force=False)
            say(f"{out / record.target}: {record.count} ids, verified, written")
        except UserError as error:
            say(f"note: {error}")


def _accompanies(record: Published, wanted: Sequence[Published]) -> bool:
    """Whether a run on the wanted lists reads this official list, too."""
    if record.protocol != "official" or record in wanted or record.name == "cityscapes/train_val":
        return False
    datasets = {other.dataset for other in wanted if other.role == "labeled"}
    return record.role in {"train", "val"} and record.dataset in datasets


def _unit(record: Published) -> str:
    return {"permutation": "indices", "flags": "rows"}.get(record.role, "ids")


def _derived(
    record: Published, records: Sequence[Published], out: Path, base_url: str, order: Path | None
) -> bytes:
    """A text list cut from a permutation; the permutation is kept beside it."""
    whole = next(other for other in records if other.name == record.permutation)
    pickled = out / whole.target
    if not pickled.is_file() or not whole.is_known(Content(pickled.read_bytes(), str(pickled))):
        write_bytes(pickled, fetch(whole, base_url))
    ids = read_ids(order) if order else _order(whole, records, base_url)
    return ("\n".join(derive(record, pickled.read_bytes(), ids)) + "\n").encode()


def _order(whole: Published, records: Sequence[Published], base_url: str) -> list[str]:
    """The ids that the indices of a permutation count, in order."""
    listed = next((record for record in records if record.name == whole.order), None)
    if listed is None:
        spec = load_spec(whole.dataset)
        path = spec.lists["train"]
        if not path.is_file():
            raise UserError(
                f"{whole.name}: its indices count the training images of '{whole.dataset}', which are not there; run "
                f"'python -m common.data.prepare {whole.dataset}' and set SSS_DATA, or give the list with --order FILE"
            )
        return read_ids(path)
    ids = list_ids(fetch(listed, base_url), listed.name)
    if whole.dataset == "cityscapes":
        return sorted(ids, key=lambda name: (name.split("_")[0], name))
    return ids


# list


def print_names(out: Path) -> None:
    """Print every published name with its counts, its origin, and whether it is in `out`."""
    by_name: dict[str, list[Published]] = defaultdict(list)
    for record in load_published():
        by_name[record.name].append(record)
    for name, group in by_name.items():
        counts = " + ".join(f"{record.count} {record.role}" for record in group)
        here = "here" if all((out / record.target).is_file() for record in group) else "-"
        origin = next((record.sources[0].repository for record in group if record.sources), "permutation")
        say(f"{name:32} {here:5} {counts:34} {origin}")


# verify


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


# make


@dataclass(frozen=True)
class Drawn:
    """A random split: items of both roles, and the classes that no labeled image shows."""

    labeled: list[Item]
    unlabeled: list[Item]
    missing: list[str]


def parse_fraction(text: str, total: int) -> int:
    """Number of labeled images that "1/8" (rounded up, as published lists are) or "46" means.

    Raises:
        UserError: Neither form, or not between 1 and `total`.
    """
    if not re.fullmatch(r"\d+(/[1-9]\d*)?", text):
        raise UserError(f"--fraction {text}: not a share such as 1/8 nor a number of images such as 46")
    count = math.ceil(Fraction(text) * total) if "/" in text else int(text)
    if not 1 <= count <= total:
        raise UserError(
            f"--fraction {text}: {count} of {total} photos with masks; choose a share or number within"
        )
    return count


def draw_order(spec: DatasetSpec, items: Sequence[Item], seed: int) -> tuple[list[Item], list[str]]:
    """A random order of photos with masks, of which every beginning is a labeled set; the smaller are nested.

    The order is a permutation of the sorted ids. Photos that show a class for the first time in it come first, so
    that small beginnings cover the classes as soon as they can; masks are read only until all classes have occurred.

    Args:
        spec: Decodes the masks.
        items: Photos with masks.
        seed: Of the permutation.

    Returns:
        The order, and the names of classes that occur nowhere.
    """
    shuffled = sorted(items, key=lambda item: item.id)
    random.Random(seed).shuffle(shuffled)
    seen: set[int] = set()
    first: list[Item] = []
    for item in _progress(shuffled, "classes"):
        if len(seen) == spec.num_classes:
            break
        new = set(np.unique(spec.load_label(item)).tolist()) - {IGNORE} - seen
        if new:
            first.append(item)
            seen |= new
    front = {item.id for item in first}
    order = first + [item for item in shuffled if item.id not in front]
    return order, [name for k, name in enumerate(spec.classes) if k not in seen]


def draw(spec: DatasetSpec, fraction: str, seed: int) -> Drawn:
    """A random split of the training list; photos without masks are always unlabeled.

    Args:
        spec: The dataset.
        fraction: "1/8" or "46", counted among the photos with masks.
        seed: Equal seeds give nested splits.

    Raises:
        UserError: A fraction out of range, a broken list or mask, nothing left unlabeled.
    """
    items = list({item.id: item for item in spec.read_list("train")}.values())
    with_mask = [item for item in items if item.label is not None]
    count = parse_fraction(fraction, len(with_mask))
    order, _ = draw_order(spec, with_mask, seed)
    labeled = order[:count]
    without_mask = sorted((item for item in items if item.label is None), key=lambda item: item.id)
    unlabeled = order[count:] + without_mask
    if not unlabeled:
        raise UserError(
            f"--fraction {fraction}: leaves no unlabeled photo; for supervised training use split 'full'"
        )
    shown: set[int] = set()
    for item in labeled:
        if len(shown) == spec.num_classes:
            break
        shown |= set(np.unique(spec.load_label(item)).tolist()) - {IGNORE}
    return Drawn(labeled, unlabeled, [name for k, name in enumerate(spec.classes) if k not in shown])


def make(spec: DatasetSpec, fraction: str, seed: int, out: Path | None, *, force: bool) -> Path:
    """Write a random split and return its folder: `random/<fraction>`, with a seed other than 0 `random_seed<s>/...`.

    Args:
        spec: The dataset.
        fraction: "1/8" or "46".
        seed: 0 or more.
        out: Folder to make it in; None takes that of the dataset.yaml.
        force: Replace a split that differs.

    Raises:
        UserError: See `draw`; or another split is there and `force` is not set.
    """
    if seed < 0:
        raise UserError(f"--seed {seed}: must be 0 or more")
    lines = _training_lines(spec)
    drawn = draw(spec, fraction, seed)
    family = "random" if seed == 0 else f"random_seed{seed}"
    folder = (out or spec.splits_dir) / family / fraction.replace("/", "_")
    contents = {
        folder / f"{role}.txt": ("\n".join(lines.get(item.id, item.id) for item in items) + "\n").encode()
        for role, items in (("labeled", drawn.labeled), ("unlabeled", drawn.unlabeled))
    }
    for path, data in contents.items():
        if path.is_file() and path.read_bytes() != data and not force:
            raise UserError(f"{path}: holds another split; move it away or use --force")
    for path, data in contents.items():
        write_bytes(path, data)
    say(f"{folder}: {len(drawn.labeled)} labeled, {len(drawn.unlabeled)} unlabeled")
    if drawn.missing:
        say(f"note: no labeled photo shows {', '.join(drawn.missing)}; a larger fraction or another seed may")
    return folder


def _training_lines(spec: DatasetSpec) -> dict[str, str]:
    """The training list's lines by id, so that paths named there stay named; evaluation images are refused."""
    if "train" not in spec.lists or not spec.lists["train"].is_file():
        return {}  # a generated dataset, or `draw` says what is missing
    path = spec.lists["train"]
    entries = read_entries(path)
    refuse_evaluation_images(spec, entries, path, evaluation_ids(spec))
    return {spec.entry_id(entry): _line(entry) for entry in entries}


def _line(entry: Entry) -> str:
    return entry.image if entry.label is None else f"{entry.image}\t{entry.label}"


# check


@dataclass
class RoleReport:
    """What one list holds.

    Attributes:
        count: Lines.
        masks: Photos with a mask.
        sizes: How often each (width, height) occurs.
        pixels: Pixels per class, the last entry counting ignored ones, int64 (K + 1,).
        images: Photos that show each class, int64 (K,).
    """

    count: int
    masks: int
    sizes: Counter[tuple[int, int]]
    pixels: np.ndarray[Any, np.dtype[np.int64]]
    images: np.ndarray[Any, np.dtype[np.int64]]


class Checker:
    """Opens the files of lists and collects what is wrong with them, instead of stopping at the first mistake."""

    def __init__(self, spec: DatasetSpec) -> None:
        self.spec = spec
        self.problems: list[str] = []
        self.ids: dict[str, list[str]] = {}
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
        self.ids[name] = [self.spec.entry_id(entry) for _, entry in entries]
        for repeated, times in Counter(self.ids[name]).items():
            if times > 1:
                self.problems.append(f"{name}: '{repeated}' is listed {times} times; remove the repetitions")
        if not entries:
            self.problems.append(f"{name}: the list is empty")
        k = self.spec.num_classes
        report = RoleReport(
            len(entries), 0, Counter(), np.zeros(k + 1, dtype=np.int64), np.zeros(k, dtype=np.int64)
        )
        with ThreadPoolExecutor(max_workers=4) as pool:
            results = pool.map(lambda pair: self._open(*pair, read_mask=labels or name != "unlabeled"), items)
            for size, counts, problem in _progress(results, name, len(items)):
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
        item = self.finder.item(entry, where)
        if labels and item.label is None:
            raise UserError(self.finder.missing("mask", entry, where))
        return item

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
        """Check that no id is in two lists, apart from the pairs of lists in `allowed`."""
        for one, other in combinations(self.ids, 2):
            common = sorted(set(self.ids[one]) & set(self.ids[other]))
            if common and frozenset((one, other)) not in set(allowed):
                shown = ", ".join(common[:3])
                self.problems.append(
                    f"{one} and {other}: {len(common)} ids are in both ({shown}); keep each in one list"
                )


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
    for problem in checker.problems[:SHOWN_PROBLEMS]:
        say(f"PROBLEM {problem}")
    if len(checker.problems) > SHOWN_PROBLEMS:
        say(f"... and {len(checker.problems) - SHOWN_PROBLEMS} more")
    say(
        f"{spec.name}: {len(checker.problems)} problem(s)"
        if checker.problems
        else f"{spec.name}: all is well"
    )
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
    total = int(report.pixels.sum())
    if total:
        labeled = max(1, total - int(report.pixels[-1]))
        for k, label in enumerate(spec.classes):
            share = 100 * int(report.pixels[k]) / labeled
            lines.append(f"  {k:3} {label:20} {share:7.3f} % of labeled pixels, in {report.images[k]} photos")
        lines.append(f"      {'ignored':20} {100 * int(report.pixels[-1]) / total:7.3f} % of all pixels")
    return lines


def _progress(values: Iterable[Any], what: str, total: int | None = None) -> Iterable[Any]:
    return tqdm(values, desc=what, total=total, leave=False, disable=not sys.stderr.isatty())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m common.data.splits", description="Split lists.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("get", help="download published lists and verify them")
    one.add_argument("names", nargs="+", metavar="NAME", help="such as voc/classic/366, voc/val, voc/classic")
    one.add_argument("--out", type=Path, default=SPLITS, help="folder of splits to write to")
    one.add_argument("--base-url", default=BASE_URL, help="where raw files are served as GitHub does")
    one.add_argument("--order", type=Path, help="list that the indices of an s4GAN permutation count")
    one.add_argument("--force", action="store_true", help="replace other lists that are in the way")
    one = commands.add_parser("list", help="print the names of all published lists")
    one.add_argument("--out", type=Path, default=SPLITS, help="folder of splits to look in")
    one = commands.add_parser("verify", help="recognize the lists in a folder")
    one.add_argument("folder", type=Path, metavar="DIR")
    one = commands.add_parser("make", help="draw a random split: nested, covering the classes")
    one.add_argument("dataset", metavar="DATASET_OR_YAML")
    one.add_argument("--fraction", required=True, help="1/8 of the photos with masks, or a number of them")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--root", help="data folder; default: SSS_DATA, then the dataset's own")
    one.add_argument("--out", type=Path, help="folder to make it in; default: beside the dataset.yaml")
    one.add_argument("--force", action="store_true", help="replace a split that differs")
    one = commands.add_parser("check", help="open every file and report what is wrong")
    one.add_argument("dataset", metavar="DATASET_OR_YAML")
    one.add_argument("split", nargs="?", help="default: the official lists")
    one.add_argument("--root", help="data folder; default: SSS_DATA, then the dataset's own")
    return parser


def main(argv: Sequence[str]) -> int | None:
    """Run one command; the exit status is 1 where `verify` or `check` found something wrong."""
    options = _parser().parse_args(argv)
    commands: dict[str, Callable[[], int | None]] = {
        "get": lambda: get(options.names, options.out, options.base_url, options.order, force=options.force),
        "list": lambda: print_names(options.out),
        "verify": lambda: verify(options.folder),
        "make": lambda: _make(options),
        "check": lambda: check(load_spec(options.dataset, options.root), options.split),
    }
    return commands[options.command]()


def _make(options: argparse.Namespace) -> None:
    spec = load_spec(options.dataset, options.root)
    make(spec, options.fraction, options.seed, options.out, force=options.force)


if __name__ == "__main__":
    run_main(main)
