"""The documented commands on a generated Pascal VOC: train, evaluate, train MLMT, evaluate with it."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from common.config import load_config
from common.data.dataset_yaml import load_spec
from common.distributed import Dist
from common.errors import UserError
from common.models.deeplab import upsample
from common.run.checkpoint import load, save
from projects.s4gan_mlmt import evaluate, train_full, train_mlmt, train_s4GAN, train_s4GAN_wrn38
from projects.s4gan_mlmt.compat.metrics import original_miou
from projects.s4gan_mlmt.compat.pictures import original_palette
from projects.s4gan_mlmt.config import Config
from projects.s4gan_mlmt.evaluation import evaluate_network, protocol
from projects.s4gan_mlmt.mlmt.fusion import read_scores
from projects.s4gan_mlmt.model import Segmenter, build_discriminator, build_segmentation
from projects.s4gan_mlmt.tests.checkpoints import loud
from projects.s4gan_mlmt.tests.mlmt_toys import write_voc

PROJECT = Path(__file__).resolve().parents[1]
SEMI, FULL = "./checkpoints/voc_semi_0_125", "./checkpoints/voc_full"
MLMT = "./mlmt_output/voc_semi_0_125_MLMT"
# the README's commands; what is smaller here than there comes behind them
S4GAN_COMMAND = ("--dataset", "pascal_voc", "--checkpoint-dir", SEMI, "--labeled-ratio", "0.125",
                 "--ignore-label", "255", "--num-classes", "21")  # fmt: skip
FULL_COMMAND = (
    "--dataset", "pascal_voc", "--checkpoint-dir", FULL, "--ignore-label", "255", "--num-classes", "21"
)  # fmt: skip
MLMT_COMMAND = ("--batch-size-lab", "16", "--batch-size-unlab", "80", "--labeled-ratio", "0.125",
                "--exp-name", "voc_semi_0_125_MLMT", "--pkl-file", f"{SEMI}/train_voc_split.pkl")  # fmt: skip
EVALUATE_COMMAND = (
    "--dataset", "pascal_voc", "--num-classes", "21", "--restore-from", f"{SEMI}/VOC_30000.pth"
)  # fmt: skip
STEPS = ("--num-steps", "6", "--save-pred-every", "2", "--num-workers", "0")
SMALL = ("model.layers=[1,1,1,1]", "model.width=4", "model.d_width=4", "model.weights=none")
SHORT = (
    *STEPS,
    "--batch-size",
    "2",
    "--learning-rate",
    "0.01",
    "--input-size",
    "33,33",
    *SMALL,
    "run.panels=false",
)
BRANCH = ("mlmt.backbone=resnet_tiny", "mlmt.weights=none", "mlmt.size=33", "mlmt.workers=0", "mlmt.epochs=8",
          "mlmt.evaluation_epochs=4", "mlmt.lr=0.5", "mlmt.ema_decay=0.3")  # fmt: skip
VAL = 4


def write_many_classes(folder: Path) -> None:
    """`VOC_30000.pth`: that of number 4 with another last layer, for six steps teach a network one class at most."""
    cfg = load_config(Config, folder / "config.yaml")
    network = build_segmentation(cfg, 21)
    network.load_state_dict({k.removeprefix("module."): v for k, v in load(folder / "VOC_4.pth").items()})
    torch.manual_seed(0)
    branches = network.layer5.conv2d_list[:2]  # those that count
    state = loud(network.eval(), 60 * torch.randn(2, 3, 65, 65), 3.0, list(branches)).state_dict()
    torch.save({f"module.{key}": value for key, value in state.items()}, folder / "VOC_30000.pth")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory as the original's README wants it, with both branches trained in it."""
    folder = tmp_path_factory.mktemp("world")
    before, device = Path.cwd(), os.environ.get("SSS_DEVICE")
    os.chdir(folder)
    os.environ["SSS_DEVICE"] = "cpu"
    try:
        write_voc(Path("data/voc_dataset"), train=16, val=VAL)
        lists = Path("data/voc_list")
        lists.mkdir()
        for name in ("train_aug.txt", "val.txt"):  # where the original has them
            (Path("data/voc_dataset") / name).rename(lists / name)
        assert train_s4GAN.main([*S4GAN_COMMAND, *SHORT]) == 0
        for kind in ("train", "val"):  # and where its MLMT has them
            ids = (lists / {"train": "train_aug.txt", "val": "val.txt"}[kind]).read_text().split()
            (Path("data/voc_dataset") / f"{kind}_img.txt").write_text("".join(f"{i}.jpg\n" for i in ids))
        assert train_mlmt.main([*MLMT_COMMAND, *BRANCH]) == 0
        write_many_classes(Path(SEMI))
    finally:
        os.chdir(before)
        os.environ.pop("SSS_DEVICE") if device is None else os.environ.update(SSS_DEVICE=device)
    return folder


@pytest.fixture(autouse=True)
def _here(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setenv("SSS_DEVICE", "cpu")


def test_training_leaves_the_files_of_the_original() -> None:
    """keep.original_every: number t stands for t + 1 updates, but for the last."""
    folder = Path(SEMI)
    numbers = sorted(int(re.findall(r"\d+", path.name)[0]) for path in folder.glob("VOC_*_D.pth"))
    assert numbers == [2, 4, 6]
    permutation = pickle.loads((folder / "train_voc_split.pkl").read_bytes())
    assert sorted(permutation.tolist()) == list(range(16))
    cfg = load_config(Config, folder / "config.yaml")
    with torch.device("meta"):
        networks = {"": build_segmentation(cfg, 21), "_D": build_discriminator(cfg, 21)}
    for suffix, network in networks.items():
        state = load(folder / f"VOC_4{suffix}.pth")
        assert list(state) == [f"module.{key}" for key in network.state_dict()]
    last = load(folder / "last.pt")["networks"]
    for name, suffix in (("segmentation", ""), ("discriminator", "_D")):
        state = load(folder / f"VOC_6{suffix}.pth")
        assert all(torch.equal(state[f"module.{key}"], value) for key, value in last[name].items())
    changed = load(folder / "VOC_4.pth")["module.conv1.weight"]
    assert not torch.equal(changed, load(folder / "VOC_2.pth")["module.conv1.weight"])


def test_the_number_of_updates_in_a_file(tmp_path: Path) -> None:
    """The file of number 2 is the state after 3 steps."""
    run = tmp_path / "run"
    words = [*S4GAN_COMMAND, *SHORT, "--checkpoint-dir", str(run), "run.max_steps=3"]
    assert train_s4GAN.main(words) == 0
    saved, file = load(run / "last.pt"), load(run / "VOC_2.pth")
    assert saved["step"] == 3
    assert all(torch.equal(file[f"module.{k}"], v) for k, v in saved["networks"]["segmentation"].items())


def by_hand(
    file: str, keep: np.ndarray[Any, Any] | None = None
) -> tuple[dict[str, np.ndarray[Any, Any]], float]:
    """Predictions and mIoU by the definition: pad to 505, logits, the kept classes' times 1, the others' times 0."""
    spec = load_spec("voc", "./data/voc_dataset/")
    cfg = load_config(Config, Path(SEMI) / "config.yaml")
    network = build_segmentation(cfg, 21)
    network.load_state_dict({k.removeprefix("module."): v for k, v in load(Path(SEMI) / file).items()})
    network.eval()
    mean = torch.tensor(cfg.data.mean)
    predictions, matrix = {}, np.zeros((21, 21), np.int64)
    for i, item in enumerate(spec.read_list("./data/voc_list/val.txt")):
        x = torch.from_numpy(spec.load_image(item)).float().sub(mean).permute(2, 0, 1)[None]
        height, width = x.shape[-2:]
        x = torch.nn.functional.pad(x, (0, 505 - width, 0, 505 - height))
        with torch.no_grad():
            logits = upsample(network(x), (505, 505))[0, :, :height, :width]
        if keep is not None:
            logits = logits * torch.from_numpy(keep[i].astype(np.float32))[:, None, None]
        pred, label = logits.argmax(dim=0).numpy(), spec.load_label(item)
        np.add.at(matrix, (label[label < 21], pred[label < 21]), 1)
        predictions[item.id] = pred
    hit = np.diag(matrix)
    union = matrix.sum(0) + matrix.sum(1) - hit
    return predictions, sum(hit[k] / union[k] for k in range(21) if hit[k]) / 21


def said(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], float]:
    lines = capsys.readouterr().out.splitlines()
    (mean,) = (line for line in lines if line.startswith("meanIOU: "))
    return lines, float(mean.removeprefix("meanIOU: "))


def test_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results"
    assert evaluate.main([*EVALUATE_COMMAND, "--save-dir", str(out), "--save-output-images"]) == 0
    predictions, expected = by_hand("VOC_30000.pth")
    assert expected > 0
    assert len({int(k) for pred in predictions.values() for k in np.unique(pred)}) > 1
    lines, mean = said(capsys)
    assert mean == pytest.approx(expected, rel=1e-12)
    assert lines[0] == "0 processd"
    assert lines[-1] == ""
    table = (out / "result.txt").read_text().splitlines()
    assert len(table) == 22
    assert table[-1] == f"meanIOU: {mean}"
    assert re.fullmatch(r"class  0 background   IU 0\.\d\d", table[0])
    assert all(line in table for line in lines[1:-1])
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*(f"{i}.png" for i in predictions), "result.txt"]
    )
    for name, pred in predictions.items():
        with Image.open(out / f"{name}.png") as file:
            np.testing.assert_array_equal(np.array(file), pred)
            np.testing.assert_array_equal(np.array(file.convert("RGB")), np.asarray(original_palette())[pred])


def test_with_mlmt_on_the_scores_of_train_mlmt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = f"{MLMT}/output_ema_raw_8.txt"
    words = [*EVALUATE_COMMAND, "--save-dir", str(tmp_path / "r"), "--with-mlmt", "--mlmt-file", file]
    assert evaluate.main(words) == 0
    scores = np.loadtxt(file)
    assert scores.shape == (VAL, 21)
    keep = scores >= 0.2
    assert keep.any()
    assert not keep.all()
    assert said(capsys)[1] == pytest.approx(by_hand("VOC_30000.pth", keep)[1], rel=1e-12)


def test_with_mlmt_on_the_originals_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Six decimals, one blank between, no header, a line feed behind every line: 189 bytes a row."""
    rng = np.random.default_rng(4)
    scores = np.where(rng.random((VAL, 21)) < 0.15, rng.random((VAL, 21)), 1e-5)
    scores[:, 0] = 0.9999995
    path = tmp_path / "output_ema_raw_100.txt"
    with path.open("ab") as file:  # as the original writes it
        np.savetxt(file, scores, fmt="%f")
    assert path.stat().st_size == VAL * 189
    assert path.read_text().splitlines()[0].split(" ")[0] == "1.000000"
    words = [*EVALUATE_COMMAND, "--save-dir", str(tmp_path / "r"), "--save-output-images", "--with-mlmt"]
    assert evaluate.main([*words, "--mlmt-file", str(path)]) == 0
    keep = np.loadtxt(path) >= 0.2
    predictions, mean = by_hand("VOC_30000.pth", keep)
    assert said(capsys)[1] == pytest.approx(mean, rel=1e-12)
    plain = by_hand("VOC_30000.pth")[0]
    assert any((predictions[name] != plain[name]).any() for name in plain)
    for name, pred in predictions.items():
        with Image.open(tmp_path / "r" / f"{name}.png") as file:
            np.testing.assert_array_equal(np.array(file), pred)


def test_both_branches_share_the_labeled_images() -> None:
    """The permutation that s4GAN saved; two of sixteen."""
    saved = load(Path(MLMT) / "last.pt")
    assert saved["config"]["data"]["split_file"] == f"{SEMI}/train_voc_split.pkl"
    assert read_scores(f"{MLMT}/output_ema_raw_8.txt", VAL, 21).min() >= 0
    permutation = pickle.loads((Path(SEMI) / "train_voc_split.pkl").read_bytes())
    logged = (Path(MLMT) / "train.log").read_text()
    assert f"{int(0.125 * len(permutation))} labeled + 14 unlabeled images" in logged


@pytest.mark.parametrize("prefix", ["", "module."])
def test_files_without_a_run(prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the authors' own: no configuration beside them; with and without the prefix (own_files)."""
    state = {f"{prefix}{k.removeprefix('module.')}": v for k, v in load(Path(SEMI) / "VOC_30000.pth").items()}
    torch.save(state, tmp_path / "VOC_30000.pth", _use_new_zipfile_serialization=False)  # as PyTorch 0.4 did
    words = ["--restore-from", str(tmp_path / "VOC_30000.pth"), "--save-dir", str(tmp_path / "r")]
    assert evaluate.main([*words, *SMALL]) == 0
    assert said(capsys)[1] == pytest.approx(by_hand("VOC_30000.pth")[1], rel=1e-12)


def test_own_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--restore-from", f"{SEMI}/last.pt", "--save-dir", str(tmp_path / "r")]
    assert evaluate.main(words) == 0
    assert said(capsys)[1] == pytest.approx(by_hand("VOC_6.pth")[1], rel=1e-12)
    moved = tmp_path / "alone.pt"
    save(moved, load(Path(SEMI) / "last.pt"))
    assert evaluate.main(["--restore-from", str(moved), "--save-dir", str(tmp_path / "r")]) == 0
    assert said(capsys)[1] == pytest.approx(by_hand("VOC_6.pth")[1], rel=1e-12)


def test_the_baseline_and_wide_resnet38(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_full.main([*FULL_COMMAND, "--labeled-ratio", "0.5", "--split-id", f"{SEMI}/train_voc_split.pkl",
                            "--checkpoint-dir", str(tmp_path / "full"), *SHORT]) == 0  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "full").glob("*.p[tk][hl]")) == [
        "VOC_2.pth", "VOC_4.pth", "VOC_6.pth", "split.pkl"
    ]  # fmt: skip
    small = (
        "model.layers=[1,1,1,1,1,1]",
        "model.width=4",
        "model.d_width=4",
        "model.weights=none",
        "model.inner_planes=8",
    )
    wide = (
        "--batch-size-unlab",
        "3",
        "--input-size",
        "32,32",
        *STEPS,
        "--batch-size",
        "2",
        "run.panels=false",
    )
    folder = str(tmp_path / "wide")
    assert train_s4GAN_wrn38.main(["--labeled-ratio", "0.5", "--checkpoint-dir", folder, *wide, *small]) == 0
    for run, file in (("full", "VOC_6.pth"), ("wide", "VOC_6.pth")):
        capsys.readouterr()
        words = ["--restore-from", str(tmp_path / run / file), "--save-dir", str(tmp_path / run / "results")]
        assert evaluate.main(words) == 0
        assert 0 <= said(capsys)[1] <= 1


def test_sizes_of_their_own_have_a_figure_at_full_resolution(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """all_classes, on the photos of Pascal VOC taken for PASCAL-Context."""
    path = tmp_path / "last.pt"
    saved = load(Path(SEMI) / "last.pt")
    saved["config"]["data"] |= {
        "pipeline": "pascal_context",
        "mean": [123.675, 116.28, 103.53],
        "std": [58.395, 57.12, 57.375],
    }
    save(path, saved)
    words = ["--dataset", "pascal_context", "--restore-from", str(path), "--save-dir", str(tmp_path / "r")]
    assert evaluate.main([*words, "--data-list", "./data/voc_list/val.txt"]) == 0
    captured = capsys.readouterr()
    assert "at full resolution: mIoU" in captured.err
    own = (tmp_path / "r" / "result.txt").read_text().splitlines()[-1]
    whole = (tmp_path / "r" / "full_resolution" / "result.txt").read_text().splitlines()[-1]
    assert own in captured.out
    assert own != whole


def test_the_command_measures_as_the_library(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cfg = load_config(Config, Path(SEMI) / "config.yaml")
    spec = load_spec("voc", "./data/voc_dataset/")
    network = build_segmentation(cfg, 21)
    weights: dict[str, Tensor] = load(Path(SEMI) / "last.pt")["networks"]["segmentation"]
    network.load_state_dict(weights)
    found = evaluate_network(cfg, Segmenter(network), spec, cfg.eval.list, protocol(cfg, "script"), Dist())
    evaluate.main(["--restore-from", f"{SEMI}/last.pt", "--save-dir", str(tmp_path)])
    expected = original_miou(torch.tensor(found.intersection), torch.tensor(found.union))
    assert said(capsys)[1] == pytest.approx(expected, rel=1e-12)


def scores_text(rows: Sequence[Sequence[float]]) -> str:
    return "".join(" ".join(f"{value:f}" for value in row) + "\n" for row in rows)


GOOD = [[0.5] * 21 for _ in range(VAL)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            scores_text(GOOD[:-1]),
            "3 rows for 4 images; the file is of another list or its writing was cut off",
        ),
        (scores_text(GOOD + GOOD), "8 rows for 4 images; it seems to hold 2 runs"),
        (scores_text([*GOOD, GOOD[0]]), "5 rows for 4 images; the file is of another list"),
        (scores_text([[0.5] * 60 for _ in range(VAL)]), "scores.txt:1: 60 scores instead of 21"),
        (scores_text(GOOD[:-1]) + "0.5 0.5\n", "scores.txt:4: 2 scores instead of 21"),
        (scores_text(GOOD).replace("0.500000", "high", 1), "scores.txt:1: 'high' is no probability"),
        (scores_text(GOOD).replace("0.500000", "nan", 1), "'nan' is no probability"),
        (scores_text(GOOD).replace("0.500000", "1.5", 1), "'1.5' is no probability"),
        ("", "0 rows for 4 images"),
        (None, "scores file cannot be read"),
    ],
)
def test_scores_that_do_not_fit(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        evaluate.main(
            [*EVALUATE_COMMAND, "--save-dir", str(tmp_path / "r"), "--with-mlmt", "--mlmt-file", str(path)]
        )
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "r").exists()


def test_mistakes_are_named(tmp_path: Path) -> None:
    foreign, tensor = tmp_path / "other.pt", tmp_path / "list.pth"
    save(foreign, load(Path(SEMI) / "last.pt") | {"project": "cps"})
    torch.save([1, 2], tensor)
    other = tmp_path / "VOC_9.pth"
    torch.save({"features.weight": torch.zeros(2)}, other)
    cut = tmp_path / "cut.pth"
    cut.write_bytes((Path(SEMI) / "VOC_4.pth").read_bytes()[:5000])
    here = ["--restore-from", f"{SEMI}/VOC_4.pth"]
    mistakes = [
        ([], "--restore-from: names no file"),
        (["--restore-from", "https://there/VOC.pth"], "download the file first"),
        (["--restore-from", "gone.pth"], "gone.pth: no such checkpoint"),
        (["--restore-from", str(foreign)], "made by project 'cps'"),
        (["--restore-from", str(tensor)], "list.pth: holds a list, not a dictionary"),
        (["--restore-from", str(other)], "tensors are not in the file: conv1.weight"),
        (["--restore-from", str(cut)], "cut.pth"),
        (["--restore-from", f"{SEMI}/VOC_4_D.pth"], "VOC_4_D.pth: "),
        ([*here, "--num-classes", "60"], "--num-classes 60: dataset 'voc' has 21"),
        ([*here, "--dataset", "cityscapes"], "--dataset cityscapes: "),
        ([*here, "--dataset", "cocoa"], "--dataset cocoa: unknown"),
        ([*here, "--data-list", "gone.txt"], "--data-list gone.txt: no such file"),
        ([*here, "--data-dir", "gone"], "data.root=gone: no such folder"),
        ([*here, "model.width=8"], "do not fit"),
    ]
    for words, message in mistakes:
        with pytest.raises(UserError) as caught:
            evaluate.main([*words, "--save-dir", str(tmp_path / "r")])
        assert message in str(caught.value), words
        assert "\n" not in str(caught.value)


@pytest.mark.smoke
def test_as_a_program(world: Path, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    words = [*EVALUATE_COMMAND, "--with-mlmt", "--mlmt-file", f"{MLMT}/output_ema_raw_8.txt"]
    done = subprocess.run(
        [sys.executable, str(PROJECT / "evaluate.py"), *words, "--save-dir", str(tmp_path / "r")],
        cwd=world, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "meanIOU: " in done.stdout
    done = subprocess.run(
        [sys.executable, str(PROJECT / "evaluate.py"), "--restore-from", "gone.pth"],
        cwd=world, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: gone.pth: no such checkpoint")
    assert done.stderr.count("\n") == 1
