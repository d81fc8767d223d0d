"""The networks of a run and how they reach a device and several processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.distributed import Dist
from common.models.deeplab import upsample
from common.models.pretrained import find_weights, load_pretrained
from common.numerics.precision import autocast, synchronised, widened
from common.run.log import RunLog
from projects.cps.config import Config
from projects.cps.network import CpsNetwork, build_cps_network, init_head

M = TypeVar("M", bound=nn.Module)


def segment(network: nn.Module, x: Tensor, precision: str = "fp32") -> Tensor:
    """Logits (B, K, H, W) in float32 at the size of the images (B, 3, H, W)."""
    with autocast(x.device, precision):
        _, logits = network(x)
    return upsample(widened(logits), x.shape[-2:])


class Branches(nn.Module):
    """Networks that learn together, as one module, so that their gradients are reduced over processes at once.

    Args:
        networks: one or two networks; they become `branch1` and `branch2`, the authors' names.
        separate: every batch has BatchNorm statistics of its own (`quirks.separate_statistics`).
        precision: of the forward passes.
    """

    def __init__(self, networks: Sequence[nn.Module], separate: bool = True, precision: str = "fp32") -> None:
        super().__init__()
        for number, network in enumerate(networks, start=1):
            self.add_module(f"branch{number}", network)
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
    """A network with fresh random numbers; the head's are drawn as the authors do."""
    model = cfg.model
    network = build_cps_network(
        model.backbone,
        num_classes=num_classes,
        stem=model.stem,
        output_stride=model.output_stride,
        multi_grid=model.multi_grid,
        width=model.width,
        inner_planes=model.inner_planes,
        low_planes=model.low_planes,
        dilations=model.dilations,
    )
    init_head(network)
    return network


def placed(module: M, cfg: Config, dist: Dist) -> M:
    """The module on its device, with synchronised BatchNorm and memory layout as configured."""
    if synchronised(cfg.model.sync_bn, dist):
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    layout = torch.channels_last if cfg.run.channels_last else torch.contiguous_format
    return module.to(device=dist.device).to(memory_format=layout)


def wrapped(module: nn.Module, cfg: Config, dist: Dist) -> nn.Module:
    """The module as the loop calls it: compiled, and its gradients averaged over processes."""
    module = torch.compile(module) if cfg.run.compile else module  # type: ignore[assignment]
    if dist.world_size == 1:
        return module
    ids = [dist.local_rank] if dist.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False)


def load_backbone(cfg: Config, modules: Mapping[str, nn.Module], log: RunLog) -> None:
    """Give every segmentation network the ImageNet weights that the configuration names, and say what was used.

    Raises:
        UserError: the file is missing or does not fit.
    """
    if cfg.model.weights == "none":
        log.info("backbone: random numbers (model.weights=none)")
        return
    path = find_weights(cfg.model.weights)
    backbones = (getattr(module, "backbone", None) for module in modules.values())
    reports = [load_pretrained(one, path) for one in backbones if isinstance(one, nn.Module)]
    log.info(f"backbone: {reports[0].summary()}")
