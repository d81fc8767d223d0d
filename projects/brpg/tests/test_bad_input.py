"""Mistakes that only BRPG can be given; what all projects refuse is tested by `tests/test_bad_input.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from projects.brpg import train
from projects.brpg.tests.toys import write_config
from tests.mistakes import Fails, expect


@pytest.fixture
def fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Fails:
    return Fails(train.main, write_config, tmp_path, monkeypatch, capfd)


def test_class_that_does_not_exist(fails: Fails) -> None:
    expect(fails("method.fix_classes=[7]"), "method.fix_classes: class 7", "0 to 2")


def test_too_few_features_for_the_clustering(fails: Fails) -> None:
    line = fails("method.scarce_classes=stop", "method.high_threshold=1", "method.pseudo_threshold=1")
    expect(line, "clustering: class 'meadow'", "method.collect_epochs", "method.scarce_classes=fewer")
