"""What contrasts of pixels look at: labels, masks and features at feature size, and the pixels that are negatives.

Legend: B images, K classes, D feature channels, (H, W) label size, (h, w) feature size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data.spec import IGNORE


class ContrastInputs(NamedTuple):
    """Everything the contrast looks at, at feature size; labeled images first.

    feats, feats_teacher (B, D, h, w) float; probs (B, K, h, w) of the train-mode teacher; masks (B, K, h, w),
    reliable and unreliable (B, h, w) bool; num_labeled of the B images carry true labels.
    """

    feats: Tensor
    feats_teacher: Tensor
    probs: Tensor
    masks: Tensor
    reliable: Tensor
    unreliable: Tensor
    num_labeled: int


def nearest(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Boolean masks or label maps (B, H, W) at `size` (h, w): source index floor(target * in / out)."""
    if maps.dtype == torch.bool:  # the same bytes: nothing to convert
        return nearest(maps.view(torch.uint8), size).view(torch.bool)
    small = F.interpolate(maps.unsqueeze(1).to(torch.uint8), size=size, mode="nearest").squeeze(1)
    return small.to(maps.dtype)


def class_masks(
    labels: Tensor, num_classes: int, first_image_only: bool = True, batches: Sequence[int] | None = None
) -> Tensor:
    """Class masks (B, K, h, w) bool of label maps (B, h, w), 255 = ignore, of one or more batches of these lengths.

    With `first_image_only` (QUIRK quirks.onehot_first_image) they are what the original's one-hot makes of a batch:
    image 0 carries the union of all images' labels, where 255 of another image counts as class 0 and 255 of image 0
    clears everything; the other images are empty. Otherwise each image has its own ordinary one-hot.

    Source: `label_onehot` in `u2pl/utils/utils.py`.
    """
    if not first_image_only:
        return labels.unsqueeze(1) == torch.arange(num_classes, device=labels.device).view(-1, 1, 1)
    known, sizes = labels != IGNORE, list(batches or (len(labels),))
    masks = torch.zeros(len(labels), num_classes, *labels.shape[1:], dtype=torch.bool, device=labels.device)
    parts = (x.split(sizes) for x in (masks, known, labels * known))
    for own, seen, index in zip(*parts, strict=True):
        own[0].scatter_(0, index, True).logical_and_(seen[0])
    return masks


@torch.no_grad()
def negative_masks(
    inputs: ContrastInputs, low_rank: int, high_rank: int, threshold: float, own_label: bool = True
) -> Tensor:
    """Pixels that are negatives of a class, (K, B' * h * w) bool, eq. (10) to (12) of U2PL.

    A pixel qualifies if it is unreliable, not sure of the class, and the teacher ranks the class in
    [low_rank, high_rank) (unlabeled) or in [0, low_rank) while the label says otherwise (labeled).

    Args:
        inputs: of the contrast.
        low_rank: see above; 0 is the most probable class.
        high_rank: see above.
        threshold: a negative's probability of the class is below this.
        own_label: label c is demanded too, so labeled pixels never qualify (QUIRK quirks.own_label_negatives) and only
            the unlabeled images are looked at: B' is their number, otherwise that of all.
    """
    n, first = inputs.num_labeled, inputs.num_labeled if own_label else 0
    probs, masks, unreliable = inputs.probs[first:], inputs.masks[first:], inputs.unreliable[first:]
    order = probs.sort(dim=1, descending=True, stable=True).indices
    chosen = torch.zeros_like(masks)
    chosen[n - first :].scatter_(1, order[n - first :, low_rank:high_rank], True)
    if own_label:
        chosen &= masks
    else:
        chosen[:n].scatter_(1, order[:n, :low_rank], True).logical_and_(~masks[:n])
    chosen &= unreliable.unsqueeze(1)
    chosen &= probs < threshold
    return chosen.transpose(0, 1).flatten(1)


@torch.no_grad()
def compact(mask: Tensor, size: int) -> Tensor:
    """Positions of the true entries of a flat mask in order, padded with its length to `size`; no host wait."""
    return torch.searchsorted(mask.cumsum(0), torch.arange(1, size + 1, device=mask.device))


def pixel_rows(feats: Tensor, index: Tensor) -> Tensor:
    """Rows (..., D) of a feature map (B, D, h, w) at positions `index` (...) in (image, row, column) order."""
    area = feats.shape[-2] * feats.shape[-1]
    return feats.flatten(2)[index // area, :, index % area]
