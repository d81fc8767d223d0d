"""The published settings as configurations: splits, arithmetic.

What all projects' configurations share is tested by `tests/test_published_configs.py`. When a change of their resolved
values is meant, record them anew and look at the difference before committing it:

    python -m projects.cps.tests.test_configs
"""

from __future__ import annotations

import dataclasses
import json
import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from common.config import build, load_config, plan_batch, to_dict
from common.data.loaders import EpochSampler
from projects.cps.arithmetic import TRAIN_IMAGES, epoch_arithmetic
from projects.cps.compat.flags import EPOCHS
from projects.cps.config import Config, loss_divisor, loss_groups
from projects.cps.model import build_branch
from tests.configurations import configs, header, published_counts, record
from tests.each import for_each

PROJECT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).resolve().parent / "golden"
NAMES = [path.stem for path in configs("cps")]
BASELINES = ("mean_teacher", "cct", "gct")

# images labeled per ratio; iterations of an epoch and epochs of section 6.3 of the arithmetic
VOC = {662: (16, 1240, 32), 1323: (8, 1157, 34), 2646: (4, 992, 40), 5291: (2, 661, 60)}
CITYSCAPES = {186: (16, 348, 128), 372: (8, 325, 137), 744: (4, 279, 160), 1488: (2, 186, 240)}
RATIOS = {"voc": VOC, "cityscapes": CITYSCAPES}
WEIGHTS = {
    ("voc", "cps"): 1.5,
    ("voc", "cps_cutmix"): 1.0,
    ("cityscapes", "cps"): 6.0,
    ("cityscapes", "cps_cutmix"): 5.0,
}
# after which part of the epochs the first weights are kept; supervised twins follow CPS
SHARES = {
    "voc": {"cps": 2, "cps_cutmix": 6, "sup_only": 2, "mean_teacher": 2, "gct": 2, "cct": 6},
    "cityscapes": {"cps": 3, "cps_cutmix": 6, "sup_only": 3},
}
FEW = (92, 183, 366, 732)
COARSE = (3000, 6000, 9000)
# figures that a written source confirms; every other one of the paper's tables is from memory
VERIFIED = {
    "voc_1323_r50_sup": 69.43, "voc_1323_r101_sup": 72.21, "voc_1323_r50_cps": 73.20,
    "voc_1323_r50_cps_cutmix": 73.67, "cityscapes_372_r50_cps": 74.39, "cityscapes_1488_r50_cps_cutmix": 78.77,
    "cityscapes_186_r101_cps_cutmix": 74.72, "cityscapes_372_r101_cps_cutmix": 77.62,
    "cityscapes_744_r101_cps_cutmix": 79.21, "cityscapes_1488_r101_cps_cutmix": 80.21,
}  # fmt: skip
# rows of those tables in the order of the label counts; what is not listed was not given
TABLES = {
    "voc_{}_r50_mean_teacher": (66.77, 70.78, 73.22, 75.41), "voc_{}_r50_cct": (65.22, 70.87, 73.43, 74.75),
    "voc_{}_r50_gct": (64.05, 70.47, 73.45, 75.20), "voc_{}_r50_cps": (68.21, 73.20, 74.24, 75.91),
    "voc_{}_r50_cps_cutmix": (71.98, 73.67, 74.90, 76.15), "voc_{}_r101_cps": (72.18, 75.83, 77.55, 78.64),
    "voc_{}_r101_cps_cutmix": (74.48, 76.44, 77.68, 78.64),
    "cityscapes_{}_r50_cps": (69.79, 74.39, 76.85, 78.64), "cityscapes_{}_r50_cps_cutmix": (74.47, 76.61, 77.83, 78.77),
    "cityscapes_{}_r101_cps": (70.50, 75.71, 77.41, 80.08),
    "cityscapes_{}_r101_cps_cutmix": (74.72, 77.62, 79.21, 80.21),
    "voc_few_{}_r101_cps_cutmix": (64.07, 67.42, 71.71, 75.88),
}  # fmt: skip


def published_names() -> dict[str, tuple[str, int, str]]:
    """Configuration -> dataset, labeled images, method."""
    found: dict[str, tuple[str, int, str]] = {}
    for dataset, ratios in RATIOS.items():
        for count in ratios:
            for backbone in ("r50", "r101"):
                for method in ("cps", "cps_cutmix", "sup_only"):
                    found[f"{dataset}_{count}_{backbone}_{method.removesuffix('_only')}"] = (
                        dataset,
                        count,
                        method,
                    )
    found |= {f"voc_{count}_r50_{method}": ("voc", count, method) for count in VOC for method in BASELINES}
    return found


PUBLISHED = published_names()


@lru_cache(maxsize=256)
def load(name: str) -> Config:
    return load_config(Config, PROJECT / "configs" / f"{name}.yaml")


def test_every_published_setting_has_a_config() -> None:
    assert len(PUBLISHED) == 2 * 4 * 2 * 3 + 4 * 3
    others = {f"voc_few_{count}_r101_{method}" for count in FEW for method in ("cps_cutmix", "sup")}
    others |= {f"cityscapes_coarse_{count}_r50_cps_cutmix" for count in COARSE}
    assert not (set(PUBLISHED) | others | {"voc_full_r50_sup", "cityscapes_full_r50_sup"}) - set(NAMES)


# --- figures ---------------------------------------------------------------------------------------------------


@for_each("path", configs("cps"))
def test_header_gives_the_figure(path: Path) -> None:
    said, expected = header(path)["miou"], load(path.stem).expect
    if expected.miou is not None:
        assert said == f"{expected.miou:.2f}, {expected.source}"
    else:
        assert said.startswith("none") or said.endswith("not verified; no figure to check against"), path.stem


def test_only_verified_figures_are_expected() -> None:
    assert {name: load(name).expect.miou for name in NAMES if load(name).expect.miou is not None} == VERIFIED


def test_figures_from_memory_are_quoted_as_such() -> None:
    quoted = {}
    for path in configs("cps"):
        found = re.fullmatch(
            r"([\d.]+) by the paper's table as remembered, not verified; .*", header(path)["miou"]
        )
        if found:
            quoted[path.stem] = float(found[1])
    rows = {name: FEW if "few" in name else RATIOS[name.partition("_")[0]] for name in TABLES}
    expected = {
        name.format(count): value
        for name, row in TABLES.items()
        for count, value in zip(rows[name], row, strict=True)
    }
    assert quoted == {name: value for name, value in expected.items() if name not in VERIFIED}


# --- splits and arithmetic -------------------------------------------------------------------------------------


@for_each("name", PUBLISHED)
def test_split_is_published_with_this_many_labels(name: str) -> None:
    dataset, count, method = PUBLISHED[name]
    cfg = load(name)
    assert (cfg.data.dataset, cfg.data.split, cfg.method.name) == (dataset, f"cps/{count}", method)
    counts = published_counts(f"{dataset}/{cfg.data.split}")
    assert counts["labeled"] == count
    assert sum(counts.values()) == TRAIN_IMAGES[dataset]
    assert cfg.model.backbone == f"resnet{name.split('_r')[1].partition('_')[0]}"
    assert cfg.model.weights == f"{cfg.model.backbone}_v1c.pth"


@for_each("processes", ["paper", "one"])
@for_each("name", PUBLISHED)
def test_steps_are_those_of_the_original(name: str, processes: str) -> None:
    """However many processes share the batch."""
    dataset, count, _ = PUBLISHED[name]
    ratio, iterations, epochs = RATIOS[dataset][count]
    cfg = load(name)
    sizes = epoch_arithmetic(TRAIN_IMAGES[dataset], ratio, cfg.optim.batch_size)
    assert (cfg.data.epoch_images, sizes.iterations) == (sizes.max_samples, iterations)
    assert cfg.optim.epochs == epochs == EPOCHS[dataset][ratio]
    assert abs(iterations * epochs - {"voc": 39682.5, "cityscapes": 44625}[dataset]) < 350
    world = cfg.optim.paper_processes if processes == "paper" else 1
    assert world is not None
    plan = plan_batch(cfg.optim, world)
    assert (plan.accumulate, plan.per_forward * world) == (1, 8)
    length = sizes.max_samples // (plan.per_forward * world)
    sampler = EpochSampler(sizes.max_samples, plan.per_forward, 0, world, steps=length)
    assert sampler.steps_per_epoch == iterations
    # the authors' per-process batches, whatever the number of processes
    assert loss_groups(cfg, plan.per_forward) * world == cfg.optim.paper_processes


@for_each("name", PUBLISHED)
def test_settings_of_the_original(name: str) -> None:
    dataset, count, method = PUBLISHED[name]
    cfg, city = load(name), dataset == "cityscapes"
    epochs = RATIOS[dataset][count][2]
    optim = cfg.optim
    assert (optim.lr, optim.batch_size, optim.paper_processes) == ((0.02, 8, 8) if city else (0.01, 8, 4))
    assert optim.lr / loss_divisor(cfg) == 0.0025  # the effective rate of both
    assert (optim.optimizer, optim.momentum, optim.weight_decay, optim.power) == ("sgd", 0.9, 1e-4, 0.9)
    assert (optim.head_lr_factor, optim.warmup_epochs, optim.schedule) == (1.0, 0, "poly")
    assert cfg.data.crop_size == ((800, 800) if city else (512, 512))
    assert cfg.data.scales == (0.5, 0.75, 1.0, 1.5, 1.75, 2.0)
    assert cfg.method.criterion == ("ohem" if city else "ce")
    assert (cfg.method.ohem_thresh, cfg.method.ohem_min_kept) == (0.7, 50000)
    if method in ("cps", "cps_cutmix"):
        assert cfg.method.cps_weight == WEIGHTS[dataset, method]
    assert (cfg.eval.protocol, cfg.eval.network, cfg.eval.every_epochs) == ("original", "branch1", 0)
    assert (cfg.keep.every_epochs, cfg.keep.newest) == (5 if city else 1, None)
    # the original keeps epochs (from 0) beyond a share of all; ours are counted from 1
    assert cfg.keep.after_epoch == epochs // SHARES[dataset][method] + 1
    for section in ("quirks", "model"):
        plain = to_dict(
            build(
                Config,
                {"data": {"dataset": "voc", "split": "x"}, "optim": {"lr": 1, "epochs": 1, "batch_size": 8}},
            )
        )
        changed = {key for key, value in to_dict(cfg)[section].items() if value != plain[section][key]}
        assert changed <= {"backbone", "weights"}
    defaults = dataclasses.asdict(build(type(cfg.method), {}))
    ours = dataclasses.asdict(cfg.method)
    assert all(ours[key] == defaults[key] for key in ("cutmix", *BASELINES))


def test_settings_of_the_baselines() -> None:
    method = load("voc_1323_r50_gct").method
    assert (method.mean_teacher.weight, method.mean_teacher.ema_decay) == (100.0, 0.99)
    assert (method.cct.weight, len(method.cct.decoders), method.cct.consistency) == (30.0, 12, "mse")
    gct = method.gct
    assert (gct.fc_weight, gct.dc_weight, gct.dc_threshold, gct.dc_ramp_epochs) == (1.0, 100.0, 0.6, 3)
    assert gct.detector_lr == pytest.approx(
        4 * 1e-4
    )  # multiplied by the authors' processes, as the other rate is
    assert (gct.detector_weight, gct.mu, gct.nu) == (10.0, 0.5, 1)
    box = method.cutmix
    assert (box.prop_range, box.n_boxes, box.invert, box.within_bounds) == ((0.25, 0.5), 3, True, True)


@for_each("count", FEW)
def test_few_supervision(count: int) -> None:
    """Labels of few images, and all 10582 unlabeled: the labeled ones once more among them."""
    cfg = load(f"voc_few_{count}_r101_cps_cutmix")
    assert (cfg.data.split, cfg.data.epoch_images, cfg.optim.epochs) == (f"cps_few/{count}", 10582, 30)
    assert (cfg.method.name, cfg.method.cps_weight) == ("cps_cutmix", 0.1)
    assert cfg.data.epoch_images // cfg.optim.batch_size * cfg.optim.epochs == 39660
    assert published_counts(f"voc/cps_few/{count}")["labeled"] == count
    assert cfg.keep.after_epoch == 30 // 6 + 1


@for_each("count", COARSE)
def test_coarse(count: int) -> None:
    """All fine labels and unlabeled coarse ones; the budget is that of the other settings."""
    cfg = load(f"cityscapes_coarse_{count}_r50_cps_cutmix")
    assert cfg.data.split == f"cps_coarse/{count}"
    assert cfg.data.epoch_images == max(2975, count)
    steps = cfg.data.epoch_images // cfg.optim.batch_size * cfg.optim.epochs
    assert abs(steps - 44640) <= cfg.data.epoch_images // cfg.optim.batch_size / 2
    assert cfg.method.cps_weight == 5.0


@for_each(("name", "total"), [("voc_full_r50_sup", 39660), ("cityscapes_full_r50_sup", 44640)])
def test_the_full_sets_have_the_budget_that_the_others_copy(name: str, total: int) -> None:
    cfg = load(name)
    assert (cfg.method.name, cfg.data.split, cfg.optim.batch_size) == ("sup_only", "full", 16)
    steps = cfg.data.epoch_images // cfg.optim.batch_size * cfg.optim.epochs
    assert abs(steps - total) <= 240
    assert cfg.optim.lr == 2 * load(name.replace("full", "1323" if "voc" in name else "372")).optim.lr


# --- twins -----------------------------------------------------------------------------------------------------


def family(name: str) -> str:
    """Name without its method."""
    return re.sub(r"_(cps_cutmix|cps|sup|mean_teacher|cct|gct|full)$", "", name)


# the coarse settings have all fine labels; their twin is the full set, which has a batch of its own
PAIRED = [name for name in NAMES if not name.endswith(("_sup", "_full")) and "coarse" not in name]


@for_each("name", PAIRED)
def test_every_setting_has_a_supervised_twin_on_the_same_images(name: str) -> None:
    """The same steps, too: nothing but the method and what it keeps is different."""
    cfg, twin = load(name), load(f"{family(name)}_sup")
    assert twin.method.name == "sup_only"
    assert twin.model == cfg.model
    if name == "smoke_gct":  # images large enough for the detector
        return
    assert twin.data == cfg.data
    assert twin.optim == cfg.optim
    assert twin.eval == cfg.eval
    ours, theirs = to_dict(cfg)["method"], to_dict(twin)["method"]
    assert {key for key in ours if ours[key] != theirs[key]} <= {"name", "cps_weight", *BASELINES}
    ours, theirs = to_dict(cfg)["quirks"], to_dict(twin)["quirks"]
    assert {key for key in ours if ours[key] != theirs[key]} <= {"unlabeled_pairing"}


# --- networks --------------------------------------------------------------------------------------------------


@for_each(
    ("name", "keys"), [("voc_1323_r50_cps", "net_single_r50"), ("cityscapes_372_r101_cps", "net_single_r101")]
)
def test_network_is_that_of_the_released_checkpoints(name: str, keys: str) -> None:
    recorded = json.loads((GOLDEN / f"{keys}.keys.json").read_text())
    classes = next(shape[0] for key, shape, _ in recorded if key == "classifier.bias")
    with torch.device("meta"):
        network = build_branch(load(name), classes)
    ours = {key: list(value.shape) for key, value in network.state_dict().items()}
    assert ours == {key: shape for key, shape, _ in recorded}


def test_parameters_of_both_networks() -> None:
    with torch.device("meta"):
        network = build_branch(load("voc_1323_r50_cps"), 21)
    assert 2 * sum(p.numel() for p in network.parameters()) == 80_951_914  # QUIRK second_network


if __name__ == "__main__":
    record("cps", Config)
