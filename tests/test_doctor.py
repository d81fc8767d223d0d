from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from tools import doctor

ROOT = Path(__file__).resolve().parents[1]


def test_the_command_prints_one_block_and_exits_0(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "SSS_DATA": str(tmp_path / "absent")}
    done = subprocess.run(
        [sys.executable, "-m", "tools.doctor"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.startswith(" ")][:5] == [
        "system",
        "packages",
        "devices",
        "data",
        "tools",
    ]
    assert lines[-1] == "missing: nothing"
    assert f"  SSS_DATA: {tmp_path / 'absent'} (NO SUCH FOLDER)" in lines
    for name in doctor.DATASETS:
        assert any(line.startswith(f"  {name}: ") for line in lines), name
    assert any(line.startswith("  shapes: generated in memory") for line in lines)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.PACKAGES, "not-there", "not_there")
    text = doctor.report({})
    assert "not-there: MISSING (No module named 'not_there'); run pip install 'not-there'" in text
    assert text.splitlines()[-1] == "missing: not-there"


def test_every_dependency_is_looked_for() -> None:
    listed = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    assert listed is not None
    needed = re.findall(r'^    "([\w-]+)>=', listed[1], re.M)
    assert len(needed) >= 11
    assert {name.lower() for name in needed} == {name.lower() for name in doctor.PACKAGES}


def test_split_folders_are_counted(tmp_path: Path) -> None:
    for name in ("classic/92", "classic/183", "random/1_8"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "labeled.txt").write_text("a\n")
    assert doctor.count_splits(tmp_path) == 3
    assert doctor.count_splits(tmp_path / "absent") == 0


def test_arguments_are_refused() -> None:
    with pytest.raises(UserError, match="unknown argument '--fix'"):
        doctor.main(["--fix"])
