"""The recorded losses, and the tool that compares them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from projects.u2pl import train
from projects.u2pl.losses import pseudo_label_loss
from projects.u2pl.tests import regress


def test_the_losses_are_those_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    code = regress.main([])
    said = capsys.readouterr().out.splitlines()
    assert code == 0, said
    assert said == [
        f"u2pl: 20 steps as recorded in losses_{name}cpu.txt (rtol 1e-05)" for name in ("ael_", "")
    ]


def test_the_recording_covers_what_it_is_for() -> None:
    """Burn-in, all terms alive, queues fed more than they hold."""
    steps = regress.read(regress.FOLDER / "losses_cpu.txt")
    assert len(steps) == 20
    assert ["loss_unsup" in step for step in steps] == [False] * 5 + [True] * 15
    assert all(step["loss_unsup"] > 0 and step["loss_contra"] > 0 for step in steps[5:])
    room = regress.TREE["method"]["queue_size_first"] + 4 * regress.TREE["method"]["queue_size"]
    assert sum(step.get("negatives", 0) for step in steps) > room


def test_the_recording_of_the_ael_variant_covers_what_it_is_for() -> None:
    steps = regress.read(regress.FOLDER / "losses_ael_cpu.txt")
    assert ["loss_contra" in step for step in steps] == [False] * 10 + [True] * 10
    assert all(step["loss_unsup"] > 0 and 0 < step["kept"] < 1 for step in steps)
    assert all(step["loss_contra"] > 0 for step in steps[12:])


def test_a_moved_number_is_found_where_it_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_default_dtype(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(train, "pseudo_label_loss", lambda *args: 1.0001 * pseudo_label_loss(*args))
    assert regress.main([]) == 1
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("u2pl: step 6: loss")
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
    monkeypatch.setattr(regress, "losses", lambda tree, device: [{"loss": 1.5}])
    assert regress.main(["--update", "--device", "cpu"]) == 0
    assert regress.main([]) == 0
    names = ("losses_ael_cpu.txt", "losses_cpu.txt")
    assert capsys.readouterr().out.splitlines() == [
        *(f"{name}: 1 steps recorded" for name in names),
        *(f"u2pl: 1 steps as recorded in {name} (rtol 1e-05)" for name in names),
    ]
