"""The recorded losses, and the tool that compares them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from projects.brpg import step
from projects.brpg.losses import PrototypeTerms, prototype_loss
from projects.brpg.tests import regress


def test_the_losses_are_those_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    code = regress.main([])
    said = capsys.readouterr().out.splitlines()[-1]
    assert code == 0, said
    assert said == "brpg: 20 steps as recorded in losses_cpu.txt (rtol 1e-05)"


def test_the_recording_covers_what_it_is_for() -> None:
    """Burn-in, all terms alive, queues fed more than they hold."""
    steps = regress.read(regress.FOLDER / "losses_cpu.txt")
    assert len(steps) == 20
    assert ["loss_unsup" in step for step in steps] == [False] * 5 + [True] * 15
    assert ["loss_proto" in step for step in steps] == [False] * 10 + [True] * 10
    assert all(step["loss_unsup"] > 0 for step in steps[5:])
    assert all(step["loss_proto"] > 0 for step in steps[10:])
    room = regress.CLASSES * regress.TREE["method"]["queue_size"]
    assert sum(step["collected_high"] for step in steps[5:10]) > room
    assert all(step["collected_low"] > 0 for step in steps[5:10])


def slightly_more(*args: Any, **settings: Any) -> PrototypeTerms:
    found = prototype_loss(*args, **settings)
    return found._replace(labeled=1.0001 * found.labeled)


def test_a_moved_number_is_found_where_it_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_default_dtype(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(step, "prototype_loss", slightly_more)
    assert regress.main([]) == 1
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("brpg: step 11: loss")
    assert "--update" in said
    assert before == (
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
    )


def test_update_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(regress, "FOLDER", tmp_path)
    monkeypatch.setattr(regress, "losses", lambda device: [{"loss": 1.5}])
    assert regress.main(["--update", "--device", "cpu"]) == 0
    assert regress.main([]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "losses_cpu.txt: 1 steps recorded",
        "brpg: 1 steps as recorded in losses_cpu.txt (rtol 1e-05)",
    ]
