"""What the contrast remembers between steps: the queues of negatives, and averaged centres."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.distributed import Dist, all_gather_padded
from common.mean_teacher.contrast import ContrastInputs
from common.mean_teacher.queues import ClassQueues
from common.numerics.ema import warmup_decay
from projects.u2pl.augment import Draws
from projects.u2pl.config import Config
from projects.u2pl.contrast import Contrast, collect_negatives, contrast, rank_window

CENTRE_DECAY = 0.999  # ceiling, of the averaged class centres


class Memory(nn.Module):
    """Queues of negatives, and averaged centres (K, Q, 1, D) under `method.anchor_ema`.

    Args:
        cfg: sizes and settings.
        num_classes: K.
        dim: length D of the representation.

    Raises:
        UserError: the rank window is empty for so many classes.
    """

    prototypes: Tensor | None

    def __init__(self, cfg: Config, num_classes: int, dim: int) -> None:
        super().__init__()
        method = cfg.method
        rank_window(method, num_classes)  # refused before the first step
        self.cfg = cfg
        self.queues = ClassQueues([method.queue_size_first] + [method.queue_size] * (num_classes - 1), dim)
        centres = torch.zeros(num_classes, method.num_queries, 1, dim) if method.anchor_ema else None
        self.register_buffer("prototypes", centres)

    def of_this_process(self) -> dict[str, Tensor]:
        """What differs between processes, by the name of its buffer."""
        return {} if self.prototypes is None else {"prototypes": self.prototypes}

    @torch.no_grad()
    def collect(self, inputs: ContrastInputs, unlabeled: int, dist: Dist) -> Tensor:
        """Append this step's negatives of all ranks, rank by rank; their number per class (K,).

        A feature travels once, however many classes it is a negative of. What is not finite is left out.

        Args:
            inputs: of this process.
            unlabeled: images without labels in its batch.
            dist: this process.
        """
        exact = dist.world_size == 1 and dist.device.type == "cpu"
        found = collect_negatives(inputs, self.cfg, self._labels_per_pixel(unlabeled), exact)
        feats = all_gather_padded(found.feats, dist)
        classes, pixels = all_gather_padded(torch.stack((found.classes, found.pixels)), dist).unbind(1)
        finite = feats.isfinite().all(dim=2).gather(1, pixels)
        slots, counts = self.queues.take_slots(classes.where(finite, -1).flatten())
        # rank by rank: the rows of all at once would be many times the features
        for own, index, taken in zip(feats, pixels, slots.view_as(pixels), strict=True):
            self.queues.write(taken, own[index])
        return counts

    def _labels_per_pixel(self, unlabeled: int) -> int:
        """Most classes for which one pixel can be a negative; bounds the rows of a push."""
        if not self.cfg.quirks.own_label_negatives:
            return len(self.queues.written)
        return unlabeled if self.cfg.quirks.onehot_first_image else 1

    def contrast(self, inputs: ContrastInputs, draws: Draws, update: int) -> Contrast:
        """The loss against the queues; averaged centres move on.

        Args:
            inputs: of this process, whose negatives have been collected.
            draws: choose anchors and negatives.
            update: steps since the first contrast.
        """
        result = contrast(
            inputs,
            self.queues,
            self.cfg,
            draws.contrast or draws.generator,
            self.prototypes,
            warmup_decay(update, CENTRE_DECAY),
        )
        self.prototypes = result.prototypes
        return result
