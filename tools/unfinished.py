"""What a stopped command has done already, so that the same command goes on with the rest."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.data.files import write_bytes
from common.errors import writing


def stamp(path: Path) -> list[Any] | None:
    """What tells whether a file is the one of before: place, size, time of its last change; None without one."""
    try:
        found = path.stat()
    except OSError:
        return None
    return [str(path.resolve()), found.st_size, found.st_mtime_ns]


class Unfinished:
    """Results by name, one JSON line each as soon as it is there; the file goes when all are.

    Args:
        path: Of the file.
        depends: What the results depend on; a file that was written under other conditions counts for nothing.

    Attributes:
        done: What was there at the start.

    Raises:
        UserError: The file cannot be written.
    """

    def __init__(self, path: Path, depends: Mapping[str, Any]) -> None:
        self.path, self.done = path, dict[str, Any]()
        head = json.dumps(depends, sort_keys=True, default=str)
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        if lines[:1] == [head]:
            for line in lines[1:]:
                with contextlib.suppress(ValueError):  # the last one may be cut
                    self.done |= json.loads(line)
        kept = [head, *(json.dumps({name: result}) for name, result in self.done.items())]
        write_bytes(path, ("\n".join(kept) + "\n").encode())

    def add(self, name: str, result: Any) -> None:
        """Keep a result.

        Raises:
            UserError: The file cannot be written.
        """
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps({name: result})}\n")

    def finish(self) -> None:
        """All is done."""
        self.path.unlink(missing_ok=True)
