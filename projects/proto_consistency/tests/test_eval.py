"""Evaluation and prediction of a real run: both heads, the original's flags, the pooling of the released code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.config import load_config
from common.data.dataset_yaml import load_spec
from common.distributed import Dist
from common.errors import UserError
from common.mean_teacher.evaluation import protocol
from common.measure.evaluation import evaluate_list
from common.run.checkpoint import load, save
from projects.proto_consistency import eval as script
from projects.proto_consistency import predict, train
from projects.proto_consistency.config import Config
from projects.proto_consistency.evaluate import (
    evaluate_network,
    further_roles,
    main_head,
    predictor_of,
    reported_role,
)
from projects.proto_consistency.tests.toys import write_config
from tests.tiny import write_dataset
from tools.eval_script import config_of, find_target


@pytest.fixture(autouse=True)
def _same_process_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scripts set up their process; give it back. One thread throughout: that is part of the digits."""
    monkeypatch.setenv("SSS_DEVICE", "cpu")
    before, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(before)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished semi-supervised run whose heads are both reported; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    dataset = write_dataset(folder / "farm")
    config = write_config(
        folder / "c.yaml", dataset, optim={"lr": 0.05, "epochs": 3, "batch_size": 2},
        eval={"during_training": "whole_image", "head": "both"},
    )  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert train.main(["--config", str(config), f"run.dir={folder / 'run'}"]) == 0
    torch.set_num_threads(threads)
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


FIGURES = ("miou", "miou_present", "pixel_accuracy", "iou", "images", "images_not_finite")


def test_figures_of_both_heads_are_those_of_training(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--run", str(run)]) == 0
    training = read(run / "result.json")
    linear, proto = (read(run / f"eval_whole_image_val{end}.json") for end in ("", "_teacher_proto"))
    assert training["network"] == linear["network"] == "teacher"
    for who in ("best", "last"):
        assert all(linear[who][key] == training[who][key] for key in FIGURES)
        assert all(proto[who][key] == training[f"proto_{who}"][key] for key in FIGURES)
    assert linear["last"]["iou"] != proto["last"]["iou"]
    assert linear["method"] == training["method"] == "proto_consistency"
    shown = capsys.readouterr().out
    assert f"{run}: teacher, " in shown
    assert f"{run}: teacher_proto, " in shown


def test_an_override_reaches_settings_within_settings(run: Path) -> None:
    best = str(run / "best.pt")
    saved = load(run / "best.pt")
    assert config_of(Config, saved, [], best).method.proto.temperature == 0.1
    assert config_of(Config, saved, ["method.proto.temperature=0.2"], best).method.proto.temperature == 0.2


@pytest.mark.parametrize(
    ("overrides", "roles"),
    [
        (["eval.head=linear"], {"teacher"}),
        (["eval.head=proto"], {"teacher_proto"}),
        (["--network", "student_proto"], {"student_proto"}),
    ],
)
def test_choice_of_the_head(run: Path, overrides: list[str], roles: set[str], capsys) -> None:
    assert script.main(["--run", str(run), *overrides]) == 0
    shown = capsys.readouterr().out
    assert {line.split("\t")[1] for line in shown.splitlines() if "\t" in line} == roles


def test_figures_of_the_prototype_head_are_those_of_the_definition(run: Path) -> None:
    """By the cosine of features that are resized as a whole, and an argmax of the class maxima."""
    cfg = load_config(Config, run / "config.yaml")
    saved, spec = load(run / "last.pt"), load_spec(cfg.data.dataset)
    network = script.load_network(cfg, saved, "teacher_proto", torch.device("cpu"), "last.pt")
    prototypes = torch.nn.functional.normalize(saved["networks"]["teacher"]["proto_net.proto_list"], dim=1)

    def forward(x: torch.Tensor) -> torch.Tensor:
        feats = torch.nn.functional.interpolate(
            network(x).feats, size=x.shape[-2:], mode="bilinear", align_corners=True
        )
        cosines = torch.einsum("bdhw,cd->bchw", torch.nn.functional.normalize(feats, dim=1), prototypes)
        return cosines.unflatten(1, (spec.num_classes, -1)).amax(dim=2) / 0.1

    how = protocol(cfg, "script")
    expected = evaluate_list(forward, cfg.data, spec, "val", how, Dist(), precision="fp32")
    found = evaluate_network(cfg, network, spec, "val", how, Dist(), "proto")
    assert np.allclose(found.iou, expected.iou, atol=2e-3)
    assert 0 < found.miou < 1


def test_heads_and_roles() -> None:
    semi = load_config(Config, Path(script.PROJECT.folder) / "configs" / "smoke.yaml")
    assert (main_head(semi), reported_role(semi), further_roles(semi)) == (
        "linear",
        "teacher",
        ("teacher_proto",),
    )
    proto = load_config(Config, Path(script.PROJECT.folder) / "configs" / "smoke.yaml", ["eval.head=proto"])
    assert (main_head(proto), reported_role(proto), further_roles(proto)) == ("proto", "teacher_proto", ())
    sup = load_config(Config, Path(script.PROJECT.folder) / "configs" / "smoke_sup.yaml")
    assert (main_head(sup), reported_role(sup), further_roles(sup)) == ("linear", "student", ())


def test_the_prototype_head_can_choose_the_best_weights(run: Path, tmp_path: Path) -> None:
    config = run / "config.yaml"
    arguments = [f"run.dir={tmp_path / 'proto'}", "eval.head=proto"]
    assert train.main(["--config", str(config), *arguments]) == 0
    one, two = read(tmp_path / "proto" / "result.json"), read(run / "result.json")
    assert one["network"] == "teacher_proto"
    assert one["last"]["iou"] == two["proto_last"]["iou"]  # the same training, the other head
    assert "proto_last" not in one


def test_a_network_without_prototypes_has_no_such_head(run: Path) -> None:
    saved = load(run / "best.pt")
    for role in saved["networks"]:
        saved["networks"][role].pop("proto_net.proto_list")
    save(run / "plain.pt", saved)
    command = ["--checkpoint", str(run / "plain.pt"), "method.proto=null", "eval.head=linear"]
    assert script.main(command) == 0
    with pytest.raises(UserError, match=r"'teacher_proto' asks for the prototype head"):
        script.main([*command, "--network", "teacher_proto"])
    with pytest.raises(UserError, match=r"not in the file: proto_net\.proto_list"):
        script.main(["--checkpoint", str(run / "plain.pt")])


# --- the original's command line -------------------------------------------------------------------------------


def target(*arguments: str) -> Any:
    args = script.parser().parse_intermixed_args(arguments)
    return find_target(script.PROJECT, args, script.original_flags).cfg


def test_flags_of_the_original(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`eval.sh` of a Pascal experiment: the base size has no effect on whole images."""
    command = [
        f"--config={run / 'config.yaml'}", "--base_size", "662", "--scales", "1.0", f"--model_path={run / 'best.pt'}",
        "--machine_name", "cloud", "--names_path", "x", "--crop",
    ]  # fmt: skip
    cfg = target(*command)
    assert (cfg.eval.base_size, cfg.eval.scales, cfg.eval.protocol) == (None, (1.0,), "whole_image")
    assert script.main(command) == 0
    shown = f"{100 * read(run / 'result.json')['best']['miou']:.2f}"
    assert shown in capsys.readouterr().out


def test_flags_of_the_original_with_windows_and_scales(run: Path) -> None:
    one = ("--scales", "0.5", "1.0", "--base_size", "100", "--checkpoint", str(run / "best.pt"))
    cfg = target(*one, "eval.protocol=sliding_window")
    assert (cfg.eval.base_size, cfg.eval.scales) == (100, (0.5, 1.0))
    assert target(*one).eval.scales == (0.5, 1.0)


def test_pictures_are_those_of_the_first_head(run: Path, tmp_path: Path) -> None:
    assert script.main(["--run", str(run), "--save_folder", str(tmp_path / "out"), "eval.head=both"]) == 0
    assert script.main(["--run", str(run), "--save", str(tmp_path / "linear"), "eval.head=linear"]) == 0
    names = sorted(path.name for path in (tmp_path / "out" / "gray").iterdir())
    assert len(names) == 4
    for name in names:
        assert (tmp_path / "out/gray" / name).read_bytes() == (tmp_path / "linear/gray" / name).read_bytes()


# --- the pooling of the released code --------------------------------------------------------------------------


def test_pooling_of_the_released_evaluation_code(run: Path) -> None:
    """QUIRK model.maxpool: another result where the stem's output is even, the same where it is odd."""
    cfg, saved = load_config(Config, run / "config.yaml"), load(run / "best.pt")
    networks = {}
    for pool in ("ceil", "same"):
        other = load_config(Config, run / "config.yaml", [f"model.maxpool={pool}"])
        networks[pool] = script.load_network(other, saved, "teacher", torch.device("cpu"), "best.pt")
    del cfg
    for side, same in ((33, True), (32, False)):
        x = torch.randn(1, 3, side, side)
        with torch.no_grad():
            one, two = (predictor_of(networks[pool], "linear")(x) for pool in ("ceil", "same"))
        assert torch.allclose(one, two, atol=1e-6) is same
    assert script.main(["--run", str(run), "model.maxpool=same", "eval.head=linear"]) == 0


# --- predict.py ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["linear", "proto"])
def test_prediction_by_either_head(run: Path, tmp_path: Path, head: str) -> None:
    cfg, saved = load_config(Config, run / "config.yaml"), load(run / "best.pt")
    spec = load_spec(cfg.data.dataset)
    image = spec.load_image(spec.read_list("val")[0])
    Image.fromarray(image).save(tmp_path / "photo.png")
    arguments = ["--run", str(run), "--input", str(tmp_path / "photo.png"), "--out", str(tmp_path / "out")]
    assert predict.main([*arguments, f"eval.head={head}"]) == 0
    role = "teacher_proto" if head == "proto" else "teacher"
    forward = script.predictor(cfg, saved, role, torch.device("cpu"), "best.pt")
    x = (torch.from_numpy(image).float() - torch.tensor(cfg.data.mean)) / torch.tensor(cfg.data.std)
    with torch.inference_mode():
        expected = forward(x.permute(2, 0, 1)[None])[0].argmax(dim=0).numpy()
    with Image.open(tmp_path / "out" / "photo.png") as file:
        assert (np.array(file) == expected).mean() > 0.999
