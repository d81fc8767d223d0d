"""For every recorded case of CPS: its inputs to our public functions, our outputs under the recorded names."""

from __future__ import annotations

import os
import random
import re
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from common.data.dataset_yaml import load_spec
from common.data.files import voc_colormap
from common.data.lists import parse_entries, sha256_order
from common.data.loaders import Batch
from common.data.transforms import to_normalized
from common.measure.inference import pad_to_crop, visit_counts, windows
from common.measure.metrics import ConfusionMatrix, class_iou, mean_iou
from common.numerics.losses import best_class
from common.run.progress import Progress
from projects.cps.arithmetic import TRAIN_IMAGES, epoch_arithmetic, warmup_poly
from projects.cps.compat.pictures import (
    LEGACY_VOC_PALETTE,
    port_overlay,
    port_palette,
)
from projects.cps.config import ModelConfig
from projects.cps.inference import original_scores, port_geometry, port_windows
from projects.cps.losses import OhemSettings, cross_pseudo_supervision, mix, supervised
from projects.cps.masks import BoxMaskSettings, draw_boxes, rasterize
from projects.cps.model import Branches, Networks
from projects.cps.network import CpsNetwork, Head, build_cps_network, parameter_groups
from projects.cps.stretched import item_at
from projects.cps.tests import toys
from projects.cps.tests.golden_adapters_baselines import ADAPTERS as BASELINES
from projects.cps.transforms import CpsTransform
from tests.golden_runner import ROOT, Skip
from tools.pictures import save_palette_png

MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)


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


def names_of(case: Any, pattern: str) -> list[str]:
    """What `(...)` stands for in the recorded keys that match, in the order of the recording."""
    found = [re.fullmatch(pattern, key) for key in case.arrays]
    return [match[1] for match in found if match]


# --- losses ----------------------------------------------------------------------------------------------------


def cps_loss(case: Any) -> dict[str, Any]:
    parts = {
        f"{net}_{kind}": leaf(case, f"in_logits{net}_{kind}")
        for net in (1, 2)
        for kind in ("labeled", "unlabeled")
    }
    logits = [torch.cat((parts[f"{net}_labeled"], parts[f"{net}_unlabeled"])) for net in (1, 2)]
    unweighted = cross_pseudo_supervision(*logits)
    loss = float(case["in_weight"]) * unweighted
    loss.backward()
    return {
        "out_label1": array(best_class(logits[0])),
        "out_label2": array(best_class(logits[1])),
        "out_loss_unweighted": array(unweighted),
        "out_loss": array(loss),
        **{f"grad_logits{name}": array(x.grad) for name, x in parts.items()},
    }


def cps_cutmix_loss(case: Any) -> dict[str, Any]:
    mask, students = tensor(case, "in_mask"), [leaf(case, f"in_student{net}") for net in (1, 2)]
    pseudo = [
        best_class(mix(tensor(case, f"in_logits{net}_x0"), tensor(case, f"in_logits{net}_x1"), mask))
        for net in (1, 2)
    ]
    loss = float(case["in_weight"]) * cross_pseudo_supervision(*students, *pseudo)
    loss.backward()
    return {
        "out_mixed": array(mix(tensor(case, "in_x0"), tensor(case, "in_x1"), mask)),
        "out_label1": array(pseudo[0]),
        "out_label2": array(pseudo[1]),
        "out_loss": array(loss),
        "grad_student1": array(students[0].grad),
        "grad_student2": array(students[1].grad),
    }


def ce_supervised(case: Any) -> dict[str, Any]:
    logits, target = leaf(case, "in_logits"), labels(case, "in_label")
    loss = supervised(logits, target)
    loss.backward()
    empty = supervised(logits, torch.full_like(target, 255), empty_is_nan=True)
    return {
        "out_loss": array(loss),
        "grad_logits": array(logits.grad),
        "out_all_ignored_is_nan": bool(empty.isnan()),
    }


def ohem_ce(case: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name in names_of(case, r"in_(\w+)_logits"):
        logits, target = leaf(case, f"in_{name}_logits"), labels(case, f"in_{name}_label")
        ohem = OhemSettings(float(case[f"in_{name}_thresh"]), int(case[f"in_{name}_min_kept"]))
        loss = supervised(logits, target, ohem=ohem, empty_is_nan=True)
        loss.backward()
        kept = logits.grad.abs().sum(dim=1) > 0
        out |= {
            f"out_{name}_loss": array(loss),
            f"out_{name}_kept": array(kept).astype(np.uint8),
            f"out_{name}_num_kept": int(kept.sum()),
            f"grad_{name}_logits": array(logits.grad),
        }
        empty = supervised(logits, torch.full_like(target, 255), ohem=ohem, empty_is_nan=True)
        out["out_all_ignored_is_nan"] = bool(empty.isnan()) and out.get("out_all_ignored_is_nan", True)
    return out


# --- masks -----------------------------------------------------------------------------------------------------

AS_CONSTRUCTED = {"n_boxes": 1, "invert": False}  # the original's constructor, unlike its configuration
MASK_SETTINGS: dict[str, BoxMaskSettings] = {
    "area_fixed_aspect": BoxMaskSettings(prop_range=(0.2, 0.6), n_boxes=2, random_aspect_ratio=False),
    "size_random": BoxMaskSettings(prop_range=(0.3, 0.7), prop_by_area=False, invert=False),
    "size_fixed": BoxMaskSettings(
        prop_range=(0.3, 0.9), n_boxes=4, random_aspect_ratio=False, prop_by_area=False
    ),
    "out_of_bounds": BoxMaskSettings(within_bounds=False),
    "scalar_prop_one_box": BoxMaskSettings(prop_range=(0.5, 0.5), **AS_CONSTRUCTED),
    "zero_prop": BoxMaskSettings(prop_range=(0.0, 0.0), n_boxes=2),
}


def masks_of(settings: BoxMaskSettings, n: int, shape: np.ndarray, seed: Any) -> np.ndarray:
    height, width = shape.tolist()
    boxes = draw_boxes(settings, n, height, width, np.random.RandomState(int(seed)))
    masks = rasterize(boxes, height, width, invert=settings.invert)
    return array(masks).astype(np.uint8)


def box_mask_default(case: Any) -> dict[str, Any]:
    settings, shape = BoxMaskSettings(), case["in_shape"]
    collated = len(case["out_collate_mask"])
    return {
        "out_mask": masks_of(settings, int(case["in_n"]), shape, case["in_seed"]),
        "out_collate_mask": masks_of(settings, collated, shape, case["in_collate_global_seed"]),
    }


def box_mask_variants(case: Any) -> dict[str, Any]:
    return {
        f"out_{name}_mask": masks_of(
            MASK_SETTINGS[name],
            len(case[f"in_{name}_draw0"]),
            case[f"in_{name}_shape"],
            case[f"in_{name}_seed"],
        )
        for name in names_of(case, r"in_(\w+)_seed")
    }


# --- schedules and lists ---------------------------------------------------------------------------------------


def poly_lr(case: Any) -> dict[str, Any]:
    power = float(case["in_power"])
    rows = zip(*(case[f"in_{key}"].tolist() for key in ("base", "k", "total", "warmup")), strict=True)
    return {"out_lr": np.array([warmup_poly(base, k, n, power, warmup) for base, k, n, warmup in rows])}


def epoch_arith(case: Any) -> dict[str, Any]:
    rows = zip(*(case[f"in_{key}"].tolist() for key in ("is_city", "ratio", "batch")), strict=True)
    found = [
        epoch_arithmetic(TRAIN_IMAGES["cityscapes" if is_city else "voc"], ratio, batch)
        for is_city, ratio, batch in rows
    ]
    return {
        "out_n_labeled": np.array([sizes.labeled for sizes in found]),
        "out_n_unlabeled": np.array([sizes.unlabeled for sizes in found]),
        "out_max_samples": np.array([sizes.max_samples for sizes in found]),
        "out_iters_per_epoch": np.array([sizes.iterations for sizes in found]),
    }


def list_files(case: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for i in names_of(case, r"in_length(\d+)"):
        count, length = case[f"in_length{i}"].tolist()
        items = [item_at(position, count, length) for position in range(length)]
        fixed = [item for item in items if item is not None]
        out[f"out_length{i}_deterministic_part"] = np.array(fixed)
        out[f"out_length{i}_tail_size"] = length - len(fixed)
        # the tail of one list repeats nothing, which no access sees: each makes a list for a single entry
        out[f"out_length{i}_tail_unique"] = items.count(None)
    folder = Path(os.environ.get("SSS_PUBLISHED_LISTS", ROOT.parent / "shared" / "data" / "published_lists"))
    if not folder.is_dir():
        raise Skip(f"published lists are not there: {folder} (set SSS_PUBLISHED_LISTS)")
    lists = []
    for name in case["in_list"].tolist():
        text = (folder / "TorchSemiSeg" / "DATA" / name).read_text(encoding="utf-8")
        entries = parse_entries(text, name)
        lists.append([f"{one.image}\t{one.label}" if one.label else one.image for one in entries])
    return out | {
        "out_count": np.array([len(lines) for lines in lists]),
        "out_sha256_sorted": np.array([sha256_order(sorted(lines)) for lines in lists]),
        "out_sha256_in_order": np.array([sha256_order(lines) for lines in lists]),
        "out_first": np.array([lines[0] for lines in lists]),
        "out_last": np.array([lines[-1] for lines in lists]),
    }


def train_pre(case: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name in names_of(case, r"in_(\w+)_img_rgb"):
        transform = CpsTransform(
            mean=MEAN,
            std=STD,
            crop_size=tuple(case["in_crop"].tolist()),
            scales=tuple(case[f"in_{name}_scales"].tolist()),
        )
        image, label = case[f"in_{name}_img_rgb"], case[f"in_{name}_label"]
        x, y = transform(image, label, random.Random(int(case[f"in_{name}_random_seed"])))
        out[f"out_{name}_image"] = array(x)
        out[f"out_{name}_label"] = array(y).astype(np.uint8)
    return out


# --- networks --------------------------------------------------------------------------------------------------


def rule_value(key: str, shape: list[int]) -> np.ndarray:
    """The value that the recordings give to a state entry, from its name and shape."""
    rng = np.random.RandomState(zlib.crc32(key.encode()))
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if key.endswith("running_var"):
        return (0.5 + rng.rand(*shape)).astype(np.float32)
    if key.endswith("running_mean") or (len(shape) == 1 and not key.endswith("weight")):
        return (0.1 * rng.randn(*shape)).astype(np.float32)
    if len(shape) == 1:
        return (0.5 + 0.5 * rng.rand(*shape)).astype(np.float32)
    return (rng.randn(*shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)


def rule_state(keys: Any, prefix: str = "") -> dict[str, Tensor]:
    """The state of the module that `prefix` names, filled by the rule, in the order of the recording."""
    return {
        key.removeprefix(prefix): torch.from_numpy(np.asarray(rule_value(key, shape)))
        for key, shape, _ in keys
        if key.startswith(prefix)
    }


def rule_network(case: Any, prefix: str = "") -> CpsNetwork:
    """Our network with the layers that the keys name, filled by the rule; every key must fit, in its order."""
    state = rule_state(case.keys, prefix)
    stage3 = sum(key.startswith("backbone.layer3.") and key.endswith(".conv1.weight") for key in state)
    model = ModelConfig(backbone={6: "resnet50", 23: "resnet101"}[stage3])
    net = build_cps_network(model, len(state["classifier.bias"]))
    assert list(net.state_dict()) == list(state)
    net.load_state_dict(state)
    return net.to(dtype_of(case)).eval()


def single_network(case: Any) -> dict[str, Any]:
    net, x = rule_network(case), tensor(case, "in_x")
    with torch.no_grad():
        stages = net.backbone(x)
        feature, low = net(x)
        aspp, logits = net.head.aspp(stages[-1]), net.predict(x)
    return {
        "out_stage1_stride16ch": array(stages[0][:, ::16, ::2, ::2]),
        **{f"out_stage{i}_stride16ch": array(stages[i - 1][:, ::16]) for i in (2, 3, 4)},
        "out_aspp_stride8ch": array(aspp[:, ::8]),
        "out_feature_stride8ch_stride2px": array(feature[:, ::8, ::2, ::2]),
        "out_logits_lowres": array(low),
        "out_logits_stride3px": array(logits[..., ::3, ::3]),
        "out_logits_absmax": array(logits.abs().max()),
        "out_argmax_stride2px": array(best_class(logits)[:, ::2, ::2]).astype(np.uint8),
    }


def two_branches(case: Any) -> dict[str, Any]:
    nets = Branches([rule_network(case, f"branch{i}.") for i in (1, 2)])
    assert list(nets.state_dict()) == [key for key, _, _ in case.keys]
    with torch.no_grad():
        first, second = (net.predict(tensor(case, "in_x")) for net in (nets.branch1, nets.branch2))
    return {"out_eval": array(first[..., ::2, ::2]), "out_branch2_eval": array(second[..., ::2, ::2])}


def head_train_step(case: Any) -> dict[str, Any]:
    state = rule_state(case.keys)
    stage1, stage4 = (
        torch.from_numpy(
            np.abs(
                np.random.RandomState(int(case[f"in_seed_{name}"])).randn(*case[f"in_shape_{name}"])
            ).astype(np.float32)
        )
        .to(dtype_of(case))
        .requires_grad_(True)
        for name in ("stage1", "stage4")
    )
    planes, low = len(state["aspp.red_bn.bias"]), len(state["reduce.1.bias"])
    head = Head((stage1.shape[1], stage4.shape[1]), planes, low, (6, 12, 18))
    head.load_state_dict(state)
    head = head.to(dtype_of(case)).train()
    feature = head((stage1, stage4))
    loss = (feature**2).mean()
    loss.backward()
    buffers = {
        f"out_{key.replace('.', '_')}": array(value)
        for key, value in head.named_buffers()
        if not key.endswith("num_batches_tracked")
    }
    gradients = {
        f"grad_param_{key.replace('.', '_')}": array(p.grad.flatten()[:64])
        for key, p in head.named_parameters()
    }
    return {
        "out_feature_stride4ch": array(feature[:, ::4]),
        "out_loss": array(loss),
        "grad_stage1_stride8ch": array(stage1.grad[:, ::8]),
        "grad_stage4_stride16ch": array(stage4.grad[:, ::16]),
        **buffers,
        **gradients,
    }


def param_groups(case: Any) -> dict[str, Any]:
    net = build_cps_network(ModelConfig(), int(case["in_num_classes"]))
    names = {p: f"branch{int(case['in_branch'])}.{name}" for name, p in net.named_parameters()}
    groups = parameter_groups(net, 1e-4)
    out: dict[str, Any] = {
        "out_num_groups": len(groups),
        "out_total_params_two_networks": 2 * sum(p.numel() for p in net.parameters()),
    }
    for i, group in enumerate(groups):
        out[f"out_group{i}_names"] = np.array([names[p] for p in group.parameters])
        out[f"out_group{i}_numel"] = np.array([p.numel() for p in group.parameters])
        out[f"out_group{i}_decay"] = group.weight_decay
    return out


# --- evaluation ------------------------------------------------------------------------------------------------


def window_step(crop: int, rate: Any) -> int:
    return int(np.ceil(crop * float(rate)))


def sliding_windows(case: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for i in range(int(case["in_num"])):
        height, width = case[f"in_{i}_size"].tolist()
        crop, bins = int(case[f"in_{i}_crop"]), len(case[f"out_{i}_count_hist"])
        step = window_step(crop, case["in_stride_rate"])
        padded, (top, left) = pad_to_crop(torch.zeros(1, 1, height, width), (crop, crop))
        starts = windows((height, width), (crop, crop), (step, step))
        out[f"out_{i}_windows"] = np.array(
            [
                [
                    *(max(row - top, 0), min(row + crop - top, height)),
                    *(max(col - left, 0), min(col + crop - left, width)),
                    *(top, left, crop, crop),
                ]
                for row, col in starts
            ]
        )
        counts = visit_counts(padded, starts, (crop, crop))[top : top + height, left : left + width]
        out[f"out_{i}_count_stride16"] = array(counts[::16, ::16]).astype(np.uint8)
        out[f"out_{i}_count_hist"] = np.bincount(array(counts).astype(int).ravel(), minlength=bins)
    return out


def sliding_eval(case: Any) -> dict[str, Any]:
    weight, bias = tensor(case, "in_conv_weight"), tensor(case, "in_conv_bias")
    mean, std = (tuple(255 * case[f"in_{key}"]) for key in ("mean", "std"))
    crop = int(case["in_crop"])
    step = window_step(crop, case["in_stride_rate"])
    out: dict[str, Any] = {}
    for name in names_of(case, r"in_(\w+)_img_rgb"):
        scores = original_scores(
            lambda x: F.conv2d(x, weight, bias, padding=1),
            to_normalized(case[f"in_{name}_img_rgb"], mean, std)[None].to(dtype_of(case)),
            (crop, crop),
            (step, step),
            mean=mean,
            std=std,
            scales=case[f"in_{name}_scales"].tolist(),
            flip=bool(case[f"in_{name}_flip"]),
        )
        out[f"out_{name}_score"] = array(scores[0].permute(1, 2, 0))
        out[f"out_{name}_pred"] = array(best_class(scores)[0]).astype(np.uint8)
    return out


def confusion_miou(case: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name in names_of(case, r"in_(\w+)_num_classes"):
        classes = int(case[f"in_{name}_num_classes"])
        matrix = ConfusionMatrix(classes)
        for pred, label in zip(
            tensor(case, f"in_{name}_pred"), tensor(case, f"in_{name}_label"), strict=True
        ):
            # the original leaves out every label beyond the classes; here the dataset maps those to 255 or is wrong
            matrix.update(pred, label.where(label < classes, 255))
        intersection, union = matrix.intersection_union()
        figures = {
            "iou_nan_as_minus1": array(class_iou(intersection, union, 0.0)),
            "miou": mean_iou(intersection, union, "skip", 0.0),
            "miou_no_background": mean_iou(intersection[1:], union[1:], "skip", 0.0),
            "pixel_acc": matrix.pixel_accuracy(),
        }
        out |= {f"out_{name}_{key}": np.nan_to_num(value, nan=-1.0) for key, value in figures.items()}
        out[f"out_{name}_hist"] = array(matrix.counts)
        out[f"out_{name}_labeled"] = int(matrix.counts.sum())
        out[f"out_{name}_correct"] = int(intersection.sum())
    return out


def port_slide_and_iou(case: Any) -> dict[str, Any]:
    intersection = tensor(case, "in_iou_intersect")
    union = tensor(case, "in_iou_pred") + tensor(case, "in_iou_label") - intersection
    iou = class_iou(intersection, union, 0.0).nan_to_num(1.0)  # to the port an absent class is found
    out: dict[str, Any] = {"out_iou_class": array(iou), "out_iou_mean": array(iou.mean())}
    for i in names_of(case, r"in_(\d+)_size_hw"):
        size = tuple(case[f"in_{i}_size_hw"].tolist())
        crop, stride = (tuple(case[f"in_{i}_{key}_wh"].tolist()[::-1]) for key in ("crop", "stride"))
        starts, (height, width) = port_geometry(size, crop, stride)
        out[f"out_{i}_windows"] = np.array([[r, r + height, c, c + width] for r, c in starts])
        calls = iter(range(1, len(starts) + 1))
        means = port_windows(
            lambda x, calls=calls: torch.full_like(x[:, :1], next(calls)),
            torch.zeros(1, 3, *size, dtype=dtype_of(case)),
            crop,
            stride,
        )
        out[f"out_{i}_mean_of_window_numbers_stride8"] = array(means[0, 0, ::8, ::8])
    return out


def palettes(case: Any) -> dict[str, Any]:
    colors = port_palette()
    pred, custom = case["in_port_pred"], case["in_port_custom_color"].tolist()
    image = np.ascontiguousarray(case["in_port_image_bgr"][..., ::-1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mask.png")
        save_palette_png(path, pred, colors)
        with Image.open(path) as saved:
            indices, stored = np.array(saved), np.array(saved.getpalette(), dtype=np.uint8)
    shown = len(case["out_port_colormap_custom_first4"])
    city = load_spec("cityscapes")
    stored_ids = next(label.lut for label in city.labels if "_labelIds" in label.pattern)[:34]
    server_ids = np.array([np.flatnonzero(stored_ids == k)[0] for k in range(city.num_classes)], np.uint8)
    voc = ["tv/monitor" if name == "tvmonitor" else name for name in load_spec("voc").classes]
    return {
        "out_voc_colors": voc_colormap(len(case["out_voc_colors"])),
        "out_voc_saved_palette": LEGACY_VOC_PALETTE,
        "out_city_colors": city.palette,
        "out_city_trainid_to_id": server_ids,
        "out_voc_names": np.array(voc),  # the authors write VOC's own `tvmonitor` with a slash
        "out_city_names": np.array(city.classes),
        "out_city_ids": server_ids[case["in_city_pred"]],
        "out_city_name": np.array(f"{Path(str(case['in_city_name'])).stem.rpartition('_')[0]}.png"),
        "out_port_colormap": colors,
        "out_port_colormap_custom_first4": port_palette(custom)[:shown],
        "out_port_blended_bgr": port_overlay(image, pred, colors)[..., ::-1],
        "out_port_palette_png_indices": indices,
        "out_port_palette_png_palette": stored,
    }


# --- trajectories ----------------------------------------------------------------------------------------------


def toy_network(state: dict[str, Tensor]) -> CpsNetwork:
    """The network of the trajectories with the sizes that its state has."""
    classes, planes = state["classifier.weight"].shape[:2]
    stem = len(state["backbone.bn1.bias"])
    net = CpsNetwork(toys.ToyBackbone(stem), toys.ToyHead(stem, planes), nn.Conv2d(planes, classes, 1))
    missing, unexpected = net.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)
    return net.to(state["classifier.weight"].dtype).train()


def initial_branches(case: Any) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for branch in ("branch1", "branch2"):
        prefix = f"in_init_{branch}__"
        keys = [key for key in case.arrays if key.startswith(prefix)]
        found[branch] = toy_network(
            {key.removeprefix(prefix).replace("__", "."): tensor(case, key) for key in keys}
        )
    return found


def all_ranks(case: Any, key: str, world_size: int) -> Tensor | None:
    """A recorded input of all ranks side by side, (steps, images, ...), or None if there is none."""
    names = [f"in_{key}"] if world_size == 1 else [f"in_rank{r}_{key}" for r in range(world_size)]
    return torch.cat([tensor(case, name) for name in names], dim=1) if names[0] in case else None


def trajectory(case: Any) -> dict[str, Any]:
    """The loop in one process on the images of all ranks, as a run with `paper_processes` trains them."""
    world_size, weight = int(case["in_world_size"]), float(case["in_weight"])
    steps, total_steps = int(case["in_steps"]), int(case["in_total_iterations"])
    x_l, y_l, x_0, x_1, masks = (
        all_ranks(case, key, world_size)
        for key in ("labeled_x", "label", "unlabeled0_x", "unlabeled1_x", "mask")
    )
    cfg = toys.config(
        "cps" if masks is None else "cps_cutmix",
        method={"name": "cps" if masks is None else "cps_cutmix", "cps_weight": weight},
        optim={
            "lr": float(case["in_base_lr"]),
            "momentum": float(case["in_momentum"]),
            "weight_decay": float(case["in_weight_decay"]),
            "power": float(case["in_power"]),
            "epochs": 1,
            "batch_size": len(x_l[0]),
            "paper_processes": world_size,
        },
    )
    ohem = None
    if "in_ohem_min_kept" in case:
        ohem = OhemSettings(float(case["in_ohem_thresh"]), int(case["in_ohem_min_kept"]))
    modules = initial_branches(case)
    branches = Branches(list(modules.values()))

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        seen.supervised.append((logits.detach(), target))
        return supervised(logits, target, groups=world_size, ohem=ohem, empty_is_nan=True)

    nets = Networks(modules, branches, loss)
    teach, run = nets.teach, toys.run_of(cfg, nets)
    rates, totals, logged, local = [], [], [], []
    for k in range(steps):
        seen = Seen(branches, ohem, world_size)
        nets.forward, group = seen.forward, [Batch(x_l[k], y_l[k].long(), None), Batch(x_0[k], None, None)]
        if masks is not None:
            run.draws = RecordedMask(masks[k].to(x_l.dtype))
            nets.teach = seen.keep(teach, run.draws.mask)
            group.append(Batch(x_1[k], None, None))
        result = toys.one_step(run, Progress(k, total_steps, 1), [tuple(group)])
        rates.append([[group["lr"] for group in one.param_groups] for one in run.optimizers.values()])
        totals.append(result.total.item())
        logged.append([result.terms[key].item() for key in ("loss_cps", "loss_sup", "loss_sup_2")])
        local.append(seen.local_losses())
    assert np.ptp(rates, axis=(1, 2)).max() == 0
    ranks = [""] if world_size == 1 else [f"rank{r}_" for r in range(world_size)]
    return {
        "out_lr": np.array(rates)[:, 0, 0],
        "out_total_loss": np.array(totals),
        "out_logged_losses": np.array(logged),
        **{f"out_{rank}local_losses_unweighted": np.array(local)[:, r] for r, rank in enumerate(ranks)},
        **final_state(branches, list(run.optimizers.values())),
    }


class RecordedMask:
    """Gives the recorded mask instead of a random one."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def masks(self, images: Tensor) -> Tensor:
        assert len(images) == len(self.mask)
        return self.mask


class Seen:
    """What a step computes, so that the share of each rank in it can be named."""

    def __init__(self, nets: Branches, ohem: OhemSettings | None, world_size: int) -> None:
        self.nets, self.ohem, self.world_size = nets, ohem, world_size
        self.supervised: list[tuple[Tensor, Tensor]] = []
        self.scores: list[list[Tensor]] = []
        self.pseudo: list[Tensor] | None = None

    def forward(self, *batches: Tensor) -> list[list[Tensor]]:
        scores = self.nets(*batches)
        self.scores = [[one.detach() for one in each] for each in scores]
        return scores

    def keep(self, teach: Any, mask: Tensor) -> Any:
        def keeping(*batches: Tensor, train: bool) -> Any:
            scores = teach(*batches, train=train)
            self.pseudo = [best_class(mix(*pair, mask)) for pair in scores]
            return scores

        return keeping

    def local_losses(self) -> list[list[float]]:
        """Consistency without weight and both supervised losses of each rank."""
        rows = []
        for r in range(self.world_size):

            def part(x: Tensor, r: int = r) -> Tensor:
                return x.chunk(self.world_size)[r]

            if self.pseudo is None:
                logits = [torch.cat([part(one) for one in each]) for each in self.scores]
                cps = cross_pseudo_supervision(*logits)
            else:
                mixed = [part(each[0]) for each in self.scores]
                cps = cross_pseudo_supervision(*mixed, *(part(label) for label in self.pseudo))
            sup = [
                supervised(part(logits), part(target), ohem=self.ohem, empty_is_nan=True)
                for logits, target in self.supervised
            ]
            rows.append([cps.item(), *(one.item() for one in sup)])
        return rows


def final_state(nets: Branches, optimizers: list[torch.optim.Optimizer]) -> dict[str, np.ndarray]:
    momentum = {p: state["momentum_buffer"] for one in optimizers for p, state in one.state.items()}
    out = {f"out_final_{key.replace('.', '__')}": array(value) for key, value in nets.state_dict().items()}
    for key, p in nets.named_parameters():
        out[f"out_momentum_{key.replace('.', '__')}"] = array(momentum[p])
    return out


ADAPTERS = {
    "cps_loss": cps_loss,
    "cps_cutmix_loss": cps_cutmix_loss,
    "ce_supervised": ce_supervised,
    "ohem_ce": ohem_ce,
    "box_mask_default": box_mask_default,
    "box_mask_variants": box_mask_variants,
    "poly_lr": poly_lr,
    "epoch_arith": epoch_arith,
    "param_groups": param_groups,
    "net_single_r50": single_network,
    "net_single_r101": single_network,
    "net_two_branch": two_branches,
    "head_train_step": head_train_step,
    "train_pre": train_pre,
    "sliding_windows": sliding_windows,
    "sliding_eval": sliding_eval,
    "confusion_miou": confusion_miou,
    "palettes": palettes,
    "port_slide_and_iou": port_slide_and_iou,
    "list_files": list_files,
    **dict.fromkeys(("traj_voc_cps", "traj_voc_cutmix", "traj_city_cps", "traj_city_cutmix"), trajectory),
    **dict.fromkeys(("traj_w2_voc_cps", "traj_w2_city_cutmix"), trajectory),
} | BASELINES
