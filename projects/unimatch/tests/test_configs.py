"""The published settings as configurations: splits, arithmetic, figures, networks.

What all projects' configurations share is tested by `tests/test_published_configs.py`. When a change of their resolved
values is meant, record them anew and look at the difference before committing it:

    python -m projects.unimatch.tests.test_configs
"""

from __future__ import annotations

import json
import math
import re
from functools import cache
from pathlib import Path

import pytest
import torch

from common.config import build, load_config, plan_batch, to_dict
from common.data.dataset_yaml import load_spec
from common.data.loaders import EpochSampler
from common.errors import UserError
from projects.unimatch import train
from projects.unimatch.config import Config, QuirkConfig, method_name
from projects.unimatch.data import repeated
from projects.unimatch.model import build_student
from tests.configurations import configs, published_counts, record
from tests.each import for_each

PROJECT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).resolve().parent / "golden"
NAMES = [path.stem for path in configs("unimatch")]
DATASETS = ("voc", "cityscapes", "coco", "ade20k")
PUBLISHED = [name for name in NAMES if name.split("_")[0] in DATASETS]
ON_LISTS = [name for name in PUBLISHED if "_full_" not in name]
V2 = [name for name in PUBLISHED if "dinov2" in name]
# items of a supervised-only epoch of V2
ITEMS = {"voc": 3000, "cityscapes": 3000, "ade20k": 6000, "coco": 30000}


@cache
def load(name: str, *overrides: str) -> Config:
    return load_config(Config, PROJECT / "configs" / f"{name}.yaml", overrides)


def test_every_published_setting_has_a_config() -> None:
    assert len(PUBLISHED) == 135
    assert len(V2) == 85


@for_each("name", PUBLISHED)
def test_every_setting_has_its_figure_and_the_original_switches(name: str) -> None:
    cfg = load(name)
    assert cfg.expect.miou is not None
    assert cfg.quirks == QuirkConfig()
    kind = "sup_only" if name.endswith("_sup") else "fixmatch" if name.endswith("fixmatch") else "unimatch"
    assert method_name(cfg) == kind + ("_v2" if name in V2 and kind != "sup_only" else "")
    assert cfg.method == build(Config, to_dict(cfg) | {"method": changed_by(name)}).method


def changed_by(name: str) -> dict[str, object]:
    """What the method's section of a setting says."""
    found: dict[str, object] = {}
    if name in V2:
        found |= {"teacher": True, "fp_share": 0, "complementary_dropout": True}
    if name.endswith("fixmatch"):
        found |= {"strong_views": 1, "complementary_dropout": False}
    if name.startswith("cityscapes"):
        found |= {"criterion": "ohem"} | ({} if name in V2 else {"threshold": 0})
    return found | ({"mode": "sup_only"} if name.endswith("_sup") else {})


@for_each("name", PUBLISHED)
def test_optimizer_batch_and_evaluation_are_those_of_the_authors(name: str) -> None:
    cfg, second = load(name), name in V2
    dataset, optim = cfg.data.dataset, cfg.optim
    epochs = {"voc": (80, 60), "cityscapes": (240, 180), "coco": (30, 20), "ade20k": (0, 60)}[dataset][second]
    rate, factor = {"voc": (0.001, 10), "cityscapes": (0.005, 1), "coco": (0.004, 10)}.get(dataset, (0, 0))
    assert (optim.lr, optim.head_lr_factor) == ((5e-6, 40) if second else (rate, factor))
    assert (optim.optimizer, optim.weight_decay) == (("adamw", 0.01) if second else ("sgd", 1e-4))
    assert (optim.epochs, optim.power, optim.schedule) == (epochs, 0.9, "poly")
    images = 16 if second and dataset in ("voc", "coco") else 8
    assert optim.batch_size == images * (2 if name.endswith("_sup") else 1)
    assert optim.paper_processes == (2 if name.startswith("voc_u2pl") else 4)
    assert plan_batch(optim, optim.paper_processes).accumulate == 1
    crops = {"voc": (321, 518), "cityscapes": (801, 798), "coco": (513, 518), "ade20k": (0, 518)}
    side = 513 if name.startswith("voc_u2pl") else crops[dataset][second]
    assert cfg.data.crop_size == (side, side)
    kind = "whole_image" if dataset != "cityscapes" else "moved_windows" if second else "cut_windows"
    assert cfg.eval.protocol == cfg.eval.during_training == kind
    assert cfg.model.freeze_encoder == name.endswith("frozen")


@for_each("name", ON_LISTS)
def test_steps_are_those_of_the_original(name: str) -> None:
    """By its arithmetic, which recorded cases confirm; a set with a list that is not at hand counts what is left."""
    cfg = load(name)
    world, counts = cfg.optim.paper_processes, published_counts(f"{cfg.data.dataset}/{cfg.data.split}")
    assert world is not None
    plan = plan_batch(cfg.optim, world)
    length = counts["unlabeled"]
    if cfg.method.mode == "sup_only":
        assert cfg.data.epoch_images == (ITEMS[cfg.data.dataset] if name in V2 else None)
        length = len(repeated(range(counts["labeled"]), cfg.data.epoch_images or 0, cut=False))
    own = EpochSampler(length, plan.per_forward, 0, world).steps_per_epoch
    assert own == math.ceil(length / world) // plan.per_forward > 0
    alone = plan_batch(cfg.optim, 1)
    assert alone.per_forward * alone.accumulate == cfg.optim.batch_size


@for_each(
    ("name", "steps", "total"),
    [
        ("voc_classic_92_r101", 1311, 104880), ("cityscapes_186_r50", 349, 83760), ("coco_1_512_x65", 14757, 442710),
        ("voc_classic_92_dinov2_small", 655, 39300), ("cityscapes_186_dinov2_base", 349, 62820),
        ("ade20k_1_16_dinov2_base", 2368, 142080),
    ],
)  # fmt: skip
def test_steps_of_the_logs(name: str, steps: int, total: int) -> None:
    cfg = load(name)
    length = published_counts(f"{cfg.data.dataset}/{cfg.data.split}")["unlabeled"]
    plan = plan_batch(cfg.optim, cfg.optim.paper_processes or 1)
    found = EpochSampler(length, plan.per_forward, 0, cfg.optim.paper_processes or 1).steps_per_epoch
    assert (found, found * cfg.optim.epochs) == (steps, total)


@for_each("name", [name for name in NAMES if not name.startswith("smoke")])
def test_every_semi_supervised_config_has_a_supervised_twin_on_the_same_images(name: str) -> None:
    cfg, twin = load(name), re.sub("_(v2|fixmatch|frozen)$", "", name) + "_sup"
    if cfg.method.mode == "sup_only" or twin not in NAMES:
        return  # not published for this network
    other = load(twin)
    assert other.method.mode == "sup_only"
    assert (other.data.split, other.data.crop_size) == (cfg.data.split, cfg.data.crop_size)
    assert (other.model.backbone, other.eval.protocol) == (cfg.model.backbone, cfg.eval.protocol)


@for_each(
    ("name", "keys"),
    [
        ("voc_classic_92_r101", "net_deeplab_r101"),
        ("voc_classic_92_r50", "net_deeplab_r50"),
        ("coco_1_512_x65", "net_xception"),
        ("voc_classic_92_dinov2_small", "net_dpt_small"),
    ],
)
def test_network_is_that_of_the_authors(name: str, keys: str) -> None:
    recorded = json.loads((GOLDEN / f"{keys}.keys.json").read_text())
    cfg = load(name)
    outputs = ("classifier.bias", "head.scratch.output_conv.2.bias")
    classes = next(shape[0] for key, shape, _ in recorded if key in outputs)
    with torch.device("meta"):
        network = build_student(cfg, classes)
    ours = {key: list(value.shape) for key, value in network.state_dict().items()}
    assert ours == {key: shape for key, shape, _ in recorded}
    assert load_spec(cfg.data.dataset).num_classes in (21, 81)


@for_each(("size", "params"), [("small", 24.8), ("base", 97.5), ("large", 335.6)])
def test_encoders_have_their_size(size: str, params: float) -> None:
    with torch.device("meta"):
        network = build_student(load(f"voc_classic_92_dinov2_{size}"), 21)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(params, abs=0.05)


@for_each(
    ("override", "message"),
    [
        ("method.teacher=true", "'fp_share' is a stream of V1; with teacher=true set fp_share=0"),
        ("method.strong_views=3", "'method.strong_views' is 3; expected one of 1, 2"),
        ("model.backbone=dinov2_small", "'data.crop_size' is [321, 321]; expected multiples of 14"),
        ("method.cutmix.ratio=[2,3]", "method.cutmix: 'ratio' is (2.0, 3.0); expected low <= 1 <= high"),
    ],
)
def test_mistakes_in_overrides_are_named(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        train.main(["--config", str(PROJECT / "configs" / "voc_classic_92_r101.yaml"), override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


if __name__ == "__main__":
    record("unimatch", Config)
