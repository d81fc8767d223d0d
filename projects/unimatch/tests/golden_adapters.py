"""For every recorded case of UniMatch: its inputs to our public functions, our outputs under the recorded names."""

from __future__ import annotations

import hashlib
import os
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from common.config import IMAGENET_MEAN, IMAGENET_STD, OptimConfig
from common.data.loaders import EpochSampler
from common.data.transforms import to_normalized
from common.data.views import ColorDraw, draw_window, long_side_size, place, strong_view
from common.measure.evaluation import Protocol, center_crop, evaluate
from common.measure.metrics import ConfusionMatrix, class_iou, mean_iou
from common.numerics.ema import update_teacher, warmup_decay
from common.numerics.optim import Group, build_optimizer
from common.run.progress import Progress
from projects.unimatch import train
from projects.unimatch.augment import Views, complementary, draw_box
from projects.unimatch.config import BoxSettings, ModelConfig
from projects.unimatch.data import repeated, roles
from projects.unimatch.dpt import Dpt, DptHead, adapted_positions, at_multiples
from projects.unimatch.evaluate import WindowProtocol, original_windows
from projects.unimatch.losses import consistency, kept_share, pasted, pseudo_labels, supervised
from projects.unimatch.model import Perturbed, average_buffers, network_of, parameter_groups
from projects.unimatch.tests import toys
from tests.golden_runner import ROOT, Skip
from tests.rules import rule_value

SMOOTH, NEAREST = Image.Resampling.BILINEAR, Image.Resampling.NEAREST


def tensor(case: Any, key: str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(case[key]))


def leaf(case: Any, key: str) -> Tensor:
    return tensor(case, key).clone().requires_grad_(True)


def array(value: Tensor) -> np.ndarray:
    return value.detach().numpy()


def numbers(case: Any, key: str) -> list[int]:
    return [int(n) for n in case[key]]


def filled(network: nn.Module, case: Any, **factors: float) -> Any:
    """The network with weights by the rule, some multiplied, in the precision of the case."""
    state = {key: torch.from_numpy(np.asarray(rule_value(key, shape))) for key, shape, _ in case.keys}
    for key, factor in factors.items():
        state[key.replace("__", ".")] *= factor
    network.load_state_dict(state)
    return network.to(torch.float64 if case.dtype == np.float64 else torch.float32)


def underscored(name: str) -> str:
    return name.replace(".", "__")


# --- losses ----------------------------------------------------------------------------------------------------


def losses(case: Any) -> dict[str, Any]:
    """Both versions and FixMatch: what is not in the case does not take part."""
    threshold, views = float(case["in_conf_thresh"]), [i for i in (1, 2) if f"in_box{i}" in case]
    leaves = {
        name: leaf(case, f"in_pred_{name}")
        for name in ("x", "u_w", "u_w_fp", "s1", "s2")
        if f"in_pred_{name}" in case
    }
    ours = pseudo_labels(leaves["u_w"], tensor(case, "in_ignore") == 255)
    theirs = ours.mirrored()
    if "in_pred_mix" in case:
        theirs = pseudo_labels(tensor(case, "in_pred_mix"), tensor(case, "in_ignore_mix") == 255)
    ohem = None
    if "in_ohem_thresh" in case:
        ohem = (float(case["in_ohem_thresh"]), int(case["in_ohem_min_kept"]))
    out: dict[str, Any] = {}
    found = {"x": supervised(leaves["x"], tensor(case, "in_label").long(), ohem, empty_is_nan=True)}
    for i in views:
        mixed = pasted(ours, theirs, tensor(case, f"in_box{i}") == 1)
        found[f"s{i}"] = consistency(leaves[f"s{i}"], mixed, threshold, empty_is_nan=True)
        out |= {f"out_target{i}": array(mixed.label), f"out_conf{i}": array(mixed.conf)}
        out[f"out_ignore{i}"] = 255 * array(mixed.padding)
    found["s"] = torch.stack([found[f"s{i}"] for i in views]).mean()
    unsup = found["s"]
    if "u_w_fp" in leaves:
        found["fp"] = consistency(leaves["u_w_fp"], ours, threshold, empty_is_nan=True)
        unsup = (found["s"] + found["fp"]) / 2
    found["all"] = (found["x"] + unsup) / 2
    found["all"].backward()
    ratio = kept_share(ours, threshold, empty_is_nan=True)
    out |= {f"out_loss_{name}": array(value) for name, value in found.items()} | {
        "out_mask_ratio": array(ratio)
    }
    for name, value in leaves.items():
        out[f"grad_pred_{name}"] = array(torch.zeros_like(value) if value.grad is None else value.grad)
    out |= {f"{key}_is_nan": bool(np.isnan(value).any()) for key, value in out.items() if np.ndim(value) == 0}
    return {key: value for key, value in out.items() if key in case}


def ohem_ce(case: Any) -> dict[str, Any]:
    out = {}
    for name in (key[3:-7] for key in case.arrays if key.startswith("in_") and key.endswith("_logits")):
        logits = leaf(case, f"in_{name}_logits")
        rule = (float(case[f"in_draw_{name}_thresh"]), int(case[f"in_{name}_min_kept"]))
        loss = supervised(logits, tensor(case, f"in_{name}_label").long(), rule)
        loss.backward()
        out |= {f"out_{name}_loss": array(loss), f"grad_{name}_logits": array(logits.grad)}
    return out


class Recorder(nn.Module):
    """A network that notes in which mode, with gradients or not, it is given which images."""

    def __init__(self, calls: list[Any]) -> None:
        super().__init__()
        self.calls, self.level_planes, self.one_factor = calls, (3,), True
        self.backbone, self.head = nn.Identity(), nn.Conv2d(3, 4, 1)

    def encode(self, x: Tensor) -> list[Tensor]:
        self.calls.append([self.training, torch.is_grad_enabled(), len(x), False, x.detach()])
        return [x]

    def decode(self, levels: Sequence[Tensor], size: Any) -> Tensor:
        return self.head(levels[0])


class RecordingPerturbed(Perturbed):
    def forward(self, x: Tensor, factors: Any = None, beside: bool = False) -> Tensor:
        logits = super().forward(x, factors, beside)
        self.network.calls[-1][3] = factors is not None
        return logits


def calls_of_a_step(case: Any) -> dict[str, Any]:
    """What the networks are given in a step, in its order."""
    second = "in_mix_w" in case
    cfg, calls = toys.config(method=toys.V1 if second else toys.V2), []
    student, teacher = Recorder(calls), None if second else Recorder(calls)
    student.head.to(torch.from_numpy(case["in_img_x"]).dtype)
    if teacher is not None:
        teacher.eval().head.to(student.head.weight.dtype)
    run = toys.run_of(cfg, toys.networks(cfg, student, teacher, RecordingPerturbed(student)))
    boxes = [tensor(case, f"in_box{i}") == 1 for i in (1, 2)]
    nothing = torch.zeros_like(boxes[0])

    def views(name: str) -> Any:
        return toys.unlabeled(
            [tensor(case, f"in_{name}_{part}") for part in ("w", "s1", "s2")], nothing, boxes
        )

    x = tensor(case, "in_img_x")
    batch = [toys.labeled(x, torch.zeros(len(x), *x.shape[-2:], dtype=torch.long)), views("img")]
    train.train_step((*batch, *([views("mix")] if second else [])), Progress(0, 10, 2), run)
    names = ("train_mode", "with_grad", "images", "need_fp" if second else "comp_drop")
    out = {f"out_call_{name}": np.array([int(call[i]) for call in calls]) for i, name in enumerate(names)}
    return out | {f"out_call{i}": array(call[4]) for i, call in enumerate(calls, start=1)}


# --- data ------------------------------------------------------------------------------------------------------


class Recorded:
    """Stands in for `random.Random`: a draw comes from the stream, seeded alike, that the recorded codes name."""

    def __init__(self, seed: int, codes: Sequence[int]) -> None:
        self.python, self.numpy = random.Random(seed), np.random.RandomState(seed)
        self.torch, self.codes = torch.Generator().manual_seed(seed), iter([int(c) for c in codes])

    def _code(self, *known: int) -> int:
        code = next(self.codes)
        assert code in known, f"draw {code} instead of one of {known}"
        return code

    def random(self) -> float:
        if self._code(0, 6) == 0:
            return self.python.random()
        return float(torch.rand(1, generator=self.torch))

    def randint(self, a: int, b: int, /) -> int:
        return self.python.randint(a, b) if self._code(1, 3) == 1 else int(self.numpy.randint(a, b + 1))

    def uniform(self, a: float, b: float, /) -> float:
        if self._code(2, 5) == 2:
            return float(self.numpy.uniform(a, b))
        return float(torch.empty(1).uniform_(a, b, generator=self.torch))

    def shuffle(self, x: list[int], /) -> None:
        for _ in x:
            self._code(4)
        x[:] = torch.randperm(len(x), generator=self.torch).tolist()

    def assert_all_drawn(self) -> None:
        assert next(self.codes, None) is None


def cutmix_box(case: Any) -> dict[str, Any]:
    out = {}
    for i in range(int(case["in_num"])):
        side, boxes, first = int(case[f"in_{i}_size"]), [], 0
        for seed, count in zip(
            numbers(case, f"in_{i}_seed"), numbers(case, f"in_{i}_draw_count"), strict=True
        ):
            rng = Recorded(seed, case[f"in_{i}_draw_code"][first : first + count])
            box = draw_box(rng, side, side, BoxSettings())
            rng.assert_all_drawn()
            boxes.append([box.row0, box.row1, box.col0, box.col1])
            first += count
        out[f"out_{i}_box"] = np.array(boxes)
    if "in_own_size" in case:
        side, (low, high, *ratio) = int(case["in_own_size"]), case["in_draw_own_range"].tolist()
        settings = BoxSettings(probability=float(case["in_own_p"]), area=(low, high), ratio=tuple(ratio))
        box = draw_box(Recorded(int(case["in_own_seed"]), case["in_own_draw_code"]), side, side, settings)
        out["out_own_mask"] = np.zeros((side, side), np.uint8)
        out["out_own_mask"][box.row0 : box.row1, box.col0 : box.col1] = 1
    return out


def geometry(case: Any) -> dict[str, Any]:
    out = {}
    for name in (key[3:-6] for key in case.arrays if key.endswith("_image")):
        photo, label = (Image.fromarray(case[f"in_{name}_{part}"]) for part in ("image", "label"))
        side, fill = int(case[f"in_{name}_crop"]), int(case[f"in_{name}_fill"])
        draw = draw_window(
            random.Random(int(case[f"in_{name}_seed"])),
            photo.height,
            photo.width,
            (side, side),
            (0.5, 2.0),
            True,
        )
        assert draw.long_side == int(case[f"in_{name}_draw_long_side"])
        assert [draw.col, draw.row] == numbers(case, f"in_{name}_draw_crop_x_y")
        assert draw.mirrored == (float(case[f"in_draw_{name}_flip"]) < 0.5)
        size = long_side_size(photo.height, photo.width, draw.long_side)
        whole, plain = draw._replace(col=0, row=0, mirrored=False), draw._replace(mirrored=False)
        flipped = np.array(place(photo, draw, (side, side), SMOOTH, 0))
        x = to_normalized(flipped, IMAGENET_MEAN, IMAGENET_STD)
        out |= {
            f"out_{name}_resized": np.array(place(photo, whole, size, SMOOTH, 0)),
            f"out_{name}_resized_label": np.array(place(label, whole, size, NEAREST, fill)),
            f"out_{name}_cropped": np.array(place(photo, plain, (side, side), SMOOTH, 0)),
            f"out_{name}_cropped_label": np.array(place(label, plain, (side, side), NEAREST, fill)),
            f"out_{name}_flipped": flipped,
            f"out_{name}_normalized": array(x[:, ::2, ::2]),
            f"out_{name}_target": np.array(place(label, draw, (side, side), NEAREST, fill)),
        }
    return out


def colour(case: Any) -> dict[str, Any]:
    out = {}

    def changed(name: str, **how: Any) -> np.ndarray:
        draw = ColorDraw((), False, 0.0)._replace(**how)
        return np.array(strong_view(Image.fromarray(case[f"in_{name}_image"]), draw))

    for i in range(int(case["in_num_jitter"])):
        factors = case[f"in_draw_{i}_factors"].tolist()
        jitter = tuple((k, factors[k]) for k in numbers(case, f"in_{i}_order"))
        out[f"out_{i}_jittered"] = changed(str(i), jitter=jitter)
    for i in range(int(case["in_num_post"])):
        gray = float(case[f"in_draw_post{i}_gray"]) < 0.2
        sigma = float(case[f"in_draw_post{i}_sigma"])
        assert (sigma > 0) == (float(case[f"in_draw_post{i}_blur"]) < 0.5)
        out[f"out_post{i}_gray"] = changed(f"post{i}", gray=gray)
        out[f"out_post{i}_blurred"] = changed(f"post{i}", gray=gray, blur_radius=max(sigma, 0.0))
    for i in range(int(case["in_num_sigma"])):
        out[f"out_sigma{i}_blurred"] = changed(f"sigma{i}", blur_radius=float(case[f"in_draw_sigma{i}"]))
    return out


def dataset_items(case: Any) -> dict[str, Any]:
    out, side = {}, int(case["in_crop"])
    for i in range(int(case["in_num"])):
        rng = Recorded(int(case[f"in_{i}_seed"]), case[f"in_{i}_draw_code"])
        strong = 0 if str(case[f"in_{i}_mode"]) == "train_l" else 2
        views = Views(IMAGENET_MEAN, IMAGENET_STD, (side, side), strong=strong)
        x, y = views(case[f"in_{i}_image"], None if strong else case[f"in_{i}_label"], rng)
        rng.assert_all_drawn()
        if not strong:
            out |= {f"out_{i}_image": array(x), f"out_{i}_label": array(y)}
            continue
        for name, view in zip(("weak", "strong1", "strong2"), x.chunk(3), strict=True):
            out[f"out_{i}_{name}"] = array(view[:, ::2, ::2])
        out |= {
            f"out_{i}_ignore": 255 * array(y[0]),
            f"out_{i}_box1": array(y[1]),
            f"out_{i}_box2": array(y[2]),
        }
    return out


def listed(case: Any, cut: bool) -> dict[str, Any]:
    out = {}
    for i in range(int(case["in_num"])):
        lines, wanted = range(int(case[f"in_{i}_lines"])), int(case[f"in_{i}_nsample"])
        out[f"out_{i}_labeled"] = np.array(repeated(lines, wanted or len(lines), cut))
        out[f"out_{i}_unlabeled"] = np.array(lines)
    return {key: value for key, value in out.items() if key in case}


def epochs(case: Any, cut: bool) -> dict[str, Any]:
    found: dict[str, list[int]] = {}

    def batches(items: int, batch: int, world: int) -> int:
        return EpochSampler(items, batch, 0, world).steps_per_epoch

    names = ("labeled", "unlabeled", "world", "batch", "epochs")
    for i, (few, many, world, batch, rounds) in enumerate(
        zip(*(numbers(case, f"in_{n}") for n in names), strict=True)
    ):
        items = len(repeated(range(few), many, cut))
        alone = few
        if "in_supervised_items" in case:
            alone = len(repeated(range(few), int(case["in_supervised_items"][i]), cut=False))
        row = {
            "labeled_items": items,
            "labeled_batches": batches(items, batch, world),
            "unlabeled_batches": batches(many, batch, world),
            "total_iterations": batches(many, batch, world) * rounds,
            "supervised_length": alone,
            "supervised_batches": batches(alone, 2 * batch, world),
            "supervised_total": batches(alone, 2 * batch, world) * rounds,
        }
        for name, value in row.items():
            found.setdefault(f"out_{name}", []).append(value)
    return {key: np.array(value) for key, value in found.items() if key in case}


def list_reading_v2(case: Any) -> dict[str, Any]:
    return listed(case, cut=False) | epochs(case, cut=False)


def loader_order(case: Any) -> dict[str, Any]:
    out, names = {}, {"labeled": "labeled", "unlabeled": "unlabeled", "partner": "mixing"}
    for i in range(int(case["in_num"])):
        items, batch, rank, world, epoch = (
            int(case[f"in_{i}_{name}"]) for name in ("items", "batch", "rank", "world", "epoch")
        )
        for role, seed in roles(toys.config()).items():
            sampler = EpochSampler(items, batch, rank, world, seed=seed)
            sampler.set_epoch(epoch)
            out[f"out_{i}_{names[role]}"] = np.array([[key.position for key in keys] for keys in sampler])
    return out


def published_lists(case: Any) -> dict[str, Any]:
    default = ROOT.parent / "shared" / "data" / "published_lists"
    folder = Path(os.environ.get("SSS_PUBLISHED_LISTS", default)) / "UniMatch"
    if not folder.is_dir():
        raise Skip(f"published lists are not there: {folder} (set SSS_PUBLISHED_LISTS)")
    texts = [(folder / name).read_text().splitlines() for name in case["in_list"].tolist()]
    return {
        "out_count": np.array([len(lines) for lines in texts]),
        "out_sha256": np.array([hashlib.sha256("\n".join(lines).encode()).hexdigest() for lines in texts]),
        "out_first": np.array([lines[0] for lines in texts]),
        "out_last": np.array([lines[-1] for lines in texts]),
    }


# --- optimization ----------------------------------------------------------------------------------------------


def poly_lr(case: Any) -> dict[str, Any]:
    length, rounds = int(case["in_iters_per_epoch"]), int(case["in_epochs"])
    optim = {"lr": float(case["in_lr"]), "epochs": rounds, "power": float(case["in_power"])}
    cfg = toys.config(optim=optim)
    run = toys.run_of(cfg, toys.networks(cfg, toys.tiny_deeplab(3)))
    factor = float(case["in_lr_multi"])
    run.optimizer = build_optimizer(
        cfg.optim, [Group([nn.Parameter(torch.zeros(1))], f) for f in (1.0, factor)]
    )
    used = []
    for step in range(length * rounds + 1):
        train.set_rates(Progress(step, length, rounds), run)
        used.append([group["lr"] for group in run.optimizer.param_groups])
    return {
        "out_lr_after_step": np.array(used[1:]),
        "out_lr_used_in_step": np.array(used[:-1]),
        "out_iteration": np.arange(length * rounds),
    }


def group_facts(network: Any, optim: OptimConfig, tag: str) -> dict[str, Any]:
    optimizer = build_optimizer(optim, parameter_groups(network, optim))
    named = {id(p): name for name, p in network.named_parameters()}
    out: dict[str, Any] = {f"out_{tag}_num_groups": len(optimizer.param_groups)}
    for i, group in enumerate(optimizer.param_groups):
        names = [named[id(p)] for p in group["params"]]
        facts = {
            "count": len(names),
            "numel": sum(p.numel() for p in group["params"]),
            "first": names[0] if names else "",
            "last": names[-1] if names else "",
            "crc": zlib.crc32("\n".join(names).encode()),
            "lr_f64": group["lr"],
            "decay_f64": group["weight_decay"],
            "momentum_f64": group.get("momentum"),
            "betas_f64": np.array(group["betas"]) if "betas" in group else None,
        }
        out |= {f"out_{tag}_group{i}_{key}": value for key, value in facts.items()}
    return out


def param_groups(case: Any) -> dict[str, Any]:
    out, optim = {}, {"lr": float(case["in_lr"]), "head_lr_factor": float(case["in_lr_multi"])}
    sgd = OptimConfig(**optim, epochs=1, batch_size=1)
    for tag in (key[3:-9] for key in case.arrays if key.endswith("_backbone")):
        backbone: Any = {"xception": "xception65"}.get(
            str(case[f"in_{tag}_backbone"]), str(case[f"in_{tag}_backbone"])
        )
        network = network_of(ModelConfig(backbone=backbone), int(case[f"in_{tag}_num_classes"]))
        out |= group_facts(network, sgd, tag)
    return {key: value for key, value in out.items() if key in case}


def param_groups_v2(case: Any) -> dict[str, Any]:
    out, optim = {}, {"lr": float(case["in_lr"]), "head_lr_factor": float(case["in_lr_multi"])}
    adamw = OptimConfig(**optim, optimizer="adamw", weight_decay=0.01, epochs=1, batch_size=1)
    for tag, frozen in (("train", False), ("locked", True)):
        network = network_of(
            ModelConfig(backbone="dinov2_small", freeze_encoder=frozen), int(case["in_num_classes"])
        )
        out |= group_facts(network, adamw, tag)
    return {key: value for key, value in out.items() if key in case}


def ema(case: Any) -> dict[str, Any]:
    def network(name: str) -> nn.Module:
        state = {
            key.removeprefix(f"in_{name}_").replace("__", "."): tensor(case, key)
            for key in case.arrays if key.startswith(f"in_{name}_")
        }  # fmt: skip
        planes, width = state["0.weight"].shape
        found = nn.Sequential(nn.Linear(width, planes), nn.BatchNorm1d(planes)).to(state["0.weight"].dtype)
        found.load_state_dict(state)
        return found

    out, teacher = {}, network("teacher0")
    for j, iteration in enumerate(numbers(case, "in_iterations")):
        decay = warmup_decay(iteration, 0.996)
        student = network(str(j))
        update_teacher(teacher, student, decay)
        average_buffers(teacher, student, decay)
        out[f"out_ratio_{j}"] = decay
        out |= {f"out_{j}_{underscored(key)}": array(v).copy() for key, v in teacher.state_dict().items()}
    return out


# --- networks --------------------------------------------------------------------------------------------------


def deeplab(case: Any, backbone: Any) -> dict[str, Any]:
    model = ModelConfig(backbone=backbone, dilations=tuple(numbers(case, "in_dilations")), output_stride=16)
    if "in_replace_stride_with_dilation" in case:
        flags = numbers(case, "in_replace_stride_with_dilation")
        model = ModelConfig(backbone=backbone, dilations=model.dilations, output_stride=32 >> sum(flags))
    network = filled(network_of(model, int(case["in_num_classes"])), case).eval()
    x = tensor(case, "in_x")
    with torch.no_grad():
        stages = network.backbone(x)
        aspp, low = network.head(stages[-1]), {}
        network.classifier.register_forward_hook(lambda *call: low.setdefault("logits", call[2]))
        logits = network.predict(x)
    out = {
        "out_c1": stages[0][:, ::16, ::2, ::2],
        "out_c2": stages[1][:, ::16],
        "out_c3": stages[2][:, ::32],
        "out_c4": stages[-1][:, ::32],
        "out_aspp": aspp[:, ::8],
        "out_logits_lowres": low["logits"],
        "out_logits": logits[..., ::3, ::3],
    }
    params = sum(p.numel() for p in network.parameters())
    return {key: array(value) for key, value in out.items() if key in case} | {"out_num_params": params}


def channels_kept(case: Any, *keys: str) -> list[Tensor]:
    dtype = torch.float64 if case.dtype == np.float64 else torch.float32
    return [2.0 * tensor(case, key).to(dtype) for key in keys]


def need_fp(case: Any) -> dict[str, Any]:
    network = filled(network_of(ModelConfig(backbone="resnet50"), int(case["in_num_classes"])), case).eval()
    with torch.no_grad():
        factors = channels_kept(case, "in_drop_c1", "in_drop_c4")
        clean, dropped = Perturbed(network)(tensor(case, "in_x"), factors, beside=True).chunk(2)
    return {"out_logits": array(clean[..., ::2, ::2]), "out_logits_fp": array(dropped[..., ::2, ::2])}


def tiny_train(case: Any) -> dict[str, Any]:
    network = filled(toys.tiny_deeplab(int(case["in_num_classes"])), case).train()
    factors = channels_kept(case, "in_drop_c1", "in_drop_c4")
    clean, dropped = Perturbed(network)(tensor(case, "in_x"), factors, beside=True).chunk(2)
    loss = (clean**2).mean() + 2 * (dropped**2).mean()
    loss.backward()
    out = {"out_logits": array(clean), "out_logits_fp": array(dropped), "out_loss": array(loss)}
    out |= {f"grad_{underscored(name)}": array(p.grad) for name, p in network.named_parameters()}
    return out | {
        f"out_{underscored(name)}": array(value)
        for name, value in network.named_buffers()
        if "num" not in name
    }


def factors_of(mask: Tensor, permutation: Tensor) -> Tensor:
    keys = torch.empty(len(permutation)).scatter_(0, permutation, torch.arange(len(permutation)).float())
    return complementary(mask == 1, keys, 0.5)


def comp_dropout(case: Any) -> dict[str, Any]:
    network, out = filled(toys.tiny_dpt(int(case["in_num_classes"])), case).eval(), {}
    for i in range(int(case["in_num"])):
        factor = factors_of(tensor(case, f"in_{i}_mask"), tensor(case, f"in_{i}_permutation"))
        with torch.no_grad():
            logits = Perturbed(network)(tensor(case, f"in_{i}_x"), [factor] * 4)
        whole = (factor[: len(factor) // 2] == 1).all(dim=1)
        out |= {
            f"out_{i}_factor": array(factor),
            f"out_{i}_logits": array(logits[..., ::2, ::2]),
            f"out_{i}_untouched_pairs": array(whole.nonzero().flatten()),
        }
    return out


def dpt_head(case: Any) -> dict[str, Any]:
    tokens = [leaf(case, f"in_tokens{i}") for i in range(4)]
    planes = tuple(numbers(case, "in_out_channels"))
    head = DptHead(int(case["in_num_classes"]), tokens[0].shape[-1], int(case["in_features"]), planes)
    logits = filled(head, case)(tokens, *numbers(case, "in_patches"))
    loss = (logits**2).mean()
    loss.backward()
    named = dict(head.named_parameters())
    out = {
        "out_logits": array(logits[..., ::2, ::2]), "out_shape": np.array(logits.shape), "out_loss": array(loss),
        "out_unused_parameters": np.array([name for name, p in named.items() if p.grad is None]),
    }  # fmt: skip
    out |= {f"grad_tokens{i}": array(value.grad) for i, value in enumerate(tokens)}
    return out | {
        f"grad_{underscored(name)}": array(p.grad).ravel()[:64]
        for name, p in named.items()
        if p.grad is not None
    }


def pos_embed(case: Any) -> dict[str, Any]:
    table, out = tensor(case, "in_table"), {}
    for i in range(int(case["in_num"])):
        rows, cols = (side // 14 for side in numbers(case, f"in_{i}_size"))
        out[f"out_{i}_positions"] = array(adapted_positions(table, rows, cols))
    return out


def dpt_small(case: Any) -> dict[str, Any]:
    network: Dpt = filled(
        network_of(ModelConfig(backbone="dinov2_small"), int(case["in_num_classes"])), case
    ).eval()
    out: dict[str, Any] = {
        "out_num_params": sum(p.numel() for p in network.parameters()),
        "out_num_params_encoder": sum(p.numel() for p in network.backbone.parameters()),
    }
    for i in range(int(case["in_num"])):
        x = tensor(case, f"in_{i}_x")
        with torch.no_grad():
            out[f"out_{i}_tokens"] = array(network.backbone.tokens(x)[..., ::16])
            levels = network.encode(x)
            out |= {f"out_{i}_level{k}": array(level[..., ::12]) for k, level in enumerate(levels)}
            out[f"out_{i}_logits"] = array(network.predict(x)[..., ::3, ::3])
    return out


# --- evaluation ------------------------------------------------------------------------------------------------


def ends(size: Sequence[int], starts: Sequence[tuple[int, int]], side: Sequence[int]) -> list[list[int]]:
    """Windows as [row0, row1, col0, col1], cut at the border of the image."""
    return [[r, min(r + side[0], size[0]), c, min(c + side[1], size[1])] for r, c in starts]


def evaluations(case: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    v2 = any(key.endswith("_multiplier") for key in case.arrays)
    for m in (key[3:-5] for key in case.arrays if key.endswith("_mode")):
        side, mode = int(case[f"in_{m}_crop"]), str(case[f"in_{m}_mode"])
        net = nn.Conv2d(3, int(case[f"in_{m}_num_classes"]), 3, padding=1).to(
            tensor(case, f"in_{m}_weight").dtype
        )
        net.load_state_dict({"weight": tensor(case, f"in_{m}_weight"), "bias": tensor(case, f"in_{m}_bias")})
        multiple = (
            int(case[f"in_{m}_multiplier"]) if f"in_{m}_multiplier" in case and mode == "original" else 0
        )
        sizes: list[Any] = []

        def inner(x: Tensor, net: nn.Module = net, sizes: list[Any] = sizes) -> Tensor:
            sizes.append(list(x.shape[-2:]))
            return net(x)

        forward = partial(at_multiples, multiple=multiple, forward=inner) if multiple else inner
        how = {
            "original": Protocol(),
            "center_crop": Protocol(kind="center_crop", crop_size=(side, side)),
            "sliding_window": WindowProtocol(
                kind="moved_windows" if v2 else "cut_windows", crop_size=(side, side)
            ),
        }[mode]
        images = [
            (tensor(case, f"in_{m}_{i}_image"), tensor(case, f"in_{m}_{i}_label").long(), str(i))
            for i in range(int(case[f"in_{m}_num"]))
        ]
        found = evaluate(forward, images, net.out_channels, how)
        out[f"out_iou_{m}"], out[f"out_miou_{m}"] = 100 * np.array(found.iou), 100 * found.miou
        out[f"out_{m}_input_sizes"] = np.array(sizes)
        windows: list[list[int]] = []
        for i, (x, y, _) in enumerate(images):
            size, crop, starts = x.shape[-2:], (side, side), [(0, 0)]
            if mode == "center_crop":
                starts = [((size[0] - side) // 2, (size[1] - side) // 2)]
                x = center_crop(x, y, crop, 0)[0]
            elif mode == "sliding_window":
                starts, crop = original_windows(size, crop, cut=not v2)
            windows += ends(size, starts, size if mode == "original" else crop)
            with torch.no_grad():
                scores = how.scores(forward, x)
            out[f"out_{m}_{i}_pred"] = array(scores.argmax(dim=1))
            out[f"out_{m}_{i}_score"] = array(scores[..., ::3, ::3])
        out[f"out_{m}_windows"] = np.array(windows)
    return {key: value for key, value in out.items() if key in case}


def windows(case: Any, cut: bool) -> dict[str, Any]:
    out = {}
    for i in range(int(case["in_num"])):
        size, side = numbers(case, f"in_{i}_size"), int(case[f"in_{i}_crop"])
        starts, inside = original_windows(size, (side, side), cut=cut)
        out[f"out_{i}_windows"] = np.array(ends(size, starts, inside))
    return out


def miou(case: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name in (key[3:-5] for key in case.arrays if key.startswith("in_") and key.endswith("_pred")):
        classes = int(case[f"in_{name}_num_classes"])
        pred, label = tensor(case, f"in_{name}_pred").long(), tensor(case, f"in_{name}_label").long()
        # a label equal to the class count, which we refuse as a mistake, falls into the histograms' last bin there
        pred, label = (part.where(part != classes, classes - 1) for part in (pred, label))
        matrix = ConfusionMatrix(classes)
        for one, truth in zip(pred, label, strict=True):
            matrix.update(one, truth)
        intersection, union = matrix.intersection_union()
        out |= {
            f"out_{name}_intersection": array(intersection),
            f"out_{name}_union": array(union),
            f"out_{name}_target": array(matrix.counts.sum(dim=1)),
            f"out_iou_{name}": 100 * array(class_iou(intersection, union)),
            f"out_miou_{name}": 100 * mean_iou(intersection, union),
        }
    return out


# --- trajectories ----------------------------------------------------------------------------------------------


class RecordedDraws:
    """The channels that the recorded steps kept, in their order."""

    def __init__(self, case: Any, steps: int) -> None:
        self.case, self.step = case, iter(range(steps))

    def dropped(self, images: int, planes: Any, probability: float) -> list[Tensor]:
        t = next(self.step)
        assert probability == 0.5
        return channels_kept(self.case, f"in_{t}_drop_c1", f"in_{t}_drop_c4")

    def complementary(self, pairs: int, planes: Any, untouched: float, one: bool) -> list[Tensor]:
        t = next(self.step)
        assert (untouched, one) == (0.5, True)
        factor = factors_of(
            tensor(self.case, f"in_{t}_drop_mask"), tensor(self.case, f"in_{t}_drop_permutation")
        )
        return [factor] * len(planes)


def steps_of(case: Any, strong: Sequence[int]) -> Iterator[tuple[Any, ...]]:
    """The batches of the recorded steps, as the loaders would give them."""
    t = 0
    while f"in_{t}_x" in case:
        batches = [toys.labeled(tensor(case, f"in_{t}_x"), tensor(case, f"in_{t}_label").long())]
        for kind in ("u", "mix"):
            if f"in_{t}_{kind}_w" not in case:
                continue
            views = [tensor(case, f"in_{t}_{kind}_{part}") for part in ("w", *(f"s{i}" for i in strong))]
            boxes = [tensor(case, f"in_{t}_box{i}") == 1 for i in strong]
            batches.append(toys.unlabeled(views, tensor(case, f"in_{t}_{kind}_ignore") == 255, boxes))
        yield tuple(batches)
        t += 1


def trained(case: Any, network: Any, **method: Any) -> tuple[Any, toys.Loop]:
    """A run over the recorded steps by the real loop, and what it told."""
    two, teacher = "in_0_u_s2" in case, method.get("teacher", False)
    settings = {"threshold": float(case["in_conf_thresh"]), "strong_views": 2 if two else 1} | method
    optim = {
        "lr": float(case["in_lr"]),
        "head_lr_factor": float(case["in_lr_multi"]),
        "epochs": int(case["in_epochs"]),
    }
    optim |= {"optimizer": "adamw", "weight_decay": 0.01} if teacher else {}
    cfg = toys.config(method=settings, optim=optim)
    batches = list(steps_of(case, (1, 2) if two else (1,)))
    student = filled(network(int(case["in_num_classes"])), case, **factor_of(case))
    other = filled(network(int(case["in_num_classes"])), case, **factor_of(case)).eval() if teacher else None
    draws = RecordedDraws(case, len(batches))
    run = toys.run_of(cfg, toys.networks(cfg, student, other), draws, int(case["in_iters_per_epoch"]))
    return run, toys.go(run, batches)


def factor_of(case: Any) -> dict[str, float]:
    if "in_output_factor" in case:
        return {"head__scratch__output_conv__2__weight": float(case["in_output_factor"])}
    return {"classifier__weight": float(case["in_classifier_factor"])}


def told(run: Any, session: toys.Loop) -> dict[str, Any]:
    """Losses of the steps and the rates after them."""
    names = {"x": "loss_sup", "s1": "loss_strong_1", "s2": "loss_strong_2", "fp": "loss_fp"}
    out = {
        f"out_loss_{name}": np.array([float(losses.terms[key]) for losses in session.losses])
        for name, key in names.items()
        if key in session.losses[0].terms
    }
    out["out_loss_all"] = np.array([float(losses.total) for losses in session.losses])
    if "kept" in session.losses[0].terms:
        kept = np.array([float(losses.terms["kept"]) for losses in session.losses])
        out |= {"out_ratio": kept, "out_ratio_mask": kept}
    train.set_rates(Progress(run.step, run.data.steps_per_epoch, run.epochs), run)
    after = [*session.rates[1:], [group["lr"] for group in run.optimizer.param_groups]]
    return out | {"out_lr_after_step": np.array(after)}


def trajectory_v1(case: Any, **method: Any) -> dict[str, Any]:
    run, session = trained(case, toys.tiny_deeplab, **method)
    out, student = told(run, session), run.nets.student
    out |= {f"out_final_{underscored(key)}": array(value) for key, value in student.state_dict().items()}
    for part, counter in (("backbone", "backbone.bn1"), ("fuse", "fuse.1")):
        out[f"out_final_{part}_batches_tracked"] = int(student.get_submodule(counter).num_batches_tracked)
    for name, p in student.named_parameters():
        out[f"out_momentum_{underscored(name)}"] = array(run.optimizer.state[p]["momentum_buffer"])
    return {key: value for key, value in out.items() if key in case}


def trajectory_v2(case: Any) -> dict[str, Any]:
    run, session = trained(case, toys.tiny_dpt, **toys.V2)
    out = told(run, session)
    out["out_ratio_ema"] = np.array(
        [warmup_decay(k, run.cfg.method.ema_decay) for k in range(len(session.losses))]
    )
    for name, network in (("student", run.nets.student), ("teacher", run.nets.teacher)):
        values = [array(v).ravel() for key, v in network.state_dict().items() if not key.endswith("qkv.bias")]
        out[f"out_{name}_counts"] = np.array([len(v[:24]) for v in values])
        out[f"out_{name}_first"] = np.concatenate([v[:24] for v in values])
    return {key: value for key, value in out.items() if key in case}


Adapter = Callable[[Any], Mapping[str, Any]]
ADAPTERS: dict[str, Adapter] = {
    **{
        f"loss_{name}": losses
        for name in (
            "v1", "v1_none_confident", "v1_thresh_zero", "v1_all_ignored", "fixmatch_v1",
            "v2", "v2_none_confident", "v2_all_ignored", "fixmatch_v2",
        )
    },
    "mix_v1": calls_of_a_step,
    "mix_v2": calls_of_a_step,
    "ohem_ce": ohem_ce,
    "cutmix_box": cutmix_box,
    "geometry": geometry,
    "colour": colour,
    "dataset_items_v1": dataset_items,
    "dataset_items_v2": dataset_items,
    "list_reading_v1": partial(listed, cut=True),
    "list_reading_v2": list_reading_v2,
    "published_lists": published_lists,
    "loader_order": loader_order,
    "epoch_arith": partial(epochs, cut=True),
    "poly_lr": poly_lr,
    "param_groups": param_groups,
    "param_groups_v2": param_groups_v2,
    "ema": ema,
    "net_deeplab_r50": partial(deeplab, backbone="resnet50"),
    "net_deeplab_r101": partial(deeplab, backbone="resnet101"),
    "net_xception": partial(deeplab, backbone="xception65"),
    "net_need_fp": need_fp,
    "net_tiny_train": tiny_train,
    "comp_dropout": comp_dropout,
    "dpt_head": dpt_head,
    "pos_embed": pos_embed,
    "net_dpt_small": dpt_small,
    "eval_v1": evaluations,
    "eval_v2": evaluations,
    "windows_v1": partial(windows, cut=True),
    "windows_v2": partial(windows, cut=False),
    "miou": miou,
    "traj_v1": trajectory_v1,
    "traj_fixmatch_v1": partial(trajectory_v1, fp_share=0.0),
    "traj_supervised_v1": partial(trajectory_v1, mode="sup_only"),
    "traj_v2": trajectory_v2,
}  # fmt: skip
