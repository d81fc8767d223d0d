"""Conversion of the released files: by the golden rule for the published network, or from a tiny one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.config import load_config
from common.data.dataset_yaml import load_spec
from common.errors import UserError
from common.run.checkpoint import describe, load
from projects.proto_consistency import convert
from projects.proto_consistency import eval as script
from projects.proto_consistency.config import Config
from projects.proto_consistency.initial import read_prototypes
from projects.proto_consistency.model import build_student
from projects.proto_consistency.tests.mindspore_writer import write_mindspore
from tests.rules import rule_value

PROJECT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).resolve().parent / "golden"
SMOKE = PROJECT / "configs" / "smoke.yaml"
BATCH_NORM = {
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
    "weight": "gamma",
    "bias": "beta",
}


@pytest.mark.golden
@pytest.mark.slow
def test_released_layout_scores_as_recorded(tmp_path: Path) -> None:
    """The file of Cityscapes, with the auxiliary head whose first bias the port lacks."""
    keys = json.loads((GOLDEN / "net_city.keys.json").read_text())
    arrays = {f"module.{theirs}": rule_value(key, shape) for key, shape, _, theirs in keys}
    source = write_mindspore(tmp_path / "best.ckpt", arrays)
    cfg = load_config(Config, PROJECT / "configs" / "cityscapes_744_r101.yaml")
    spec = load_spec(cfg.data.dataset)
    networks, reports = convert.convert(source, cfg, spec, "cityscapes")
    for role in ("student", "teacher"):
        assert len(reports[role].used) == len(keys)
        assert reports[role].missing == (convert.AUX_BIAS,)
        assert reports[role].unused == ()
    saved = describe(convert.PROJECT, cfg, spec, 0, networks)
    network = script.load_network(cfg, saved, "teacher", torch.device("cpu"), "converted")
    with np.load(GOLDEN / "net_city.npz") as recorded, torch.inference_mode():
        out = network(torch.from_numpy(recorded["in_x"]))
        for name, found in (("out_pred", out.logits), ("out_aux", out.aux)):
            expected = torch.from_numpy(recorded[name])
            assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
        dense = network.require_prototypes().dense(out.feats, recorded["in_x"].shape[-2:])[..., ::4, ::4]
        expected = torch.from_numpy(recorded["out_proto_s4"])
        assert (dense - expected).abs().max() <= 2e-5 * expected.abs().max()
    own = read_prototypes(source, 19, 3, 512)
    assert torch.equal(own, networks["student"]["proto_net.proto_list"])


def tiny(*overrides: str) -> tuple[Config, Any, dict[str, Tensor]]:
    """Configuration, dataset and a network's state."""
    cfg = load_config(Config, SMOKE, overrides)
    spec = load_spec(cfg.data.dataset)
    torch.manual_seed(7)
    network = build_student(cfg, spec.num_classes)
    for name, buffer in network.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    return cfg, spec, network.state_dict()


def their_name(key: str, state: Mapping[str, Tensor]) -> str:
    """MindSpore's name: only BatchNorm, which has statistics, is named otherwise."""
    layer, _, last = key.rpartition(".")
    renamed = f"{layer}.{BATCH_NORM[last]}" if f"{layer}.running_mean" in state else key
    return f"module.{renamed}"


def released(state: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    own = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked") and k != convert.AUX_BIAS}
    return {their_name(k, state): v.numpy() for k, v in own.items()}


def write(folder: Path, kind: str, state: Mapping[str, Tensor]) -> Path:
    path = folder / f"best{kind}"
    if kind == ".ckpt":
        return write_mindspore(path, released(state))
    if kind == ".npz":
        np.savez(path, **released(state))
    else:
        other = {f"module.{k}": v + 1 for k, v in state.items()}
        torch.save({"epoch": 80, "model_state": other, "teacher_state": {f"module.{k}": v for k, v in state.items()},
                    "best_miou": np.float64(0.7)}, path)  # fmt: skip
    return path


@pytest.mark.parametrize("aux_weight", ["0.0", "0.4"])
@pytest.mark.parametrize("kind", [".ckpt", ".npz", ".pth"])
def test_every_tensor_arrives_and_is_accounted_for(
    tmp_path: Path, kind: str, aux_weight: str, capsys
) -> None:
    cfg, spec, state = tiny(f"model.aux_weight={aux_weight}")
    source, out, report = write(tmp_path, kind, state), tmp_path / "ours.pt", tmp_path / "report.txt"
    argv = [
        str(source),
        "--config",
        str(SMOKE),
        "--out",
        str(out),
        "--report",
        str(report),
        f"model.aux_weight={aux_weight}",
    ]
    assert convert.main(argv) == 0
    saved = load(out)
    teacher = saved["networks"]["teacher"]
    for key, value in state.items():
        expected = torch.zeros_like(value) if key == convert.AUX_BIAS and kind != ".pth" else value
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(teacher[key], expected), key
            student = expected + 1 if kind == ".pth" else expected
            assert torch.equal(saved["networks"]["student"][key], student), key
    text = report.read_text()
    assert "used\tproto_net.proto_list" in text
    assert ("missing\tauxor.aux.0.bias" in text) == (aux_weight != "0.0" and kind != ".pth")
    printed = capsys.readouterr().out
    assert "tensors used" in printed
    assert "written (student, teacher)" in printed
    network = script.load_network(cfg, saved, "teacher", torch.device("cpu"), "converted")
    assert network.require_prototypes().proto_list.shape == (spec.num_classes * 2, cfg.model.feature_planes)


def test_unknown_tensors_are_reported(tmp_path: Path) -> None:
    cfg, spec, state = tiny()
    arrays = released(state) | {"module.relation_net.extra": np.ones(3, np.float32)}
    _, reports = convert.convert(write_mindspore(tmp_path / "a.ckpt", arrays), cfg, spec, "smoke")
    assert reports["teacher"].unused == ("relation_net.extra",)


def test_renaming_touches_batch_norm_only() -> None:
    one = torch.ones(1)
    found = convert.our_names(
        {"module.a.gamma": one, "a.beta": one, "module.b.moving_mean": one, "b.moving_variance": one, "c.weight": one,
         "module.proto_net.proto_list": one}
    )  # fmt: skip
    assert list(found) == [
        "a.weight",
        "a.bias",
        "b.running_mean",
        "b.running_var",
        "c.weight",
        "proto_net.proto_list",
    ]
    with pytest.raises(UserError, match=r"two tensors are named 'a\.weight'"):
        convert.our_names({"a.weight": one, "a.gamma": one})


@pytest.mark.parametrize(
    ("made", "overrides", "message"),
    [
        ((), ["method.proto.per_class=3"], r"has 3 per class; set method\.proto\.per_class=2"),
        ((), ["method.proto=null", "eval.head=linear"], "has prototypes, .* has not"),
        (("method.proto=null", "eval.head=linear"), [], "lacks the prototypes"),
        ((), ["model.aux_weight=0.4"], r"lacks the auxiliary head.*set model\.aux_weight=0"),
        (("model.aux_weight=0.4",), [], r"has the auxiliary head.*set model\.aux_weight=0\.4"),
        ((), ["data.dataset=voc"], "scores 5 classes, dataset 'voc' .* has 21"),
        ((), ["model.inner_planes=8"], r"do not fit \(file vs network\)"),
    ],
)
def test_files_of_another_network_name_the_setting(
    tmp_path: Path, made: tuple[str, ...], overrides: list[str], message: str
) -> None:
    source, out = write(tmp_path, ".ckpt", tiny(*made)[2]), tmp_path / "ours.pt"
    with pytest.raises(UserError, match=message):
        convert.main([str(source), "--config", str(SMOKE), "--out", str(out), *overrides])
    assert not out.exists()


def test_incomplete_and_damaged_files_leave_nothing_behind(tmp_path: Path) -> None:
    state, out = tiny()[2], tmp_path / "ours.pt"
    arrays = released(state)
    arrays.pop("module.decoder.low_conv.0.bias")
    partial = write_mindspore(tmp_path / "partial.ckpt", arrays)
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(write(tmp_path, ".ckpt", state).read_bytes()[:-100])
    np.savez(tmp_path / "few.npz", a=np.ones(2))
    (tmp_path / "empty.ckpt").write_bytes(b"")
    for path, message in (
        (partial, r"not in the file: decoder\.low_conv\.0\.bias"),
        (cut, "damaged, encrypted or no MindSpore checkpoint"),
        (tmp_path / "few.npz", "no network"),
        (tmp_path / "empty.ckpt", "damaged or not a file of tensors"),
        (tmp_path / "absent.ckpt", "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            convert.main([str(path), "--config", str(SMOKE), "--out", str(out)])
        assert not out.exists()


def test_supervised_configuration_takes_the_student_alone(tmp_path: Path) -> None:
    overrides = ["method.mode=sup_only", "eval.head=linear"]
    state = tiny(*overrides)[2]
    out = tmp_path / "ours.pt"
    argv = [str(write(tmp_path, ".ckpt", state)), "--config", str(SMOKE), "--out", str(out), *overrides]
    assert convert.main(argv) == 0
    assert list(load(out)["networks"]) == ["student"]
