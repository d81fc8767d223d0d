"""The recorded losses, and that a moved number is found."""

from __future__ import annotations

import pytest

from projects.unimatch import train
from projects.unimatch.losses import kept_share
from projects.unimatch.tests import regress


def test_the_losses_are_those_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    code = regress.main([])
    said = capsys.readouterr().out.splitlines()
    assert code == 0, said
    assert said == [
        f"unimatch: 20 steps as recorded in losses_{name}cpu.txt (rtol 1e-05)" for name in ("", "v2_")
    ]


def test_the_recordings_cover_what_they_are_for() -> None:
    """All streams are alive for most of the time, and never keep everything."""
    first, second = (regress.read(regress.FOLDER / f"losses_{name}cpu.txt") for name in ("", "v2_"))
    for steps, streams in (
        (first, ("loss_strong_1", "loss_strong_2", "loss_fp")),
        (second, ("loss_strong_1",)),
    ):
        assert len(steps) == 20
        assert all(sum(step[name] > 0 for step in steps) >= 12 for name in streams)
        assert all(step["kept"] < 1 for step in steps)
    assert not any("loss_fp" in step for step in second)


def test_a_moved_number_is_found_where_it_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "kept_share", lambda *args: kept_share(*args) + 1e-4)
    monkeypatch.setattr(regress, "TREES", {"": regress.TREE})
    assert regress.main([]) == 1
    assert "unimatch: step 1: kept" in capsys.readouterr().out
