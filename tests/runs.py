"""What tests of whole runs share: processes to start, checkpoints and metrics to compare."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.distributed import Dist
from common.errors import UserError
from common.run.log import RunLog
from common.run.session import Session
from common.run.state import Run

ROOT = Path(__file__).resolve().parents[1]
NOT_OF_THE_RUN = ("/config/run/", "/log/seconds", "/log/metrics_bytes")

# each argument is a run: words separated by |; every run has a port of its own
SEVERAL_RUNS = """
    import importlib
    import os
    from common.errors import run_main

    def main(argv):
        train = importlib.import_module(os.environ["TEST_PROGRAM"])
        for port, words in zip(os.environ["TEST_PORTS"].split(), argv, strict=True):
            os.environ["MASTER_PORT"] = port
            train.main(words.split("|"))

    if __name__ == "__main__":
        run_main(main)
"""


def launch(processes: int, module: str, *arguments: str, folder: Path | None = None, **env: str) -> str:
    """Output of a module with `main(argv)` that gloo processes run; it may lie in `folder`."""
    path = os.pathsep.join(map(str, (ROOT, folder) if folder else (ROOT,)))
    command = [
        sys.executable,
        "-m",
        "tools.launch",
        "--processes",
        str(processes),
        "--port",
        "0",
        module,
        "--",
    ]
    done = subprocess.run(
        [*command, *arguments],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "SSS_DEVICE": "cpu"} | env,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def launch_script(folder: Path, script: str, *arguments: str, processes: int = 2, **env: str) -> str:
    """As `launch`, for a program given as text."""
    (folder / "script_of_the_test.py").write_text(textwrap.dedent(script), encoding="utf-8")
    return launch(processes, "script_of_the_test", *arguments, folder=folder, **env)


def saved(run_dir: Path, name: str = "last.pt") -> dict[str, Any]:
    return torch.load(run_dir / name, weights_only=True)


def lines(run_dir: Path, after: int = 0) -> list[dict[str, Any]]:
    """The metrics without the speed."""
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in found if line["step"] > after]


def differences(one: Any, two: Any, where: str = "") -> list[str]:
    """Paths of the leaves that are not bit for bit the same."""
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        keys, missing = [*one, *(key for key in two if key not in one)], object()
        pairs = [(k, one.get(k, missing), two.get(k, missing)) for k in keys]
        return [d for k, a, b in pairs for d in differences(a, b, f"{where}/{k}")]
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)) and len(one) == len(two):
        pairs = [(i, a, b) for i, (a, b) in enumerate(zip(one, two, strict=True))]
        return [d for i, a, b in pairs for d in differences(a, b, f"{where}/{i}")]
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        same = one.dtype == two.dtype and one.shape == two.shape and torch.equal(one, two)
        return [] if same else [where]
    return [] if type(one) is type(two) and one == two else [where]


def assert_same_run(
    first: Path, second: Path, after: int = 0, name: str = "last.pt", besides: tuple[str, ...] = ()
) -> None:
    """Checkpoints and metrics are equal but for what does not belong to the run, and `besides`."""
    found = differences(saved(first, name), saved(second, name))
    assert not [path for path in found if not path.startswith((*NOT_OF_THE_RUN, *besides))]
    assert lines(first, after) == lines(second, after)


# --- runs in this process --------------------------------------------------------------------------------------


def give_settings_back() -> Iterator[None]:
    """Runs in this process switch deterministic algorithms on; for a fixture that gives them back."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def write_lists(folder: Path, labeled: int, unlabeled: int, val: int = 4) -> Path:
    """Lists of so many images of the embedded dataset."""
    first = {"labeled": (0, labeled), "unlabeled": (10, unlabeled), "val": (400, val)}
    for name, (start, count) in first.items():
        (folder / f"{name}.txt").write_text("".join(f"{i:06d}\n" for i in range(start, start + count)))
    return folder


class Runs:
    """Runs of a training script in this process."""

    def __init__(self, program: Callable[[list[str]], int]) -> None:
        self.program = program

    def __call__(self, config: Path, run_dir: Path, steps: int | None = None, *overrides: str) -> None:
        """One run up to `steps`, with whatever the generators happen to hold before."""
        random.seed(os.urandom(8))
        np.random.seed(int.from_bytes(os.urandom(3), "big"))  # noqa: NPY002
        torch.seed()
        limit = [] if steps is None else [f"run.max_steps={steps}"]
        assert self.program(["--config", str(config), f"run.dir={run_dir}", *limit, *overrides]) == 0

    def refused(self, config: Path, run_dir: Path, *overrides: str) -> str:
        """The message of a run that cannot start; no checkpoint is touched."""
        before = {path: path.read_bytes() for path in run_dir.rglob("*.pt")}
        with pytest.raises(UserError) as caught:
            self(config, run_dir, None, *overrides)
        message = str(caught.value)
        assert "\n" not in message
        assert {path: path.read_bytes() for path in run_dir.rglob("*.pt")} == before
        return message

    def refused_by_name(self, folder: Path, override: str, words: str) -> None:
        """The run in `folder` is not resumed with another setting."""
        message = self.refused(folder / "c.yaml", folder / "run", override)
        assert message.startswith(f"{folder / 'run' / 'last.pt'}: made with other settings: ")
        assert words in message
        assert "run.init" in message

    def only_evaluated_again(self, folder: Path, steps: int) -> None:
        """The run in `folder`, once it has ended after so many steps."""
        run_dir = folder / "run"
        self(folder / "c.yaml", run_dir)
        files, metrics = {path: path.read_bytes() for path in run_dir.rglob("*.pt")}, lines(run_dir)
        before = result(run_dir)
        self(folder / "c.yaml", run_dir)
        assert {path: path.read_bytes() for path in run_dir.rglob("*.pt")} == files
        assert lines(run_dir) == metrics
        assert result(run_dir)["miou"] == before["miou"]
        assert f"finished already ({steps} steps)" in (run_dir / "train.log").read_text()


def assert_two_processes_are_refused(restore: Callable[..., Any], state: Any, contents: Any) -> None:
    """What one process has written, read by each of two."""
    for rank in (0, 1):
        log = RunLog(None, Dist(), total_steps=1, images_per_step=1)
        with pytest.raises(UserError, match=r"written by 1 process\(es\), this run has 2"):
            restore(state, contents, "last.pt", log, Dist(rank=rank, world_size=2))


def two_processes_are_refused(run: Run, contents: Any) -> None:
    """What one process has written, read by each of two."""
    for rank in (0, 1):
        run.dist = Dist(rank=rank, world_size=2)
        with pytest.raises(UserError, match=r"written by 1 process\(es\), this run has 2"):
            Session(run, "any", None).restore(contents, "last.pt")


# --- commands --------------------------------------------------------------------------------------------------

OF_A_LAUNCHER = re.compile(r"(SLURM|MASTER|RANK|WORLD_SIZE|LOCAL_|SSS_)")


class Commands:
    """Commands of users, started in a project's folder without what a launcher has set."""

    def __init__(self, project: str, seconds: float = 240, **environment: str) -> None:
        self.folder, self.seconds = ROOT / "projects" / project, seconds
        self.environment = {
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        } | environment

    def __call__(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """Output of a command that must succeed."""
        plain = {key: value for key, value in os.environ.items() if not OF_A_LAUNCHER.match(key)}
        done = subprocess.run(
            command, cwd=cwd or self.folder, env=plain | self.environment | environment,
            capture_output=True, text=True, timeout=self.seconds, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout


def result(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "result.json").read_text())


def losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in lines(run_dir) if "loss" in line]
