"""Settings: what a file may say, what is refused, and what the defaults are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from common.config import build, load_config, save_config
from common.errors import UserError
from projects.s4gan_mlmt.config import STATISTICS, Config, S4GanDataConfig

VOC = {"data": {"dataset": "voc", "split": "full", "labeled_ratio": 0.125}}


def load(tmp_path: Path, tree: dict[str, Any], *overrides: str) -> Config:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load_config(Config, path, overrides)


def test_defaults_are_those_of_the_published_voc_run(tmp_path: Path) -> None:
    cfg = load(tmp_path, VOC)
    optim, method, quirks = cfg.optim, cfg.method, cfg.quirks
    assert (optim.lr, optim.head_lr_factor, optim.momentum, optim.weight_decay) == (2.5e-4, 10, 0.9, 5e-4)
    assert (optim.lr_d, optim.betas_d, optim.power) == (1e-4, (0.9, 0.99), 0.9)
    assert (optim.steps, optim.steps_per_round, optim.batch_size, optim.unlabeled) == (40000, 5000, 8, 8)
    assert (method.fm_weight, method.st_weight, method.st_threshold, method.st_start) == (0.1, 1.0, 0.6, 1)
    assert (cfg.data.pipeline, cfg.data.crop_size) == ("voc", (321, 321))
    assert not any((cfg.data.random_scale, cfg.data.random_mirror, cfg.data.drop_last))
    assert (quirks.visits, quirks.aspp_branches, quirks.real_range) == ("repeated_0_4", 2, "labeled")
    assert (quirks.context_mean, quirks.context_padding, quirks.fusion) == (
        "reversed",
        "background",
        "zero_logits",
    )
    assert quirks.frozen_affine
    assert quirks.separate_statistics
    assert quirks.gate_dropout
    assert cfg.model.network == "deeplabv2"


def test_the_resolved_tree_is_a_configuration(tmp_path: Path) -> None:
    for pipeline in ("voc", "pascal_context", "cityscapes", "house"):
        cfg = load(tmp_path, VOC, f"data.pipeline={pipeline}")
        save_config(cfg, tmp_path / "saved.yaml")
        assert load_config(Config, tmp_path / "saved.yaml") == cfg


@pytest.mark.parametrize("pipeline", ["voc", "pascal_context", "cityscapes"])
def test_the_authors_pipelines_bring_their_statistics(pipeline: str) -> None:
    data = {"dataset": "voc", "split": "full", "pipeline": pipeline}
    found = build(S4GanDataConfig, data)
    assert (found.mean, found.std) == STATISTICS[pipeline]
    with pytest.raises(ValueError, match="'pipeline: house'"):
        build(S4GanDataConfig, data | {"mean": [1, 2, 3]})
    assert build(S4GanDataConfig, data | {"pipeline": "house", "mean": [1, 2, 3]}).mean == (1, 2, 3)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.labeled_ratio=0", "'labeled_ratio' is 0.0; expected more than 0"),
        ("data.labeled_ratio=1.5", "'labeled_ratio' is 1.5"),
        ("data.pipeline=ade20k", "expected one of voc, pascal_context, cityscapes, house"),
        ("optim.optimizer=adam", "'optim.optimizer' is 'adam'; expected sgd"),
        ("optim.steps=0", "'steps' is 0"),
        ("optim.steps=10001", "'steps' is 10001; expected a multiple of 'epochs', 8"),
        ("optim.unlabeled_batch_size=0", "'unlabeled_batch_size' is 0"),
        ("optim.lr_d=0", "'lr_d' is 0"),
        ("optim.betas_d=[0.9, 1]", "'betas_d' is (0.9, 1.0)"),
        ("method.name=gan", "expected one of sup_only, s4gan, s4gan_mlmt"),
        ("method.fm_weight=-1", "'fm_weight' is -1"),
        ("method.st_weight=-1", "'st_weight' is -1"),
        ("method.st_start=-1", "'st_start' is -1"),
        ("method.dropout=1", "'dropout' is 1"),
        ("keep.every_epochs=-1", "'every_epochs' is -1"),
        ("quirks.aspp_branches=3", "expected one of 2, 4"),
        ("quirks.visits=never", "expected one of repeated_0_4, repeated_1_5, once"),
        ("eval.after_steps=40001", "'eval.after_steps' is 40001; expected 1 to optim.steps=40000"),
        ("eval.after_steps=0", "'after_steps' is 0; expected 1 or more, or null"),
        ("eval.protocol=half", "expected one of original,"),
    ],
)
def test_values_out_of_range_are_refused(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, VOC, override)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_split_file_needs_a_ratio(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected 'labeled_ratio' with it"):
        load(tmp_path, VOC, "data.labeled_ratio=null", "data.split_file=split_0.pkl")
