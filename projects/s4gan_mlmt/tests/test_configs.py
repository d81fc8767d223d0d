"""The published settings as configurations: splits, twins, networks.

What all projects' configurations share is tested by `tests/test_published_configs.py`. When a change of their resolved
values is meant, record them anew and look at the difference before committing it:

    python -m projects.s4gan_mlmt.tests.test_configs
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path

import torch

from common.config import build, load_config, plan_batch, to_dict
from projects.s4gan_mlmt.config import Config
from projects.s4gan_mlmt.discriminator import Discriminator
from projects.s4gan_mlmt.model import IMAGE_CHANNELS, build_discriminator, build_segmentation
from tests.configurations import configs, header, published_lists, record
from tests.each import for_each

PROJECT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).resolve().parent / "golden"
NAMES = [path.stem for path in configs("s4gan_mlmt")]
UNVERIFIED = "by the paper's table as remembered, not verified; no figure to check against"

CLASSES = {"voc": 21, "pascal_context": 60, "cityscapes": 19}
TRAIN_IMAGES = {"voc": 10582, "pascal_context": 4996, "cityscapes": 2975}
RATIOS = {  # images labeled -> share; None for all of them
    "voc": {"211": 0.02, "529": 0.05, "1322": 0.125, "full": None},
    "pascal_context": {"624": 0.125, "1249": 0.25, "full": None},
    "cityscapes": {"371": 0.125, "743": 0.25, "full": None},
}
METHODS = {"": "s4gan", "_mlmt": "s4gan_mlmt", "_sup": "sup_only"}
# figures that a source besides the paper's table as remembered confirms
VERIFIED = {
    "voc_1322_r101": 65.4, "voc_full_r101_sup": 70.7, "voc_1322_r101_coco": 69.8,
    "voc_211_r101_coco_mlmt": 63.3, "voc_529_r101_coco_mlmt": 67.2, "voc_1322_r101_coco_mlmt": 71.4,
    "voc_full_r101_coco_mlmt": 75.6, "pascal_context_624_r101_mlmt": 35.3, "pascal_context_1249_r101_mlmt": 37.8,
    "cityscapes_371_r101": 59.3, "cityscapes_743_r101": 61.9, "cityscapes_full_r101": 65.8,
}  # fmt: skip
# rows of the tables in the order of the label counts
TABLES = {
    "voc_{}_r101_sup": (48.3, 56.8, 62.0, 70.7), "voc_{}_r101_mlmt": (60.4, 62.9, 67.3, 73.2),
    "voc_{}_r101_coco_sup": (53.2, 58.7, 65.2, 73.6), "voc_{}_r101_coco_mlmt": (63.3, 67.2, 71.4, 75.6),
    "pascal_context_{}_r101_sup": (32.1, 35.4, 41.0), "pascal_context_{}_r101_mlmt": (35.3, 37.8, 41.1),
    "cityscapes_{}_r101_sup": (56.2, 60.2, 66.0), "cityscapes_{}_r101": (59.3, 61.9, 65.8),
}  # fmt: skip


def published_names() -> dict[str, tuple[str, str, str]]:
    """Configuration -> dataset, images labeled, ending."""
    found = {}
    for dataset, ratios in RATIOS.items():
        endings = [e for e in METHODS if not (dataset == "cityscapes" and e == "_mlmt")]
        for count in ratios:
            for start in ("", "_coco") if dataset == "voc" else ("",):
                for ending in endings:
                    found[f"{dataset}_{count}_r101{start}{ending}"] = (dataset, count, ending)
    return found


PUBLISHED = published_names()


@lru_cache(maxsize=128)
def load(name: str) -> Config:
    return load_config(Config, PROJECT / "configs" / f"{name}.yaml")


@lru_cache(maxsize=1)
def permutation_sizes() -> dict[str, int]:
    return {entry["name"]: entry["count"] for entry in published_lists() if entry["role"] == "permutation"}


def test_every_published_setting_has_a_config() -> None:
    assert len(PUBLISHED) == 4 * 2 * 3 + 3 * 3 + 3 * 2
    assert not (set(PUBLISHED) | {"cityscapes_297_wrn38", "cityscapes_297_wrn38_sup"}) - set(NAMES)
    own = {f"{place}{ending}" for place in ("camvid_46_r50", "shapes") for ending in METHODS}
    assert not (own | {"smoke", "smoke_sup"}) - set(NAMES)


# --- figures ---------------------------------------------------------------------------------------------------


@for_each("path", configs("s4gan_mlmt"))
def test_header_gives_the_figure(path: Path) -> None:
    said, cfg = header(path)["miou"], load(path.stem)
    assert cfg.optim.paper_processes == 1
    if cfg.expect.miou is not None:
        assert said == f"{cfg.expect.miou:.2f}, {cfg.expect.source}"
    elif cfg.expect.source == "none published":
        assert said.startswith("none")
    else:
        assert said == cfg.expect.source
        assert said.endswith(UNVERIFIED)


def test_only_verified_figures_are_expected() -> None:
    """`eval.py --check` and the study pages compare with nothing else."""
    assert {name: load(name).expect.miou for name in NAMES if load(name).expect.miou is not None} == VERIFIED
    assert all("independent" in load(name).expect.source for name in VERIFIED)


def test_unverified_figures_are_quoted_as_such() -> None:
    quoted = {}
    for name in NAMES:
        found = re.fullmatch(rf"([\d.]+) {re.escape(UNVERIFIED)}", load(name).expect.source)
        if found:
            quoted[name] = float(found[1])
    expected = {
        stem.format(count): value
        for stem, row in TABLES.items()
        for count, value in zip(RATIOS[stem.partition("_{}")[0]], row, strict=True)
    }
    assert quoted == {name: value for name, value in expected.items() if name not in VERIFIED}


# --- splits and schedules --------------------------------------------------------------------------------------


@for_each("name", PUBLISHED)
def test_split(name: str) -> None:
    """Truncated, not rounded; of the published permutation."""
    dataset, count, ending = PUBLISHED[name]
    cfg = load(name)
    ratio = RATIOS[dataset][count]
    assert (cfg.data.dataset, cfg.data.split, cfg.data.labeled_ratio) == (dataset, "full", ratio)
    assert cfg.data.split_file == (None if ratio is None else "s4gan/split_0.pkl")
    assert cfg.method.name == METHODS[ending]
    assert ratio is None or int(ratio * TRAIN_IMAGES[dataset]) == int(count)
    assert permutation_sizes()[f"{dataset}/s4gan"] == TRAIN_IMAGES[dataset]


@for_each("name", PUBLISHED)
def test_settings_of_the_original(name: str) -> None:
    dataset, _, ending = PUBLISHED[name]
    cfg, city = load(name), dataset == "cityscapes"
    optim = cfg.optim
    assert (optim.lr, optim.head_lr_factor, optim.momentum, optim.weight_decay) == (2.5e-4, 10, 0.9, 5e-4)
    assert (optim.schedule, optim.power, optim.steps, optim.epochs) == ("poly", 0.9, 40000, 8)
    assert optim.batch_size == (10 if ending == "_sup" else 8)
    assert optim.unlabeled == optim.batch_size
    assert plan_batch(optim, 1).accumulate == 1
    assert cfg.data.pipeline == dataset
    assert cfg.data.crop_size == ((256, 512) if city else (321, 321))
    assert (cfg.data.random_scale, cfg.data.random_mirror, cfg.data.drop_last) == (False, False, False)
    coco = "_coco" in name
    assert cfg.model.network == "deeplabv2"
    assert cfg.model.weights == ("resnet101COCO-41f33a49.pth" if coco else "resnet101-5d3b4d8f.pth")
    assert (cfg.eval.protocol, cfg.eval.every_epochs) == ("original", 0)
    if ending != "_sup":
        assert (optim.lr_d, optim.betas_d) == (1e-5 if city else 1e-4, (0.9, 0.99))
        method = cfg.method
        assert (method.fm_weight, method.st_weight) == (0.1, 1.0)
        assert method.st_threshold == (0.7 if city else 0.6)
        assert (method.st_start, method.dropout) == (1, 0.5)
        # file 30000 on Pascal VOC and Cityscapes, the last one on PASCAL-Context
        assert cfg.eval.after_steps == (None if dataset == "pascal_context" else 30001)
    plain = to_dict(build(Config, {"data": {"dataset": "voc", "split": "x"}}))
    assert to_dict(cfg)["quirks"] == plain["quirks"]
    ours = to_dict(cfg)["mlmt"]
    assert {key for key in ours if ours[key] != plain["mlmt"][key]} <= {"weights"}
    if ending == "_mlmt":
        assert cfg.mlmt.weights == "resnet101-5d3b4d8f.pth"


def test_settings_of_wide_resnet38() -> None:
    cfg = load("cityscapes_297_wrn38")
    optim = cfg.optim
    assert (cfg.model.network, cfg.model.weights) == ("deeplabv3p_wrn38", "wider_resnet38.pth.tar")
    assert (optim.lr, optim.lr_d, optim.batch_size, optim.unlabeled, optim.steps) == (1e-3, 1e-5, 8, 8, 40000)
    assert (cfg.method.st_threshold, cfg.data.drop_last, cfg.data.crop_size) == (0.55, True, (256, 512))
    assert int(cfg.data.labeled_ratio * TRAIN_IMAGES["cityscapes"]) == 297
    assert cfg.optim.steps_per_round == 1000


# --- twins -----------------------------------------------------------------------------------------------------


@for_each("name", [n for n in NAMES if not n.endswith("_sup")])
def test_every_setting_has_a_supervised_twin_on_the_same_images(name: str) -> None:
    """The same steps, too; the published baseline has a batch of its own and its last weights are measured."""
    cfg, twin = load(name), load(f"{name.removesuffix('_mlmt')}_sup")
    assert twin.method.name == "sup_only"
    assert twin.data == cfg.data
    assert twin.model == cfg.model
    assert twin.quirks == cfg.quirks
    ours, theirs = to_dict(cfg)["optim"], to_dict(twin)["optim"]
    different = {key for key in ours if ours[key] != theirs[key]}
    assert different <= ({"batch_size", "lr_d"} if name in PUBLISHED else set())
    ours, theirs = to_dict(cfg)["eval"], to_dict(twin)["eval"]
    assert {key for key in ours if ours[key] != theirs[key]} <= {"after_steps"}


@for_each("name", [n for n in NAMES if n.endswith("_mlmt")])
def test_the_second_branch_is_all_that_is_added(name: str) -> None:
    both, one = to_dict(load(name)), to_dict(load(name.removesuffix("_mlmt")))
    assert both["method"] == one["method"] | {"name": "s4gan_mlmt"}
    for section in ("data", "optim", "model", "eval", "quirks"):
        assert both[section] == one[section], section


# --- networks --------------------------------------------------------------------------------------------------


@for_each(
    ("name", "keys"),
    [("voc_1322_r101", "deeplabv2_forward"), ("cityscapes_297_wrn38", "deeplabv3p_wrn38_forward")],
)
def test_network_is_the_authors(name: str, keys: str) -> None:
    recorded = json.loads((GOLDEN / f"{keys}.keys.json").read_text())
    with torch.device("meta"):
        network = build_segmentation(load(name), 21 if "voc" in name else 19)
    ours = {key: list(value.shape) for key, value in network.state_dict().items()}
    assert ours == {key: shape for key, shape, *_ in recorded}


@for_each("name", [n for n in PUBLISHED if not n.endswith("_sup")])
def test_the_pool_is_the_whole_map_of_the_crop(name: str) -> None:
    """20x20 and 16x32, which the authors write down, are what four halvings leave of their crops."""
    cfg, dataset = load(name), PUBLISHED[name][0]
    pool = (16, 32) if dataset == "cityscapes" else (20, 20)
    with torch.device("meta"):
        Discriminator(CLASSES[dataset] + IMAGE_CHANNELS, pool=pool).require_crop(cfg.data.crop_size)
        network = build_discriminator(cfg, CLASSES[dataset], cfg.data.crop_size)
    height, width = cfg.data.crop_size
    assert (network.pool, height // 16, width // 16) == (None, *pool)


if __name__ == "__main__":
    record("s4gan_mlmt", Config)
