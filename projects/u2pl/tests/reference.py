"""Slow, plain renditions of the method's description, for comparison: one pixel, one class, one slot at a time.

Written from the description alone (sections 2 and 3 of the specification), in float64 and Python lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

IGNORE = 255


def entropies(logits: Tensor) -> Tensor:
    """Entropy (B, H, W) of logits (B, K, H, W), in nats."""
    probs = logits.double().softmax(1)
    return -(probs * torch.log(probs + 1e-10)).sum(1)


def percentile(values: Tensor, labels: Tensor, q: float) -> float:
    """Percentile of the values of the pixels that have a label; nan if there is none."""
    chosen = values[labels != IGNORE]
    return float(np.percentile(chosen.numpy(), q)) if len(chosen) else float("nan")


def drop_uncertain(logits_teacher: Tensor, labels: Tensor, percent: float) -> Tensor:
    """Labels (B, H, W) with the pixels at and above the percentile of the entropy ignored."""
    values = entropies(logits_teacher)
    limit = percentile(values, labels, percent)
    kept = labels.clone()
    for where in (labels != IGNORE).nonzero().tolist():
        if values[tuple(where)] >= limit:
            kept[tuple(where)] = IGNORE
    return kept


def unsupervised_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over labeled pixels times all pixels over labeled ones."""
    places = (labels != IGNORE).nonzero().tolist()
    if not places:
        return logits.sum() * 0.0
    total = sum(-logits[b, :, i, j].log_softmax(0)[labels[b, i, j]] for b, i, j in places)
    return total / len(places) * (labels.numel() / len(places))


def onehot(labels: Tensor, num_classes: int, first_image_only: bool) -> Tensor:
    """Class masks (N, K, H, W); with `first_image_only` as the original's function makes them."""
    n, height, width = labels.shape
    masks = torch.zeros(n, num_classes, height, width, dtype=torch.bool)
    for i in range(height):
        for j in range(width):
            column = labels[:, i, j].tolist()
            if not first_image_only:
                for b, value in enumerate(column):
                    if value != IGNORE:
                        masks[b, value, i, j] = True
            elif column[0] != IGNORE:
                for value in column:
                    masks[0, 0 if value == IGNORE else value, i, j] = True
    return masks


def reduced(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest reduction of (N, ..., H, W): source index floor(target * in / out)."""
    rows = [i * maps.shape[-2] // size[0] for i in range(size[0])]
    cols = [j * maps.shape[-1] // size[1] for j in range(size[1])]
    return maps[..., rows, :][..., cols]


@dataclass
class Rules:
    """Numbers and oddities of the contrastive loss."""

    num_queries: int
    num_negatives: int
    temperature: float
    low_rank: int
    high_rank: int
    positive: float = 0.3
    negative: float = 1.0
    negative_high_entropy: bool = True
    first_image: bool = True
    slot_index: bool = True
    own_label: bool = True


@dataclass
class Outcome:
    """Everything that the contrastive step leaves behind."""

    loss: Tensor
    keys: list[list[Tensor]]
    valid: list[int]
    candidates: list[int]
    prototypes: Tensor | None = None
    anchor_draws: list[list[int]] = field(default_factory=list)
    negative_draws: list[list[int]] = field(default_factory=list)


class Queue:
    """A list that forgets its oldest entries."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.rows = capacity, []

    def push(self, rows: Sequence[Tensor]) -> None:
        self.rows = (self.rows + [row.clone() for row in rows])[-self.capacity :]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b) / (a.norm().clamp(min=1e-8) * b.norm().clamp(min=1e-8))


def is_negative(rank: int, own: bool, labeled: bool, rules: Rules) -> bool:
    """Whether a class of this rank is unlikely at a pixel that carries it (`own`) or not."""
    wanted = rank < rules.low_rank and not own if labeled else rules.low_rank <= rank < rules.high_rank
    return wanted and (own or not rules.own_label)


def contrastive_step(
    rep: Tensor,
    rep_teacher: Tensor,
    logits_teacher: Tensor,
    y_l: Tensor,
    y_u: Tensor,
    reliable_u: Tensor,
    unreliable_u: Tensor,
    queues: list[Queue],
    rules: Rules,
    rng: np.random.RandomState,
    prototypes: Tensor | None = None,
    decay: float = 0.0,
) -> Outcome:
    """Push this step's negatives, then the loss; the choices are drawn from `rng` and returned."""
    probs = logits_teacher.softmax(1)
    count, num_classes, h, w = probs.shape
    labels = [reduced(y, (h, w)) for y in (y_l, y_u)]
    masks = torch.cat([onehot(y, num_classes, rules.first_image) for y in (y_l, y_u)])
    masks = reduced(masks, (h, w))
    everywhere = torch.ones_like(unreliable_u)
    low = torch.cat((labels[0] != IGNORE, reduced(reliable_u, (h, w))))
    high_u = reduced(unreliable_u if rules.negative_high_entropy else everywhere, (h, w))
    high = torch.cat((labels[0] != IGNORE, high_u))
    order = probs.argsort(dim=1, descending=True)
    places = [(b, i, j) for b in range(count) for i in range(h) for j in range(w)]

    anchors, centres, keys, valid = [], [], [], []
    for c in range(num_classes):
        mine = [p for p in places if masks[p[0], c, p[1], p[2]] and low[p]]
        anchors.append([p for p in mine if probs[p[0], c, p[1], p[2]] > rules.positive])
        rows = [rep_teacher[p[0], :, p[1], p[2]] for p in mine]
        centres.append(torch.stack(rows).mean(0) if rows else torch.full_like(rep[0, :, 0, 0], torch.nan))
        keys.append(
            [
                rep_teacher[b, :, i, j]
                for b, i, j in places
                if high[b, i, j]
                and probs[b, c, i, j] < rules.negative
                and is_negative(
                    order[b, :, i, j].tolist().index(c), bool(masks[b, c, i, j]), b < len(y_l), rules
                )
            ]
        )
        if mine:
            valid.append(c)
    for queue, rows in zip(queues, keys, strict=True):
        queue.push(rows)

    out = Outcome(rep.sum() * 0.0, keys, valid, [len(a) for a in anchors], prototypes)
    if len(valid) <= 1:
        return out
    fresh = None if prototypes is None else torch.zeros_like(prototypes)
    for slot, owner in enumerate(valid):
        source = slot if rules.slot_index else owner
        rows = queues[owner].rows
        if not anchors[source] or not rows:
            continue
        first = rng.randint(len(anchors[source]), size=rules.num_queries).tolist()
        second = rng.randint(len(rows), size=rules.num_queries * rules.num_negatives).tolist()
        out.anchor_draws.append(first)
        out.negative_draws.append(second)
        positives = [centres[source]] * rules.num_queries
        if prototypes is not None:
            if prototypes.any():
                positives = [
                    (1 - decay) * p + decay * stored[0]
                    for p, stored in zip(positives, prototypes[owner], strict=True)
                ]
            fresh[owner] = torch.stack(positives)[:, None]
        for q, index in enumerate(first):
            b, i, j = anchors[source][index]
            anchor = rep[b, :, i, j]
            others = [rows[n] for n in second[q * rules.num_negatives : (q + 1) * rules.num_negatives]]
            scores = torch.stack([cosine(anchor, v) for v in (positives[q], *others)]) / rules.temperature
            out.loss = out.loss - scores.log_softmax(0)[0] / rules.num_queries / len(valid)
    out.prototypes = fresh
    return out
