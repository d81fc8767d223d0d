"""Measure a network of a run; the same code while training and in the scripts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from typing import Protocol as Shape

from torch import Tensor, nn

from common.data.spec import DatasetSpec
from common.distributed import Dist
from common.errors import UserError
from common.measure.evaluation import Evaluation, OnImage, Protocol, When, evaluate_list, protocol_of
from projects.cps.config import Config
from projects.cps.inference import OriginalProtocol, PortProtocol
from projects.cps.model import BRANCHES, MeanOfBranches


class Predicting(Shape):
    """A network that maps images (B, 3, H, W) to logits at their size."""

    def predict(self, x: Tensor, /) -> Tensor:
        """Logits (B, K, H, W)."""


def protocol(cfg: Config, when: When) -> Protocol:
    """The protocol that the configuration names for this occasion."""
    settings = cfg.eval
    kind = settings.during_training if when == "training" else settings.protocol
    if kind not in ("original", "port"):
        return protocol_of(settings, cfg.data, when)
    script = when == "script"
    shared: dict[str, Any] = {
        "crop_size": settings.crop_size or cfg.data.crop_size,
        "stride": settings.stride,
        "scales": settings.scales if script else (1.0,),
        "flip": settings.flip and script,
    }
    if kind == "port":
        return PortProtocol(**shared)
    return OriginalProtocol(**shared, mean=cfg.data.mean, std=cfg.data.std)


def network_names(cfg: Config) -> tuple[str, ...]:
    """Networks that can be measured: what `cfg` trains, and the mean where two learn or one follows."""
    return BRANCHES[:1] if cfg.method.name in ("sup_only", "cct") else (*BRANCHES, "mean")


def labeling_networks(cfg: Config) -> tuple[str, ...]:
    """The networks whose predictions the method takes as pseudo-labels or targets."""
    if cfg.method.name == "sup_only":
        return ()
    one = {"mean_teacher": "branch2", "cct": "branch1"}.get(cfg.method.name)
    return BRANCHES if one is None else (one,)


def require_network(cfg: Config, name: str) -> None:
    """Refuse a network that this method does not have.

    Raises:
        UserError: names those that it has.
    """
    if name not in network_names(cfg):
        raise UserError(
            f"eval.network={name}: method {cfg.method.name} has no such network; use one of "
            f"{', '.join(network_names(cfg))}"
        )


def measured(cfg: Config, modules: Mapping[str, nn.Module], name: str) -> Predicting:
    """The network that `name` stands for, in evaluation mode.

    Raises:
        UserError: this method has no such network.
    """
    require_network(cfg, name)
    chosen = [modules[key] for key in (BRANCHES if name == "mean" else (name,))]
    network = MeanOfBranches(chosen) if len(chosen) > 1 else chosen[0]
    return network.eval()  # type: ignore[return-value]


def evaluate_modules(
    cfg: Config,
    modules: Mapping[str, nn.Module],
    spec: DatasetSpec,
    images: str,
    how: Protocol,
    dist: Dist,
    on_image: OnImage | None = None,
) -> Evaluation:
    """MIoU of `eval.network` on the list `images`; a collective. Leaves the network in evaluation mode."""
    forward = measured(cfg, modules, cfg.eval.network).predict
    return evaluate_list(
        forward, cfg.data, spec, images, how, dist, precision=cfg.run.precision, on_image=on_image
    )
