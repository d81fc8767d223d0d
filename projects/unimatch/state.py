"""Everything a run must keep to go on exactly where it stopped."""

from __future__ import annotations

from dataclasses import dataclass

from common.data.files import find_weights
from common.mean_teacher.run import MeanTeacherRun
from common.run.log import RunLog
from projects.unimatch.augment import Draws
from projects.unimatch.config import Config
from projects.unimatch.model import Networks, load_encoder
from tools.weights import load_encoders

PROJECT = "unimatch"  # as checkpoints and results name it


@dataclass
class Run(MeanTeacherRun):
    """Networks, optimizer and random numbers."""

    cfg: Config
    nets: Networks  # type: ignore[assignment]  # also a pair of networks, called in another way
    draws: Draws

    @property
    def images_per_step(self) -> int:
        """Images of a step; those that V1 pastes are not counted."""
        return self.cfg.optim.batch_size * min(len(self.data.loaders), 2)

    @property
    def reported(self) -> str:
        """The network whose figures count: the teacher where there is one."""
        return "student" if self.nets.teacher is None else "teacher"

    def load_backbone(self, log: RunLog) -> None:
        """Take the pretrained weights that the configuration names, and say what was used.

        Raises:
            UserError: the file is missing or does not fit.
        """
        model = self.cfg.model
        if model.network == "generic":
            load_encoders(model, [self.nets.student.backbone], log)
        elif model.weights == "none":
            log.info("backbone: random numbers (model.weights=none)")
        else:
            log.info(f"backbone: {load_encoder(self.nets.student, find_weights(model.weights)).summary()}")
