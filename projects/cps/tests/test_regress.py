"""The recorded losses, and that a moved number is found."""

from __future__ import annotations

import pytest
import torch

from projects.cps import losses
from projects.cps.losses import cross_pseudo_supervision
from projects.cps.tests import regress
from projects.cps.tests.toys import METHODS
from tests.regression import read


def test_the_losses_are_those_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    code = regress.main([])
    said = capsys.readouterr().out.splitlines()
    said = [line for line in said if line.startswith("cps: ")]
    assert code == 0, said
    assert said == [
        f"cps: {method}: 12 steps as recorded in losses_{method}_cpu.txt (rtol 1e-05)" for method in METHODS
    ]


def test_the_recording_covers_what_it_is_for() -> None:
    """All terms alive, and more than one epoch of five steps."""
    for method in METHODS:
        steps = read(regress.FOLDER / f"losses_{method}_cpu.txt")
        assert len(steps) == 12
        late = {key: value for step in steps[5:] for key, value in step.items() if key.startswith("loss")}
        assert all(value > 0 for value in late.values()), (method, late)
        assert len({step["loss"] for step in steps}) == 12


def test_a_moved_number_is_found_where_it_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_default_dtype(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(regress, "METHODS", ("sup_only", "cps"))
    monkeypatch.setattr(
        losses, "cross_pseudo_supervision", lambda *args: 1.0001 * cross_pseudo_supervision(*args)
    )
    assert regress.main([]) == 1
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cps: ")]
    assert "as recorded" in said[0]
    assert said[1].startswith("cps: cps: step 1: loss")
    assert "--update" in said[1]
    assert before == (
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
    )
