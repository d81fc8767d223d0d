"""The comparison of recorded losses that every project's `regress.py` uses."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import UserError
from tests import regression


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        ([{"loss": 1.0}, {"loss": 2.0}], None),
        ([{"loss": 1.0 + 9e-6}, {"loss": 2.0 - 1.9e-5}], None),
        (
            [{"loss": 1.0}, {"loss": 2.0001}],
            "step 2: loss is 2.0001, recorded 2.0 (relative difference 5.0e-05)",
        ),
        ([{"loss": float("nan")}, {"loss": 2.0}], "step 1: loss is nan"),
        ([{"loss": 1.0}], "1 steps, recorded 2"),
        ([{"loss": 1.0, "kept": 1.0}, {"loss": 2.0}], "step 1: logged loss, kept; recorded loss"),
    ],
)
def test_first_difference(ours: list[dict[str, float]], words: str | None) -> None:
    found = regression.first_difference(ours, [{"loss": 1.0}, {"loss": 2.0}], 1e-5)
    assert found is None if words is None else words in found


def test_recordings_are_read_as_written(tmp_path: Path) -> None:
    steps = [{"loss": 0.1 + 0.2, "lr": 1e-7}, {"loss": 3.0}]
    regression.write(tmp_path / "losses.txt", steps)
    assert regression.read(tmp_path / "losses.txt") == steps
    assert (tmp_path / "losses.txt").read_text().startswith("1 loss=0.30000000000000004 lr=1e-07\n2 ")


def test_a_missing_recording_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="record it with --update"):
        regression.read(tmp_path / "losses_cuda.txt")
