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
        places, feats = (all_gather_padded(x, dist) for x in found)
        ranks, pixels = feats.shape[:2]
        slots, counts = self.queues.take_slots((places // pixels).flatten())
        start = torch.arange(0, ranks * pixels, pixels, device=places.device).unsqueeze(1)
        row, feats = (places % pixels + start).flatten(), feats.flatten(0, 1)
        # two ranks at a time: the rows of all at once would be many times the features
        for index, taken in zip(*(x.split(2 * places.shape[1]) for x in (row, slots)), strict=True):
            self.queues.write(taken, feats.index_select(0, index))
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
