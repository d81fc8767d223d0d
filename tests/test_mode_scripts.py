"""The original's `train_semi.py` and `train_sup.py`: their flags, and what they refuse."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from common.errors import UserError
from projects.brpg import train_semi as brpg_semi
from projects.brpg import train_sup as brpg_sup
from projects.u2pl import train_semi as u2pl_semi
from projects.u2pl import train_sup as u2pl_sup

SCRIPTS = {"brpg": (brpg_semi, brpg_sup), "u2pl": (u2pl_semi, u2pl_sup)}

both = pytest.mark.parametrize(("semi", "sup"), SCRIPTS.values(), ids=list(SCRIPTS))


def config(script: ModuleType, name: str) -> str:
    return str(Path(str(script.__file__)).parent / "configs" / name)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Path]]:
    """The configurations and run directories that the scripts give to `train.py`."""
    seen: list[tuple[Any, Path]] = []
    for scripts in SCRIPTS.values():
        for script in scripts:
            caught = replace(script.SCRIPTS, train=lambda cfg, run_dir, _: seen.append((cfg, run_dir)))
            monkeypatch.setattr(script, "SCRIPTS", caught)
    return seen


@both
def test_a_configuration_of_the_other_mode_is_refused(semi: ModuleType, sup: ModuleType) -> None:
    ours, other = config(sup, "smoke.yaml"), config(sup, "smoke_sup.yaml")
    with pytest.raises(UserError) as error:
        sup.main(["--config", ours])
    assert str(error.value) == (
        f"{ours}: method.mode is semi, but train_sup.py trains sup_only; use train_semi.py or {other}"
    )
    with pytest.raises(UserError) as error:
        semi.main(["--config", other])
    assert str(error.value) == (
        f"{other}: method.mode is sup_only, but train_semi.py trains semi; use train_sup.py or {ours}"
    )


def test_the_baseline_of_the_variant_is_that_of_the_plain_method() -> None:
    assert u2pl_semi.SCRIPTS.twin(Path("configs/smoke_ael.yaml"), "sup_only") == "configs/smoke_sup.yaml"


@both
def test_original_flags_become_overrides(
    semi: ModuleType, sup: ModuleType, calls: list[tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("MASTER_PORT", "1")  # put back afterwards
    path = config(semi, "smoke.yaml")
    command = ["--local_rank=0", f"--config={path}", "--seed", "5", "--port", "29511", "optim.lr=0.5"]
    assert semi.main(command) == 0
    ((cfg, run_dir),) = calls
    assert (cfg.run.seed, cfg.optim.lr) == (5, 0.5)
    assert run_dir.resolve() == Path(path).parents[1] / "runs" / "smoke" / "seed5"
    assert os.environ["MASTER_PORT"] == "29511"


@both
def test_a_launchers_port_wins_over_the_flag(
    semi: ModuleType, sup: ModuleType, calls: list[tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert sup.main(["--config", config(sup, "smoke_sup.yaml"), "--local-rank", "0", "--port", "29511"]) == 0
    assert os.environ["MASTER_PORT"] == "29500"
    assert len(calls) == 1


@both
@pytest.mark.parametrize(
    ("text", "sections"),
    [
        ("dataset: {type: pascal}\ntrainer: {epochs: 80}\nnet: {num_classes: 21}\n", "dataset, trainer, net"),
        ("dataset: {type: coco}\ntrainer: {epochs: 3}\ncriterion_2: {}\n", "dataset, trainer, criterion_2"),
    ],
)
def test_configurations_of_the_original_are_recognized(
    semi: ModuleType, sup: ModuleType, text: str, sections: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=rf"written for the original code \(sections {sections}"):
        semi.main(["--config", str(path)])
