"""Models that `tools.export` has made: what they say about themselves, and how they run without any paper's code."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.data.transforms import to_normalized
from common.errors import UserError
from common.measure.evaluation import Protocol

INPUT, OUTPUT = "image", "scores"
FACTS = (  # what every model carries, each as JSON under its name
    "project", "network", "step", "input", "output", "classes", "palette", "mean", "std", "resize", "value_range",
    "protocol",
)  # fmt: skip

Scores = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Exported:
    """A model that was read from a file.

    Attributes:
        scores: photos (B, 3, H, W) float32, RGB on the scale 0..255 -> class scores (B, K, H, W) float32.
        facts: what the file says about itself, by the names of `FACTS`.
    """

    scores: Scores
    facts: Mapping[str, Any]

    def score(self, photo: NDArray[np.uint8]) -> Tensor:
        """Scores (1, K, H, W) of an RGB photo (H, W, 3) by the protocol that the run was measured with."""
        mean, std = (torch.tensor(self.facts[key])[:, None, None] for key in ("mean", "std"))
        protocol = Protocol(**{key: _tuples(value) for key, value in self.facts["protocol"].items()})
        x = to_normalized(photo, self.facts["mean"], self.facts["std"])[
            None
        ]  # for protocols pad with the mean
        return protocol.scores(lambda x: self.scores(x * std + mean), x)


def read_exported(path: Path, threads: int | None = None) -> Exported:
    """The ONNX model of a file that `tools.export` has made; `threads` of the CPU, None for all.

    Raises:
        UserError: no such file, not such a model, or the library that runs it is not installed.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such model; make one with python -m tools.export --run RUN --out {path}")
    runtime = require_library("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors only
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        texts = session.get_modelmeta().custom_metadata_map
        facts = {name: json.loads(texts[name]) for name in FACTS}
    except Exception as error:  # the library has no common error for foreign files
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(
            f"{path}: is no ONNX model of tools.export, or damaged ({lines[0]}); export it anew"
        ) from None

    def scores(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: x.numpy()})[0])

    return Exported(scores, facts)


def require_library(name: str) -> Any:
    """The module `onnxruntime` or another one of the extra `export`.

    Raises:
        UserError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            f"{name}: the library is not installed; run pip install 'semiseg[export]' or pip install {name}"
        ) from None


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
