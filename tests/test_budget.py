"""Recorded launches and memory of the methods' steps: what is recorded, and that a slower step is seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from projects.unimatch import bench
from tests.rehearsal import budget
from tests.rehearsal.runs import MATRIX, Case, config_of

SMALL = Case("unimatch", "smoke")


def test_more_launches_and_more_memory_are_seen() -> None:
    kept, original = [], bench.train_step

    def train_step(batch: Any, *rest: Any) -> Any:
        found = original(batch, *rest)
        kept.append(found.total + 1)  # two launches
        kept.append(torch.empty(1 << 20, device=found.total.device) + 1)
        return found

    plain = budget.costs(SMALL)
    assert budget.differences(plain, plain) == []
    with mock.patch.object(bench, "train_step", train_step):
        moved = budget.differences(budget.costs(SMALL), plain)
    assert sorted(line.split(": ")[1].split(" is ")[0] for line in moved) == ["added", "mib"]


def test_steps_that_only_one_side_has_are_named() -> None:
    own = {"added": 100.0}
    lines = budget.differences({"a": own, "b": own}, {"b": {"added": 102.5}, "c": own})
    assert lines == ["a: not in both", "c: not in both", "b: added is 100, recorded 102.5"]
    assert budget.differences({"b": own}, {"b": {"added": 101.9}}) == []


def test_a_record_is_read_as_written(tmp_path: Path) -> None:
    found = {"u2pl voc optim.batch_size=4 full step": {"networks": 1959.0, "mib": 19677.2}}
    budget.write(tmp_path / "budget.txt", found)
    assert budget.read(tmp_path / "budget.txt") == found


def methods(cases: list[Case]) -> set[tuple[object, ...]]:
    """The semi-supervised methods among cases."""
    found = set()
    for case in cases:
        method = config_of(case, case.changes).method
        name, mode = getattr(method, "name", "semi"), getattr(method, "mode", "semi")
        if "sup_only" not in (name, mode):
            ael, views = getattr(method, "ael", None) is not None, getattr(method, "strong_views", None)
            found.add((case.project, name, ael, views, case.phase == "mlmt"))
    return found


def test_every_method_is_recorded() -> None:
    assert methods(budget.CASES) == methods(MATRIX)
    steps = budget.read(budget.RECORD)
    for case in budget.CASES:
        assert any(name.startswith(f"{case} ") for name in steps), case
    assert any("collection" in name for name in steps)
    assert any("prototype" in name for name in steps)


@pytest.mark.slow
def test_no_step_has_moved(capsys: pytest.CaptureFixture[str]) -> None:
    code = budget.main(())
    assert not code, capsys.readouterr().out
