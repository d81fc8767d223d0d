"""Everything that the image-level branch must keep to go on exactly where it stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from common.config import OptimConfig, RunConfig
from common.distributed import Dist, gather_objects
from common.errors import UserError
from common.numerics.losses import Losses
from common.numerics.optim import Group, build_optimizer
from common.run import state
from common.run.checkpoint import MAY_CHANGE, Start, bare_state_dict, load_weights, require_own, resolve_start
from common.run.log import RunLog
from projects.s4gan_mlmt.config import Config
from projects.s4gan_mlmt.mlmt.config import MlmtConfig
from projects.s4gan_mlmt.mlmt.data import MlmtData
from projects.s4gan_mlmt.mlmt.model import Networks, load_pretrained_classifiers
from projects.s4gan_mlmt.state import PROJECT

BRANCH = "mlmt"
SUMMED = ("loss", "loss_class", "loss_consistency", "accuracy", "accuracy_teacher")
# settings that a resumed run may change: those of the other branch, and what does not move this one's numbers
FREE = (
    *MAY_CHANGE, "optim.*", "model.*", "method.*", "keep.*", "quirks.*", "mlmt.workers", "mlmt.keep_threshold",
    "mlmt.threshold", "mlmt.val_batch", "mlmt.flat_roll", "mlmt.evaluation_epochs", "mlmt.val_labels",
)  # fmt: skip


@dataclass
class Run(state.Run):
    """Student, teacher, optimizer, and what the scripts report of an epoch.

    Attributes:
        nets: student and teacher.
        optimizer: of the student.
        scaler: of the loss in half precision.
        sums: of the losses and accuracies (`SUMMED`) of the epoch so far, on the device, for its summary.
        means: those losses and accuracies over the last epoch.
        figures: what the newest validation found.
        scored: the list it was about.
    """

    COUNTERS: ClassVar[tuple[str, ...]] = ("evaluated",)

    cfg: Config
    data: MlmtData
    nets: Networks
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    sums: Tensor
    means: dict[str, float] = field(default_factory=dict, kw_only=True)
    figures: dict[str, float] = field(default_factory=dict, kw_only=True)
    scored: str = field(default="", kw_only=True)

    @property
    def epochs(self) -> int:
        """Passes over the labeled images."""
        return self.cfg.mlmt.epochs

    @property
    def images_per_step(self) -> int:
        """Images of both streams that all processes together take in one step."""
        return self.cfg.mlmt.labeled_batch + self.cfg.mlmt.unlabeled_batch

    def add(self, losses: Losses) -> None:
        """Add the losses and accuracies of a step to the sums of its epoch."""
        values = losses.terms | {"loss": losses.total}
        self.sums += torch.stack([values[name].detach().double() for name in SUMMED])

    def weights(self) -> dict[str, Any]:
        """State dicts of student and teacher with bare keys."""
        return {name: bare_state_dict(network) for name, network in self.nets.bare.items()}

    def state_dict(self) -> dict[str, Any]:
        """Which branch it is, optimizer and scaler, the sums of every process, figures; a collective."""
        return {
            "branch": BRANCH,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "sums": gather_objects(self.sums.cpu(), self.dist),
            "last": self.means,
            "figures": self.figures,
            "scored": self.scored,
        }

    def load_state_dict(self, saved: Mapping[str, Any], where: str) -> None:
        """Take back weights and `state_dict`.

        Raises:
            UserError: another architecture.
        """
        self.load_networks(saved, where)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.sums.copy_(saved["sums"][self.dist.rank])
        self.means, self.figures = dict(saved["last"]), dict(saved["figures"])
        self.scored = saved["scored"]

    def load_networks(self, saved: Mapping[str, Any], where: str) -> None:
        """Give both networks the weights of a checkpoint.

        Raises:
            UserError: another architecture.
        """
        for name, network in self.nets.bare.items():
            load_weights(network, saved["networks"][name], where)

    def load_backbone(self, log: RunLog) -> None:
        """Give both networks the weights that the configuration names; raises as `load_pretrained_classifiers`."""
        load_pretrained_classifiers(self.cfg, self.nets.bare.values(), log)


def build_student_optimizer(mlmt: MlmtConfig, student: nn.Module) -> torch.optim.Optimizer:
    """SGD on every parameter of the student alike, its momentum looking ahead."""
    optim = OptimConfig(
        lr=mlmt.lr,
        momentum=mlmt.momentum,
        weight_decay=mlmt.weight_decay,
        epochs=mlmt.epochs,
        batch_size=mlmt.labeled_batch,
    )
    return build_optimizer(optim, [Group(student.parameters())], nesterov=mlmt.nesterov)


def no_sums(dist: Dist) -> Tensor:
    """Sums at the start of an epoch."""
    return torch.zeros(len(SUMMED), dtype=torch.float64, device=dist.device)


def branch_start(run_dir: Path, run: RunConfig, *, part: bool) -> Start:
    """Where the branch begins: its own last checkpoint, else what `run.resume` and `run.init` name.

    Args:
        run_dir: folder of the branch.
        run: section of the configuration.
        part: of a run of both branches. It then continues the branch in the `mlmt` folder of the run that is resumed,
            if that has come so far, and `run.init` concerns the segmentation branch.

    Raises:
        UserError: the file is missing, or not of this branch.
    """
    resume, init = run.resume, run.init
    if part:
        init = None
        if resume is not None:
            folder = Path(resume) if Path(resume).is_dir() else Path(resume).parent
            resume = str(folder / BRANCH) if (folder / BRANCH / "last.pt").is_file() else None
    began = resolve_start(run_dir, resume, init)
    if began.state is not None:
        require_branch(began.state, str(began.path))
    return began


def require_branch(saved: Mapping[str, Any], where: str) -> None:
    """Refuse a checkpoint of the segmentation branch, or of another project.

    Raises:
        UserError: names what it is.
    """
    require_own(saved, PROJECT, where)
    if saved.get("branch") != BRANCH:
        raise UserError(
            f"{where}: holds the segmentation branch; give a last.pt that train_mlmt.py wrote (in a run of both "
            "branches it lies in the folder 'mlmt')"
        )
