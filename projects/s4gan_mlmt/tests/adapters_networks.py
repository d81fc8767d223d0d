"""Recorded cases of the networks, the parameter groups, the optimizers and their schedule."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.config import OptimConfig
from common.numerics.optim import set_learning_rate
from projects.s4gan_mlmt.deeplabv2 import AsppSum, DeepLabV2
from projects.s4gan_mlmt.discriminator import Discriminator
from projects.s4gan_mlmt.mlmt.model import MultiLabelClassifier
from projects.s4gan_mlmt.optimizer import (
    VisitedSgd,
    build_discriminator_optimizer,
    build_generator_optimizer,
    visited_groups,
)
from projects.s4gan_mlmt.tests.rules import fill, rule_value
from projects.s4gan_mlmt.wrn38 import DeepLabV3PlusWrn38


def tensor(case: Any, key: str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(case[key]))


def array(value: Tensor) -> np.ndarray:
    return value.detach().numpy()


def dtype_of(case: Any) -> torch.dtype:
    return torch.from_numpy(np.zeros(0, case.dtype)).dtype


def watched(network: nn.Module, *names: str) -> dict[str, Tensor]:
    """The outputs of the named parts, filled by the next forward."""
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> None:
        network.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output: seen.update({name: output.detach().clone()})
        )

    for name in names:
        watch(name)
    return seen


# --- networks --------------------------------------------------------------------------------------------------


def aspp_two_branches(case: Any) -> dict[str, Any]:
    x = tensor(case, "in_x").repeat(1, 64, 1, 1)
    aspp = AsppSum(x.shape[1], case["out_logits"].shape[1])
    fill(aspp, [(key, value.shape, "") for key, value in aspp.state_dict().items()])
    for key, value in aspp.state_dict().items():
        value.copy_(torch.from_numpy(rule_value(f"layer5.{key}", tuple(value.shape))))
    aspp.to(dtype_of(case))
    logits = aspp(x)
    logits.sum().backward()
    learns = [any(p.grad is not None for p in conv.parameters()) for conv in aspp.conv2d_list]
    return {"out_logits": array(logits), "out_has_grad": np.array(learns).astype(np.int64)}


def deeplabv2(case: Any) -> DeepLabV2:
    """The network with the layers that the keys name, filled by the rule."""
    names = [key for key, _, _ in case.keys]
    layers = [len({n.split(".")[1] for n in names if n.startswith(f"layer{i}.")}) for i in (1, 2, 3, 4)]
    network = DeepLabV2(int(case["in_num_classes"]), layers=layers)
    fill(network, case.keys)
    return network.to(dtype_of(case))


def deeplabv2_forward(case: Any) -> dict[str, Any]:
    network = deeplabv2(case).eval()
    with torch.no_grad():
        even = network(tensor(case, "in_image_even"))
        stages = ("maxpool", "layer1", "layer2", "layer3", "layer4")
        seen = watched(network, *stages)
        image = tensor(case, "in_image")
        logits = network(image)
        outputs = {f"out_{name}": value[:, :8] for name, value in seen.items()}
        up = network.predict(image)
    for name in ("out_maxpool", "out_layer1"):
        outputs[name] = outputs[name][..., ::2, ::2]
    return {
        "out_logits": array(logits),
        "out_logits_even": array(even),
        "out_up": array(up[..., ::4, ::4]),
        **{name: array(value) for name, value in outputs.items()},
    }


def deeplabv2_tiny_train(case: Any) -> dict[str, Any]:
    network = deeplabv2(case).train()
    logits = network(tensor(case, "in_image"))
    last = network.layer4[0].bn3
    return {
        "out_logits": array(logits),
        "out_bn1_mean": array(network.bn1.running_mean),
        "out_bn1_var": array(network.bn1.running_var),
        "out_l4_mean": array(last.running_mean[::16]),
        "out_l4_var": array(last.running_var[::16]),
        "out_tracked": array(network.bn1.num_batches_tracked),
    }


def deeplabv3p_wrn38_forward(case: Any) -> dict[str, Any]:
    network = DeepLabV3PlusWrn38(int(case["in_num_classes"]))
    fill(network, case.keys)
    network.to(dtype_of(case)).eval()
    with torch.no_grad():
        even = network(tensor(case, "in_image_even"))
        seen = watched(network, "backbone.mod2", "backbone.mod3", "backbone.mod7", "aspp")
        logits = network(tensor(case, "in_image"))
    aspp = seen["aspp"]
    blocks = aspp.unflatten(1, (5, -1))[:, :, :4].flatten(1, 2)
    return {
        "out_logits": array(logits[..., ::2, ::2]),
        "out_logits_shape": np.array(logits.shape),
        "out_logits_even": array(even[..., ::2, ::2]),
        "out_logits_even_shape": np.array(even.shape),
        "out_s2": array(seen["backbone.mod2"][:, :8, ::2, ::2]),
        "out_s4": array(seen["backbone.mod3"][:, :8]),
        "out_high": array(seen["backbone.mod7"][:, :8]),
        "out_aspp": array(blocks),
    }


def discriminator(case: Any, pool: tuple[int, int]) -> dict[str, Any]:
    grid, repeat, (height, width) = case["in_grid"], int(case["in_repeat"]), case["in_size"].tolist()
    maps = grid.repeat(repeat, axis=2).repeat(repeat, axis=3)[..., :height, :width].astype(case.dtype) / 255
    out: dict[str, Any] = {}
    for window in (pool, None):  # the authors' window, and the whole map, which is the same at their crops
        network = Discriminator(grid.shape[1], pool=window)
        fill(network, case.keys)
        with torch.no_grad():
            scores, feats = network.to(dtype_of(case)).eval()(torch.from_numpy(maps))
        if out:
            np.testing.assert_allclose(array(scores), out["out_score"], rtol=1e-6)
            np.testing.assert_allclose(array(feats), out["out_feature"], rtol=1e-4, atol=1e-5)
        out = {"out_score": array(scores), "out_feature": array(feats)}
    return out


class Given(nn.Module):
    """Channel dropout with a given mask (B, C) of the channels that stay."""

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        return x * (2.0 * self.kept[..., None, None].to(x.dtype))


def discriminator_dropout(case: Any) -> dict[str, Any]:
    x = tensor(case, "in_x").requires_grad_(True)
    side = x.shape[-1] // 16
    network = Discriminator(x.shape[1], pool=(side, side))
    fill(network, [(key, value.shape, "") for key, value in network.state_dict().items()])
    network.dropout1, network.dropout2, network.dropout3 = (
        Given(tensor(case, f"in_mask{i}")) for i in (1, 2, 3)
    )
    scores, feats = network.to(dtype_of(case)).train()(x)
    (scores.sum() + feats.mean()).backward()
    return {"out_score": array(scores), "out_feature": array(feats), "grad_x": array(x.grad)}


def mlmt_resnet101_forward(case: Any) -> dict[str, Any]:
    network = MultiLabelClassifier("resnet101", case["out_logits"].shape[1])
    fill(network, case.keys)
    with torch.no_grad():
        logits = network.to(dtype_of(case)).eval()(tensor(case, "in_image"))
    return {"out_logits": array(logits)}


# --- optimizers ------------------------------------------------------------------------------------------------


def param_groups(network: nn.Module, case: Any) -> dict[str, Any]:
    groups = visited_groups(network, 10.0)
    optimizer = build_generator_optimizer(optim_config(float(case["in_base_lr"])), network)
    rates = [group["lr"] for group in optimizer.param_groups]
    return {
        "out_names": np.array([name for group in groups for name in group.names]),
        "out_group": np.array([i for i, group in enumerate(groups) for _ in group.names]),
        "out_visits": np.array([visits for group in groups for visits in group.visits]),
        "out_lr": np.array([rates[i] for i, group in enumerate(groups) for _ in group.names]),
    }


def param_groups_deeplabv2(case: Any) -> dict[str, Any]:
    with torch.device("meta"):  # names and shapes only
        return param_groups(DeepLabV2(int(case["in_num_classes"])), case)


def param_groups_deeplabv3p(case: Any) -> dict[str, Any]:
    with torch.device("meta"):
        return param_groups(DeepLabV3PlusWrn38(int(case["in_num_classes"])), case)


def optim_config(lr: float, power: float = 0.9) -> OptimConfig:
    return OptimConfig(lr=lr, head_lr_factor=10.0, power=power, epochs=1, batch_size=1)


def visited_sgd(case: Any, mode: Any) -> np.ndarray:
    """Parameters after each step, (steps, parameters, size)."""
    params = [nn.Parameter(row.clone()) for row in tensor(case, "in_params")]
    group = {"params": params, "visits": case["in_visits"].tolist()}
    momentum, decay = float(case["in_momentum"]), float(case["in_weight_decay"])
    optimizer = VisitedSgd([group], lr=1.0, momentum=momentum, weight_decay=decay, mode=mode)
    after = []
    for lr, grads in zip(case["in_lr"].tolist(), tensor(case, "in_grads"), strict=True):
        optimizer.param_groups[0]["lr"] = lr
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
        optimizer.step()
        after.append(np.stack([array(p).copy() for p in params]))
    return np.stack(after)


def sgd_visits(case: Any) -> dict[str, Any]:
    network = nn.Linear(1, 1, bias=False)
    network.weight = nn.Parameter(tensor(case, "in_adam_params").clone())
    adam = build_discriminator_optimizer(network, lr=1.0)
    after = []
    for lr, grad in zip(case["in_adam_lr"].tolist(), tensor(case, "in_adam_grads"), strict=True):
        adam.param_groups[0]["lr"] = lr
        network.weight.grad = grad.clone()
        adam.step()
        after.append(array(network.weight).copy())
    modes = {"legacy": "repeated_0_4", "modern": "repeated_1_5", "once": "once"}
    return {f"out_{name}": visited_sgd(case, mode) for name, mode in modes.items()} | {
        "out_adam": np.stack(after)
    }


def lr_poly(case: Any) -> dict[str, Any]:
    generator = DeepLabV2(2, layers=(1, 1, 1, 1), width=2)
    critic = Discriminator(5, width=2)
    rows: list[list[float]] = []
    columns = (case[f"in_{key}"].tolist() for key in ("base", "steps", "power", "iter"))
    for base, steps, power, step in zip(*columns, strict=True):
        optim = optim_config(base, power)
        rates = set_learning_rate(build_generator_optimizer(optim, generator), optim, int(step), int(steps))
        adam = build_discriminator_optimizer(critic, lr=base)
        rows.append([*rates, *set_learning_rate(adam, optim, int(step), int(steps))])
    group0, group1, critics = np.array(rows).T
    return {"out_group0": group0, "out_group1": group1, "out_d": critics}


ADAPTERS = {
    "aspp_two_branches": aspp_two_branches,
    "deeplabv2_forward": deeplabv2_forward,
    "deeplabv2_tiny_train": deeplabv2_tiny_train,
    "deeplabv3p_wrn38_forward": deeplabv3p_wrn38_forward,
    "discriminator_voc": lambda case: discriminator(case, (20, 20)),
    "discriminator_city": lambda case: discriminator(case, (16, 32)),
    "discriminator_dropout": discriminator_dropout,
    "mlmt_resnet101_forward": mlmt_resnet101_forward,
    "param_groups_deeplabv2": param_groups_deeplabv2,
    "param_groups_deeplabv3p": param_groups_deeplabv3p,
    "sgd_visits": sgd_visits,
    "lr_poly": lr_poly,
}
