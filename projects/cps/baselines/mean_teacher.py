"""Mean teacher as it is shipped beside CPS: a student and the moving average of its weights.

Both networks see the labeled batch, then the teacher is averaged, then both see the unlabeled batch; the student
learns the labels and the teacher's probabilities on all images.

QUIRK teacher_behind: the average is taken before the student's step, so the teacher is one step behind; BatchNorm
statistics are never averaged, the teacher collects its own in train mode; and the network that is evaluated is the
student.

Source: `network.py` and `train.py` of `voc8.res50v3+.MeanTeacher` in TorchSemiSeg.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data.streams import Batches
from common.numerics.ema import copy_parameters, update_teacher
from common.numerics.losses import Losses
from common.run.progress import Progress
from projects.cps.model import segment
from projects.cps.state import Run


def softmax_mse(logits: Tensor, target_logits: Tensor) -> Tensor:
    """Mean over all elements of the squared difference of two softmaxes of (B, K, H, W): a scalar.

    The second one is a target and gets no gradient.
    """
    return F.mse_loss(logits.softmax(dim=1), target_logits.detach().softmax(dim=1))


def mean_teacher_before_step(at: Progress, run: Run) -> None:
    """Make the teacher a copy of the student in the first step, and average it unless `mean_teacher_step` does."""
    settings = run.cfg.method.mean_teacher
    student, teacher = run.nets.modules["branch1"], run.nets.modules["branch2"]
    if at.step == 0:
        copy_parameters(teacher, student)
    if not settings.ema_between_batches:
        update_teacher(teacher, student, settings.ema_decay)


def mean_teacher_step(batch: Batches, at: Progress, run: Run) -> Losses:
    """Losses of one forward, and the teacher's average, which happens in the middle of the first one.

    The student's weights do not change here, so it makes no difference that it sees its two batches before the
    teacher sees the first.
    """
    nets, settings = run.nets, run.cfg.method.mean_teacher
    student, teacher = nets.modules["branch1"], nets.modules["branch2"]
    (x_l, y_l), x_u = batch[0][:2], batch[1].image
    ((labeled, unlabeled),) = nets.forward(x_l, x_u)
    with torch.no_grad():
        taught_labeled = segment(teacher, x_l, nets.precision)
        # QUIRK method.mean_teacher.ema_between_batches
        if settings.ema_between_batches and at.forward == 0:
            update_teacher(teacher, student, settings.ema_decay)
        if at.step == 0:  # the average of equal weights differs from them in the last digit
            copy_parameters(teacher, student)
        taught_unlabeled = segment(teacher, x_u, nets.precision)
        teacher_sup = nets.criterion(taught_labeled, y_l)
    sup = nets.criterion(labeled, y_l)
    predicted = torch.cat((labeled, unlabeled))
    unsup = settings.weight * softmax_mse(predicted, torch.cat((taught_labeled, taught_unlabeled)))
    return Losses(sup + unsup, {"loss_sup": sup, "loss_unsup": unsup, "sup_teacher": teacher_sup})
