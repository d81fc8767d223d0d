"""The prototype branch of a step: the pixels that it sees, its losses, and where they draw the prototypes.

Legend: B images (labeled first), K classes, P prototypes per class, D feature channels, (H, W) crop, (h, w) feature
size, n drawn places per image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from projects.proto_consistency.draws import gather_labels, gather_points
from projects.proto_consistency.losses import prototype_losses
from projects.proto_consistency.state import Run


class Sampled(NamedTuple):
    """The drawn places of a forward.

    Attributes:
        size: (H, W), in which the places are.
        rows: (n,) for all images, or (B, n).
        cols: alike.
        feats: (B*n, D) of the student, image by image.
        scores: (B*n, K) of the prototype head.
        match: (B*n, K), the nearest prototype of every class.
    """

    size: torch.Size
    rows: Tensor
    cols: Tensor
    feats: Tensor
    scores: Tensor
    match: Tensor

    def at(self, maps: Tensor) -> Tensor:
        """Entries of maps (B, H, W) there, in the order of the features: (B*n,)."""
        return gather_labels(maps, self.rows, self.cols)


def sample_pixels(feats: Tensor, size: torch.Size, run: Run) -> Sampled:
    """Compare the features (B, D, h, w) of drawn pixels of the crop (H, W) with the student's prototypes."""
    movement = run.require_movement()
    rows, cols = run.draws.points(size, movement.proto.granularity, len(feats), run.cfg.quirks)
    picked = gather_points(feats, rows, cols, size)
    return Sampled(size, rows, cols, picked, *movement.head.match(picked))


def note_movement(sampled: Sampled, target: Tensor, cond: Tensor, teacher: Tensor | None, run: Run) -> None:
    """Remember for the end of the step where the prototypes are drawn to by pixels with `target` and `cond` (B*n,).

    `teacher` (B, D, h, w) are its features of the same images. With `update_source: teacher` they take the student's
    place altogether: they move the prototypes of the student that are nearest to them.
    """
    movement = run.require_movement()
    feats, match = sampled.feats.detach(), sampled.match
    if movement.proto.update_source == "teacher" and teacher is not None:
        feats = gather_points(teacher, sampled.rows, sampled.cols, sampled.size)
        match = movement.head.match(feats).nearest
    if not run.cfg.quirks.raw_update:
        feats = F.normalize(feats, dim=1)
    movement.add(feats, match, target, cond)


def prototype_terms(
    feats: Tensor, teacher: Tensor | None, labels: Tensor, sure: Tensor, num_labeled: int, run: Run
) -> dict[str, Tensor]:
    """The losses of the prototype head by name, times its weight; the movement that follows from them is noted.

    Args:
        feats: (B, D, h, w) of the student.
        teacher: (B, D, h, w) of the teacher, or None where it has not seen the images.
        labels: (B, H, W), pseudo-labels for unlabeled images.
        sure: (B, H, W), which labels count.
        num_labeled: how many of the B images are labeled.
        run: draws, prototypes and settings.
    """
    proto = run.require_movement().proto
    sampled = sample_pixels(feats, labels.shape[-2:], run)
    target, drawn_sure = sampled.at(labels), sampled.at(sure)
    counted = drawn_sure if proto.select == "same" else torch.ones_like(drawn_sure)
    labeled = len(target) * num_labeled // len(labels)
    found = prototype_losses(sampled.scores, target, counted, labeled)
    terms = {}
    if proto.supervised:
        terms["loss_proto_sup"] = proto.weight * found.sup
    if proto.unsupervised and num_labeled < len(labels):
        terms["loss_proto_unsup"] = proto.weight * found.unsup
    moves = drawn_sure
    if not proto.update_unlabeled:
        moves = drawn_sure & (torch.arange(len(target), device=target.device) < labeled)
    note_movement(sampled, target, moves, teacher, run)
    return terms
