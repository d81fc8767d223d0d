"""The optimizers of s4GAN; SGD that updates a parameter as often as the original lists it.

QUIRK quirks.visits: the original walks all modules of the backbone and takes the parameters of each, so a parameter is
listed once for every module that contains it. PyTorch 0.4 kept such duplicates and updated it once per entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from common.config import OptimConfig
from common.numerics.optim import build_optimizer, encoder_and_heads
from projects.s4gan_mlmt.config import Config, Visits
from projects.s4gan_mlmt.deeplabv2 import DeepLabV2
from projects.s4gan_mlmt.model import DISCRIMINATOR, SEGMENTATION, LogitsOnly
from projects.s4gan_mlmt.wrn38 import DeepLabV3PlusWrn38


class VisitedGroup(NamedTuple):
    """Parameters that learn with `lr * lr_factor`.

    Attributes:
        names: of the parameters in the network, in the order in which the original first lists them.
        parameters: the parameters.
        visits: how often the original lists each of them.
        lr_factor: of the group.
    """

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    visits: tuple[int, ...]
    lr_factor: float


class VisitedSgd(torch.optim.Optimizer):
    """SGD with momentum in which a step updates a parameter `visits` times with the same gradient.

    Of a step with gradient g, rate lr, momentum mu and decay wd, each visit does:

    - `repeated_0_4`, as PyTorch 0.4: g := g + wd * p, kept in the gradient for the next visit, so that the decay adds
      up; buf := mu * buf + g; p := p - lr * buf.
    - `repeated_1_5`, as later versions: buf := mu * buf + (g + wd * p); p := p - lr * buf. In the first step every
      visit starts from an empty buffer and the last one is kept.
    - `once`: one visit, whatever `visits` says.

    Parameters without a gradient are left alone. A step is a few fused kernels per number of visits; it takes a
    cancelled step (`found_inf`) and a scaled loss (`grad_scale`) from `GradScaler` and `FiniteGuard` as fused steps
    do, without asking the device.

    Args:
        groups: dicts with `params`, `visits` (one number per parameter) and, optionally, `lr` and the others.
        lr: rate of groups without one of their own.
        momentum: mu.
        weight_decay: wd.
        mode: which of the three.
    """

    _step_supports_amp_scaling = True  # GradScaler then hands over its scale and its verdict

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        mode: Visits = "repeated_0_4",
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "mode": mode})
        for group in self.param_groups:
            params, visits = group["params"], group["visits"]
            if len(params) != len(visits) or min(visits, default=1) < 1:
                raise ValueError(f"{len(params)} parameters need as many positive 'visits', not {visits}")
            if momentum == 0:
                continue
            # a first step that is cancelled on the device would leave them uninitialized; 0 equals "none yet"
            for p in params:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            if mode == "repeated_1_5" and params:
                self.state[params[0]]["begun"] = torch.zeros(
                    (), dtype=params[0].dtype, device=params[0].device
                )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One optimizer step; returns what `closure` returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale: Tensor | None = getattr(self, "grad_scale", None)
        cancel: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            begun = self.state.get(group["params"][0], {}).get("begun") if group["params"] else None
            for visits, params in _by_visits(group):
                self._visit(group, params, visits, scale, cancel, begun)
            if begun is not None:
                begun.copy_(
                    begun.new_ones(()) if cancel is None else begun.where(cancel.reshape(()) > 0, 1.0)
                )
        return loss

    def _visit(
        self,
        group: dict[str, Any],
        params: list[nn.Parameter],
        visits: int,
        scale: Tensor | None,
        cancel: Tensor | None,
        begun: Tensor | None,
    ) -> None:
        """All visits of a step to parameters that have equally many."""
        grads = [p.grad for p in params if p.grad is not None]
        buffers = [self.state.get(p, {}).get("momentum_buffer") for p in params]
        decay, accumulates = group["weight_decay"], group["mode"] == "repeated_0_4"
        if scale is not None and visits > 1:  # once, and not in every visit
            torch._foreach_div_(grads, scale)
            scale = None
        for visit in range(visits):
            last = visit == visits - 1
            if accumulates and not last:
                torch._foreach_add_(grads, params, alpha=decay)  # type: ignore[arg-type]  # as below
            if begun is not None and visit > 0:
                torch._foreach_mul_(buffers, begun)
            sgd(
                params,  # type: ignore[arg-type]  # parameters are tensors
                grads,
                buffers,
                fused=True,
                grad_scale=scale,
                found_inf=cancel,
                weight_decay=0.0 if accumulates and not last else decay,
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )


def _by_visits(group: dict[str, Any]) -> Iterator[tuple[int, list[nn.Parameter]]]:
    """The group's parameters that have a gradient, by their number of visits."""
    found: dict[int, list[nn.Parameter]] = {}
    for p, visits in zip(group["params"], group["visits"], strict=True):
        if p.grad is not None:
            found.setdefault(1 if group["mode"] == "once" else visits, []).append(p)
    yield from sorted(found.items())


def visited_groups(network: nn.Module, head_lr_factor: float) -> list[VisitedGroup]:
    """Backbone and head of a segmentation network, as the original groups them.

    A parameter is listed once per module that contains it, hence as often as its name has dots, counted from where
    the walk begins: at the whole backbone in DeepLabV3+, at each of its parts in DeepLabV2. DeepLabV2's head is
    listed plainly. Frozen parameters are in no group. The networks of this repository list everything once.

    Args:
        network: `DeepLabV2`, `DeepLabV3PlusWrn38`, or any network whose backbone is its `encoder`.
        head_lr_factor: the head learns with `lr * head_lr_factor`.
    """
    if isinstance(network, DeepLabV2):
        parts = [["conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4."], ["layer5."]]
        walked = [True, False]
    elif isinstance(network, DeepLabV3PlusWrn38):
        parts = [["backbone."], ["aspp.", "bot_aspp.", "bot_fine.", "final."]]
        walked = [True, True]
    else:
        rest = dict.fromkeys(f"{name}." for name, _ in network.named_children() if name != "encoder")
        parts, walked = [["encoder."], list(rest)], [False, False]
    factors = (1.0, head_lr_factor)
    return [
        _listed(network, prefixes, walk, factor)
        for prefixes, walk, factor in zip(parts, walked, factors, strict=True)
    ]


def _listed(network: nn.Module, prefixes: Sequence[str], walked: bool, factor: float) -> VisitedGroup:
    names, parameters = [], []
    for prefix in prefixes:
        for name, p in network.named_parameters():
            if name.startswith(prefix) and p.requires_grad:
                names.append(name)
                parameters.append(p)
    visits = tuple(name.count(".") if walked else 1 for name in names)
    return VisitedGroup(tuple(names), tuple(parameters), visits, factor)


def build_generator_optimizer(
    optim: OptimConfig, network: nn.Module, visits: Visits = "repeated_0_4"
) -> VisitedSgd:
    """SGD of the segmentation network: two groups, backbone and head; `set_learning_rate` sets their rates.

    Args:
        optim: `lr`, `head_lr_factor`, `momentum` and `weight_decay` are taken.
        network: the bare network.
        visits: `quirks.visits`.
    """
    groups = [
        {
            "params": list(group.parameters),
            "visits": list(group.visits),
            "lr": optim.lr * group.lr_factor,
            "initial_lr": optim.lr * group.lr_factor,
        }
        for group in visited_groups(network, optim.head_lr_factor)
    ]
    return VisitedSgd(
        groups, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay, mode=visits
    )


def build_discriminator_optimizer(
    discriminator: nn.Module, *, lr: float, betas: tuple[float, float] = (0.9, 0.99)
) -> torch.optim.Adam:
    """Adam of the discriminator: one group, eps 1e-8, no weight decay; fused, so that a step can be cancelled."""
    group = {"params": list(discriminator.parameters()), "lr": lr, "initial_lr": lr}
    return torch.optim.Adam([group], lr=lr, betas=betas, fused=True)


def build_optimizers(cfg: Config, networks: Mapping[str, nn.Module]) -> dict[str, torch.optim.Optimizer]:
    """The optimizer of every network, by its name; the generic one has that which it has in every project."""
    network = networks[SEGMENTATION]
    found: dict[str, torch.optim.Optimizer] = {}
    if isinstance(network, LogitsOnly) and cfg.model.network == "generic":
        groups = encoder_and_heads(network.encoder, [network.decoder], cfg.optim)
        found[SEGMENTATION] = build_optimizer(cfg.optim, groups)
    else:
        found[SEGMENTATION] = build_generator_optimizer(cfg.optim, network, cfg.quirks.visits)
    if DISCRIMINATOR in networks:
        found[DISCRIMINATOR] = build_discriminator_optimizer(
            networks[DISCRIMINATOR], lr=cfg.optim.lr_d, betas=cfg.optim.betas_d
        )
    return found
