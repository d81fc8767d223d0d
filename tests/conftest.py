"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = Path(os.environ.get("SSS_SHARED", ROOT.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"genuine sample files are not there: {folder} (set SSS_SHARED)")
    return folder


@pytest.fixture(scope="session")
def published_lists() -> Path:
    default = ROOT.parent / "shared" / "data" / "published_lists"
    folder = Path(os.environ.get("SSS_PUBLISHED_LISTS", default))
    if not folder.is_dir():
        pytest.skip(f"published lists are not there: {folder} (set SSS_PUBLISHED_LISTS)")
    return folder
