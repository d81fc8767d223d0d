"""Settings of the multi-label mean teacher (MLMT), the image-level branch; the defaults are the authors' on VOC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from common.config import Count, Decay, Natural, NonNegative, Positive, Share, Workers

MIN_SIZE = 33  # BatchNorm over one image (a short last batch) needs two pixels at stride 32
MlmtBackbone = Literal["resnet50", "resnet101", "resnet_tiny"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MlmtConfig:
    """The multi-label mean teacher: networks, views, optimizer, consistency, what is measured and written.

    Attributes:
        backbone: classifier of student and teacher; `resnet_tiny` for small data. With `model.network=generic` both
            stand on the encoder of the segmentation network and its weights instead.
        weights: file with ImageNet weights of that backbone (searched in the working directory and in
            `SSS_WEIGHTS`), or `none` to start from random numbers.
        size: side of the square every image is resized to; the aspect is not kept.
        labels: where the label vectors come from: the label maps of the labeled images (`masks`), or `files`, the
            authors' text files with one line per image of the whole list (`train_labels`, `val_labels`).
        train_labels: that file for the training list; a relative path counts from `data.root`.
        val_labels: the same for the validation list.
        labeled_batch: labeled images of a step, over all processes.
        unlabeled_batch: unlabeled images of a step, over all processes.
        val_batch: images of a validation batch; it moves numbers only through `flat_roll`.
        workers: loader processes of each of the two training streams and of validation.
        epochs: passes over the labeled images.
        lr: rate of the first epoch.
        eta_min: where the cosine annealing ends.
        momentum: of the SGD.
        nesterov: whether the momentum looks ahead.
        weight_decay: of every parameter, biases included.
        cons_loss: the only consistency loss there is; the authors parse the flag and ignore it.
        w_cons: largest weight of the consistency loss.
        burn_in_epochs: the weight is 0 up to and including this epoch and rises linearly after it.
        ema_decay: largest decay of the teacher; below it the teacher is the plain average of its own start and the
            student's states.
        evaluation_epochs: epochs between two validations, which write the score files.
        threshold: probability from which a class counts as present: in the log's accuracies and, strictly above it,
            in the `bin` files.
        keep_threshold: teacher score from which the fusion keeps a class.
        flat_roll: the score of the background moves to the first column by rolling the flattened batch
            by one, so that column holds the background score of the image before; false rolls every image's row.
        sync_bn: synchronize BatchNorm over processes (GPUs only), which keeps several processes equal to one.
        copy_teacher: false as the authors: the teacher starts with its own random last layer; true
            starts it as a copy of the student.
    """

    backbone: MlmtBackbone = "resnet101"
    weights: str = "none"
    size: Annotated[int, Interval(ge=33), Interval(le=65536)] = 320
    labels: Literal["masks", "files"] = "masks"
    train_labels: str = "train_label.txt"
    val_labels: str = "val_label.txt"
    labeled_batch: Count = 16
    unlabeled_batch: Count = 80
    val_batch: Count = 32
    workers: Workers = 4
    epochs: Count = 100
    lr: Positive = 0.03
    eta_min: NonNegative = 1e-4
    momentum: Decay = 0.9
    nesterov: bool = True
    weight_decay: NonNegative = 1e-5
    cons_loss: Literal["cosine"] = "cosine"
    w_cons: NonNegative = 1.0
    burn_in_epochs: Natural = 10
    ema_decay: Decay = 0.999
    evaluation_epochs: Count = 5
    threshold: Share = 0.5
    keep_threshold: Share = 0.2
    flat_roll: bool = True
    sync_bn: bool = True
    copy_teacher: bool = False

    def __post_init__(self) -> None:
        if self.nesterov and self.momentum == 0:
            raise ValueError(
                "'nesterov' is true with 'momentum' 0; expected a momentum, or 'nesterov: false'"
            )
