"""For every recorded case: its inputs to our public functions, our outputs under the recorded names."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import DataConfig, OptimConfig
from common.data.dataset_yaml import load_spec
from common.data.lists import read_entries
from common.data.loaders import oversample
from common.distributed import Dist
from common.measure.inference import sliding_window, windows
from common.measure.metrics import ConfusionMatrix, class_iou, mean_iou
from common.models.deeplab import Outputs, upsample
from common.numerics.ema import warmup_decay
from common.numerics.mixing import BoxDraw, draw_half_area_box, fill_boxes, half_area_box, mix_with_next
from common.numerics.optim import Group, build_optimizer, set_learning_rate
from common.run.progress import Progress
from projects.proto_consistency.augment import Draws
from projects.proto_consistency.config import Config, MethodConfig, ModelConfig, ProtoConfig
from projects.proto_consistency.draws import gather_points, sample_points
from projects.proto_consistency.head import PrototypeHead
from projects.proto_consistency.kmeans import cluster
from projects.proto_consistency.losses import (
    Criterion,
    prototype_losses,
    pseudo_labels,
    select_pixels,
    unsupervised_loss,
)
from projects.proto_consistency.model import Networks, build_criterion
from projects.proto_consistency.network import ProtoNetwork, SameMaxPool, build_network
from projects.proto_consistency.prototypes import Movement
from projects.proto_consistency.state import Run
from projects.proto_consistency.tests.palette import PROTOTYPE_PALETTE
from projects.proto_consistency.tests.toys import GOOD, batches, moved
from projects.proto_consistency.train import after_step, before_step, train_step
from splits.pictures import BLACK, full_palette
from tests.golden_runner import Skip
from tests.rules import rule_value

FOLDER = Path(__file__).parent / "golden"
MOMENTUM = 0.99  # where a case does not hold it
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def tensor(case: Any, key: str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(case[key]))


def leaf(case: Any, key: str) -> Tensor:
    return tensor(case, key).clone().requires_grad_(True)


def array(value: Tensor) -> np.ndarray:
    return value.detach().numpy()


def kind(case: Any) -> torch.dtype:
    return torch.from_numpy(np.zeros(0, case.dtype)).dtype


# --- networks --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def rule_network(keys: str, dtype: torch.dtype) -> ProtoNetwork:
    """Our network with the layers that a file of keys names, filled by the rule; every key must fit."""
    shapes = {key: shape for key, shape, *_ in json.loads(keys)}
    stage3 = sum(key.startswith("encoder.layer3.") and key.endswith(".conv1.weight") for key in shapes)
    classes = shapes["decoder.classifier.8.weight"][0]
    model = ModelConfig(
        backbone={6: "resnet50", 23: "resnet101"}[stage3],
        aux_weight=0.4 * any(key.startswith("auxor.") for key in shapes),
    )
    net = build_network(model, classes, shapes["proto_net.proto_list"][0] // classes)
    state = {key: torch.from_numpy(rule_value(key, shape)) for key, shape in shapes.items()}
    absent, unexpected = net.load_state_dict(state, strict=False)
    absent = [key for key in absent if not key.endswith("num_batches_tracked")]
    assert not unexpected
    assert absent == ["auxor.aux.0.bias"] * len(absent)
    if net.auxor is not None:
        nn.init.zeros_(net.auxor.aux[0].bias)  # the port has no such tensor
    return net.to(dtype).eval()


@torch.inference_mode()
def network(case: Any) -> dict[str, Any]:
    # the case of even sizes has the weights of the other one
    keys = json.dumps(case.keys) if case.keys else (FOLDER / "net_voc.keys.json").read_text()
    net, x = rule_network(keys, kind(case)), tensor(case, "in_x")
    out, size = net(x), x.shape[-2:]
    assert out.feats is not None
    proto = net.require_prototypes().dense(out.feats, size)
    result = {"out_pred": array(out.logits), "out_proto_s4": array(proto[..., ::4, ::4])}
    if "out_rep_clf_lowres_s8" in case:
        result["out_rep_clf_lowres_s8"] = array(out.feats[:, ::8])
        result["out_rep_clf_full_c16_s8"] = array(upsample(out.feats, size)[:, ::16, ::8, ::8])
    if "out_aux" in case:
        result["out_aux"] = array(out.aux)
    if "out_port_pred" in case:  # what `model.maxpool: same` builds
        theirs, net.encoder.maxpool = net.encoder.maxpool, SameMaxPool()
        result["out_port_pred"] = array(net(x).logits)
        net.encoder.maxpool = theirs
    return result


# --- prototype head --------------------------------------------------------------------------------------------


def head_of(case: Any) -> PrototypeHead:
    prototypes = tensor(case, "in_proto")
    temperature = float(case["in_temp"]) if "in_temp" in case else 0.1
    head = PrototypeHead(
        int(case["in_num_classes"]), int(case["in_num_micro_proto"]), prototypes.shape[1], temperature
    ).to(prototypes.dtype)
    head.set(prototypes)
    return head


def head_eval(case: Any) -> dict[str, Any]:
    head, x = head_of(case), tensor(case, "in_x")
    rows = x.permute(0, 2, 3, 1).flatten(0, 2)
    return {
        "out_logits": array(head.dense(x, x.shape[-2:])),
        "out_match": array(head.match(rows).nearest),
    }


def maps_of(scores: Tensor, batch: int) -> Tensor:
    """Scores (B * n, K) in the carrier (B, K, s, s) of the recordings."""
    side = round((len(scores) / batch) ** 0.5)
    return scores.view(batch, side, side, -1).permute(0, 3, 1, 2)


def head_train(case: Any) -> dict[str, Any]:
    x = tensor(case, "in_feat_selected")
    scores, nearest = head_of(case).match(x.flatten(0, 1))
    return {"out_logits": array(maps_of(scores, len(x))), "out_match": array(nearest)}


def mask_generation(case: Any) -> dict[str, Any]:
    result = {}
    for name in sorted({key.split("_")[1] for key in case.recorded()}):
        side = int(case[f"in_{name}_h"])
        generator = torch.Generator().manual_seed(int(case[f"in_{name}_seed"]))
        rows, cols = sample_points(side, side, int(case[f"in_{name}_G"]), generator)
        result[f"out_{name}_positions"] = array(torch.stack((rows, cols), dim=1)).astype(np.int32)
    return result


def point_sampling(case: Any) -> dict[str, Any]:
    maps, side = tensor(case, "in_rep"), int(case["in_h"])
    rows, cols = torch.from_numpy(case["in_positions"]).long().unbind(1)
    found = gather_points(maps, rows, cols, (side, side))
    return {"out_feat_selected": array(found.view(len(maps), len(rows), -1))}


# --- losses ----------------------------------------------------------------------------------------------------


def proto_sup(case: Any) -> dict[str, Any]:
    feats, labels = leaf(case, "in_feat_selected"), tensor(case, "in_target_selected").flatten()
    scores = head_of(case).match(feats.flatten(0, 1)).scores
    loss = prototype_losses(scores, labels, torch.zeros_like(labels, dtype=torch.bool), len(labels)).sup
    loss.backward()
    return {"out_loss": array(loss), "grad_feat_selected": array(feats.grad)}


def proto_unsup(case: Any) -> dict[str, Any]:
    feats, labels = leaf(case, "in_feat_selected"), tensor(case, "in_target_selected")
    conf, tau = tensor(case, "in_conf_selected"), float(case["in_tau"])
    valid = select_pixels(conf, labels, select="confidence", confid_thresh=tau)
    scores = head_of(case).match(feats.flatten(0, 1)).scores
    loss = prototype_losses(scores, labels.flatten(), valid.flatten(), 0).unsup
    loss.backward()
    return {"out_loss": array(loss), "grad_feat_selected": array(feats.grad), "out_valid": array(valid)}


def unsup_linear(case: Any) -> dict[str, Any]:
    conf, labels, tau = tensor(case, "in_conf"), tensor(case, "in_label"), float(case["in_tau"])
    valid = select_pixels(conf, labels, select="confidence", confid_thresh=tau)
    result: dict[str, Any] = {"out_valid": array(valid)}
    for norm in ("all", "valid", "u2pl"):
        logits = leaf(case, "in_pred")
        loss = unsupervised_loss(logits, labels, valid, norm)
        loss.backward()
        result |= {f"out_loss_{norm}": array(loss), f"grad_pred_{norm}": array(logits.grad)}
    none = select_pixels(conf, labels, select="confidence", confid_thresh=float(conf.max()) + 1)
    return result | {"out_loss_none_valid": array(unsupervised_loss(tensor(case, "in_pred"), labels, none))}


def unsup_entropy(case: Any) -> dict[str, Any]:
    logits, labels = leaf(case, "in_pred"), tensor(case, "in_label")
    kept = select_pixels(
        torch.zeros(labels.shape), labels, select="entropy",
        logits_teacher=tensor(case, "in_pred_teacher"), drop_percent=float(case["in_percent"]),
    )  # fmt: skip
    loss = unsupervised_loss(logits, labels, kept, "u2pl")
    loss.backward()
    return {
        "out_target_after": array(labels.where(kept, 255)),
        "out_loss": array(loss),
        "grad_pred": array(logits.grad),
    }


def pseudo_label(case: Any) -> dict[str, Any]:
    conf, labels = pseudo_labels(tensor(case, "in_logits_teacher"), tuple(case["in_size"].tolist()))
    selected = select_pixels(conf, labels, select="confidence", confid_thresh=float(case["in_tau"]))
    return {"out_conf": array(conf), "out_label": array(labels), "out_selected": array(selected)}


def ohem(case: Any) -> dict[str, Any]:
    result = {}
    for regime in [key.removeprefix("grad_") for key in case.recorded() if key.startswith("grad_")]:
        thresh, min_kept = case[f"in_{regime}_thresh_minkept"].tolist()
        # in the recorded precision: one recorded gradient is further from the exact value than its own tolerance
        logits = tensor(case, "in_pred").float().requires_grad_(True)
        loss = Criterion(True, thresh, int(min_kept))(logits, tensor(case, "in_target"))
        loss.backward()
        result |= {f"out_{regime}": array(loss), f"grad_{regime}": array(logits.grad)}
    return result


# --- prototypes ------------------------------------------------------------------------------------------------


def proto_update(case: Any) -> dict[str, Any]:
    feats, target = tensor(case, "in_feat_selected").flatten(0, 1), tensor(case, "in_target_selected")
    match, old = tensor(case, "in_match"), tensor(case, "in_proto")
    conf, momentum = tensor(case, "in_conf_selected"), float(case["in_momentum"])
    sure = (conf >= float(case["in_tau"])).flatten()
    every = torch.ones_like(sure)
    return {
        "out_proto_cond": array(moved(old, feats, match, target.flatten(), sure, momentum)),
        "out_proto_all": array(moved(old, feats, match, target.flatten(), every, momentum)),
    }


def proto_update_edge(case: Any) -> dict[str, Any]:
    feats, target = tensor(case, "in_feat_selected").flatten(0, 1), tensor(case, "in_target_selected")
    match, old, momentum = tensor(case, "in_match"), tensor(case, "in_proto"), float(case["in_momentum"])
    target, every = target.flatten(), torch.ones(len(feats), dtype=torch.bool)
    cases = {
        "no_cond": (target, ~every),
        "all_ignored": (torch.full_like(target, 255), every),
        "one_class": (torch.full_like(target, int(case["in_num_classes"]) - 1), every),
        "single_pixel": (target, tensor(case, "in_single_cond")),
    }
    result = {
        f"out_{name}": array(moved(old, feats, match, labels, cond, momentum))
        for name, (labels, cond) in cases.items()
    }
    scores = head_of(case).match(feats).scores
    return result | {"out_unsup_loss_no_valid": array(prototype_losses(scores, target, ~every, 0).unsup)}


def proto_update_sequence(case: Any) -> dict[str, Any]:
    head, result = head_of(case), {}
    for step in range(sum(key.startswith("in_target") for key in case.arrays)):
        feats = tensor(case, f"in_feat_selected{step}").flatten(0, 1)
        target, cond = (tensor(case, f"in_{key}{step}").flatten() for key in ("target", "cond"))
        nearest = head.match(feats).nearest
        head.set(moved(head.proto_list.data, feats, nearest, target, cond, MOMENTUM))
        result |= {
            f"out_match{step}": array(nearest),
            f"out_proto{step}": array(head.proto_list).copy(),
        }
    return result


def proto_update_ranks(case: Any) -> dict[str, Any]:
    feats, target = tensor(case, "in_feat_selected"), tensor(case, "in_target_selected").flatten(1)
    match, cond, old = tensor(case, "in_match"), tensor(case, "in_cond"), tensor(case, "in_proto")
    match = match.view(len(feats), -1, match.shape[1])
    split = int(case["in_split"])

    def moved_by(images: slice) -> np.ndarray:
        parts = [x[images].flatten(0, 1) for x in (feats, match, target, cond)]
        return array(moved(old, *parts, MOMENTUM))

    return {
        "out_local_rank0": moved_by(slice(0, split)),
        "out_local_rank1": moved_by(slice(split, None)),
        # the pooled sums of two real processes are compared in test_prototypes.py
        "out_gather": moved_by(slice(None)),
    }


def kmeans_init(case: Any) -> dict[str, Any]:
    feats, labels = tensor(case, "in_features"), tensor(case, "in_labels")
    count = int(case["in_num_micro_proto"])
    classes = range(int(labels.max()) + 1)
    centres = [cluster(feats[labels == k], count, seed=0, n_init=10).centres for k in classes]
    return {"out_centres": array(torch.cat(centres))}


# --- augmentation, schedules, data -----------------------------------------------------------------------------


def cutmix_mix(case: Any) -> dict[str, Any]:
    keep = tensor(case, "in_masks").bool()
    return {
        f"out_{name}": array(mix_with_next(tensor(case, f"in_{name}"), keep))
        for name in ("data", "label", "conf")
    }


def cutout_box(case: Any) -> dict[str, Any]:
    result = {}
    for key in [key for key in case.arrays if re.fullmatch(r"in_size\d+", key)]:
        i = key.removeprefix("in_size")
        height, width = case[key].tolist()
        draw = draw_half_area_box(height, width, np.random.RandomState(int(case[f"in_np_seed{i}"])))
        assert draw == BoxDraw(*case[f"in_draw_w_x_y{i}"].tolist())
        box = half_area_box(height, width, draw)
        mask = fill_boxes(torch.ones(1, height, width), [box], 0)
        result[f"out_box_y0x0y1x1_{i}"] = np.array([box.row0, box.col0, box.row1, box.col1])
        result[f"out_zeros{i}"] = int((mask == 0).sum())
    return result


def lr_table(case: Any) -> dict[str, Any]:
    result = {}
    for name in [key.split("_")[1] for key in case.recorded()]:
        (lr, factor), (epochs, length) = case[f"in_{name}_base_lr_headtimes"], case[f"in_{name}_epochs_n"]
        optim = OptimConfig(lr=float(lr), head_lr_factor=float(factor), epochs=int(epochs), batch_size=1)
        groups = [Group(nn.Linear(1, 1).parameters()), Group(nn.Linear(1, 1).parameters(), factor)]
        optimizer, total = build_optimizer(optim, groups), int(epochs * length)
        rates = [
            set_learning_rate(optimizer, optim, step, total) for step in case[f"in_{name}_iters"].tolist()
        ]
        result[f"out_{name}_lr"] = np.array(rates)
    return result


def labeled_repeat(case: Any) -> dict[str, Any]:
    order = oversample(case["in_ids"].tolist(), int(case["in_n_sup"]), int(case["in_seed"]))
    return {"out_order": np.array(order)}


def list_file(name: str) -> Path:
    """A published list; those that are not CPS's are U2PL's, byte for byte."""
    default = Path(__file__).resolve().parents[4] / "shared" / "data" / "published_lists"
    folder = Path(os.environ.get("SSS_PUBLISHED_LISTS", default))
    owner = "semi_seg_proto" if "_cps" in name else "U2PL"
    path = folder / owner / "data" / "splits" / f"{name}.txt"
    if not path.is_file():
        raise Skip(f"the published lists are not there: {path} (set SSS_PUBLISHED_LISTS)")
    return path


def split_lists(case: Any) -> dict[str, Any]:
    return named_files(tuple(case["in_list"].tolist()))


@lru_cache(maxsize=1)
def named_files(names: tuple[str, ...]) -> dict[str, Any]:
    """What our list reader makes of published lists, in folders that hold just the files they name."""
    files = {name: list_file(name) for name in names}
    counts, sums, first = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        specs = {}
        for dataset, known in (("pascal", "voc"), ("cityscapes", "cityscapes")):
            listed = [e for n, f in files.items() if n.startswith(dataset) for e in read_entries(f)]
            entries = {e.id if dataset == "pascal" else e.image for e in listed}
            for one in entries:
                if dataset == "pascal":
                    wanted = [f"JPEGImages/{one}.jpg", f"SegmentationClassAug/{one}.png"]
                else:
                    stem = one.removeprefix("leftImg8bit/").removesuffix("_leftImg8bit.png")
                    wanted = [
                        f"leftImg8bit/{stem}_leftImg8bit.png",
                        f"gtFine/{stem}_gtFine_labelTrainIds.png",
                    ]
                for path in wanted:  # empty files under the names that the lists give
                    target = Path(folder, dataset, path)
                    target.parent.is_dir() or target.parent.mkdir(parents=True)
                    target.touch()
            if entries:
                specs[dataset] = load_spec(known, str(Path(folder, dataset)))
        for name, path in files.items():
            spec = specs[name.split("/")[0]]
            items = spec.read_list(path)
            images = [item.image.relative_to(spec.root).as_posix() for item in items]
            counts.append(len(items))
            sums.append(hashlib.sha256("\n".join(sorted(images)).encode()).hexdigest())
            first.append(f"{images[0]}|{items[0].label.relative_to(spec.root).as_posix()}")
    return {
        "out_count": np.array(counts),
        "out_sha256_sorted_image_paths": np.array(sums),
        "out_first": np.array(first),
    }


# --- evaluation ------------------------------------------------------------------------------------------------


def sliding(case: Any) -> dict[str, Any]:
    weight, calls = tensor(case, "in_w"), 0

    def forward(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        small = F.conv2d(x[..., ::4, ::4], weight[:, :, None, None])
        rows = torch.linspace(0, 1, small.shape[-2], dtype=x.dtype)[:, None]
        cols = torch.linspace(0, 2, small.shape[-1], dtype=x.dtype)
        return upsample(small + rows - cols, x.shape[-2:])

    scores = sliding_window(forward, tensor(case, "in_x"), tuple(case["in_crop"].tolist()))
    return {
        "out_prediction": array(upsample(scores, case["in_out_size"].tolist())[0]),
        "out_num_windows": calls,
    }


def window_coords(case: Any) -> dict[str, Any]:
    rows = [
        (height, width, crop, y, y + crop, x, x + crop)
        for height, width, crop in case["in_sizes"].tolist()
        for y, x in windows((height, width), (crop, crop))
    ]
    return {"out_rows_H_W_crop_y0_y1_x0_x1": np.array(rows)}


def miou(case: Any) -> dict[str, Any]:
    classes = int(case["in_num_classes"])
    pairs = zip(tensor(case, "in_pred"), tensor(case, "in_label"), strict=True)
    matrix = ConfusionMatrix(classes)
    for pred, label in pairs:
        matrix.update(pred, label)
    intersection, union = (part.double() for part in matrix.intersection_union())
    return {
        "out_intersection": array(intersection),
        "out_union": array(union),
        "out_iou": array(class_iou(intersection, union)),
        "out_miou": mean_iou(intersection, union),
    }


def colormaps(case: Any) -> dict[str, Any]:
    return {
        "out_cityscapes": full_palette(load_spec("cityscapes").palette, BLACK)[case["in_cityscapes_rows"]],
        "out_voc": full_palette(load_spec("voc").palette)[case["in_voc_rows"]],
        "out_voc_prototypes": PROTOTYPE_PALETTE[case["in_prototype_rows"]],
    }


# --- the loop --------------------------------------------------------------------------------------------------


def linear(case: Any, role: str) -> nn.Linear:
    weight, bias = tensor(case, f"in_{role}_w"), tensor(case, f"in_{role}_b")
    layer = nn.Linear(weight.shape[1], weight.shape[0]).to(weight.dtype)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


def teacher_ema(case: Any) -> dict[str, Any]:
    student, teacher, xs = linear(case, "s"), linear(case, "t").requires_grad_(False), tensor(case, "in_x")
    length, first = int(case["in_n_it"]), int(case["in_sup_only"])
    optim = OptimConfig(lr=0.1, weight_decay=0.0, epochs=len(xs) // length, batch_size=1)
    cfg = Config(
        data=DataConfig(dataset="shapes", split="none", crop_size=(8, 8)),
        optim=optim,
        method=MethodConfig(sup_only_epochs=first, proto=None),
    )
    nets = Networks(student, teacher, student, Criterion())
    optimizer = build_optimizer(optim, [Group(student.parameters())])
    run = Run(cfg, Dist(), None, nets, None, optimizer, NO_SCALER, None)
    students, teachers, decays = [], [], []
    for i, x in enumerate(xs):
        at = Progress(i, length, optim.epochs)
        before_step(at, run)
        optimizer.zero_grad()
        student(x).square().mean().backward()
        optimizer.step()
        after_step(at, run, GOOD)
        update = at.since(first)
        decays.append(warmup_decay(update, cfg.method.ema_decay) if update >= 0 else -1.0)
        for layer, kept in ((student, students), (teacher, teachers)):
            kept.append(torch.cat((layer.weight.flatten(), layer.bias)).detach().clone())
    return {
        "out_student": array(torch.stack(students)),
        "out_teacher": array(torch.stack(teachers)),
        "out_decay": np.array(decays),
    }


class ToyNetwork(nn.Module):
    """One strided convolution, a 1x1 classifier and the prototype head, all without normalization."""

    def __init__(self, case: Any, role: str) -> None:
        super().__init__()
        conv, classifier = tensor(case, f"in_{role}conv_w"), tensor(case, f"in_{role}cls_w")
        self.conv = nn.Conv2d(conv.shape[1], conv.shape[0], conv.shape[2], stride=2, padding=1)
        self.cls = nn.Conv2d(classifier.shape[1], classifier.shape[0], 1)
        self.proto_net = PrototypeHead(
            len(classifier), int(case["in_num_micro_proto"]), len(conv), float(case["in_temp"])
        )
        names = {"conv": self.conv, "cls": self.cls}
        self.load_state_dict(
            {
                f"{n}.{part}": tensor(case, f"in_{role}{n}_{part[0]}")
                for n in names
                for part in ("weight", "bias")
            }
            | {"proto_net.proto_list": tensor(case, "in_proto_teacher" if role else "in_proto")}
        )
        self.to(conv.dtype)

    def forward(self, x: Tensor) -> Outputs:
        feats = self.conv(x).relu()
        return Outputs(self.cls(feats), feats, None)

    def require_prototypes(self) -> PrototypeHead:
        return self.proto_net


class RecordedDraws(Draws):
    """The coin, masks and places of one recorded iteration."""

    def __init__(self, case: Any, i: int) -> None:
        super().__init__(0, 0, torch.device("cpu"))
        self.mixed = bool(case["in_apply_cutmix"][i])
        self.masks = torch.from_numpy(case["in_cutmix_masks"][i]).bool()
        self.places = torch.from_numpy(case["in_positions"][i]).long()

    def coin(self) -> float:
        return 0.0 if self.mixed else 1.0

    def mix(self, mode: str, labels: Tensor, *batches: tuple[Tensor, float | None]) -> list[Tensor]:
        return [mix_with_next(batch, self.masks) for batch, _ in batches]

    def points(self, *_: Any) -> tuple[Tensor, Tensor]:
        return self.places[:, 0], self.places[:, 1]


def trajectory(case: Any) -> dict[str, Any]:
    epochs, length, first = (int(case[f"in_{k}"]) for k in ("epochs", "iters_per_epoch", "sup_only_epoch"))
    x_l, y_l, x_u = tensor(case, "in_x_l"), tensor(case, "in_y_l"), tensor(case, "in_x_u")
    optim = OptimConfig(
        lr=float(case["in_lr"]), momentum=float(case["in_sgd_momentum"]), epochs=epochs,
        weight_decay=float(case["in_weight_decay"]), head_lr_factor=1.0, batch_size=x_l.shape[1],
    )  # fmt: skip
    proto = ProtoConfig(
        per_class=int(case["in_num_micro_proto"]),
        momentum=float(case["in_proto_momentum"]),
        temperature=float(case["in_temp"]),
        granularity=int(case["in_G"]),
        source="file",
    )
    cfg = Config(
        data=DataConfig(dataset="shapes", split="none", crop_size=tuple(x_l.shape[-2:])),
        optim=optim,
        method=MethodConfig(
            confid_thresh=float(case["in_tau"]),
            ema_decay=float(case["in_ema_decay"]),
            sup_only_epochs=first,
            proto=proto,
        ),
    )
    student, teacher = ToyNetwork(case, ""), ToyNetwork(case, "t_").requires_grad_(False)
    nets = Networks(student, teacher, student, build_criterion(cfg))
    optimizer = build_optimizer(optim, [Group([*student.conv.parameters(), *student.cls.parameters()])])
    run = Run(cfg, Dist(), None, nets, None, optimizer, NO_SCALER, Movement(student.proto_net, proto))
    wanted = {int(found[1]) for key in case.recorded() if (found := re.match(r"out_it(\d+)_", key))}
    losses, confident, rates, result = [], [], [], {}
    for i in range(epochs * length):
        at, run.draws = Progress(i, length, epochs), RecordedDraws(case, i)
        rates.append(set_learning_rate(optimizer, optim, i, epochs * length)[0])
        before_step(at, run)
        found = train_step(batches(x_l[i], y_l[i], x_u[i]), at, run)
        optimizer.zero_grad(set_to_none=True)
        found.total.backward()
        optimizer.step()
        after_step(at, run, GOOD)
        names = ("loss_sup", "loss_unsup", "loss_proto_sup", "loss_proto_unsup")
        losses.append(
            [float(found.terms.get(k, torch.zeros(())).detach()) for k in names]
            + [float(found.total.detach())]
        )
        share = float(found.terms.get("confident", torch.zeros(())))
        confident.append(round(share * y_l[i].numel()))
        for role, toy in (("", student), ("t_", teacher)) if i in wanted else ():
            for name in ("conv", "cls"):
                layer = getattr(toy, name)
                result |= {f"out_it{i}_{role}{name}_w": array(layer.weight).copy(),
                           f"out_it{i}_{role}{name}_b": array(layer.bias).copy()}  # fmt: skip
            key = f"out_it{i}_proto" + ("_teacher" if role else "")
            result[key] = array(toy.proto_net.proto_list).copy()
    return result | {
        "out_losses_sup_unsup_psup_punsup_total": np.array(losses),
        "out_num_confident": np.array(confident),
        "out_lr": np.array(rates),
    }


ADAPTERS = {
    "teacher_ema": teacher_ema,
    "trajectory": trajectory,
    "net_voc": network,
    "net_voc_even": network,
    "net_city": network,
    "proto_head_eval": head_eval,
    "proto_head_train": head_train,
    "mask_generation": mask_generation,
    "point_sampling": point_sampling,
    "loss_proto_sup": proto_sup,
    "loss_proto_unsup": proto_unsup,
    "loss_unsup_linear": unsup_linear,
    "loss_unsup_entropy": unsup_entropy,
    "pseudo_label": pseudo_label,
    "ohem_ce": ohem,
    "proto_update": proto_update,
    "proto_update_edge": proto_update_edge,
    "proto_update_sequence": proto_update_sequence,
    "proto_update_ranks": proto_update_ranks,
    "kmeans_init": kmeans_init,
    "cutmix_mix": cutmix_mix,
    "cutout_box": cutout_box,
    "lr_table": lr_table,
    "labeled_repeat": labeled_repeat,
    "split_lists": split_lists,
    "sliding_window": sliding,
    "window_coords": window_coords,
    "miou": miou,
    "colormaps": colormaps,
}
