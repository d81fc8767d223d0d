from __future__ import annotations

from pathlib import Path

import pytest

from tests.each import for_each


@for_each("part", ["a", "b"])
@for_each(("name", "value"), [("right", 1), ("wrong", 0), ("odd", "1"), ("not raised", None)])
def rule(part: str, name: str, value: int, tmp_path: Path) -> None:
    assert tmp_path.is_dir()
    if value is None:
        with pytest.raises(ValueError, match="one"):
            pass
    assert 1 / value == 1, "not one"


def test_all_offenders_are_named(tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as caught:
        rule(tmp_path=tmp_path)
    told = [line.partition(":") for line in str(caught.value).splitlines()]
    cases = ["wrong, 0", "odd, 1", "not raised, None"]
    assert [name for name, *_ in told] == ["2 of 2", "a", *cases, "b", *cases]
    assert told[2][2] == " ZeroDivisionError: division by zero"


def test_nothing_to_go_through_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="nothing to go through: name"):
        for_each("name", [])
