"""The evaluator of training and of the stand-alone scripts: the same images give the same number in both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from common.data import transforms
from common.data.loaders import SegmentationDataset, Transform, make_eval_loader
from common.data.spec import IGNORE
from common.distributed import Dist, sum_over_ranks, to_device
from common.errors import UserError
from common.measure.inference import (
    Forward,
    Size,
    flip_average,
    multi_scale,
    sliding_window,
    whole_image,
    windows,
)
from common.measure.metrics import ConfusionMatrix, class_iou, mean_iou
from common.numerics.losses import best_class
from common.numerics.precision import autocast

if TYPE_CHECKING:
    from common.config import DataConfig, EvalConfig
    from common.data.spec import DatasetSpec, Item

Kind = Literal["center_crop", "whole_image", "sliding_window", "multi_scale_flip"]
Sample = tuple[Tensor, Tensor, str]
OnImage = Callable[[str, Tensor, Tensor], None]
Refine = Callable[[Sequence[str], Tensor], Tensor]
When = Literal["training", "script"]

CROPS_PER_FORWARD = 4


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a network is measured.

    Attributes:
        kind: "center_crop": only the central window of each image counts (training of U2PL's family);
            "whole_image": one pass per scale; "sliding_window": overlapping windows per scale;
            "multi_scale_flip": scales and the mirrored image, in windows if `crop_size` is given.
        crop_size: Height and width of the crop or window.
        stride: Step of the window down and across; None for two thirds of the window, rounded up.
        scales: Factors of the image's size.
        flip: Whether the mirrored image is scored too ("multi_scale_flip" only).
        base_size: Long side of the image at scale 1; None for the image's own.
        align_corners: Of the resizing of images and scores.
        epsilon: Added to the union.
        pad_label: Label of pixels that "center_crop" adds to images smaller than the crop. U2PL's family
            counts them as class 0; 255 leaves them out.
        batch_size: Crops or windows per forward pass; affects rounding only.

    Raises:
        UserError: The stride is larger than the window.
    """

    kind: Kind = "whole_image"
    crop_size: Size | None = None
    stride: Size | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    base_size: int | None = None
    align_corners: bool = True
    epsilon: float = 1e-10
    pad_label: int = 0
    batch_size: int = 1

    def __post_init__(self) -> None:
        if self.crop_size is not None:
            windows(self.crop_size, self.crop_size, self.stride)  # checks the stride

    def transform(self, data: DataConfig) -> Transform:
        """What makes a sample of a decoded image and label: normalization and, if configured, a fixed size.

        A paper's protocol that measures at a size of its own overrides it.
        """
        return transforms.EvalTransform(mean=data.mean, std=data.std, resize=data.resize)

    def scores(self, forward: Forward, image: Tensor) -> Tensor:
        """Scores (B, K, H, W) of normalized images (B, 3, H, W) at their size, also for photos without labels.

        For "center_crop" the images are taken as they come: there is nothing to average.
        """
        forward = flip_average(forward) if self.flip else forward

        def score(x: Tensor) -> Tensor:
            if self.crop_size is None or self.kind in ("center_crop", "whole_image"):
                return whole_image(forward, x)
            return sliding_window(forward, x, self.crop_size, self.stride, batch_size=self.batch_size)

        return multi_scale(score, image, self.scales, self.base_size, self.align_corners)


@dataclass(frozen=True)
class Evaluation:
    """The result over all ranks' images; IoUs and accuracy are fractions.

    Attributes:
        miou: Mean over all K classes, a class that occurs nowhere counting 0, as the papers do.
        miou_present: Mean over the classes that occur in a label or a prediction.
        iou: IoU of each class, 0 for one that occurs nowhere.
        pixel_accuracy: Share of labeled pixels predicted right.
        intersection: Pixels of each class in both label and prediction.
        union: Pixels of each class in either.
        num_images: Number of images.
        num_nonfinite: Number of images with an infinite or undefined score; anything but 0 means that the
            network is broken or its precision insufficient, and the other figures with it.
        protocol: How they were measured.
    """

    miou: float
    miou_present: float
    iou: tuple[float, ...]
    pixel_accuracy: float
    intersection: tuple[int, ...]
    union: tuple[int, ...]
    num_images: int
    num_nonfinite: int
    protocol: Protocol


def protocol_of(settings: EvalConfig, data: DataConfig, when: When, pad_label: int = IGNORE) -> Protocol:
    """The protocol that a configuration names for this occasion; `data` gives the crop where `eval` has none.

    While training, and for centre crops always, images are measured at their own size only. `pad_label` is that
    of `Protocol`.

    Raises:
        UserError: the stride is larger than the window.
    """
    kind = settings.during_training if when == "training" else settings.protocol
    scaled = when == "script" and kind != "center_crop"
    windowed = kind in ("center_crop", "sliding_window")
    return Protocol(
        kind=kind,
        crop_size=settings.crop_size or (data.crop_size if windowed else None),
        stride=settings.stride,
        scales=settings.scales if scaled else (1.0,),
        flip=settings.flip and kind == "multi_scale_flip",
        base_size=settings.base_size if scaled else None,
        pad_label=pad_label,
        batch_size=CROPS_PER_FORWARD,
    )


def evaluation_samples(
    data: DataConfig, spec: DatasetSpec, items: list[Item], dist: Dist, how: Protocol | None = None
) -> Iterator[Sample]:
    """This rank's share of the images to evaluate: normalized (1, 3, H, W), label (1, H, W) and id.

    The images are prepared as `how` says, by default as every shared protocol does.

    Raises:
        UserError: a file is missing or broken, whatever `data.on_error` says: a figure stands for the whole list.
    """
    transform = (how or Protocol()).transform(data)
    dataset = SegmentationDataset(spec, items, transform, 0, "val", "stop", cache=False)
    loader = make_eval_loader(dataset, 1, dist, workers=data.workers)
    quiet = None if dist.is_main else True  # None: where stderr is no terminal
    for batch in tqdm(loader, "evaluation", loader.steps_per_epoch, leave=False, unit="photo", disable=quiet):
        yield batch.image, batch.label, items[int(batch.index)].id


def evaluate_list(
    forward: Forward,
    data: DataConfig,
    spec: DatasetSpec,
    images: str,
    how: Protocol,
    dist: Dist,
    *,
    precision: str,
    on_image: OnImage | None = None,
    refine: Refine | None = None,
) -> Evaluation:
    """`evaluate` on the dataset's list `images` (its name or path), prepared as `data` and `how` say.

    Raises:
        UserError: list or files missing or broken, or the network scores other classes.
    """
    samples = evaluation_samples(data, spec, spec.read_list(images), dist, how)
    return evaluate(
        forward, samples, spec.num_classes, how,
        dist=dist, precision=precision, on_image=on_image, refine=refine,
    )  # fmt: skip


def evaluate(
    forward: Forward,
    samples: Iterable[Sample],
    num_classes: int,
    protocol: Protocol,
    *,
    dist: Dist = Dist(),  # noqa: B008 -- immutable: a single process on the CPU
    precision: str = "fp32",
    on_image: OnImage | None = None,
    refine: Refine | None = None,
) -> Evaluation:
    """Measure a network, which the caller has put into evaluation mode; the result is equal on every rank.

    The host waits for the device once, at the end. With several ranks each one passes its own images, every image on
    one rank only, and all must call; a rank may have none.

    `samples` are normalized images (1, 3, H, W) float32 with labels (1, H, W) int64 and ids, `forward` is as in
    `common.measure.inference`. `on_image` gets for every image its id, the scores (K, H, W) and the predicted classes
    (H, W) on the device, for instance to save them. `refine` changes scores (B, K, H, W) before the best class is
    taken, given the ids of their images; for instance by what another network knows of them.

    Raises:
        UserError: If no rank has an image, or a label does not fit its image or the classes.
    """
    matrix = ConfusionMatrix(num_classes, dist.device)
    tally = torch.zeros(2, dtype=torch.int64, device=dist.device)  # images, images with non-finite scores
    images = 0
    with torch.inference_mode():
        for x, label, ids in _batches(samples, protocol, dist.device):
            with autocast(dist.device, precision):
                scores = protocol.scores(forward, x)
            if scores.shape[1] != num_classes:
                raise UserError(
                    f"evaluation: the network scores {scores.shape[1]} classes, the dataset has {num_classes}; "
                    "use a checkpoint trained on this dataset"
                )
            if refine is not None:
                scores = refine(ids, scores)
            pred = best_class(scores)
            matrix.update(pred, label)
            images += len(ids)
            tally[1] += (~scores.flatten(1).sum(dim=1).isfinite()).sum()
            if on_image is not None:
                for i, name in enumerate(ids):
                    on_image(name, scores[i], pred[i])
    tally[0] = images
    tally = sum_over_ranks(tally, dist)
    matrix.reduce(dist)
    num_images, num_nonfinite = tally.tolist()
    if num_images == 0:
        raise UserError("evaluation: there is no image to evaluate; check eval.list and data.root")
    intersection, union = matrix.intersection_union()
    iou = class_iou(intersection, union, protocol.epsilon)
    return Evaluation(
        miou=mean_iou(intersection, union, "zero", protocol.epsilon),
        miou_present=mean_iou(intersection, union, "skip", protocol.epsilon),
        iou=tuple(torch.where(union > 0, iou, torch.zeros_like(iou)).tolist()),
        pixel_accuracy=matrix.pixel_accuracy(),
        intersection=tuple(intersection.tolist()),
        union=tuple(union.tolist()),
        num_images=num_images,
        num_nonfinite=num_nonfinite,
        protocol=protocol,
    )


def _batches(
    samples: Iterable[Sample], protocol: Protocol, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
    """Images, labels and ids on the device: crops in batches, whole images one by one."""
    crop, size = protocol.crop_size, protocol.batch_size
    pending: list[Sample] = []
    for image, label, name in samples:
        if image.shape[-2:] != label.shape[-2:]:
            raise UserError(
                f"evaluation: {name}: image {tuple(image.shape[-2:])} and label {tuple(label.shape[-2:])} "
                "differ in size; replace the file that is wrong"
            )
        if protocol.kind == "center_crop" and crop is not None:
            image, label = center_crop(image, label, crop, protocol.pad_label)  # noqa: PLW2901
        pending.append((image, label, name))
        if len(pending) == (size if protocol.kind == "center_crop" else 1):
            yield _collate(pending, device)
            pending = []
    if pending:
        yield _collate(pending, device)


def _collate(samples: list[Sample], device: torch.device) -> tuple[Tensor, Tensor, list[str]]:
    images, labels, ids = zip(*samples, strict=True)
    x, label = (part[0] if len(part) == 1 else torch.cat(part) for part in (images, labels))
    return to_device(x, device), to_device(label, device), list(ids)


def center_crop(image: Tensor, label: Tensor, crop: Size, pad_label: int) -> tuple[Tensor, Tensor]:
    """Central window of image (1, 3, H, W) and label (1, H, W), smaller ones padded with 0 and `pad_label`."""
    x, y = transforms.pad_to(image[0], label[0], crop, pad_label)
    row, col = ((length - side) // 2 for length, side in zip(y.shape, crop, strict=True))
    x, y = transforms.crop(x, y, (row, col), crop)
    return x[None], y[None]
