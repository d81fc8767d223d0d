"""What tests of `convert.py` share: files as the authors save them, and a run of the script."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.errors import UserError
from common.run.checkpoint import load

State = Mapping[str, Tensor]
Program = Callable[[Sequence[str]], int]


def authors_file(path: Path, **entries: Any) -> Path:
    """A file as the originals of U2PL and BRPG save it; the best mIoU is a NumPy number there."""
    about = {"epoch": 80, "optimizer_state": {"state": {}, "param_groups": []}, "best_miou": np.float64(0.7)}
    torch.save(about | entries, path)
    return path


def parallel(weights: State) -> dict[str, Tensor]:
    """The keys of a network that several processes trained."""
    return {f"module.{key}": value for key, value in weights.items()}


def in_few_bytes(weights: State) -> dict[str, Tensor]:
    """Zeros of the same shapes that take no place in a file."""
    return {key: value.new_zeros(()).expand(value.shape) for key, value in weights.items()}


def same(ours: State, theirs: State) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


class Converter:
    """The script of a project with a configuration; what it writes lies beside its source."""

    def __init__(self, program: Program, config: Path) -> None:
        self.program, self.config = program, config

    def __call__(self, source: Path, *arguments: str, config: Path | None = None) -> dict[str, Any]:
        """The checkpoint that a file becomes."""
        out = source.with_name("converted.pt")
        command = [str(source), "--config", str(config or self.config), "--out", str(out), *arguments]
        assert self.program(command) == 0
        return load(out)

    def refuses(self, mistakes: Iterable[tuple[Path, Sequence[str], str]]) -> None:
        """Each source with its arguments ends in one line that holds the words, and nothing is written."""
        for source, arguments, message in mistakes:
            with pytest.raises(UserError) as error:
                self(source, *arguments)
            assert message in str(error.value), message
            assert "\n" not in str(error.value)
            assert not source.with_name("converted.pt").exists()
