"""Which code made a number: every source file that a project's training can reach, with its hash."""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


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
