"""The recorded cases of the image-level branch: the arrays to our public functions, our outputs under their names."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.config import build
from common.data.loaders import Batch
from common.numerics.ema import update_teacher, warmup_decay
from common.numerics.optim import cosine
from projects.s4gan_mlmt.config import Config
from projects.s4gan_mlmt.mlmt.fusion import write_scores
from projects.s4gan_mlmt.mlmt.losses import (
    accuracies,
    consistency_weight,
    cosine_consistency,
    count_correct,
    multi_label_loss,
    roll_scores,
    whole,
)
from projects.s4gan_mlmt.mlmt.scores import binary_text
from projects.s4gan_mlmt.tests.mlmt_toys import Loop, StepBatches

SKIPPED = "num_batches_tracked"


def tensor(case: Any, key: str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(case[key]))


def leaf(case: Any, key: str) -> Tensor:
    return tensor(case, key).clone().requires_grad_(True)


def array(value: Tensor) -> np.ndarray:
    return value.detach().numpy()


def dtype_of(case: Any) -> torch.dtype:
    return torch.from_numpy(np.zeros(0, case.dtype)).dtype


# --- losses and figures ----------------------------------------------------------------------------------------


def mlmt_cosine_loss(case: Any) -> dict[str, Any]:
    student = leaf(case, "in_student")
    loss = cosine_consistency(student, tensor(case, "in_teacher"))
    loss.backward()
    return {"out_loss": array(loss), "grad_student": array(student.grad)}


def mlmt_bce(case: Any) -> dict[str, Any]:
    logits = leaf(case, "in_logits")
    loss = multi_label_loss(logits, tensor(case, "in_target"))
    loss.backward()
    return {"out_loss": array(loss), "grad_logits": array(logits.grad)}


def mlmt_accuracy(case: Any) -> dict[str, Any]:
    found = accuracies(count_correct(tensor(case, "in_outputs"), tensor(case, "in_target")))
    return {
        "out_avg": array(found.balanced),
        "out_zeros": array(found.zeros),
        "out_ones": array(found.ones),
        "out_total": array(found.total),
    }


def rows(case: Any, *keys: str) -> Iterator[tuple[float, ...]]:
    return zip(*(case[f"in_{key}"].tolist() for key in keys), strict=True)


def mlmt_schedules(case: Any) -> dict[str, Any]:
    ramp = [
        consistency_weight(epoch, burn, epochs, largest)
        for epoch, burn, epochs, largest in rows(case, "epoch", "burn", "epochs", "max")
    ]
    rates = [
        cosine(base, epoch, epochs, low)
        for base, epoch, epochs, low in rows(case, "lr_base", "lr_epoch", "lr_epochs", "lr_min")
    ]
    return {"out_weight": np.array(ramp), "out_lr": np.array(rates)}


# --- the teacher -----------------------------------------------------------------------------------------------


def toy(dtype: torch.dtype, channels: int = 3, width: int = 8, classes: int = 21) -> nn.Sequential:
    """A convolution, BatchNorm and a linear layer, with the keys of the recording."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, classes),
    ).to(dtype)


@torch.no_grad()
def fill(network: nn.Module, flat: Tensor) -> None:
    torch.nn.utils.vector_to_parameters(flat, network.parameters())


def mlmt_ema(case: Any) -> dict[str, Any]:
    width, classes = len(case["in_teacher_bn_mean0"]), 4
    students, teachers = case["in_student"], []
    channels = 3
    student, teacher = (toy(dtype_of(case), channels, width, classes) for _ in range(2))
    assert sum(p.numel() for p in teacher.parameters()) == students.shape[1]
    fill(teacher, tensor(case, "in_teacher0"))
    teacher[1].running_mean.copy_(tensor(case, "in_teacher_bn_mean0"))
    for i in range(len(students)):
        fill(student, tensor(case, "in_student")[i])
        student[1].running_mean.copy_(tensor(case, "in_student_bn_mean")[i])
        update_teacher(teacher, student, warmup_decay(i + 1, float(case["in_decay"])))
        teachers.append(array(torch.nn.utils.parameters_to_vector(teacher.parameters())))
    return {"out_teacher": np.stack(teachers), "out_teacher_bn_mean": array(teacher[1].running_mean)}


# --- the loop --------------------------------------------------------------------------------------------------


def rule_values(key: str, shape: torch.Size) -> np.ndarray:
    """The rule weights of the recordings; see `conventions` in cases.yaml."""
    r = np.random.RandomState(zlib.crc32(key.encode()))
    if key.endswith("running_var"):
        return 0.5 + r.rand(*shape)
    if key.endswith(("running_mean", "bias")):
        return 0.1 * r.randn(*shape)
    if len(shape) == 1:
        return 0.5 + 0.5 * r.rand(*shape)
    return r.randn(*shape) * np.sqrt(2 / np.prod(shape[1:]))


def rule_start(network: nn.Module, prefix: str) -> None:
    """Put the rule weights, rounded to float32 as recorded, into a network."""
    own = network.state_dict()
    values = {
        key: torch.from_numpy(np.asarray(rule_values(prefix + key, value.shape), np.float32)).to(value.dtype)
        for key, value in own.items()
        if not key.endswith(SKIPPED)
    }
    network.load_state_dict(values, strict=False)


def flat_state(network: nn.Module) -> np.ndarray:
    return np.concatenate(
        [array(value).astype(np.float64).ravel() for value in network.state_dict().values()]
    )


def branch_config(case: Any) -> Config:
    tree = {
        "data": {"dataset": "shapes", "split": "none"},
        "mlmt": {
            "lr": float(case["in_lr"]), "eta_min": float(case["in_lr"]), "weight_decay": float(case["in_weight_decay"]),
            "epochs": int(case["in_num_epochs"]), "burn_in_epochs": int(case["in_burn_in"]),
            "w_cons": float(case["in_w_cons"]), "ema_decay": float(case["in_ema_decay"]),
        },
        "run": {"device": "cpu", "channels_last": False},
    }  # fmt: skip
    return build(Config, tree)


def batches(case: Any, step: int) -> StepBatches:
    """Step `step` of an epoch: the unlabeled stream begins anew when it is exhausted."""
    labeled, vectors = (tensor(case, key)[step] for key in ("in_lab", "in_target"))
    place = step % len(case["in_unlab"])
    views = torch.cat([tensor(case, key)[place] for key in ("in_unlab", "in_unlab_aug")], dim=1)
    index = torch.arange(len(labeled))
    return StepBatches(
        Batch(labeled, vectors, index), Batch(views, None, index), whole(labeled), whole(views)
    )


def trajectory(case: Any, cfg: Config, student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    loop = Loop(cfg, student, teacher)
    terms: dict[str, list[float]] = {
        name: [] for name in ("class", "cons", "weight", "loss", "step", "acc", "acc_teacher")
    }
    teachers = []
    for epoch in case["in_epochs"].tolist():
        for step in range(len(case["in_lab"])):
            found = loop.advance(batches(case, step), epoch)
            mlmt = cfg.mlmt
            values = {
                "class": found["loss_class"], "cons": found["loss_consistency"], "loss": found["loss"],
                "step": loop.run.step,
                "weight": consistency_weight(epoch, mlmt.burn_in_epochs, mlmt.epochs, mlmt.w_cons),
                "acc": found["accuracy"], "acc_teacher": found["accuracy_teacher"],
            }  # fmt: skip
            for name, value in values.items():
                terms[name].append(float(value))
        teachers.append(array(torch.nn.utils.parameters_to_vector(teacher.parameters())))
    return {
        **{f"out_{name}": np.array(values) for name, values in terms.items() if name != "step"},
        "out_step": np.array(terms["step"]).astype(np.int64),
        "out_student": flat_state(student),
        "out_teacher": flat_state(teacher),
        "out_teacher_epochs": np.stack(teachers),
    }


def mlmt_trajectory(case: Any) -> dict[str, Any]:
    dtype = dtype_of(case)
    classes, channels = case["in_target"].shape[-1], case["in_lab"].shape[2]
    student, teacher = (toy(dtype, channels, classes=classes) for _ in range(2))
    rule_start(student, "student.")
    rule_start(teacher, "teacher.")
    return trajectory(case, branch_config(case), student, teacher)


# --- the files -------------------------------------------------------------------------------------------------


def mlmt_output_file(case: Any) -> dict[str, Any]:
    sizes = case["in_batch_sizes"].tolist()
    parts = torch.from_numpy(np.ascontiguousarray(case.arrays["in_sigmoid"])).split(sizes)
    rolled = torch.cat([roll_scores(part, flat=True) for part in parts])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "output_ema_raw_5.txt"
        write_scores(path, rolled.double().numpy())
        raw = path.read_text()
    return {
        "out_raw": np.array(raw.split("\n")),
        "out_bin": np.array(binary_text(rolled, 0.5).split("\n")),
    }


ADAPTERS = {
    "mlmt_cosine_loss": mlmt_cosine_loss,
    "mlmt_bce": mlmt_bce,
    "mlmt_accuracy": mlmt_accuracy,
    "mlmt_schedules": mlmt_schedules,
    "mlmt_ema": mlmt_ema,
    "mlmt_trajectory": mlmt_trajectory,
    "mlmt_output_file": mlmt_output_file,
}
