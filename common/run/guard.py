"""The guard against losses that are not finite."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from common.distributed import Dist, gather_objects, max_over_ranks
from common.errors import UserError
from common.numerics.losses import Losses


class FiniteGuard:
    """Cancels optimizer steps whose loss is not finite, on the device, without asking it.

    In mode `stop` the first bad step and all later ones are cancelled on every rank, so the parameters stay as
    they were before it until `check` is called, at the latest at the next log interval. In mode `skip` only bad
    steps are cancelled and counted.

    Args:
        mode: `stop` or `skip`.
        dist: this process's place.
        memory: losses whose terms are kept for the message; at least those of a log interval.
        at_once: check after every step, as is free on the CPU.

    Attributes:
        cancelled: number of cancelled steps, on the device.
        last_saved: latest checkpoint, for the message.
    """

    def __init__(self, mode: str, dist: Dist, memory: int, *, at_once: bool = False) -> None:
        self.mode, self.dist, self.at_once = mode, dist, at_once
        self.cancelled = torch.zeros((), device=dist.device)
        self.last_saved: Path | None = None
        self._bad = torch.zeros((), device=dist.device)
        self._step, self._cancelled_before = -1, self.cancelled  # of the step that is watched
        self._buffers: list[Tensor] = []  # as bytes, so that all types are saved and restored together
        self._before = torch.empty(0)  # what they held before the step
        self._recent: deque[tuple[int, dict[str, Tensor], Tensor, Callable[[], str]]] = deque(maxlen=memory)

    def protect(self, *networks: nn.Module | None) -> None:
        """In mode `skip`: remember the buffers (BatchNorm statistics) before a step, to undo them if it is bad."""
        if self.mode == "skip":
            buffers = [b for network in networks if network is not None for b in network.buffers()]
            self._buffers = [b.view(-1).view(torch.uint8) for b in buffers]
            self._before = torch.cat(self._buffers) if buffers else self._before

    def watch(self, step: int, losses: Losses, images: Callable[[], str]) -> Tensor:
        """Note the losses of `step` and whether they are finite on all ranks; 1 if not, a scalar on the device.

        A step of several losses is counted once in `cancelled`.

        Args:
            step: number of the step, from 1.
            losses: total and terms; figures that are no loss may be anything.
            images: says which images the step saw; called only for the message.

        Raises:
            UserError: see `check`; with `at_once` only.
        """
        total, terms = losses
        values = [total.detach()] + [v.detach() for k, v in terms.items() if k.startswith("loss_")]
        bad = torch.stack([~value.isfinite() for value in values]).any().float()
        bad = max_over_ranks(bad, self.dist)
        self._bad = torch.maximum(self._bad, bad) if self.mode == "stop" else bad
        if step != self._step:
            self._step, self._cancelled_before = step, self.cancelled
        self.cancelled = torch.maximum(self.cancelled, self._cancelled_before + self._bad)
        kept = {k: v.detach() for k, v in terms.items()} | {"loss": total.detach()}
        self._recent.append((step, kept, bad, images))
        if self.at_once:
            self.check()
        return bad

    def step(self, scaler: torch.amp.GradScaler, *optimizers: torch.optim.Optimizer) -> None:
        """The step of all optimizers of a loss, cancelled on the device if it was bad; buffers go back then."""
        if self._buffers:
            values = torch.where(self._bad > 0, self._before, torch.cat(self._buffers))
            torch._foreach_copy_(self._buffers, values.split([len(b) for b in self._buffers]))
        if not scaler.is_enabled():
            for optimizer in optimizers:
                optimizer.found_inf = self._bad  # type: ignore[attr-defined]  # how the scaler tells fused steps
                optimizer.step()
                del optimizer.found_inf  # type: ignore[attr-defined]
            return
        # the scaler cancels a bad step itself, but neither the good ones after it nor those of other networks
        spoil = torch.where(self._bad > 0, torch.nan, 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                torch._foreach_mul_([p.grad for p in group["params"] if p.grad is not None], spoil)
            scaler.step(optimizer)
        scaler.update()

    def check(self) -> None:
        """Stop if a bad step has been noted (mode `stop`). Reads the device.

        Raises:
            UserError: names step, term, images and the last checkpoint.
        """
        if self.mode != "stop" or not bool(self._bad):
            return
        for step, terms, bad, images in self._recent:
            if bool(bad):  # on all ranks, for the flag is their maximum
                found = gather_objects(_not_finite(terms, images), self.dist)
                where = next((text for text in found if text), "a loss is not finite")
                raise UserError(
                    f"step {step}: {where}; stopped before the optimizer step, last good "
                    f"checkpoint: {self.last_saved or 'none yet'}; lower optim.lr or check these images "
                    "(run.on_nonfinite=skip goes on without such steps)"
                )
        raise UserError("a loss was not finite; lower optim.lr, or set run.on_nonfinite=skip")


def _not_finite(terms: Mapping[str, Tensor], images: Callable[[], str]) -> str:
    """The terms that are not finite on this process and the images it saw; empty if all is well here."""
    names = [f"{k} is {float(v)}" for k, v in terms.items() if not bool(v.isfinite())]
    parts = [name for name in names if not name.startswith("loss is ")] or names
    return f"{', '.join(parts)}; images {images()}" if parts else ""
