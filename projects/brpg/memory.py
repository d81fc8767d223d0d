"""Which pixels give features, the class-wise queues that keep them, and the classes' confidence.

Legend: B images, K classes, D channels, (h, w) feature size, N = B * h * w pixels, S rows. Everything has a fixed
shape: what is not there is padded with class -1, so nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data.spec import IGNORE
from common.distributed import Dist, all_gather_padded
from common.mean_teacher.contrast import compact, nearest, pixel_rows
from common.mean_teacher.queues import ClassQueues, finite_rows, starts_of
from common.models.deeplab import Outputs
from common.numerics.losses import in_order
from common.numerics.similarity import grouped_sums
from projects.brpg.settings import MethodConfig

SCARCE_PER_CLASS = 5000  # rows that one step of one process gives the scarce queue per class at most


class Keys(Protocol):
    """A source of random numbers."""

    def __call__(self, count: int, /) -> Tensor:
        """Numbers (count,) in [0, 1) whose ascending order is a random permutation."""


class Rows(NamedTuple):
    """Features (S, D) with their confidence (S,) and class (S,) int64; class -1 marks padding."""

    feats: Tensor
    conf: Tensor
    classes: Tensor


class Pixels(NamedTuple):
    """What the networks say about the N pixels of some images, in (image, row, column) order, each (N,)."""

    conf: Tensor  # largest probability
    classes: Tensor  # its class
    high: Tensor  # bool: gives a high-confidence feature
    low: Tensor  # bool: gives a low-confidence feature


Collected = dict[str, Rows]  # what one step of one process brings to each queue, by its name


@torch.no_grad()
def first_in_order(mask: Tensor, keys: Tensor, size: int) -> Tensor:
    """Positions of the first `size` true entries of `mask` (N,) in ascending order of `keys` (N,), padded with -1.

    Returns:
        (min(size, N),) int64.
    """
    size, keys = min(size, len(keys)), keys.masked_fill(~mask, torch.inf)
    if keys.is_cuda or not size:
        place = keys.argsort(stable=True)[:size]
        return place.where(mask.gather(0, place), -1)
    # a CPU sorts those alone that come first
    near = (mask & (keys <= in_order(keys, size - 1))).nonzero().flatten()
    place = near[keys[near].argsort(stable=True)[:size]]
    return F.pad(place, (0, size - len(place)), value=-1)


def positions_like(keys: Tensor) -> Tensor:
    """Sorting keys (N,) that keep the order."""
    return torch.arange(len(keys), device=keys.device, dtype=torch.float64)


def uniform_sample(mask: Tensor, keys: Tensor, size: int) -> Tensor:
    """`size` random true entries of a mask (N,) in random order; all of them in their own order if no more exist.

    Returns:
        Positions (min(size, N),), padded with -1.
    """
    return first_in_order(mask, torch.where(mask.sum() > size, keys.double(), positions_like(keys)), size)


def class_weights(classes: Tensor, mask: Tensor, num_classes: int, gamma: float) -> tuple[Tensor, Tensor]:
    """Rows per class (K,) and their weights n^-gamma normalized over the classes present (K,), zero elsewhere.

    Args:
        classes: (N,) int64 in 0..K-1 where the mask holds.
        mask: (N,) bool.
        num_classes: K.
        gamma: exponent.
    """
    counts = torch.zeros(num_classes + 1, dtype=torch.long, device=classes.device)
    counts.scatter_add_(0, classes.where(mask, num_classes), torch.ones_like(classes))
    counts = counts[:-1]
    weights = counts.clamp(min=1).double() ** -gamma * (counts > 0)
    return counts, weights / weights.sum().clamp(min=torch.finfo(torch.float64).tiny)


def balanced_sample(
    classes: Tensor, mask: Tensor, keys: Tensor, size: int, num_classes: int, gamma: float
) -> Tensor:
    """`size` true entries drawn without replacement with the weights of their classes, in the order drawn.

    Drawing one after the other from what is left is the same as an exponential race with these weights, which
    needs no loop. All entries in their own order if no more exist.

    Args:
        classes: (N,) int64.
        mask: (N,) bool.
        keys: (N,) uniform numbers in [0, 1).
        size: of the sample.
        num_classes: K.
        gamma: exponent of the weights.

    Returns:
        Positions (min(size, N),), padded with -1.

    Source: `class_balance_sample_high_low` in `u2pl/utils/utils.py`.
    """
    _, weights = class_weights(classes, mask, num_classes, gamma)
    weight = weights.gather(0, classes.where(mask, 0))
    race = -torch.log1p(-keys.double()) / weight
    return first_in_order(mask, torch.where(mask.sum() > size, race, positions_like(keys)), size)


# --- which pixels ----------------------------------------------------------------------------------------------


@torch.no_grad()
def confidences(logits: Tensor, as_half: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities (B, K, h, w), the largest of each pixel (N,) and its class (N,) of low-resolution logits.

    With `as_half` they are rounded to fp16, as the original's softmax outside autocast is
    (QUIRK quirks.half_confidence).
    """
    probs = logits.softmax(dim=1)
    if as_half:
        probs = probs.half().to(logits.dtype)
    conf, classes = probs.max(dim=1)
    return probs, conf.flatten(), classes.flatten()


def rounded(threshold: float, as_half: bool) -> float:
    """The threshold as a comparison in fp16 sees it."""
    return np.float64(np.float16(threshold)) if as_half else threshold


@torch.no_grad()
def labeled_pixels(
    conf: Tensor, classes: Tensor, truth: Tensor, high: float | Tensor, low: float | None
) -> Pixels:
    """Pixels (N,) whose class is right, split by confidence.

    Args:
        conf: (N,).
        classes: (N,) predicted classes.
        truth: (N,) labels at feature size, 255 = ignore.
        high: threshold, or one per class (K,), at and above which confidence is high.
        low: confidence at and below which a feature is not used; None uses all.
    """
    limit = high.to(conf.dtype)[classes] if isinstance(high, Tensor) else high
    right = truth == classes
    sure = conf >= limit
    unsure = ~sure if low is None else ~sure & (conf > low)
    return Pixels(conf, classes, right & sure, right & unsure)


@torch.no_grad()
def confidence_thresholds(method: MethodConfig, confidence: Tensor) -> Tensor:
    """Thresholds (K,) that follow the classes' confidence (K,); `fix_classes` keep the fixed one."""
    limits = confidence.clamp(method.thre_min, method.thre_max)
    for k in method.fix_classes:
        limits[k] = method.high_threshold
    return limits


@torch.no_grad()
def scarce_rows(
    feats: Tensor, probs: Tensor, truth: Tensor, keys: Tensor, per_class: int = SCARCE_PER_CLASS
) -> Rows:
    """Features of labeled pixels with the probability of their label, at most `per_class` random ones per class.

    Args:
        feats: (B, D, h, w).
        probs: (B, K, h, w).
        truth: (B, h, w) labels, 255 = ignore (the original cannot take it).
        keys: (N,) random numbers.
        per_class: see above.
    """
    num_classes, flat = probs.shape[1], truth.flatten()
    valid = flat != IGNORE
    conf = probs.gather(1, (flat * valid).view_as(truth).unsqueeze(1)).flatten()
    classes = flat.where(valid, num_classes)
    counts = torch.zeros(num_classes + 1, dtype=torch.long, device=flat.device)
    counts.scatter_add_(0, classes, torch.ones_like(classes))
    order = torch.where(counts[classes] > per_class, keys.double(), positions_like(keys)).argsort(stable=True)
    ordered, second = classes[order].sort(stable=True)  # by class, then by key
    order = order[second]
    place = torch.arange(len(order), device=order.device) - starts_of(ordered, num_classes)[ordered]
    chosen = (place < per_class) & (ordered < num_classes)
    found = compact(chosen, min(len(order), num_classes * per_class))
    index = order[found.clamp(max=len(order) - 1)]
    return Rows(pixel_rows(feats, index), conf[index], classes[index].where(found < len(order), -1))


def rows_of_both(first: Tensor, second: Tensor, index: Tensor) -> Tensor:
    """Rows (S, D) at positions (S,) in the pixels of one feature map (B, D, h, w) and then of another.

    The maps need not be joined for it. On a CPU, where asking for flags is free, each row is picked once.
    """
    count = first.numel() // first.shape[1]
    own = index < count
    if index.is_cuda:
        rows = (
            pixel_rows(first, index.clamp(max=count - 1)),
            pixel_rows(second, (index - count).clamp(min=0)),
        )
        return torch.where(own.unsqueeze(1), *rows)
    found = first.new_empty(len(index), first.shape[1])
    found[own], found[~own] = pixel_rows(first, index[own]), pixel_rows(second, index[~own] - count)
    return found


@torch.no_grad()
def collect(
    student: Outputs,
    y_l: Tensor,
    teacher: Outputs,
    method: MethodConfig,
    keys: Keys,
    *,
    confidence: Tensor | None = None,
    as_half: bool = False,
) -> Collected:
    """Choose the features of one step for the queues, see the README card.

    Args:
        student: of the labeled images in training mode, without graph.
        y_l: (B, H, W) labels, 255 = ignore.
        teacher: of the weak views in evaluation mode.
        method: thresholds and caps.
        keys: random numbers.
        confidence: (K,) the classes' confidence, needed by `threshold_type: csp`.
        as_half: see `confidences`.

    Source: the collection stage of `train_semi.py`.
    """
    assert student.feats is not None, "the representation head is part of the method"
    assert teacher.feats is not None
    truth = nearest(y_l, (student.logits.shape[2], student.logits.shape[3]))
    probs, conf, classes = confidences(student.logits, as_half)
    if method.threshold_type == "csp":
        assert confidence is not None, "csp needs the classes' confidence"
        labeled = labeled_pixels(
            conf, classes, truth.flatten(), confidence_thresholds(method, confidence), None
        )
    else:
        labeled = labeled_pixels(
            conf, classes, truth.flatten(), rounded(method.high_threshold, as_half), method.low_threshold
        )
    _, conf_u, classes_u = confidences(teacher.logits, as_half)
    sure_u = conf_u >= rounded(method.pseudo_threshold, as_half)
    unlabeled = Pixels(conf_u, classes_u, sure_u, torch.zeros_like(sure_u))
    images, num_classes = (len(student.feats), len(teacher.feats)), probs.shape[1]
    chosen = _sample(labeled, unlabeled, images, num_classes, method, keys)
    conf, classes = torch.cat((conf, conf_u)), torch.cat((classes, classes_u))
    queues: Collected = {}
    for name, place in chosen.items():
        index = place.clamp(min=0)
        feats = rows_of_both(student.feats, teacher.feats, index)
        queues[name] = Rows(feats, conf[index], classes[index].where(place >= 0, -1))
    if method.scarce_queue:
        queues["scarce"] = scarce_rows(student.feats, probs, truth, keys(len(labeled.conf)))
    return queues


def _sample(
    labeled: Pixels,
    unlabeled: Pixels,
    images: tuple[int, int],
    num_classes: int,
    method: MethodConfig,
    keys: Keys,
) -> dict[str, Tensor]:
    """Positions in (labeled, unlabeled) pixels of the features for each queue, padded with -1."""
    n, share = len(labeled.conf), method.sample_per_image
    cap, cap_all = share * images[0], share * sum(images)
    # labeled pixels come class by class where every class has a threshold of its own
    order = (
        labeled.classes.argsort(stable=True)
        if method.threshold_type == "csp"
        else torch.arange(n, device=labeled.conf.device)
    )
    high, low = labeled.high[order], labeled.low[order]
    order_u = torch.arange(n, n + len(unlabeled.conf), device=order.device)

    def at(order: Tensor, place: Tensor) -> Tensor:
        return order[place.clamp(min=0)].where(place >= 0, -1)

    def balanced(classes: Tensor, chosen: Tensor, size: int) -> Tensor:
        return balanced_sample(classes, chosen, keys(len(chosen)), size, num_classes, method.gamma)

    if method.prototype_kind == "random":
        every = torch.cat((order, order, order_u))
        chosen = torch.cat((high, low, unlabeled.high))
        if method.class_balanced:
            classes = torch.cat((labeled.classes, unlabeled.classes))[every]
            return {"random": at(every, balanced(classes, chosen, cap_all + cap))}
        return {"random": at(every, uniform_sample(chosen, keys(len(chosen)), cap_all + cap))}
    if method.class_balanced:
        own = labeled.classes[order]
        parts = (
            at(order, balanced(own, high, cap)),
            at(order_u, balanced(unlabeled.classes, unlabeled.high, cap)),
        )
        return {"high": torch.cat(parts), "low": at(order, balanced(own, low, cap))}
    every, chosen = torch.cat((order, order_u)), torch.cat((high, unlabeled.high))
    return {
        "high": at(every, first_in_order(chosen, keys(len(chosen)).double(), cap_all)),
        "low": at(order, uniform_sample(low, keys(len(low)), cap)),
    }


# --- queues ----------------------------------------------------------------------------------------------------


class FeatureQueues(ClassQueues):
    """Queues of features with their confidence.

    Source: `queue_high_low_feat_sample` in `u2pl/utils/utils.py` (there: lists of host tensors).
    """

    feats: Tensor
    conf: Tensor

    def __init__(self, sizes: Sequence[int], dim: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(sizes, dim, dtype, name="feats", also=("conf",))

    def append(self, rows: Rows) -> Tensor:
        """Append rows to the queues of their classes, see `push`. Returns rows per class (K,)."""
        return self.push(rows.classes, rows.feats, rows.conf)


class RankedQueues(FeatureQueues):
    """Queues that keep the most confident features instead of the newest; among equals the newest.

    Source: `queue_back_feat_sample` in `u2pl/utils/utils.py`, which sorts all rows anew at every step.
    """

    arrival: Tensor
    owner: Tensor

    def __init__(self, sizes: Sequence[int], dim: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(sizes, dim, dtype)
        self.conf.fill_(-torch.inf)  # an empty slot is the first to go
        self.register_buffer("arrival", torch.full((len(self.conf),), -1))
        owners = [torch.full((size,), k) for k, size in enumerate(sizes)]
        self.register_buffer("owner", torch.cat([*owners, torch.full((1,), len(sizes))]), persistent=False)

    @torch.no_grad()
    def push(self, classes: Tensor, keys: Tensor, *also: Tensor) -> Tensor:
        """Keep the best of the rows held and these (S, D), with their confidence (S,). Returns rows per class (K,)."""
        num_classes, (conf,) = len(self.written), also
        classes = finite_rows(classes, keys, conf)
        held, new = len(self.conf), len(classes)
        now = self.arrival.max() + 1
        arrival = torch.cat((self.arrival, now + torch.arange(new, device=classes.device)))
        owner = torch.cat((self.owner, classes.where(classes >= 0, num_classes)))
        order = ranked(owner, torch.cat((self.conf, conf.to(self.conf.dtype))), arrival)
        # the group of a class holds its slots, taken or empty, and its new rows: as many as there are slots stay
        ordered = owner[order]
        starts = starts_of(ordered, num_classes + 1)
        least = starts[1:] - F.pad(self.capacity, (0, 1))
        stays = torch.arange(len(order), device=order.device) >= least[ordered]
        free = (order < held) & ~stays & (ordered < num_classes)
        come = (order >= held) & stays
        # as many slots become free as rows come, class by class: the j-th row takes the j-th slot; what is beyond all
        # of them is the row after the last
        trash, order = held - 1, F.pad(order, (0, 1), value=held + new)
        slot = torch.full((new + 1,), trash, device=order.device)
        slot = slot.scatter_(0, order[compact(come, new)] - held, order[compact(free, new)])[:new]
        self.write(slot, keys, conf)
        self.arrival.index_copy_(0, slot, arrival[held:])
        self.conf[trash].fill_(-torch.inf)
        self.arrival[trash].fill_(-1)
        counts = starts[:-1].diff() - self.capacity
        self.written += counts
        return counts


def ranked(owner: Tensor, conf: Tensor, arrival: Tensor) -> Tensor:
    """Order (S,) by owner, then confidence, then arrival."""
    order = arrival.argsort()
    order = order[conf[order].argsort(stable=True)]
    return order[owner[order].argsort(stable=True)]


class FeatureMemory(nn.ModuleDict):
    """The queues of all kinds that a configuration needs: `high` and `low` or `random`, and `scarce`."""

    def __init__(self, method: MethodConfig, num_classes: int, dim: int) -> None:
        size, dtype = method.queue_size, getattr(torch, method.queue_dtype)
        if method.prototype_kind == "random":
            queues: dict[str, nn.Module] = {"random": FeatureQueues([2 * size] * num_classes, dim, dtype)}
        else:
            queues = {name: FeatureQueues([size] * num_classes, dim, dtype) for name in ("high", "low")}
        if method.scarce_queue:
            queues["scarce"] = RankedQueues([2 * size] * num_classes, dim, dtype)
        super().__init__(queues)

    def push(self, collected: Collected, dist: Dist) -> dict[str, Tensor]:
        """Append this step's rows of all ranks, rank by rank; their number per class (K,) for each queue."""
        counts = {}
        for name, rows in collected.items():
            queue = self.queue(name)
            stored = rows._replace(feats=rows.feats.to(queue.feats.dtype))  # what is not kept need not travel
            counts[name] = queue.append(gather(stored, dist))
        return counts

    def queue(self, name: str) -> FeatureQueues:
        """The queue of a kind."""
        queue = self[name]
        assert isinstance(queue, FeatureQueues)
        return queue


def gather(rows: Rows, dist: Dist) -> Rows:
    """The rows of all ranks, in the order of ranks."""
    if dist.world_size == 1:
        return rows
    feats = all_gather_padded(rows.feats, dist).flatten(0, 1)
    # classes are few enough for any float
    rest = all_gather_padded(torch.stack((rows.conf, rows.classes.to(rows.conf.dtype)), dim=1), dist)
    rest = rest.flatten(0, 1)
    return Rows(feats, rest[:, 0], rest[:, 1].long())


# --- confidence of the classes ---------------------------------------------------------------------------------


@torch.no_grad()
def true_class_confidence(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean probability of the true class over the pixels of every class (K,) float64; -1 for an absent class.

    Args:
        logits: (B, K, H, W).
        labels: (B, H, W), 255 = ignore.

    Source: `cal_category_confidence` in `u2pl/utils/utils.py`, and inline in `train_semi.py`.
    """
    num_classes, valid = logits.shape[1], labels != IGNORE
    index = labels.where(valid, 0)
    picked = logits.gather(1, index.unsqueeze(1)).squeeze(1)
    prob = (picked - logits.logsumexp(dim=1)).exp().double()
    classes = labels.where(valid, -1).flatten()
    total, counts = (
        grouped_sums(x.view(-1, 1), classes, num_classes).squeeze(1) for x in (prob, torch.ones_like(prob))
    )
    return torch.where(counts > 0, total / counts.clamp(min=1), -1.0)


class ClassConfidence(nn.Module):
    """Moving average of the classes' confidence (K,) float64.

    Args:
        num_classes: K.
        decay: of the average.
        start: first value; None starts a class with the first confidence seen (copy-paste).
    """

    value: Tensor

    def __init__(self, num_classes: int, decay: float, start: float | None) -> None:
        super().__init__()
        self.decay, self.adopt = decay, start is None
        first = 0.0 if start is None else start
        self.register_buffer("value", torch.full((num_classes,), first, dtype=torch.float64))

    @torch.no_grad()
    def update(self, seen: Tensor) -> None:
        """Blend in the confidences (K,) of one step; classes at -1 (absent) or not finite keep their value."""
        blended = self.decay * self.value + (1 - self.decay) * seen
        if self.adopt:
            blended = torch.where(self.value == 0, seen, blended)
        present = (seen > 0) if self.adopt else (seen >= 0)
        self.value.copy_(torch.where(present & seen.isfinite(), blended, self.value))
