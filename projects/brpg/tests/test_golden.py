"""Every recorded case, in float32 at its tolerance and in float64 at a fraction of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from projects.brpg.tests.golden_adapters import ADAPTERS
from tests.golden_runner import Case, load_cases, run_case

FOLDER = Path(__file__).parent / "golden"
FLOAT64_TIGHTEN = 0.6  # the recordings themselves are float32, so their own rounding stays in the difference

pytestmark = pytest.mark.golden


@pytest.mark.parametrize("case", load_cases(FOLDER), ids=lambda case: case.name)
def test_float32(case: Case) -> None:
    outcome, lines = run_case(case, ADAPTERS)
    assert outcome == "passed", "\n".join(lines)


@pytest.mark.parametrize("case", load_cases(FOLDER, "float64"), ids=lambda case: case.name)
def test_float64_agrees_tighter(case: Case) -> None:
    outcome, lines = run_case(case, ADAPTERS, tighten=FLOAT64_TIGHTEN)
    assert outcome == "passed", "\n".join(lines)


def test_every_recording_is_listed() -> None:
    listed = {case.spec["file"] for case in load_cases(FOLDER)}
    assert listed == {path.name for path in FOLDER.glob("*.npz")}
