"""Every recorded case, in float32 at its tolerance and in float64 at a fraction of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from projects.cps.tests.golden_adapters import ADAPTERS
from tests.golden_runner import Case, load_cases, run_case

FOLDER = Path(__file__).parent / "golden"
FLOAT64_TIGHTEN = 0.6  # the recordings themselves are float32, so their own rounding stays in the difference

pytestmark = pytest.mark.golden


def require_passed(case: Case, tighten: float) -> None:
    outcome, lines = run_case(case, ADAPTERS, tighten=tighten)
    if outcome == "skipped":  # the published lists may not be distributed
        pytest.skip(lines[0])
    assert outcome == "passed", "\n".join(lines)


@pytest.mark.parametrize("case", load_cases(FOLDER), ids=lambda case: case.name)
def test_float32(case: Case) -> None:
    require_passed(case, 1.0)


@pytest.mark.parametrize("case", load_cases(FOLDER, "float64"), ids=lambda case: case.name)
def test_float64_agrees_tighter(case: Case) -> None:
    require_passed(case, FLOAT64_TIGHTEN)


def test_every_recording_is_listed() -> None:
    listed = {case.spec["file"] for case in load_cases(FOLDER)}
    assert listed == {path.name for path in FOLDER.glob("*.npz")}
