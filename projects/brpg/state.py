"""Everything a run must keep to go on exactly where it stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from common.distributed import gather_objects
from common.mean_teacher.networks import load_backbone, load_encoder
from common.mean_teacher.run import MeanTeacherRun
from common.run.checkpoint import load_weights
from common.run.log import RunLog
from projects.brpg.augment import Draws
from projects.brpg.config import Config
from projects.brpg.memory import ClassConfidence, FeatureMemory, FeatureQueues
from projects.brpg.model import Networks, has_xception, load_xception
from projects.brpg.prototypes import Prototypes
from projects.brpg.settings import MethodConfig
from tools.weights import load_encoders

PROJECT = "brpg"  # as checkpoints and results name it


class MethodState(nn.Module):
    """What the method remembers between steps, besides the networks; saved with a checkpoint.

    Attributes:
        memory: queues of features, from the start until they are clustered; None afterwards, and in runs without
            prototypes.
        prototypes: without any until then. Each process has its own (QUIRK quirks.own_prototypes).
        confidence: of the classes; None unless thresholds follow it.
        paste_confidence: of the classes, for copy-paste; None without it.
        negatives: queues of the optional contrast; None without it.
    """

    def __init__(self, method: MethodConfig, num_classes: int, dim: int) -> None:
        super().__init__()
        self.memory = FeatureMemory(method, num_classes, dim) if method.prototypes else None
        self.prototypes = Prototypes(num_classes, method.num_slots, dim)
        csp = method.threshold_type == "csp"
        self.confidence = ClassConfidence(num_classes, method.conf_decay, method.conf_init) if csp else None
        self.paste_confidence = (
            ClassConfidence(num_classes, method.paste_momentum, None) if method.copy_paste else None
        )
        sizes = [method.contra_queue_first] + [method.contra_queue] * (num_classes - 1)
        self.negatives = FeatureQueues(sizes, dim) if method.contra_weight > 0 else None


@dataclass
class Run(MeanTeacherRun):
    """Networks, optimizer and random numbers, and what the method remembers (None in supervised-only runs)."""

    cfg: Config
    nets: Networks
    draws: Draws
    state: MethodState | None

    def require_state(self) -> MethodState:
        """What the method of a semi-supervised run remembers."""
        assert self.state is not None, "a supervised-only run remembers nothing"
        return self.state

    def load_backbone(self, log: RunLog) -> None:
        """Take the ImageNet weights that the configuration names; raises as `common.mean_teacher.networks`."""
        model = self.cfg.model
        if model.network == "generic":
            load_encoders(model, self.nets.encoders, log)
            return
        load = load_xception if has_xception(model) else load_encoder
        load_backbone(model.weights, self.nets, log, load)

    def state_dict(self) -> dict[str, Any]:
        """Also what the method remembers, and the prototypes of every process; a collective."""
        if self.state is None:
            return super().state_dict() | {"method": None, "centres": None}
        return super().state_dict() | {
            "method": self.state.state_dict(),
            "centres": gather_objects(self.state.prototypes.centres.cpu(), self.dist),
        }

    def load_state_dict(self, saved: Mapping[str, Any], where: str) -> None:
        """Take back weights and `state_dict`; raises as `MeanTeacherRun.load_state_dict`."""
        super().load_state_dict(saved, where)
        if self.state is None:
            return
        if not any(key.startswith("memory.") for key in saved["method"]):
            self.state.memory = None  # the queues were clustered before the checkpoint was written
        load_weights(self.state, saved["method"], where)
        self.state.prototypes.centres.copy_(saved["centres"][self.dist.rank])
