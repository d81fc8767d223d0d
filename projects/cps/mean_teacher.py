"""Mean teacher as it is shipped beside CPS: a student and the moving average of its weights.

Both networks see the labeled batch, then the teacher is averaged, then both see the unlabeled batch; the student
learns the labels and the teacher's probabilities on all images. QUIRK Q17: the average is taken before the student's
step, so the teacher is one step behind; BatchNorm statistics are never averaged, the teacher collects its own in
train mode; and the network that is evaluated is the student.

Source: `network.py` and `train.py` of `voc8.res50v3+.MeanTeacher` in TorchSemiSeg.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.numerics.ema import copy_parameters, update_teacher
from common.numerics.losses import Losses
from projects.cps.recipes import Forward, Supervised


@dataclass(frozen=True, kw_only=True, slots=True)
class MeanTeacherSettings:
    """Numbers of the mean teacher; the defaults are the published ones.

    Attributes:
        weight: of the consistency term; constant.
        ema_decay: share of the teacher that an average keeps; constant, without a warm-up.
        ema_between_batches: QUIRK Q17: the teacher sees the labeled batch before the average and the unlabeled one
            after it; false averages before both.
    """

    weight: float = 100.0
    ema_decay: float = 0.99
    ema_between_batches: bool = True

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"'weight' is {self.weight!r}; expected 0 or more")
        if not 0 <= self.ema_decay <= 1:
            raise ValueError(f"'ema_decay' is {self.ema_decay!r}; expected 0 to 1")


def softmax_mse(logits: Tensor, target_logits: Tensor) -> Tensor:
    """Mean over all elements of the squared difference of two softmaxes of (B, K, H, W): a scalar.

    The second one is a target and gets no gradient.
    """
    return F.mse_loss(logits.softmax(dim=1), target_logits.detach().softmax(dim=1))


def mean_teacher_losses(
    x_l: Tensor, y_l: Tensor, x_u: Tensor, step: int, student: nn.Module, teacher: nn.Module, forward: Forward,
    teach: Callable[[Tensor], Tensor], settings: MeanTeacherSettings, supervised: Supervised, *, first: bool = True,
) -> Losses:  # fmt: skip
    """Losses of one forward, and the teacher's average, which happens in the middle of it.

    In step 0 the teacher is a copy of the student for both batches. The student's weights do not change here, so
    it makes no difference that it sees its two batches before the teacher sees the first.

    Args:
        x_l: labeled images (B, 3, H, W).
        y_l: their labels (B, H, W), 255 = ignore.
        x_u: unlabeled images (B', 3, H, W).
        step: optimiser step, from 0.
        student: the network whose parameters are copied and averaged.
        teacher: the network that they are written to; same architecture.
        forward: the student with gradients: maps batches of images to logits per network (one) and batch.
        teach: the teacher: maps images to logits at image size; called without gradients, in train mode.
        settings: weights and the place of the average.
        supervised: loss of logits and labels.
        first: this is the first forward of the optimiser step; the others of a step that is accumulated do not
            average again.
    """
    ((labeled, unlabeled),) = forward(x_l, x_u)
    with torch.no_grad():
        if step == 0:
            copy_parameters(teacher, student)
        if first and not settings.ema_between_batches:
            update_teacher(teacher, student, settings.ema_decay)
        taught_labeled = teach(x_l)
        if first and settings.ema_between_batches:
            update_teacher(teacher, student, settings.ema_decay)
        if step == 0:  # the average of equal weights differs from them in the last digit
            copy_parameters(teacher, student)
        taught_unlabeled = teach(x_u)
        teacher_sup = supervised(taught_labeled, y_l)
    sup = supervised(labeled, y_l)
    predicted = torch.cat((labeled, unlabeled))
    unsup = settings.weight * softmax_mse(predicted, torch.cat((taught_labeled, taught_unlabeled)))
    return Losses(sup + unsup, {"loss_sup": sup, "loss_unsup": unsup, "sup_teacher": teacher_sup})
