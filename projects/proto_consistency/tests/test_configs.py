"""The published settings as configurations: splits, arithmetic, mistakes in overrides.

What all projects' configurations share is tested by `tests/test_published_configs.py`. When a change of their resolved
values is meant, record them anew and look at the difference before committing it:

    python -m projects.proto_consistency.tests.test_configs
"""

from __future__ import annotations

import dataclasses
import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch

from common.config import build, load_config, plan_batch, to_dict
from common.data.loaders import EpochSampler, match_lengths
from common.errors import UserError
from projects.proto_consistency import train
from projects.proto_consistency.config import Config, ProtoConfig
from projects.proto_consistency.model import build_student
from tests.configurations import configs, published_counts, record
from tests.each import for_each

PROJECT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).resolve().parent / "golden"
NAMES = [path.stem for path in configs("proto_consistency")]

# iterations per epoch and in total with the authors' eight processes; None where they are not counted
SCHEDULES: dict[str, dict[int, tuple[int, int] | None]] = {
    "voc_classic": {92: (656, 52480), 183: (650, 52000), 366: (638, 51040), 732: (616, 49280), 1464: (570, 45600)},
    "voc_blended": dict.fromkeys((662, 1323, 2646, 5291)),
    "voc_cps": dict.fromkeys((662, 1323, 2646, 5291)),
    "cityscapes": {186: (174, 34800), 372: (163, 32600), 744: (139, 27800), 1488: (93, 18600)},
}  # fmt: skip
MIOU = {
    "voc_classic": (70.06, 74.71, 77.16, 78.49, 80.65),
    "voc_classic_sup": (45.77, 54.92, 65.88, 71.69, 72.50),
    "voc_blended": (None,) * 4,
    "voc_blended_sup": (None,) * 4,
    "voc_cps": (None,) * 4,
    "voc_cps_sup": (None,) * 4,
    "cityscapes": (73.41, 76.31, 78.40, 79.11),
    "cityscapes_sup": (65.74, 72.53, 74.43, 77.83),
}
LISTS = {"voc_classic": "classic", "voc_blended": "u2pl", "voc_cps": "cps", "cityscapes": "u2pl"}
PUBLISHED = {f"{family}_{count}_r101": (family, count) for family, own in SCHEDULES.items() for count in own}


@cache
def load(name: str, *overrides: str) -> Config:
    return load_config(Config, PROJECT / "configs" / f"{name}.yaml", overrides)


def test_every_published_setting_has_a_config_and_a_supervised_twin() -> None:
    assert len(PUBLISHED) == 17
    assert not {name + end for name in PUBLISHED for end in ("", "_sup")} - set(NAMES)


@for_each("name", NAMES)
def test_twins_differ_by_the_method_alone(name: str) -> None:
    cfg = load(name)
    plain = name.removesuffix("_mt")
    if cfg.method.mode == "semi":
        twin = load(f"{plain}_sup")
        assert twin.method.mode == "sup_only"
        assert twin.method.proto is None
        assert (twin.data, twin.model, twin.quirks) == (cfg.data, cfg.model, cfg.quirks)
        assert (twin.eval.protocol, twin.eval.list) == (cfg.eval.protocol, cfg.eval.list)
    if plain != name:
        full = load(plain)
        assert dataclasses.replace(full, method=dataclasses.replace(full.method, proto=None)) == cfg


@for_each("name", PUBLISHED)
def test_the_commands_before_fit_the_run(name: str) -> None:
    """The stage before is the twin, and the file that its features give is the one that the run reads."""
    text = (PROJECT / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
    before = re.search(r"# before: +sh train\.sh 8 29500 (\S+)\n# +python cluster\.py --config (\S+) "
                       r"--checkpoint (\S+) \\\n# +--out (\S+)\n", text)  # fmt: skip
    assert before
    proto = load(name).method.proto
    assert proto is not None
    assert before.groups() == (
        f"configs/{name}_sup.yaml", f"configs/{name}.yaml", f"runs/{name}_sup/seed2/best.pt", proto.init_path
    )  # fmt: skip
    assert load(f"{name}_sup").run.seed == 2


@for_each("name", PUBLISHED)
def test_split_is_published_with_this_many_labels(name: str) -> None:
    family, count = PUBLISHED[name]
    cfg = load(name)
    dataset = family.partition("_")[0]
    assert (cfg.data.dataset, cfg.data.split) == (dataset, f"{LISTS[family]}/{count}")
    counts = published_counts(f"{dataset}/{cfg.data.split}")
    assert counts["labeled"] == count
    assert counts["unlabeled"] == {"voc": 10582, "cityscapes": 2975}[dataset] - count


@for_each("name", PUBLISHED)
def test_steps_are_those_of_the_original(name: str) -> None:
    family, count = PUBLISHED[name]
    cfg, expected = load(name), SCHEDULES[family][count]
    counts = published_counts(f"{cfg.data.dataset}/{cfg.data.split}")
    assert cfg.optim.paper_processes == 8
    _, unlabeled = match_lengths(range(count), range(counts["unlabeled"]), cfg.run.seed)
    for world in (8, 1):
        plan = plan_batch(cfg.optim, world)
        assert plan.per_forward * plan.accumulate * world == cfg.optim.batch_size == 16
        assert plan.per_forward == 2
        sampler = EpochSampler(len(unlabeled), 2, 0, world, drop_last=True)
        steps = sampler.steps_per_epoch // plan.accumulate
        if expected is None:
            expected = (-(-len(unlabeled) // 8) // 2, 80 * (-(-len(unlabeled) // 8) // 2))
        if world == 8:
            assert (steps, steps * cfg.optim.epochs) == expected
        else:  # one GPU takes the forwards of all one after the other
            assert 0 <= expected[0] - steps <= 1


@for_each("family", MIOU)
def test_published_figures(family: str) -> None:
    plain, end = family.removesuffix("_sup"), "_sup" if family.endswith("_sup") else ""
    found = tuple(load(name + end).expect.miou for name, (own, _) in PUBLISHED.items() if own == plain)
    assert found == MIOU[family]


@for_each("name", PUBLISHED)
def test_settings_of_the_released_configurations(name: str) -> None:
    """Section 6 of the specification, and the default of every open point."""
    cfg, city = load(name), name.startswith("cityscapes")
    method, optim = cfg.method, cfg.optim
    assert (optim.lr, optim.lr * optim.head_lr_factor) == ((0.01, 0.01) if city else (0.001, 0.01))
    assert (optim.weight_decay, optim.momentum, optim.power) == (5e-4 if city else 1e-4, 0.9, 0.9)
    assert optim.epochs == (200 if city else 80)
    assert cfg.data.crop_size == ((769, 769) if city else (513, 513))
    assert (method.criterion, method.ohem_thresh, method.ohem_min_kept) == ("ohem", 0.7, 100000)
    assert (method.sup_only_epochs, method.ema_decay, method.teacher_copy) == (1, 0.99, "epoch")
    assert (method.select, method.norm, method.confid_thresh) == ("confidence", "all", 0.65 if city else 0.8)
    assert (method.strong_augmentation, method.cutmix_probability, method.unsup_weight) == (
        "cutmix",
        0.5,
        1.0,
    )
    assert cfg.model.aux_weight == (0.4 if city else 0.0)
    assert method.proto == ProtoConfig(
        per_class=3 if city else 4, init_path=f"runs/{name}_sup/prototypes.npz", source="file"
    )
    assert dataclasses.replace(method.proto, init_path=None, per_class=4) == ProtoConfig()
    assert (cfg.eval.protocol, cfg.eval.head, cfg.eval.during_training) == (
        ("sliding_window", "linear", "center_crop") if city else ("whole_image", "both", "center_crop")
    )
    assert cfg.quirks == build(Config, to_dict(cfg) | {"quirks": {}}).quirks


def test_defaults_of_the_open_points() -> None:
    """What a run does without a word about them."""
    proto = ProtoConfig()
    assert (proto.weight, proto.momentum, proto.granularity, proto.temperature) == (1.0, 0.99, 32, 0.1)
    assert (proto.select, proto.source, proto.normalize, proto.start_epoch) == ("same", "file", False, None)
    assert (proto.pixels_per_image, proto.pixels_per_class, proto.seed) == (1024, 200_000, 0)
    assert (proto.sync, proto.update_source, proto.update_unlabeled) == ("local", "student", True)
    assert (proto.teacher_proto, proto.update) == ("ema", True)


@for_each(
    ("name", "keys", "classes"),
    [("voc_classic_366_r101", "net_voc", 21), ("cityscapes_744_r101", "net_city", 19)],
)
def test_network_is_that_of_the_released_checkpoints(name: str, keys: str, classes: int) -> None:
    recorded = json.loads((GOLDEN / f"{keys}.keys.json").read_text())
    with torch.device("meta"):
        network = build_student(load(name), classes)
    ours = {key: list(value.shape) for key, value in network.state_dict().items() if "num_batches" not in key}
    theirs = {key: list(shape) for key, shape, *_ in recorded}
    if "auxor.aux.0.bias" in ours:  # the evaluation code forgets it
        theirs.setdefault("auxor.aux.0.bias", [256])
    assert ours == theirs


# --- overrides -------------------------------------------------------------------------------------------------


@for_each(
    ("overrides", "message"),
    [
        (["method.proto.momentun=0.9"], "unknown key 'method.proto.momentun'; did you mean 'method.proto.momentum'?"),
        (["method.confid_thresh=2"], "'confid_thresh' is 2.0; expected a number from 0 to 1"),
        (["method.drop_percent=101"], "'drop_percent' is 101.0; expected a percentage"),
        (["method.select=some"], "'method.select' is 'some'; expected one of confidence, entropy, none"),
        (["method.unsup_weight=-1"], "'unsup_weight' is -1.0"),
        (["method.sup_only_epochs=2"], "'method.sup_only_epochs' is 2; expected less than optim.epochs=2"),
        (["method.average_from_start=true"], "needs method.teacher_copy=once"),
        (["method.proto=null"], "'eval.head' is 'both', but only method.mode=semi with method.proto"),
        (["method.mode=sup_only"], "'eval.head' is 'both', but only"),
        (["method.proto.granularity=33"], "'method.proto.granularity' is 33; expected at most the crop's"),
        (["method.proto.start_epoch=0"], "makes prototypes before epoch 1; use null or 1 or more"),
        (["model.maxpool=same"], "model.maxpool=same: only evaluation may pool so"),
    ],
)  # fmt: skip
def test_mistakes_in_overrides_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        train.main(["--config", str(PROJECT / "configs" / "smoke.yaml"), *overrides])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


if __name__ == "__main__":
    record("proto_consistency", Config)
