"""Checkpoints: atomic saving, checked loading, what they say about themselves, start-up order."""

from __future__ import annotations

import errno
import fnmatch
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from common.config import to_dict
from common.data.files import replacing
from common.data.split import changed
from common.distributed import Dist
from common.errors import UserError, reason
from common.models.pretrained import bare_keys, misfit, read_tensors

if TYPE_CHECKING:
    from common.data.spec import DatasetSpec

LOG = logging.getLogger("semiseg")
FORMAT = 1
# what a resumed run may change without becoming another run; after `!` stands what may not, whatever else matches
MAY_CHANGE = (
    "run.*", "!run.seed", "expect.*", "eval.*",
    "data.root", "data.val", "data.workers", "data.cache", "data.on_error",
)  # fmt: skip


def previous_path(path: Path) -> Path:
    """Where `save` keeps the checkpoint before `path`: `last.pt` -> `last.prev.pt`."""
    return path.with_name(f"{path.stem}.prev{path.suffix}")


def sync_directory(folder: Path) -> None:
    """Make renames in `folder` survive a loss of power; file systems that cannot are left alone."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` to `path` so that a readable checkpoint exists at every moment.

    The new file is completed under a temporary name in the same folder and flushed to the disk; then it
    replaces `path`, and what `path` held before is kept as `<stem>.prev<suffix>`. Interrupted attempts of
    earlier processes are removed. One process at a time may save to a path.

    Raises:
        UserError: the folder is unwritable or the disk full; earlier checkpoints are untouched.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(f".{path.name}.*.tmp"):
            stale.unlink(missing_ok=True)
        with replacing(path, _replace_keeping_previous) as temporary, temporary.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        sync_directory(path.parent)
    except (OSError, RuntimeError) as error:
        kept = "; the checkpoint before it is intact" if path.exists() else ""
        raise UserError(
            f"{path}: cannot be written ({reason(error)}){kept}; free space, or choose a writable run directory"
        ) from error


def _replace_keeping_previous(temporary: Path, path: Path) -> None:
    """Move the finished `temporary` to `path`, and what was there to `previous_path(path)`."""
    if not path.exists():
        temporary.replace(path)
        return
    link = path.with_name(f".{path.name}.previous.tmp")
    try:
        link.unlink(missing_ok=True)
        os.link(path, link)
    except OSError:  # a file system without hard links: for a moment only the previous one exists
        path.replace(previous_path(path))
        temporary.replace(path)
        return
    temporary.replace(path)  # first, so that a damaged former file never pushes out a good older one
    link.replace(previous_path(path))


def load(path: Path) -> dict[str, Any]:
    """Contents of the checkpoint `path`; raises as `read_tensors`."""
    return read_tensors(path, "checkpoint")


def find_newest(run_dir: Path, name: str = "last") -> tuple[dict[str, Any], Path] | None:
    """The newest readable checkpoint `name` of `run_dir` and the file it was read from, or None if there never was one.

    If the newest is damaged, the one before it is taken, with one warning.

    Raises:
        UserError: checkpoints exist and none is readable.
    """
    newest = Path(run_dir) / f"{name}.pt"
    present = [path for path in (newest, previous_path(newest)) if path.exists()]
    complaints: list[str] = []
    for path in present:
        try:
            state = load(path)
        except UserError as error:
            complaints.append(str(error).split(";", maxsplit=1)[0])
            continue
        if path != newest:
            cause = complaints[0] if complaints else f"{newest}: missing"
            LOG.warning("%s; continuing from the one before it, %s", cause, path.name)
        return state, path
    if not present:
        return None
    raise UserError(
        f"{' and '.join(complaints)}; no readable checkpoint is left: delete them to start anew, or set run.resume"
    )


def kept_path(run_dir: Path, unit: str, number: int) -> Path:
    """Where the weights after so many epochs or steps (`unit` says which) stay, to be measured afterwards."""
    return run_dir / "weights" / f"{unit}_{number}.pt"


def kept_weights(run_dir: Path, unit: str) -> dict[str, Path]:
    """Weights that a run has kept, by `<unit>_<number>`, from the earliest on."""
    folder, prefix = kept_path(run_dir, unit, 0).parent, f"{unit}_"
    numbers = {path.stem.removeprefix(prefix): path for path in folder.glob(f"{prefix}*.pt")}
    found = {int(number): path for number, path in numbers.items() if number.isdigit()}  # no `epoch_3.prev`
    return {f"{prefix}{number}": found[number] for number in sorted(found)}


def unwrap(module: nn.Module) -> nn.Module:
    """The network inside the wrappers of `DistributedDataParallel` and `torch.compile`, in any order."""
    while True:
        if isinstance(module, nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(getattr(module, "_orig_mod", None), nn.Module):
            module = module._orig_mod  # type: ignore[assignment]
        else:
            return module


def bare_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """State dict of `module` with the keys that the plain network has, whatever wraps it or its parts."""
    return {key.replace("_orig_mod.", ""): value for key, value in unwrap(module).state_dict().items()}


def load_weights(module: nn.Module, state_dict: Mapping[str, Tensor], where: str) -> None:
    """Load all tensors of `state_dict` into `module`, or none: never a part of them.

    Prefixes of wrapped networks are ignored on both sides. `where` begins the message, such as `run.init=ckpt.pt`.

    Raises:
        UserError: a tensor is missing, unknown or of another shape; counts and first examples are named.
    """
    own, given = bare_state_dict(module), bare_keys(state_dict)
    refused = [key for key in own if key not in given or given[key].shape != own[key].shape]
    unknown = [key for key in given if key not in own]
    if refused or unknown:
        raise UserError(misfit(where, own, given, refused, unknown))
    inner = unwrap(module)
    inner.load_state_dict({key: given[key.replace("_orig_mod.", "")] for key in inner.state_dict()})


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        kind: "own" (last checkpoint of the run directory), "resume" (`run.resume`), "init" (weights of
            `run.init`) or "backbone" (only the backbone's weights, if any).
        path: The file that was read, or None.
        state: Its contents, or None.
    """

    kind: str
    path: Path | None = None
    state: dict[str, Any] | None = None

    @property
    def continues(self) -> bool:
        """True if the whole training state is restored, not only weights."""
        return self.kind in ("own", "resume")


def resolve_start(run_dir: Path | None, resume: str | Path | None, init: str | Path | None) -> Start:
    """Choose the start of a run and say in the log which was taken.

    Order: own last checkpoint in `run_dir` -> `resume` (a checkpoint or a run directory, everything
    restored) -> `init` (weights only) -> backbone weights.

    Raises:
        UserError: the chosen file is missing or unreadable.
    """
    own = find_newest(run_dir) if run_dir is not None else None
    if own is not None:
        state, path = own
        LOG.info("start: own last checkpoint %s (step %s)", path, state.get("step", "unknown"))
        return Start("own", path, state)
    for kind, value in (("resume", resume), ("init", init)):
        if not value:
            continue
        path = Path(value)
        found = find_newest(path) if path.is_dir() else (load(path), path)
        if found is None:
            raise UserError(
                f"run.{kind}={value}: the folder holds no last.pt; name a checkpoint or a run directory"
            )
        state, path = found
        what = f"(step {state.get('step', 'unknown')})" if kind == "resume" else "(weights only)"
        LOG.info("start: run.%s=%s %s", kind, path, what)
        return Start(kind, path, state)
    LOG.info("start: backbone weights, step 0")
    return Start("backbone")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by dotted key; tuples count as lists, as they do after a round trip."""
    if isinstance(tree, Mapping) and tree:
        leaves: dict[str, Any] = {}
        for key, value in tree.items():
            leaves |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
        return leaves
    return {prefix: list(tree) if isinstance(tree, tuple) else tree}


def config_differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], allowed: Sequence[str]
) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, each with (saved, current); a key absent on one side counts as None there.

    Keys that match a pattern of `allowed` (such as `run.*`) are left out, unless they stand there after a `!`.
    """
    before, after = _flat(saved), _flat(current)

    def may_differ(key: str) -> bool:
        return f"!{key}" not in allowed and any(fnmatch.fnmatchcase(key, glob) for glob in allowed)

    keys = [key for key in [*after, *(key for key in before if key not in after)] if key]
    return {
        key: (before.get(key), after.get(key))
        for key in keys
        if before.get(key) != after.get(key) and not may_differ(key)
    }


def describe(
    project: str,
    cfg: object,
    spec: DatasetSpec,
    step: int,
    networks: Mapping[str, Mapping[str, Tensor]],
    truth: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Weights (state dicts by role, with bare keys) and what a checkpoint says about itself.

    That is enough to predict without the dataset. `truth` is what gives its figures their meaning, see
    `common.data.split.truth`; None if it was trained elsewhere.
    """
    return {
        "format": FORMAT,
        "project": project,
        "config": to_dict(cfg),
        "classes": list(spec.classes),
        "palette": [[int(v) for v in colour] for colour in spec.palette],
        "step": step,
        "networks": networks,
        **({} if truth is None else {"truth": dict(truth)}),
    }


def require_own(saved: Mapping[str, Any], project: str, where: str) -> None:
    """Refuse the contents of a file that no run of `project` wrote.

    Raises:
        UserError: names the project that did.
    """
    if saved.get("project") != project:
        raise UserError(
            f"{where}: made by project '{saved.get('project', 'unknown')}'; give a checkpoint of {project}, or "
            "convert a file of the authors first: python convert.py FILE --config CONFIG --out FILE"
        )


def require_resumable(
    saved: Mapping[str, Any],
    project: str,
    cfg: object,
    where: str,
    may_change: Sequence[str] = MAY_CHANGE,
) -> None:
    """Refuse to continue a checkpoint that is not the whole state of this very run, but for keys that `may_change`.

    Raises:
        UserError: it holds weights only, another project's state, or was made with other settings.
    """
    require_own(saved, project, where)
    if "rng" not in saved:  # every project keeps it with the whole state, and with nothing else
        raise UserError(f"{where}: holds weights only; set run.init to it instead of run.resume")
    differences = config_differences(saved["config"], to_dict(cfg), may_change)
    if differences:
        shown = [f"{key} {before!r} -> {after!r}" for key, (before, after) in list(differences.items())[:4]]
        more = f" and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise UserError(
            f"{where}: made with other settings: {', '.join(shown)}{more}; "
            "restore them, or choose another run directory (run.init takes over only the weights)"
        )


def require_same_truth(saved: Mapping[str, Any], truth: Mapping[str, Any], where: str) -> None:
    """Refuse contents of a checkpoint, or of a result, that were made with other images, masks or classes.

    Raises:
        UserError: names what has changed, and how to begin anew.
    """
    known = saved.get("truth")
    if known is None and "classes" in saved:
        LOG.info(
            "%s: is older than the record of lists, label map and files; only the classes were compared",
            where,
        )
        known = {"classes": saved["classes"]}
    found = changed(known or {}, truth)
    if found:
        raise UserError(
            f"{where}: {' and '.join(found)} changed since it was made; put back what it was, or begin anew in another "
            "run directory (run.dir=DIR)"
        )


def copy_best(checkpoint: Path | None, run_dir: Path, dist: Dist) -> None:
    """Copy the best weights that lie beside `checkpoint` into a run directory that continues another one."""
    best = None if checkpoint is None else checkpoint.parent / "best.pt"
    if best is not None and best.is_file() and dist.is_main and not (run_dir / "best.pt").exists():
        save(run_dir / "best.pt", load(best))
