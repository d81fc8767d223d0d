"""A run that is stopped and resumed is the run that was never stopped, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from common.config import load_config
from common.distributed import Dist
from projects.unimatch import train
from projects.unimatch.config import Config
from projects.unimatch.model import Networks
from projects.unimatch.tests.toys import VARIANTS
from tests.runs import (
    SEVERAL_RUNS,
    Runs,
    assert_same_run,
    differences,
    give_settings_back,
    launch_script,
    lines,
    saved,
    two_processes_are_refused,
    write_lists,
)
from tools.ports import free_port

_same_process_settings = pytest.fixture(autouse=True)(give_settings_back)
go = Runs(train.main)
MODELS: dict[str, dict[str, Any]] = {
    "resnet": {
        "backbone": "resnet_tiny",
        "width": 4,
        "inner_planes": 8,
        "low_planes": 4,
        "dilations": [1, 2, 3],
    },
    "dinov2": {"backbone": "dinov2_tiny"},
}


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few images of the embedded dataset: 4 labeled, 8 unlabeled, 4 to evaluate."""
    return write_lists(tmp_path_factory.mktemp("split"), 4, 8)


def write(
    path: Path, split: Path, variant: str, model: str = "resnet", **sections: Mapping[str, Any]
) -> Path:
    """A configuration of 3 epochs of 4 steps (supervised only: 2); sections add to it."""
    val = str(split / "val.txt")
    tree: dict[str, Any] = {
        "data": {"dataset": "shapes", "split": str(split), "val": val, "crop_size": [28, 28], "workers": 0},
        "optim": {"lr": 0.002, "head_lr_factor": 10.0, "epochs": 3, "batch_size": 2},
        "model": MODELS[model],
        "method": {"threshold": 0.2} | VARIANTS[variant],
        "eval": {"list": val},
        "run": {"log_interval": 2, "deterministic": True, "channels_last": False, "panels": False, "device": "cpu"},
    }  # fmt: skip
    if model == "dinov2":
        tree["optim"] |= {"optimizer": "adamw"}
    for name, values in sections.items():
        tree[name] = tree[name] | dict(values)
    path.write_text(yaml.safe_dump(tree))
    return path


def test_every_variant_stopped_in_an_epoch_and_a_log_interval(split: Path, tmp_path: Path) -> None:
    """Six steps are three and three."""
    cases = [(name, "resnet", {}) for name in VARIANTS] + [
        ("unimatch_v2", "dinov2", {}),
        ("unimatch", "resnet", {"optim": {"batch_size": 4, "device_batch": 2}}),
    ]
    for i, (variant, model, sections) in enumerate(cases):
        folder = tmp_path / str(i)
        folder.mkdir()
        config = write(folder / "c.yaml", split, variant, model, **sections)
        stop = 3 if variant != "sup_only" else 1
        go(config, folder / "whole", 2 * stop)
        go(config, folder / "parts", stop)
        assert saved(folder / "parts")["step"] == stop
        go(config, folder / "parts", 2 * stop)
        assert_same_run(folder / "whole", folder / "parts")


def test_the_compared_runs_use_everything(split: Path, tmp_path: Path) -> None:
    """The equality above would be cheap if a stream or the draws were asleep."""
    go(write(tmp_path / "c.yaml", split, "unimatch"), tmp_path / "v1", 6)
    go(write(tmp_path / "d.yaml", split, "unimatch_v2", "dinov2"), tmp_path / "v2", 6)
    for name, config, streams in (
        ("v1", "c", ("strong_1", "strong_2", "fp")),
        ("v2", "d", ("strong_1", "strong_2")),
    ):
        told = [line for line in lines(tmp_path / name) if "loss" in line]
        assert all(line[f"loss_{stream}"] > 0 for line in told for stream in streams)
        fresh = train.set_up(load_config(Config, tmp_path / f"{config}.yaml"), Dist())
        assert differences(fresh.draws.state_dict(), saved(tmp_path / name)["draws"][0])
    networks = saved(tmp_path / "v2")["networks"]
    assert differences(networks["student"], networks["teacher"])


def test_stopping_after_every_step_to_the_end(split: Path, tmp_path: Path) -> None:
    """Evaluations and the result included; the number of workers does not matter."""
    config = write(tmp_path / "c.yaml", split, "unimatch_v2")
    go(config, tmp_path / "whole")
    for steps in (1, 4, 5, 8, 11):
        go(config, tmp_path / "parts", steps, *(["data.workers=1"] if steps == 5 else []))
    assert not (tmp_path / "parts" / "result.json").exists()
    go(config, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    besides = ("/config/data/workers",)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", name="best.pt", besides=besides)
    results = [json.loads((tmp_path / d / "result.json").read_text()) for d in ("whole", "parts")]
    for one in results:
        del one["seconds"], one["peak_memory_bytes"]
    assert results[0] == results[1]


def test_statistics_are_shared_before_every_step(split: Path, tmp_path: Path, monkeypatch) -> None:
    """Processes with BatchNorm of their own begin every step, and every evaluation, with those of the first one."""
    calls: list[int] = []
    monkeypatch.setattr(Networks, "share_statistics", lambda nets, dist: calls.append(dist.rank))
    go(write(tmp_path / "c.yaml", split, "unimatch"), tmp_path / "run", 6)
    assert len(calls) == 6 + 1


def test_what_is_refused(split: Path, tmp_path: Path) -> None:
    """Other settings, by name; another number of processes; a run that has ended is only measured again."""
    config = write(tmp_path / "c.yaml", split, "unimatch")
    go(config, tmp_path / "run", 12)
    for override, words in (
        ("method.threshold=0.5", "method.threshold 0.2 -> 0.5"),
        ("quirks.late_rate=false", "quirks.late_rate True -> False"),
        ("model.width=8", "model.width 4 -> 8"),
    ):
        go.refused_by_name(tmp_path, override, words)
    two_processes_are_refused(train.set_up(load_config(Config, config), Dist()), saved(tmp_path / "run"))
    go.only_evaluated_again(tmp_path, 12)


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(split: Path, tmp_path: Path) -> None:
    """Eight steps and three plus five, of V1 and of V2 on both networks."""
    batch = {"optim": {"lr": 0.002, "epochs": 4, "batch_size": 4}}  # two steps an epoch and process
    cases = {"v1": ("unimatch", "resnet"), "v2": ("unimatch_v2", "resnet"), "dpt": ("unimatch_v2", "dinov2")}
    configs = {name: write(tmp_path / f"{name}.yaml", split, *how, **batch) for name, how in cases.items()}

    def words(name: str, run: str, steps: int) -> str:
        return "|".join(
            ["--config", str(configs[name]), f"run.dir={tmp_path / name / run}", f"run.max_steps={steps}"]
        )

    def all_runs(*runs: str) -> None:
        ports = " ".join(str(free_port()) for _ in runs)
        launch_script(tmp_path, SEVERAL_RUNS, *runs, TEST_PORTS=ports, TEST_PROGRAM="projects.unimatch.train")

    all_runs(*(words(name, run, steps) for name in configs for run, steps in (("whole", 8), ("parts", 3))))
    all_runs(*(words(name, "parts", 8) for name in configs))
    for name in configs:
        state = saved(tmp_path / name / "whole")
        assert not torch.equal(
            *(own["torch"] for own in state["draws"])
        )  # each process draws its own channels
        assert saved(tmp_path / name / "parts")["step"] == 8
        assert_same_run(tmp_path / name / "whole", tmp_path / name / "parts")
