"""Every recorded case, in float32 at its tolerance and in float64 at a fraction of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from projects.unimatch.tests.golden_adapters import ADAPTERS
from tests.golden_runner import FLOAT64_TIGHTEN, Case, float64_twins, load_cases, require_passed

FOLDER = Path(__file__).parent / "golden"

pytestmark = pytest.mark.golden


@pytest.mark.parametrize("case", load_cases(FOLDER), ids=lambda case: case.name)
def test_float32(case: Case) -> None:
    require_passed(case, ADAPTERS)


@pytest.mark.parametrize("case", float64_twins(load_cases(FOLDER, "float64")))
def test_float64_agrees_tighter(case: Case) -> None:
    require_passed(case, ADAPTERS, FLOAT64_TIGHTEN)


def test_every_recording_is_listed() -> None:
    listed = {case.spec["file"] for case in load_cases(FOLDER)}
    assert listed == {path.name for path in FOLDER.glob("*.npz")}
