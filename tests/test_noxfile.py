from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("nox", reason="nox is part of the dev extra")

import noxfile

ROOT = Path(__file__).resolve().parents[1]
SESSIONS = {
    "demo", "tests", "tests_slow", "lint", "types", "unit", "golden", "smoke", "regress", "bench", "study",
}  # fmt: skip


class RefusedError(Exception):
    pass


class Session:
    """Records what a session would run; an installation succeeds unless told otherwise."""

    def __init__(self, posargs: tuple[str, ...] = (), failing: str = "") -> None:
        self.posargs, self.failing = list(posargs), failing
        self.commands: list[list[str]] = []
        self.environments: list[dict[str, str]] = []
        self.log_lines: list[str] = []

    def run(self, *command: str, env: dict[str, str] | None = None, external: bool = False) -> None:
        assert external, "without it nox would refuse or warn about a program outside its environments"
        self.commands.append(list(command))
        self.environments.append(env or {})
        if self.failing and self.failing in command:
            raise RefusedError(f"{self.failing} failed")
        if "virtualenv" in command:
            (Path(command[-1]) / "bin").mkdir(parents=True)
            (Path(command[-1]) / "bin" / "python").symlink_to(sys.executable)

    def error(self, message: str) -> None:
        raise RefusedError(message)

    def log(self, message: str) -> None:
        self.log_lines.append(message)

    def chdir(self, folder: Path) -> None:
        assert folder == noxfile.ROOT


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout without an environment, run by an interpreter without torch; returns its `.venv`."""
    monkeypatch.delenv("PROJECT_PYTHON", raising=False)
    monkeypatch.setattr(noxfile, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(noxfile, "STAMP", tmp_path / ".venv" / "complete")
    monkeypatch.setattr(noxfile.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(noxfile.shutil, "which", lambda name: None)
    noxfile.choose.cache_clear()
    yield tmp_path / ".venv"
    noxfile.choose.cache_clear()


def test_all_sessions_are_there_and_make_no_environment_of_their_own() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nox", "-f", str(ROOT / "noxfile.py"), "--list"],
        capture_output=True,
        text=True,
        check=True,
    )
    names = re.findall(r"^[-*] (\S+) -> \S", done.stdout, flags=re.MULTILINE)
    smoke = {f"smoke({name})" for name in noxfile.PROJECTS}
    assert "u2pl" in noxfile.PROJECTS
    assert set(names) == SESSIONS - {"smoke"} | smoke
    assert all(getattr(noxfile, name).python is False for name in SESSIONS)


def test_the_interpreter_of_this_test_run_will_do() -> None:
    assert noxfile.shortcomings(sys.executable) == []


def test_what_an_interpreter_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert noxfile.shortcomings("/nowhere/python") == ["it cannot be run"]
    needs = [noxfile.Requirement("torch>=99"), noxfile.Requirement("no-such-thing>=1")]
    monkeypatch.setattr(noxfile, "requirements", lambda: needs)
    first, second = noxfile.shortcomings(sys.executable)
    assert first.startswith("torch ")
    assert first.endswith("is not >=99")
    assert second == "no-such-thing is missing"


def test_an_interpreter_with_everything_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROJECT_PYTHON", raising=False)
    monkeypatch.setattr(noxfile, "shortcomings", lambda python: [])
    noxfile.choose.cache_clear()
    session = Session()
    assert noxfile.python_of(session) == sys.executable
    assert session.commands == []
    noxfile.choose.cache_clear()


def test_project_python_overrides_and_is_never_replaced(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROJECT_PYTHON", "other-python")
    monkeypatch.setattr(noxfile, "shortcomings", lambda python: ["torch is missing"])
    with pytest.raises(
        RefusedError, match=r"other-python: torch is missing; run 'other-python -m pip install"
    ):
        noxfile.python_of(Session())
    assert not bare.exists()
    noxfile.choose.cache_clear()
    monkeypatch.setattr(noxfile, "shortcomings", lambda python: [])
    assert noxfile.python_of(Session()) == "other-python"


def test_the_environment_is_made_once(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = str(bare / "bin" / "python")
    first = Session()
    assert noxfile.python_of(first) == python
    make, install = first.commands
    assert make[1:3] == ["-m", "virtualenv"]
    assert install == [python, "-m", "pip", "install", "-e", ".[dev]"]
    second = Session()
    assert noxfile.python_of(second) == python
    assert second.commands == []
    monkeypatch.setattr(noxfile, "requirements", lambda: [noxfile.Requirement("torch>=99")])
    changed = Session()
    noxfile.python_of(
        changed
    )  # other requirements: completed, and as its interpreter does not run, made anew
    assert changed.commands[-1][-2:] == ["-e", ".[dev]"]


def test_an_interrupted_installation_is_repeated(bare: Path) -> None:
    with pytest.raises(RefusedError):
        noxfile.python_of(Session(failing="install"))
    assert not (bare / "complete").exists()
    again = Session()
    noxfile.python_of(again)
    (install,) = again.commands  # the environment itself is sound and is kept
    assert "install" in install
    assert (bare / "complete").is_file()


def test_uv_is_preferred_where_it_is(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noxfile.shutil, "which", lambda name: "/usr/bin/uv" if name == "uv" else None)
    session = Session()
    noxfile.python_of(session)
    assert session.commands[-1][:3] == ["/usr/bin/uv", "pip", "install"]


def test_an_unsupported_interpreter_looks_for_another(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        noxfile, "sys", SimpleNamespace(version_info=(3, 9, 0), executable="/usr/bin/python3.9")
    )
    with pytest.raises(RefusedError, match=r"Python .*3\.10.* is not installed"):
        noxfile.python_of(Session())
    monkeypatch.setattr(
        noxfile.shutil, "which", lambda name: f"/usr/bin/{name}" if name == "python3.11" else None
    )
    session = Session()
    noxfile.python_of(session)
    assert "/usr/bin/python3.11" in session.commands[0]


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noxfile, "python_of", lambda session: "PY")


def commands(session_function: Any, *posargs: str, **arguments: Any) -> list[list[str]]:
    session = Session(posargs)
    session_function.func(session, **arguments)
    for env in session.environments:
        assert env["PYTHONPATH"].split(":")[0] == str(ROOT)
    return session.commands


@pytest.mark.usefixtures("ready")
def test_what_the_sessions_run() -> None:
    (fast,), (slow,) = commands(noxfile.tests, "-x"), commands(noxfile.tests_slow, "-x")
    assert fast[:6] == ["PY", "-m", "pytest", "-m", "not slow", "-n"]
    assert fast[-1] == "-x"
    assert slow == [word.replace("not slow", "slow") for word in fast]  # between them nothing is left out
    (unit,) = commands(noxfile.unit)
    assert unit[-1] == "not golden and not smoke and not slow and not gpu"
    (smoke,) = commands(noxfile.smoke, project="u2pl")
    assert "projects/u2pl" in smoke
    assert "smoke and not slow" in smoke
    (golden,) = commands(noxfile.golden, "--golden-root", "elsewhere")
    assert golden[1:] == ["tests/golden_runner.py", "--golden-root", "elsewhere"]
    assert (ROOT / golden[1]).is_file()
    (study,) = commands(noxfile.study)
    assert (ROOT / study[4]).is_file()
    assert commands(noxfile.study, "report", "runs/x") == [["PY", "-m", "studies", "report", "runs/x"]]
    (demo,) = commands(noxfile.demo)
    assert (ROOT / demo[4]).is_file()
    assert len(commands(noxfile.lint)) == 2


def test_ci_runs_the_readme_s_test_command_then_lint_and_types() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert "set -euo pipefail" in lines
    assert [line.split(" -m ")[-1] for line in lines[-2:]] == ["nox -s tests tests_slow", "nox -s lint types"]
