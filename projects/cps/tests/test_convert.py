"""Conversion of the authors' checkpoints: made here by the rule of the golden network cases, or from small networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.config import load_config, to_dict
from common.data.dataset_yaml import load_spec
from common.distributed import Dist
from projects.cps import convert
from projects.cps import eval as script
from projects.cps.config import Config
from projects.cps.methods import build_networks
from projects.cps.model import build_branch
from projects.cps.tests.checkpoints import CONFIGS, SMOKE, smoke, weights
from projects.cps.tests.golden_adapters import rule_state
from projects.cps.tests.toys import run_of
from tests.conversions import Converter, same

GOLDEN = Path(__file__).resolve().parent / "golden"

convert_file = Converter(convert.main, SMOKE)


def authors_file(path: Path, model: dict[str, Tensor], **entries: Any) -> Path:
    """A file as the original saves it."""
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(2)}}, "param_groups": [{"lr": 0.01}]}
    about = {"optimizer_l": optimizer, "optimizer_r": optimizer, "epoch": 33, "iteration": 1156}
    torch.save({"model": model} | about | entries, path)
    return path


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in tensors.items()}


def pair(first: str = "branch1.", second: str = "branch2.") -> dict[str, Tensor]:
    return prefixed(first, weights(1)) | prefixed(second, weights(2))


BRANCHES = ("branch1", "branch2")


def predictors_of_a_file(folder: Path, tensors: dict[str, Tensor], cfg: Config) -> list[Any]:
    """What evaluation measures of both branches after the conversion."""
    source = authors_file(folder / "epoch-last.pth", tensors)
    spec = load_spec(cfg.data.dataset)
    networks, reports, unused = convert.convert(source, cfg, spec, "config", list(BRANCHES))
    source.unlink()
    assert sum(len(report.used) for report in reports.values()) == len(tensors)
    assert unused == ()
    saved = {"networks": networks, "classes": spec.classes}
    return [script.predictor(cfg, saved, role, torch.device("cpu"), "converted") for role in BRANCHES]


def published(*overrides: str) -> Config:
    return load_config(
        Config, CONFIGS / "cityscapes_372_r50_cps.yaml", ["run.channels_last=false", *overrides]
    )


def test_converted_narrow_networks_score_as_before(tmp_path: Path) -> None:
    cfg = published("model.width=4", "model.inner_planes=8", "model.low_planes=4")
    branches = [build_branch(cfg, 19).eval() for _ in BRANCHES]
    tensors = [prefixed(f"{role}.", net.state_dict()) for role, net in zip(BRANCHES, branches, strict=True)]
    image = torch.rand(2, 3, 65, 65)
    with torch.inference_mode():
        for predict, branch in zip(
            predictors_of_a_file(tmp_path, tensors[0] | tensors[1], cfg), branches, strict=True
        ):
            torch.testing.assert_close(predict(image), branch.predict(image))


@pytest.mark.golden
@pytest.mark.slow
def test_converted_networks_score_as_the_authors(tmp_path: Path) -> None:
    tensors = rule_state(json.loads((GOLDEN / "net_two_branch.keys.json").read_text()))
    with np.load(GOLDEN / "net_two_branch.npz") as recorded, torch.inference_mode():
        image = torch.from_numpy(recorded["in_x"])
        expected = [torch.from_numpy(recorded[key]) for key in ("out_eval", "out_branch2_eval")]
        for predict, scores in zip(
            predictors_of_a_file(tmp_path, tensors, published()), expected, strict=True
        ):
            limit = 1e-4 * scores.abs().max()
            assert (predict(image)[..., ::2, ::2] - scores).abs().max() <= limit
    assert not torch.equal(expected[0], expected[1])


@pytest.mark.parametrize("parallel", ["", "module."])
@pytest.mark.parametrize("bare", [False, True])
def test_both_branches_keep_their_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], parallel: str, bare: bool
) -> None:
    source = tmp_path / "a.pth"
    tensors = prefixed(parallel, pair())
    torch.save(tensors, source) if bare else authors_file(source, tensors)
    saved = convert_file(source)
    assert list(saved["networks"]) == ["branch1", "branch2"]
    assert same(saved["networks"]["branch1"], weights(1))
    assert same(saved["networks"]["branch2"], weights(2))
    place = str(source) if bare else f"{source}[model]"
    count = f"{len(weights(1))} tensors used, 0 unused, 0 kept their initial values"
    assert capsys.readouterr().out.splitlines() == [
        f"branch1: {place}.branch1: {count}",
        f"branch2: {place}.branch2: {count}",
        f"{tmp_path / 'converted.pt'}: written (branch1, branch2)",
    ]


def test_one_branch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = authors_file(tmp_path / "a.pth", pair())
    supervised = SMOKE.with_name("smoke_sup.yaml")
    for arguments, config in ((["--branch", "branch1"], SMOKE), ([], supervised)):
        saved = convert_file(source, *arguments, config=config)
        assert list(saved["networks"]) == ["branch1"]
        assert same(saved["networks"]["branch1"], weights(1))
        assert f"not taken: branch2 ({len(weights(2))} tensors)" in capsys.readouterr().out.splitlines()
    alone = authors_file(tmp_path / "alone.pth", weights(3))
    assert same(convert_file(alone, config=supervised)["networks"]["branch1"], weights(3))


def test_student_and_teacher_of_the_mean_teacher(tmp_path: Path) -> None:
    source = authors_file(tmp_path / "a.pth", pair())
    saved = convert_file(source, config=SMOKE.with_name("smoke_mean_teacher.yaml"))
    assert same(saved["networks"]["branch2"], weights(2))


def test_main_decoder_of_cct_is_the_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = weights(1)
    theirs = {key.replace("classifier.", "main_decoder.upsample.0."): value for key, value in own.items()}
    theirs |= {f"aux_decoders.{i}.upsample.0.weight": torch.ones(5, 16, 1, 1) for i in range(12)}
    source = authors_file(tmp_path / "a.pth", theirs)
    saved = convert_file(source, config=SMOKE.with_name("smoke_cct.yaml"))
    assert list(saved["networks"]) == ["branch1"]
    assert same(saved["networks"]["branch1"], own)
    assert "not taken: aux_decoders (12 tensors)" in capsys.readouterr().out.splitlines()


def test_task_networks_of_gct(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = pair("l_model.", "r_model.") | {"fd_model.conv1.weight": torch.ones(2)}
    source = authors_file(tmp_path / "a.pth", theirs)
    saved = convert_file(source, config=SMOKE.with_name("smoke_gct.yaml"))
    assert same(saved["networks"]["branch1"], weights(1))
    assert same(saved["networks"]["branch2"], weights(2))
    assert "not taken: fd_model (1 tensors)" in capsys.readouterr().out.splitlines()


def test_result_starts_a_run_and_describes_itself(tmp_path: Path) -> None:
    saved = convert_file(
        authors_file(tmp_path / "a.pth", pair()), "run.device=cpu", "run.channels_last=false"
    )
    assert (saved["project"], saved["step"], saved["config"]) == ("cps", 0, to_dict(smoke()))
    assert saved["classes"] == list(load_spec("shapes").classes)
    run = run_of(smoke(), build_networks(smoke(), 5, Dist()))
    run.load_networks(saved, "converted.pt")  # as run.init does
    assert same(run.weights()["branch2"], weights(2))
    one = convert_file(tmp_path / "a.pth", "--branch", "branch1")
    run.load_networks(one, "converted.pt")
    assert same(run.weights()["branch2"], weights(1))


def test_report_lists_every_key(tmp_path: Path) -> None:
    tensors = pair() | {"criterion.weight": torch.zeros(1), "branch2.fc.weight": torch.zeros(1)}
    del tensors["branch1.backbone.bn1.num_batches_tracked"]  # as files from before these counters existed
    source = authors_file(tmp_path / "a.pth", prefixed("module.", tensors))
    convert_file(source, "--report", str(tmp_path / "report.txt"))
    lines = (tmp_path / "report.txt").read_text(encoding="utf-8").splitlines()
    keys = list(weights(1))
    assert lines == [
        f"# branch1 from {source}[model].branch1",
        *(f"used\t{key}" for key in keys if key != "backbone.bn1.num_batches_tracked"),
        f"# branch2 from {source}[model].branch2",
        *(f"used\t{key}" for key in keys),
        "unused\tfc.weight",
        "# the rest of the file",
        "unused\tcriterion.weight",
    ]


def mistakes(folder: Path) -> list[tuple[Path, list[str], str]]:
    both = authors_file(folder / "both.pth", pair())
    alone = authors_file(folder / "alone.pth", weights(3))
    missing = {key: value for key, value in pair().items() if key != "branch2.head.aspp.red_conv.weight"}
    port = {"backbone1.conv1.weight": torch.zeros(1), "branch1.head.decoder.conv.weight": torch.zeros(1)}
    torch.save({"epoch": 3, "optimizer_l": {}}, folder / "none.pth")
    (folder / "model.pdparams").touch()
    count = len(weights(1))
    return [
        (both, ["data.dataset=voc"], "both.pth[model]: scores 5 classes, dataset 'voc' of"),
        (both, ["model.inner_planes=8"], "do not fit (file vs network)"),
        (both, ["model.backbone=resnet18"], "tensors are not in the file"),
        (alone, [], "holds one network, " + str(SMOKE) + " trains two; give --branch branch1"),
        (authors_file(folder / "part.pth", missing), [],
         f"1 of {count} tensors are not in the file: head.aspp.red_conv.weight"),
        (authors_file(folder / "port.pth", port), [], "weights of the PaddleSeg port"),
        (folder / "model.pdparams", [], "PaddlePaddle weights of the port"),
        (folder / "none.pth", [], "none.pth: holds epoch, optimizer_l, but no network"),
    ]  # fmt: skip


def test_mistakes_are_named_and_leave_nothing_behind(tmp_path: Path) -> None:
    convert_file.refuses(mistakes(tmp_path))
