"""A generated Pascal VOC of a few photos, and settings and networks for fast runs of the image-level branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from common.config import build
from common.data.loaders import Batch
from common.distributed import Dist
from common.run.progress import Progress
from projects.s4gan_mlmt.config import Config
from projects.s4gan_mlmt.mlmt import train
from projects.s4gan_mlmt.mlmt.losses import Share, whole
from projects.s4gan_mlmt.mlmt.model import networks_of
from projects.s4gan_mlmt.mlmt.state import Run, build_student_optimizer, no_sums
from projects.s4gan_mlmt.tests.toys import Steps
from projects.s4gan_mlmt.training_split import write_permutation

CLASSES = 21


def photo(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Image (H, W, 3) and mask (H, W) of two classes on background, with an ignored border."""
    rng = np.random.default_rng(index)
    height, width = 40 + index % 5, 52 - index % 3
    mask = np.zeros((height, width), np.uint8)
    mask[4:20, 4:24] = 1 + index % 20
    mask[22:36, 20:44] = 1 + (index * 7 + 3) % 20
    mask[:2] = 255
    tones = np.random.default_rng(5).integers(20, 235, (256, 3))
    image = tones[mask] + rng.normal(0, 10, (height, width, 3))
    return image.clip(0, 255).astype(np.uint8), mask


def flags(index: int) -> list[int]:
    """The line of a label file: classes 1..20, then the background."""
    mask = photo(index)[1]
    return [int((mask == k).any()) for k in (*range(1, CLASSES), 0)]


def label_text(indices: Sequence[int]) -> str:
    """Lines as the authors write them, each with a blank at its end."""
    return "".join(" ".join(map(str, flags(i))) + " \n" for i in indices)


def write_voc(folder: Path, train: int = 10, val: int = 5, *, label_files: bool = False) -> Path:
    """Photos, masks and lists; with `label_files` the original's four text files too."""
    for part in ("JPEGImages", "SegmentationClassAug"):
        (folder / part).mkdir(parents=True)
    for i in range(train + val):
        image, mask = photo(i)
        Image.fromarray(image).save(folder / "JPEGImages" / f"p{i:03d}.jpg", quality=95)
        Image.fromarray(mask).save(folder / "SegmentationClassAug" / f"p{i:03d}.png")
    parts = {"train": range(train), "val": range(train, train + val)}
    for name, indices in parts.items():
        ids = [f"p{i:03d}" for i in indices]
        (folder / {"train": "train_aug.txt", "val": "val.txt"}[name]).write_text("\n".join(ids) + "\n")
        if label_files:
            (folder / f"{name}_img.txt").write_text("".join(f"{i}.jpg\n" for i in ids))
            (folder / f"{name}_label.txt").write_text(label_text(indices))
    write_permutation(folder / "train_voc_split.pkl", np.random.RandomState(0).permutation(train))
    return folder


def tree(folder: Path | None = None, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """Settings: of 10 photos 5 are labeled; two epochs of 3 + 3 steps, the last batch short; sections add to it."""
    data: dict[str, Any] = {"dataset": "shapes", "split": "none"}
    if folder is not None:
        data = {
            "dataset": "voc", "root": str(folder), "split": "full", "labeled_ratio": 0.5,
            "split_file": str(folder / "train_voc_split.pkl"),
        }  # fmt: skip
    values: dict[str, Any] = {
        "data": data,
        "mlmt": {
            "backbone": "resnet_tiny", "size": 33, "workers": 0, "labeled_batch": 2, "unlabeled_batch": 3,
            "val_batch": 2, "epochs": 3, "burn_in_epochs": 0, "evaluation_epochs": 2, "lr": 0.02,
        },
        "method": {"name": "s4gan_mlmt"},
        "run": {"device": "cpu", "channels_last": False, "log_interval": 2, "deterministic": True},
    }  # fmt: skip
    for name, more in sections.items():
        values[name] = values.get(name, {}) | dict(more)
    return values


def config(folder: Path | None = None, **sections: Mapping[str, Any]) -> Config:
    return build(Config, tree(folder, **sections))


def write_config(path: Path, folder: Path, **sections: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree(folder, **sections)))
    return path


class Toy(nn.Module):
    """A convolution, BatchNorm and a linear layer; with `frozen` the normalization never looks at the batch."""

    def __init__(self, classes: int = CLASSES, width: int = 6, *, frozen: bool = False) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 3, stride=2, bias=False), nn.BatchNorm2d(width)
        self.fc, self.frozen = nn.Linear(width, classes), frozen

    def train(self, mode: bool = True) -> Toy:
        super().train(mode)
        self.norm.train(mode and not self.frozen)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).relu().mean(dim=(2, 3)))


def toy(seed: int = 0, *, frozen: bool = False, dtype: torch.dtype = torch.float64) -> Toy:
    torch.manual_seed(seed)
    return Toy(frozen=frozen).to(dtype)


class StepBatches(NamedTuple):
    """What a process sees in a step: batches, and its part of the global ones."""

    labeled: Batch
    unlabeled: Batch
    labeled_share: Share
    unlabeled_share: Share


class Data:
    """Stands for the loaders of a run: one step is an epoch, and has these batches."""

    batches: StepBatches
    steps_per_epoch = 1

    def shares(self, at: Progress) -> tuple[Share, Share]:
        return self.batches[2:]


class Loop:
    """The real loop over toy steps; the rate is that of the epoch (constant where `mlmt.eta_min` equals `mlmt.lr`).

    Args:
        cfg: the configuration, see `config`.
        student: the network that learns.
        teacher: its average.
    """

    def __init__(self, cfg: Config, student: nn.Module, teacher: nn.Module) -> None:
        nets, data = networks_of(cfg, student, teacher, Dist()), Data()
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        optimizer = build_student_optimizer(cfg.mlmt, student)
        self.data, self.nets = data, nets
        self.run = Run(cfg, Dist(), data, nets, optimizer, scaler, no_sums(Dist()))
        self.session = Steps(self.run)

    def advance(self, batches: StepBatches, epoch: int = 0) -> dict[str, Tensor]:
        """One optimizer step; its losses and figures."""
        self.data.batches = batches
        self.session.groups.append([batches[:2]])
        train.train_epoch(epoch, self.run, self.session)
        found = self.session.found
        return found.terms | {"loss": found.total}


def step_batches(seed: int = 0, labeled: int = 4, unlabeled: int = 6) -> StepBatches:
    """Random photos and label vectors of one process."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(labeled, 3, 9, 9, generator=generator, dtype=torch.float64)
    views = torch.randn(unlabeled, 6, 9, 9, generator=generator, dtype=torch.float64)
    y = (torch.rand(labeled, CLASSES, generator=generator) < 0.3).double()
    y[:, -1] = 1
    index = torch.arange
    return StepBatches(
        Batch(x, y, index(labeled)), Batch(views, None, index(unlabeled)), whole(x), whole(views)
    )


def cut(batches: StepBatches, processes: int) -> list[StepBatches]:
    """The parts of a global batch as that many processes see them: every W-th image, filled up by repetitions."""

    def part(batch: Batch, rank: int) -> tuple[Batch, Share]:
        total = len(batch.image)
        own = list(range(rank, total, processes))
        places = own + [0] * (-(-total // processes) - len(own))
        label = None if batch.label is None else batch.label[places]
        return Batch(batch.image[places], label, torch.tensor(places)), Share(len(own), total, processes)

    parts = []
    for rank in range(processes):
        (one, first), (two, second) = part(batches.labeled, rank), part(batches.unlabeled, rank)
        parts.append(StepBatches(one, two, first, second))
    return parts
