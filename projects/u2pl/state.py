"""Everything a run must keep to go on exactly where it stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.distributed import gather_objects
from common.mean_teacher.networks import load_backbone
from common.mean_teacher.run import MeanTeacherRun
from common.run.checkpoint import load_weights
from common.run.log import RunLog
from projects.u2pl.augment import Draws
from projects.u2pl.config import Config
from projects.u2pl.memory import Memory
from projects.u2pl.model import Networks
from tools.weights import load_encoders

PROJECT = "u2pl"  # as checkpoints and results name it


@dataclass
class Run(MeanTeacherRun):
    """Networks, optimizer and random numbers, and the memory of the contrastive loss (None in supervised-only runs)."""

    cfg: Config
    nets: Networks
    draws: Draws
    memory: Memory | None

    @property
    def images_per_step(self) -> int:
        """Images of a step; what the AEL variant pastes is not counted."""
        return self.cfg.optim.batch_size * min(len(self.data.loaders), 2)

    def require_memory(self) -> Memory:
        """The memory of a semi-supervised run."""
        assert self.memory is not None, "a supervised-only run has no memory"
        return self.memory

    def load_backbone(self, log: RunLog) -> None:
        """Take the ImageNet weights that the configuration names; raises as `common.mean_teacher.networks`."""
        if self.cfg.model.network == "generic":
            load_encoders(self.cfg.model, self.nets.encoders, log)
        else:
            load_backbone(self.cfg.model.weights, self.nets, log)

    def state_dict(self) -> dict[str, Any]:
        """Also the memory, and what each process has of it for itself; a collective."""
        memory = self.memory
        own = (
            {} if memory is None else {name: value.cpu() for name, value in memory.of_this_process().items()}
        )
        return super().state_dict() | {
            "method": None if memory is None else memory.state_dict(),
            "own": gather_objects(own, self.dist),
        }

    def load_state_dict(self, saved: Mapping[str, Any], where: str) -> None:
        """Take back weights and `state_dict`; raises as `MeanTeacherRun.load_state_dict`."""
        super().load_state_dict(saved, where)
        if self.memory is None:
            return
        load_weights(self.memory, saved["method"], where)
        own = saved.get("own")
        for name, value in own[self.dist.rank].items() if own else ():
            setattr(self.memory, name, value.to(self.dist.device))
