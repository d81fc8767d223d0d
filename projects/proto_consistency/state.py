"""Everything a run must keep to go on exactly where it stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from common.distributed import gather_objects
from common.mean_teacher.networks import load_backbone
from common.mean_teacher.run import MeanTeacherRun
from common.run.log import RunLog
from projects.proto_consistency.augment import Draws
from projects.proto_consistency.config import Config
from projects.proto_consistency.model import Networks
from projects.proto_consistency.prototypes import Movement
from tools.weights import load_encoders

PROJECT = "proto_consistency"  # as checkpoints and results name it
PROTOTYPES = "proto_net.proto_list"


@dataclass
class Run(MeanTeacherRun):
    """Networks, optimizer and random numbers, and what the prototypes need.

    Attributes:
        movement: of the student's prototypes; None without a prototype head.
        placed: the first prototypes have been made.
        usage: pixels per prototype between the newest two evaluations, by name of the class.
    """

    cfg: Config
    nets: Networks
    draws: Draws
    movement: Movement | None
    placed: bool = field(default=False, kw_only=True)
    usage: dict[str, list[int]] | None = field(default=None, kw_only=True)

    def require_movement(self) -> Movement:
        """The movement of a run with prototypes."""
        assert self.movement is not None, "a run without prototypes has no movement"
        return self.movement

    def load_backbone(self, log: RunLog) -> None:
        """Take the ImageNet weights that the configuration names; raises as `common.mean_teacher.networks`."""
        if self.cfg.model.network == "generic":
            load_encoders(self.cfg.model, self.nets.encoders, log)
        else:
            load_backbone(self.cfg.model.weights, self.nets, log)

    def state_dict(self) -> dict[str, Any]:
        """Also the prototypes of every process, which may differ, and their use; a collective."""
        own = {}
        if self.movement is not None:
            heads = {"student": self.nets.student, "teacher": self.nets.require_teacher()}
            own = {role: network.require_prototypes().proto_list.detach() for role, network in heads.items()}
            own |= {"usage": self.movement.usage}
        return super().state_dict() | {
            "own": gather_objects({key: value.cpu() for key, value in own.items()}, self.dist),
            "placed": self.placed,
            "usage": self.usage,
        }

    def load_state_dict(self, saved: Mapping[str, Any], where: str) -> None:
        """Take back weights and `state_dict`; raises as `MeanTeacherRun.load_state_dict`."""
        super().load_state_dict(saved, where)
        self.placed, self.usage = saved["placed"], saved["usage"]
        if self.movement is not None:
            own: Mapping[str, Tensor] = saved["own"][self.dist.rank]
            self.nets.student.require_prototypes().set(own["student"])
            self.nets.require_teacher().require_prototypes().set(own["teacher"])
            self.movement.usage.copy_(own["usage"])

    def load_networks(self, saved: Mapping[str, Any], where: str) -> None:
        """Take the weights to start from, but not the prototypes: these are made as `method.proto.source` says.

        So a network without any, or with another number of them, can be started from too. Raises as
        `MeanTeacherRun.load_networks`.
        """
        given, start = saved["networks"], {}
        for role, own in self.weights().items():
            weights = {
                key: value for key, value in given.get(role, given["student"]).items() if key != PROTOTYPES
            }
            start[role] = weights | {key: value for key, value in own.items() if key == PROTOTYPES}
        super().load_networks({"networks": start}, where)
