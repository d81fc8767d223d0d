"""What a run with student and teacher keeps to go on exactly where it stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from common.config import OptimConfig
from common.distributed import gather_objects
from common.mean_teacher.networks import StudentTeacher
from common.models.deeplab import SegmentationNetwork
from common.numerics.optim import Group, encoder_and_heads
from common.run.checkpoint import bare_state_dict, load_weights
from common.run.state import Run


@dataclass
class MeanTeacherRun(Run):
    """Student, teacher, optimizer and random numbers; a paper adds what its method remembers.

    Attributes:
        nets: student and teacher.
        draws: random numbers of the steps, which have a `state_dict`.
        optimizer: of the student.
        scaler: of the losses in half precision.
    """

    cfg: Any
    nets: StudentTeacher[Any, Any]
    draws: Any
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    @property
    def sup_only_epochs(self) -> int:
        """Epochs before the teacher is used; all of a supervised-only run."""
        method: Any = self.cfg.method
        return method.sup_only_epochs if method.mode == "semi" else self.epochs

    def in_use(self, epoch: int) -> str:
        """The network that makes the predictions in or after `epoch`: `teacher`, or `student` before it is used."""
        return "teacher" if epoch >= self.sup_only_epochs else "student"

    def weights(self) -> dict[str, Any]:
        """State dicts of student and teacher with bare keys."""
        networks = {"student": bare_state_dict(self.nets.student)}
        if self.nets.teacher is not None:
            networks["teacher"] = bare_state_dict(self.nets.teacher)
        return networks

    def state_dict(self) -> dict[str, Any]:
        """Optimizer, scaler and the draws of every process; a collective."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "draws": gather_objects(self.draws.state_dict(), self.dist),
        }

    def load_state_dict(self, saved: Mapping[str, Any], where: str) -> None:
        """Take back weights and `state_dict`.

        Raises:
            UserError: another architecture.
        """
        for role, network in (("student", self.nets.student), ("teacher", self.nets.teacher)):
            if network is not None:
                load_weights(network, saved["networks"][role], where)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.draws.load_state_dict(saved["draws"][self.dist.rank])

    def load_networks(self, saved: Mapping[str, Any], where: str) -> None:
        """Give student and teacher the weights of a checkpoint; a teacher without its own takes the student's.

        Raises:
            UserError: another architecture.
        """
        weights = saved["networks"]
        load_weights(self.nets.student, weights["student"], where)
        if self.nets.teacher is not None:
            load_weights(self.nets.teacher, weights.get("teacher", weights["student"]), where)


def parameter_groups(network: SegmentationNetwork, optim: OptimConfig) -> list[Group]:
    """The encoder with the rate of the configuration, the heads with theirs."""
    heads = [part for part in (network.auxor, network.decoder) if part is not None]
    return encoder_and_heads(network.encoder, heads, optim)
