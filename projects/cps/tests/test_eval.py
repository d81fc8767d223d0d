"""Evaluation of runs: which weights and networks are measured, by which protocol, the original's flags, mistakes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.dataset_yaml import load_spec
from common.distributed import Dist
from common.errors import UserError
from common.measure.evaluation import Evaluation, Protocol, evaluate_list
from common.measure.inference import Forward
from common.run.checkpoint import load, save
from projects.cps import eval as script
from projects.cps.inference import OriginalProtocol, PortProtocol
from projects.cps.model import build_branch
from projects.cps.tests.checkpoints import SMOKE, contents, few_images, run_directory, smoke, weights

PROJECT = SMOKE.parents[1]
WHOLE = "eval_whole_image_few.json"
FIGURES = ("miou", "miou_present", "pixel_accuracy")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_directory(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SSS_DEVICE", "cpu")
    few_images(tmp_path)
    return Path(shutil.copytree(made, tmp_path / "run"))


def report(run: Path, name: str = WHOLE) -> dict[str, Any]:
    return json.loads((run / name).read_text(encoding="utf-8"))


def forward(*seeds: int) -> Forward:
    """Scores by the definition: mean of the networks' logits."""
    networks = []
    for seed in seeds:
        network = build_branch(smoke(), 5)
        network.load_state_dict(weights(seed))
        networks.append(network.eval())
    return lambda x: torch.stack([network.predict(x) for network in networks]).mean(dim=0)


def measured(run: Path, scores: Forward, how: Protocol | None = None) -> Evaluation:
    """Figures by the code of all projects, without anything of the script."""
    cfg, spec = smoke(), load_spec("shapes")
    images = str(run.parent / "few.txt")
    return evaluate_list(scores, cfg.data, spec, images, how or Protocol(), Dist(), precision="fp32")


def test_all_weights_that_a_run_has_kept(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(run / "weights" / "epoch_1.pt", run / "weights" / "epoch_1.prev.pt")
    save(run / "weights" / "epoch_10.pt", contents(smoke(), 30, 31))
    assert script.main(["--run", str(run)]) == 0
    ours = report(run)
    seeds = {"last": 0, "epoch_1": 10, "epoch_2": 20, "epoch_10": 30}
    assert list(ours["checkpoints"]) == list(seeds)
    for label, seed in seeds.items():
        expected = measured(run, forward(seed))
        assert ours[f"miou_{label}"] == expected.miou
        assert [ours[label][key] for key in FIGURES] == [getattr(expected, key) for key in FIGURES]
        assert list(ours[label]["iou"].values()) == list(expected.iou)
    assert (ours["method"], ours["network"], ours["project"]) == ("cps", "branch1", "cps")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["IoU", "in", "percent", *seeds]
    cells = lines[-1].split("\t")
    assert cells[1:3] + cells[4:5] == ["branch1", "whole_image", "6"]
    assert cells[5::3] == [f"{100 * ours[f'miou_{label}']:.2f}" for label in seeds]


def test_the_best_comes_first_where_there_is_one(run: Path) -> None:
    save(run / "best.pt", contents(smoke(), 40, 41))
    script.main(["--run", str(run)])
    assert list(report(run)["checkpoints"]) == ["best", "last", "epoch_1", "epoch_2"]
    assert report(run)["miou_best"] == measured(run, forward(40)).miou


@pytest.mark.parametrize(("network", "seeds"), [("branch2", (1,)), ("mean", (0, 1))])
def test_network_is_chosen(run: Path, network: str, seeds: tuple[int, ...]) -> None:
    expected = measured(run, forward(*seeds)).miou
    assert expected != measured(run, forward(0)).miou
    script.main(["--run", str(run), "--network", network, "--epochs", "last"])
    assert report(run, f"eval_whole_image_few_{network}.json")["miou_last"] == expected
    script.main(["--run", str(run), f"eval.network={network}", "--epochs", "last"])
    assert report(run)["miou_last"] == expected
    assert report(run)["network"] == network


@pytest.mark.parametrize(
    ("chosen", "labels"),
    [("last", ["last"]), ("2", ["epoch_2"]), ("1-2", ["epoch_1", "epoch_2"]), ("2-9", ["epoch_2"]),
     ("2-", ["epoch_2"]), ("0-", ["epoch_1", "epoch_2"])],
)  # fmt: skip
def test_epochs(run: Path, chosen: str, labels: list[str]) -> None:
    script.main(["--run", str(run), "-e", chosen])
    assert list(report(run)["checkpoints"]) == labels


def test_a_file_instead_of_epochs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(run / "weights" / "epoch_2.pt")
    few = few_images(run.parent)
    script.main(["--config", str(SMOKE), "-e", file, few, "run.channels_last=false"])
    assert f"{100 * measured(run, forward(20)).miou:.2f}" in capsys.readouterr().out.splitlines()[-1]


def test_protocol_of_the_authors(run: Path) -> None:
    windows = ["eval.protocol=original", "eval.crop_size=[48, 48]", "eval.stride=[32, 32]"]
    script.main(["--run", str(run), "-e", "last", *windows])
    how = {"crop_size": (48, 48), "stride": (32, 32), "mean": smoke().data.mean, "std": smoke().data.std}
    plain = measured(run, forward(0), OriginalProtocol(**how)).miou
    assert report(run, "eval_original_few.json")["miou_last"] == plain
    script.main(["--run", str(run), "-e", "last", *windows, "eval.scales=[0.75, 1.0]", "eval.flip=true"])
    several = measured(run, forward(0), OriginalProtocol(**how, scales=(0.75, 1.0), flip=True)).miou
    assert report(run, "eval_original_few.json")["miou_last"] == several
    assert several != plain


def test_protocol_of_the_port(run: Path) -> None:
    windows = ["eval.protocol=port", "eval.crop_size=[48, 32]", "eval.stride=[24, 20]"]
    script.main(["--run", str(run), "-e", "last", *windows])
    expected = measured(run, forward(0), PortProtocol(crop_size=(48, 32), stride=(24, 20))).miou
    assert report(run, "eval_port_few.json")["miou_last"] == expected


def test_flags_of_the_original(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results"
    script.main(["--run", str(run), "-e", "last", "-d", "0-3", "-v", "-s", "-p", str(out)])
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: --")]
    assert [note.split(":")[1].strip() for note in notes] == ["--devices", "--verbose", "--show_image"]
    spec = load_spec("shapes")
    for item in spec.read_list(str(run.parent / "few.txt")):
        with Image.open(out / "gray" / f"{item.id}.png") as gray:
            pred = np.array(gray)
        np.testing.assert_array_equal(
            np.array(Image.open(out / "color" / f"{item.id}.png")), spec.palette[pred]
        )
    assert len(list((out / "gray").iterdir())) == 6


def test_check_takes_the_first(run: Path) -> None:
    reached = 100 * measured(run, forward(0)).miou
    command = ["--run", str(run), "--check", "expect.tolerance=0.5"]
    assert script.main([*command, f"expect.miou={reached + 0.4}"]) == 0
    assert script.main([*command, f"expect.miou={reached + 0.6}"]) == 1


def test_a_supervised_run_has_one_network(run: Path) -> None:
    cfg = smoke(config=SMOKE.with_name("smoke_sup.yaml"))
    save(run / "sup.pt", contents(cfg, 5))
    few = few_images(run.parent)
    script.main(["--checkpoint", str(run / "sup.pt"), few])
    with pytest.raises(UserError, match="method sup_only has no such network; use one of branch1"):
        script.main(["--checkpoint", str(run / "sup.pt"), "--network", "mean", few])


def test_mistakes_are_named(run: Path, tmp_path: Path) -> None:
    here = ["--run", str(run)]
    single = tmp_path / "single.pt"
    save(single, contents(smoke(), 5))
    other = tmp_path / "other.pt"
    save(other, load(run / "last.pt") | {"project": "u2pl"})
    authors = tmp_path / "epoch-33.pth"
    torch.save({"model": weights(0), "epoch": 33, "iteration": 1}, authors)
    (tmp_path / "model.pdparams").touch()
    mistakes = [
        ([*here, "-e", "5"], "--epochs 5: " + str(run) + " has kept those of 1, 2; choose among them"),
        ([*here, "-e", "3-"], "has kept those of 1, 2"),
        ([*here, "-e", "a-b"], "--epochs a-b: give last, N, A-B, A-, or a file .pt"),
        ([*here, "-e", "12x"], "--epochs 12x: give last"),
        ([*here, "-e", "last", "--checkpoint", str(single)], "name one of them; epochs are those of a run"),
        ([*here, "eval.protocol=port", "eval.stride=[99, 99]"], "stride (99, 99) is larger than the window"),
        (["--checkpoint", str(single), "--network", "branch2"], "holds no branch2; use --network branch1"),
        (["--checkpoint", str(single), "--network", "mean"], "holds no branch2; use --network branch1"),
        (["--checkpoint", str(other)], "other.pt: made by project 'u2pl'"),
        (["--checkpoint", str(authors)], "convert a file of the authors first: python convert.py"),
        (["--config", str(SMOKE), "-e", str(authors)], "convert a file of the authors first"),
        (["--checkpoint", str(tmp_path / "model.pdparams")], "PaddlePaddle weights of the port"),
        (["--checkpoint", str(tmp_path / "gone.pt")], "gone.pt: no such checkpoint"),
        (["--checkpoint", str(single), "model.inner_planes=8"], "do not fit"),
        (["-e", "20-34", "-d", "0-3"], "eval.py: nothing to measure; give --run RUN_DIR"),
    ]
    for command, message in mistakes:
        with pytest.raises(UserError) as error:
            script.main(command)
        assert message in str(error.value), command
        assert "\n" not in str(error.value)


def test_a_run_that_kept_nothing(run: Path) -> None:
    shutil.rmtree(run / "weights")
    with pytest.raises(UserError, match=r"has kept none; .* train with keep\.every_epochs=1"):
        script.main(["--run", str(run), "--epochs", "1-"])
    (run / "last.pt").unlink()
    with pytest.raises(UserError, match=r"holds neither best\.pt nor last\.pt; train first"):
        script.main(["--run", str(run)])


@pytest.mark.smoke
@pytest.mark.slow
def test_shell_script_with_two_processes(run: Path) -> None:
    script.main(["--run", str(run)])
    alone = report(run)
    (run / WHOLE).unlink()
    environment = os.environ | {
        "PYTHON": sys.executable, "PROCESSES": "2", "OMP_NUM_THREADS": "1", "SSS_DEVICE": "cpu"
    }  # fmt: skip
    command = ["sh", "eval.sh", str(run), "--epochs", "1-2"]
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [report(run)[key] for key in ("miou_epoch_1", "miou_epoch_2")] == [
        alone[key] for key in ("miou_epoch_1", "miou_epoch_2")
    ]
