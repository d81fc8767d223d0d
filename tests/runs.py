"""What tests of whole runs share: processes to start, checkpoints and metrics to compare."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
        "common.launch",
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
