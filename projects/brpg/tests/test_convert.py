"""Conversion of the authors' checkpoints: made here by the rule of the golden network cases, or from a tiny network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.checkpoint import load
from common.config import load_config, to_dict
from common.data.datasets import load_spec
from common.errors import UserError
from common.models.deeplab import upsample
from projects.brpg import convert, state
from projects.brpg import eval as script
from projects.brpg.config import Config
from projects.brpg.evaluate import reported_network
from projects.brpg.model import Networks, build_criterion, build_student
from projects.brpg.tests.golden_adapters import rule_value

PROJECT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).resolve().parent / "golden"
SMOKE = PROJECT / "configs" / "smoke.yaml"


def by_the_golden_rule(keys: list[tuple[str, list[int], str]]) -> dict[str, Tensor]:
    """Values that depend on the key alone, so that a tensor under a wrong name is noticed."""
    return {key: torch.from_numpy(np.asarray(rule_value(key, shape))) for key, shape, _ in keys}


def authors_file(path: Path, **entries: Any) -> Path:
    """A file as the original saves it; the best mIoU is a NumPy number there."""
    about = {"epoch": 80, "optimizer_state": {"state": {}, "param_groups": []}, "best_miou": np.float64(0.7)}
    torch.save(about | entries, path)
    return path


@pytest.mark.golden
@pytest.mark.parametrize(
    ("case", "config", "overrides"),
    [
        ("net_resnet101", "voc_classic_366_r101", []),
        ("net_xception65", "coco_1_32_x65", []),
        ("net_resnet50_sup", "cityscapes_372_r101_sup", ["model.backbone=resnet50"]),
    ],
)
def test_converted_network_scores_as_the_authors(
    tmp_path: Path, case: str, config: str, overrides: list[str]
) -> None:
    weights = by_the_golden_rule(json.loads((GOLDEN / f"{case}.keys.json").read_text()))
    cfg = load_config(Config, PROJECT / "configs" / f"{config}.yaml", overrides)
    spec = load_spec(cfg.data.dataset)
    if cfg.method.mode == "semi":
        other = {
            key: value.new_zeros(()).expand(value.shape) for key, value in weights.items()
        }  # few bytes in a file
        source = authors_file(tmp_path / "ckpt_best.pth", model_state=other, teacher_state=weights)
    else:
        source = authors_file(tmp_path / "ckpt_best.pth", model_state=weights)
    networks, reports = convert.convert(source, cfg, spec, config)
    source.unlink()
    assert [len(report.used) for report in reports.values()] == [len(weights)] * len(networks)
    saved = convert.contents(cfg, spec, networks)
    role = reported_network(cfg)
    network = script.load_network(cfg, saved, role, torch.device("cpu"), "converted")
    with np.load(GOLDEN / f"{case}.npz") as recorded, torch.inference_mode():
        image, expected = torch.from_numpy(recorded["in_image"]), torch.from_numpy(recorded["out_pred"])
        shown = expected.shape[1]  # the recording may hold the first classes only
        limit = 1e-3 * expected.abs().max()
        assert (network(image).logits[:, :shown] - expected).abs().max() <= limit
        whole = upsample(expected, image.shape[-2:])
        assert (network.predict(image)[:, :shown] - whole).abs().max() <= limit
    assert list(networks) == (["student", "teacher"] if role == "teacher" else ["student"])
    if role == "teacher":
        assert saved["networks"]["student"]["decoder.classifier.8.bias"].eq(0).all()


def tiny(seed: int, config: Path = SMOKE, *overrides: str) -> dict[str, Tensor]:
    """Weights of a small network."""
    torch.manual_seed(seed)
    return build_student(load_config(Config, config, overrides), 5).state_dict()


def parallel(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{key}": value for key, value in weights.items()}


def convert_file(source: Path, *arguments: str, config: Path = SMOKE) -> dict[str, Any]:
    out = source.with_name("converted.pt")
    assert convert.main([str(source), "--config", str(config), "--out", str(out), *arguments]) == 0
    return load(out)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_student_and_teacher_keep_their_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student, teacher = tiny(1), tiny(2)
    source = authors_file(tmp_path / "a.pth", model_state=parallel(student), teacher_state=parallel(teacher))
    saved = convert_file(source)
    assert same(saved["networks"]["student"], student)
    assert same(saved["networks"]["teacher"], teacher)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == (
        f"student: {source}[model_state]: {len(student)} tensors used, 0 unused, 0 kept their initial values"
    )
    assert shown[1].startswith(f"teacher: {source}[teacher_state]: {len(teacher)} tensors used")
    assert shown[2] == f"{tmp_path / 'converted.pt'}: written (student, teacher)"


def test_keys_without_the_prefix_of_parallel_training(tmp_path: Path) -> None:
    weights = tiny(3)
    torch.save(weights, tmp_path / "bare.pth")
    saved = convert_file(tmp_path / "bare.pth")
    assert same(saved["networks"]["student"], weights)
    assert same(saved["networks"]["teacher"], weights)


def test_file_with_xception(tmp_path: Path) -> None:
    small = ("model.backbone=xception65", "model.width=8")
    weights = tiny(9, SMOKE, *small)
    source = authors_file(tmp_path / "a.pth", model_state=parallel(weights), teacher_state=parallel(weights))
    saved = convert_file(source, *small)
    assert same(saved["networks"]["teacher"], weights)
    with pytest.raises(UserError) as error:
        convert_file(source)
    assert "has Xception-65 as encoder" in str(error.value)
    assert str(error.value).endswith("has resnet_tiny; set model.backbone=xception65")


def test_supervised_only_file_gives_a_student(tmp_path: Path) -> None:
    config = PROJECT / "configs" / "smoke_sup.yaml"
    weights = tiny(4, config)
    source = authors_file(tmp_path / "a.pth", model_state=parallel(weights))
    saved = convert_file(source, config=config)
    assert list(saved["networks"]) == ["student"]
    assert same(saved["networks"]["student"], weights)


def test_result_describes_itself_as_a_checkpoint_of_training(tmp_path: Path) -> None:
    weights = tiny(5)
    saved = convert_file(authors_file(tmp_path / "a.pth", model_state=weights, teacher_state=weights))
    cfg, spec = load_config(Config, SMOKE), load_spec("shapes")
    network = build_student(cfg, 5)
    nets = Networks(network, network, network, build_criterion(cfg))
    trained = state.header(cfg, spec, state.State(nets, None, None, None, None))  # type: ignore[arg-type]
    assert saved.keys() == trained.keys()
    assert {key: saved[key] for key in saved if key != "networks"} == {
        key: trained[key] for key in trained if key != "networks"
    }
    assert saved["config"] == to_dict(cfg)
    state.load_networks(nets, saved, "converted.pt")  # as run.init does
    assert same(network.state_dict(), weights)


def test_report_lists_every_key(tmp_path: Path) -> None:
    weights = parallel(tiny(6))
    del weights["module.encoder.bn1.num_batches_tracked"]  # as files from before these counters existed
    extra = weights | {"module.encoder.fc.weight": torch.zeros(3, 3)}
    source = authors_file(tmp_path / "a.pth", model_state=weights, teacher_state=extra)
    saved = convert_file(source, "--report", str(tmp_path / "report.txt"))
    lines = (tmp_path / "report.txt").read_text(encoding="utf-8").splitlines()
    parts = "\n".join(lines).split("# teacher from ")
    keys = [key.removeprefix("module.") for key in weights]
    assert parts[0].splitlines() == [
        f"# student from {source}[model_state]",
        *(f"used\t{key}" for key in keys),
    ]
    assert sorted(parts[1].splitlines()[1:]) == sorted(
        [*(f"used\t{key}" for key in keys), "unused\tencoder.fc.weight"]
    )
    assert "encoder.fc.weight" not in saved["networks"]["teacher"]


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def test_files_that_could_run_code_are_refused(tmp_path: Path) -> None:
    weights = tiny(7)
    source = authors_file(tmp_path / "a.pth", model_state=weights, trap=Trap(tmp_path / "ran"))
    with pytest.raises(UserError, match=r"a\.pth: .*save it as a plain state dict"):
        convert_file(source)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "converted.pt").exists()


def mistakes(tmp_path: Path) -> list[tuple[Path, list[str], str]]:
    weights = parallel(tiny(8))
    backbone = {key: value for key, value in weights.items() if ".encoder." in key}
    without_head = {key: value for key, value in weights.items() if ".representation." not in key}
    incomplete = {key: value for key, value in weights.items() if key != "module.decoder.low_conv.0.weight"}
    full = authors_file(tmp_path / "full.pth", model_state=weights, teacher_state=weights)
    short = tmp_path / "short.pth"
    short.write_bytes(full.read_bytes()[:5000])
    return [
        (full, ["data.dataset=voc"], "full.pth[model_state]: scores 5 classes, dataset 'voc' of"),
        (full, ["method.mode=sup_only"], "has the representation head"),
        (full, ["method.mode=sup_only"], "set method.mode=semi"),
        (full, ["model.aux_weight=0.4"], "lacks the auxiliary head that"),
        (full, ["model.aux_weight=0.4"], "set model.aux_weight=0"),
        (full, ["model.backbone=xception65", "model.width=8"], "has a ResNet as encoder"),
        (
            full,
            ["model.backbone=xception65", "model.width=8"],
            "has xception65; set model.backbone=resnet101",
        ),
        (full, ["model.inner_planes=8"], "have another shape (file vs network)"),
        (authors_file(tmp_path / "sup.pth", model_state=without_head), [], "set method.mode=sup_only"),
        (authors_file(tmp_path / "backbone.pth", model_state=backbone), [], "holds a backbone only"),
        (
            authors_file(tmp_path / "part.pth", model_state=incomplete),
            [],
            f"1 of {len(weights)} tensors are not in the file: decoder.low_conv.0.weight",
        ),
        (
            authors_file(tmp_path / "none.pth"),
            [],
            "none.pth: holds epoch, optimizer_state, best_miou, but no network",
        ),
        (short, [], "short.pth: is damaged or not a file of tensors"),
        (tmp_path / "absent.pth", [], "absent.pth: no such weight file"),
        (full, ["--out", str(full)], "full.pth: is the source; choose another file"),
        (full, ["optim.momentun=1"], "did you mean 'optim.momentum'?"),
    ]


def test_mistakes_are_named_and_leave_nothing_behind(tmp_path: Path) -> None:
    for source, arguments, message in mistakes(tmp_path):
        with pytest.raises(UserError) as error:
            convert_file(source, *arguments)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "converted.pt").exists()
