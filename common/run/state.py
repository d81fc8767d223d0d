"""What a run trains, and where it stands."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from common.config import ProjectConfig
from common.data.streams import TrainingData
from common.distributed import Dist
from common.run.log import RunLog


@dataclass
class Run(ABC):
    """What a run trains. Each paper adds its networks, optimizers, draws and what its method remembers.

    Attributes:
        cfg: its configuration.
        dist: this process.
        data: its loaders.
        step: optimizer steps done.
        evaluated: epochs whose end (evaluation if due, checkpoint) is done.
        best: in-training mIoU (fraction) of `best.pt`, -1 before the first.
        best_epoch: epoch (from 1) in or after which it was reached.
        last: in-training mIoU of the newest evaluation.
    """

    # saved by these names, beside `step`
    COUNTERS: ClassVar[tuple[str, ...]] = ("evaluated", "best", "best_epoch", "last")

    cfg: ProjectConfig
    dist: Dist
    data: TrainingData
    step: int = field(default=0, kw_only=True)
    evaluated: int = field(default=0, kw_only=True)
    best: float = field(default=-1.0, kw_only=True)
    best_epoch: int = field(default=0, kw_only=True)
    last: float = field(default=-1.0, kw_only=True)

    @property
    def epochs(self) -> int:
        """Epochs of the whole run."""
        return self.cfg.optim.epochs

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.data.steps_per_epoch * self.epochs

    @property
    def images_per_step(self) -> int:
        """Images that all processes together take in one step."""
        return self.cfg.optim.batch_size * len(self.data.loaders)

    @abstractmethod
    def weights(self) -> dict[str, Any]:
        """State dicts of the networks by their name in checkpoints, with bare keys."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds besides weights, counters and global random states; a collective."""

    @abstractmethod
    def load_state_dict(self, saved: Mapping[str, Any], where: str) -> None:
        """Take back weights and `state_dict` from the contents of a checkpoint.

        Raises:
            UserError: it is of another architecture.
        """

    @abstractmethod
    def load_networks(self, saved: Mapping[str, Any], where: str) -> None:
        """Take the weights alone, to start from; raises as `load_state_dict`."""

    @abstractmethod
    def load_backbone(self, log: RunLog) -> None:
        """Take the pretrained weights that the configuration names, and say what was used.

        Raises:
            UserError: the file is missing or does not fit.
        """
