"""The published settings as configurations: splits, arithmetic, mistakes in overrides.

What all projects' configurations share is tested by `tests/test_published_configs.py`. When a change of their resolved
values is meant, record them anew and look at the difference before committing it:

    python -m projects.u2pl.tests.test_configs
"""

from __future__ import annotations

import dataclasses
import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch

from common.config import build, load_config, to_dict
from common.errors import UserError
from projects.u2pl import train
from projects.u2pl.ael.config import AelConfig
from projects.u2pl.config import Config
from projects.u2pl.contrast import rank_window
from projects.u2pl.model import build_student
from tests.configurations import assert_steps, configs, published_counts, record
from tests.each import for_each

PROJECT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).resolve().parent / "golden"
NAMES = [path.stem for path in configs("u2pl")]

VOC_CLASSIC, VOC_BLENDED, CITYSCAPES = (
    (92, 183, 366, 732, 1464),
    (662, 1323, 2646, 5291),
    (186, 372, 744, 1488),
)
# iterations per epoch and in total of the original with its own numbers of GPUs
SCHEDULES = {
    "voc_classic": {92: (655, 52400), 183: (650, 52000), 366: (638, 51040), 732: (615, 49200), 1464: (570, 45600)},
    "voc_classic_sup": {92: (6, 480), 183: (12, 960), 366: (23, 1840), 732: (46, 3680), 1464: (92, 7360)},
    "voc_blended": {662: (620, 49600), 1323: (578, 46240), 2646: (496, 39680), 5291: (330, 26400)},
    "voc_blended_sup": {662: (42, 3360), 1323: (83, 6640), 2646: (166, 13280), 5291: (331, 26480)},
    "cityscapes": {186: (174, 34800), 372: (163, 32600), 744: (139, 27800), 1488: (93, 18600)},
    "cityscapes_sup": {186: (12, 2400), 372: (24, 4800), 744: (47, 9400), 1488: (93, 18600)},
    "cityscapes_ael": {186: (174, 34800), 372: (163, 32600), 744: (139, 27800), 1488: (93, 18600)},
}  # fmt: skip
MIOU = {
    "voc_classic": (67.98, 69.15, 73.66, 76.16, 79.49),
    "voc_classic_sup": (45.77, 54.92, 65.88, 71.69, 72.50),
    "voc_blended": (77.21, 79.01, 79.30, 80.50),
    "voc_blended_sup": (67.87, 71.55, 75.80, 77.13),
    "cityscapes": (70.30, 74.37, 76.47, 79.05),
    "cityscapes_sup": (65.74, 72.53, 74.43, 77.83),
    "cityscapes_ael": (74.90, 76.48, 78.51, 79.12),
}
FAMILIES = {
    "voc_classic": ("voc", "classic"),
    "voc_blended": ("voc", "u2pl"),
    "cityscapes": ("cityscapes", "u2pl"),
}
KIND = re.compile("_(sup|ael)$")
PUBLISHED = {
    f"{KIND.sub('', family)}_{count}_r101{''.join(f'_{kind}' for kind in KIND.findall(family))}": (
        family,
        count,
    )
    for family, rows in SCHEDULES.items()
    for count in rows
}


@cache
def load(name: str, *overrides: str) -> Config:
    return load_config(Config, PROJECT / "configs" / f"{name}.yaml", overrides)


def test_every_published_setting_has_a_config() -> None:
    assert len(PUBLISHED) == 30
    assert not set(PUBLISHED) - set(NAMES)


@for_each("name", NAMES)
def test_every_semi_supervised_config_has_a_supervised_twin_on_the_same_images(name: str) -> None:
    cfg = load(name)
    if cfg.method.mode == "semi":
        twin = load(f"{KIND.sub('', name)}_sup")
        assert twin.method.mode == "sup_only"
        split = twin.data.split if name == "cityscapes_372_r101_ael" else cfg.data.split
        assert twin.data == dataclasses.replace(cfg.data, split=split)
        assert twin.model == cfg.model
        assert (twin.eval.protocol, twin.eval.list) == (cfg.eval.protocol, cfg.eval.list)


@for_each("name", PUBLISHED)
def test_split_is_published_with_this_many_labels(name: str) -> None:
    family, count = PUBLISHED[name]
    dataset, lists = FAMILIES[KIND.sub("", family)]
    cfg = load(name)
    if (family, count) == ("cityscapes_ael", 372):
        lists = "u2pl_ael"  # the branch has a draw of its own
    assert (cfg.data.dataset, cfg.data.split) == (dataset, f"{lists}/{count}")
    counts = published_counts(f"{dataset}/{cfg.data.split}")
    assert counts["labeled"] == count
    assert sum(counts.values()) == {"voc": 10582, "cityscapes": 2975}[dataset]


@for_each("processes", ["paper", "one"])
@for_each("name", PUBLISHED)
def test_steps_are_those_of_the_original(name: str, processes: str) -> None:
    family, count = PUBLISHED[name]
    assert_steps(load(name), processes, *SCHEDULES[family][count])


@for_each("family", MIOU)
def test_published_figures(family: str) -> None:
    found = [load(name).expect.miou for name, (own, _) in PUBLISHED.items() if own == family]
    assert found == list(MIOU[family])


@for_each("name", [name for name in PUBLISHED if name.endswith("_ael")])
def test_ael_settings_of_the_branch(name: str) -> None:
    cfg, plain = load(name), load("cityscapes_744_r101")
    method, optim = cfg.method, cfg.optim
    assert method.ael == AelConfig()
    assert (optim.lr, optim.lr * optim.head_lr_factor, optim.weight_decay) == (0.01, 0.1, 1e-4)
    changed = {"lr": 0.01, "head_lr_factor": 1, "weight_decay": 5e-4}
    assert dataclasses.replace(optim, **changed) == plain.optim
    assert (method.contra_weight, method.sup_only_epochs, cfg.run.seed) == (0.1, 0, 1)
    same = {"ael": None, "contra_weight": 1.0, "average_from_start": False}
    assert dataclasses.replace(method, **same) == plain.method
    assert (cfg.model, cfg.eval) == (plain.model, plain.eval)
    assert cfg.quirks == dataclasses.replace(plain.quirks, shared_first_epoch=False)  # it has no such epoch


def test_small_ael_setting_differs_from_the_plain_one_by_the_method_alone() -> None:
    ours, theirs = to_dict(load("shapes_ael")), to_dict(load("shapes"))
    for key in ("ael", "augment_probability"):  # the latter plays no role
        del ours["method"][key], theirs["method"][key]
    assert ours == theirs


@for_each("name", [name for name in PUBLISHED if not KIND.search(name)])
def test_semi_supervised_settings_of_the_paper(name: str) -> None:
    cfg, city = load(name), name.startswith("cityscapes")
    method, optim = cfg.method, cfg.optim
    assert (optim.lr, optim.lr * optim.head_lr_factor) == ((0.01, 0.01) if city else (0.001, 0.01))
    assert (optim.weight_decay, optim.momentum, optim.power) == (5e-4 if city else 1e-4, 0.9, 0.9)
    assert (optim.batch_size, optim.paper_processes, optim.epochs) == ((16, 8, 200) if city else (16, 4, 80))
    assert cfg.data.crop_size == ((769, 769) if city else (513, 513))
    assert (method.criterion, method.sup_only_epochs) == (("ohem", 0) if city else ("ce", 1))
    assert (method.ema_decay, method.drop_percent, method.strong_augmentation) == (0.99, 80, "cutmix")
    assert (method.num_queries, method.num_negatives, method.temperature) == (256, 50, 0.5)
    assert (method.current_class_threshold, method.current_class_negative_threshold) == (0.3, 1)
    assert rank_window(method, 19 if city else 21) == (3, 20)
    assert (cfg.eval.protocol, cfg.eval.during_training) == (
        "sliding_window" if city else "center_crop",
        "center_crop",
    )
    assert cfg.quirks == build(Config, to_dict(cfg) | {"quirks": {}}).quirks


@for_each(
    ("name", "keys", "classes"),
    [
        ("voc_classic_1464_r101", "net_resnet101", 21),
        ("cityscapes_744_r101", "net_resnet101_aux", 19),
        ("cityscapes_744_r101_ael", "net_resnet101_aux", 19),
    ],
)
def test_network_is_that_of_the_released_checkpoints(name: str, keys: str, classes: int) -> None:
    recorded = json.loads((GOLDEN / f"{keys}.keys.json").read_text())
    with torch.device("meta"):
        network = build_student(load(name), classes)
    ours = {key: list(value.shape) for key, value in network.state_dict().items()}
    assert ours == {key.removeprefix("module."): shape for key, shape, _ in recorded}


# --- overrides -------------------------------------------------------------------------------------------------


@for_each(
    ("override", "message"),
    [
        ("method.criterion=dice", "'method.criterion' is 'dice'; expected one of ce, ohem"),
        ("method.binary=true", "'binary' is true, but the function it names was never published"),
        ("method.sup_only_epochs=2", "'method.sup_only_epochs' is 2; expected less than optim.epochs=2"),
    ],
)
def test_mistakes_in_overrides_are_named(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        train.main(["--config", str(PROJECT / "configs" / "smoke.yaml"), override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


if __name__ == "__main__":
    record("u2pl", Config)
