"""Which training images are labeled: the authors' permutations, drawn ones, or the lists every project shares.

A permutation holds positions in the dataset's own order; the first `int(ratio * N)` images are labeled. The pickled
files are read by the restricted reader of `common.data.safe_pickle`: nothing in them is executed.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from common.data.dataset_yaml import load_spec
from common.data.files import write_bytes
from common.data.lists import sha256_order
from common.data.safe_pickle import load_permutation
from common.data.spec import DatasetSpec, Item
from common.data.split import Split, evaluation_photos, resolve_split, split_of
from common.errors import UserError
from projects.s4gan_mlmt.config import Config, S4GanDataConfig

if TYPE_CHECKING:
    from common.distributed import Dist

Permutation = NDArray[np.int64]
T = TypeVar("T")

SEMI_FILE = "train_voc_split.pkl"  # of every dataset, as `train_s4GAN.py` calls it
FULL_FILE = "split.pkl"  # as `train_full.py` calls it
VOC_IMAGES = 10582
VOC_PERMUTATION = "d8c10b866d70c3805e505001109b0957a2e7539df828d97085ec5543d41dd3cc"  # see published.yaml


@dataclass(frozen=True, eq=False)
class TrainingSplit:
    """The images of a run by role, and the permutation they were cut from.

    Attributes:
        split: labeled and unlabeled images. Without a labeled share, both roles hold every image, as in the original.
        permutation: positions int64 (N,) in the dataset's order; None where lists name the images.
    """

    split: Split
    permutation: Permutation | None

    def save(self, run_dir: Path, method: str, dist: Dist) -> Path | None:
        """Write the permutation to the run directory under the authors' name; one process does, the path is its.

        MLMT reads it there, so that both branches learn from the same labeled images.
        """
        if self.permutation is None:
            return None
        path = run_dir / (FULL_FILE if method == "sup_only" else SEMI_FILE)
        if dist.is_main:
            write_permutation(path, self.permutation)
        return path


def dataset_of(data: S4GanDataConfig) -> DatasetSpec:
    """The dataset of a run, with `data.train_list` as its training list.

    Lists that are missing are looked for among its files, where MLMT's original has `{train,val}_img.txt`.

    Raises:
        UserError: unknown dataset, or a broken description.
    """
    spec = load_spec(data.dataset, data.root)
    lists = dict(spec.lists)
    for name in ("train", "val"):
        shipped = (spec.root or Path()) / f"{name}_img.txt"
        if spec.root is not None and name in lists and not lists[name].is_file() and shipped.is_file():
            lists[name] = shipped
    if data.train_list is not None:
        lists["train"] = Path(data.train_list)
    return replace(spec, lists=lists)


def dataset_order(spec: DatasetSpec) -> list[Item]:
    """The training images in the order that the positions of a permutation count.

    That of the training list. The authors walk Cityscapes' folders in whatever order the file system has (`city_order`
    of the README), so their permutation picks other images on every machine; here it counts the cities, then the
    files, in ascending order.
    """
    items = spec.read_list("train")
    if spec.name == "cityscapes":
        return sorted(items, key=lambda item: (item.id.split("_")[0], item.id))
    return items


def draw_permutation(count: int, seed: int) -> Permutation:
    """A random permutation of 0..count-1 as NumPy's global generator would give it after `seed`.

    The authors shuffle likewise, but never set a seed.
    """
    order = np.arange(count)
    np.random.RandomState(seed).shuffle(order)
    return order.astype(np.int64)


def permutation_bytes(permutation: Sequence[int] | NDArray[Any]) -> bytes:
    """A permutation as the authors pickle it: an int64 array (N,), readable by every NumPy (protocol 3)."""
    data = pickle.dumps(np.ascontiguousarray(permutation, dtype="<i8"), protocol=3)
    # NumPy 2 has moved the module; the old name is understood by all
    return data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n", 1)


def write_permutation(path: Path, permutation: Sequence[int] | NDArray[Any]) -> None:
    """Write a permutation as the authors do; the file is whole or as it was before.

    Raises:
        UserError: the folder cannot be written or the disk is full.
    """
    write_bytes(path, permutation_bytes(permutation))


def find_permutation(spec: DatasetSpec, name: str) -> Path:
    """The file of a permutation: from the working directory, below the dataset's splits, or among its files.

    The authors' own place, `splits/voc/split_0.pkl`, stands for the published one, wherever that was got to.

    Raises:
        UserError: there is none; names the command that gets the published one.
    """
    path = Path(name)
    places = [path, spec.splits_dir / path, spec.splits_dir.parent / path]
    if spec.root is not None:
        places.append(spec.root / path)
    if path.name == "split_0.pkl":
        places.append(spec.splits_dir / "s4gan" / path.name)
    for place in places:
        if place.is_file():
            return place
    raise UserError(
        f"data.split_file={name}: no such file (tried {', '.join(map(str, dict.fromkeys(places)))}); run "
        f"'python -m splits get {spec.name}/s4gan' for the published one, or leave it out to draw one"
    )


def read_permutation(path: Path) -> Permutation:
    """The pickled permutation of 0..N-1 in `path` as int64 (N,), as s4GAN ships and saves its splits.

    Raises:
        UserError: the file is absent, unsafe, damaged, or not a permutation.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    return load_permutation(data, str(path))


def split_by_permutation(
    items: Sequence[T], permutation: Sequence[int] | NDArray[Any], ratio: float
) -> tuple[list[T], list[T]]:
    """Labeled and unlabeled items of a permutation, in its order: the first `int(ratio * N)` and the rest.

    Truncation, not rounding, as in s4GAN's training scripts (1/8 of 10582 gives 1322).

    Raises:
        UserError: the permutation is not as long as `items`, or the ratio leaves no labeled image.
    """
    if len(permutation) != len(items):
        raise UserError(
            f"permutation: {len(permutation)} entries for a list of {len(items)} images; "
            "use the list the permutation was made for"
        )
    count = int(ratio * len(items))
    if not 0 < count <= len(items):
        raise UserError(f"ratio {ratio}: gives {count} of {len(items)} images; choose a ratio in (0, 1]")
    ordered = [items[int(index)] for index in permutation]
    return ordered[:count], ordered[count:]


def permutation_is_published(spec: DatasetSpec, permutation: Permutation) -> bool:
    """Whether this is the authors' permutation of the VOC images, whose order their own list fixes."""
    if spec.name != "voc" or len(permutation) != VOC_IMAGES:
        return False
    return sha256_order(permutation.tolist()) == VOC_PERMUTATION


def cut(spec: DatasetSpec, permutation: Permutation, ratio: float, name: str, *, masks: bool = True) -> Split:
    """Labeled and unlabeled images of a permutation: the first `int(ratio * N)` and the rest, both in its order.

    Args:
        spec: the dataset; its training list has N images.
        permutation: positions (N,).
        ratio: labeled share.
        name: of the split, for messages and results.
        masks: labeled images must have masks; MLMT with label vectors from a file needs none.

    Raises:
        UserError: the permutation counts another number of images; no image is labeled, or none unlabeled; a labeled
            image has no mask, or is also one of evaluation.
    """
    items = dataset_order(spec)
    if len(permutation) != len(items):
        raise UserError(
            f"{name}: a permutation of {len(permutation)} images, but the training list of '{spec.name}' has "
            f"{len(items)}; use the list it was made for, or draw one (leave data.split_file out)"
        )
    if permutation_is_published(spec, permutation) and items != sorted(items, key=lambda item: item.id):
        raise UserError(
            f"{name}: the published permutation counts the training images of '{spec.name}' in ascending order, which "
            f"{spec.lists['train']} does not have; run 'python -m splits get voc/train_aug'"
        )
    held_out = evaluation_photos(spec)
    for item in items:
        if item.image in held_out:
            raise UserError(
                f"{name}: '{item.id}' of the training list is also in {held_out[item.image]}; remove it from one"
            )
    try:
        labeled, unlabeled = split_by_permutation(items, permutation, ratio)
    except UserError as error:
        raise UserError(f"data.labeled_ratio: {error}") from None
    bare = next((item for item in labeled if item.label is None), None)
    if masks and bare is not None:
        raise UserError(
            f"{name}: makes {bare.image} labeled, which has no mask; add it, or draw another split"
        )
    return split_of(labeled, unlabeled, name)


def training_split(
    cfg: Config, spec: DatasetSpec | None = None, *, masks: bool | None = None
) -> TrainingSplit:
    """The split of a run: by `data.labeled_ratio` from a permutation, else the lists that `data.split` names.

    With a ratio and `data.split_file` the file is read, without a file a permutation is drawn from
    `data.split_seed` (None: `run.seed`). Without a ratio no permutation is looked at; `full` then gives an
    adversarial method every image in both roles. `masks` is that of `cut`, by default that of `mlmt.labels`.

    Raises:
        UserError: files or lists absent, unsafe, broken or of another dataset; a ratio beside a named split.
    """
    data = cfg.data
    spec = dataset_of(data) if spec is None else spec
    masks = cfg.mlmt.labels == "masks" if masks is None else masks
    if not spec.generator:
        spec.require_root()  # before the lists, so that a missing folder is named first
    if data.labeled_ratio is not None:
        return _by_ratio(cfg, spec, data.labeled_ratio, masks)
    split = resolve_split(spec, data.split)
    if not cfg.method.adversarial:
        return TrainingSplit(split, None)
    if data.split == "full":
        every = dataset_order(spec)
        return TrainingSplit(split_of(split.labeled, every, data.split), None)
    if not split.unlabeled:
        raise UserError(
            f"data.split={data.split}: has no unlabeled images, which method.name={cfg.method.name} needs; add "
            "unlabeled.txt, name another split, or set method.name=sup_only"
        )
    return TrainingSplit(split, None)


def _by_ratio(cfg: Config, spec: DatasetSpec, ratio: float, masks: bool) -> TrainingSplit:
    data = cfg.data
    if data.split != "full":
        raise UserError(
            f"data.labeled_ratio={ratio}: cuts the whole training list, but data.split={data.split} names a split; "
            "set data.split=full, or leave the ratio out"
        )
    if data.split_file is not None:
        path = find_permutation(spec, data.split_file)
        permutation, name = read_permutation(path), str(path)
    else:
        seed = cfg.run.seed if data.split_seed is None else data.split_seed
        permutation, name = draw_permutation(len(spec.read_list("train")), seed), f"drawn with seed {seed}"
    split = cut(spec, permutation, ratio, f"{name} at {ratio:g}", masks=masks)
    if cfg.method.adversarial and not split.unlabeled:
        raise UserError(
            f"data.labeled_ratio={ratio:g}: leaves no unlabeled image, which method.name={cfg.method.name} needs; "
            "leave it out to use every image in both roles, or lower it"
        )
    return TrainingSplit(split, permutation)
