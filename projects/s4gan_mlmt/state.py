"""Everything a run must keep to go on exactly where it stopped, and the weights that stay to be measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.run import state
from common.run.checkpoint import MAY_CHANGE, bare_state_dict, kept_path, load_weights, save
from common.run.log import RunLog
from common.run.session import Session
from projects.s4gan_mlmt.config import Config
from projects.s4gan_mlmt.data import TrainingStreams
from projects.s4gan_mlmt.model import DISCRIMINATOR, SEGMENTATION, Networks, load_pretrained

PROJECT = "s4gan_mlmt"  # as checkpoints and results name it
FREE = (*MAY_CHANGE, "keep.*", "mlmt.*")  # settings that a resumed run may change


@dataclass
class Run(state.Run):
    """Networks and optimizers; a run counts steps, and its epochs are rounds of `optim.steps_per_round`.

    Attributes:
        nets: segmentation network and discriminator.
        optimizers: by the name of the network they train.
        scaler: of the losses in half precision.
    """

    cfg: Config
    data: TrainingStreams
    nets: Networks
    optimizers: dict[str, torch.optim.Optimizer]
    scaler: torch.amp.GradScaler

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.cfg.optim.steps

    @property
    def images_per_step(self) -> int:
        """Images of all streams that all processes together take in one step."""
        optim = self.cfg.optim
        return 2 * optim.batch_size + optim.unlabeled if self.cfg.method.adversarial else optim.batch_size

    def weights(self) -> dict[str, Any]:
        """State dicts of all networks with bare keys."""
        return {name: bare_state_dict(network) for name, network in self.nets.bare.items()}

    def state_dict(self) -> dict[str, Any]:
        """Both optimizers and the scaler."""
        optimizers = {name: one.state_dict() for name, one in self.optimizers.items()}
        return {"optimizers": optimizers, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, saved: Mapping[str, Any], where: str) -> None:
        """Take back weights and `state_dict`.

        Raises:
            UserError: another architecture.
        """
        self.load_networks(saved, where)
        for name, one in self.optimizers.items():
            one.load_state_dict(saved["optimizers"][name])
        self.scaler.load_state_dict(saved["scaler"])

    def load_networks(self, saved: Mapping[str, Any], where: str) -> None:
        """Give the networks the weights of a checkpoint; a discriminator that it lacks stays as it is.

        Raises:
            UserError: another architecture.
        """
        for name, network in self.nets.bare.items():
            if name in saved["networks"]:
                load_weights(network, saved["networks"][name], where)

    def load_backbone(self, log: RunLog) -> None:
        """Start the networks from the files that the configuration names; raises as `load_pretrained`."""
        bare = self.nets.bare
        load_pretrained(self.cfg.model, bare[SEGMENTATION], bare.get(DISCRIMINATOR), log)


# --- weights that stay -------------------------------------------------------------------------------------------


def original_path(run_dir: Path, number: int, suffix: str = "") -> Path:
    """The authors' name of the segmentation network's weights; with the suffix `_D`, of the discriminator's."""
    return run_dir / f"VOC_{number}{suffix}.pth"


def original_number(cfg: Config, step: int) -> int | None:
    """The number in the authors' name for the weights after `step` updates; None where they write no file.

    QUIRK keep.original_every: they save before they count, so that number t stands for t + 1 updates, but for the last
    file.
    """
    every, number = cfg.keep.original_every, step - 1
    if not every:
        return None
    if step == cfg.optim.steps:
        return step
    return number if number and number % every == 0 else None


def keeps(cfg: Config, step: int) -> bool:
    """Whether `keep.every_epochs` or `eval.after_steps` names the weights after `step` updates."""
    rounds = cfg.keep.every_epochs * cfg.optim.steps_per_round
    return step == cfg.eval.after_steps or bool(rounds and step % rounds == 0)


def keep_weights(run: Run, session: Session) -> None:
    """Write the weights of this step in the forms that the configuration asks for, if it does."""
    kept, number, run_dir = keeps(run.cfg, run.step), original_number(run.cfg, run.step), session.run_dir
    if run_dir is None or not (kept or number is not None):
        return
    session.guard.check()  # on a GPU a bad step may not have been noticed yet
    with session.log.paused():
        if kept:
            session.save_weights(kept_path(run_dir, "step", run.step))
        if number is not None and run.dist.is_main:
            for name, suffix in ((SEGMENTATION, ""), (DISCRIMINATOR, "_D")):
                if name in run.nets.bare:
                    weights = bare_state_dict(run.nets.bare[name])
                    # the prefix of data parallelism, which the authors' evaluate.py wants
                    save(
                        original_path(run_dir, number, suffix), {f"module.{k}": v for k, v in weights.items()}
                    )


def require_after_steps(run: Run, run_dir: Path) -> None:
    """Refuse to measure weights that the run is past and has not kept.

    Raises:
        UserError: names the step.
    """
    after = run.cfg.eval.after_steps
    if after is not None and after < run.step and not kept_path(run_dir, "step", after).exists():
        raise UserError(
            f"eval.after_steps={after}: {run_dir} stands at step {run.step} and has kept no weights of that step; "
            "set it to null, or to a later step"
        )
