"""For every recorded case of BRPG: its inputs to our public functions, our outputs under the recorded names."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from common.data.dataset_yaml import load_spec
from common.data.files import voc_colormap
from common.data.lists import read_entries
from common.data.loaders import oversample
from common.data.transforms import EvalTransform, TrainTransform
from common.data.views import ColorDraw, WindowDraw, long_side_size, place, strong_view
from common.distributed import Dist
from common.mean_teacher.contrast import ContrastInputs, class_masks
from common.measure.evaluation import center_crop
from common.measure.inference import sliding_window, windows
from common.measure.metrics import ConfusionMatrix, class_iou, mean_iou
from common.models.deeplab import Outputs, upsample
from common.models.xception import Block
from common.numerics import optim as schedules
from common.numerics.ema import warmup_decay
from common.numerics.mixing import BoxDraw, fill_boxes, half_area_box
from common.numerics.optim import Group, build_optimizer, set_learning_rate
from common.run.progress import Progress
from projects.brpg import step, train
from projects.brpg.augment import (
    Draws,
    Mixed,
    copy_paste,
    strong_mix,
)
from projects.brpg.clustering import (
    QueueRows,
    assign,
    compactness,
    confidence_weighted_centres,
    contents,
    least_compact,
    minibatch_kmeans,
    refill,
)
from projects.brpg.config import ModelConfig
from projects.brpg.contrast import (
    ContrastDraws,
    candidates,
    contrast,
    negative_rows,
)
from projects.brpg.losses import (
    Criterion,
    entropy_percentile,
    gradient_share,
    grid_line,
    keep_low_entropy,
    prototype_loss,
    pseudo_label_loss,
    pseudo_threshold,
)
from projects.brpg.memory import (
    ClassConfidence,
    FeatureMemory,
    FeatureQueues,
    Rows,
    class_weights,
    collect,
    first_in_order,
    true_class_confidence,
)
from projects.brpg.model import Networks, segmentation_of
from projects.brpg.prototypes import Prototypes
from projects.brpg.settings import MethodConfig
from projects.brpg.state import MethodState
from projects.brpg.tests import toys
from splits.pictures import BLACK, full_palette
from tests.golden_runner import Skip
from tests.rules import rule_value

CPU = torch.device("cpu")
PAD_LABEL = 254  # of the authors' label maps of unlabeled photos
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
KINDS = ("high", "low")

# the recordings' names of the settings
SETTINGS = {
    "queue_len": "queue_size",
    "sample_pixel_num": "sample_per_image",
    "fix_class": "fix_classes",
    "unsup_sample_num": "unsup_points",
    "grid_num": "grid_steps",
    "init_prob": "conf_init",
    "thre_update": "conf_decay",
    "sup_only_epoch": "sup_only_epochs",
    "sample_delay": "collect_start",
    "sample_last": "collect_epochs",
    "class_balance_sample": "class_balanced",
    "type": "prototype_kind",
    "cosine_tao": "temperature",
    "prototype_ema_decay": "prototype_decay",
    "high_prototype_num": "high_prototypes",
    "low_prototype_num": "low_prototypes",
    "add_num": "add_prototypes",
}


def tensor(case: Any, key: str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(case[key]))


def leaf(case: Any, key: str) -> Tensor:
    return tensor(case, key).clone().requires_grad_(True)


def array(value: Tensor) -> np.ndarray:
    return value.detach().numpy()


def torch_dtype(case: Any) -> torch.dtype:
    return torch.from_numpy(np.zeros(0, case.dtype)).dtype


def settings(case: Any, **changes: Any) -> MethodConfig:
    """The published settings with what the case says, and changes."""
    named = json.loads(str(case["in_params_json"])) if "in_params_json" in case else {}
    given = {SETTINGS.get(k, k): tuple(v) if isinstance(v, list) else v for k, v in named.items()}
    return MethodConfig(**(given | changes))


def identity(count: int) -> Tensor:
    """Keys whose order is the identity: the recordings replace every random permutation by it."""
    return torch.arange(count, dtype=torch.float64)


# --- schedules and losses --------------------------------------------------------------------------------------


def schedule_tables(case: Any) -> dict[str, Any]:
    epochs, length, start = (int(case[k]) for k in ("in_E", "in_L", "in_sup_only_epoch"))
    iterations, rates = case["in_iters"].tolist(), case["in_base_lr"].tolist()
    updates = [i - start * length for i in iterations]
    return {
        "out_lr": np.array([[schedules.poly(r, i, epochs * length, 0.9) for r in rates] for i in iterations]),
        "out_ema": np.array([warmup_decay(u, 0.99) if u >= 0 else -1 for u in updates]),
        "out_percentile": np.array([entropy_percentile(80.0, i // length, epochs) for i in iterations]),
        "out_pseudo_threshold": np.array(
            [pseudo_threshold(0.8, 0.95, i, length, epochs) for i in iterations]
        ),
    }


def grid(case: Any) -> dict[str, Any]:
    return {
        f"out_h{side}_g{steps}": array(grid_line(side, steps, CPU))
        for side, steps in case["in_pairs"].tolist()
    }


def supervised(case: Any) -> dict[str, Any]:
    with_aux = bool(int(case["in_use_aux"]))
    rule = Criterion(min_kept=int(case["in_min_kept"]), aux_weight=0.4 if with_aux else 0.0)
    logits, aux = leaf(case, "in_logits"), leaf(case, "in_aux") if "in_aux" in case else None
    labels, used = tensor(case, "in_label"), aux if with_aux else None
    loss = rule(logits, labels, used)
    loss.backward()
    out = {
        "out_ce": array(rule.one(logits, labels, used, ohem=False)),
        "out_ohem": array(rule.one(logits, labels, used, ohem=True)),
        "out_loss": array(loss),
        "grad_logits": array(logits.grad),
    }
    if aux is not None:
        out["grad_aux"] = array(torch.zeros_like(aux) if aux.grad is None else aux.grad)
    return out


def unsupervised(case: Any) -> dict[str, Any]:
    logits = leaf(case, "in_logits")
    kept = keep_low_entropy(
        tensor(case, "in_teacher"), tensor(case, "in_target"), float(case["in_percentile"])
    )
    loss = pseudo_label_loss(logits, kept)
    loss.backward()
    return {"out_target": array(kept), "out_loss": array(loss), "grad_logits": array(logits.grad)}


# --- collection ------------------------------------------------------------------------------------------------


def queue_state(memory: FeatureMemory, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows per class, and all rows [features, confidence] class by class."""
    queue = memory.queue(name)
    held = [contents(queue, k) for k in range(len(queue.written))]
    rows = torch.cat([torch.cat((one.feats, one.conf.unsqueeze(1)), dim=1) for one in held])
    return array(queue.lengths), array(rows)


def empty_memory(case: Any, method: MethodConfig, classes: int, dim: int) -> FeatureMemory:
    return FeatureMemory(method, classes, dim).to(torch_dtype(case))


def without_padding(rows: Rows) -> np.ndarray:
    table = torch.cat((rows.feats, torch.stack((rows.conf, rows.classes.to(rows.conf)), dim=1)), dim=1)
    return array(table[rows.classes >= 0])


def collection(case: Any) -> dict[str, Any]:
    scarce = any("_back" in key for key in case.arrays)
    changes: dict[str, Any] = {"scarce_queue": True} if scarce else {}
    if "in_queue_len" in case:
        changes["queue_size"] = int(case["in_queue_len"])
    method = settings(case, **changes)
    classes, dim = int(case["in_num_classes"]), case["in_s0_student_rep_l"].shape[1]
    memory = empty_memory(case, method, classes, dim)
    confidence = ClassConfidence(classes, method.conf_decay, method.conf_init)
    if "in_conf_ema" in case:
        confidence.value.copy_(torch.from_numpy(case["in_conf_ema"]))
    out: dict[str, Any] = {}
    steps = sum(key.startswith("in_s") and key.endswith("_label") for key in case.arrays)
    for s in range(steps):
        label, logits = tensor(case, f"in_s{s}_label").long(), tensor(case, f"in_s{s}_student_logits_l")
        confidence.update(true_class_confidence(upsample(logits, label.shape[-2:]), label))
        student = Outputs(logits, tensor(case, f"in_s{s}_student_rep_l"), None)
        teacher = Outputs(
            tensor(case, f"in_s{s}_teacher_eval_logits_u"), tensor(case, f"in_s{s}_teacher_eval_rep_u"), None
        )
        collected = collect(student, label, teacher, method, identity, confidence=confidence.value)
        memory.push(collected, Dist())
        for name, ours in (("high", "high"), ("low", "low"), ("back", "scarce")):
            if ours not in collected:
                continue
            counts, rows = queue_state(memory, ours)
            found = {f"queue_counts_{name}": counts, f"queue_rows_{name}": rows}
            found[f"{name}_rows"] = without_padding(collected[ours])
            out |= {f"out_s{s}_{key}": value for key, value in found.items()}
        out[f"out_s{s}_conf_ema"] = array(confidence.value).copy()
    return only_recorded(case, out)


def only_recorded(case: Any, out: dict[str, Any]) -> dict[str, Any]:
    """Outputs that some cases of a kind record and others do not."""
    recorded = case.recorded()
    return {key: value for key, value in out.items() if key in recorded}


def queue_two_ranks(case: Any) -> dict[str, Any]:
    cap, classes = int(case["in_cap"]), int(case["in_num_classes"])
    dim = case["in_s0_high_rank0"].shape[1] - 2
    sizes = {"high": cap, "low": cap, "random": 2 * cap}
    queues = {k: FeatureQueues([size] * classes, dim).to(torch_dtype(case)) for k, size in sizes.items()}
    out = {}
    for s in range(sum(key.startswith("in_s") and key.endswith("_high_rank0") for key in case.arrays)):
        for name, queue in queues.items():
            source = "high" if name == "random" else name
            ranks = sorted(key for key in case.arrays if key.startswith(f"in_s{s}_{source}_rank"))
            table = torch.cat([tensor(case, key) for key in ranks])
            queue.append(Rows(table[:, :-2], table[:, -2], table[:, -1].long()))
            held = [contents(queue, k) for k in range(classes)]
            rows = torch.cat([torch.cat((one.feats, one.conf.unsqueeze(1)), dim=1) for one in held])
            out |= {f"out_s{s}_counts_{name}": array(queue.lengths), f"out_s{s}_rows_{name}": array(rows)}
    return out


def class_balance(case: Any) -> dict[str, Any]:
    rows, draws = tensor(case, "in_rows"), torch.from_numpy(case["in_draws"])
    classes, size = rows[:, -1].long(), int(case["in_k"])
    everything = torch.ones(len(rows), dtype=torch.bool)
    counts, weights = class_weights(classes, everything, int(classes.max()) + 1, 0.5)
    # the recorded generator: repeated draws from the cumulative weights; a row's key is the first draw that hits it
    cumulative = weights[classes].cumsum(0)
    hits = torch.searchsorted(cumulative, draws * cumulative[-1], right=True).clamp(max=len(rows) - 1)
    keys = torch.full((len(rows),), float(len(draws)), dtype=torch.float64)
    keys.scatter_reduce_(0, hits, torch.arange(len(draws), dtype=torch.float64), "amin")
    chosen = everything if len(rows) <= size else keys < len(draws)
    order = identity(len(rows)) if len(rows) <= size else keys
    place = first_in_order(chosen, order, size)
    return {
        "out_rows": array(rows[place[place >= 0]]),
        "out_class_count": array(counts[counts > 0]),
        "out_class_weight": array(weights[counts > 0]),
    }


# --- clustering ------------------------------------------------------------------------------------------------


def lexicographic(centres: np.ndarray) -> np.ndarray:
    """Positions that sort rows by their first column, then the second and so on."""
    return np.lexsort(centres.T[::-1])


def queue_names(case: Any) -> list[str]:
    return sorted(key.removeprefix("in_") for key in case.arrays if re.match(r"in_c\d", key))


def coco_fallback(case: Any) -> dict[str, Any]:
    out = {}
    for k in sorted({name.split("_")[0] for name in queue_names(case)}):
        rows = [tensor(case, f"in_{k}_{kind}") for kind in ("high", "low", "back")]
        high, low, back = (QueueRows(one[:, :-1], one[:, -1]) for one in rows)
        found = refill(high, low, back, int(case["in_cap"]))
        for kind, one in zip(KINDS, found, strict=True):
            out[f"out_{k}_{kind}"] = array(torch.cat((one.feats, one.conf.unsqueeze(1)), dim=1))
    return out


def adaptive_numbers(case: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for measure in ("cos_sim", "l2", "l2_norm"):
        for kind in KINDS:
            values = torch.stack([compactness(own, measure) for own in tensor(case, f"in_{kind}")])
            out[f"out_{kind}_{measure}"] = array(2 + least_compact(values, measure, 0.05).long())
            if measure == "cos_sim" and kind == "high":
                out["out_cos_sim_high"] = array(values)
    return out


def kmeans_exact(case: Any) -> dict[str, Any]:
    out = {}
    for name in queue_names(case):
        rows = case[f"in_{name}"]
        feats, conf = rows[:, :-1], rows[:, -1]
        centres = minibatch_kmeans(feats, len(case[f"out_{name}_center"])).centres
        labels, _ = assign(feats, centres)
        weighted = confidence_weighted_centres(feats, conf, labels, centres)
        for kind, found in (("center", centres), ("prob", weighted)):
            out[f"out_{name}_{kind}"] = found[lexicographic(found)]
    return out


def kmeans_pinned(case: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key in case.arrays:
        if not key.startswith("in_") or case.arrays[key].ndim != 2:
            continue
        for k in case["in_k"].tolist():
            centres = minibatch_kmeans(case[key], k, int(case["in_seed"])).centres
            centres = centres[lexicographic(centres)]
            labels, inertia = assign(case[key], centres)
            name = f"out_{key.removeprefix('in_')}_k{k}"
            out |= {f"{name}_centers": centres, f"{name}_labels": labels, f"{name}_inertia": inertia}
    return out


def prob_centers(case: Any) -> dict[str, Any]:
    out = {}
    for name in queue_names(case):
        rows, k = case[f"in_{name}"], len(case[f"out_{name}"])
        feats, conf = rows[:, :-1], rows[:, -1]
        centres = np.zeros((k, feats.shape[1]))
        out[f"out_{name}"] = confidence_weighted_centres(feats, conf, np.arange(len(rows)) % k, centres)
    return out


# --- prototype stage -------------------------------------------------------------------------------------------


def given_prototypes(case: Any) -> tuple[Prototypes, list[tuple[int, int]]]:
    """The recorded prototypes, and how many of either kind every class has."""
    classes = sum(key.startswith("in_proto_high_c") for key in case.arrays)
    kinds = [[tensor(case, f"in_proto_{kind}_c{k}") for kind in KINDS] for k in range(classes)]
    slots = max(len(high) + len(low) for high, low in kinds)
    prototypes = Prototypes(classes, slots, kinds[0][0].shape[1]).to(kinds[0][0].dtype)
    prototypes.set([torch.cat(own) for own in kinds])
    return prototypes, [(len(high), len(low)) for high, low in kinds]


def recorded_prototypes(prototypes: Prototypes, numbers: list[tuple[int, int]]) -> dict[str, Any]:
    out = {}
    for k, (high, low) in enumerate(numbers):
        own = array(prototypes.centres[k])
        out[f"out_proto_high_c{k}"], out[f"out_proto_low_c{k}"] = own[:high], own[high : high + low]
    return out


def proto_stage(case: Any) -> dict[str, Any]:
    prototypes, numbers = given_prototypes(case)
    feats, labels = leaf(case, "in_student_rep"), tensor(case, "in_label").long()
    logits = upsample(tensor(case, "in_teacher_eval_logits_u"), labels.shape[-2:])
    conf, pseudo = logits.softmax(dim=1).max(dim=1)
    epoch, length, epochs = (int(case[k]) for k in ("in_epoch", "in_iters_per_epoch", "in_epochs"))
    threshold = pseudo_threshold(float(case["in_pseudo_threshold"]), 0.95, epoch * length, length, epochs)
    method = MethodConfig(grid_steps=int(case["in_grid_num"]), unsup_points=int(case["in_unsup_sample_num"]))
    keys = identity(conf.numel())
    found = prototype_loss(feats, labels, pseudo, conf, prototypes, method, threshold=threshold, keys=keys)
    prototypes.update(found.feats, found.labels, found.slot, method.prototype_decay)
    loss = found.labeled + found.unlabeled
    gradient_share(loss, int(case["in_world_size"]), forward_only=True).backward()
    out = {
        "out_threshold": threshold,
        "out_num_selected": int((conf >= threshold).sum()),
        "out_loss_l": array(found.labeled),
        "out_loss_u": array(found.unlabeled),
        "out_loss": array(loss),
        "grad_student_rep": array(feats.grad),
        "out_original_unlabelled_is_nan": int(not (conf >= threshold).any()),
        **recorded_prototypes(prototypes, numbers),
    }
    return only_recorded(case, out)


def contra_prototype(case: Any) -> dict[str, Any]:
    pos, neg, low_rank, high_rank, temperature, queries, negatives = case["in_cfg"].tolist()
    method = MethodConfig(
        contra_weight=1.0, current_class_threshold=pos, current_class_negative_threshold=neg,
        low_rank=int(low_rank), high_rank=int(high_rank), contra_temperature=temperature,
        num_queries=int(queries), num_negatives=int(negatives),
    )  # fmt: skip
    feats, n = leaf(case, "in_rep"), len(case["in_onehot_l"])
    masks = torch.cat((tensor(case, "in_onehot_l"), tensor(case, "in_onehot_u"))).bool()
    for role in ("l", "u"):  # the masks are what our own function makes of the labels
        made = class_masks(torch.from_numpy(case[f"in_labels_{role}"]).long(), masks.shape[1])
        assert torch.equal(made, tensor(case, f"in_onehot_{role}").bool())
    inputs = ContrastInputs(
        feats, tensor(case, "in_rep_teacher"), torch.cat((tensor(case, "in_prob_l"), tensor(case, "in_prob_u"))),
        masks, tensor(case, "in_low_mask").squeeze(1).bool(), tensor(case, "in_high_mask").squeeze(1).bool(), n,
    )  # fmt: skip
    rows, sizes = tensor(case, "in_queue"), torch.from_numpy(case["in_queue_sizes"])
    queues = FeatureQueues(case["in_capacity"].tolist(), rows.shape[1]).to(rows.dtype)
    owners = torch.repeat_interleave(torch.arange(len(sizes)), sizes.long())
    queues.append(Rows(rows, torch.zeros(len(rows), dtype=rows.dtype), owners))
    new_keys = queues.append(negative_rows(inputs, method))
    found = candidates(inputs, queues, method, slot_index=True)
    used = found.contributes.nonzero().flatten()
    assert len(used) == int(case["in_num_draw_slots"])

    def spread(key: str, width: int) -> Tensor:
        return torch.zeros(masks.shape[1], width, dtype=torch.long).index_copy_(
            0, used, tensor(case, key).view(-1, width)
        )

    draws = ContrastDraws(
        spread("in_draw_anchor", method.num_queries),
        spread("in_draw_negative", method.num_queries * method.num_negatives),
    )
    prototypes, _ = given_prototypes(case)
    loss = contrast(inputs, queues, prototypes, found, draws, method)
    loss.backward()
    return {
        "out_loss": array(loss),
        "grad_rep": array(feats.grad),
        "out_new_keys": array(new_keys),
        "out_queue_sizes": array(queues.lengths),
        "out_queue": array(torch.cat([contents(queues, k).feats for k in range(len(sizes))])),
    }


# --- data ------------------------------------------------------------------------------------------------------


def unlabeled_view(case: Any) -> dict[str, Any]:
    size = int(case["in_crop"])
    crop = (size, size)
    col, row = case["in_xy"].tolist()
    jitter: list[tuple[int, float]] = []
    if int(case["in_jitter"]):
        factors = case["in_jitter_factors"].tolist()
        jitter = [(k, factors[k]) for k in case["in_jitter_order"].tolist()]
    draw = WindowDraw(int(case["in_long"]), col, row, float(case["in_flip_draw"]) < 0.5)
    colors = ColorDraw(tuple(jitter), bool(int(case["in_gray"])), float(case["in_blur_radius"]))
    photo, label = Image.fromarray(case["in_image"]), Image.fromarray(case["in_label"])
    weak = place(photo, draw, crop, Image.Resampling.BILINEAR, 0)
    out_label = np.asarray(place(label, draw, crop, Image.Resampling.NEAREST, PAD_LABEL))
    height, width = long_side_size(photo.height, photo.width, draw.long_side)
    return {
        "out_resized_wh": np.array([width, height]),
        "out_weak": np.asarray(weak).astype(np.float32),
        "out_strong": np.asarray(strong_view(weak, colors)).astype(np.float32),
        "out_label": out_label,
    }


class RecordedRandom:
    """Stands in for `random.Random`: replays uniform numbers and integers."""

    def __init__(self, uniform: np.ndarray, integers: np.ndarray) -> None:
        self.uniforms, self.integers = iter(uniform.tolist()), iter(integers.tolist())

    def random(self) -> float:
        return next(self.uniforms)

    def randint(self, low: int, high: int) -> int:
        value = next(self.integers)
        assert low <= value <= high
        return value


def labeled_transform(case: Any) -> dict[str, Any]:
    size = (int(case["in_crop"]),) * 2
    image, label = case["in_image"], case["in_label"]
    if len(case["in_draws"]):
        transform = TrainTransform(mean=MEAN, std=STD, crop_size=size, scale_range=(0.5, 2.0), pad_label=0)
        x, y = transform(image, label, RecordedRandom(case["in_draws"], case["in_offsets"]))
    else:
        x, y = EvalTransform(mean=MEAN, std=STD)(image, label)
        x, y = (part[0] for part in center_crop(x[None], y[None], size, 0))
    return {"out_image": array(x), "out_label": array(y)}


class RecordedDraws(Draws):
    """Boxes and coins read from a recording; permutations are the identity."""

    def __init__(self, boxes: Any = (), coins: Any = ()) -> None:
        super().__init__(0, 0, CPU)
        self.boxes, self.coins = iter(boxes), iter(coins)

    def coin(self) -> float:
        return float(next(self.coins))

    def box(self, height: int, width: int) -> BoxDraw:
        return BoxDraw(*(int(v) for v in next(self.boxes)))

    def keys(self, count: int) -> Tensor:
        return identity(count)


def drawn_box(mask: np.ndarray) -> tuple[int, int, int]:
    """Width, column and row of the box where a mask (H, W) is zero."""
    rows, cols = np.nonzero(mask == 0)
    assert len(rows) == (np.ptp(rows) + 1) * (np.ptp(cols) + 1), "not a box"
    return np.ptp(cols) + 1, cols.min(), rows.min()


def cutmix(case: Any) -> dict[str, Any]:
    batch = Mixed(tensor(case, "in_image"), tensor(case, "in_target"), tensor(case, "in_conf"))
    mixed = strong_mix(batch, "cutmix", RecordedDraws(case["in_draws"]))
    height, width = batch.pseudo.shape[-2:]
    draws = RecordedDraws(case["in_draws"])
    boxes = [half_area_box(height, width, draws.box(height, width)) for _ in batch.pseudo]
    masks = fill_boxes(torch.ones_like(batch.pseudo), boxes, 0)
    return {
        "out_masks": array(masks).astype(np.uint8),
        "out_image": array(mixed.images),
        "out_target": array(mixed.pseudo),
        "out_conf": array(mixed.conf),
    }


def copy_pasted(case: Any) -> dict[str, Any]:
    x, y = tensor(case, "in_images"), torch.from_numpy(case["in_labels"]).long()
    coins, draws = [], iter(case["in_draws"].tolist())
    for second in y.chunk(2, dim=1)[1]:  # an image without anything to paste consumes no draw
        coins.append(next(draws) if second.sum() > 0 else 1.0)
    table = torch.zeros(256, dtype=torch.bool)
    table[torch.from_numpy(case["in_classes"])] = True
    image, label = copy_paste(
        x, y, table, torch.tensor(coins, dtype=torch.float64), float(case["in_select_prob"])
    )
    found = true_class_confidence(tensor(case, "in_logits"), torch.from_numpy(case["in_gt"]).long())
    return {"out_image": array(image), "out_label": array(label), "out_class_conf": array(found)}


def published_lists() -> Path:
    default = Path(__file__).resolve().parents[4] / "shared" / "data" / "published_lists"
    folder = Path(os.environ.get("SSS_PUBLISHED_LISTS", default))
    if not folder.is_dir():
        raise Skip(f"the published lists are not there: {folder} (set SSS_PUBLISHED_LISTS)")
    return folder


def list_file(folder: Path, name: str) -> Path:
    """A published list; Pascal's and Cityscapes' are those of U2PL, byte for byte."""
    owners = ("BRPG", "U2PL") if name.startswith("coco/") else ("U2PL", "BRPG")
    places = [folder / owner / "data" / "splits" / name for owner in owners]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise Skip(f"the published list {name} is not in {folder}")
    return found


def splits(case: Any) -> dict[str, Any]:
    folder = published_lists()
    names = case["in_name"].tolist()
    lines = []
    out: dict[str, Any] = {"out_sha_file": []}
    for name in names:
        data = list_file(folder, name).read_bytes()
        lines.append([line.strip() for line in data.decode().splitlines() if line.strip()])
        out["out_sha_file"].append(hashlib.sha256(data).hexdigest())
    out = {
        "out_sha_file": np.array(out["out_sha_file"]),
        "out_count": np.array([len(read_entries(list_file(folder, name))) for name in names]),
        "out_sha_sorted": np.array([sha(sorted(own)) for own in lines]),
        "out_first": np.array([own[0] for own in lines]),
        "out_last": np.array([own[-1] for own in lines]),
    }
    for dataset, spec_name in (("cityscapes", "cityscapes"), ("pascal", "voc"), ("coco", "coco")):
        pair = item_paths(
            spec_name, list_file(folder, f"{dataset}/val.txt"), int(case[f"in_index_{dataset}"])
        )
        out[f"out_pair_{dataset}"] = np.array(pair)
    for which in ("a", "b"):
        seed = int(case[f"in_seed_{which}"])
        for key, name, count in (
            ("pascal92_labeled", "pascal/92/labeled.txt", 10490),
            ("pascal366_unlabeled", "pascal/366/unlabeled.txt", 10216),
        ):
            ids = oversample([entry.id for entry in read_entries(list_file(folder, name))], count, seed)
            out[f"out_{key}_len_{which}"] = len(ids)
            out[f"out_{key}_first5_{which}"] = np.array(ids[:5])
            out[f"out_{key}_sha_{which}"] = sha(ids)
    return only_recorded(case, out)


def sha(ids: list[str]) -> str:
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()


def item_paths(dataset: str, path: Path, index: int) -> list[str]:
    """Image and mask that a list line names, in a folder that holds just those files."""
    line = path.read_text(encoding="utf-8").splitlines()[index].split()
    entry = read_entries(path)[index]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if dataset == "cityscapes":
            stem = line[0].removeprefix("leftImg8bit/").removesuffix("_leftImg8bit.png")
            files = [line[0], f"gtFine/{stem}_gtFine_labelTrainIds.png"]
        elif dataset == "voc":
            files = [f"JPEGImages/{entry.id}.jpg", f"SegmentationClassAug/{entry.id}.png"]
        else:
            files = line
        for name in files:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
        spec = load_spec(dataset, folder)
        item = spec.find_items([entry], path, labels=True)[0]
        assert item.label is not None
        return [part.relative_to(spec.root).as_posix() for part in (item.image, item.label)]


# --- evaluation ------------------------------------------------------------------------------------------------


def miou(case: Any) -> dict[str, Any]:
    classes = int(case["in_K"])
    out: dict[str, Any] = {}
    intersection, union = torch.zeros(classes), torch.zeros(classes)
    for b in range(sum(key.startswith("in_pred") for key in case.arrays)):
        matrix = ConfusionMatrix(classes)
        matrix.update(tensor(case, f"in_pred{b}"), tensor(case, f"in_label{b}"))
        found = (*matrix.intersection_union(), matrix.counts.sum(dim=1))
        for name, value in zip(("inter", "union", "target"), found, strict=True):
            out[f"out_{name}{b}"] = array(value)
        intersection, union = intersection + found[0], union + found[1]
    return out | {
        "out_iou": array(class_iou(intersection, union)),
        "out_miou": mean_iou(intersection, union),
    }


def sliding(case: Any) -> dict[str, Any]:
    weight, bias = tensor(case, "in_weight"), tensor(case, "in_bias")

    def forward(x: Tensor) -> Tensor:
        return upsample(F.conv2d(x.to(weight.dtype), weight, bias, stride=2, padding=2), x.shape[-2:])

    out: dict[str, Any] = {}
    for key in case.arrays:
        if key.startswith("in_size"):
            height, width, crop = case[key].tolist()
            out[key.replace("in_size", "out_windows")] = np.array(windows((height, width), (crop, crop)))
        if key.startswith("in_image"):
            index = key.removeprefix("in_image")
            crop, height, width = case[f"in_cfg{index}"].tolist()
            scores = sliding_window(forward, tensor(case, key), (crop, crop))
            out[f"out_logits{index}"] = array(upsample(scores, (height, width))[0])
    return out


def colormaps(case: Any) -> dict[str, Any]:
    index = case["in_index"]
    pascal, city = (load_spec(name).palette for name in ("voc", "cityscapes"))
    maps = {
        "coco": voc_colormap(256),
        "pascal": full_palette(pascal),
        "cityscapes": full_palette(city, BLACK),
    }
    return {f"out_{name}": palette[index] for name, palette in maps.items()}


# --- networks --------------------------------------------------------------------------------------------------


def network(case: Any) -> dict[str, Any]:
    shapes = {key.removeprefix("module."): shape for key, shape, _ in case.keys}
    stage3 = sum(key.startswith("encoder.layer3.") and key.endswith(".conv1.weight") for key in shapes)
    backbone = {0: "xception65", 6: "resnet50", 23: "resnet101", 36: "resnet152"}[stage3]
    aux = any(key.startswith("auxor.") for key in shapes)
    net = segmentation_of(
        ModelConfig(backbone=backbone, aux_weight=0.4 if aux else 0.0),
        num_classes=shapes["decoder.classifier.8.weight"][0],
        rep_head="decoder.representation.8.weight" in shapes,
    )
    net.load_state_dict(
        {
            key.removeprefix("module."): torch.from_numpy(np.asarray(rule_value(key, shape)))
            for key, shape, _ in case.keys
        }
    )
    net = net.to(torch_dtype(case)).eval()
    image = tensor(case, "in_image")
    with torch.no_grad():
        stages, out = net.encoder(image), net(image)
    low, x4 = stages[0], stages[-1]
    result = {
        "out_pred": array(out.logits[:, : case["out_pred"].shape[1]]),
        "out_low_level_mean": array(low.mean(dim=(2, 3))),
        "out_low_level_sub": array(low[:, ::16, ::4, ::4]),
        "out_x4_mean": array(x4.mean(dim=(2, 3))),
        "out_x4_sub": array(x4[:, ::64, ::3, ::3]),
    }
    if out.feats is not None:
        result["out_rep"] = array(out.feats[:, ::4])
    if out.aux is not None:
        result["out_aux"] = array(out.aux)
    return result


def xception_block(case: Any) -> dict[str, Any]:
    x = leaf(case, "in_x")
    state = {k.removeprefix("in_state/"): tensor(case, k) for k in case.arrays if k.startswith("in_state/")}
    planes = state["sepconv3.pointwise.weight"].shape[0]
    block = Block(
        x.shape[1], planes, int(case["in_stride"]), int(case["in_dilation"]), bool(int(case["in_grow_first"]))
    ).to(x.dtype)
    block.load_state_dict(state)
    y, tapped = block.eval()(x)
    (y**2).sum().backward()
    # the original's rectifier of the third layer may work in place on the tapped tensor
    hook = tapped.relu() if int(case["in_third_relu_inplace"]) else tapped
    return {"out_y": array(y), "out_hook": array(hook), "grad_x": array(x.grad)}


# --- whole loop ------------------------------------------------------------------------------------------------


class ToyNetwork(nn.Module):
    """Two strided convolutions and 1x1 heads; the names are those of the recorded states."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        first, second = state["encoder.0.weight"].shape[:2][::-1], state["encoder.3.weight"].shape[:2][::-1]
        layers: list[nn.Module] = []
        for planes in (first, second):
            layers += [nn.Conv2d(*planes, 3, 2, 1, bias=False), nn.BatchNorm2d(planes[1]), nn.ReLU()]
        self.encoder = nn.Sequential(*layers)
        heads = {name: state[f"decoder.{name}.weight"].shape[:2][::-1] for name in ("cls", "rep")}
        self.decoder = nn.ModuleDict({name: nn.Conv2d(*planes, 1) for name, planes in heads.items()})
        self.to(state["encoder.0.weight"].dtype)
        self.load_state_dict(state)

    def forward(self, x: Tensor) -> Outputs:
        x = self.encoder(x)
        return Outputs(self.decoder["cls"](x), self.decoder["rep"](x), None)


def toy_networks(case: Any, method: MethodConfig) -> Networks:
    student, teacher = (
        ToyNetwork({k.removeprefix(p): tensor(case, k) for k in case.arrays if k.startswith(p)})
        for p in ("in_student/", "in_teacher/")
    )
    criterion = Criterion(min_kept=method.ohem_min_kept)
    return Networks(student, teacher.requires_grad_(False), student, criterion)


def trajectory(case: Any) -> dict[str, Any]:
    method = settings(case, ohem_min_kept=int(case["in_ohem_min_kept"]))
    epochs, length, classes = (int(case[k]) for k in ("in_E", "in_L", "in_num_classes"))
    images, weak, strong = (tensor(case, f"in_image_{k}") for k in ("l", "u", "us"))
    labels = torch.from_numpy(case["in_label"]).long()
    nets = toy_networks(case, method)
    cfg = toys.settings(
        method,
        epochs=epochs,
        lr=float(case["in_base_lr"]),
        head_lr_factor=10.0,
        weight_decay=1e-4,
        batch_size=labels.shape[1],
    )
    groups = [Group(nets.student.encoder.parameters()), Group(nets.student.decoder.parameters(), 10.0)]
    optimizer = build_optimizer(cfg.optim, groups)
    dim = case["in_student/decoder.rep.weight"].shape[0]
    state = MethodState(method, classes, dim).to(torch_dtype(case))
    # followed although fixed thresholds do not need it, because the recording has it
    state.confidence = ClassConfidence(classes, method.conf_decay, method.conf_init)
    run = toys.run_of(cfg, nets, state, optimizer=optimizer)
    numbers: list[tuple[int, int]] = []
    out: dict[str, Any] = {f"out_loss_{k}": [] for k in ("sup", "unsup", "contra", "proto")} | {"out_lr": []}
    for i in range(len(labels)):
        at = Progress(i, length, epochs)
        out["out_lr"].append(set_learning_rate(optimizer, cfg.optim, i, epochs * length))
        nets.student.train()
        train.before_step(at, run)
        if step.clustering_due(at, run):
            for kind in KINDS:
                counts, rows = queue_state(state.memory, kind)
                out[f"out_queue_at_clustering_counts_{kind}"] = counts
                out[f"out_queue_at_clustering_rows_{kind}"] = rows
            state.memory = None
            state.prototypes, numbers = given_prototypes(case)
        run.draws = RecordedDraws(
            map(drawn_box, case["in_mix_mask"][i]), [0.0 if case["in_mix_flag"][i] else 1.0]
        )
        batch = toys.batches(images[i], labels[i], weak[i], strong[i])
        result = train.train_step(batch, at, run)
        optimizer.zero_grad(set_to_none=True)
        result.total.backward()
        optimizer.step()
        train.after_step(at, run)
        for k in ("sup", "unsup", "contra", "proto"):
            out[f"out_loss_{k}"].append(float(torch.as_tensor(result.terms.get(f"loss_{k}", 0.0)).detach()))
        if i + 1 == method.sup_only_epochs * length:
            for key, value in nets.require_teacher().state_dict().items():
                out[f"out_teacher_after_warmup/{key}"] = value.numpy().copy()
    for role, net in (("student", nets.student), ("teacher", nets.require_teacher())):
        out |= {f"out_{role}/{key}": value.numpy() for key, value in net.state_dict().items()}
    out |= recorded_prototypes(state.prototypes, numbers)
    out["out_conf_ema"] = array(state.confidence.value)
    return only_recorded(case, {k: np.array(v) if isinstance(v, list) else v for k, v in out.items()})


ADAPTERS = {
    "schedules": schedule_tables,
    "grid": grid,
    "prob_centers": prob_centers,
    "queue_two_ranks": queue_two_ranks,
    "class_balance": class_balance,
    "coco_fallback": coco_fallback,
    "kmeans_exact": kmeans_exact,
    "kmeans_pinned": kmeans_pinned,
    "contra_prototype": contra_prototype,
    "trajectory": trajectory,
    "cutmix": cutmix,
    "copy_paste": copy_pasted,
    "splits": splits,
    "miou": miou,
    "sliding_window": sliding,
    "colormaps": colormaps,
}
for adapter, names in (
    (supervised, "sup_loss_a0 sup_loss_a1 sup_loss_b0 sup_loss_b1 sup_loss_one_pixel"),
    (unsupervised, "unsup_loss_a unsup_loss_b unsup_loss_c"),
    (collection, "collect_fix collect_fix_low collect_csp coco_collect"),
    (adaptive_numbers, "apo_a apo_b"),
    (proto_stage, "proto_loss proto_loss_w4 proto_loss_cap proto_loss_noadd proto_loss_add2"),
    (proto_stage, "proto_loss_one_class proto_loss_no_pseudo"),
    (network, "net_resnet101 net_resnet50_sup net_xception65"),
    (xception_block, "xception_block_identity xception_block_strided xception_block_exit"),
    (unlabeled_view, "unlabelled_transform_small unlabelled_transform_large unlabelled_transform_gray"),
    (labeled_transform, "labelled_transform_down labelled_transform_up labelled_transform_val"),
):
    ADAPTERS.update(dict.fromkeys(names.split(), adapter))
