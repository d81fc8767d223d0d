"""For the recorded cases of the AEL variant: inputs to our public functions, outputs under the recorded names."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.config import DataConfig, OptimConfig
from common.distributed import Dist
from common.numerics.mixing import Box
from common.numerics.optim import Group, build_optimizer, set_learning_rate
from common.run.progress import Progress
from projects.u2pl import train
from projects.u2pl.ael.boxes import adaptive_box, grow_box, random_box
from projects.u2pl.ael.config import AelConfig
from projects.u2pl.ael.data import labeled_pass
from projects.u2pl.ael.draws import AelDraws, BoxUniforms
from projects.u2pl.ael.losses import consistency_loss, sampled_pixels
from projects.u2pl.ael.memory import (
    AelMemory,
    batch_confidence,
    choose,
    class_probabilities,
    class_totals,
    covered_classes,
    moved_confidence,
    paste_probabilities,
    write_columns,
)
from projects.u2pl.ael.step import AelBatch, ael_step, copy_paste
from projects.u2pl.config import Config, MethodConfig, ModelConfig, QuirkConfig
from projects.u2pl.contrast import ContrastDraws
from projects.u2pl.state import Run


def tensor(case: Any, key: str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(case[key]))


class RecordedAelDraws(AelDraws):
    """Draws read from a recording; the image drawn must be a possible one."""

    def __init__(self, **recorded: Any) -> None:
        super().__init__(0, 0, torch.device("cpu"))
        self.recorded = {name: iter(values) for name, values in recorded.items()}

    def coin(self) -> float:
        return float(next(self.recorded["coins"]))

    def classes(self, candidates: Any, probs: np.ndarray, count: int) -> list[int]:
        assert len(candidates) == len(probs)
        drawn = [int(next(self.recorded["classes"])) for _ in range(count)]
        assert set(drawn) <= set(candidates)
        return drawn

    def image(self, candidates: Any, count: int) -> int:
        image = int(next(self.recorded["images"]))
        assert image in (candidates or range(count))
        return image

    def component_order(self, count: int) -> list[int]:
        order = [int(i) for i in next(self.recorded["orders"]) if i >= 0]
        assert sorted(order) == list(range(1, count + 1))
        return order

    def box_uniforms(self) -> BoxUniforms:
        draw = BoxUniforms(*(float(v) for v in next(self.recorded["boxes"])))
        assert min(draw) >= 0, "the recording drew no random box here"
        return draw

    def class_maps(self, num_classes: int, height: int, width: int) -> Tensor:
        maps = torch.stack([next(self.recorded["maps"]) for _ in range(num_classes)])
        assert maps.shape[1:] == (height, width)
        return maps


# --- losses ----------------------------------------------------------------------------------------------------


def consistency(case: Any) -> dict[str, Any]:
    logits = tensor(case, "in_logits").clone().requires_grad_(True)
    gamma, gamma2 = case["in_gammas"].tolist()
    keep = None
    if "in_rand" in case:
        keep = sampled_pixels(logits, tensor(case, "in_class_conf"), tensor(case, "in_rand"), gamma2)
    loss = consistency_loss(logits, tensor(case, "in_conf"), tensor(case, "in_labels").long(), gamma, keep)
    loss.backward()
    return {"out_loss": loss.detach().numpy(), "grad_logits": logits.grad.numpy()}


# --- images, class confidence, bank ----------------------------------------------------------------------------


def halves(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, labels and partners of a recorded batch with 6 channels and labels on top of each other."""
    own, other = images.chunk(2, dim=1)
    own_labels, other_labels = labels.long().chunk(2, dim=1)
    return own, own_labels, other, other_labels


def pasting(case: Any) -> dict[str, Any]:
    parts = halves(tensor(case, "in_images"), tensor(case, "in_labels"))
    images, labels = copy_paste(*parts, case["in_query"].tolist())
    return {"out_images": images.numpy(), "out_labels": labels.numpy()}


def confidence(case: Any) -> dict[str, Any]:
    found = batch_confidence(class_totals(tensor(case, "in_logits"), tensor(case, "in_labels").long()))
    state = moved_confidence(tensor(case, "in_state"), found, float(case["in_momentum"]))
    return {"out_confidence": found.numpy(), "out_state": state.numpy()}


def bank_update(case: Any) -> dict[str, Any]:
    bank, ids = tensor(case, "in_bank").clone(), torch.from_numpy(case["in_ids"]).long()
    labels = tensor(case, "in_logits").argmax(dim=1)
    write_columns(bank, covered_classes(labels, len(bank), float(case["in_area_thresh"])), ids)
    return {"out_bank": bank.numpy()}


def sampling(case: Any) -> dict[str, Any]:
    conf, bank, targets = case["in_conf"], case["in_bank"] > 0, case["in_targets"].tolist()
    rows = case["in_draws"].tolist()
    draws = RecordedAelDraws(
        coins=[0.0] * len(rows),
        classes=[value for k, _, _ in rows for value in (targets[0], k)],
        images=[among if among >= 0 else anywhere for _, among, anywhere in rows],
    )
    choices = [choose(conf, bank, targets, 1, draws) for _ in rows]
    return {
        "out_p": class_probabilities(conf),
        "out_p_query": paste_probabilities(conf, targets),
        "out_ids": np.array([choice.pairs[0].second for choice in choices]),
    }


# --- boxes -----------------------------------------------------------------------------------------------------


def masks(case: Any) -> dict[str, Any]:
    found = []
    for labels, (k, thresh), order, uniform in zip(
        case["in_maps"], case["in_params"].tolist(), case["in_shuffled"], case["in_uniform"], strict=True
    ):
        draws = RecordedAelDraws(orders=[order], boxes=[uniform])
        found.append(adaptive_box(labels, int(k), thresh, draws, no_pad=True, no_slim=True))
    return {"out_box": np.array(found)}


def boxes(case: Any) -> dict[str, Any]:
    anywhere = [random_box(int(size), BoxUniforms(*uniform)) for size, *uniform in case["in_random"].tolist()]
    grown = [
        grow_box(Box(*(int(v) for v in box)), int(size), draw)
        for size, *box, draw in case["in_grow"].tolist()
    ]
    return {"out_random": np.array(anywhere, dtype=float), "out_grow": np.array(grown, dtype=float)}


# --- trajectory ------------------------------------------------------------------------------------------------

# what the description of the case says about the run and the arrays do not
CONTRA_WEIGHT, HEAD_FACTOR, NUM_QUERIES, NUM_NEGATIVES = 0.1, 10.0, 6, 5
AEL = {"area_thresh": 0.02, "area_thresh2": 0.03, "high_entropy_threshold": 70.0}


def trajectory(case: Any) -> dict[str, Any]:
    from projects.u2pl.tests.golden_adapters import toy_networks

    classes, dim, crop, epochs, length, start, total_epochs = case["in_meta"].tolist()
    ael = AelConfig(start_epoch=start, **AEL)
    cfg = Config(
        data=DataConfig(dataset="shapes", split="none", crop_size=(crop, crop)),
        optim=OptimConfig(lr=0.01, head_lr_factor=HEAD_FACTOR, weight_decay=1e-4, epochs=total_epochs, batch_size=2),
        model=ModelConfig(aux_weight=0.4),
        method=MethodConfig(
            criterion="ohem", ohem_min_kept=int(case["in_min_kept"]), sup_only_epochs=0, average_from_start=True,
            contra_weight=CONTRA_WEIGHT, low_rank=2, high_rank=11, current_class_threshold=0.05,
            low_entropy_threshold=30.0, num_queries=NUM_QUERIES, num_negatives=NUM_NEGATIVES,
            queue_size=40, queue_size_first=40, ael=ael,
        ),
        quirks=QuirkConfig(shared_first_epoch=False),
    )  # fmt: skip
    nets = toy_networks(case, cfg, classes, dim, True)
    state, images = tensor(case, "in_class_state"), case["in_bank"].shape[1]
    memory = AelMemory(cfg, classes, images, dim, 0).to(state.dtype)
    memory.class_confidence.copy_(state[0])
    memory.cutmix_bank.copy_(tensor(case, "in_bank") > 0)
    parts = [nets.student.encoder, nets.student.auxor, nets.student.decoder]
    groups = [
        Group(part.parameters(), f) for part, f in zip(parts, (1, HEAD_FACTOR, HEAD_FACTOR), strict=True)
    ]
    optimizer = build_optimizer(cfg.optim, groups)
    x_l, y_l, x_u = (tensor(case, f"in_{name}") for name in ("x_l", "y_l", "x_u"))
    run = Run(cfg, Dist(), None, nets, None, optimizer, torch.amp.GradScaler("cpu", enabled=False), memory)
    out: dict[str, Any] = {}
    losses, passes = [], []
    for i in range(epochs * length):
        epoch, step = divmod(i, length)
        set_learning_rate(optimizer, cfg.optim, i, total_epochs * length)
        nets.student.train()
        at = Progress(i, length, total_epochs)
        train.before_step(at, run)
        number, k = labeled_pass(epoch, step, length, len(x_l))
        passes += [number] if k == 0 else []  # a pass begins
        run.draws = step_draws(case, i)
        choice = memory.choose(run.draws)
        (pair,) = choice.pairs
        ids = [int(case["in_u_ids"][i, pair.first])]
        batch = AelBatch(*halves(x_l[k], y_l[k]), x_u[ids], x_u[[pair.second]], ids)
        result = ael_step(batch, choice, at, run)
        optimizer.zero_grad(set_to_none=True)
        result.total.backward()
        optimizer.step()
        train.after_step(at, run)
        contra = torch.as_tensor(result.terms.get("loss_contra", 0.0))
        values = (result.terms["loss_sup"], result.terms["loss_unsup"], contra / CONTRA_WEIGHT)
        losses.append([float(value.detach()) for value in values])
        if step + 1 == length:
            out |= epoch_end(epoch, nets, memory, state, ael.momentum ** (i + 1))
    queues = memory.queues
    return {
        **out,
        "out_losses": np.array(losses),
        "out_labelled_epochs": np.array(passes),
        "out_queue_sizes": queues.lengths.numpy(),
        "out_queue": torch.cat([queues.contents(k) for k in range(classes)]).numpy(),
    }


def step_draws(case: Any, i: int) -> RecordedAelDraws:
    """The recorded draws of step `i`."""
    draws = RecordedAelDraws(
        coins=[case["in_coin"][i]],
        classes=[*case["in_query"][i], case["in_sample_class"][i]],
        images=[case["in_second_id"][i]],
        orders=[case["in_shuffled"][i]],
        boxes=[case["in_uniform"][i]],
        maps=tensor(case, "in_rand")[i],
    )
    slots = case["in_draw_slots"].tolist()
    first, last = sum(slots[:i]), sum(slots[: i + 1])
    draws.contrast = ContrastDraws(
        tensor(case, "in_draw_anchor").view(-1, NUM_QUERIES)[first:last],
        tensor(case, "in_draw_negative").view(-1, NUM_QUERIES * NUM_NEGATIVES)[first:last],
    )
    return draws


def epoch_end(epoch: int, nets: Any, memory: AelMemory, start: Tensor, faded: float) -> dict[str, Any]:
    """State after an epoch; the recording also moves two unused rows of confidences, which we do not keep."""
    out = {f"out_bank_epoch{epoch}": memory.cutmix_bank.numpy().astype(float)}
    for role, network in (("student", nets.student), ("teacher", nets.teacher)):
        for key, value in network.state_dict().items():
            if not key.endswith("num_batches_tracked"):
                out[f"out_{role}_epoch{epoch}/{key}"] = value.numpy().copy()
    # all rows are moved by the same batches, so they differ from the first by what is left of their start
    rows = memory.class_confidence + faded * (start - start[0])
    return out | {f"out_class_state_epoch{epoch}": rows.numpy()}


ADAPTERS = {
    "ael_cons_sample": consistency,
    "ael_cons_gamma2": consistency,
    "ael_cons_plain": consistency,
    "ael_copy_paste": pasting,
    "ael_class_confidence": confidence,
    "ael_bank_update": bank_update,
    "ael_sampling": sampling,
    "ael_mask": masks,
    "ael_boxes": boxes,
    "ael_trajectory": trajectory,
}
