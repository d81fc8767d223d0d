"""Everything a run must keep to go on exactly where it stopped, and the weights it keeps besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from common.data.files import find_weights
from common.distributed import gather_objects
from common.models.pretrained import load_pretrained
from common.run.checkpoint import bare_state_dict, kept_path, kept_weights, load_weights
from common.run.log import RunLog
from common.run.session import Session
from common.run.state import Run as CommonRun
from projects.cps.config import Config
from projects.cps.model import BRANCHES, Networks
from tools.weights import load_encoders

PROJECT = "cps"  # as checkpoints and results name it
KEPT_BY = "epoch"  # what the numbers of kept weights count


@dataclass
class Run(CommonRun):
    """Networks, optimizers and random numbers of the method.

    Attributes:
        nets: all networks.
        draws: what the method draws in a step (`MaskDraws`, `CctDraws`); None if it draws nothing.
        optimizers: by the name of the network they train.
        scaler: of the losses in half precision.
    """

    cfg: Config
    nets: Networks
    draws: Any
    optimizers: dict[str, torch.optim.Optimizer]
    scaler: torch.amp.GradScaler

    def weights(self) -> dict[str, Any]:
        """State dicts of all networks with bare keys."""
        return {name: bare_state_dict(module) for name, module in self.nets.modules.items()}

    def state_dict(self) -> dict[str, Any]:
        """Optimizers, scaler and the draws of every process; a collective."""
        draws = None if self.draws is None else self.draws.state_dict()
        return {
            "optimizers": {name: one.state_dict() for name, one in self.optimizers.items()},
            "scaler": self.scaler.state_dict(),
            "draws": gather_objects(draws, self.dist),
        }

    def load_state_dict(self, saved: Mapping[str, Any], where: str) -> None:
        """Take back weights and `state_dict`; raises as `load_networks`."""
        self.load_networks(saved, where)
        for name, one in self.optimizers.items():
            one.load_state_dict(saved["optimizers"][name])
        self.scaler.load_state_dict(saved["scaler"])
        if self.draws is not None:
            self.draws.load_state_dict(saved["draws"][self.dist.rank])

    def load_networks(self, saved: Mapping[str, Any], where: str) -> None:
        """Give every network the weights of a checkpoint.

        A second branch that it lacks takes those of the first; what only one method has (a detector, auxiliary
        decoders) keeps its own.

        Raises:
            UserError: another architecture.
        """
        networks = saved["networks"]
        for name, module in self.nets.modules.items():
            found = networks.get("branch1" if name == "branch2" and name not in networks else name)
            if found is not None:
                load_weights(module, found, where)

    def load_backbone(self, log: RunLog) -> None:
        """Give every branch the ImageNet weights that the configuration names, and say what was used.

        Raises:
            UserError: the file is missing or does not fit.
        """
        model = self.cfg.model
        backbones = [
            self.nets.modules[key].get_submodule("backbone") for key in BRANCHES if key in self.nets.modules
        ]
        if model.network == "generic":
            load_encoders(model, backbones, log)
            return
        if model.weights == "none":
            log.info("backbone: random numbers (model.weights=none)")
            return
        path = find_weights(model.weights)
        reports = [load_pretrained(backbone, path) for backbone in backbones]
        log.info(f"backbone: {reports[0].summary()}")


def keep_weights(epoch: int, run: Run, session: Session) -> None:
    """Keep the weights after `epoch` (from 0) if they are due, and drop the oldest beyond `keep.newest`."""
    keep, number = run.cfg.keep, epoch + 1
    if not keep.every_epochs or number <= keep.after_epoch:
        return
    if number % keep.every_epochs and number != run.epochs:
        return
    assert session.run_dir is not None, "a dry run keeps nothing"
    with session.log.paused():
        session.save_weights(kept_path(session.run_dir, KEPT_BY, number))
    if run.dist.is_main and keep.newest is not None:
        for path in list(kept_weights(session.run_dir, KEPT_BY).values())[: -keep.newest]:
            path.unlink()
