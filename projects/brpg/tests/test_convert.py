"""Conversion of the authors' checkpoints, made here by the rule of the golden network cases, and of Xception's.

What U2PL's files share with these is tested by `tests/test_convert_scripts.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from common.config import load_config
from common.data.dataset_yaml import load_spec
from common.mean_teacher.evaluation import reported_network
from common.models.deeplab import SegmentationNetwork, upsample
from common.run.checkpoint import describe
from projects.brpg import convert
from projects.brpg import eval as script
from projects.brpg.config import Config
from projects.brpg.model import build_student
from tests.conversions import Converter, authors_file, in_few_bytes, parallel, same
from tests.rules import rule_value

PROJECT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).resolve().parent / "golden"
SMOKE = PROJECT / "configs" / "smoke.yaml"


def by_the_golden_rule(keys: list[tuple[str, list[int], str]]) -> dict[str, Tensor]:
    """Values that depend on the key alone, so that a tensor under a wrong name is noticed."""
    return {key: torch.from_numpy(np.asarray(rule_value(key, shape))) for key, shape, _ in keys}


def network_of_a_file(
    folder: Path, weights: dict[str, Tensor], cfg: Config, name: str
) -> SegmentationNetwork:
    """The network that evaluation builds after the conversion; beside a teacher the student is zero."""
    spec, source = load_spec(cfg.data.dataset), folder / "ckpt_best.pth"
    role = reported_network(cfg)
    if role == "teacher":
        authors_file(source, model_state=in_few_bytes(weights), teacher_state=weights)
    else:
        authors_file(source, model_state=weights)
    networks, reports = convert.convert(source, cfg, spec, name)
    source.unlink()
    assert [len(report.used) for report in reports.values()] == [len(weights)] * len(networks)
    assert list(networks) == (["student", "teacher"] if role == "teacher" else ["student"])
    saved = describe(convert.PROJECT, cfg, spec, 0, networks)
    if role == "teacher":
        assert saved["networks"]["student"]["decoder.classifier.8.bias"].eq(0).all()
    return script.load_network(cfg, saved, role, torch.device("cpu"), "converted")


CASES = {
    "net_resnet101": ("voc_classic_366_r101", []),
    "net_xception65": ("coco_1_32_x65", []),
    "net_resnet50_sup": ("cityscapes_372_r101_sup", ["model.backbone=resnet50"]),
}


def config_of_case(case: str, *overrides: str) -> Config:
    name, own = CASES[case]
    return load_config(Config, PROJECT / "configs" / f"{name}.yaml", [*own, *overrides])


@pytest.mark.parametrize("case", CASES)
def test_a_converted_narrow_network_scores_as_before(tmp_path: Path, case: str) -> None:
    cfg = config_of_case(case, "model.width=8", "model.inner_planes=8")
    before = build_student(cfg, load_spec(cfg.data.dataset).num_classes).eval()
    for key, value in before.state_dict().items():
        value.copy_(torch.from_numpy(np.asarray(rule_value(key, list(value.shape)))))
    network = network_of_a_file(tmp_path, parallel(before.state_dict()), cfg, case)
    image = torch.rand(2, 3, 65, 65)
    with torch.inference_mode():
        torch.testing.assert_close(network.predict(image), before.predict(image))


@pytest.mark.golden
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_converted_network_scores_as_the_authors(tmp_path: Path, case: str) -> None:
    weights = by_the_golden_rule(json.loads((GOLDEN / f"{case}.keys.json").read_text()))
    network = network_of_a_file(tmp_path, weights, config_of_case(case), case)
    with np.load(GOLDEN / f"{case}.npz") as recorded, torch.inference_mode():
        image, expected = torch.from_numpy(recorded["in_image"]), torch.from_numpy(recorded["out_pred"])
        shown = expected.shape[1]  # the recording may hold the first classes only
        limit = 1e-3 * expected.abs().max()
        assert (network(image).logits[:, :shown] - expected).abs().max() <= limit
        whole = upsample(expected, image.shape[-2:])
        assert (network.predict(image)[:, :shown] - whole).abs().max() <= limit


def test_files_with_xception_and_with_a_resnet(tmp_path: Path) -> None:
    converted, small = Converter(convert.main, SMOKE), ("model.backbone=xception65", "model.width=8")
    made = []
    for overrides in ((), small):
        torch.manual_seed(9)
        weights = build_student(load_config(Config, SMOKE, overrides), 5).state_dict()
        path, state = tmp_path / f"{len(made)}.pth", parallel(weights)
        made.append(authors_file(path, model_state=state, teacher_state=state))
    resnet, xception = made
    assert same(converted(xception, *small)["networks"]["teacher"], weights)
    (tmp_path / "converted.pt").unlink()
    converted.refuses(
        [
            (xception, (), "has Xception-65 as encoder"),
            (xception, (), "has resnet_tiny; set model.backbone=xception65"),
            (resnet, small, "has a ResNet as encoder"),
            (resnet, small, "has xception65; set model.backbone=resnet101"),
        ]
    )
