"""How good pseudo-labels are, measured while training where the truth of unlabeled images happens to be known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from common.config import ProjectConfig
from common.data.spec import IGNORE, DatasetSpec, Item, check_pair
from common.data.split import unlabeled_truth
from common.data.streams import TrainingData
from common.data.transforms import EvalTransform
from common.distributed import Dist, sum_over_ranks, to_device
from common.errors import UserError
from common.measure.inference import Forward
from common.numerics.precision import autocast
from common.run.log import RunLog

CONFIDENT = 0.9  # probability from which a pseudo-label counts as kept, the same for every method

T = TypeVar("T")


def evenly(entries: Sequence[T], count: int) -> list[T]:
    """At most `count` of `entries`, evenly spaced and always the same."""
    count = min(count, len(entries))
    return [entries[i * len(entries) // count] for i in range(count)]


def count_pseudo_labels(logits: Tensor, label: Tensor) -> Tensor:
    """Pixels with a truth, kept ones, right ones among the kept, right ones: int64 (4,) on the device.

    Of logits (B, K, H, W) in any precision and the truth (B, H, W) int64, 255 = none.
    """
    confidence, pred = logits.float().softmax(dim=1).max(dim=1)
    known = label != IGNORE
    sure = known & (confidence >= CONFIDENT)
    right = known & (pred == label)
    return torch.stack([known.sum(), sure.sum(), (sure & right).sum(), right.sum()])


def measure_pseudo_labels(
    forwards: Sequence[Forward],
    samples: Iterable[tuple[Tensor, Tensor]],
    dist: Dist,
    *,
    precision: str = "fp32",
) -> dict[str, float]:
    """Figures of the networks that make pseudo-labels, their pixels taken together, as fractions; a collective.

    Of the pixels that have a truth, `pseudo_kept` are those whose probability is at least `CONFIDENT`;
    `pseudo_accuracy` of the kept ones, and `pseudo_accuracy_all` of all, are right. Each of `forwards` gives logits
    (1, K, H, W) of a normalized image (1, 3, H, W); `samples` are this rank's images (3, H, W) and truths (H, W).

    Returns:
        The figures, equal on every rank; without `pseudo_accuracy` if no pixel is kept, none if none has a truth.
    """
    counts = torch.zeros(4, dtype=torch.int64, device=dist.device)
    with torch.inference_mode():
        for image, label in samples:
            x, y = (to_device(part[None], dist.device) for part in (image, label))
            for forward in forwards:
                with autocast(dist.device, precision):
                    logits = forward(x)
                counts += count_pseudo_labels(logits, y)
    known, kept, right_kept, right = sum_over_ranks(counts, dist).tolist()
    found = {"pseudo_kept": kept / known, "pseudo_accuracy_all": right / known} if known else {}
    return found | {"pseudo_accuracy": right_kept / kept} if kept else found


def log_pseudo_quality(
    cfg: ProjectConfig,
    networks: Sequence[nn.Module],
    data: TrainingData,
    log: RunLog,
    step: int,
    epoch: int,
    dist: Dist,
) -> None:
    """Measure the pseudo-labels of `run.pseudo_images` unlabeled images and log the figures; a collective.

    The images are the same at every call. They are seen whole, without augmentation, by networks in evaluation mode,
    which are left as they were; no random number is drawn. Nothing happens where none of them has a mask, in
    supervised-only runs (which have no unlabeled loader) and with `run.pseudo_images` 0. `predict` of the `networks`
    gives logits (B, K, H, W) at the size of the images.
    """
    if not cfg.run.pseudo_images or len(data.loaders) < 2 or not networks:
        return
    items = evenly(unlabeled_truth(data.spec, cfg.data.split), cfg.run.pseudo_images)
    if not items:
        return
    samples = _samples(cfg, data.spec, items[dist.rank :: dist.world_size])
    forwards: list[Any] = [network.predict for network in networks]
    with evaluating(networks):
        found = measure_pseudo_labels(forwards, samples, dist, precision=cfg.run.precision)
    if found:
        log.scalars(step, {"epoch": epoch, **found})


def _samples(cfg: ProjectConfig, spec: DatasetSpec, items: Iterable[Item]) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalized images (3, H, W) and truths (H, W); pairs that cannot be read are left out, for training does
    not depend on these masks.
    """
    transform = EvalTransform(mean=cfg.data.mean, std=cfg.data.std, resize=cfg.data.resize)
    for item in items:
        try:
            image, label = spec.load_image(item), spec.load_label(item)
            check_pair(item, image, label)
        except UserError:
            continue
        yield transform(image, label)


@contextmanager
def evaluating(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Networks in evaluation mode inside; after it every module is in the mode it was in."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
