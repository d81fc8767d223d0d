"""Random splits: nested, covering the classes, from a seed."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from common.data.spec import IGNORE, DatasetSpec, Item
from common.errors import UserError
from splits.prepare.archives import progress


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


def _order(spec: DatasetSpec, items: Sequence[Item], seed: int) -> list[Item]:
    """A random order of photos with masks, of which every beginning is a labeled set; the smaller are nested.

    The order is a permutation of the sorted ids. Photos that show a class for the first time in it come first, so
    that small beginnings cover the classes as soon as they can; masks are read only until all classes have occurred.
    """
    shuffled = sorted(items, key=lambda item: item.id)
    random.Random(seed).shuffle(shuffled)
    seen: set[int] = set()
    first: list[Item] = []
    for item in progress(shuffled, "classes", len(shuffled)):
        if len(seen) == spec.num_classes:
            break
        new = _classes_of(spec, item) - seen
        if new:
            first.append(item)
            seen |= new
    front = {item.id for item in first}
    return first + [item for item in shuffled if item.id not in front]


def _classes_of(spec: DatasetSpec, item: Item) -> set[int]:
    return set(np.unique(spec.load_label(item)).tolist()) - {IGNORE}


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
    order = _order(spec, with_mask, seed)
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
        shown |= _classes_of(spec, item)
    return Drawn(labeled, unlabeled, [name for k, name in enumerate(spec.classes) if k not in shown])
