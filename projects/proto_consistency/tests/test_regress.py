"""The recorded losses of our own runs, and the tool that compares them."""

from __future__ import annotations

import pytest

from projects.proto_consistency import train
from projects.proto_consistency.losses import unsupervised_loss
from projects.proto_consistency.tests import regress


def test_the_losses_are_those_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    code = regress.main([])
    said = capsys.readouterr().out.splitlines()
    assert code == 0, said
    assert said == [
        f"proto_consistency: 20 steps as recorded in losses_{name}cpu.txt (rtol 1e-05)"
        for name in ("", "other_")
    ]


def test_the_recording_covers_what_it_is_for() -> None:
    """Prototypes in the supervised epoch, all terms alive, only some pixels sure."""
    steps = regress.read(regress.FOLDER / "losses_cpu.txt")
    assert len(steps) == 20
    assert ["loss_unsup" in one for one in steps] == [False] * 5 + [True] * 15
    assert all(one["loss_proto_sup"] > 0 for one in steps)
    assert all(one["loss_unsup"] > 0 and one["loss_proto_unsup"] > 0 for one in steps[5:])
    assert any(0 < one["confident"] < 0.9 for one in steps[5:])


def test_the_other_recording_covers_what_it_is_for() -> None:
    """Prototypes are clustered at the end of the supervised epoch; the share of pixels follows the entropy."""
    steps = regress.read(regress.FOLDER / "losses_other_cpu.txt")
    assert ["loss_proto_sup" in one for one in steps] == [False] * 5 + [True] * 15
    assert [round(one["confident"], 2) for one in steps[5::5]] == [0.85, 0.9, 0.95]


def test_a_moved_number_is_found_where_it_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "unsupervised_loss", lambda *args: 1.0001 * unsupervised_loss(*args))
    monkeypatch.setattr(regress, "TREES", {"": regress.TREE})
    assert regress.main([]) == 1
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("proto_consistency: step 6: loss")
    assert "--update" in said
