"""Small networks in float64, batches and settings for tests of the training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from torch import Tensor, nn

from common.config import build
from common.data.loaders import Batch
from common.data.spec import IGNORE
from common.data.streams import Batches
from common.distributed import Dist
from common.numerics.losses import Losses
from common.numerics.precision import grad_scaler
from common.run.guard import FiniteGuard
from common.run.progress import Progress
from projects.cps import methods, train
from projects.cps.config import Config
from projects.cps.methods import build_draws, build_networks, build_optimizers
from projects.cps.model import Networks
from projects.cps.network import CpsNetwork
from projects.cps.state import Run

CLASSES, SIZE = 5, (16, 16)
METHODS = ("sup_only", "cps", "cps_cutmix", "mean_teacher", "cct", "gct")
SEMI = METHODS[1:]


def config(name: str = "cps", **sections: Mapping[str, Any]) -> Config:
    """A configuration of the method `name` for toy networks; sections add to or replace its values."""
    tree: dict[str, dict[str, Any]] = {
        "data": {"dataset": "shapes", "split": "none", "crop_size": list(SIZE)},
        "optim": {"lr": 0.1, "epochs": 10, "batch_size": 4},
        "method": {"name": name, "gct": {"detector_planes": 2, "detector_strides": [1] * 8}},
        "run": {"device": "cpu", "channels_last": False},
    }
    for section, values in sections.items():
        tree[section] = tree.get(section, {}) | dict(values)
    return build(Config, tree)


@contextmanager
def float64() -> Iterator[None]:
    """Modules that are built inside are float64."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


class ToyBackbone(nn.Module):
    def __init__(self, planes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, planes, 3, stride=4, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x)).relu()


class ToyHead(nn.Module):
    def __init__(self, in_planes: int, planes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_planes, planes, 1, bias=False)
        self.bn = nn.BatchNorm2d(planes)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


def toy_branch(cfg: Config, num_classes: int) -> CpsNetwork:
    """Takes the place of `build_branch`; features at stride 4, as everywhere."""
    return CpsNetwork(
        ToyBackbone(6), ToyHead(6, cfg.model.inner_planes), nn.Conv2d(cfg.model.inner_planes, num_classes, 1)
    )


def build_toys(cfg: Config, seed: int = 0, dist: Dist | None = None, num_classes: int = CLASSES) -> Networks:
    """The real method around toy networks in float64."""
    torch.manual_seed(seed)
    with float64(), mock.patch.object(methods, "build_branch", toy_branch):
        return build_networks(cfg, num_classes, dist or Dist())


def run_of(cfg: Config, nets: Networks, draws: Any = None, dist: Dist | None = None) -> Run:
    """A run without loaders."""
    dist, data = dist or Dist(), None
    optimizers, scaler = build_optimizers(cfg, nets), grad_scaler(cfg.run.precision, dist)
    return Run(cfg, dist, data, nets, draws or build_draws(cfg, dist), optimizers, scaler)


def batch(seed: int, images: int = 4, labels: bool = True, classes: int = CLASSES) -> Batch:
    """Random images, and labels of which more and more are ignored from image to image; without, all are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, 3, *SIZE, generator=generator, dtype=torch.float64)
    y = torch.randint(0, classes, (images, *SIZE), generator=generator)
    share = torch.linspace(0.05, 0.8, images).view(-1, 1, 1) if labels else 1.0
    y = y.where(torch.rand(images, *SIZE, generator=generator) >= share, IGNORE)
    return Batch(x, y, torch.arange(images))


def batches(cfg: Config, seed: int, images: int = 4) -> Batches:
    """One batch per loader that the method has: labeled images first."""
    others = {"sup_only": 0, "cps_cutmix": 2}.get(cfg.method.name, 1)
    return (batch(10 * seed, images), *(batch(10 * seed + i, images, False) for i in range(1, others + 1)))


def cut(group: Batches, parts: int) -> list[Batches]:
    """A group of batches as several smaller ones, in order."""
    pieces = [
        [Batch(*some) for some in zip(*(field.chunk(parts) for field in one), strict=True)] for one in group
    ]
    return list(zip(*pieces, strict=True))


@dataclass
class Call:
    """How a network was called.

    Attributes:
        images: how many.
        training: in train mode.
        graph: gradients were recorded.
    """

    images: int
    training: bool
    graph: bool


def record_calls(module: nn.Module) -> list[Call]:
    """Every later call of the module, in order."""
    calls: list[Call] = []

    def note(module: nn.Module, args: Sequence[Any]) -> None:
        calls.append(Call(len(args[0]), module.training, torch.is_grad_enabled()))

    module.register_forward_pre_hook(note)
    return calls


def freeze_statistics(nets: Networks) -> None:
    """BatchNorm uses its running statistics whatever the mode, so that no image depends on the others of its batch."""
    for module in nets.modules.values():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eval()
                part.train = lambda mode=True, part=part: part


class OneStep:
    """A session of one optimizer step on given batches, for `train.train_epoch`; `result` is what it would log."""

    def __init__(self, guard: FiniteGuard, at: Progress, group: Sequence[Batches]) -> None:
        self.guard, self.at, self.group = guard, at, list(group)

    def steps(self, epoch: int) -> Iterator[tuple[Progress, list[Batches]]]:
        assert epoch == self.at.epoch
        yield self.at, self.group

    def watch(self, at: Progress, losses: Losses, group: list[Batches]) -> Tensor:
        return self.guard.watch(at.step + 1, losses, lambda: "a, b")

    def record(self, epoch: int, losses: Losses, bad: Tensor, lr: float) -> None:
        self.result = Losses(losses.total, losses.terms | {"nonfinite": bad})

    def save_or_stop(self) -> bool:
        return True


def one_step(run: Run, at: Progress, group: Sequence[Batches], guard: FiniteGuard | None = None) -> Losses:
    """Loss, terms and `nonfinite` of an optimizer step that the real loop makes."""
    session = OneStep(guard or FiniteGuard("stop", run.dist, 5, at_once=True), at, group)
    assert train.train_epoch(at.epoch, run, session)
    return session.result


class Loop:
    """The real loop over toy steps.

    Args:
        cfg: the configuration, see `config`.
        seed: of the networks.
        frozen: see `freeze_statistics`.
        dist: this process.
    """

    def __init__(
        self,
        cfg: Config,
        seed: int = 0,
        *,
        frozen: bool = False,
        dist: Dist | None = None,
        steps_per_epoch: int = 3,
    ) -> None:
        self.cfg, self.length = cfg, steps_per_epoch
        dist = dist or Dist()
        self.nets = build_toys(cfg, seed, dist)
        if frozen:
            freeze_statistics(self.nets)
        self.run = run_of(cfg, self.nets, dist=dist)
        self.modules, self.optimizers = self.nets.modules, self.run.optimizers
        self.guard = FiniteGuard(cfg.run.on_nonfinite, dist, 5, at_once=True)
        self.rates: list[dict[str, float]] = []

    def advance(self, group: Sequence[Batches] | None = None) -> Losses:
        """One optimizer step, by default on random batches of its own."""
        at = Progress(self.run.step, self.length, self.cfg.optim.epochs)
        result = one_step(self.run, at, group or [batches(self.cfg, at.step)], self.guard)
        self.rates.append({k: one.param_groups[0]["lr"] for k, one in self.optimizers.items()})
        self.run.step += 1
        return result

    def weights(self, only: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
        """Copies of all parameters and buffers by module and name."""
        return {
            f"{name}.{key}": value.detach().clone()
            for name, module in self.modules.items()
            for key, value in module.state_dict().items()
            if only(name)
        }

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the last step that parameters still hold."""
        return {
            f"{name}.{key}": p.grad.clone()
            for name, module in self.modules.items()
            for key, p in module.named_parameters()
            if p.grad is not None
        }


def furthest(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    """Largest relative difference of two sets of weights."""
    assert one.keys() == two.keys()
    return max(float((one[k] - two[k]).abs().max() / one[k].abs().max().clamp(min=1e-12)) for k in one)


def write(path: Path, split: Path, method: str, **sections: Mapping[str, Any]) -> Path:
    """A configuration of 3 epochs of 4 steps; sections add to it."""
    val = str(split / "val.txt")
    tree: dict[str, Any] = {
        "data": {"dataset": "shapes", "split": str(split), "val": val, "crop_size": [32, 32], "workers": 0},
        "optim": {"lr": 0.02, "epochs": 3, "batch_size": 2},
        "model": {"backbone": "resnet_tiny", "stem": "plain", "width": 4, "inner_planes": 8, "low_planes": 4,
                  "dilations": [1, 2, 3], "multi_grid": [1, 1, 1]},
        "method": {"name": method, "gct": {"detector_planes": 4, "detector_strides": [2, 2, 1, 1, 1, 1, 1, 1]}},
        "eval": {"protocol": "whole_image", "during_training": "whole_image", "list": val, "every_epochs": 1},
        "keep": {"every_epochs": 1},
        "run": {"log_interval": 2, "deterministic": True, "channels_last": False, "panels": False, "device": "cpu"},
    }  # fmt: skip
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | dict(values)
    path.write_text(yaml.safe_dump(tree))
    return path


def write_config(
    path: Path, dataset: Path, split: str = "few", method: str = "cps", **sections: Mapping[str, Any]
) -> Path:
    """The same for a dataset of files with lists of its own."""
    own: dict[str, Mapping[str, Any]] = {
        "data": {"dataset": str(dataset), "split": split, "val": "val"},
        "eval": {"protocol": "whole_image", "during_training": "whole_image", "list": "val"},
        "run": {"deterministic": False, "log_interval": 1},
    }
    for name, values in sections.items():
        own[name] = {**own.get(name, {}), **values}
    return write(path, dataset.parent, method, **own)
