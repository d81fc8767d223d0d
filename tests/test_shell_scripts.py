"""The projects' shell scripts: which program they start, with which arguments, from where. Nothing is trained here.

A stand-in for the interpreter (and for `srun`) writes down how it was called.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DEFAULTS = {
    "brpg": "configs/voc_classic_366_r101.yaml",
    "cps": "configs/voc_1323_r50_cps.yaml",
    "proto_consistency": "configs/voc_classic_366_r101.yaml",
    "s4gan_mlmt": "configs/voc_1322_r101.yaml",
    "u2pl": "configs/voc_classic_366_r101.yaml",
    "unimatch": "configs/voc_classic_92_r101.yaml",
}
SHELLS = [shell for shell in ("dash", "bash", "sh") if shutil.which(shell)]


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def recorder(path: Path) -> Path:
    """Says where it runs, what it may import from and each of its arguments on a line of its own."""
    return program(
        path, 'printf "%s\\n" "$PWD" "$PYTHONPATH" "${MASTER_PORT:-none}" "$@" >"$RECORD"; exit "${CODE:-0}"'
    )


@dataclass(frozen=True)
class Project:
    name: str
    default: str

    @property
    def folder(self) -> Path:
        return ROOT / "projects" / self.name

    def launched(self, port: str, script: str, *arguments: str, processes: str = "1") -> list[str]:
        start = ["-m", "tools.launch", "--processes", processes, "--port", port]
        module = ["--module", f"projects.{self.name}.{script}", "--"]
        return [str(self.folder), str(ROOT), "none", *start, *module, *arguments]


class Called:
    def __init__(self, folder: Path, project: Project) -> None:
        self.folder, self.project = folder, project
        self.env = {
            "PATH": os.environ["PATH"],
            "PYTHON": str(recorder(folder / "interpreter with space")),
            "RECORD": str(folder / "record"),
        }

    def __call__(
        self, *command: str | Path, cwd: Path | None = None, using: str = "sh", **env: str
    ) -> list[str]:
        self.done = subprocess.run(
            [using, *map(str, command)],
            cwd=cwd or self.project.folder, env=self.env | env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        record = self.folder / "record"
        lines = record.read_text(encoding="utf-8").splitlines() if record.exists() else []
        record.unlink(missing_ok=True)
        return lines


@pytest.fixture(params=DEFAULTS)
def project(request: pytest.FixtureRequest) -> Project:
    return Project(request.param, DEFAULTS[request.param])


@pytest.fixture
def called(tmp_path: Path, project: Project) -> Called:
    return Called(tmp_path, project)


def test_every_project_is_here() -> None:
    assert sorted(DEFAULTS) == sorted(path.parent.name for path in ROOT.glob("projects/*/train.sh"))


@pytest.mark.parametrize("using", SHELLS)
def test_train_starts_the_launcher(called: Called, project: Project, using: str) -> None:
    lines = called(
        "train.sh", "2", "29500", "configs/smoke.yaml", "optim.lr=0.1", "data.root=/a b", using=using
    )
    arguments = ("--config", "configs/smoke.yaml", "optim.lr=0.1", "data.root=/a b")
    assert lines == project.launched("29500", "train", *arguments, processes="2")


def test_train_has_a_default_config(called: Called, project: Project) -> None:
    assert called("train.sh", "1", "0") == project.launched("0", "train", "--config", project.default)
    lines = called("train.sh", "1", "0", "run.seed=3")
    assert lines == project.launched("0", "train", "--config", project.default, "run.seed=3")


def test_config_is_looked_up_where_the_user_is_then_in_the_project(
    called: Called, project: Project, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").touch()
    train = project.folder / "train.sh"
    here = called(train, "1", "0", "mine.yaml", cwd=tmp_path)
    assert here == project.launched("0", "train", "--config", f"{tmp_path}/mine.yaml")
    there = called(train, "1", "0", "configs/smoke.yaml", cwd=tmp_path)
    assert there == project.launched("0", "train", "--config", "configs/smoke.yaml")
    absolute = called(train, "1", "0", tmp_path / "mine.yaml", cwd=ROOT)
    assert absolute == project.launched("0", "train", "--config", f"{tmp_path}/mine.yaml")


@pytest.mark.parametrize("arguments", [(), ("1",), ("", "29500")])
def test_missing_arguments_show_the_usage(called: Called, arguments: tuple[str, ...]) -> None:
    assert called("train.sh", *arguments) == []
    assert called.done.returncode != 0
    assert "usage: sh train.sh NUM_PROCESSES PORT [CONFIG] [section.key=value ...]" in called.done.stderr


def test_exit_code_and_earlier_pythonpath_are_kept(called: Called) -> None:
    lines = called("train.sh", "1", "0", CODE="7", PYTHONPATH="/mine")
    assert called.done.returncode == 7
    assert lines[1] == f"{ROOT}:/mine"


def test_eval_takes_a_config_a_run_or_a_checkpoint(called: Called, project: Project, tmp_path: Path) -> None:
    (tmp_path / "runs" / "a" / "seed2").mkdir(parents=True)
    (tmp_path / "best.pt").touch()
    script = project.folder / "eval.sh"

    def evaluated(*arguments: str) -> list[str]:
        return called(script, *arguments, cwd=tmp_path)

    def expected(*arguments: str) -> list[str]:
        return project.launched("0", "eval", *arguments)

    assert evaluated() == expected("--config", project.default)
    assert evaluated("eval.list=test") == expected("--config", project.default, "eval.list=test")
    assert evaluated("configs/smoke.yaml") == expected("--config", "configs/smoke.yaml")
    assert evaluated("runs/a/seed2") == expected("--run", f"{tmp_path}/runs/a/seed2")
    assert evaluated("runs/b/seed2", "--network", "mean") == expected(
        "--run", "runs/b/seed2", "--network", "mean"
    )
    assert evaluated("configs/smoke.yaml", "best.pt", "eval.list=test", "--save", "out") == expected(
        "--config", "configs/smoke.yaml", "--checkpoint", f"{tmp_path}/best.pt", "eval.list=test", "--save", "out"
    )  # fmt: skip


def test_eval_shares_the_images_over_processes(called: Called, project: Project) -> None:
    lines = called("eval.sh", "configs/smoke.yaml", PROCESSES="2", PORT="29501")
    assert lines == project.launched("29501", "eval", "--config", "configs/smoke.yaml", processes="2")


@pytest.mark.parametrize(
    ("gpus", "per_node", "env"), [("4", "4", {}), ("16", "8", {}), ("4", "2", {"GPUS_PER_NODE": "2"})]
)
def test_slurm_starts_one_task_per_gpu(
    called: Called, project: Project, tmp_path: Path, gpus: str, per_node: str, env: dict[str, str]
) -> None:
    recorder(tmp_path / "bin" / "srun")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    lines = called(
        "slurm_train.sh", gpus, "29500", "gpu", "configs/smoke.yaml", "optim.lr=0.1", PATH=path, **env
    )
    assert lines[:3] == [str(project.folder), str(ROOT), "29500"]
    for option in (
        "--partition=gpu",
        f"--ntasks={gpus}",
        f"--ntasks-per-node={per_node}",
        f"--gres=gpu:{per_node}",
    ):
        assert option in lines
    command = lines[lines.index(called.env["PYTHON"]) :]
    assert command[1:] == [
        "-u",
        "-m",
        f"projects.{project.name}.train",
        "--config",
        "configs/smoke.yaml",
        "optim.lr=0.1",
    ]


def copy_of_the_repository(folder: Path, project: Project) -> Path:
    for name in ("tools/find_python.sh", "tools/train.sh", f"projects/{project.name}/train.sh"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder / "projects" / project.name / "train.sh"


def without_torch(path: Path) -> Path:
    return program(path, "exit 1")


def with_torch(path: Path) -> Path:
    record = 'echo "$0" >"$RECORD"'
    return program(path, f'if [ "$1" != -c ]; then {record}; fi')


def test_first_python_with_torch_is_taken(called: Called, project: Project, tmp_path: Path) -> None:
    train = copy_of_the_repository(tmp_path / "repository", project)
    tools = tmp_path / "bin"
    path = f"{tools}:/usr/bin:/bin"
    environment = with_torch(tmp_path / "repository" / ".venv" / "bin" / "python")
    without_torch(tools / "python")
    without_torch(tools / "python3")
    assert called(train, "1", "0", PYTHON="", PATH=path) == [str(environment)]
    third = with_torch(tools / "python3")
    assert called(train, "1", "0", PYTHON="", PATH=path) == [str(third)]
    first = with_torch(tools / "python")
    assert called(train, "1", "0", PYTHON="", PATH=path) == [str(first)]


def test_no_python_with_torch_is_one_line(called: Called, project: Project, tmp_path: Path) -> None:
    train = copy_of_the_repository(tmp_path / "repository", project)
    for name in ("python", "python3"):
        without_torch(tmp_path / "bin" / name)
    assert called(train, "1", "0", PYTHON="", PATH=f"{tmp_path / 'bin'}:/usr/bin:/bin") == []
    assert called.done.returncode == 2
    assert called.done.stderr.startswith(
        "error: python: no interpreter with torch found; run 'pip install nox"
    )
    assert called.done.stderr.count("\n") == 1
