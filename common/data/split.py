"""Which photos of a dataset are labeled: lists below a folder, or a split drawn of a generated dataset."""

from __future__ import annotations

import hashlib
import importlib
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.data.lists import Entry, read_entries, sha256_ids, sha256_order
from common.data.spec import IGNORE, SPLITS, DatasetSpec, Item, published_names
from common.errors import UserError

LOOKED_AT = 16  # files of each kind whose contents stand for those of the data folder
MEANING = {  # entries of `truth`, in words
    "labeled": "the labeled list",
    "unlabeled": "the unlabeled list",
    "classes": "the class names",
    "label_map": "the label map",
    "ignore": "the ignored values",
    "reading": "how photos are read",
    "list": "the evaluation list",
}
RANDOM_SPLIT = r"random(?:_seed(\d+))?/(\d+(?:_\d+)?)"


@dataclass(frozen=True)
class Split:
    """Which photos are labeled. Masks of unlabeled photos are never named, so they cannot be used by mistake.

    Attributes:
        labeled: Items with masks, in list order.
        unlabeled: Items with label None, in list order.
        name: The name asked for.
        hash: sha256 over the sorted ids of both roles; equal for two ways of writing the same split.
    """

    labeled: list[Item]
    unlabeled: list[Item]
    name: str
    hash: str


def resolve_split(spec: DatasetSpec, split: str) -> Split:
    """The labeled and unlabeled items of a split.

    Args:
        spec: The dataset.
        split: "full" (the whole training list labeled, nothing unlabeled); "random/<fraction>" of a generated
            dataset, drawn as `python -m splits make` does; or a folder with `labeled.txt` and,
            unless the rest of the training list is meant, `unlabeled.txt`. The folder is looked up below the
            dataset's `splits_dir`, below the folder of all datasets, below the data root and its `splits`, and
            from the working directory.

    Raises:
        UserError: The lists are absent, empty or broken, or name an evaluation image.
    """
    labeled, unlabeled = _roles(spec, split)
    return split_of(labeled, unlabeled, split)


def unlabeled_truth(spec: DatasetSpec, split: str) -> list[Item]:
    """The unlabeled items of a split that do have a mask, with it and in list order, to measure pseudo-labels with.

    Training must not see them: it takes the items of `resolve_split`, which name no mask.

    Raises:
        UserError: As for `resolve_split`.
    """
    return [item for item in _roles(spec, split)[1] if item.label is not None]


def _roles(spec: DatasetSpec, split: str) -> tuple[list[Item], list[Item]]:
    """Labeled and unlabeled items of a split, the latter with whatever masks they have."""
    if split == "full":
        items = [item for item in spec.read_list("train") if item.label is not None]
        if not items:
            raise UserError(f"split 'full': no image of the 'train' list of '{spec.name}' has a mask")
        return items, []
    drawn = re.fullmatch(RANDOM_SPLIT, split) if spec.generator else None
    if drawn:
        draw = importlib.import_module(str(spec.generator)).draw
        roles = draw(spec, drawn.group(2).replace("_", "/"), int(drawn.group(1) or 0))
        return roles.labeled, roles.unlabeled
    folder = find_split(spec, split)
    labeled_file, unlabeled_file = folder / "labeled.txt", folder / "unlabeled.txt"
    evaluation = evaluation_photos(spec)
    labeled = _read_role(spec, labeled_file, evaluation, labels=True)
    if not labeled:
        raise UserError(
            f"{labeled_file}: the labeled list is empty; a split needs at least one labeled image"
        )
    if unlabeled_file.is_file():
        unlabeled = _read_role(spec, unlabeled_file, evaluation, labels=False)
        where = str(unlabeled_file)
    else:
        known = {item.image for item in labeled}
        unlabeled = [item for item in spec.read_list("train") if item.image not in known]
        where = f"{labeled_file}: nothing of the 'train' list is left, so"
    if not unlabeled:
        raise UserError(f"{where}: the unlabeled list is empty; for supervised training use split 'full'")
    return labeled, unlabeled


def find_split(spec: DatasetSpec, split: str) -> Path:
    """The folder of a split, see `resolve_split`.

    Raises:
        UserError: No folder with a `labeled.txt`; the message names the command that gets or makes it.
    """
    places = [spec.splits_dir / split, spec.splits_dir.parent / split]
    if spec.root is not None:
        places += [spec.root / split, spec.root / "splits" / split]
    places.append(Path(split))
    for place in places:
        if (place / "labeled.txt").is_file():
            return place
    short = split.removeprefix(f"{spec.name}/")
    name = f"{spec.name}/{short}"
    if name in published_names() or re.fullmatch(r"\w+/s4gan/[0-9.]+", name):
        remedy = f"run 'python -m splits get {name}'"
    else:
        target = spec.name if spec.splits_dir.parent == SPLITS else spec.source
        match = re.fullmatch(RANDOM_SPLIT, short)
        fraction, seed = (match.group(2).replace("_", "/"), match.group(1) or "0") if match else ("1/8", "0")
        remedy = (
            f"run 'python -m splits make {target} --fraction {fraction} --seed {seed}', or see "
            "'python -m splits list'"
        )
    raise UserError(f"{places[0]}: no labeled.txt there for split '{split}'; {remedy}")


def _read_role(spec: DatasetSpec, path: Path, evaluation: Mapping[Path, str], *, labels: bool) -> list[Item]:
    entries = read_entries(path)
    items = spec.find_items(entries, path, labels)
    refuse_evaluation_images(entries, items, path, evaluation)
    return items


def refuse_evaluation_images(
    entries: Iterable[Entry], items: Iterable[Item], path: Path, evaluation: Mapping[Path, str]
) -> None:
    """Check that no item of the list `path` is one of `evaluation`, see `evaluation_photos`.

    Raises:
        UserError: One is.
    """
    for entry, item in zip(entries, items, strict=True):
        if item.image in evaluation:
            raise UserError(
                f"{path}:{entry.line}: '{item.id}' is also in {evaluation[item.image]}; "
                "a split may not contain evaluation images"
            )


def evaluation_photos(spec: DatasetSpec) -> dict[Path, str]:
    """Photos of the evaluation lists at hand, with the name of the list."""
    found: dict[Path, str] = {}
    for name in ("test", "val"):
        if name in spec.ranges:
            found |= {item.image: f"the {name} list" for item in spec.read_list(name)}
        elif name in spec.lists and spec.lists[name].is_file():
            path = spec.lists[name]
            found |= {
                item.image: path.name
                for item in spec.find_items(read_entries(path), path, labels=False, tolerant=True)
            }
    return found


def split_of(labeled: Sequence[Item], unlabeled: Sequence[Item], name: str) -> Split:
    """A split of given items; masks of unlabeled ones are left out."""
    roles = [sha256_ids(item.id for item in items) for items in (labeled, unlabeled)]
    digest = hashlib.sha256("\n".join(roles).encode()).hexdigest()
    return Split(list(labeled), [replace(item, label=None) for item in unlabeled], name, digest)


def truth(spec: DatasetSpec, split: Split | None = None) -> dict[str, Any]:
    """What gives a figure its meaning, for checkpoints and results; the same wherever the files lie.

    Lists by the hash of their files, in order; label maps by theirs; and a few photos and masks of the split, by the
    hash of their beginnings, to know the data folder by.
    """
    maps = [label.lut.tobytes() for label in spec.labels] + [spec.label_map.tobytes()]
    if spec.label_format == "color":
        maps += [spec.palette.tobytes(), repr(spec.ignore_colors).encode()]
    ignored = np.flatnonzero(spec.label_map == IGNORE).tolist()
    found = {
        "dataset": spec.name,
        "classes": list(spec.classes),
        "label_map": hashlib.sha256(b"".join(maps)).hexdigest(),
        "ignore": ignored if len(ignored) < 9 else sha256_order(ignored),
        "reading": [spec.upright, spec.value_range and list(spec.value_range)],
    }
    if split is None:
        return found
    photos = [
        item for role in (split.labeled, split.unlabeled) for item in role[:: len(role) // LOOKED_AT + 1]
    ]
    masks = [item.label for item in photos if item.label is not None]
    files = {"photos": [item.image for item in photos], "masks": masks}
    return {
        "labeled": list_hash(spec, split.labeled),
        "unlabeled": list_hash(spec, split.unlabeled),
        **found,
        "files": look_at(
            spec, {kind: [_below(spec, path) for path in paths] for kind, paths in files.items()}
        ),
    }


def look_at(spec: DatasetSpec, files: Mapping[str, Iterable[str]]) -> dict[str, dict[str, int]]:
    """Checksums of files below the root by kind and name, those that cannot be read left out."""
    root = spec.root
    found = (
        {kind: {name: beginning(root / name) for name in names} for kind, names in files.items()}
        if root
        else {}
    )
    return {kind: {name: check for name, check in sums.items() if check} for kind, sums in found.items()}


def list_hash(spec: DatasetSpec, items: Iterable[Item]) -> str:
    """Hash of the files of a list, in order."""
    return sha256_order(
        f"{_below(spec, item.image)} {item.label and _below(spec, item.label)}" for item in items
    )


def changed(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """What differs between two of `truth`, in words; an entry that one of them lacks is not compared.

    Of the files looked at, most must differ: one that has been restored is no other data folder.
    """
    both = saved.keys() & current.keys()
    found = [words for key, words in MEANING.items() if key in both and saved[key] != current[key]]
    for kind in ("photos", "masks"):
        ours, theirs = (one.get("files", {}).get(kind, {}) for one in (saved, current))
        common = ours.keys() & theirs.keys()
        different = sum(ours[path] != theirs[path] for path in common)
        if 2 * different > len(common):
            found.append(f"the {kind} themselves ({different} of {len(common)} looked at)")
    return found


def _below(spec: DatasetSpec, path: Path) -> str:
    return path.as_posix().removeprefix(f"{spec.root.as_posix()}/" if spec.root else "")


def beginning(path: Path) -> int:
    """Checksum of the first 64 KiB of a file and its length; 0 where it cannot be read, which training will say."""
    try:
        with path.open("rb") as file:
            return zlib.crc32(file.read(1 << 16), path.stat().st_size & 0xFFFFFFFF) or 1
    except OSError:
        return 0
