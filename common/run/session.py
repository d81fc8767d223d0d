"""What every training loop calls, so that `train.py` holds what is the paper's.

A `Session` has the log, the guard, the stop request and the checkpoints of a `Run`. It calls nothing of a method: the
loop in `train.py` calls it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from common.config import save_config
from common.data.split import list_hash, truth
from common.data.streams import Batches
from common.errors import UserError
from common.measure.evaluation import Evaluation
from common.numerics.losses import Losses
from common.run.checkpoint import (
    MAY_CHANGE,
    Start,
    copy_best,
    describe,
    require_own,
    require_resumable,
    require_same_truth,
    resolve_start,
    save,
)
from common.run.guard import FiniteGuard
from common.run.log import RunLog
from common.run.progress import Progress
from common.run.rng import capture_rng, restore_rng
from common.run.signals import StopRequest
from common.run.state import Run


class Session(contextlib.ExitStack):
    """Log, guard, stop request and checkpoints of one run; a context that ends its log and its loaders.

    Args:
        run: what is trained.
        project: its name in checkpoints.
        run_dir: folder of the run; None for a dry run, which writes nothing and ends after every step.
        may_change: patterns of the settings that a resumed run may change.
        losses_per_step: backward passes of a step that are guarded one by one.
        request: the stop request of a larger run that this one is a part of; None waits for signals itself.
        name: what messages call this part.
    """

    def __init__(
        self,
        run: Run,
        project: str,
        run_dir: Path | None,
        *,
        may_change: Sequence[str] = MAY_CHANGE,
        losses_per_step: int = 1,
        request: StopRequest | None = None,
        name: str = "",
    ) -> None:
        super().__init__()
        cfg, dist, dry = run.cfg, run.dist, run_dir is None
        self.run, self.project, self.run_dir, self.dist = run, project, run_dir, dist
        self.may_change, self.name = may_change, name
        self.made_by: dict[str, Any] = {}  # code, versions and devices, if the script notes them
        interval = run.total_steps if dry else cfg.run.log_interval
        self.guard = FiniteGuard(
            "stop" if dry else cfg.run.on_nonfinite,
            dist,
            1 if dry else interval * losses_per_step,
            at_once=dist.device.type == "cpu",
        )
        self.request = request or StopRequest()
        with contextlib.ExitStack() as opened:  # what is open is closed again if the next cannot be opened
            opened.enter_context(contextlib.closing(run.data))
            if request is None and not dry:  # a dry run has nothing to save, so a signal ends it at once
                opened.enter_context(self.request)
            self.log = opened.enter_context(
                RunLog(
                    run_dir,
                    dist,
                    total_steps=run.total_steps,
                    images_per_step=run.images_per_step,
                    interval=interval,
                )
            )
            self.push(opened.pop_all())

    # --- before the loop

    @functools.cached_property
    def truth(self) -> dict[str, Any]:
        """What gives the run's figures their meaning."""
        return truth(self.run.data.spec, self.run.data.split)

    def start(self, began: Start | None = None) -> None:
        """Put the run where it stands: at its own checkpoint, at `run.resume`, or at its start with given weights.

        Args:
            began: where that is; None looks for it, see `resolve_start`.

        Raises:
            UserError: the file is missing, or of another run, project or architecture.
        """
        run, cfg = self.run, self.run.cfg
        began = began or resolve_start(self.run_dir, cfg.run.resume, cfg.run.init)
        where = str(began.path)
        self._keep_result()
        if began.continues and began.state is not None:
            require_resumable(began.state, self.project, cfg, where, self.may_change)
            require_same_truth(began.state, self.truth, where)
            self.restore(began.state, where)
            self.guard.last_saved = began.path
            if self.run_dir is not None:
                copy_best(began.path, self.run_dir, self.dist)
        elif began.state is not None:
            require_own(began.state, self.project, where)
            run.load_networks(began.state, where)
        else:
            run.load_backbone(self.log)

    def _keep_result(self) -> None:
        """Refuse to replace a result of the run directory by one that would mean something else; `UserError`."""
        path, images = self.run_dir and self.run_dir / "result.json", self.run.cfg.eval.list
        if not path or not path.is_file():
            return
        with contextlib.suppress(ValueError):  # a damaged one is replaced
            before = json.loads(path.read_bytes())
            now = self.measured_on(images) if before.get("list") == images else self.truth
            require_same_truth({"truth": {}} | before, now, str(path))

    def restore(self, saved: Mapping[str, Any], where: str) -> None:
        """Continue from the contents of a checkpoint that `save` wrote.

        Raises:
            UserError: another number of processes, or another architecture.
        """
        run = self.run
        restore_rng(saved["rng"], self.dist)
        run.load_state_dict(saved, where)
        for name in ("step", *run.COUNTERS):
            setattr(run, name, saved[name])
        self.log.load_state_dict(saved["log"])

    def begin(self) -> None:
        """Write the configuration and start the clock.

        Raises:
            UserError: the disk is too full for the checkpoints.
        """
        run = self.run
        if self.dist.is_main and self.run_dir is not None:  # the others may be here before the folder is made
            self._require_space(self.run_dir)
            cfg: Any = run.cfg
            root = run.data.spec.root and str(run.data.spec.root.resolve())
            data = replace(cfg.data, root=root)
            save_config(replace(cfg, data=data), self.run_dir / "config.yaml")
        self.log.begin(run.step)
        if run.step >= run.total_steps and run.evaluated == run.epochs:
            self.log.info(f"{self.run_dir}: finished already ({run.step} steps)")

    def _require_space(self, run_dir: Path) -> None:
        """Refuse a disk without room for the best weights and twice the last ones with their momenta; `UserError`."""
        networks = [value for network in self.run.weights().values() for value in network.values()]
        needed = 5 * sum(value.numel() * value.element_size() for value in networks)
        free = shutil.disk_usage(run_dir).free
        if free < needed and not (run_dir / "last.pt").exists():
            raise UserError(
                f"{run_dir}: {free >> 20} MiB are free, but the checkpoints take about {(needed >> 20) + 1} MiB; free "
                "space, or choose another run directory (run.dir=DIR)"
            )

    # --- in the loop

    def epochs(self) -> Iterator[int]:
        """Epochs (from 0) from where the run stands to its end."""
        while self.run.step < self.run.total_steps or self.run.evaluated < self.run.epochs:
            yield self.run.evaluated

    def steps(self, epoch: int) -> Iterator[tuple[Progress, list[Batches]]]:
        """The optimizer steps that are left of an epoch: where each stands, and the batches of its forwards."""
        run, length = self.run, self.run.data.steps_per_epoch
        done = run.step - epoch * length
        if done >= length:
            return
        for group in run.data.epoch(epoch, done, self.dist, run.cfg.run.channels_last):
            yield Progress(run.step, length, run.epochs), group

    def watch(self, at: Progress, losses: Losses, group: list[Batches]) -> Tensor:
        """Note the losses of a step; 1 on the device if they are not finite, see `FiniteGuard.watch`."""
        return self.guard.watch(at.step + 1, losses, self.run.data.names(group))

    def record(self, epoch: int, losses: Losses, bad: Tensor, lr: float) -> None:
        """Count the finished optimizer step and log its losses; stops at an interval if one was not finite."""
        run = self.run
        run.step += 1
        terms = losses.terms | {"loss": losses.total, "nonfinite": bad}
        expected = [name for name in losses.terms if name.startswith("loss_")]
        self.log.step(run.step, terms, epoch=epoch, lr=lr, expected=expected)
        if self.log.last_means.get("nonfinite"):  # of the interval that ended last: nothing is read for it
            self.guard.check()

    def save_or_stop(self) -> bool:
        """Save if that is due; True if the run shall end here (and has been saved)."""
        run, every = self.run, self.run.cfg.run.save_interval
        if self.run_dir is None:
            return True
        due = every and run.step % every == 0
        ending = self.request.agree(self.dist) or run.step == run.cfg.run.max_steps
        if due or ending:
            self.guard.check()  # on a GPU a bad step may not have been noticed yet
            with self.log.paused():
                self.save()
        if ending:
            name = f"{self.name}: " if self.name else ""
            self.log.info(f"{name}stopped after step {run.step}; start the same command again to go on")
            self.request.requeue(self.dist)
        return ending

    def evaluation_due(self, epoch: int) -> bool:
        """Whether the weights after `epoch` (from 0) are to be measured; a bad step stops the run before that.

        Before the first time the run is saved, so that a damaged evaluation file does not cost the epochs before it.
        """
        self.guard.check()
        every = self.run.cfg.eval.every_epochs
        due = epoch + 1 == self.run.epochs or bool(every and (epoch + 1) % every == 0)
        if due and self.guard.last_saved is None:
            with self.log.paused():
                self.save()
        return due

    def note(self, epoch: int, found: Evaluation, *, candidate: bool = True, **figures: float) -> str:
        """Log an evaluation and keep the weights if they are the best so far; the best as text, for a message.

        Args:
            epoch: from 0.
            found: figures of the network in use.
            candidate: whether these weights can be what the run yields.
            figures: more of them by name.
        """
        run = self.run
        run.last = found.miou
        self.log.scalars(
            run.step, {"epoch": epoch, "miou": found.miou, "miou_present": found.miou_present, **figures}
        )
        if candidate and found.miou > run.best:
            run.best, run.best_epoch = found.miou, epoch + 1
            if self.run_dir is not None:
                self.save_weights(self.run_dir / "best.pt", found.miou)
        return f" (best {100 * run.best:.2f})" if run.best >= 0 else ""

    def end_epoch(self, epoch: int) -> None:
        """Save everything after an epoch."""
        self.run.evaluated = epoch + 1
        self.guard.check()
        with self.log.paused():
            self.save()

    def measured_on(self, images: str) -> dict[str, Any]:
        """What gives the figures of the list `images` their meaning, for a result; without the files looked at."""
        spec = self.run.data.spec
        known = {key: value for key, value in self.truth.items() if key != "files"}
        return known | {"list": list_hash(spec, spec.read_list(images, labels=False))}

    # --- checkpoints

    def save(self) -> None:
        """Write the whole state to `last.pt`; a collective. Only the first rank writes."""
        assert self.run_dir is not None, "a dry run leaves nothing behind"
        run = self.run
        rng, own, log = capture_rng(self.dist), run.state_dict(), self.log.state_dict()
        if self.dist.is_main:
            counters = {name: getattr(run, name) for name in run.COUNTERS}
            save(self.run_dir / "last.pt", self._header() | own | {"rng": rng, "log": log} | counters)
        self.guard.last_saved = self.run_dir / "last.pt"

    def save_weights(self, path: Path, miou: float | None = None) -> None:
        """Write the weights alone, with the mIoU that made them worth it."""
        if self.dist.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            save(path, self._header() | {"miou": miou})

    def _header(self) -> dict[str, Any]:
        run = self.run
        return describe(self.project, run.cfg, run.data.spec, run.step, run.weights(), self.truth)
