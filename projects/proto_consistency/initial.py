"""Where the first prototypes come from: clustered features of the labeled images, a file, or random numbers.

Legend: K classes, P prototypes per class, D channels, (H, W) image size. Runs once per training, on the first
process, which gives the result to the others.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from common.data.files import write_bytes
from common.data.safe_pickle import load_plain_pickle
from common.data.spec import IGNORE, DatasetSpec, Item
from common.distributed import Dist, broadcast_object
from common.errors import UserError
from common.mean_teacher.evaluation import protocol
from common.measure.evaluation import Protocol, Sample, evaluation_samples
from common.measure.inference import Size, pad_to_crop, windows
from common.models.deeplab import pad_to_multiple
from common.models.pretrained import read_weights
from common.numerics.precision import autocast
from common.run.log import RunLog
from projects.proto_consistency.compat.mindspore_file import is_mindspore, read_mindspore
from projects.proto_consistency.config import HOW_TO_MAKE, Config, ProtoConfig
from projects.proto_consistency.draws import gather_points
from projects.proto_consistency.kmeans import cluster
from projects.proto_consistency.network import ProtoNetwork
from projects.proto_consistency.state import PROTOTYPES, Run

FORMAT = "semiseg prototypes 1"
# where a checkpoint keeps its network: the student's prototypes are those that the updates move
ENTRIES = ("networks.student", "networks.teacher", "model_state", "teacher_state", "state_dict", "model")

Array = NDArray[Any]
Say = Callable[[str], None]


class Reservoir:
    """A uniform random subset of the rows it is given, of bounded size.

    Args:
        limit: most rows to keep.
        rng: decides which.

    Attributes:
        offered: rows so far.
    """

    def __init__(self, limit: int, rng: np.random.RandomState) -> None:
        self.limit, self.rng, self.offered = limit, rng, 0
        self._rows: Array | None = None
        self._held = 0

    @property
    def rows(self) -> Tensor:
        """What is kept, (n, D) float32, in no particular order; (0, 0) before the first."""
        return torch.zeros(0, 0) if self._rows is None else torch.from_numpy(self._rows[: self._held])

    def add(self, rows: Tensor) -> None:
        """Offer rows (m, D) on the CPU."""
        new = rows.float().numpy()
        free = min(self.limit - self._held, len(new))
        if free > 0:
            self._grow(self._held + free, new.shape[1])
            assert self._rows is not None
            self._rows[self._held : self._held + free] = new[:free]
            self._held += free
        rest = new[free:]
        if len(rest) and self._rows is not None:
            # row number t stays with probability limit / t, in a place of its own choice; the last writer wins
            place = self.rng.randint(0, self.offered + free + 1 + np.arange(len(rest)))
            kept = place < self.limit
            self._rows[place[kept]] = rest[kept]
        self.offered += len(new)

    def _grow(self, needed: int, dim: int) -> None:
        if self._rows is None or needed > len(self._rows):
            grown = np.empty((min(self.limit, max(2 * self._held, needed)), dim), dtype=np.float32)
            if self._rows is not None:
                grown[: self._held] = self._rows[: self._held]
            self._rows = grown


class _Cover(NamedTuple):
    """One window: its first row and column in the padded image, and which of the pixels it is to serve."""

    start: Size
    pixels: Array


@torch.no_grad()
def collect_features(
    features: Callable[[Tensor], Tensor],
    samples: Iterable[Sample],
    num_classes: int,
    proto: ProtoConfig,
    *,
    crop_size: Size | None = None,
    stride: Size | None = None,
    multiple: int = 1,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Features of labeled pixels, by class: K tensors (n_k, D) float32 on the CPU; (0, 0) for an absent class.

    Of each image at most `proto.pixels_per_image` pixels per class are looked at, of all images at most
    `proto.pixels_per_class` are kept, both chosen uniformly by a generator of seed `proto.seed`. Only these pixels
    are resized.

    Args:
        features: Maps normalized images (1, 3, h, w) to features (1, D, h', w').
        samples: Image (1, 3, H, W), label (1, H, W) and id of each labeled image.
        num_classes: K.
        proto: Limits and seed.
        crop_size: Windows of the evaluation; a pixel that several cover is taken from the first. None takes whole
            images.
        stride: Step of the windows.
        multiple: The sides of what `features` gets are padded to multiples of this.
        device: Where `features` computes.
    """
    rng = np.random.RandomState(proto.seed)
    found = [Reservoir(proto.pixels_per_class, rng) for _ in range(num_classes)]
    for image, label, _ in samples:
        target = label[0].numpy()
        pixels = _choose_pixels(target, num_classes, proto.pixels_per_image, rng)
        if not len(pixels):
            continue
        crop = (target.shape[0], target.shape[1]) if crop_size is None else crop_size
        padded, before = pad_to_crop(image, crop)
        rows, cols = pixels // target.shape[1] + before[0], pixels % target.shape[1] + before[1]
        values: Tensor | None = None
        starts = [(0, 0)] if crop_size is None else windows(target.shape, crop, stride)
        for start, own in _covers(rows, cols, starts, crop):
            window = padded[..., start[0] : start[0] + crop[0], start[1] : start[1] + crop[1]]
            window = pad_to_multiple(window, multiple)
            maps = features(window.to(device)).float()
            y, x = (torch.from_numpy(p[own] - s).to(device) for p, s in zip((rows, cols), start, strict=True))
            part = gather_points(maps, y, x, window.shape[-2:]).cpu()
            values = part.new_empty(len(pixels), part.shape[1]) if values is None else values
            values[torch.from_numpy(own)] = part
        assert values is not None
        classes = target.reshape(-1)[pixels]
        for k in np.unique(classes).tolist():
            found[k].add(values[torch.from_numpy(classes == k)])
    return [reservoir.rows for reservoir in found]


def _choose_pixels(
    target: Array, num_classes: int, limit: int, rng: np.random.RandomState
) -> NDArray[np.int64]:
    """Flat positions of at most `limit` pixels per class, class by class."""
    flat, chosen = target.reshape(-1), []
    for k in np.unique(flat).tolist():
        if k == IGNORE or not 0 <= k < num_classes:
            continue
        places = np.flatnonzero(flat == k)
        chosen.append(places if len(places) <= limit else rng.choice(places, size=limit, replace=False))
    return np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int64)


def _covers(rows: Array, cols: Array, starts: Sequence[Size], crop: Size) -> Iterable[_Cover]:
    """The windows that serve a pixel, each pixel by the first window that holds it."""
    open_ = np.ones(len(rows), dtype=bool)
    for start in starts:
        inside = (
            (rows >= start[0])
            & (rows < start[0] + crop[0])
            & (cols >= start[1])
            & (cols < start[1] + crop[1])
        )
        own = np.flatnonzero(open_ & inside)
        if len(own):
            open_[own] = False
            yield _Cover(start, own)


def cluster_classes(
    features: Sequence[Tensor],
    proto: ProtoConfig,
    class_names: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    say: Say = lambda _: None,
) -> Tensor:
    """Prototypes (K * P, D) float32 from the features of each class (n_k, D).

    A class with fewer different features than P repeats them; one without any gets random directions of the mean
    length of all features. Both are said.

    Args:
        features: K tensors.
        proto: P, seed, and whether features are brought to unit length first.
        class_names: For messages.
        device: Where to compute.
        say: Takes a line for the log.

    Raises:
        UserError: no class has a feature.
    """
    dim = max((rows.shape[1] for rows in features if len(rows)), default=0)
    if dim == 0:
        raise UserError(
            "prototypes: no labeled pixel in the labeled images; check the masks, or set method.proto.source=random"
        )
    if proto.normalize:
        features = [F.normalize(rows, dim=1) if len(rows) else rows for rows in features]
    total = sum(float(rows.norm(dim=1).double().sum()) for rows in features if len(rows))
    mean_norm = total / sum(map(len, features))
    rng, found = np.random.RandomState(proto.seed), []
    for k, (rows, name) in enumerate(zip(features, class_names, strict=True)):
        if len(rows):
            clusters = cluster(rows.to(device), proto.per_class, proto.seed)
            if clusters.distinct < proto.per_class:
                say(
                    f"prototypes: class {k} ({name}) has {clusters.distinct} different features for "
                    f"{proto.per_class} prototypes; they are repeated"
                )
            found.append(clusters.centres.cpu().float())
            continue
        say(
            f"prototypes: class {k} ({name}) is on no labeled pixel; it gets {proto.per_class} random vectors of "
            f"length {mean_norm:.3g}"
        )
        directions = torch.from_numpy(rng.standard_normal((proto.per_class, dim))).float()
        found.append(F.normalize(directions, dim=1) * mean_norm)
    return torch.cat(found)


@contextmanager
def _evaluating(network: ProtoNetwork) -> Iterator[None]:
    """The network in evaluation mode, and back in its own afterwards."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


def cluster_labeled(
    cfg: Config, network: ProtoNetwork, spec: DatasetSpec, items: Sequence[Item], how: Protocol, say: Say
) -> Tensor:
    """Prototypes (K * P, D) from the features that a network gives to the labeled images, each looked at once.

    Args:
        cfg: Normalization of the images, precision of the network; limits, P and seed of `method.proto`.
        network: In any mode; its running statistics are used and not changed.
        spec: The dataset.
        items: Labeled images.
        how: Whole images or windows, as evaluation has them.
        say: Takes a line for the log.

    Raises:
        UserError: a file is missing or broken, or nothing is labeled.
    """
    proto, weight = cfg.method.proto, next(network.parameters())
    assert proto is not None, "method.proto is null"
    windowed = how.kind in ("sliding_window", "multi_scale_flip") and how.crop_size is not None

    def features(x: Tensor) -> Tensor:
        with autocast(weight.device, cfg.run.precision):
            return network.feature_maps(x.to(weight.dtype))

    with _evaluating(network):
        found = collect_features(
            features,
            evaluation_samples(cfg.data, spec, list(items), Dist()),
            spec.num_classes,
            proto,
            crop_size=how.crop_size if windowed else None,
            stride=how.stride if windowed else None,
            multiple=network.multiple,
            device=weight.device,
        )
    counts = ", ".join(f"{name} {len(rows)}" for name, rows in zip(spec.classes, found, strict=True))
    say(f"prototypes: clustering features of {len(items)} images ({counts})")
    return cluster_classes(found, proto, spec.classes, device=weight.device, say=say)


def initial_prototypes(
    cfg: Config,
    network: ProtoNetwork,
    spec: DatasetSpec,
    items: Sequence[Item],
    how: Protocol,
    dist: Dist,
    say: Say,
) -> Tensor:
    """The first prototypes (K * P, D) on the CPU, by `method.proto.source`; a collective, equal on every process.

    Args:
        cfg: With `method.proto`.
        network: Whose features are clustered (`warmup_end`), on the device of `dist`.
        spec: The dataset.
        items: Labeled images (`warmup_end`).
        how: Whole images or windows.
        dist: This process.
        say: Takes a line for the log; called by the first process only.

    Raises:
        UserError: the file is missing or does not fit, or nothing is labeled; on every process.
    """
    proto = cfg.method.proto
    assert proto is not None, "method.proto is null"
    head = network.require_prototypes()
    made: Tensor | UserError | None = None
    if dist.is_main:
        try:
            if proto.source == "file":
                made = read_prototypes(
                    require_path(proto.init_path), spec.num_classes, proto.per_class, head.dim
                )
                say(f"prototypes: {proto.init_path}")
            elif proto.source == "random":
                made = torch.randn(head.proto_list.shape, generator=torch.Generator().manual_seed(proto.seed))
                say("prototypes: random numbers (method.proto.source=random)")
            else:
                made = cluster_labeled(cfg, network, spec, items, how, say)
        except UserError as error:  # the others wait for the result
            made = error
    made = broadcast_object(made, dist)
    if isinstance(made, UserError):
        raise made
    assert made is not None
    return made


def place_prototypes(epoch: int, run: Run, log: RunLog) -> None:
    """Give student and teacher their first prototypes, once, if `epoch` (from 0) is the time; a collective.

    `file` and `random` before the first step; `warmup_end` by the student's features of the labeled images before
    the first step of epoch `method.sup_only_epochs`.

    Raises:
        UserError: the file is missing or does not fit, or nothing is labeled; on every process.
    """
    cfg, proto = run.cfg, run.cfg.prototypes
    if proto is None or run.placed or (proto.source == "warmup_end" and epoch < run.sup_only_epochs):
        return
    student, labeled, how = run.nets.student, run.data.split.labeled, protocol(cfg, "script")
    with log.paused():
        made = initial_prototypes(cfg, student, run.data.spec, labeled, how, run.dist, log.info)
    for network in (student, run.nets.require_teacher()):
        network.require_prototypes().set(made.to(run.dist.device))
    run.placed = True


def require_path(path: str | None) -> Path:
    """The file that `method.proto.init_path` names.

    Raises:
        UserError: none is named or it does not exist; tells how it is made.
    """
    if path is None:
        raise UserError(
            f"method.proto.init_path: not set, but method.proto.source=file needs it; {HOW_TO_MAKE}"
        )
    if not Path(path).is_file():
        raise UserError(f"method.proto.init_path={path}: no such file; {HOW_TO_MAKE}")
    return Path(path)


def save_prototypes(path: Path, prototypes: Tensor, classes: Sequence[str], about: Mapping[str, Any]) -> None:
    """Write prototypes (K * P, D) as a NumPy archive, which `read_prototypes` and any NumPy can read.

    It holds `prototypes` (K, P, D) float32, `classes` (K,) and a JSON text `about`.

    Raises:
        UserError: the file cannot be written.
    """
    shaped = prototypes.detach().cpu().float().view(len(classes), -1, prototypes.shape[1])
    buffer = io.BytesIO()
    np.savez(
        buffer,
        prototypes=shaped.numpy(),
        classes=np.array(list(classes)),
        about=np.array(json.dumps({"format": FORMAT, **about})),
    )
    write_bytes(path, buffer.getvalue())


def read_prototypes(path: Path, num_classes: int, per_class: int, dim: int) -> Tensor:
    """Prototypes (K * P, D) float32 of a file, whatever its kind; nothing in it is executed.

    Taken are: what `save_prototypes` wrote; the original's pickle (a list or dictionary of K entries of P arrays
    (D,)); a checkpoint of this project, of the authors (MindSpore's own format, or exported to `.npz`) or of a
    PyTorch project with their names.

    Raises:
        UserError: the file is absent, damaged or unsafe, holds no prototypes, or those of another K, P or D.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file of prototypes; {HOW_TO_MAKE}")
    with path.open("rb") as file:
        head = file.read(4)
    if is_mindspore(path):
        values = _of_state(read_mindspore(path), str(path))
    elif zipfile.is_zipfile(path):
        values = _from_archive(path)
    elif path.suffix in (".pickle", ".pkl") or (head[:1] == b"\x80" and not _is_torch(path)):
        values = _from_pickle(path)
    else:
        values = _of_state(read_weights(path, ENTRIES)[0], str(path))
    return _fitting(values, str(path), num_classes, per_class, dim)


def _is_torch(path: Path) -> bool:
    """Whether a pickle begins with the magic number of torch's older format (a file of several pickles)."""
    with path.open("rb") as file:
        return b"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19" in file.read(32)


def _from_archive(path: Path) -> Array:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if not all(name.endswith(".npy") for name in names):
        return _of_state(read_weights(path, ENTRIES)[0], str(path))
    arrays = read_npz(path)
    if "prototypes" in arrays:
        return arrays["prototypes"]
    return _of_state({name: torch.from_numpy(value) for name, value in arrays.items()}, str(path))


def read_npz(path: Path) -> dict[str, Array]:
    """Every array of a NumPy archive; object arrays, which would run code, are refused.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            return {key: data[key] for key in data.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        reason = (str(error).splitlines() or ["empty"])[0][:160]
        raise UserError(f"{path}: damaged or no archive of plain arrays ({reason}); make it again") from None


def _of_state(state: Mapping[str, Tensor], where: str) -> Array:
    for key, value in state.items():
        if key.removeprefix("module.") == PROTOTYPES:
            return value.float().numpy()
    raise UserError(
        f"{where}: holds {len(state)} tensors but no {PROTOTYPES}; give a checkpoint of a network with prototypes, or "
        f"make a file: {HOW_TO_MAKE}"
    )


def _from_pickle(path: Path) -> Array:
    accepted = "a list or a dictionary of one list of arrays per class"
    value = load_plain_pickle(path.read_bytes(), str(path), accepted)
    if isinstance(value, dict):
        keys = range(len(value))
        if set(value) != set(keys):
            raise UserError(
                f"{path}: keys {sorted(map(str, value))[:4]}; expected the class numbers 0..{len(value) - 1}"
            )
        value = [value[key] for key in keys]
    try:
        return np.stack(
            [np.stack([np.asarray(p, dtype=np.float32).reshape(-1) for p in own]) for own in value]
        )
    except (TypeError, ValueError):
        raise UserError(
            f"{path}: the pickle is not {accepted}, as many and as long for every class; check where it comes from"
        ) from None


def _fitting(values: Array, where: str, num_classes: int, per_class: int, dim: int) -> Tensor:
    """Prototypes (K, P, D) or (K * P, D) as (K * P, D), if they are those of this configuration."""
    shape = (num_classes, per_class, dim)
    if values.shape not in (shape, (num_classes * per_class, dim)):
        raise UserError(
            f"{where}: prototypes of shape {values.shape}, the configuration has {num_classes} classes, "
            f"method.proto.per_class={per_class} and features of {dim} channels; set these to those of the file, or "
            f"make another: {HOW_TO_MAKE}"
        )
    found = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).reshape(-1, dim).clone()
    if not bool(found.isfinite().all()):
        raise UserError(f"{where}: holds prototypes that are not finite; make the file again")
    return found
