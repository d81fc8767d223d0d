"""The loop as a program: its log, a stop request, a dry run, protocols, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import load_config
from common.errors import UserError
from projects.s4gan_mlmt import train
from projects.s4gan_mlmt.config import Config
from projects.s4gan_mlmt.evaluation import Measured, full_resolution, protocol
from projects.s4gan_mlmt.model import Segmenter
from projects.s4gan_mlmt.tests import toys
from projects.s4gan_mlmt.tests.test_resume import go, split, write
from tests.each import for_each
from tests.runs import lines, saved

CONFIGS = Path(train.__file__).parent / "configs"
EVERY_RUN = {"step", "epoch", "lr", "loss", "loss_sup", "nonfinite", "images_per_s"}
LOGGED = {"sup_only": EVERY_RUN, "s4gan": EVERY_RUN | {"loss_fm", "loss_st", "loss_d", "kept"}}

__all__ = ["split"]  # the fixture


@pytest.mark.parametrize("method", ["sup_only", "s4gan"])
def test_what_is_logged(method: str, split: Path, tmp_path: Path) -> None:
    go(
        write(tmp_path / "c.yaml", split, method, run={"log_interval": 1, "device": "cpu"}),
        tmp_path / "run",
        3,
    )
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [set(row) for row in rows] == [LOGGED[method]] * 3
    for row in rows:
        parts = sum(row[key] for key in row if key.startswith("loss_"))
        assert row["loss"] == pytest.approx(parts, rel=1e-5)
        assert row["nonfinite"] == 0
    log = (tmp_path / "run" / "train.log").read_text()
    assert "5 labeled" in log
    assert "4 steps x 3 epochs = 12 steps" in log


def test_a_stop_request_ends_after_the_step_and_saves(
    split: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = write(tmp_path / "c.yaml", split, "s4gan")
    step = train.train_step

    def signalled(*args: Any) -> Any:
        if args[2].step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    monkeypatch.setattr(train, "train_step", signalled)
    go(config, tmp_path / "run")
    assert saved(tmp_path / "run")["step"] == 3
    assert not (tmp_path / "run" / "result.json").exists()
    assert "stopped after step 3" in (tmp_path / "run" / "train.log").read_text()


def test_dry_run_forecasts_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--config",
        str(CONFIGS / "smoke.yaml"),
        "run.dry_run=true",
        f"run.dir={tmp_path / 'r'}",
        "run.device=cpu",
    ]
    assert train.main(words) == 0
    forecast = r"dry run: peak memory [\d.]+ GiB per process, \d+ ms per step, [\d.]+ images/s, about \w+ for 6 steps"
    assert re.search(forecast, capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_ends_the_run_with_the_last_good_state(split: Path, tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", split, "s4gan")
    words = ["optim.lr=1e30", "run.save_interval=1"]
    with pytest.raises(UserError, match=r"step \d+: .*is (nan|inf).*last good checkpoint: .*last.pt"):
        go(config, tmp_path / "run", None, *words)
    state = saved(tmp_path / "run")
    assert state["step"] >= 1
    assert all(value.isfinite().all() for value in state["networks"]["discriminator"].values())


@pytest.mark.parametrize("method", ["sup_only", "s4gan"])
def test_half_precision(method: str, split: Path, tmp_path: Path) -> None:
    """The networks run in bfloat16; losses and scores stay close to those of float32."""
    found = {}
    for precision in ("fp32", "bf16"):
        config = write(tmp_path / "c.yaml", split, method, run={"log_interval": 1, "device": "cpu"})
        go(config, tmp_path / precision, 1, f"run.precision={precision}", "method.dropout=0")
        found[precision] = lines(tmp_path / precision)[0]
    assert found["bf16"] != found["fp32"]
    for key in (k for k in found["fp32"] if k.startswith("loss")):
        assert found["bf16"][key] == pytest.approx(found["fp32"][key], rel=0.05, abs=0.01)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.crop_size=[8, 8]", "the discriminator needs at least 16 pixels per side"),
        ("model.d_pool=[20, 20]", "does not fit the map 2x2 that a crop of 32x32 leaves"),
        ("optim.device_batch=3", "use a divisor of 4"),
        ("optim.unlabeled_batch_size=3", "cannot be shared by 1 processes x 2 forwards"),
    ],
)
def test_batches_and_crops_that_do_not_fit(split: Path, tmp_path: Path, override: str, words: str) -> None:
    optim = {"batch_size": 4, "unlabeled_batch_size": 4, "device_batch": 2}
    config = write(tmp_path / "c.yaml", split, "s4gan", optim=optim)
    with pytest.raises(UserError) as caught:
        go(config, tmp_path / "run", 1, override)
    assert words in str(caught.value)


# --- evaluation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pipeline", "kind", "beside"),
    [
        ("voc", "original", None),
        ("pascal_context", "original", (1.0,)),
        ("cityscapes", "original", (0.5,)),
        ("house", "whole_image", None),
    ],
)
def test_protocols(pipeline: str, kind: str, beside: tuple[float, ...] | None) -> None:
    """The authors' sizes have a figure at full resolution beside them."""
    data = {"dataset": "voc", "split": "full", "pipeline": pipeline}
    cfg = toys.config(data=data)
    for when in ("training", "script"):
        assert protocol(cfg, when).kind == kind
    found = full_resolution(cfg)
    assert (None if found is None else found.scales) == beside
    shared = toys.config(data=data, eval={"protocol": "whole_image"})
    assert protocol(shared, "script").kind == "whole_image"
    assert full_resolution(shared) is None


def test_cityscapes_is_measured_with_the_channels_it_learned_from() -> None:
    segmenter = Segmenter(torch.nn.Identity())
    x = torch.rand(1, 3, 4, 6)
    assert torch.equal(Measured(segmenter, "voc").predict(x), x)
    assert torch.equal(Measured(segmenter, "cityscapes").predict(x), x.flip(1))


@for_each("name", sorted(path.name for path in CONFIGS.glob("[!_]*.yaml")))
def test_configurations_can_be_read(name: str) -> None:
    cfg = load_config(Config, CONFIGS / name)
    assert cfg.optim.steps == cfg.optim.epochs * cfg.optim.steps_per_round


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["smoke", "smoke_sup"])
def test_smoke(name: str, tmp_path: Path) -> None:
    run = tmp_path / name
    assert train.main(["--config", str(CONFIGS / f"{name}.yaml"), f"run.dir={run}", "run.device=cpu"]) == 0
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == 6
    assert ("fusion" in result) is (name == "smoke")
    assert [line["step"] for line in lines(run) if "loss" in line] == [1, 2, 3, 4, 5, 6]
