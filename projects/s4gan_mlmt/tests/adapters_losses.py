"""Recorded cases of the losses and of whole iterations: their inputs to our functions, our outputs by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.data.loaders import Batch
from projects.s4gan_mlmt.config import Config, MethodConfig, QuirkConfig, S4GanDataConfig, S4GanOptimConfig
from projects.s4gan_mlmt.deeplabv2 import DeepLabV2
from projects.s4gan_mlmt.discriminator import Discriminator
from projects.s4gan_mlmt.losses import (
    above_threshold,
    discriminator_loss,
    fake_maps,
    feature_matching,
    one_hot,
    pseudo_labels,
    real_maps,
    segmentation_loss,
    self_training,
)
from projects.s4gan_mlmt.model import Critic, Judgement, Networks, Segmenter
from projects.s4gan_mlmt.tests.rules import fill
from projects.s4gan_mlmt.tests.toys import Loop
from tests.golden_runner import Adapter


def tensor(case: Any, key: str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(case[key]))


def leaf(case: Any, key: str) -> Tensor:
    return tensor(case, key).clone().requires_grad_(True)


def labels(case: Any, key: str) -> Tensor:
    return tensor(case, key).long()


def array(value: Tensor) -> np.ndarray:
    return value.detach().numpy()


def dtype_of(case: Any) -> torch.dtype:
    return torch.from_numpy(np.zeros(0, case.dtype)).dtype


def cross_entropy(case: Any) -> dict[str, Any]:
    logits = leaf(case, "in_logits")
    loss = segmentation_loss(logits, labels(case, "in_labels"), int(case["in_ignore"]))
    loss.backward()
    return {"out_loss": array(loss), "grad_logits": array(logits.grad)}


def class_channels(case: Any) -> dict[str, Any]:
    target = labels(case, "in_labels")
    return {"out_one_hot": array(one_hot(target, int(case["in_num_classes"]), dtype_of(case)))}


def matching(case: Any) -> dict[str, Any]:
    fake = leaf(case, "in_fake")
    loss = feature_matching(tensor(case, "in_real"), fake)
    loss.backward()
    return {"out_loss": array(loss), "grad_fake": array(fake.grad)}


def adversarial(case: Any) -> dict[str, Any]:
    fake, real = leaf(case, "in_fake"), leaf(case, "in_real")
    loss = discriminator_loss(fake, real)
    loss.total.backward()
    return {
        "out_fake": array(loss.fake),
        "out_real": array(loss.real),
        "out_loss": array(loss.total),
        "grad_fake": array(fake.grad),
        "grad_real": array(real.grad),
    }


def selection(case: Any) -> dict[str, Any]:
    logits = leaf(case, "in_logits")
    accepted = above_threshold(tensor(case, "in_scores"), float(case["in_threshold"]))
    out: dict[str, Any] = {"out_count": int(accepted.sum())}
    if "out_loss" not in case:
        return out
    loss = self_training(logits, accepted)
    loss.backward()
    return out | {
        "out_selected": np.flatnonzero(array(accepted)),
        "out_pred": array(logits)[array(accepted)],
        "out_labels": array(pseudo_labels(logits, accepted))[array(accepted)].astype(np.float32),
        "out_loss": array(loss),
        "grad_logits": array(logits.grad),
    }


def discriminator_inputs(case: Any) -> dict[str, Any]:
    logits, x_l = tensor(case, "in_logits"), tensor(case, "in_labelled")
    real = real_maps(labels(case, "in_real_labels"), tensor(case, "in_real"), logits.shape[1], x_l)
    return {"out_fake": array(fake_maps(logits, tensor(case, "in_unlabelled"))), "out_real": array(real)}


# --- whole iterations ------------------------------------------------------------------------------------------


class RecordingCritic(Critic):
    """Keeps the scores of every map it has judged."""

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__(discriminator)
        self.scores: list[Tensor] = []

    def judged(self, x: Tensor) -> Judgement:
        judgement = super().judged(x)
        self.scores.append(judgement.scores.detach())
        return judgement


def run_config(case: Any, visits: str, method: str) -> Config:
    """The configuration that a recorded run stands for."""
    steps = len(case["in_lab_img" if "in_lab_img" in case else "in_img"])
    optim = S4GanOptimConfig(
        lr=float(case["in_lr"]), momentum=float(case["in_momentum"]), weight_decay=float(case["in_weight_decay"]),
        power=float(case["in_power"]), steps=steps, epochs=1, lr_d=float(case["in_lr_D"]) if "in_lr_D" in case else 1.0,
    )  # fmt: skip
    numbers = {"fm_weight": "in_lambda_fm", "st_weight": "in_lambda_st", "st_threshold": "in_threshold"}
    return Config(
        data=S4GanDataConfig(dataset="voc", split="full"),
        optim=optim,
        method=MethodConfig(
            name=method, dropout=0.0, **{k: float(case[v]) for k, v in numbers.items() if v in case}
        ),
        quirks=QuirkConfig(visits=visits),
    )


def batch(case: Any, images: str, target: str | None, step: int) -> Batch:
    """One recorded batch: small images enlarged by repetition, cut, and shifted to 0; labels 255 where ignored."""
    times, size = int(case["in_repeat"]), int(case["in_size"])

    def grown(key: str) -> Tensor:
        large = torch.from_numpy(case[key][step]).repeat_interleave(times, -2).repeat_interleave(times, -1)
        return large[..., :size, :size]

    image = grown(images).to(dtype_of(case)) - 110
    label = torch.zeros(len(image), 0, 0, dtype=torch.int64) if target is None else grown(target).long()
    return Batch(image, label.masked_fill(label == int(case["in_ignore"]), 255), torch.arange(len(image)))


def start(network: nn.Module, dtype: torch.dtype) -> None:
    fill(network, [(key, list(value.shape), "") for key, value in network.state_dict().items()])
    network.to(dtype).train()


def started_networks(case: Any, cfg: Config) -> Networks:
    """Networks as the recorded run starts them."""
    classes, dtype = int(case["in_num_classes"]), dtype_of(case)
    network = DeepLabV2(classes, layers=(1, 1, 1, 1))
    start(network, dtype)
    segmenter, critic = Segmenter(network), None
    if cfg.method.adversarial:
        side = int(case["in_size"]) // 16
        discriminator = Discriminator(classes + 3, pool=(side, side), dropout=0.0)
        start(discriminator, dtype)
        critic = RecordingCritic(discriminator)
    return Networks(segmenter, segmenter, critic, critic)


def slices(network: nn.Module, prefix: str, case: Any) -> dict[str, Any]:
    """Norms of every tensor, and the leading parts of some, in the shapes of the recording."""
    state = network.state_dict()
    norms = [float(value.double().norm()) for value in state.values()]
    out: dict[str, Any] = {f"{prefix}_norm": np.array(norms)}
    for key, value in state.items():
        name = f"{prefix}_{key.replace('.', '_')}"
        if name not in case:
            continue
        if key == "layer4.0.bn3.running_mean":
            value = value[::32]
        out[name] = array(value)[tuple(slice(n) for n in case[name].shape)]
    return out


def replay(case: Any, cfg: Config, prefix: str) -> dict[str, Any]:
    """The recorded iterations, by the training loop itself."""
    loop = Loop(cfg, nets=started_networks(case, cfg))
    network, critic = loop.nets.segmenter.network, loop.nets.critic
    assert [key.removeprefix("module.") for key in case["in_g_keys"].tolist()] == list(network.state_dict())
    began = {key: value.clone() for key, value in network.state_dict().items()}
    rows: dict[str, list[Any]] = {}

    def note(**values: Any) -> None:
        for name, value in values.items():
            rows.setdefault(f"{prefix}_{name}", []).append(float(value))

    method = cfg.method
    for step in range(cfg.optim.steps):
        if critic is None:
            batches = [batch(case, "in_img", "in_label", step)]
        else:
            batches = [
                batch(case, "in_lab_img", "in_lab_label", step),
                batch(case, "in_unlab_img", None, step),
                batch(case, "in_real_img", "in_real_label", step),
            ]
            critic.scores.clear()
        total, terms = loop.advance([tuple(batches)])
        note(**dict(zip(("lr0", "lr1", "lrD"), loop.rates[-1], strict=False)))
        if critic is None:
            note(loss=total)
            continue
        of_fake, of_real = (discriminator_loss(*critic.scores[2:])[i] for i in (1, 2))
        note(
            ce=terms["loss_sup"], fm=terms["loss_fm"] / method.fm_weight, fmw=terms["loss_fm"],
            st=terms["loss_st"] / method.st_weight, S=total - terms["loss_d"],
            D=terms["loss_d"], Df=of_fake, Dr=of_real, count=(terms["kept"] * len(batches[1].image)).round(),
        )  # fmt: skip
        rows.setdefault(f"{prefix}_scores", []).append(array(critic.scores[0].flatten()))
    found: dict[str, Any] = {name: np.array(values) for name, values in rows.items()}
    moved = [float((v.double() - began[k].double()).norm()) for k, v in network.state_dict().items()]
    found |= {f"{prefix}_g_delta_norm": np.array(moved)} | slices(network, f"{prefix}_g", case)
    if critic is not None:
        found |= slices(critic.discriminator, f"{prefix}_d", case)
    return {name: value for name, value in found.items() if name in case}


VISITS = {"out": "repeated_0_4", "out_modern": "repeated_1_5", "out_once": "once"}


def s4gan_trajectory(case: Any) -> dict[str, Any]:
    return {
        name: value
        for prefix, visits in VISITS.items()
        for name, value in replay(case, run_config(case, visits, "s4gan"), prefix).items()
    }


def full_trajectory(case: Any) -> dict[str, Any]:
    return {
        name: value
        for prefix in ("out", "out_once")
        for name, value in replay(case, run_config(case, VISITS[prefix], "sup_only"), prefix).items()
    }


ADAPTERS: dict[str, Adapter] = {
    **dict.fromkeys(("ce_voc", "ce_context", "ce_city", "ce_one_pixel", "ce_all_ignored"), cross_entropy),
    "one_hot": class_channels,
    "feature_matching": matching,
    "discriminator_loss": adversarial,
    "selection": selection,
    "selection_none": selection,
    "discriminator_inputs": discriminator_inputs,
    "s4gan_trajectory": s4gan_trajectory,
    "full_trajectory": full_trajectory,
}
