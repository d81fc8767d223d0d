"""The recorded cases of the baselines: their inputs to our public functions, our outputs under the recorded names."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.data.loaders import Batch
from common.numerics.losses import Losses
from common.run.progress import Progress
from projects.cps.baselines import cct, gct
from projects.cps.losses import supervised
from projects.cps.model import Branches, Networks
from projects.cps.network import CpsNetwork
from projects.cps.tests import toys


def tensor(case: Any, key: str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(case[key]))


def array(value: Tensor) -> np.ndarray:
    return value.detach().numpy()


def with_gradient(logits: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[np.ndarray, np.ndarray]:
    logits = logits.clone().requires_grad_()
    value = loss(logits)
    value.backward()
    return array(value), array(logits.grad)


def fill(module: nn.Module, dtype: torch.dtype) -> None:
    """The recorded rule for weights."""
    filled = {}
    for key, value in module.state_dict().items():
        rng, shape = np.random.RandomState(zlib.crc32(key.encode())), tuple(value.shape)
        if key.endswith("num_batches_tracked"):
            numbers = np.zeros(shape, np.int64)
        elif key.endswith("running_var"):
            numbers = 0.5 + rng.rand(*shape)
        elif key.endswith("running_mean"):
            numbers = 0.1 * rng.randn(*shape)
        elif len(shape) == 1:
            numbers = 0.5 + 0.5 * rng.rand(*shape) if key.endswith("weight") else 0.1 * rng.randn(*shape)
        else:
            numbers = rng.randn(*shape) * np.sqrt(2 / np.prod(shape[1:]))
        filled[key] = torch.from_numpy(np.asarray(numbers).astype(np.float32))
    module.to(dtype).load_state_dict(filled)


def dtype_of(case: Any) -> torch.dtype:
    return torch.from_numpy(np.zeros(0, case.dtype)).dtype


# --- mean teacher ----------------------------------------------------------------------------------------------


class ToyBackbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, 4, 1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x)).relu()


class ToyHead(nn.Module):
    def __init__(self, planes: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, planes, 1, bias=False), nn.BatchNorm2d(planes)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


def toy_network(case: Any, branch: int) -> CpsNetwork:
    prefix = f"in_init_branch{branch}__"
    state = {
        k.removeprefix(prefix).replace("__", "."): tensor(case, k)
        for k in case.arrays
        if k.startswith(prefix)
    }
    classes, planes = state["classifier.weight"].shape[:2]
    network = CpsNetwork(ToyBackbone(), ToyHead(planes), nn.Conv2d(planes, classes, 1)).to(dtype_of(case))
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)
    return network.train()


def final_state(case: Any, networks: dict[str, nn.Module]) -> dict[str, Any]:
    states = {f"{name}.{k}": v for name, one in networks.items() for k, v in one.state_dict().items()}
    found = {f"out_final_{key.replace('.', '__')}": array(value) for key, value in states.items()}
    return {key: value for key, value in found.items() if key in case}


def mean_teacher(case: Any) -> dict[str, Any]:
    steps, weight = int(case["in_steps"]), float(case["in_weight"])
    cfg = toys.config(
        "mean_teacher",
        method={
            "name": "mean_teacher",
            "mean_teacher": {"weight": weight, "ema_decay": float(case["in_ema"])},
        },
        optim={
            "lr": float(case["in_base_lr"]),
            "momentum": float(case["in_momentum"]),
            "weight_decay": float(case["in_weight_decay"]),
            "power": float(case["in_power"]),
            "epochs": 1,
            "batch_size": len(case["in_label"][0]),
        },
        quirks={"loss_world_size": int(case["in_world_size"])},
    )
    student, teacher = toy_network(case, 1), toy_network(case, 2).requires_grad_(False)
    modules, criterion = {"branch1": student, "branch2": teacher}, partial(supervised, empty_is_nan=True)
    run = toys.run_of(cfg, Networks(modules, Branches([student]), criterion))
    optimizer, total_steps = run.optimizers["branch1"], int(case["in_total_iterations"])
    losses: list[Losses] = []
    rates = []
    for k in range(steps):
        labeled = Batch(tensor(case, "in_labeled_x")[k], tensor(case, "in_label")[k].long(), None)
        unlabeled = Batch(tensor(case, "in_unlabeled0_x")[k], None, None)
        losses.append(toys.one_step(run, Progress(k, total_steps, 1), [(labeled, unlabeled)]))
        rates.append(optimizer.param_groups[0]["lr"])
    parts = np.array(
        [
            [float(r.terms[name].detach()) for name in ("loss_unsup", "loss_sup", "sup_teacher")]
            for r in losses
        ]
    )
    buffers = {
        f"out_momentum_branch1__{name.replace('.', '__')}": array(optimizer.state[p]["momentum_buffer"])
        for name, p in student.named_parameters()
    }
    return {
        **final_state(case, {"branch1": student, "branch2": teacher}),
        **buffers,
        "out_local_losses_unweighted": parts / [weight, 1, 1],
        "out_logged_losses": parts,
        "out_total_loss": np.array([float(r.total.detach()) for r in losses]),
        "out_lr": np.array(rates),
    }


# --- cross-consistency training --------------------------------------------------------------------------------


def cct_parts(case: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    target = tensor(case, "in_target_probs")
    for key in case.recorded():
        if found := re.fullmatch(r"out_(mse|kl|js)_masked([01])", key):
            kind, masked = found.groups()
            sure = float(case["in_conf_threshold"]) if masked == "1" else None
            out[key], out[f"grad_{kind}_masked{masked}"] = with_gradient(
                tensor(case, "in_logits"),
                lambda x, kind=kind, sure=sure: cct.consistency_loss(x, target, kind, sure),
            )
        elif found := re.fullmatch(r"out_ab(\d+)_loss", key):
            epoch, iteration = case[f"in_ab{found[1]}_epoch_iter"].tolist()
            threshold = ab_threshold(case, epoch, iteration)
            out[key], out[f"grad_ab{found[1]}_logits"] = with_gradient(
                tensor(case, "in_ab_logits"),
                lambda x, threshold=threshold: cct.bootstrapped_cross_entropy(
                    x, tensor(case, "in_ab_label").long(), threshold
                ),
            )
    feature, objects = tensor(case, "in_feature"), object_map(case, "in_main_pred_argmax")
    boxes = [cct.contour_boxes(one) for one in cct.object_maps(object_map(case, "in_cutout_argmax"))]
    height, width = case["in_cutout_argmax"].shape[-2:]
    draws = RecordedPlaces(case)
    mask = cct.cutout_mask(boxes, height, width, 0.4, draws.place)
    draws.all_taken()
    small = torch.empty(1, 1, *case["in_cutout_resize"].tolist())
    when = zip(case["in_ab_epoch"].tolist(), case["in_ab_iter"].tolist(), strict=True)
    return out | {
        "out_ab_threshold": np.array([ab_threshold(case, *one) for one in when]),
        "out_context_mask": array(cct.context_masking(feature, objects)),
        "out_object_mask": array(cct.object_masking(feature, objects)),
        "out_feature_drop": array(cct.feature_drop(feature, float(case["in_drop_u"]))),
        "out_feature_noise": array(cct.feature_noise(feature, tensor(case, "in_noise"))),
        "out_cutout_mask": array(cct.nearest(mask, small)).astype(np.uint8),
        "out_upsample4": array(main_decoder(case)(feature))[..., ::3, ::3],
    }


def ab_threshold(case: Any, epoch: int, iteration: int) -> float:
    length, epochs = int(case["in_ab_iters_per_epoch"]), int(case["in_ab_epochs"])
    return cct.annealed_threshold(
        epoch * length + iteration - 1, cct.annealing_steps(epochs, length), case["in_ab_logits"].shape[1]
    )


def object_map(case: Any, key: str) -> Tensor:
    return (tensor(case, key) > 0).unsqueeze(1)


def main_decoder(case: Any) -> Callable[[Tensor], Tensor]:
    decoder = nn.ModuleDict(
        {"classifier": nn.Conv2d(case["in_feature"].shape[1], case["in_logits"].shape[1], 1)}
    )
    fill(decoder, dtype_of(case))
    return lambda x: cct.times_four(decoder["classifier"](x))


class RecordedPlaces:
    """Offsets as recorded, which must be asked for with the recorded bounds."""

    def __init__(self, case: Any) -> None:
        self.left = case["in_cutout_draws_lo_hi_value"].reshape(-1, 3).tolist()

    def place(self, low: int, high: int) -> int:
        *bounds, value = self.left.pop(0)
        assert bounds == [low, high]
        return int(value)

    def all_taken(self) -> None:
        assert not self.left


# --- guided collaborative training -----------------------------------------------------------------------------


def flaw_detector(case: Any) -> dict[str, Any]:
    detector = gct.FlawDetector(int(case["in_num_classes"]))
    keys = [(key, list(value.shape)) for key, value in detector.state_dict().items()]
    assert sorted(keys) == sorted((key, shape) for key, shape, _ in case.keys)
    fill(detector, dtype_of(case))
    (flaws,) = detector.eval()(tensor(case, "in_image"), tensor(case, "in_softmax"))
    return {"out_flawmap": array(flaws)}


def gct_targets(case: Any) -> dict[str, Any]:
    height, cpu = int(case["in_image_height"]), torch.device("cpu")
    flaws_l, flaws_r = tensor(case, "in_flaw_l"), tensor(case, "in_flaw_r")
    probs_l, probs_r = tensor(case, "in_softmax_l"), tensor(case, "in_softmax_r")
    handled_l, handled_r = gct.handled(flaws_l, height), gct.handled(flaws_r, height)
    targets = gct.consistency_targets(probs_l, probs_r, handled_l, handled_r, float(case["in_dc_threshold"]))
    out = {}
    for key in case.recorded():
        if found := re.fullmatch(r"out_kernel(\d+)", key):
            weights = gct.gaussian_weights(int(found[1]), cpu, dtype_of(case))
            out[key] = array(torch.outer(weights, weights))
    ramp_length = int(case["in_ramp_len"])
    truth = gct.true_flaws(
        probs_l, tensor(case, "in_label").long(), height, float(case["in_mu"]), int(case["in_nu"])
    )
    return out | {
        "out_kernel_sizes": np.array([gct.odd_size(height, divisor) for divisor in (16, 8, 4)]),
        "out_handled_l": array(handled_l),
        "out_handled_r": array(handled_r),
        "out_target_l_sub": array(targets.left)[..., ::2, ::2],
        "out_target_r_sub": array(targets.right)[..., ::2, ::2],
        "out_both_bad": array(targets.both_wrong).astype(np.uint8),
        "out_detector_target": array(truth),
        "out_ramp": np.array([gct.sigmoid_ramp(k, ramp_length) for k in case["in_ramp_k"].tolist()]),
        "out_fd_criterion": array(gct.flaw_errors(flaws_l, flaws_r)),
    }


ADAPTERS = {
    "traj_mt": mean_teacher,
    "cct_parts": cct_parts,
    "gct_flaw_detector": flaw_detector,
    "gct_targets": gct_targets,
}
