"""For every recorded case of U2PL: its inputs to our public functions, our outputs under the recorded names."""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import DataConfig, OptimConfig
from common.data.dataset_yaml import load_spec
from common.data.loaders import Batch, oversample
from common.data.transforms import EvalTransform, TrainTransform
from common.distributed import Dist
from common.mean_teacher.config import DeepLabConfig
from common.mean_teacher.contrast import ContrastInputs, class_masks, nearest
from common.mean_teacher.queues import ClassQueues
from common.measure.evaluation import Protocol, center_crop, evaluate
from common.measure.inference import (
    pad_to_crop,
    scaled_size,
    sliding_window,
    whole_image,
    windows,
)
from common.measure.metrics import ConfusionMatrix, class_iou, mean_iou
from common.models.deeplab import Outputs, SegmentationNetwork, build_network, upsample
from common.numerics import optim as schedules
from common.numerics.ema import warmup_decay
from common.numerics.losses import entropy, masked_percentiles
from common.numerics.mixing import BoxDraw, half_area_box, half_area_width_range
from common.numerics.optim import Group, build_optimizer, set_learning_rate
from common.run.progress import Progress
from projects.u2pl import train
from projects.u2pl.ael.config import AelConfig
from projects.u2pl.ael.losses import reverse_cross_entropy
from projects.u2pl.augment import Draws, strong_augment
from projects.u2pl.config import Config, MethodConfig, ModelConfig, QuirkConfig
from projects.u2pl.contrast import (
    ContrastDraws,
    collect_negatives,
    contrast,
)
from projects.u2pl.losses import Criterion, pseudo_label_loss, split_by_entropy
from projects.u2pl.memory import Memory
from projects.u2pl.model import Networks, build_criterion
from projects.u2pl.state import Run
from projects.u2pl.tests.ael_adapters import ADAPTERS as AEL_ADAPTERS
from splits.pictures import BLACK, full_palette
from tests.rules import rule_value


def tensor(case: Any, key: str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(case[key]))


def leaf(case: Any, key: str) -> Tensor:
    return tensor(case, key).clone().requires_grad_(True)


def array(value: Tensor) -> np.ndarray:
    return value.detach().numpy()


# --- losses ----------------------------------------------------------------------------------------------------


def unsupervised(case: Any) -> dict[str, Any]:
    logits, teacher, labels = (
        leaf(case, "in_student_logits"),
        tensor(case, "in_teacher_logits"),
        tensor(case, "in_labels"),
    )
    percent = float(case["in_percent"])
    split = split_by_entropy(teacher, labels, percent, 0.0)
    loss = pseudo_label_loss(logits, split.pseudo)
    loss.backward()
    values = entropy(teacher.softmax(dim=1))
    return {
        "out_loss": array(loss),
        "grad_student_logits": array(logits.grad),
        "out_labels_after": array(split.pseudo),
        "out_entropy": array(values),
        "out_threshold": array(masked_percentiles(values, labels != 255, (percent,))[0]),
        "out_kept": int((split.pseudo != 255).sum()),
    }


def criterion(case: Any) -> dict[str, Any]:
    ohem = int(case["in_kwargs_min_kept"]) >= 0
    has_aux = "in_aux" in case
    rule = Criterion(
        ohem=ohem,
        thresh=float(case["in_kwargs_thresh"]),
        min_kept=int(case["in_kwargs_min_kept"]),
        aux_weight=float(case["in_aux_weight"]) if has_aux else 0.0,
        class_weights=case.name.endswith("_weighted"),
    )
    pred, aux = leaf(case, "in_pred"), leaf(case, "in_aux") if has_aux else None
    loss = rule(pred, tensor(case, "in_target"), aux)
    loss.backward()
    out = {
        "out_loss": array(loss),
        "grad_pred": array(pred.grad),
        "out_grad_nonzero": int(pred.grad.abs().sum(dim=1).gt(0).sum()),
    }
    if has_aux:
        out["grad_aux"] = array(aux.grad)
    return out


def reverse(case: Any) -> dict[str, Any]:
    pred = leaf(case, "in_pred")
    loss = reverse_cross_entropy(pred, tensor(case, "in_target"))
    loss.backward()
    return {"out_loss": array(loss), "grad_pred": array(pred.grad)}


def filled_queues(case: Any) -> ClassQueues:
    capacity, rows = case["in_capacity"], tensor(case, "in_queue")
    queues = ClassQueues(capacity.tolist(), rows.shape[1]).to(rows.dtype)
    sizes = (
        torch.from_numpy(case["in_queue_sizes"]) if "in_queue_sizes" in case else torch.zeros(len(capacity))
    )
    queues.push(torch.repeat_interleave(torch.arange(len(sizes)), sizes.long()), rows)
    return queues


def contrastive(case: Any) -> dict[str, Any]:
    pos, neg, low_rank, high_rank, temperature, num_queries, num_negatives = case["in_cfg"].tolist()
    method = MethodConfig(
        num_queries=int(num_queries),
        num_negatives=int(num_negatives),
        temperature=temperature,
        low_rank=int(low_rank),
        high_rank=int(high_rank),
        current_class_threshold=pos,
        current_class_negative_threshold=neg,
        average_from_start=True,
        ael=AelConfig(conf_weight=True) if case.name.endswith("_conf_weight") else None,
    )
    cfg = Config(
        data=DataConfig(dataset="shapes", split="none", crop_size=(8, 8)),
        optim=OptimConfig(lr=1.0, epochs=2, batch_size=2),
        method=method,
        quirks=QuirkConfig(shared_first_epoch=False),
    )
    feats = leaf(case, "in_rep")
    inputs = ContrastInputs(
        feats,
        tensor(case, "in_rep_teacher"),
        torch.cat((tensor(case, "in_prob_l"), tensor(case, "in_prob_u"))),
        torch.cat((tensor(case, "in_onehot_l"), tensor(case, "in_onehot_u"))).bool(),
        tensor(case, "in_low_mask").squeeze(1).bool(),
        tensor(case, "in_high_mask").squeeze(1).bool(),
        len(case["in_onehot_l"]),
    )
    queues = filled_queues(case)
    draws = ContrastDraws(
        tensor(case, "in_draw_anchor").view(-1, method.num_queries),
        tensor(case, "in_draw_negative").view(-1, method.num_queries * method.num_negatives),
    )
    prototypes, decay = None, 0.0
    if "in_prototype" in case:
        prototypes, decay = tensor(case, "in_prototype"), min(1 - 1 / int(case["in_iteration"]), 0.999)
    new_keys = queues.push(*negatives(inputs, cfg, inputs.probs.shape[1], exact=False))
    result = contrast(inputs, queues, cfg, draws, prototypes, decay)
    result.loss.backward()
    out = {
        "out_loss": array(result.loss),
        "grad_rep": array(feats.grad),
        "out_new_keys": array(new_keys),
        "out_queue_sizes": array(queues.lengths),
        "out_queue": array(torch.cat([queues.contents(k) for k in range(len(queues.written))])),
        "out_valid_classes": array(result.valid.nonzero().flatten()),
        "out_num_candidates": array(result.candidates),
    }
    if prototypes is not None:
        out["out_prototype"] = array(result.prototypes)
    return out


def negatives(
    inputs: ContrastInputs, cfg: Config, labels_per_pixel: int, exact: bool
) -> tuple[Tensor, Tensor]:
    """Classes (S,) and features (S, D) of all negatives."""
    places, feats = collect_negatives(inputs, cfg, labels_per_pixel, exact)
    return places // len(feats), feats[places % len(feats)]


def queue_sequence(case: Any) -> dict[str, Any]:
    keys = tensor(case, "in_keys")
    queues = ClassQueues([int(case["in_capacity"])], keys.shape[1]).to(keys.dtype)
    lengths, contents = [], []
    for part in keys.split(case["in_sizes"].tolist()):
        queues.push(torch.zeros(len(part), dtype=torch.long), part)
        lengths.append(int(queues.lengths[0]))
        contents.append(queues.contents(0))
    return {"out_lengths": np.array(lengths), "out_contents": array(torch.cat(contents))}


def queue_two_ranks(case: Any) -> dict[str, Any]:
    keys = torch.cat((tensor(case, "in_keys_rank0"), tensor(case, "in_keys_rank1")))
    queues = ClassQueues([int(case["in_capacity"])], keys.shape[1]).to(keys.dtype)
    old = tensor(case, "in_queue")
    queues.push(torch.zeros(len(old), dtype=torch.long), old)
    count = queues.push(torch.zeros(len(keys), dtype=torch.long), keys)
    return {"out_queue": array(queues.contents(0)), "out_count": int(count)}


def onehot(case: Any) -> dict[str, Any]:
    num_classes = int(case["in_num_classes"])
    labels, alone = tensor(case, "in_labels"), tensor(case, "in_labels1")
    height, width = case["in_size"].tolist()
    large = torch.from_numpy(case["in_labels2"]).long()
    masks = class_masks(nearest(large, case["out_small2"].shape[-2:]), 255)
    found = torch.where(masks.any(dim=1), masks.long().argmax(dim=1), 255)
    return {
        "out_onehot": array(class_masks(labels, num_classes)).astype(np.uint8),
        "out_small": array(class_masks(nearest(labels, (height, width)), num_classes)).astype(np.uint8),
        "out_onehot1": array(class_masks(alone, num_classes)).astype(np.uint8),
        "out_small2": array(found).astype(np.uint8),
    }


# --- augmentation and data -------------------------------------------------------------------------------------


class RecordedDraws(Draws):
    """Draws read from a recording; a class order is a permutation of the sorted present values."""

    def __init__(self, boxes: Any = (), permutations: Any = (), coins: Any = ()) -> None:
        super().__init__(0, 0, torch.device("cpu"))
        self.boxes, self.permutations, self.coins = iter(boxes), iter(permutations), iter(coins)

    def coin(self) -> float:
        return float(next(self.coins))

    def box(self, height: int, width: int) -> BoxDraw:
        return BoxDraw(*(int(v) for v in next(self.boxes)))

    def class_order(self, labels: Tensor) -> Tensor:
        return torch.stack([class_order(label, next(self.permutations)) for label in labels])


def class_order(label: Tensor, permutation: np.ndarray) -> Tensor:
    """Ranking numbers (256,) that choose the classes in the order of a permutation of the sorted present ones."""
    order = torch.full((256,), 1e9)
    present = label.unique()
    order[present[torch.from_numpy(permutation)]] = torch.arange(len(permutation), dtype=torch.float32)
    return order


def cutout_box(case: Any) -> dict[str, Any]:
    boxes = [
        half_area_box(h, w, BoxDraw(width, col, row)) for h, w, width, col, row in case["in_draws"].tolist()
    ]
    return {"out_box": np.array(boxes)}


def cutout_width_range(case: Any) -> dict[str, Any]:
    return {"out_range": np.array([(n, *half_area_width_range(n)) for n in case["in_n"].tolist()])}


def mixing(case: Any) -> dict[str, Any]:
    mode = case.name.removeprefix("mix_")
    image, label, conf = (tensor(case, f"in_{k}") for k in ("image", "label", "conf"))
    boxes, permutations = [], []
    if mode != "classmix":
        boxes = case["in_draws"]
    else:
        permutations = np.split(case["in_perm"], np.cumsum(case["in_perm_sizes"])[:-1])
    mixed, mixed_label = strong_augment(image, label, mode, RecordedDraws(boxes, permutations))
    mixed_conf, _ = strong_augment(conf.unsqueeze(1), label, mode, RecordedDraws(boxes, permutations))
    return {
        "out_image": array(mixed),
        "out_label": array(mixed_label),
        "out_conf": array(mixed_conf.squeeze(1)),
    }


class RecordedRandom:
    """Stands in for `random.Random`: replays uniform numbers and integers."""

    def __init__(self, uniform: np.ndarray, integers: np.ndarray) -> None:
        self.uniform, self.integers = iter(uniform.tolist()), iter(integers.tolist())

    def random(self) -> float:
        return next(self.uniform)

    def randint(self, low: int, high: int) -> int:
        value = next(self.integers)
        assert low <= value <= high
        return value


MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def pipeline(case: Any) -> dict[str, Any]:
    image, label = case["in_image"], case["in_label"]
    crop = tuple(case["in_crop"].tolist())
    if len(case["in_random"]):
        transform = TrainTransform(
            mean=MEAN, std=STD, crop_size=crop, scale_range=(0.5, 2.0), flip=True, pad_label=0
        )
        out = transform(image, label, RecordedRandom(case["in_random"], case["in_randint"]))
    else:
        x, y = EvalTransform(mean=MEAN, std=STD)(image, label)
        out = [part[0] for part in center_crop(x[None], y[None], crop, 0)]
    return {"out_image": array(out[0]), "out_label": array(out[1])}


def epoch_lists(case: Any) -> dict[str, Any]:
    orders = [
        oversample(range(length), count, seed)
        for length, count, seed in zip(
            case["in_length"].tolist(), case["in_n"].tolist(), case["in_seed"].tolist(), strict=True
        )
    ]
    hashes = [hashlib.sha256("\n".join(map(str, order)).encode()).hexdigest() for order in orders]
    return {
        "out_count": np.array([len(order) for order in orders]),
        "out_sha256": np.array(hashes),
        "out_first": np.array([order[:3] for order in orders]),
        "out_last": np.array([order[-3:] for order in orders]),
    }


def touch(root: Path, names: list[str]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def list_building(case: Any) -> dict[str, Any]:
    ids, lines = case["in_ids"].tolist(), case["in_city_lines"].tolist()
    with tempfile.TemporaryDirectory() as folder:
        voc, city = Path(folder, "voc"), Path(folder, "city")
        touch(
            voc,
            [
                f"{d}/{i}{e}"
                for i in ids
                for d, e in (("JPEGImages", ".jpg"), ("SegmentationClassAug", ".png"))
            ],
        )
        (voc / "list.txt").write_text("\n".join(ids))
        spec = load_spec("voc", str(voc))
        items = oversample(spec.read_list(voc / "list.txt"), int(case["in_n"]), int(case["in_seed"]))
        found = spec.root
        first = [path.relative_to(found).as_posix() for path in (items[0].image, items[0].label)]
        # both kinds of masks lie there; the train ids must be preferred
        stems = [line.removeprefix("leftImg8bit/").removesuffix("_leftImg8bit.png") for line in lines]
        masks = [
            f"gtFine/{stem}_gtFine_{kind}.png" for stem in stems for kind in ("labelTrainIds", "labelIds")
        ]
        touch(city, lines + masks)
        (city / "list.txt").write_text("\n".join(lines))
        spec = load_spec("cityscapes", str(city))
        labels = [item.label.relative_to(spec.root).as_posix() for item in spec.read_list(city / "list.txt")]
    return {
        "out_items": np.array([item.id for item in items]),
        "out_first_paths": np.array(first),
        "out_city_labels": np.array(labels),
    }


# --- evaluation ------------------------------------------------------------------------------------------------


def toy_forward(case: Any) -> Any:
    """The toy network of the evaluation cases: one strided convolution, scores resized to the input."""
    weight, bias = tensor(case, "in_weight"), tensor(case, "in_bias")

    def forward(x: Tensor) -> Tensor:
        return upsample(F.conv2d(x.to(weight.dtype), weight, bias, stride=2, padding=1), x.shape[-2:])

    return forward


def sliding_windows(case: Any) -> dict[str, Any]:
    pads, counts, starts = [], [], []
    for height, width, crop_h, crop_w in case["in_meta"].tolist():
        pads.append(pad_to_crop(torch.zeros(1, 1, height, width), (crop_h, crop_w))[1])
        found = windows((height, width), (crop_h, crop_w))
        counts.append(len(found))
        starts += found
    return {"out_pad": np.array(pads), "out_count": np.array(counts), "out_starts": np.array(starts)}


def sliding(case: Any) -> dict[str, Any]:
    forward, image = toy_forward(case), tensor(case, "in_image")
    size = case["in_out_size"].tolist()
    slid = sliding_window(forward, image, tuple(case["in_crop"].tolist()), batch_size=2)
    return {
        "out_sliding": array(upsample(slid, size)[0]),
        "out_whole": array(upsample(whole_image(forward, image), size)[0]),
    }


def eval_scales(case: Any) -> dict[str, Any]:
    rows = case["in_rows"].tolist()
    return {
        "out_city": np.array([scaled_size((h, w), scale, 2048) for h, w, scale in rows]),
        "out_whole": np.array([scaled_size((h, w), scale) for h, w, scale in rows]),
    }


def eval_city(case: Any) -> dict[str, Any]:
    forward, transform = toy_forward(case), EvalTransform(mean=MEAN, std=STD)
    count = sum(key.startswith("in_image") for key in case.arrays)
    samples = [
        (*(part[None] for part in transform(case[f"in_image{i}"], case[f"in_label{i}"])), str(i))
        for i in range(count)
    ]
    how = Protocol(
        kind="sliding_window",
        crop_size=tuple(case["in_crop"].tolist()),
        scales=tuple(case["in_scales"].tolist()),
        base_size=int(case["in_base_size"]),
    )
    predictions: dict[str, np.ndarray] = {}

    def keep(name: str, scores: Tensor, pred: Tensor) -> None:
        predictions[f"out_pred{name}"] = pred.numpy().astype(np.uint8)

    found = evaluate(forward, samples, len(case["in_bias"]), how, on_image=keep)
    return {
        "out_intersection": np.array(found.intersection),
        "out_union": np.array(found.union),
        "out_iou": np.array(found.iou),
        "out_miou": found.miou,
        **predictions,
    }


def validate(case: Any) -> dict[str, Any]:
    forward, classes = toy_forward(case), int(case["in_num_classes"])

    def padded(x: Tensor) -> Tensor:  # the class that the toy never predicts
        scores = forward(x)
        missing = classes - scores.shape[1]
        return torch.cat((scores, scores.new_full((len(x), missing, *scores.shape[-2:]), -torch.inf)), dim=1)

    images, labels = tensor(case, "in_images").flatten(0, 1), tensor(case, "in_labels").flatten(0, 1)
    samples = [(x[None], y[None], str(i)) for i, (x, y) in enumerate(zip(images, labels, strict=True))]
    how = Protocol(kind="center_crop", crop_size=tuple(labels.shape[-2:]), batch_size=2)
    return {"out_miou": evaluate(padded, samples, classes, how).miou}


def miou(case: Any) -> dict[str, Any]:
    classes = int(case["in_num_classes"])

    def counts(pred: Tensor, label: Tensor, closed_right: bool = False) -> Any:
        matrix = ConfusionMatrix(classes + closed_right)
        matrix.update(pred, label)
        cells = matrix.counts
        found = torch.stack([cells.diagonal(), cells.sum(dim=0), cells.sum(dim=1)])
        if (
            closed_right
        ):  # the original's histograms count the value K, which no dataset yields here, as K - 1
            found = torch.cat([found[:, :-2], found[:, -2:].sum(dim=1, keepdim=True)], dim=1)
        intersection, predicted, target = found
        return intersection, predicted + target - intersection, target

    intersection, union, target = counts(tensor(case, "in_pred"), tensor(case, "in_target"))
    # nothing is predicted where everything is ignored, so any map will do
    ignored = tensor(case, "in_target3")
    beyond = counts(tensor(case, "in_pred2"), tensor(case, "in_target2"), closed_right=True)
    return {
        "out_intersection": array(intersection),
        "out_union": array(union),
        "out_target": array(target),
        "out_iou": array(class_iou(intersection, union)),
        "out_miou": mean_iou(intersection, union),
        "out_2": array(torch.stack(beyond)),
        "out_3": array(torch.stack(counts(torch.zeros_like(ignored), ignored))),
    }


def palettes(case: Any) -> dict[str, Any]:
    city = full_palette(load_spec("cityscapes").palette, BLACK)
    return {"out_cityscapes": city, "out_pascal": full_palette(load_spec("voc").palette)}


# --- networks --------------------------------------------------------------------------------------------------


def rule_network(case: Any, dropout: float = 0.1, **options: Any) -> SegmentationNetwork:
    """Our network with the layers that the keys name, filled by the rule; every key must fit."""
    shapes = {key.removeprefix("module."): shape for key, shape, _ in case.keys}
    stage3 = sum(key.startswith("encoder.layer3.") and key.endswith(".conv1.weight") for key in shapes)
    net = build_network(
        DeepLabConfig(backbone={6: "resnet50", 23: "resnet101"}[stage3], **options),
        shapes["decoder.classifier.8.weight"][0],
        rep_head="decoder.representation.8.weight" in shapes,
        aux_head=any(key.startswith("auxor.") for key in shapes),
        dropout=dropout,
    )
    state = {
        key.removeprefix("module."): torch.from_numpy(np.asarray(rule_value(key, shape)))
        for key, shape, _ in case.keys
    }
    net.load_state_dict(state)
    return net.to(torch.from_numpy(np.zeros(0, case.dtype)).dtype)


def network(case: Any) -> dict[str, Any]:
    plain = {"output_stride": 32, "multi_grid": ()} if case.name.endswith("_plain") else {}
    net = rule_network(case, **plain).eval()
    image = tensor(case, "in_image")
    with torch.no_grad():
        stages, out = net.encoder(image), net(image)
    result: dict[str, Any] = {
        "out_pred": array(out.logits),
        "out_num_parameters": sum(p.numel() for p in net.parameters()),
    }
    for i, x in enumerate(stages, start=1):
        result[f"out_x{i}_shape"] = np.array(x.shape)
        result[f"out_x{i}_mean"] = array(x.mean(dim=(2, 3)))
        result[f"out_x{i}_sub"] = array(x[:, ::64, ::3, ::3])
    if out.feats is not None:
        result["out_rep_sub"] = array(out.feats[:, ::8])
    if out.aux is not None:
        result["out_aux"] = array(out.aux)
    return result


def network_train_mode(case: Any) -> dict[str, Any]:
    net = rule_network(case, dropout=0.0).double().train()
    out = net(tensor(case, "in_image").double())
    loss = (out.logits * tensor(case, "in_weight").double()).mean() + (out.feats**2).mean()
    loss.backward()
    state, gradients = net.state_dict(), {key: p.grad for key, p in net.named_parameters()}
    result: dict[str, Any] = {
        "out_loss": array(loss),
        "out_pred": array(out.logits),
        "out_rep_sub": array(out.feats[:, ::16]),
    }
    for key in case.recorded():
        kind, _, layer = key.partition("/")
        if kind == "out_mean":
            result[key] = array(state[f"{layer}.running_mean"][:48])
        elif kind == "out_var":
            result[key] = array(state[f"{layer}.running_var"][:48])
        elif kind == "grad_norm":
            result[key] = array(gradients[layer].norm())
    return result


# --- schedules -------------------------------------------------------------------------------------------------


def schedule_tables(case: Any) -> dict[str, Any]:
    epochs, length, start = case["in_meta"].tolist()
    steps, total = case["in_its"].tolist(), epochs * length
    rates, power, target = case["in_base_lr"].tolist(), float(case["in_power"]), float(case["in_targetlr"])
    first = int(case["in_resume_epoch"]) * length
    drop, alpha = float(case["in_drop_percent"]), float(case["in_low_entropy_threshold"])
    left = [schedules.linear_decay(step // length, epochs) for step in steps]
    decays = [step - start * length for step in steps]
    return {
        "out_lr_poly": np.array([[schedules.poly(r, s, total, power) for r in rates] for s in steps]),
        "out_lr_poly_default": np.array([[schedules.poly(r, s, total, 0.9) for r in rates] for s in steps]),
        "out_lr_cosine": np.array([[schedules.cosine(r, s, total, target) for r in rates] for s in steps]),
        "out_lr_resumed": np.array([schedules.poly(rates[0], first + i, total, 0.9) for i in range(5)]),
        "out_ema": np.array([warmup_decay(d, float(case["in_ema_decay"])) if d >= 0 else -1 for d in decays]),
        "out_drop_percent": np.array([100 - (100 - drop) * part for part in left]),
        "out_alpha": np.array([alpha * part for part in left]),
    }


# --- trajectories ----------------------------------------------------------------------------------------------


class ToyNetwork(nn.Module):
    """Encoder of one convolution, 1x1 heads; the names are those of the recorded states."""

    def __init__(self, channels: int, classes: int, dim: int, aux: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )
        self.decoder = nn.ModuleDict(
            {"classifier": nn.Conv2d(channels, classes, 1), "representation": nn.Conv2d(channels, dim, 1)}
        )
        self.auxor = nn.Conv2d(channels, classes, 1) if aux else None

    def forward(self, x: Tensor) -> Outputs:
        x = self.encoder(x)
        aux = None if self.auxor is None else self.auxor(x)
        return Outputs(self.decoder["classifier"](x), self.decoder["representation"](x), aux)


def trajectory(case: Any) -> dict[str, Any]:
    classes, dim, batch, crop, epochs, length, start, total_epochs = case["in_meta"].tolist()
    pos, neg, low_rank, high_rank, temperature, queries, negatives, low_entropy, weight = case[
        "in_contra"
    ].tolist()
    aux = "in_student/auxor.weight" in case
    lr = case["in_lr"].tolist()
    cfg = Config(
        data=train_data_config(crop),
        optim=train_optim_config(lr, total_epochs, batch),
        model=ModelConfig(aux_weight=0.4 if aux else 0.0),
        method=MethodConfig(
            criterion="ohem" if aux else "ce",
            ohem_thresh=0.7,
            ohem_min_kept=150,
            sup_only_epochs=start,
            drop_percent=float(case["in_drop_percent"]),
            strong_augmentation="classmix" if len(case["in_perm"]) else "cutmix",
            contra_weight=weight,
            low_rank=int(low_rank),
            high_rank=int(high_rank),
            current_class_threshold=pos,
            current_class_negative_threshold=neg,
            low_entropy_threshold=low_entropy,
            num_queries=int(queries),
            num_negatives=int(negatives),
            temperature=temperature,
        ),
    )
    nets = toy_networks(case, cfg, classes, dim, aux)
    memory = Memory(cfg, classes, dim).to(next(nets.student.parameters()).dtype)
    memory.queues = ClassQueues(case["in_capacity"].tolist(), dim).to(next(nets.student.parameters()).dtype)
    parts = [nets.student.encoder, nets.student.auxor, nets.student.decoder]
    factors = [1.0] + [cfg.optim.head_lr_factor] * 2
    groups = [
        Group(part.parameters(), factor)
        for part, factor in zip(parts, factors, strict=True)
        if part is not None
    ]
    optimizer = build_optimizer(cfg.optim, groups)
    x_l, x_u, y_l = tensor(case, "in_x_l"), tensor(case, "in_x_u"), torch.from_numpy(case["in_y_l"]).long()
    recorder = Recorder(case)
    run = Run(cfg, Dist(), None, nets, None, optimizer, torch.amp.GradScaler("cpu", enabled=False), memory)
    out: dict[str, Any] = {}
    losses, rates = [], []
    for epoch in range(epochs):
        for step in range(length):
            i = epoch * length + step
            rates.append(set_learning_rate(optimizer, cfg.optim, i, total_epochs * length))
            nets.student.train()
            at = Progress(i, length, total_epochs)
            train.before_step(at, run)
            labeled, unlabeled = Batch(x_l[i], y_l[i], None), Batch(x_u[i], None, None)
            if epoch < start:
                result = train.train_step((labeled, unlabeled), at, run)
            else:
                run.draws = recorder.draws(i)
                result = recorder.watch(
                    lambda at=at, batch=(labeled, unlabeled): train.train_step(batch, at, run)
                )
            optimizer.zero_grad(set_to_none=True)
            result.total.backward()
            optimizer.step()
            train.after_step(at, run)
            losses.append(
                [
                    float(torch.as_tensor(result.terms.get(k, 0.0)).detach())
                    for k in ("loss_sup", "loss_unsup", "loss_contra")
                ]
            )
        for role, network in (("student", nets.student), ("teacher", nets.teacher)):
            for key, value in network.state_dict().items():
                if not key.endswith("num_batches_tracked"):
                    out[f"out_{role}_epoch{epoch}/{key}"] = value.numpy().copy()
    queues = memory.queues
    return {
        **out,
        **recorder.last(),
        "out_losses": np.array(losses),
        "out_lr": np.array(rates),
        "out_queue_sizes": array(queues.lengths),
        "out_queue": array(torch.cat([queues.contents(k) for k in range(classes)])),
    }


def train_data_config(crop: int) -> Any:
    return DataConfig(dataset="shapes", split="none", crop_size=(crop, crop))


def train_optim_config(lr: list[float], epochs: int, batch: int) -> Any:
    return OptimConfig(
        lr=lr[0], head_lr_factor=lr[1] / lr[0], weight_decay=1e-4, epochs=epochs, batch_size=batch
    )


def toy_networks(case: Any, cfg: Config, classes: int, dim: int, aux: bool) -> Networks:
    networks = []
    for role in ("student", "teacher"):
        prefix = f"in_{role}/"
        state = {k.removeprefix(prefix): tensor(case, k) for k in case.arrays if k.startswith(prefix)}
        toy = ToyNetwork(len(state["encoder.1.weight"]), classes, dim, aux).to(
            state["encoder.0.weight"].dtype
        )
        missing, unexpected = toy.load_state_dict(state, strict=False)
        assert not unexpected
        assert all(k.endswith("num_batches_tracked") for k in missing)
        networks.append(toy)
    student, teacher = networks
    teacher.requires_grad_(False)
    return Networks(student, teacher, student, build_criterion(cfg))


class Recorder:
    """Feeds the recorded draws step by step and keeps what entered the last contrastive call."""

    def __init__(self, case: Any) -> None:
        self.case = case
        self.slots = case["in_draw_slots"].tolist()
        queries, negatives = int(case["in_contra"][5]), int(case["in_contra"][6])
        self.anchors = tensor(case, "in_draw_anchor").view(-1, queries)
        self.negatives = tensor(case, "in_draw_negative").view(-1, queries * negatives)
        self.perms = np.split(case["in_perm"], np.cumsum(case["in_perm_sizes"].ravel())[:-1])
        self.seen: ContrastInputs | None = None

    def draws(self, i: int) -> Draws:
        batch = self.case["in_perm_sizes"].shape[1]
        permutations = self.perms[i * batch : (i + 1) * batch]
        recorded = RecordedDraws(self.case["in_box_draws"][i], permutations, [self.case["in_coin"][i]])
        first, last = sum(self.slots[:i]), sum(self.slots[: i + 1])
        recorded.contrast = ContrastDraws(self.anchors[first:last], self.negatives[first:last])
        return recorded

    def watch(self, call: Any) -> Any:
        original = train.contrast_inputs

        def inputs(*args: Any) -> ContrastInputs:
            quirks = dataclasses.replace(args[-1].quirks, own_label_negatives=False)
            every_image = dataclasses.replace(args[-1], quirks=quirks)
            self.seen = original(*args[:-1], every_image)
            return original(*args)

        train.contrast_inputs = inputs
        try:
            return call()
        finally:
            train.contrast_inputs = original

    def last(self) -> dict[str, Any]:
        assert self.seen is not None
        n, seen = self.seen.num_labeled, self.seen
        masks = array(seen.masks).astype(np.uint8)
        return {
            "out_last_onehot_l": masks[:n],
            "out_last_onehot_u": masks[n:],
            "out_last_prob_l": array(seen.probs[:n]),
            "out_last_prob_u": array(seen.probs[n:]),
            "out_last_low_mask": array(seen.reliable.unsqueeze(1)).astype(np.uint8),
            "out_last_high_mask": array(seen.unreliable.unsqueeze(1)).astype(np.uint8),
        }


ADAPTERS = {
    "schedules": schedule_tables,
    "rce_loss": reverse,
    "queue_sequence": queue_sequence,
    "queue_two_ranks": queue_two_ranks,
    "onehot": onehot,
    "cutout_box": cutout_box,
    "cutout_width_range": cutout_width_range,
    "epoch_lists": epoch_lists,
    "list_building": list_building,
    "windows": sliding_windows,
    "eval_scales": eval_scales,
    "eval_city": eval_city,
    "validate": validate,
    "miou": miou,
    "palettes": palettes,
    "net_train_mode": network_train_mode,
    **AEL_ADAPTERS,
}
for adapter, names in (
    (unsupervised, "unsup_loss unsup_loss_mid unsup_loss_p100 unsup_loss_few_valid"),
    (criterion, "crit_ce crit_ce_aux crit_ce_weighted"),
    (criterion, "crit_ohem crit_ohem_easy crit_ohem_all crit_ohem_zero crit_ohem_ignore"),
    (
        contrastive,
        "contra_all_classes contra_absent_classes contra_empty_queues contra_one_class contra_overflow",
    ),
    (contrastive, "contra_voc_size contra_no_labelled contra_anchor_ema_first contra_anchor_ema"),
    (contrastive, "ael_contra_conf_weight"),
    (mixing, "mix_cutout mix_cutmix mix_classmix"),
    (pipeline, "pipeline_down_pad pipeline_up pipeline_mixed pipeline_val pipeline_val_crop"),
    (sliding, "sliding_0 sliding_1"),
    (network, "net_resnet101 net_resnet101_aux net_resnet50_sup net_resnet50_plain"),
    (trajectory, "trajectory_voc trajectory_city"),
):
    ADAPTERS.update(dict.fromkeys(names.split(), adapter))
