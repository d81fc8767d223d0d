"""K-means of the pixel features of one class. Runs once per training, so the host may wait for the device here."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.numerics.similarity import full_float32

N_INIT = 10
MAX_PASSES = 300
# Of the features' mean variance: centres that move less have arrived. The last rows to settle take most passes and move
# the centres by next to nothing.
TOLERANCE = 1e-6
CHUNK = 16384  # rows whose distances are held at once


class Clusters(NamedTuple):
    """Centres by descending size.

    Attributes:
        centres: (P, D).
        sizes: (P,) int64, features nearest to each; a repeated centre has that of the first.
        distinct: how many of the centres are not repetitions.
    """

    centres: Tensor
    sizes: Tensor
    distinct: int


class _Found(NamedTuple):
    centres: Tensor
    labels: Tensor
    cost: float


def cluster(features: Tensor, count: int, seed: int, n_init: int = N_INIT) -> Clusters:
    """Euclidean k-means: seeding by k-means++, `n_init` attempts, the one of least cost; centres are cluster means.

    Where fewer than `count` features differ, each is a centre and the centres are repeated cyclically.

    Args:
        features: (n, D) float32 or float64, n at least 1, on any device.
        count: P.
        seed: of the private generator on the host.
        n_init: attempts.

    Raises:
        ValueError: there is no feature, or no centre is wanted.
    """
    if len(features) == 0 or count < 1 or n_init < 1:
        raise ValueError(f"{len(features)} features cannot give {count} centres in {n_init} attempts")
    offset = features.mean(dim=0)
    rows = features - offset  # distances of float32 lose their digits far from zero
    rng, best = np.random.RandomState(seed), None
    for _ in range(n_init):
        seeds = _seed_centres(rows, count, rng)
        few = len(seeds) < count
        found = _Found(seeds, _assign(rows, seeds)[0], 0.0) if few else _lloyd(rows, seeds)
        if best is None or found.cost < best.cost:
            best = found
        if few:
            break
    assert best is not None
    sizes = torch.bincount(best.labels, minlength=len(best.centres))
    order = sizes.argsort(descending=True, stable=True)
    place = order[torch.arange(count, device=order.device) % len(order)]
    return Clusters(best.centres[place] + offset, sizes[place], len(order))


def _seed_centres(rows: Tensor, count: int, rng: np.random.RandomState) -> Tensor:
    """Up to `count` rows that lie far apart (k-means++, greedy over a few candidates); fewer if no more differ."""
    trials = 2 + int(math.log(count))
    chosen = [int(rng.randint(len(rows)))]
    nearest = _distances(rows, rows[chosen[0]])
    while len(chosen) < count:
        summed = nearest.double().cumsum(0)
        if float(summed[-1]) == 0:
            break
        marks = torch.from_numpy(rng.random_sample(trials)).to(summed.device) * summed[-1]
        candidates = torch.searchsorted(summed, marks, right=True).clamp(max=len(rows) - 1).tolist()
        reached = [torch.minimum(nearest, _distances(rows, rows[i])) for i in candidates]
        best = int(torch.stack([r.double().sum() for r in reached]).argmin())
        chosen.append(candidates[best])
        nearest = reached[best]
    return rows[torch.tensor(chosen, device=rows.device)]


def _distances(rows: Tensor, centre: Tensor) -> Tensor:
    """Squared distances (n,) of rows (n, D) to a centre (D,), exactly 0 for equal rows."""
    return torch.cat([(part - centre).square().sum(dim=1) for part in rows.split(CHUNK)])


def _assign(rows: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centre of every row (n,) and the squared distance to it (n,)."""
    labels, distances = [], []
    length = centres.square().sum(dim=1)
    with full_float32():
        for part in rows.split(CHUNK):
            least = (length - 2 * part @ centres.t()).min(dim=1)
            labels.append(least.indices)
            distances.append((least.values + part.square().sum(dim=1)).clamp(min=0))
    return torch.cat(labels), torch.cat(distances)


def _means(rows: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean (P, D) of the rows of every cluster and their numbers (P,); zero for an empty one."""
    total = torch.zeros(count, rows.shape[1], dtype=torch.float64, device=rows.device)
    with full_float32():
        for part, own in zip(rows.split(CHUNK), labels.split(CHUNK), strict=True):
            total += (F.one_hot(own, count).to(part.dtype).t() @ part).double()
    sizes = torch.bincount(labels, minlength=count)
    return (total / sizes.clamp(min=1).unsqueeze(1)).to(rows.dtype), sizes


def _lloyd(rows: Tensor, centres: Tensor) -> _Found:
    """Move the centres to the means of their rows until no row changes its centre, or they hardly move any more."""
    labels, distances = _assign(rows, centres)
    arrived = TOLERANCE * float(rows.square().mean())  # the rows have mean 0
    for _ in range(MAX_PASSES):
        former = centres
        centres, sizes = _means(rows, labels, len(centres))
        empty = (sizes == 0).nonzero().flatten()
        if len(empty):  # put where the rows fit worst
            centres[empty] = rows[distances.topk(len(empty)).indices]
        before = labels
        labels, distances = _assign(rows, centres)
        if torch.equal(before, labels) or float((centres - former).square().sum()) <= arrived:
            break
    return _Found(centres, labels, float(distances.double().sum()))
