"""Views, label vectors and the two-stream batches of the image-level branch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import functional as pil

from common.data.lists import read_ids
from common.data.loaders import (
    Batch,
    EpochSampler,
    Key,
    Loader,
    SegmentationDataset,
    make_train_loader,
    prefetch,
)
from common.data.spec import DatasetSpec, Item
from common.data.split import Split
from common.data.streams import Batches, TrainingData
from common.data.transforms import Triple, to_normalized
from common.distributed import Dist
from common.errors import UserError
from common.run.progress import Progress
from projects.s4gan_mlmt.class_flags import read_flags
from projects.s4gan_mlmt.config import Config
from projects.s4gan_mlmt.mlmt.losses import Share
from projects.s4gan_mlmt.training_split import dataset_of

Array = NDArray[Any]
BRIGHTNESS = CONTRAST = SATURATION = 0.4
HUE = 0.1
BLUR_RADIUS = (0.1, 2.0)
ADJUST = (pil.adjust_brightness, pil.adjust_contrast, pil.adjust_saturation, pil.adjust_hue)
STREAMS = 1_000_000  # apart from the labeled stream's seed by more than any number of epochs
UNKNOWN = -1.0


# --- views -----------------------------------------------------------------------------------------------------


class Jitter(NamedTuple):
    """Factors of brightness, contrast, saturation and hue (0 to 3), and the order in which they are applied."""

    order: tuple[int, ...]
    factors: tuple[float, float, float, float]


def draw_jitter(rng: Any) -> Jitter:
    """The order, then one factor for each: 0.6 to 1.4, hue -0.1 to 0.1. `rng` is a `random.Random`."""
    order = [0, 1, 2, 3]
    rng.shuffle(order)
    ranges = [(1 - v, 1 + v) for v in (BRIGHTNESS, CONTRAST, SATURATION)] + [(-HUE, HUE)]
    first, second, third, fourth = (rng.uniform(low, high) for low, high in ranges)
    return Jitter(tuple(order), (first, second, third, fourth))


def square(image: Array, size: int) -> Image.Image:
    """An RGB image uint8 (H, W, 3) at `size` x `size`, bilinear with PIL's filter; the aspect is not kept."""
    return Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)


def mirrored(picture: Image.Image, rng: Any) -> Image.Image:
    """The picture, or with probability one half its mirror image."""
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else picture


def clean_view(picture: Image.Image, rng: Any) -> Image.Image:
    """The *train* view of the resized picture: mirrored or not."""
    return mirrored(picture, rng)


def augmented_view(picture: Image.Image, rng: Any) -> Image.Image:
    """The *aug* view of the resized picture: other colours, mirrored or not by a draw of its own, always blurred."""
    jitter = draw_jitter(rng)
    for operation in jitter.order:
        picture = ADJUST[operation](picture, jitter.factors[operation])
    picture = mirrored(picture, rng)
    return picture.filter(ImageFilter.GaussianBlur(radius=rng.uniform(*BLUR_RADIUS)))


def presence(label: Array, num_classes: int) -> NDArray[np.float32]:
    """Label vector (K,) of a mask uint8 (H, W): 1 for every class with a pixel, in the order of the network.

    The columns are the classes 1..K-1 and then class 0; ignored pixels (255) belong to none.
    """
    counts = np.bincount(label.ravel(), minlength=256)[:num_classes]
    return np.roll(counts > 0, -1).astype(np.float32)


@dataclass(frozen=True)
class OneView:
    """Transform of a photo into one view and its label vector.

    Attributes:
        mean, std: of the channels, RGB on the scale 0..255.
        size: side of the square in pixels.
        num_classes: K.
        random: mirror one half of the photos (training); otherwise nothing is random.
    """

    mean: Triple
    std: Triple
    size: int
    num_classes: int
    random: bool = True

    def __call__(self, image: Array, label: Array | None, rng: Any, /) -> tuple[Tensor, Tensor]:
        """Float32 view (3, size, size) of RGB uint8 (H, W, 3), and the float32 label vector (K,).

        Without a mask the vector is -1 everywhere, which says that nothing is known.
        """
        picture = square(image, self.size)
        view = np.asarray(clean_view(picture, rng) if self.random else picture)
        known = None if label is None else torch.from_numpy(presence(label, self.num_classes))
        vector = torch.full((self.num_classes,), UNKNOWN) if known is None else known
        return to_normalized(view, self.mean, self.std), vector


@dataclass(frozen=True)
class CleanAndAugmented:
    """Transform of an unlabeled photo into both of its views, stacked along the channels; see `OneView`."""

    mean: Triple
    std: Triple
    size: int

    def __call__(self, image: Array, label: Array | None, rng: Any, /) -> tuple[Tensor, None]:
        """Float32 views (6, size, size), the clean one first, and no label; a mask is not looked at."""
        del label
        picture = square(image, self.size)
        views = [clean_view(picture, rng), augmented_view(picture, rng)]
        return torch.cat([to_normalized(np.asarray(v), self.mean, self.std) for v in views]), None


def split_views(x: Tensor) -> tuple[Tensor, Tensor]:
    """Clean and augmented views (B, 3, H, W) of a batch (B, 6, H, W), in its memory layout."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    clean, augmented = (part.contiguous(memory_format=layout) for part in x.chunk(2, dim=1))
    return clean, augmented


# --- images and label vectors ------------------------------------------------------------------------------------


def branch_spec(cfg: Config) -> DatasetSpec:
    """The dataset of a run.

    Raises:
        UserError: unknown dataset, or its folder is missing.
    """
    spec = dataset_of(cfg.data)
    if not spec.generator:
        spec.require_root()
    return spec


def image_list(spec: DatasetSpec, path: Path, kind: str) -> list[str]:
    """Ids in the order of the rows of a label file: of the `*_img.txt` beside it, else of the dataset's own list.

    Args:
        spec: the dataset.
        path: the label file, such as `train_label.txt`.
        kind: the dataset's list, `train` or `val`.
    """
    beside = path.with_name(path.name.replace("_label", "_img"))
    if beside != path and beside.is_file():
        return read_ids(beside)
    return [item.id for item in spec.read_list(kind, labels=False)]


def label_rows(spec: DatasetSpec, items: Sequence[Item], name: str, kind: str) -> Tensor:
    """Label vectors float32 (N, K) of `items` from the authors' text file; rows of other images are not parsed.

    Args:
        spec: the dataset; a relative path counts from its root.
        items: the images whose rows are wanted.
        name: the file: a line of K flags 0 or 1 per image, background last.
        kind: the dataset's list that the rows follow, `train` or `val`.

    Raises:
        UserError: no such file, another number of rows than images or of flags than classes, an image without row.
    """
    path = Path(name) if spec.root is None or Path(name).is_absolute() else spec.root / name
    if not path.is_file():
        raise UserError(
            f"{path}: no such label file; give mlmt.{kind}_labels, or take the vectors from the masks with "
            "mlmt.labels=masks"
        )
    places = {name: row for row, name in enumerate(image_list(spec, path, kind))}
    unknown = next((item.id for item in items if item.id not in places), None)
    if unknown is not None:
        raise UserError(f"{path}: has no row for '{unknown}'; it is not in the list that the rows follow")
    rows = [places[item.id] for item in items]
    return torch.from_numpy(read_flags(path, spec.num_classes, rows=rows, total=len(places))).float()


# --- streams ---------------------------------------------------------------------------------------------------


def share_of(sampler: EpochSampler, step: int) -> Share:
    """The part of batch `step` of a pass that lies on this process; the last one may be short and is filled up."""
    world, size = sampler.world_size, sampler.batch_size
    first, end = step * size, (step + 1) * size
    own = len(range(sampler.rank, sampler.length, world)[first:end])
    return Share(own, min(sampler.length, end * world) - first * world, world)


@dataclass
class MlmtData(TrainingData):
    """Loaders `labeled` and `unlabeled`; an epoch is one pass over the labeled images, the short last batch included.

    The unlabeled loader begins anew inside an epoch when it is exhausted. A batch of it holds both views, see
    `split_views`; a batch of labeled images has the label vectors (B, K) for labels.

    Attributes:
        vectors: label vectors (N, K) of the labeled items from a file; None where the loader takes them from masks.
    """

    vectors: Tensor | None = None
    _pass_steps: int = field(init=False)

    def __post_init__(self) -> None:
        self._pass_steps = self.loaders["unlabeled"].steps_per_epoch  # before `_passes` shortens the sampler

    def epoch(self, epoch: int, start_step: int, dist: Dist, channels_last: bool) -> Iterator[list[Batches]]:
        """Batches on the device from step `start_step` of an epoch on, the same as without the steps before it."""
        labeled = prefetch(self._with_vectors(epoch, start_step), dist.device, channels_last=channels_last)
        unlabeled = prefetch(self._passes(epoch, start_step), dist.device, channels_last=channels_last)
        for known, unknown in zip(labeled, unlabeled, strict=True):  # zip keeps a tuple of its own
            yield [(known, unknown)]

    def shares(self, at: Progress) -> tuple[Share, Share]:
        """The parts of the labeled and of the unlabeled global batch that this process has in a step."""
        step = at.since(at.epoch)
        labeled, unlabeled = (loader.sampler for loader in self.loaders.values())
        return share_of(labeled, step), share_of(unlabeled, step % self._pass_steps)

    def _with_vectors(self, epoch: int, start: int) -> Iterator[Batch]:
        labeled = self.loaders["labeled"]
        labeled.set_epoch(epoch, start)
        for batch in labeled:
            yield batch if self.vectors is None else batch._replace(label=self.vectors[batch.index])

    def _passes(self, epoch: int, start: int) -> Iterator[Batch]:
        """Unlabeled batches of an epoch: passes in fresh orders, the last one only as far as it is needed."""
        unlabeled, length, one = self.loaders["unlabeled"], self.steps_per_epoch, self._pass_steps
        passes = math.ceil(length / one)
        for number in range(start // one, passes):
            unlabeled.sampler.steps = min(one, length - number * one)
            unlabeled.set_epoch(epoch * passes + number, max(start - number * one, 0))
            yield from unlabeled


def share_batch(key: str, images: int, dist: Dist) -> int:
    """Images of each process.

    Raises:
        UserError: the batch cannot be divided.
    """
    if images % dist.world_size:
        raise UserError(
            f"mlmt.{key}={images}: cannot be shared by {dist.world_size} processes; use a multiple of "
            f"{dist.world_size} or another number of processes"
        )
    return images // dist.world_size


def build_mlmt_data(cfg: Config, spec: DatasetSpec, split: Split, dist: Dist) -> MlmtData:
    """Loaders of the branch on the split of the run.

    Where everything is labeled, the labeled images are the unlabeled ones too, as in s4GAN on the full data.

    Raises:
        UserError: no labeled image, a batch that cannot be divided, a label file that does not fit.
    """
    mlmt, data = cfg.mlmt, cfg.data
    if not split.labeled:
        raise UserError("data.split: has no labeled images; put at least one into labeled.txt")
    from_files = mlmt.labels == "files"
    vectors = label_rows(spec, split.labeled, mlmt.train_labels, "train") if from_files else None

    def loader(items: Sequence[Item], role: str, transform: Any, batch: int, seed: int) -> Loader:
        dataset = SegmentationDataset(
            spec, items, transform, cfg.run.seed, f"mlmt-{role}", data.on_error, cache=data.cache
        )
        return make_train_loader(
            dataset, batch, dist, workers=mlmt.workers, sampler_seed=seed, drop_last=False
        )

    bare = [Item(item.id, item.image, None) for item in split.labeled]
    one = OneView(data.mean, data.std, mlmt.size, spec.num_classes)
    two = CleanAndAugmented(data.mean, data.std, mlmt.size)
    seed = cfg.run.seed * 2 * STREAMS
    labeled, unlabeled = (
        share_batch(key, getattr(mlmt, key), dist) for key in ("labeled_batch", "unlabeled_batch")
    )
    loaders = {
        "labeled": loader(bare if from_files else split.labeled, "labeled", one, labeled, seed),
        "unlabeled": loader(split.unlabeled or bare, "unlabeled", two, unlabeled, seed + STREAMS),
    }
    return MlmtData(spec, split, loaders, 1, vectors)


# --- validation ------------------------------------------------------------------------------------------------


class BatchShards(EpochSampler):
    """Batches in list order, of which each process takes every W-th; together they are those of one process."""

    def __init__(self, length: int, batch_size: int, dist: Dist) -> None:
        super().__init__(length, batch_size, shuffle=False, pad=False, drop_last=False)
        self.shard, self.shards = dist.rank, dist.world_size

    def __len__(self) -> int:
        return len(range(self.shard, self.steps_per_epoch, self.shards))

    def __iter__(self) -> Iterator[list[Key]]:
        return itertools.islice(super().__iter__(), self.shard, None, self.shards)


@dataclass
class ScoreData:
    """The images that are scored, in list order, with their label vectors where there are any.

    Attributes:
        items: the images.
        loader: batches of this process; `label` holds the vectors, -1 where nothing is known.
        vectors: of all items from a file, or None.
    """

    items: list[Item]
    loader: Loader
    vectors: Tensor | None = None

    def batches(self, dist: Dist, channels_last: bool) -> Iterator[Batch]:
        """Batches of this process on the device."""
        source = (b if self.vectors is None else b._replace(label=self.vectors[b.index]) for b in self.loader)
        return prefetch(source, dist.device, channels_last=channels_last)


def build_score_data(cfg: Config, spec: DatasetSpec, images: str, dist: Dist) -> ScoreData:
    """The *test* view of every image of a list, `mlmt.val_batch` at a time.

    Args:
        cfg: the run.
        spec: the dataset.
        images: name of the list, or its path.
        dist: this process.

    Raises:
        UserError: no such list, a label file that does not fit.
    """
    mlmt, data = cfg.mlmt, cfg.data
    items = spec.read_list(images, labels=mlmt.labels == "masks" and images == "val")
    if not items:
        raise UserError(f"eval.list={images}: the list is empty; name a list with images")
    vectors = label_rows(spec, items, mlmt.val_labels, "val") if mlmt.labels == "files" else None
    if vectors is not None:
        items = [Item(item.id, item.image, None) for item in items]
    view = OneView(data.mean, data.std, mlmt.size, spec.num_classes, random=False)
    dataset = SegmentationDataset(spec, items, view, cfg.run.seed, "mlmt-val", cache=data.cache)
    sampler = BatchShards(len(items), mlmt.val_batch, dist)
    loader = Loader(dataset, sampler, mlmt.workers, pin_memory=dist.device.type == "cuda")
    return ScoreData(items, loader, vectors)
