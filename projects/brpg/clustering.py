"""From queues of features to prototypes: mini-batch k-means, compactness, adaptive numbers, scarce classes.

Runs once per training, on the host. Everything is float64 NumPy without linear-algebra libraries and draws from a
private generator of its own, so the same rows give the same prototypes on every machine and every rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.distributed import Dist, broadcast_object, gather_objects
from common.errors import UserError
from projects.brpg.memory import FeatureMemory, FeatureQueues, RankedQueues, ranked
from projects.brpg.settings import MethodConfig

Array = NDArray[Any]
Rows = NDArray[np.float64]
Measure = Literal["cos_sim", "l2", "l2_norm"]

BATCH = 100
SEEDINGS = 3
VALIDATION_ROWS = 3 * BATCH
MAX_PASSES = 100
RARE = 0.01  # a centre with less than this share of the largest weight is put elsewhere now and then
PATIENCE = 10
SCARCE = 10  # rows below which a queue does not suffice by itself
CHUNK = 4096  # rows whose distances are held at once


class Clusters(NamedTuple):
    """Centres (k, D) float64; their order carries no meaning."""

    centres: Rows
    steps: int


def squared_distances(rows: Array, centres: Rows) -> Rows:
    """Squared Euclidean distance of every row (n, D) to every centre (k, D): (n, k)."""
    return np.stack([np.square(rows - centre).sum(axis=1) for centre in centres], axis=1)


def assign(rows: Array, centres: Rows) -> tuple[NDArray[np.int64], float]:
    """Nearest centre of every row (n,), lowest index on ties, and the sum of the squared distances to them."""
    labels, cost = np.empty(len(rows), dtype=np.int64), 0.0
    for start in range(0, len(rows), CHUNK):
        part = slice(start, start + CHUNK)
        distances = squared_distances(rows[part].astype(np.float64), centres)
        labels[part] = distances.argmin(axis=1)
        cost += float(distances.min(axis=1).sum())
    return labels, cost


def _nearest(batch: Rows, centres: Rows) -> tuple[NDArray[np.int64], float]:
    """Nearest centre of the rows of a batch and the sum of their squared distances to it."""
    distances = squared_distances(batch, centres)
    return distances.argmin(axis=1), float(distances.min(axis=1).sum())


def _move(batch: Rows, nearest: NDArray[np.int64], centres: Rows, weights: Rows) -> None:
    """Let every centre be the running mean of all rows it has been given, in place."""
    for j in range(len(centres)):
        own = batch[nearest == j]
        if len(own):
            centres[j] = (weights[j] * centres[j] + own.sum(axis=0)) / (weights[j] + len(own))
            weights[j] += len(own)


def _seed_centres(pool: Rows, k: int, rng: np.random.RandomState) -> Rows:
    """`k` rows of the pool that lie far apart (k-means++, greedy over a few candidates)."""
    trials = 2 + int(math.log(k))
    centres = [pool[rng.randint(len(pool))]]
    nearest = squared_distances(pool, centres[0][None])[:, 0]
    for _ in range(1, k):
        marks = rng.random_sample(trials) * nearest.sum()
        candidates = np.searchsorted(np.cumsum(nearest), marks).clip(max=len(pool) - 1)
        reached = np.minimum(nearest[:, None], squared_distances(pool, pool[candidates]))
        best = int(reached.sum(axis=0).argmin())
        centres.append(pool[candidates[best]])
        nearest = reached[:, best]
    return np.stack(centres)


def _reassign_rare(batch: Rows, centres: Rows, weights: Rows, rng: np.random.RandomState) -> None:
    """Put centres of next to no weight on random rows of the batch, in place."""
    rare = weights < RARE * weights.max()
    if rare.sum() > BATCH / 2:
        rare[np.argsort(weights, kind="stable")[BATCH // 2 :]] = False
    if not rare.any():
        return
    chosen = rng.choice(BATCH, size=int(rare.sum()), replace=False)
    centres[rare] = batch[chosen]
    weights[rare] = weights[~rare].min()


def minibatch_kmeans(rows: Array, k: int, seed: int = 0) -> Clusters:
    """Centres (k, D) of rows (n, D), as the library version that the original pins finds them.

    The kind, size and order of the draws are part of the definition: three seedings judged by up to 300 rows,
    then batches of 100 rows until the smoothed cost has failed to improve ten times in a row.

    Args:
        rows: floating point, n >= k.
        k: number of centres.
        seed: of the private generator, which starts anew with every call.

    Raises:
        ValueError: fewer rows than centres.

    Source: the call of scikit-learn 0.20.1's `MiniBatchKMeans` in `u2pl/utils/utils.py` (`prototype_KMeans`).
    """
    n = len(rows)
    if n < k:
        raise ValueError(f"{n} rows cannot form {k} clusters")
    rng = np.random.RandomState(seed)

    def draw(count: int) -> Rows:
        return rows[rng.randint(0, n, count)].astype(np.float64)

    size = min(VALIDATION_ROWS, n)
    validation = draw(size)
    found: list[tuple[float, Rows, Rows]] = []
    for _ in range(SEEDINGS):
        pool = draw(size) if size < n else rows.astype(np.float64)
        centres, weights = _seed_centres(pool, k, rng), np.zeros(k)
        _move(validation, _nearest(validation, centres)[0], centres, weights)
        cost = _nearest(validation, centres)[1]
        found.append((cost, centres, weights))
    _, centres, weights = min(found, key=lambda one: one[0])

    smoothed, lowest, failures = 0.0, math.inf, 0
    share = min(1.0, 2.0 * BATCH / (n + 1))
    steps = MAX_PASSES * math.ceil(n / BATCH)
    for step in range(1, steps + 1):
        batch = draw(BATCH)
        nearest, cost = _nearest(batch, centres)
        if step % (10 + int(weights.min())) == 0:  # the batch stays assigned to the centres before this
            _reassign_rare(batch, centres, weights, rng)
        _move(batch, nearest, centres, weights)
        smoothed = cost / BATCH if step == 1 else (1 - share) * smoothed + share * cost / BATCH
        failures = 0 if smoothed < lowest else failures + 1
        lowest = min(lowest, smoothed)
        if failures == PATIENCE:
            return Clusters(centres, step)
    return Clusters(centres, steps)


def confidence_weighted_centres(feats: Array, conf: Array, labels: Array, centres: Rows) -> Rows:
    """Mean of the features (n, D) of every cluster, weighted by their confidence (n,): (k, D).

    A cluster without rows, or without any confidence, keeps its centre (k, D) (the original: NaN).
    """
    result = centres.copy()
    for j in range(len(centres)):
        weights = conf[labels == j].astype(np.float64)
        if weights.sum() > 0:
            result[j] = (weights[:, None] * feats[labels == j]).sum(axis=0) / weights.sum()
    return result


# --- numbers of prototypes -------------------------------------------------------------------------------------


@torch.no_grad()
def compactness(feats: Tensor, measure: Measure) -> Tensor:
    """How alike the features (n, D) of a class are, a float64 scalar on their device.

    `cos_sim`: mean cosine similarity to the mean feature (small = scattered); `l2`: mean distance to it;
    `l2_norm`: the same of features and mean scaled to unit length (large = scattered). A zero vector among the
    features makes the scaled measures NaN, as in the original.
    """
    rows = feats.double()
    centre = rows.mean(dim=0)
    if measure == "l2":
        return (rows - centre).norm(dim=1).mean()
    rows, centre = rows / rows.norm(dim=1, keepdim=True), centre / centre.norm()
    if measure == "l2_norm":
        return (rows - centre).norm(dim=1).mean()
    return (rows @ centre).mean()


def least_compact(values: Tensor, measure: Measure, proportion: float) -> Tensor:
    """Classes (K,) bool that get more prototypes: the given share of K (rounded half to even, at least one), and ties.

    Args:
        values: (K,) compactness; infinite for a class that cannot be chosen.
        measure: of the values.
        proportion: 0..1.
    """
    count = max(1, round(proportion * len(values)))
    ordered = values.sort().values  # NaN last, as NumPy sorts
    if measure == "cos_sim":
        return values <= ordered[count - 1]
    return values >= ordered[-count]


# --- scarce classes --------------------------------------------------------------------------------------------


class QueueRows(NamedTuple):
    """Content of one queue: features (n, D) and confidences (n,)."""

    feats: Tensor
    conf: Tensor

    def part(self, start: int, end: int) -> QueueRows:
        """Rows `start` to `end` (exclusive)."""
        return QueueRows(self.feats[start:end], self.conf[start:end])


def contents(queue: FeatureQueues, k: int) -> QueueRows:
    """What the queue of class `k` holds: oldest first, or, of a ranked queue, least confident first."""
    count = int(queue.lengths[k])
    slots = queue.slots(k, torch.arange(count, device=queue.feats.device))
    if isinstance(queue, RankedQueues):
        start, size = int(queue.offsets[k]), int(queue.capacity[k])
        part = slice(start, start + size)
        order = ranked(queue.owner[part], queue.conf[part], queue.arrival[part])
        slots = start + order[size - count :]
    return QueueRows(queue.feats[slots], queue.conf[slots])


def refill(
    high: QueueRows, low: QueueRows, scarce: QueueRows, capacity: int, name: str = "a class"
) -> tuple[QueueRows, QueueRows]:
    """High- and low-confidence rows of a class, replaced where fewer than ten were collected.

    Without enough sure features the most probable ones of the scarce queue stand in, at most half its capacity;
    without enough of both kinds the scarce queue is cut into halves.

    Args:
        high: rows of the queue of that kind.
        low: likewise.
        scarce: rows of whatever confidence, least probable first.
        capacity: of the scarce queue.
        name: of the class, for the message.

    Raises:
        UserError: enough sure features, but not enough unsure ones, for which there is no rule.

    Source: the start of `prototype_KMeans_for_coco` in `u2pl/utils/utils.py`.
    """
    rows = len(scarce.conf)
    if len(high.conf) >= SCARCE:
        if len(low.conf) < SCARCE:
            raise UserError(
                f"clustering: {name} has {len(high.conf)} confident features but only {len(low.conf)} others; set "
                "method.scarce_classes=fewer, or collect longer (method.collect_epochs)"
            )
        return high, low
    if len(low.conf) >= SCARCE:
        return scarce.part(max(0, rows - capacity // 2), rows), low
    half = rows // 2
    return scarce.part(half, rows), scarce.part(0, half)


# --- all of it -------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """One clustering: the class, the kind of its queue and the number of prototypes."""

    k: int
    kind: str
    number: int


def class_rows(memory: FeatureMemory, method: MethodConfig, k: int, name: str) -> dict[str, QueueRows]:
    """The rows of class `k` by kind, after `refill` where there is a scarce queue.

    Raises:
        UserError: see `refill` (`scarce_classes: stop`).
    """
    kinds = ("random",) if method.prototype_kind == "random" else ("high", "low")
    rows = {kind: contents(memory.queue(kind), k) for kind in kinds}
    if not method.scarce_queue:
        return rows
    enough = {kind: len(one.conf) >= SCARCE for kind, one in rows.items()}
    wanted = (enough[kind] for kind, number in method.base_numbers.items() if number)
    if all(wanted) or (enough["high"] and method.scarce_classes == "fewer"):
        return rows
    spare = memory.queue("scarce")
    high, low = refill(
        rows["high"], rows["low"], contents(spare, k), int(spare.capacity[k]), f"class '{name}'"
    )
    return {"high": high, "low": low}


def plan(memory: FeatureMemory, method: MethodConfig, names: Sequence[str]) -> list[Problem]:
    """All clusterings, class by class and high before low, with their adaptive numbers.

    Raises:
        UserError: a class has fewer features than prototypes (`scarce_classes: stop`).
    """
    bases, adaptive = method.base_numbers, method.extra_prototypes > 0
    if method.prototype_kind == "random":
        bases = {"random": sum(bases.values())}
    counts: dict[str, list[int]] = {kind: [] for kind in bases}
    values: dict[str, list[Tensor]] = {kind: [] for kind in bases}
    for k, name in enumerate(names):
        for kind, rows in class_rows(memory, method, k, name).items():
            counts[kind].append(len(rows.conf))
            if adaptive:
                values[kind].append(_spread(rows, method.compactness))
    numbers = {kind: [base] * len(names) for kind, base in bases.items()}
    if adaptive:
        for kind, base in bases.items():
            chosen = least_compact(torch.stack(values[kind]), method.compactness, method.add_proportion)
            numbers[kind] = [base + method.extra_prototypes * flag * (base > 0) for flag in chosen.tolist()]
    problems = [Problem(k, kind, numbers[kind][k]) for k in range(len(names)) for kind in bases]
    return [_affordable(one, counts[one.kind][one.k], method, names[one.k]) for one in problems if one.number]


def _spread(rows: QueueRows, measure: Measure) -> Tensor:
    """Compactness of a class; without rows the value that is never chosen."""
    if len(rows.conf):
        return compactness(rows.feats, measure)
    never = math.inf if measure == "cos_sim" else -math.inf
    return torch.full((), never, dtype=torch.float64, device=rows.feats.device)


def _affordable(problem: Problem, rows: int, method: MethodConfig, name: str) -> Problem:
    """The problem itself if there are enough rows, with fewer prototypes if that is allowed."""
    if rows >= problem.number:
        return problem
    if method.scarce_classes == "fewer":
        return problem._replace(number=rows)
    raise UserError(
        f"clustering: class '{name}' has {rows} features in the queue '{problem.kind}' but needs {problem.number}; "
        "collect longer (method.collect_epochs), change method.high_threshold, or set method.scarce_classes=fewer"
    )


def solve(rows: QueueRows, number: int, method: MethodConfig) -> Rows:
    """The prototypes (number, D) float64 of one class and kind."""
    feats = rows.feats.cpu().numpy()
    if not number:
        return np.zeros((0, feats.shape[1]))
    centres = minibatch_kmeans(feats, number, method.cluster_seed).centres
    if method.prototype_kind == "prob":
        labels, _ = assign(feats, centres)
        return confidence_weighted_centres(feats, rows.conf.cpu().numpy(), labels, centres)
    return centres


def cluster(memory: FeatureMemory, method: MethodConfig, names: Sequence[str], dist: Dist) -> list[Tensor]:
    """Prototypes of every class, (P_k, D) float64: those of high confidence, then those of low.

    All ranks must call with equal queues; each does its share of the clusterings and gets all results, so the
    prototypes are equal everywhere. Class names are for messages.

    Raises:
        UserError: see `plan`.

    Source: `prototype_KMeans`, `prototype_KMeans_for_coco` and `prototype_KMeans_random` in `u2pl/utils/utils.py`.
    """
    problems = broadcast_object(plan(memory, method, names), dist)
    own: dict[int, Rows] = {}
    for k in range(dist.rank, len(names), dist.world_size):
        rows = class_rows(memory, method, k, names[k])
        parts = [solve(rows[one.kind], one.number, method) for one in problems if one.k == k]
        own[k] = np.concatenate(parts)
    solved = {k: found for part in gather_objects(own, dist) for k, found in part.items()}
    return [torch.from_numpy(solved[k]) for k in range(len(names))]
