"""What made a number: the source files that a project's training can reach, versions, devices, the command."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import tokenize
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL
import torch

from common.config import to_dict
from common.distributed import Dist

ROOT = Path(__file__).resolve().parents[1]


def config_hash(config: Any, without: Sequence[str] = ("run", "expect")) -> str:
    """First 12 hex digits of a sha256 over the sections that decide what is learned; where data lie does not."""
    tree = {key: value for key, value in to_dict(config).items() if key not in without}
    if "data" in tree:
        tree["data"]["root"] = None
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


def code_of(config: object) -> dict[str, str]:
    """Source files by name with their hashes: `train.py` beside the class of `config`, and all that it imports.

    Comments and blank lines do not count; a file that no import reaches, such as a README, does not either.
    """
    return _reached(type(config).__module__.rsplit(".", 1)[0] + ".train")


@cache
def _reached(module: str) -> dict[str, str]:
    waiting, found = [module], {}
    while waiting:
        path = _file_of(waiting.pop())
        name = path.relative_to(ROOT).as_posix() if path else ""
        if path and name not in found:
            text = path.read_text(encoding="utf-8")
            found[name] = hashlib.sha256(_without_comments(text).encode()).hexdigest()[:12]
            waiting += _imported(ast.parse(text))
    return dict(sorted(found.items()))


def _file_of(module: str) -> Path | None:
    """The file of a module of this repository; None of other modules, and of names within a module."""
    base = ROOT.joinpath(*module.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def _imported(tree: ast.AST) -> Iterator[str]:
    """Modules that are imported anywhere in a file, also within functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def _without_comments(text: str) -> str:
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _git(*arguments: str) -> str | None:
    """Output of a git command in the repository, or None where git or the repository is missing."""
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _versions() -> dict[str, str]:
    """Versions of Python and of the libraries that can move a number."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    found |= {"pillow": PIL.__version__, "opencv": cv2.__version__}
    return found | {"torchvision": importlib.metadata.version("torchvision")}  # to import it takes seconds


def environment(dist: Dist) -> dict[str, Any]:
    """What a reader needs to judge or repeat a run: code, versions, devices, processes, command. No user names."""
    status = _git("status", "--porcelain", "--untracked-files=no")
    gpus = torch.cuda.device_count()
    words = [Path(sys.executable).name, *sys.orig_argv[1:]]
    home = str(Path.home())
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "versions": _versions(),
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(index) for index in range(gpus)] or [platform.machine()],
        "device": str(dist.device),
        "world_size": dist.world_size,
        "backend": dist.backend,
        "launcher": dist.launcher,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "platform": platform.platform(terse=True),
        "command": shlex.join(words).replace(home, "~") if len(home) > 1 else shlex.join(words),
    }


def peak_memory_bytes(dist: Dist) -> int:
    """Most memory used so far by this process: on a GPU what torch held there, otherwise resident memory."""
    if dist.device.type == "cuda":
        return torch.cuda.max_memory_allocated(dist.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
