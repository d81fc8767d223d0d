"""Configurations of the original become ours: every key has a meaning, and the released ones are our settings."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.config import build, load_config
from common.errors import UserError
from projects.proto_consistency import eval as script
from projects.proto_consistency.compat import original
from projects.proto_consistency.config import Config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def theirs(family: str, count: str) -> dict[str, Any]:
    """The keys and values of a released configuration."""
    city = family == "cityscapes"
    size = [769, 769] if city else [513, 513]
    tree: dict[str, Any] = {
        "dataset": {
            "type": f"{family}_semi",
            "train": {"data_root": "x", "data_list": f"../../../../data/splits/{family}/{count}/labeled.txt",
                      "flip": True, "GaussianBlur": False, "rand_resize": [0.5, 2.0],
                      "crop": {"type": "rand", "size": size}},
            "val": {"data_root": "x", "data_list": "y", "crop": {"type": "center", "size": size}},
            "batch_size": 2, "n_sup": 1, "noise_std": 0.1, "workers": 2,
            "mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "ignore_label": 255,
        },
        "trainer": {
            "epochs": 200 if city else 80, "sup_only_epoch": 1, "eval_on": True,
            "optimizer": {"type": "SGD", "kwargs": {"lr": 0.01 if city else 0.001, "momentum": 0.9,
                                                    "weight_decay": 5e-4 if city else 1e-4}},
            "lr_scheduler": {"mode": "poly", "kwargs": {"power": 0.9}},
            "unsupervised": {"TTA": False, "drop_percent": 80, "confid_thresh": 0.65 if city else 0.8,
                             "apply_aug": "cutmix"},
        },
        "saver": {"main_dir": "x", "snapshot_dir": "checkpoints", "pretrain": "", "ignore_keys": [],
                  "auto_resume": False},
        "criterion": {"threshold": 0.7, "type": "ohem", "kwargs": {"thresh": 0.7, "min_kept": 100000}},
        "net": {
            "num_classes": 19 if city else 21, "sync_bn": True, "ema_decay": 0.99,
            "encoder": {"type": "core.models.resnet.resnet101",
                        "kwargs": {"multi_grid": True, "zero_init_residual": True, "fpn": True,
                                   "replace_stride_with_dilation": [False, True, True]}},
            "decoder": {"type": "core.models.decoder.dec_deeplabv3_plus",
                        "kwargs": {"inner_planes": 256, "dilations": [12, 24, 36], "rep_head": False,
                                   "rep_clf": True}},
            "proto_head": {"in_planes": 512, "loss_weight": 1.0, "num_micro_proto": 3 if city else 4,
                           "dynamic_update_proto": True, "proto_unpdate_momentum": 0.99,
                           "init_proto_path": "p.pickle", "patch_select": True, "select_granularity": 32},
        },
    }  # fmt: skip
    if city:
        tree["net"]["aux_loss"] = {"aux_plane": 1024, "loss_weight": 0.4}
    return tree


@pytest.mark.parametrize(
    ("family", "count", "ours"),
    [("pascal", "366", "voc_classic_366"), ("pascal", "1323", "voc_blended_1323"), ("pascal", "662_cps", "voc_cps_662"),
     ("cityscapes", "744", "cityscapes_744")],
)  # fmt: skip
def test_released_configurations_are_our_settings(family: str, count: str, ours: str) -> None:
    found = build(Config, original.translate(theirs(family, count), "config.yaml"))
    expected = load_config(Config, CONFIGS / f"{ours}_r101.yaml", ["method.proto.init_path=p.pickle"])
    # a supervised run alone looks at the order
    method = dataclasses.replace(found.method, sup_only_order=expected.method.sup_only_order)
    assert dataclasses.replace(found, method=method, expect=expected.expect) == expected


@pytest.mark.parametrize("spelling", ["proto_unpdate_momentum", "proto_update_momentum"])
@pytest.mark.parametrize("block", ["proto_head", "relation_net_head"])
def test_both_spellings_and_names(spelling: str, block: str) -> None:
    tree = theirs("pascal", "366")
    head = tree["net"].pop("proto_head")
    del head["proto_unpdate_momentum"]
    tree["net"][block] = head | {spelling: 0.95, "dynamic_update_proto": False}
    proto = build(Config, original.translate(tree, "config.yaml")).prototypes
    assert proto is not None
    assert (proto.momentum, proto.update) == (0.95, False)


def test_without_the_head_it_is_a_mean_teacher_and_without_semi_a_baseline() -> None:
    tree = theirs("cityscapes", "372")
    del tree["net"]["proto_head"]
    found = build(Config, original.translate(tree, "config.yaml"))
    assert (found.method.mode, found.method.proto) == ("semi", None)
    tree = theirs("cityscapes", "372")
    tree["dataset"]["type"] = "cityscapes"
    found = build(Config, original.translate(tree, "config.yaml"))
    twin = load_config(Config, CONFIGS / "cityscapes_372_r101_sup.yaml")
    assert (found.method.mode, found.prototypes, found.method.sup_only_order) == ("sup_only", None, "sampled")
    assert (found.data, found.optim, found.model, found.eval) == (
        twin.data,
        twin.optim,
        twin.model,
        twin.eval,
    )


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("net.proto_head.colour", 1, "'net.proto_head.colour' is not known"),
        ("net.proto_head.patch_select", False, "patch_select is false"),
        ("dataset.type", "coco_semi", "dataset.type 'coco_semi'"),
        ("dataset.train.data_list", "mine.txt", "none of the published lists"),
        ("trainer.unsupervised.confid_thresh", 2, "'confid_thresh' is 2.0"),
        ("trainer.epochs", "many", "'optim.epochs' is 'many'"),
    ],
)
def test_what_cannot_be_translated_is_named(place: str, value: Any, words: str) -> None:
    tree = copy.deepcopy(theirs("pascal", "366"))
    *path, last = place.split(".")
    inner = tree
    for part in path:
        inner = inner[part]
    inner[last] = value
    with pytest.raises(UserError) as caught:
        original.translate(tree, "config.yaml")
    assert str(caught.value).startswith("config.yaml: ")
    assert words in str(caught.value)


def test_command_and_refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "config.yaml", tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(theirs("pascal", "92")), encoding="utf-8")
    with pytest.raises(UserError, match=r"written for the original code .*python compat/original\.py"):
        script.main(
            ["--config", str(path), "--base_size", "662", "--scales", "1.0", "--model_path=best.ckpt"]
        )
    assert original.main([str(path), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: written\n"
    assert load_config(Config, out).data.split == "classic/92"
    with pytest.raises(UserError, match="is not written for the original code"):
        original.main([str(out), "--out", str(path)])
    with pytest.raises(UserError, match="is the source"):
        original.main([str(path), "--out", str(path)])
