"""Sessions: `nox -s demo`, `nox -s tests`, `nox --list`; all share one environment.

torch is several gigabytes, so no session makes an environment of its own. The interpreter that runs nox is used if
it has everything; otherwise `.venv` beside this file is made once. PROJECT_PYTHON names another interpreter.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import nox
from nox.project import load_toml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / "complete"
PROJECTS = sorted(path.parent.name for path in ROOT.glob("projects/*/train.py"))
MODULES = {  # of distributions whose module has another name
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "pytest-xdist": "xdist",
    "pyyaml": "yaml",
}
PROBE = """
import importlib, json, sys
from importlib import metadata
late = {"timm": "timm", "segmentation_models_pytorch": "segmentation-models-pytorch"}  # take seconds to import
found = {"python": "%d.%d.%d" % sys.version_info[:3]}
for name in sys.argv[2:]:
    try:
        if name in late:
            found[name] = metadata.version(late[name])
            continue
        module = importlib.import_module(name)
        found[name] = str(getattr(module, "__version__", "unknown"))
        if name == "common" and not module.__file__.startswith(sys.argv[1]):
            found[name] = None
    except Exception:
        found[name] = None
print(json.dumps(found))
"""

nox.options.sessions = ["lint", "types", "tests"]


def requirements() -> list[Requirement]:
    """What the project needs, its tools included; type stubs have no module and are left out."""
    project = load_toml(ROOT / "pyproject.toml")["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    return [Requirement(line) for line in lines if not line.startswith("types-")]


def supported() -> SpecifierSet:
    """Python versions that the project runs on."""
    return SpecifierSet(load_toml(ROOT / "pyproject.toml")["project"]["requires-python"])


def environment(**more: str) -> dict[str, str]:
    """The caller's environment with this checkout first on the path, so that a bare clone works."""
    former = os.environ.get("PYTHONPATH")
    path = f"{ROOT}{os.pathsep}{former}" if former else str(ROOT)
    return {**os.environ, "PYTHONPATH": path, **more}


def shortcomings(python: str) -> list[str]:
    """What an interpreter lacks to run every session; empty if it will do."""
    needed = {MODULES.get(need.name, need.name.replace("-", "_")): need for need in requirements()}
    try:
        done = subprocess.run(
            [python, "-c", PROBE, str(ROOT), "common", *needed],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ["it cannot be run"]
    found = json.loads(done.stdout.splitlines()[-1])
    lacking = []
    if found["python"] not in supported():
        lacking.append(f"Python {found['python']} is not {supported()}")
    if found["common"] is None:
        lacking.append("cannot import the project from this checkout")
    for module, need in needed.items():
        version = found[module]
        if version is None:
            lacking.append(f"{need.name} is missing")
        elif version[0].isdigit() and not need.specifier.contains(version, prereleases=True):
            lacking.append(f"{need.name} {version} is not {need.specifier}")
    return lacking


def fingerprint() -> str:
    """Changes when the requirements do, so that an environment made for others is completed."""
    lines = sorted(str(need) for need in requirements())
    return hashlib.sha256("\n".join([str(ROOT), *lines]).encode()).hexdigest()


def base_python() -> str | None:
    """An interpreter of a supported version to make the environment from: this one, or the newest on PATH."""
    if "{}.{}.{}".format(*sys.version_info[:3]) in supported():
        return sys.executable
    return next(filter(None, (shutil.which(f"python3.{minor}") for minor in (13, 12, 11, 10))), None)


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """Keeps a second nox waiting while the first one installs."""
    handle = os.open(ROOT, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def starts(python: str) -> bool:
    """Whether the interpreter can be run at all; one that it was made from may have been removed since."""
    try:
        return subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def make_environment(session: nox.Session) -> str:
    """Complete `.venv` unless it is already; the stamp is written last, so an interrupted install is repeated."""
    python = str(VENV / "bin" / "python")
    with only_one():
        sound = starts(python)
        if sound and STAMP.is_file() and STAMP.read_text(encoding="utf-8") == fingerprint():
            return python
        STAMP.unlink(missing_ok=True)
        if not sound:
            base = base_python()
            if base is None:
                session.error(
                    f"Python {supported()} is not installed; install one, or set PROJECT_PYTHON to it"
                )
            session.run(sys.executable, "-m", "virtualenv", "--clear", "-p", base, str(VENV), external=True)
        session.log("installing the project into .venv (once; torch is large, this takes some minutes)")
        uv = shutil.which("uv")
        pip = [uv, "pip", "install", "--python", python] if uv else [python, "-m", "pip", "install"]
        session.run(*pip, "-e", ".[dev]", external=True)
        STAMP.write_text(fingerprint(), encoding="utf-8")
    return python


@functools.cache
def choose(chosen: str | None, own: str) -> tuple[str | None, list[str]]:
    """The interpreter for all sessions, or None where `.venv` must serve, and what the tried one lacks."""
    candidate = chosen or own
    if (
        not chosen and importlib.util.find_spec("torch") is None
    ):  # the usual case, told without starting anything
        return None, ["torch is missing"]
    lacking = shortcomings(candidate)
    return (None if lacking else candidate), lacking


def python_of(session: nox.Session) -> str:
    """The interpreter to use; makes the environment if there is none."""
    chosen = os.environ.get("PROJECT_PYTHON")
    python, lacking = choose(chosen, sys.executable)
    if python is not None:
        return python
    if chosen:
        session.error(
            f"{chosen}: {'; '.join(lacking)}; run '{chosen} -m pip install -e .[dev]' or unset PROJECT_PYTHON"
        )
    session.log(f"{sys.executable}: {'; '.join(lacking)}; using .venv")
    return make_environment(session)


def run(session: nox.Session, *arguments: str, **variables: str) -> None:
    """Run a module or script of the project in the shared environment, from the root of the checkout."""
    session.chdir(ROOT)
    session.run(python_of(session), *arguments, env=environment(**variables), external=True)


def workers() -> str:
    """Test processes: one per core, up to eight."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return str(min(cores, 8))


def pytest(session: nox.Session, marks: str, *arguments: str) -> None:
    """Run the tests with these marks on all cores."""
    spread = ("-n", workers(), "--dist", "worksteal")
    run(session, "-m", "pytest", "-m", marks, *spread, *arguments, *session.posargs, OMP_NUM_THREADS="1")


def having(path: str) -> Sequence[str]:
    """Projects that have the file `path`."""
    return [name for name in PROJECTS if (ROOT / "projects" / name / path).is_file()]


@nox.session(python=False)
def demo(session: nox.Session) -> None:
    """Train a supervised baseline and U2PL on the embedded images and open the comparison: some minutes."""
    run(session, "-m", "studies", "run", "studies/shapes_demo.yaml", "--report", *session.posargs)


@nox.session(python=False)
def tests(session: nox.Session) -> None:
    """Everything that can fail on a change: unit, golden and smoke tests on all cores."""
    pytest(session, "not slow")


@nox.session(python=False)
def tests_slow(session: nox.Session) -> None:
    """The rest: runs that are killed many times, two processes beside one, every launcher, float64 twins."""
    pytest(session, "slow")


@nox.session(python=False)
def unit(session: nox.Session) -> None:
    """The fast tests alone."""
    run(session, "-m", "pytest", "-m", "not golden and not smoke and not slow and not gpu", *session.posargs)


@nox.session(python=False)
def golden(session: nox.Session) -> None:
    """Compare with values recorded from the authors' code: `nox -s golden -- [--golden-root DIR] [--project P]`."""
    run(session, "tests/golden_runner.py", *session.posargs)


@nox.session(python=False)
@nox.parametrize("project", PROJECTS, ids=PROJECTS)
def smoke(session: nox.Session, project: str) -> None:
    """The real shell scripts of a project for a few steps: `nox -s smoke`, or `nox -s "smoke(u2pl)"` for one."""
    pytest(session, "smoke and not slow", f"projects/{project}")


@nox.session(python=False)
def regress(session: nox.Session) -> None:
    """Losses of short runs, launches and memory of a step against those recorded: `-- [--update] [--device cuda]`."""
    for project in having("tests/regress.py") or session.error("no project has tests/regress.py"):
        run(session, "-m", f"projects.{project}.tests.regress", *session.posargs)
    run(session, "-m", "tests.rehearsal.budget", *session.posargs, OMP_NUM_THREADS="1")


@nox.session(python=False)
def bench(session: nox.Session) -> None:
    """Images/s of the loader, of the networks and of the full step, and peak memory."""
    for project in having("bench.py") or session.error("no project has bench.py"):
        run(session, "-m", f"projects.{project}.bench", *session.posargs)


@nox.session(python=False)
def study(session: nox.Session) -> None:
    """Train and report a study: studies/shapes.yaml; `-- run studies/camvid.yaml --report`, or camvid_labels.yaml."""
    run(session, "-m", "studies", *(session.posargs or ["run", "studies/shapes.yaml", "--report"]))


@nox.session(python=False)
def lint(session: nox.Session) -> None:
    """Ruff: rules and format."""
    run(session, "-m", "ruff", "check", ".")
    run(session, "-m", "ruff", "format", "--check", ".")


@nox.session(python=False)
def types(session: nox.Session) -> None:
    """Mypy, strict."""
    run(session, "-m", "mypy", *session.posargs)
