"""Networks as files for other programs: what the file does and says, and when it is refused."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from common.config import load_config
from common.data.dataset_yaml import load_spec
from common.errors import UserError
from common.run.checkpoint import describe, save
from tests.predictions import mask
from tools import export, exported

ROOT = Path(__file__).resolve().parents[1]
STUDENT = ("model", "build_student", ("student", "teacher"))
BUILDERS = {  # of every project: module, function, networks of a checkpoint
    "u2pl": STUDENT,
    "brpg": STUDENT,
    "proto_consistency": STUDENT,
    "cps": ("model", "build_branch", ("branch1", "branch2")),
    "s4gan_mlmt": ("model", "build_segmentation", ("segmentation",)),
    "unimatch": STUDENT,
}


@torch.no_grad()
def varied(network: torch.nn.Module, num_classes: int) -> None:
    """Change a network of random numbers so that it sees all classes in noise: statistics and means of it."""
    noise = torch.randn(2, 3, 64, 64)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    network.train().predict(noise)
    scoring = [
        m for m in network.modules() if isinstance(m, torch.nn.Conv2d) and m.out_channels == num_classes
    ]
    torch.nn.init.normal_(scoring[-1].weight, std=1.0)
    scoring[-1].weight -= scoring[-1].weight.mean(dim=1, keepdim=True)
    if scoring[-1].bias is not None:
        scoring[-1].bias -= network.eval().predict(noise).mean(dim=(0, 2, 3))


def write_run(folder: Path, project: str, *overrides: str, dataset: str = "shapes") -> Path:
    """A run of a small network of the project whose random weights see different classes in a photo."""
    module, function, roles = BUILDERS[project]
    config = importlib.import_module(f"projects.{project}.config").Config
    cfg = load_config(config, ROOT / "projects" / project / "configs" / "smoke.yaml", list(overrides))
    spec = load_spec(dataset)
    networks = {}
    for seed, role in enumerate(roles):
        torch.manual_seed(seed)
        network = getattr(importlib.import_module(f"projects.{project}.{module}"), function)(
            cfg, spec.num_classes
        )
        varied(network, spec.num_classes)
        networks[role] = network.state_dict()
    save(folder / "best.pt", describe(project, cfg, spec, 7, networks))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i, (height, width) in enumerate(((61, 83), (72, 50))):
        noise = np.random.default_rng(i).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((width, height)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("u2pl"), "u2pl", "model.output_stride=16")


@pytest.fixture(scope="module")
def model(run: Path, photos: Path) -> Path:
    path = run / "model.onnx"
    assert export.main(["--run", str(run), "--out", str(path), "--photos", str(photos)]) == 0
    return path


def predict(project: str, *arguments: str) -> None:
    module = importlib.import_module(f"projects.{project}.predict")
    assert module.main([*arguments, *([] if "--model" in arguments else ["run.device=cpu"])]) == 0


def test_example_of_the_docs_gives_the_mask_of_predict(
    run: Path, model: Path, photos: Path, tmp_path: Path
) -> None:
    """Run as written there, beside the model and a photo, where nothing of this repository can be imported."""
    text = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "model.onnx").write_bytes(model.read_bytes())
    Image.open(photos / "0.png").save(tmp_path / "photo.jpg", quality=95)
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    predict("u2pl", "--run", str(run), "--input", str(tmp_path / "photo.jpg"), "--out", str(tmp_path / "out"))
    found = mask(tmp_path / "mask.png")
    assert len(np.unique(found)) > 1
    np.testing.assert_array_equal(found, mask(tmp_path / "out" / "photo.png"))
    with Image.open(tmp_path / "mask.png") as ours, Image.open(tmp_path / "out" / "photo.png") as theirs:
        np.testing.assert_array_equal(np.array(ours.convert("RGB")), np.array(theirs.convert("RGB")))


def test_file_says_what_it_is(run: Path, model: Path) -> None:
    session = onnxruntime.InferenceSession(str(model))
    facts = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}
    spec, cfg = load_spec("shapes"), torch.load(run / "best.pt", weights_only=True)["config"]
    assert set(exported.FACTS) <= set(facts)
    assert facts["classes"] == list(spec.classes)
    assert facts["palette"] == spec.palette.tolist()
    assert (facts["project"], facts["network"], facts["step"]) == ("u2pl", "teacher", 7)
    assert (facts["mean"], facts["std"], facts["resize"]) == (cfg["data"]["mean"], cfg["data"]["std"], None)
    (image,), (scores,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.type, scores.name) == ("image", "tensor(float)", "scores")
    assert [isinstance(side, str) for side in image.shape] == [True, False, True, True]


def SLOW(*values: Any) -> Any:  # noqa: N802
    return pytest.param(*values, marks=pytest.mark.slow)


WINDOWS = ("eval.protocol=sliding_window", "eval.crop_size=[48, 48]")
FLIP = ("eval.protocol=multi_scale_flip", "eval.flip=true", "eval.scales=[0.5, 1.0]")


@pytest.mark.parametrize("changes", [("eval.crop_size=[70, 60]", WINDOWS[0]), SLOW(WINDOWS), SLOW(FLIP)])
def test_predict_with_the_model_is_predict_with_the_run(
    run: Path, photos: Path, tmp_path: Path, changes: tuple[str, ...]
) -> None:
    model = tmp_path / "model.onnx"
    assert export.main(["--run", str(run), "--out", str(model), "--photos", str(photos), *changes]) == 0
    shared = ("--input", str(photos), "--confidence", "--out")
    predict("u2pl", "--run", str(run), *shared, str(tmp_path / "run"), *changes)
    predict("cps", "--model", str(model), *shared, str(tmp_path / "model"))  # any project's script
    for name in ("0.png", "1.png"):
        np.testing.assert_array_equal(mask(tmp_path / "model" / name), mask(tmp_path / "run" / name))
        sure = [
            np.asarray(Image.open(tmp_path / of / f"{name[0]}_confidence.png")) for of in ("run", "model")
        ]
        assert np.abs(sure[0].astype(int) - sure[1]).max() <= 1
        assert sure[0].min() >= 255 // 5  # of five classes


def test_model_alone_needs_no_project(model: Path, photos: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from tools import predict_script; "
        f"code = predict_script.main(None, ['--model', {str(model)!r}, '--input', {str(photos)!r}, '--out', 'out']); "
        "assert not [name for name in sys.modules if name.split('.')[0] == 'projects']; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert mask(tmp_path / "out" / "0.png").shape == (61, 83)


def test_confidence_is_the_probability_of_the_class(run: Path, photos: Path, tmp_path: Path) -> None:
    predict(
        "u2pl", "--run", str(run), "--input", str(photos / "0.png"), "--out", str(tmp_path), "--confidence"
    )
    project = importlib.import_module("projects.u2pl.predict").PROJECT
    saved, where = export.read_source(project, run, None)
    cfg = export.config_with_flags(
        project.config, saved["config"], export.parser().parse_args(["--run", "x", "--out", "y"]),
        export.no_flags, where,
    )  # fmt: skip
    network = export.Whole(
        project.predictor(cfg, saved, "teacher", torch.device("cpu"), where),
        cfg.data.mean,
        cfg.data.std,
        None,
    )
    with Image.open(photos / "0.png") as file:
        scores = network(export.as_input([np.array(file)]))
    expected = 255 * scores.softmax(dim=1).amax(dim=1)[0]
    found = np.asarray(Image.open(tmp_path / "0_confidence.png")).astype(float)
    assert np.abs(found - expected.numpy()).max() <= 0.51
    header, line = (tmp_path / "photos.csv").read_text().splitlines()
    assert header == "photo,mask,confidence"
    source, name, mean = line.split(",")
    assert (Path(source), name) == (photos / "0.png", "0.png")
    assert abs(255 * float(mean) - float(expected.mean())) < 1e-3


def test_model_that_differs_is_refused_and_leaves_nothing(
    run: Path, model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_another(network: export.Whole, facts: Any, path: Path, kind: str) -> None:
        path.write_bytes(model.read_bytes())
        network.mean += 2

    monkeypatch.setattr(export, "write", write_another)
    path = tmp_path / "model.onnx"
    path.write_text("the former")
    with pytest.raises(
        UserError, match=r"model\.onnx: not written, for the model differs from the network: scores"
    ):
        export.main(["--run", str(run), "--out", str(path), "--photos", str(photos)])
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("model.onnx", "the former")]


def test_difference_of_scores_and_classes_is_bounded() -> None:
    ours = torch.zeros(1, 2, 100, 200)
    ours[:, 0] = 10.0
    for changes, fine in ((9e-4, True), (1.1e-3, False), (float("nan"), False)):
        found = export.Difference()
        found.add(ours, ours + changes)
        if fine:
            found.require_small(Path("m.onnx"))
        else:
            with pytest.raises(UserError, match="not written"):
                found.require_small(Path("m.onnx"))
    tied = torch.zeros(1, 2, 100, 200)
    tied[:, 0, 0, 0] = 10.0  # the scale
    for count, fine in ((2, True), (3, False)):
        theirs = tied.clone()
        theirs[:, 1, 1, :count] = 1e-5
        found = export.Difference()
        found.add(tied, theirs)
        assert found.other == count
        if fine:
            found.require_small(Path("m.onnx"))
            assert "2 of 20000 pixels differ in class" in found.text
        else:
            with pytest.raises(UserError, match="the class of 3 of 20000 pixels"):
                found.require_small(Path("m.onnx"))


def test_photos_of_the_evaluation_list_are_compared_and_resized_inside(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.pt2"
    assert export.main(["--run", str(run), "--out", str(path), "--bench", "data.resize=[48, 80]"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{path}: u2pl, teacher, ")
    assert "on 4 photos largest difference of scores " in lines[0]
    assert [line.split(":")[0].strip() for line in lines[2:]] == ["PyTorch", ".pt2"]
    texts = dict.fromkeys(exported.FACTS, "")
    program = torch.export.load(path, extra_files=texts).module()
    assert json.loads(texts["resize"]) == [48, 80]
    assert json.loads(texts["protocol"])["kind"] == "whole_image"
    assert program(torch.rand(3, 3, 41, 57) * 255).shape == (3, 5, 41, 57)


def test_mistakes_are_named(run: Path, model: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "foreign.onnx").write_bytes(b"no model")
    save(tmp_path / "foreign" / "best.pt", {"project": "other"})
    given = {"--run": str(run), "--out": str(tmp_path / "m.onnx"), "--photos": str(photos)}
    mistakes: list[tuple[dict[str, str], list[str], str]] = [
        ({"--out": "m.bin"}, [], "--out m.bin: give a name that ends in .onnx or .pt2"),
        ({"--format": "torch"}, [], "give a name that ends in .pt2"),
        ({"--out": "nowhere/m.onnx"}, [], "no folder nowhere; make it first"),
        ({"--run": str(tmp_path / "none")}, [], "none: holds no checkpoint; give the folder of a run"),
        ({"--run": str(tmp_path / "foreign")}, [], "made by project 'other'; expected one of brpg, cps,"),
        ({"--network": "branch1"}, [], "--network branch1: unknown; use one of teacher, student"),
        ({"--photos": str(tmp_path / "gone")}, [], "gone: no such file or folder"),
        ({}, ["model.inner_planes=8"], "do not fit"),
    ]
    for changes, overrides, message in mistakes:
        words = [word for pair in (given | changes).items() for word in pair]
        with pytest.raises(UserError, match=re.escape(message)):
            export.main([*words, *overrides])
    with pytest.raises(
        UserError, match=r"the photos to compare on are not there \(.*\); give some with --photos"
    ):
        export.main(["--run", str(run), "--out", given["--out"], "eval.list=gone"])
    assert not list(tmp_path.glob("*m.onnx*"))
    uses: list[tuple[str, list[str], str]] = [
        (
            str(tmp_path / "gone.onnx"),
            [],
            "gone.onnx: no such model; make one with python -m tools.export --run",
        ),
        (str(tmp_path / "foreign.onnx"), [], "foreign.onnx: is no ONNX model of tools.export, or damaged ("),
        (str(model), ["eval.flip=true"], "eval.flip=true: a model is as it was exported; export it anew"),
        (str(model), ["--network", "student"], "--network student: a model is as it was exported"),
    ]
    script = importlib.import_module("projects.u2pl.predict")
    for path, more, message in uses:
        with pytest.raises(UserError, match=re.escape(message)):
            script.main(["--model", path, "--input", str(photos), "--out", str(tmp_path / "out"), *more])


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, run: Path, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        UserError, match=r"onnxscript: the library is not installed; run pip install 'semiseg\[export\]'"
    ):
        export.main(["--run", str(run), "--out", str(tmp_path / "m.onnx")])


GENERIC = ("model.network=generic", "model.weights=none")
OTHERS = [
    ("u2pl", (*GENERIC, "model.backbone=tf_efficientnet_lite0", "model.inner_planes=16")),
    ("cps", (*GENERIC, "model.backbone=test_convnext", "model.decoder=fpn", "model.inner_planes=32")),
    ("unimatch", (*GENERIC, "model.backbone=test_vit", "model.decoder=dpt", "model.inner_planes=32")),
    ("unimatch", ()),
    ("brpg", ()),
    ("brpg", ("model.backbone=xception65",)),
    ("proto_consistency", ("model.maxpool=same",)),
    ("proto_consistency", ("--network", "teacher_proto")),
    ("cps", ()),
    ("cps", ("--network", "mean")),
    ("s4gan_mlmt", ()),
    ("s4gan_mlmt", ("model.network=deeplabv2", "model.layers=[1, 1, 1, 1]", "model.width=16")),
    ("s4gan_mlmt", ("model.network=deeplabv3p_wrn38", "model.layers=[1, 1, 1, 1, 1, 1]", "model.width=8")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("project", "changes"), OTHERS)
def test_every_network_of_every_project(
    project: str, changes: tuple[str, ...], photos: Path, tmp_path: Path
) -> None:
    flags = [word for word in changes if "=" not in word]
    run = write_run(tmp_path / "run", project, *(word for word in changes if "=" in word))
    command = ["--run", str(run), "--out", str(tmp_path / "model.onnx"), "--photos", str(photos)]
    assert export.main([*command, *flags]) == 0
    predict(project, "--run", str(run), "--input", str(photos), "--out", str(tmp_path / "a"), *flags)
    predict(
        project, "--model", str(tmp_path / "model.onnx"), "--input", str(photos), "--out", str(tmp_path / "b")
    )
    for name in ("0.png", "1.png"):
        ours = mask(tmp_path / "a" / name)
        assert len(np.unique(ours)) > 2
        np.testing.assert_array_equal(ours, mask(tmp_path / "b" / name))
