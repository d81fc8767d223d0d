"""What a run needs and does not find, all of it at once: before torch is imported, and before the first step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from common.data.dataset_yaml import load_spec
from common.data.files import find_weights
from common.data.spec import DatasetSpec
from common.data.split import Split, find_split, list_hash, resolve_split, truth
from common.errors import UserError

LEAST_SPACE = 64 * 2**20  # bytes, for logs; what checkpoints take is known once the networks are built


def require(cfg: Any, run_dir: Path) -> None:
    """Look at everything that the run `cfg` will read and write, by the lists of its project.

    Raises:
        UserError: One line for each thing that is missing, with what mends it.
    """
    wrong = list(dict.fromkeys(missing(cfg, run_dir)))
    if wrong:
        raise UserError(*wrong)


def missing(cfg: Any, run_dir: Path) -> Iterator[str]:
    """What is missing, one message each."""
    checks, root = list[Callable[[], object]](), None
    try:
        own = own_splits(cfg)
        spec = load_spec(cfg.data.dataset, cfg.data.root) if own is None else own.dataset_of(cfg.data)
    except UserError as error:
        yield str(error)
    else:
        checks, root = data_checks(cfg, spec), spec.root
    if not any((run_dir / name).exists() for name in ("last.pt", "last.prev.pt")):
        checks.append(lambda: start_checkpoint(cfg))
        files = getattr(import_module(type(cfg).__module__), "start_files", network_weights)(cfg)
        checks += [partial(start_file, key, name, remedy, root) for key, (name, remedy) in files.items()]
    for check in (*checks, lambda: writable(run_dir)):
        try:
            check()
        except UserError as error:
            yield str(error)


def data_checks(cfg: Any, spec: DatasetSpec) -> list[Callable[[], object]]:
    """What raises where the lists of the split or of evaluation, or files that they name, are not there."""
    evaluation = dict.fromkeys((cfg.data.val, cfg.eval.list))
    masks = (
        getattr(getattr(cfg, "mlmt", None), "labels", "masks") == "masks"
    )  # MLMT may read vectors from a file
    try:
        if not spec.generator:
            spec.require_root()
    except UserError:
        training = partial(find_split, spec, cfg.data.split)
        if cfg.data.split == "full":
            training = partial(spec.list_file, getattr(cfg.data, "train_list", None) or "train")
        return [spec.require_root, training, *(partial(spec.list_file, name) for name in evaluation)]
    return [
        partial(split_of, cfg, spec),
        *(partial(spec.read_list, name, labels=masks) for name in evaluation),
    ]


def split_of(cfg: Any, spec: DatasetSpec) -> Split:
    """The split of a run: as its project finds it where it has a way of its own, else the one named.

    Raises:
        UserError: Lists or files are missing.
    """
    own = own_splits(cfg)
    if own is not None:
        found: Split = own.training_split(cfg).split
        return found
    return resolve_split(spec, cfg.data.split)


def own_splits(cfg: Any) -> ModuleType | None:
    """The module of a project that finds its dataset and split in a way of its own; None without one."""
    name = f"{type(cfg).__module__.rpartition('.')[0]}.training_split"
    return None if find_spec(name) is None else import_module(name)


def network_weights(cfg: Any) -> dict[str, tuple[str | None, str]]:
    """Files that a run of most projects starts from, by their key; a project's `config.start_files` has others."""
    return {"model.weights": (cfg.model.weights, "")}


def truth_of(cfg: Any) -> dict[str, Any]:
    """What gives the figures of a run their meaning, as its `result.json` holds it, by the data of today.

    Raises:
        UserError: Lists or files are missing.
    """
    spec = load_spec(cfg.data.dataset, cfg.data.root)
    found = truth(spec, split_of(cfg, spec))
    del found["files"]
    return found | {"list": list_hash(spec, spec.read_list(cfg.eval.list))}


def start_file(key: str, name: str | None, remedy: str, root: Path | None) -> None:
    """Look for a file that a run starts from; `UserError` where there is none.

    Args:
        key: of the configuration.
        name: its value.
        remedy: what makes or replaces a file that is no weights, and may lie among the data; empty for weights.
        root: of the data.
    """
    if name in (None, "none", "imagenet"):
        return
    if not remedy:
        find_weights(name, key)
    elif not any(place.is_file() for place in (Path(name), (root or Path()) / name)):
        raise UserError(f"{key}={name}: no such file; {remedy}")


def start_checkpoint(cfg: Any) -> None:
    """Look for what `run.resume` or `run.init` names; `UserError` where it is not there."""
    for key in ("resume", "init"):
        name = getattr(cfg.run, key)
        if name and not Path(name).exists():
            raise UserError(f"run.{key}={name}: no such checkpoint or run directory; correct the path")


def writable(run_dir: Path) -> None:
    """Check that a run directory can be made and filled; `UserError` where it cannot."""
    place = run_dir.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"run.dir={run_dir}: {place} is a file; choose another run directory")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"run.dir={run_dir}: {place} cannot be written; choose another run directory")
    free = shutil.disk_usage(place).free
    if free < LEAST_SPACE:
        raise UserError(
            f"run.dir={run_dir}: {free >> 20} MiB are free there; free space, or choose another run directory"
        )
