"""Small networks in float64, batches and settings for tests of the training step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from common.config import build
from common.data.loaders import Batch
from common.data.spec import IGNORE
from common.data.streams import Batches
from common.distributed import Dist
from common.numerics.losses import Losses
from common.run import session
from common.run.guard import FiniteGuard
from common.run.progress import Progress
from common.run.session import Session
from common.run.signals import StopRequest
from projects.s4gan_mlmt import train
from projects.s4gan_mlmt.config import Config
from projects.s4gan_mlmt.losses import fake_maps
from projects.s4gan_mlmt.model import Networks, build_networks
from projects.s4gan_mlmt.optimizer import build_optimizers
from projects.s4gan_mlmt.state import Run

CLASSES, SIZE = 4, (32, 32)
METHODS = ("sup_only", "s4gan")


def config(name: str = "s4gan", **sections: Mapping[str, Any]) -> Config:
    """A configuration of the method `name` for tiny networks of the authors' kind; sections add to its values."""
    tree: dict[str, dict[str, Any]] = {
        "data": {"dataset": "shapes", "split": "none", "pipeline": "house", "crop_size": list(SIZE)},
        "optim": {"lr": 0.002, "steps": 20, "epochs": 2, "batch_size": 4},
        "model": {"network": "deeplabv2", "layers": [1, 1, 1, 1], "width": 4, "d_width": 4},
        "method": {"name": name, "dropout": 0.0},
        "run": {"device": "cpu", "channels_last": False},
    }
    for section, values in sections.items():
        tree[section] = tree.get(section, {}) | dict(values)
    return build(Config, tree)


def toy_networks(cfg: Config, seed: int = 0, dist: Dist | None = None) -> Networks:
    """The real networks in float64, with a discriminator whose scores of images differ."""
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.float64)
    try:
        nets = build_networks(cfg, CLASSES, dist or Dist())
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for module in nets.segmenter.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(15)  # far from the tiny numbers of a fresh network
        if nets.critic is not None:
            for p in nets.critic.parameters():
                p.mul_(2)
    return nets


def batch(seed: int, images: int = 4) -> Batch:
    """Random images, and labels of which more and more are ignored from image to image."""
    generator = torch.Generator().manual_seed(seed)
    x = 50 * torch.randn(images, 3, *SIZE, generator=generator, dtype=torch.float64)
    y = torch.randint(0, CLASSES, (images, *SIZE), generator=generator)
    share = torch.linspace(0.05, 0.8, images).view(-1, 1, 1)
    y = y.where(torch.rand(images, *SIZE, generator=generator) >= share, IGNORE)
    return Batch(x, y, torch.arange(images))


def batches(cfg: Config, seed: int, images: int = 4) -> Batches:
    """One batch per loader: labeled, unlabeled, real."""
    roles = 3 if cfg.method.adversarial else 1
    return tuple(batch(10 * seed + i, images) for i in range(roles))


def part(group: Batches, *sizes: int) -> list[Batches]:
    """A group of batches as several smaller ones of these sizes, in order."""
    pieces = [[Batch(*some) for some in zip(*(f.split(sizes) for f in one), strict=True)] for one in group]
    return list(zip(*pieces, strict=True))


def score_fakes(nets: Networks, group: Batches, dist: Dist | None = None) -> Tensor:
    """Scores (B,) of the unlabeled images by networks that do not change."""
    assert nets.critic is not None
    with torch.no_grad():
        (logits,) = nets.segmenter(group[1].image)
        return nets.critic.judged(fake_maps(logits, group[1].image, dist or Dist())).scores.flatten()


class Steps(Session):
    """Steps of a training loop on batches that are handed over; nothing is written, the losses are kept.

    Args:
        run: what is trained.
        groups: the batches of the next steps.
    """

    def __init__(self, run: session.Run, groups: Sequence[list[Batches]] = ()) -> None:
        super().__init__(run, "toys", None, request=StopRequest())
        self.guard = FiniteGuard(run.cfg.run.on_nonfinite, run.dist, 5, at_once=True)
        self.groups, self.found = list(groups), Losses(torch.zeros(()), {})

    def steps(self, epoch: int) -> Iterator[tuple[Progress, list[Batches]]]:
        """The next step of the epoch."""
        length = max(self.run.total_steps // self.run.epochs, 1)
        yield Progress(epoch * length + self.run.step % length, length, self.run.epochs), self.groups.pop(0)

    def watch(self, at: Progress, losses: Losses, group: list[Batches]) -> Tensor:
        """As the loop's, with names for the images."""
        return self.guard.watch(self.run.step + 1, losses, lambda: "a, b")

    def record(self, epoch: int, losses: Losses, bad: Tensor, lr: float) -> None:
        """As the loop's; keeps what the log is given."""
        super().record(epoch, losses, bad, lr)
        terms = {name: value.detach() for name, value in losses.terms.items()}
        self.found = Losses(losses.total.detach(), terms | {"nonfinite": bad})


class Loop:
    """The real loop over toy steps.

    Args:
        cfg: the configuration, see `config`.
        seed: of the networks.
        frozen: BatchNorm uses its running statistics, so that no image depends on the others of its batch.
        dist: this process.
        nets: networks in place of random ones.
    """

    def __init__(
        self,
        cfg: Config,
        seed: int = 0,
        *,
        frozen: bool = False,
        dist: Dist | None = None,
        nets: Networks | None = None,
    ) -> None:
        self.cfg, self.dist, self.nets = cfg, dist or Dist(), nets or toy_networks(cfg, seed, dist)
        data: Any = None
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.run = Run(cfg, self.dist, data, self.nets, build_optimizers(cfg, self.nets.bare), scaler)
        self.session = Steps(self.run)
        self.guard = self.session.guard
        self.rates: list[list[float]] = []
        for network in self.nets.bare.values():
            network.train()
            for module in network.modules():
                if frozen and isinstance(module, nn.BatchNorm2d):
                    module.eval()
                    module.train = lambda mode=True, module=module: module

    def advance(self, group: Sequence[Batches] | None = None) -> Losses:
        """One optimizer step, by default on random batches of its own."""
        self.session.groups.append(list(group or [batches(self.cfg, self.run.step)]))
        train.train_epoch(self.run.step // self.cfg.optim.steps_per_round, self.run, self.session)
        self.rates.append([g["lr"] for one in self.run.optimizers.values() for g in one.param_groups])
        return self.session.found

    def gradients(self, group: Batches) -> tuple[Losses, dict[str, Tensor]]:
        """Losses and gradients of one forward, without a step."""
        step, self.guard.step = self.guard.step, lambda *_: None
        result = self.advance([group])
        self.guard.step, self.run.step = step, self.run.step - 1
        return result, {
            f"{name}.{key}": p.grad.clone()
            for name, network in self.nets.bare.items()
            for key, p in network.named_parameters()
            if p.grad is not None
        }

    def weights(self) -> dict[str, Tensor]:
        """Copies of all parameters and buffers by network and name."""
        return {
            f"{name}.{key}": value.detach().clone()
            for name, network in self.nets.bare.items()
            for key, value in network.state_dict().items()
        }


def furthest(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    """Largest relative difference of two sets of weights."""
    assert one.keys() == two.keys()
    return max(float((one[k] - two[k]).abs().max() / one[k].abs().max().clamp(min=1e-12)) for k in one)


def write_config(
    path: Path, dataset: Path, split: str = "few", method: str = "s4gan", **sections: Mapping[str, Any]
) -> Path:
    """A configuration of 8 steps on the tiny dataset; sections add to it."""
    tree: dict[str, Any] = {
        "data": {"dataset": str(dataset), "split": split, "val": "val", "pipeline": "house",
                 "crop_size": [32, 32], "workers": 0},
        "optim": {"lr": 0.002, "steps": 8, "epochs": 2, "batch_size": 2},
        "model": {"network": "deeplabv2", "layers": [1, 1, 1, 1], "width": 4, "d_width": 4},
        "method": {"name": method},
        "mlmt": {"backbone": "resnet_tiny", "size": 33, "labeled_batch": 2, "unlabeled_batch": 2, "workers": 0,
                 "epochs": 1},
        "eval": {"protocol": "whole_image", "during_training": "whole_image", "list": "val"},
        "run": {"log_interval": 1, "panels": False, "device": "cpu"},
    }  # fmt: skip
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | dict(values)
    path.write_text(yaml.safe_dump(tree))
    return path
