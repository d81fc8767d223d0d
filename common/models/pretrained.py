"""Weight files into encoders and networks, with an account of every key.

Reads torchvision files (plain stem), the deep-stem ImageNet files of the originals, their training
checkpoints, and our own. Nothing is loaded in part without saying so: a tensor that the file does not
provide is an error unless its prefix was named.
"""

from __future__ import annotations

import _codecs
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from common.errors import UserError, reason

# where a file keeps its network, best first: the evaluation scripts of the originals prefer the teacher
WRAPPERS = ("teacher_state", "model_state", "networks.teacher", "networks.student", "state_dict", "model")
_ENCODER = "encoder."
_SHOWN = 3


@dataclass(frozen=True)
class LoadReport:
    """What became of every key when weights were loaded.

    Attributes:
        source: File, and the part of it that was read.
        used: Names of the module's tensors that were set.
        unused: Names in the file that the module has no place for, as written there.
        missing: Names of the module's tensors that kept their values because the caller allowed it.
        mismatched: The part of `missing` that the file has in another shape, with both shapes.
    """

    source: str
    used: tuple[str, ...]
    unused: tuple[str, ...]
    missing: tuple[str, ...]
    mismatched: tuple[str, ...]

    def summary(self) -> str:
        """One line with the counts and the first names of each kind."""
        parts = [f"{len(self.used)} tensors used", _count(self.unused, "unused")]
        parts.append(_count(self.missing, "kept their initial values"))
        if self.mismatched:
            parts.append(_count(self.mismatched, "of another shape"))
        return f"{self.source}: {', '.join(parts)}"


def bare_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` without the prefixes that wrapped networks (`module.`, `_orig_mod.`) have left in a file's keys.

    Raises:
        UserError: If two names become equal.
    """
    bare = {re.sub(r"^(module\.)+", "", key.replace("_orig_mod.", "")): value for key, value in state.items()}
    if len(bare) < len(state):
        raise UserError("weights: a name occurs with and without 'module.'; keep one of them")
    return bare


def read_tensors(path: Path, what: str) -> dict[str, Any]:
    """Contents of a file of tensors, on the CPU, after a check of every byte; never runs code from the file.

    Files in the older, unzipped format of torch are read as well. `what` the file should be is for messages.

    Raises:
        UserError: missing, damaged, cut, or holding anything but tensors and plain containers.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such {what}; check the path")
    # the best score in the originals' checkpoints is a NumPy scalar, which is data, not code
    scalar: Any = np.float64(0).__reduce__()[0]
    harmless: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)),
        _codecs.encode,
    ]
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
            if broken is not None:
                raise UserError(f"{path}: damaged (checksum of {broken}); use another {what}")
        with torch.serialization.safe_globals(harmless):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}); check its permissions") from error
    except Exception as error:  # whatever the bytes of a foreign file lead the reader to
        if re.search("unsupported (global|class)", str(error), re.IGNORECASE):
            raise UserError(
                f"{path}: holds objects other than tensors and plain containers, which are never loaded; "
                "save it as a plain state dict"
            ) from error
        # torch's own words advise to load the file whatever it holds
        why = "unreadable" if isinstance(error, pickle.UnpicklingError) else reason(error)
        raise UserError(f"{path}: damaged or not a file of tensors ({why}); use another {what}") from error
    if not isinstance(contents, dict):
        raise UserError(f"{path}: holds a {type(contents).__name__}, not a dictionary; use another {what}")
    return contents


def read_weights(path: str | Path, wrappers: Sequence[str] = WRAPPERS) -> tuple[dict[str, Tensor], str]:
    """The named tensors of a weight file on the CPU, and the part of the file they come from.

    Args:
        path: A `.pth` or `.pt` file; it is read as data, without executing code.
        wrappers: Entries that may hold the network, best first, nested ones joined by dots. A file that
            holds nothing but tensors is taken as it is.

    Returns:
        The tensors, without the prefixes of data parallelism and compilation, and "file" or "file[entry]".

    Raises:
        UserError: If the file is absent, unreadable, or holds no network under the given entries.
    """
    path = Path(path)
    content = read_tensors(path, "weight file")
    for wrapper in wrappers:
        inner: object = content
        for part in wrapper.split("."):
            inner = inner.get(part) if isinstance(inner, Mapping) else None
        if inner is not None and _is_state(inner):
            return bare_keys(inner), f"{path}[{wrapper}]"
    if _is_state(content):
        return bare_keys(content), str(path)
    names = ", ".join(map(str, list(content)[:8])) or "nothing"
    raise UserError(
        f"{path}: holds {names}, but no network under {', '.join(wrappers) or 'the top level'}; "
        "give a file of weights or a training checkpoint"
    )


def load_pretrained(module: nn.Module, path: str | Path, *, allow_missing: Sequence[str] = ()) -> LoadReport:
    """Load a weight file into an encoder or a whole network; the report says what was done.

    A file of a backbone alone fits a network's encoder, and a network's file fits an encoder: the prefix
    `encoder.` is added or removed as needed. Names that the module lacks, such as the classifier `fc`
    of an ImageNet file, are reported as unused. Nothing is changed unless everything fits.

    `allow_missing` are prefixes of the module's names that the file need not provide (in its shape), such as "decoder."
    for a backbone file. BatchNorm's batch counters may always be absent.

    Raises:
        UserError: If the file cannot be read, or a tensor is missing or has another shape.
    """
    state, source = read_weights(path)
    return load_state(module, state, source=source, allow_missing=allow_missing)


def load_state(
    module: nn.Module, state: Mapping[str, Tensor], *, source: str, allow_missing: Sequence[str] = ()
) -> LoadReport:
    """Load named tensors as `load_pretrained` does; `source` names them in messages and in the report."""
    own = module.state_dict()
    names = _names_in_module(state, own)
    given = {name: state[key] for key, name in names.items() if name in own}
    values = {name: value for name, value in given.items() if value.shape == own[name].shape}
    counters = ".num_batches_tracked"  # absent in files written before these counters existed
    missing = [name for name in own if name not in values and not name.endswith(counters)]
    refused = [name for name in missing if not name.startswith(tuple(allow_missing))]
    if refused or not values:
        raise UserError(
            misfit(source, own, {name: state[key] for key, name in names.items()}, refused or missing)
        )
    module.load_state_dict(values, strict=False)
    return LoadReport(
        source,
        used=tuple(values),
        unused=tuple(key for key, name in names.items() if name not in own),
        missing=tuple(missing),
        mismatched=tuple(_shapes(name, own, given) for name in given if name not in values),
    )


def _is_state(value: object) -> TypeGuard[Mapping[str, Tensor]]:
    return (
        isinstance(value, Mapping) and len(value) > 0 and all(isinstance(v, Tensor) for v in value.values())
    )


def _names_in_module(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, str]:
    """File name -> name in the module ("" for heads that an encoder lacks), `encoder.` added or removed."""
    in_module = any(name.startswith(_ENCODER) for name in own)
    in_file = any(key.startswith(_ENCODER) for key in state)
    if in_module and not in_file:
        return {key: _ENCODER + key for key in state}
    if in_file and not in_module:
        return {key: key.removeprefix(_ENCODER) if key.startswith(_ENCODER) else "" for key in state}
    return {key: key for key in state}


def misfit(
    source: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor], refused: Sequence[str],
    unknown: Sequence[str] = (),
) -> str:  # fmt: skip
    """The message for weights `given` (by the network's names) that do not fit a network's `own`, with a remedy.

    `refused` are names that the file lacks or has in another shape, `unknown` those that the network lacks.
    """
    wrong = [_shapes(name, own, given) for name in refused if name in given]
    absent = [name for name in refused if name not in given]
    found = []
    if wrong:
        found.append(f"{len(wrong)} tensors of {len(own)} do not fit (file vs network): {_examples(wrong)}")
    if absent:
        found.append(f"{len(absent)} of {len(own)} tensors are not in the file: {_examples(absent)}")
    if unknown:
        found.append(f"{len(unknown)} are unknown to the network: {_examples(unknown)}")
    return f"{source}: {'; '.join(found)}; {_remedy(own, given, refused, unknown)}"


def _shapes(name: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    return f"{name} {tuple(given[name].shape)} vs {tuple(own[name].shape)}"


def _remedy(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], refused: Sequence[str], unknown: Sequence[str]
) -> str:
    def ends(names: Iterable[str], suffix: str) -> bool:  # the stem's, not those of blocks
        return any(name.endswith(suffix) and "layer" not in name for name in names)

    if ends(refused, "conv1.0.weight") and ends(given, "conv1.weight"):
        return "the file has the plain 7x7 stem: set model.stem=plain or give a file with the deep stem"
    if ends(refused, "conv1.weight") and ends(given, "conv1.0.weight"):
        return "the file has the deep stem: set model.stem=deep or give a torchvision file"
    sizes = [(given[name].shape, own[name].shape) for name in refused if name in given]
    firsts = {(there[0], here[0]) for there, here in sizes if there and here}
    rest_equal = all(len(there) == len(here) > 0 and there[1:] == here[1:] for there, here in sizes)
    if len(sizes) == len(refused) and not unknown and len(firsts) == 1 and rest_equal:
        return f"it has {firsts.pop()[0]} classes: choose a dataset with as many, or load the backbone only"
    for head in ("representation.", "auxor."):
        if all(head in name for name in refused) and not unknown:
            return "the file was written without this head: build the network without it"
    if all(name.startswith(("decoder.", "auxor.")) for name in refused) and not unknown:
        return "the file holds a backbone only: load it into the encoder"
    return "use the model settings (backbone, stem, widths) it was made with"


def _examples(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _count(names: Sequence[str], what: str) -> str:
    return f"{len(names)} {what}" + (f" ({_examples(names)})" if names else "")
