"""The real shell scripts: train, stop, resume, evaluate, predict; one process, two, Slurm's environment."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.data.dataset_yaml import load_spec
from tests.runs import Commands, losses, result

run = Commands("proto_consistency")
PROJECT = run.folder
README = (PROJECT / "README.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.smoke


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("processes", ["1", "2"])
def test_train_stop_resume_evaluate_predict(tmp_path: Path, processes: str) -> None:
    """The whole documented way, from another working directory; the stop is before the clustering."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    script = str(PROJECT / "train.sh")
    run("sh", script, processes, "0", "configs/smoke.yaml", f"run.dir={whole}", cwd=tmp_path)
    out = run("sh", script, processes, "0", "configs/smoke.yaml", f"run.dir={parts}", "run.max_steps=3")
    assert "stopped after step 3" in out
    assert not (parts / "result.json").exists()
    out = run("sh", script, processes, "0", "configs/smoke.yaml", f"run.dir={parts}")
    assert "own last checkpoint" in out
    assert losses(parts) == losses(whole)
    assert result(parts)["last"] == result(whole)["last"]

    out = run("sh", "eval.sh", str(parts))
    assert f"{100 * result(parts)['miou_last']:.2f}" in out
    assert f"{100 * result(parts)['proto_last']['miou']:.2f}" in out
    # the published tensor is that of the first process, also where each has its own
    both = json.loads((parts / "eval_whole_image_val_teacher_proto.json").read_text())
    assert both["last"]["iou"] == result(parts)["proto_last"]["iou"]

    spec = load_spec("shapes")
    photos = tmp_path / "photos"
    photos.mkdir()
    for item in spec.read_list("test")[:2]:
        Image.fromarray(spec.load_image(item)).save(photos / f"{item.id}.png")
    arguments = ["--run", str(parts), "--input", str(photos), "--out", str(tmp_path / "masks")]
    run(sys.executable, "predict.py", *arguments)
    masks = sorted(p for p in (tmp_path / "masks").glob("*.png"))
    assert len(masks) == 2
    for mask in masks:
        with Image.open(mask) as image:
            assert image.mode == "P"
            assert np.asarray(image).max() < spec.num_classes


def test_stage_before_cluster_train(tmp_path: Path) -> None:
    """The documented three commands of a published setting, on the embedded dataset."""
    stage, file, main = tmp_path / "stage", tmp_path / "prototypes.npz", tmp_path / "main"
    run("sh", "train.sh", "1", "0", "configs/smoke_sup.yaml", f"run.dir={stage}")
    assert result(stage)["method"] == "sup_only"
    program = [sys.executable, "cluster.py", "--config", "configs/smoke.yaml", "--out", str(file)]
    run(*program, "--checkpoint", str(stage / "best.pt"))
    chosen = ["method.proto.source=file", f"method.proto.init_path={file}"]
    out = run("sh", "train.sh", "1", "0", "configs/smoke.yaml", f"run.dir={main}", "run.max_steps=5", *chosen)
    assert str(file) in out
    assert all(row["loss_proto_sup"] > 0 for row in rows(main) if "loss" in row)  # from the first step on


def test_mean_teacher(tmp_path: Path) -> None:
    run(
        "sh", "train.sh", "1", "0", "configs/smoke.yaml", f"run.dir={tmp_path / 'run'}", "method.proto=null",
        "eval.head=linear", "run.panels=false",
    )  # fmt: skip
    assert result(tmp_path / "run")["method"] == "mean_teacher"
    assert "prototype_usage" not in result(tmp_path / "run")


def test_logged_keys_are_those_of_the_readme(tmp_path: Path) -> None:
    arguments = ["configs/smoke.yaml", f"run.dir={tmp_path / 'run'}", "run.pseudo_images=4"]
    run("sh", "train.sh", "1", "0", *arguments)
    logged = {key for row in rows(tmp_path / "run") for key in row}
    table = README.split("## What is logged")[1].split("##")[0]
    explained = {
        key
        for row in table.splitlines()
        if row.startswith("| `")
        for key in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    assert logged - {"pseudo_accuracy"} == explained - {"pseudo_accuracy"}  # left out where nothing is kept


def test_the_same_losses_however_it_is_launched(tmp_path: Path) -> None:
    """Plain python, torchrun, and the variables that srun sets."""
    arguments = ["--config", "configs/smoke.yaml", "run.max_steps=2", "run.log_interval=1"]
    run(sys.executable, "train.py", *arguments, f"run.dir={tmp_path / 'plain'}")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--master-port", "0", "--nproc-per-node", "1"]
    module = ["-m", "projects.proto_consistency.train"]
    run(*torchrun, *module, *arguments, f"run.dir={tmp_path / 'torchrun'}")
    slurm = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0",
             "SLURM_JOB_NODELIST": "localhost", "SLURM_STEP_ID": "0"}  # fmt: skip
    run(sys.executable, "train.py", *arguments, f"run.dir={tmp_path / 'slurm'}", **slurm)
    assert losses(tmp_path / "plain")
    assert losses(tmp_path / "plain") == losses(tmp_path / "torchrun") == losses(tmp_path / "slurm")


@pytest.mark.parametrize("source", ["warmup_end", "file"])
def test_dry_run_forecasts_and_leaves_nothing(tmp_path: Path, source: str) -> None:
    """Without prototypes: they are not made yet in the one case, and are not there in the other."""
    arguments = ["--config", "configs/smoke.yaml", "run.dry_run=true", f"run.dir={tmp_path / 'r'}"]
    out = run(sys.executable, "train.py", *arguments, f"method.proto.source={source}")
    assert re.search(
        r"dry run: peak memory [\d.]+ GiB per process, [\d.]+ images/s, about \w+ for \d+ steps", out
    )
    assert list(tmp_path.iterdir()) == []
