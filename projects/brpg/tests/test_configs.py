"""The published settings as configurations: splits, arithmetic, mistakes in overrides.

What all projects' configurations share is tested by `tests/test_published_configs.py`. When a change of their resolved
values is meant, record them anew and look at the difference before committing it:

    python -m projects.brpg.tests.test_configs
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from common.config import build, load_config, to_dict
from common.data.dataset_yaml import load_spec
from common.errors import UserError
from projects.brpg import train
from projects.brpg.config import Config
from projects.brpg.model import build_student
from tests.configurations import assert_steps, configs, published_counts, record
from tests.each import for_each

PROJECT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).resolve().parent / "golden"
NAMES = [path.stem for path in configs("brpg")]

# iterations per epoch and in total of the original with its own numbers of GPUs
SCHEDULES = {
    "voc_classic": {
        "92": (655, 52400), "183": (650, 52000), "366": (638, 51040), "732": (615, 49200), "1464": (570, 45600)
    },
    "voc_classic_sup": {"92": (6, 480), "183": (12, 960), "366": (23, 1840), "732": (46, 3680), "1464": (92, 7360)},
    "voc_blended": {"662": (620, 49600), "1323": (578, 46240), "2646": (496, 39680), "5291": (330, 26400)},
    "voc_blended_sup": {"662": (42, 3360), "1323": (83, 6640), "2646": (166, 13280), "5291": (331, 26480)},
    "cityscapes": {"186": (349, 69800), "372": (325, 65000), "744": (279, 55800), "1488": (186, 37200)},
    "cityscapes_sup": {"186": (12, 2400), "372": (24, 4800), "744": (47, 9400), "1488": (93, 18600)},
    "coco": {"1_128": (7335, 220050), "1_64": (7277, 218310), "1_32": (7162, 214860), "1_16": (6931, 207930)},
    "coco_sup": {"1_128": (58, 4640), "1_64": (116, 9280), "1_32": (232, 18560), "1_16": (463, 37040)},
}  # fmt: skip
MIOU = {
    "voc_classic": (73.62, 76.55, 78.00, 79.78, 81.91),
    "voc_classic_sup": (45.77, 54.92, 65.88, 71.69, 72.50),
    "voc_blended": (79.40, 81.61, 81.83, 80.78),
    "voc_blended_sup": (67.87, 71.55, 75.80, 77.13),
    "cityscapes": (76.37, 78.56, 79.46, 80.26),
    "cityscapes_sup": (65.74, 72.53, 74.43, 77.83),
    "coco": (41.73, 45.91, 50.55, 53.73),
    "coco_sup": (33.60, 37.80, 42.24, 45.12),
}
LABELS = {"1_128": 925, "1_64": 1849, "1_32": 3697, "1_16": 7393}
FAMILIES = {
    "voc_classic": ("voc", "classic"),
    "voc_blended": ("voc", "u2pl"),
    "cityscapes": ("cityscapes", "u2pl"),
    "coco": ("coco", "unimatch"),
}
TRAINING_IMAGES = {"voc": 10582, "cityscapes": 2975, "coco": 118287}
# the files that the authors released; two of the supervised ones lie in folders of another split
RELEASED = {
    "voc_classic_366_r101",
    "cityscapes_372_r101",
    "coco_1_32_x65",
    "voc_classic_1464_r101_sup",
    "cityscapes_744_r101_sup",
}


def config_name(family: str, part: str) -> str:
    backbone = "x65" if family.startswith("coco") else "r101"
    return f"{family.removesuffix('_sup')}_{part}_{backbone}{'_sup' if family.endswith('_sup') else ''}"


PUBLISHED = {config_name(family, part): (family, part) for family, rows in SCHEDULES.items() for part in rows}
SEMI = [name for name in PUBLISHED if not name.endswith("_sup")]


@cache
def load(name: str, *overrides: str) -> Config:
    return load_config(Config, PROJECT / "configs" / f"{name}.yaml", overrides)


def test_every_published_setting_has_a_config() -> None:
    assert len(PUBLISHED) == 34
    assert not set(PUBLISHED) - set(NAMES)


@for_each("name", NAMES)
def test_every_semi_supervised_config_has_a_supervised_twin_on_the_same_images(name: str) -> None:
    cfg = load(name)
    if cfg.method.mode == "semi":
        twin = load(f"{name.removesuffix('_no_prototypes')}_sup")
        assert twin.method.mode == "sup_only"
        assert twin.data == cfg.data
        assert replace(twin.model, aux_weight=cfg.model.aux_weight) == cfg.model
        assert (twin.eval.protocol, twin.eval.list) == (cfg.eval.protocol, cfg.eval.list)
        assert twin.eval.crop_size == cfg.eval.crop_size


@for_each("name", PUBLISHED)
def test_settings_without_a_released_file_say_what_they_are_derived_from(name: str) -> None:
    lines = (PROJECT / "configs" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    derived = [line for line in lines if line.startswith("# derived:  no ")]
    assert len(derived) == (0 if name in RELEASED else 1)


@for_each("name", PUBLISHED)
def test_split_is_published_with_this_many_labels(name: str) -> None:
    family, part = PUBLISHED[name]
    dataset, lists = FAMILIES[family.removesuffix("_sup")]
    cfg = load(name)
    assert (cfg.data.dataset, cfg.data.split) == (dataset, f"{lists}/{part}")
    counts = published_counts(f"{dataset}/{cfg.data.split}")
    assert counts["labeled"] == LABELS.get(part) or int(part)
    assert sum(counts.values()) == TRAINING_IMAGES[dataset]


@for_each("processes", ["paper", "one"])
@for_each("name", PUBLISHED)
def test_steps_are_those_of_the_original(name: str, processes: str) -> None:
    family, part = PUBLISHED[name]
    assert_steps(load(name), processes, *SCHEDULES[family][part])


@for_each("family", MIOU)
def test_published_figures(family: str) -> None:
    found = [load(name).expect.miou for name, (own, _) in PUBLISHED.items() if own == family]
    assert found == list(MIOU[family])


@for_each("name", SEMI)
def test_semi_supervised_settings_of_the_authors(name: str) -> None:
    cfg = load(name)
    city, coco = name.startswith("cityscapes"), name.startswith("coco")
    method, optim = cfg.method, cfg.optim
    assert (optim.lr, optim.lr * optim.head_lr_factor) == ((0.005, 0.005) if city else (0.001, 0.01))
    assert (optim.weight_decay, optim.momentum, optim.power) == (5e-4 if city else 1e-4, 0.9, 0.9)
    assert (optim.batch_size, optim.paper_processes) == (8 if city else 16, 4)
    assert optim.epochs == (200 if city else 30 if coco else 80)
    assert cfg.data.crop_size == ((769, 769) if city else (513, 513))
    assert (cfg.model.backbone, cfg.model.aux_weight) == ("xception65" if coco else "resnet101", 0)
    assert (method.ce_weight, method.ohem_weight, method.ohem_thresh) == (0.5, 0.5, 0.7)
    assert (method.ohem_min_kept, method.sup_only_epochs) == (100000, 1)
    assert (method.ema_decay, method.drop_percent, method.strong_augmentation) == (0.99, 80, "cutmix")
    assert (method.collect_start, method.prototype_start) == ((3, 6) if city else (1, 2))
    assert (method.sample_per_image, method.queue_size, method.high_threshold) == (5000, 30000, 0.8)
    assert (method.threshold_type, method.class_balanced, method.low_threshold) == ("fix", False, 0)
    assert (method.high_prototypes, method.low_prototypes, method.add_prototypes) == (2, 2, 1)
    assert (method.add_proportion, method.compactness, method.cluster_seed) == (0.05, "cos_sim", 0)
    assert (method.prototype_kind, method.scarce_queue) == ("cluster", coco)
    assert (method.temperature, method.prototype_decay, method.grid_steps) == (0.1, 0.99, 32)
    assert (method.unsup_points, method.pseudo_threshold, method.pseudo_threshold_end) == (1000, 0.8, 0.95)
    assert (method.unsup_weight, method.proto_weight, method.contra_weight) == (1, 1, 0)
    assert (method.copy_paste, cfg.run.precision, cfg.run.seed) == (False, "fp16", 42 if coco else 2)
    assert (cfg.eval.protocol, cfg.eval.during_training) == (
        "sliding_window" if city else "center_crop",
        "center_crop",
    )
    assert (cfg.eval.crop_size, cfg.eval.every_steps) == ((641, 641) if coco else None, 1500 if coco else 150)
    assert cfg.quirks == build(Config, to_dict(cfg) | {"quirks": {}}).quirks


@for_each("name", [name for name in PUBLISHED if name.endswith("_sup")])
def test_supervised_settings_of_the_authors(name: str) -> None:
    cfg, city = load(name), name.startswith("cityscapes")
    method, optim = cfg.method, cfg.optim
    assert (method.ce_weight, method.ohem_weight) == ((0, 1) if city else (1, 0))
    assert (optim.lr, optim.lr * optim.head_lr_factor) == ((0.01, 0.01) if city else (0.001, 0.01))
    assert (optim.batch_size, optim.paper_processes) == (16, 4 if city else 2)
    assert (optim.epochs, optim.weight_decay) == ((200, 5e-4) if city else (80, 1e-4))
    assert (cfg.model.aux_weight, method.sup_only_order) == ((0.4, "sampled") if city else (0, "file"))


@for_each(("name", "keys"), [("voc_classic_366_r101", "net_resnet101"), ("coco_1_32_x65", "net_xception65")])
def test_network_is_that_of_the_authors(name: str, keys: str) -> None:
    recorded = json.loads((GOLDEN / f"{keys}.keys.json").read_text())
    cfg = load(name)
    with torch.device("meta"):
        network = build_student(cfg, load_spec(cfg.data.dataset).num_classes)
    ours = {key: list(value.shape) for key, value in network.state_dict().items()}
    assert ours == {key.removeprefix("module."): shape for key, shape, _ in recorded}


# --- overrides that the README names -----------------------------------------------------------------------------


def readme_overrides() -> list[str]:
    """The first column of the README's table of ablations."""
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    table = text.split("## Ablations")[1].split("\n## ")[0]
    return [row.split("|")[1].strip(" `") for row in table.splitlines() if row.startswith("| `")]


def test_the_readme_names_ablations() -> None:
    assert len(readme_overrides()) >= 8


@for_each("overrides", readme_overrides())
@for_each("name", ["voc_classic_366_r101", "cityscapes_372_r101"])
def test_ablations_of_the_readme_change_the_method(name: str, overrides: str) -> None:
    plain, changed = load(name), load(name, *overrides.split())
    assert changed.method != plain.method
    assert replace(changed, method=plain.method) == plain


# --- overrides -------------------------------------------------------------------------------------------------


@for_each(
    ("override", "message"),
    [
        ("method.compactness=l3", "'method.compactness' is 'l3'; expected one of cos_sim, l2, l2_norm"),
        ("method.temperature=0", "'temperature' is 0.0; expected a positive number"),
        ("method.grid_steps=0", "'grid_steps' is 0; expected 1 or more"),
        ("method.drop_percent=101", "'drop_percent' is 101.0; expected a percentage from 0 to 100"),
        ("method.sup_only_epochs=80", "'collect_start' is 1; expected sup_only_epochs=80 or more"),
        ("method.collect_epochs=79", "'method.collect_epochs' is 80; expected less than optim.epochs=80"),
        ("eval.every_steps=-1", "'every_steps' is -1; expected 0 or more"),
        ("method.fault_weight=0", "unknown key 'method.fault_weight'"),
    ],
)
def test_mistakes_in_overrides_are_named(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        train.main(["--config", str(PROJECT / "configs" / "voc_classic_366_r101.yaml"), override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


if __name__ == "__main__":
    record("brpg", Config)
