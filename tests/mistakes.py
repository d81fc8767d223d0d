"""What tests of mistakes share: a run of a tiny configuration that must end in one clear line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from common.errors import run_main
from tests.tiny import write_dataset

ROOT = Path(__file__).resolve().parents[1]
Program = Callable[[list[str]], int]
Writer = Callable[..., Path]


@lru_cache(maxsize=1)
def _written() -> tuple[TemporaryDirectory[str], Path]:
    folder = TemporaryDirectory(prefix="farm")
    return folder, write_dataset(Path(folder.name))


def dataset(folder: Path) -> Path:
    """The tiny dataset, to be spoilt; a copy takes a part of the time that drawing it takes."""
    _, written = _written()
    shutil.copytree(written.parent, folder)
    return folder / written.name


def failure(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    program: Program,
    *arguments: str,
    besides: tuple[str, ...] = (),
) -> list[str]:
    """The error lines of a program in this process; lines that start as `besides` may stand beside them."""
    monkeypatch.setattr(sys, "argv", ["program.py", *arguments])
    monkeypatch.delenv("SSS_DATA", raising=False)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_main(program)
    said = capfd.readouterr().err.splitlines()
    lines = [line for line in said if "warning" not in line.lower() and not line.startswith(besides)]
    assert stop.value.code == 2
    assert lines
    assert all(line.startswith("error: ") for line in lines), lines
    return lines


def expect(line: str, *parts: str) -> None:
    missing = [part for part in parts if part not in line]
    assert not missing, f"{missing} not in: {line}"


class Fails:
    """Runs a project's tiny configuration with changed sections or overrides and returns the error line.

    Attributes:
        farm: The dataset of the run, this test's own.
        folder: Holds the dataset, the configuration and the run directory `run`.
    """

    def __init__(
        self,
        program: Program,
        write: Writer,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
        besides: tuple[str, ...] = (),
    ) -> None:
        self.program, self.write, self.folder = program, write, folder
        self.monkeypatch, self.capfd, self.besides = monkeypatch, capfd, besides
        self.farm = dataset(folder / "farm")

    def __call__(
        self, *overrides: str, dataset: Path | None = None, split: str = "few", **sections: Any
    ) -> str:
        (line,) = self.all(*overrides, dataset=dataset, split=split, **sections)
        return line

    def all(
        self, *overrides: str, dataset: Path | None = None, split: str = "few", **sections: Any
    ) -> list[str]:
        """The error lines where several things are wrong at once."""
        config = self.write(self.folder / "c.yaml", dataset or self.farm, split, **sections)
        return self.all_of(
            self.program, "--config", str(config), f"run.dir={self.folder / 'run'}", *overrides
        )

    def of(self, program: Program, *arguments: str) -> str:
        """The error line of another program."""
        (line,) = self.all_of(program, *arguments)
        return line

    def all_of(self, program: Program, *arguments: str) -> list[str]:
        """The error lines of another program."""
        return failure(self.monkeypatch, self.capfd, program, *arguments, besides=self.besides)


def shell(project: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The project's `train.sh` as users start it."""
    env: Mapping[str, str] = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        ["sh", str(ROOT / "projects" / project / "train.sh"), *arguments],
        capture_output=True, text=True, timeout=120, check=False, env=env,
    )  # fmt: skip
