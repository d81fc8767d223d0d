"""Student, teacher and the method's memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.distributed import Dist, all_gather_padded
from common.mean_teacher.contrast import ContrastInputs
from common.mean_teacher.networks import StudentTeacher, network_of, student_and_teacher
from common.mean_teacher.queues import ClassQueues
from common.models.deeplab import SegmentationNetwork
from projects.u2pl.config import Config, rank_window
from projects.u2pl.losses import ContrastSettings, Criterion, collect_negatives

Networks = StudentTeacher[SegmentationNetwork, Criterion]


class Memory(nn.Module):
    """Queues, averaged centres and settings of the contrastive loss."""

    prototypes: Tensor | None

    def __init__(self, cfg: Config, num_classes: int, dim: int) -> None:
        super().__init__()
        method, quirks = cfg.method, cfg.quirks
        low_rank, high_rank = rank_window(method, num_classes)
        sizes = [method.queue_size_first] + [method.queue_size] * (num_classes - 1)
        self.queues = ClassQueues(sizes, dim)
        centres = torch.zeros(num_classes, method.num_queries, 1, dim) if method.anchor_ema else None
        self.register_buffer("prototypes", centres)
        self.settings = ContrastSettings(
            num_queries=method.num_queries,
            num_negatives=method.num_negatives,
            temperature=method.temperature,
            low_rank=low_rank,
            high_rank=high_rank,
            current_class_threshold=method.current_class_threshold,
            current_class_negative_threshold=method.current_class_negative_threshold,
            slot_index=quirks.slot_index,
            own_label_negatives=quirks.own_label_negatives,
        )
        self.first_image = quirks.onehot_first_image

    def own(self) -> dict[str, Tensor]:
        """What each process has for itself, by the name of its buffer; the rest is the same everywhere."""
        return {} if self.prototypes is None else {"prototypes": self.prototypes}

    def labels_per_pixel(self, batch: int) -> int:
        """Most classes for which one pixel can be a negative; bounds the rows of a push."""
        if not self.settings.own_label_negatives:
            return len(self.queues.written)
        return batch if self.first_image else 1

    def collect(self, inputs: ContrastInputs, batch: int, dist: Dist) -> Tensor:
        """Append this step's negatives of all ranks, rank by rank, in one collective; their number per class (K,)."""
        exact = dist.world_size == 1 and dist.device.type == "cpu"
        classes, keys = collect_negatives(inputs, self.settings, self.labels_per_pixel(batch), exact)
        if dist.world_size > 1:
            table = torch.cat((keys.float(), classes.unsqueeze(1).float()), dim=1)
            table = all_gather_padded(table, dist).flatten(0, 1)
            keys, classes = table[:, :-1], table[:, -1].long()
        return self.queues.push(classes, keys)


def build_student(cfg: Config, num_classes: int) -> SegmentationNetwork:
    """A network with fresh random numbers outside the backbone's weight file."""
    return network_of(cfg.model, num_classes, rep_head=cfg.method.mode == "semi")


def build_criterion(cfg: Config) -> Criterion:
    """The supervised loss that the configuration names."""
    method = cfg.method
    return Criterion(
        ohem=method.criterion == "ohem",
        thresh=method.ohem_thresh,
        min_kept=method.ohem_min_kept,
        aux_weight=cfg.model.aux_weight,
        class_weights=method.class_weights,
    )


def build_networks(cfg: Config, num_classes: int, dist: Dist) -> Networks:
    """Student and teacher on their device, wrapped for this run."""
    return student_and_teacher(cfg, lambda: build_student(cfg, num_classes), build_criterion(cfg), dist)
