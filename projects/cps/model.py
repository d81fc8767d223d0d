"""The networks of a run, and how its steps call them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.distributed import Dist
from common.models import placing
from common.models.deeplab import upsample
from common.models.generic import build_generic
from common.numerics.precision import autocast, widened
from projects.cps.config import Config
from projects.cps.network import CpsNetwork, build_cps_network, init_head

BRANCHES = ("branch1", "branch2")  # the authors' names

Supervised = Callable[[Tensor, Tensor], Tensor]


def segment(network: nn.Module, x: Tensor, precision: str = "fp32") -> Tensor:
    """Logits (B, K, H, W) in float32 at the size of the images (B, 3, H, W)."""
    with autocast(x.device, precision):
        _, logits = network(x)
    return upsample(widened(logits), x.shape[-2:])


class Branches(nn.Module):
    """Networks that learn together, as one module, so that their gradients are reduced over processes at once.

    Args:
        networks: one or two networks; they become `branch1` and `branch2`.
        separate: QUIRK quirks.separate_statistics: every batch has BatchNorm statistics of its own.
        precision: of the forward passes.
    """

    def __init__(self, networks: Sequence[nn.Module], separate: bool = True, precision: str = "fp32") -> None:
        super().__init__()
        for name, network in zip(BRANCHES, networks, strict=False):
            self.add_module(name, network)
        self.separate, self.precision = separate, precision

    def forward(self, *batches: Tensor) -> list[list[Tensor]]:
        """Logits at image size for every network and batch; a network sees the batches in their order."""
        return [self.scores(network, batches) for network in self.children()]

    def scores(self, network: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
        """Logits of one network for each batch."""
        if self.separate:
            return [segment(network, x, self.precision) for x in batches]
        joined = segment(network, torch.cat(list(batches)), self.precision)
        return list(torch.split(joined, [len(x) for x in batches]))


@dataclass
class Networks:
    """The networks of a run.

    Attributes:
        modules: all of them by their name in checkpoints: one or both `BRANCHES`, and what a baseline adds. The
            authors evaluate the first.
        forward: those that learn, as the loop calls them (distributed, compiled): `Branches` or `CctModel`.
        criterion: supervised loss of logits (B, K, H, W) and labels (B, H, W).
        precision: of the forward passes; losses are always float32.
        detect: the flaw detector of GCT as the loop calls it.
        unsynchronized: those in which each of several processes computes BatchNorm on its own batch.
    """

    modules: Mapping[str, nn.Module]
    forward: Callable[..., Any]
    criterion: Supervised
    precision: str = "fp32"
    detect: nn.Module | None = None
    unsynchronized: tuple[nn.Module, ...] = ()

    def train(self) -> None:
        """Put all of them into train mode."""
        for module in self.modules.values():
            module.train()

    def teach(self, *batches: Tensor, train: bool = True) -> list[list[Tensor]]:
        """Logits without gradients, of every branch for every batch.

        With `train` in train mode, which moves the running statistics; else in evaluation mode. They are in train mode
        before and after.
        """
        branches = [self.modules[name] for name in BRANCHES if name in self.modules]
        for branch in () if train else branches:
            branch.eval()
        with torch.no_grad():
            scores = [[segment(branch, x, self.precision) for x in batches] for branch in branches]
        for branch in () if train else branches:
            branch.train()
        return scores

    def share_statistics(self, dist: Dist) -> None:
        """Give all processes the first one's BatchNorm statistics; every step and evaluation begins with those."""
        placing.share_statistics(self.unsynchronized, dist)


class MeanOfBranches(nn.Module):
    """Both networks of a run as one that predicts the mean of their logits."""

    def __init__(self, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def predict(self, x: Tensor) -> Tensor:
        """Logits (B, K, H, W) at the size of the images (B, 3, H, W)."""
        scores = [branch.predict(x) for branch in self.branches]  # type: ignore[operator]
        return torch.stack(scores).mean(dim=0)


def build_branch(cfg: Config, num_classes: int) -> CpsNetwork:
    """A network with fresh random numbers; the head's are drawn as the authors do, unless it is the generic one."""
    model = cfg.model
    if model.network == "generic":
        generic = build_generic(model, num_classes)
        return CpsNetwork(generic.encoder, generic.decoder.body, generic.decoder.classifier)
    network = build_cps_network(model, num_classes)
    init_head(network)
    return network
