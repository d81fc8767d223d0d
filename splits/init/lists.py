"""Which photos to measure on: every class in both lists, what belongs together on one side."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from common.data.files import Uint8

Small = np.ndarray[Any, np.dtype[np.float32]]

SIDE = 16  # rows and columns of what photos are compared by
BITS = 20  # of the 256 of two photos' hashes that may differ in near-duplicates
LIKENESS = 0.97  # correlation of the two as small pictures, which flat ones need beside it
SHARE = 0.3  # of the photos with masks that are measured on
ROWS = 512


def look_at(photo: Uint8) -> tuple[tuple[int, int], Small]:
    """Height and width of a photo (H, W, 3), and a small grey picture (16, 17) of it."""
    small = cv2.resize(photo, (SIDE + 1, SIDE), interpolation=cv2.INTER_AREA)
    return (photo.shape[0], photo.shape[1]), small.astype(np.float32).mean(axis=2)


def near_duplicates(small: Mapping[str, Small]) -> list[tuple[str, str]]:
    """Pairs of photos that hardly differ: few bits of their difference hashes, and their small pictures correlate."""
    ids = list(small)
    if not ids:
        return []
    pictures = np.stack([small[number] for number in ids])
    signs = np.where(np.diff(pictures, axis=2) > 0, 1, -1).reshape(len(ids), -1).astype(np.float32)
    flat = pictures.reshape(len(ids), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True).clip(min=1e-6)
    pairs = []
    for first in range(0, len(ids), ROWS):
        rows = slice(first, first + ROWS)
        close = (signs[rows] @ signs.T >= SIDE * SIDE - 2 * BITS) & (flat[rows] @ flat.T >= LIKENESS)
        pairs += [(ids[first + a], ids[b]) for a, b in np.argwhere(close) if first + a < b]
    return pairs


def joined(ids: Iterable[str], pairs: Iterable[tuple[str, str]], group: Mapping[str, str]) -> list[list[str]]:
    """Groups of ids that share a name in `group` or are linked by pairs."""
    parent = {number: number for number in ids}

    def root(number: str) -> str:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    first: dict[str, str] = {}
    links = [(first.setdefault(group[number], number), number) for number in parent if number in group]
    for a, b in [*links, *pairs]:
        if a in parent and b in parent:
            parent[root(a)] = root(b)
    groups: dict[str, list[str]] = {}
    for number in parent:
        groups.setdefault(root(number), []).append(number)
    return list(groups.values())


def choose(groups: Sequence[Sequence[str]], shows: Mapping[str, set[int]], seed: int) -> list[str]:
    """Ids to measure on: about `SHARE` of all, every class in them and in the rest where its groups allow it.

    Args:
        groups: Ids that stay together.
        shows: The classes of each photo.
        seed: Of the order in which groups are tried.
    """
    order = [list(group) for group in groups]
    random.Random(seed).shuffle(order)
    classes = [set().union(*(shows[number] for number in group)) for group in order]
    total = sum(map(len, order))
    wanted = max(1, round(SHARE * total))
    left = Counter(k for shown in classes for k in shown)  # groups of the training part by class
    rare = sorted(left, key=lambda k: (left[k], k))
    chosen: list[int] = []

    def take(i: int) -> None:
        chosen.append(i)
        left.subtract(classes[i])

    def free(i: int) -> bool:
        count = sum(len(order[j]) for j in [*chosen, i])
        return i not in chosen and count < total and all(left[k] > 1 for k in classes[i])

    for k in rare:
        able = [i for i in range(len(order)) if k in classes[i] and free(i)]
        if able and not any(k in classes[i] for i in chosen):
            take(min(able, key=lambda i: len(order[i])))
    for i in range(len(order)):
        if free(i) and sum(len(order[j]) for j in [*chosen, i]) <= wanted:
            take(i)
    if not chosen and len(order) > 1:  # every photo shows a class that no other has
        take(min(range(len(order)), key=lambda i: len(order[i])))
    return sorted(number for i in chosen for number in order[i])
