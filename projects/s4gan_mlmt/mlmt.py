"""The image-level branch: a multi-label mean teacher (MLMT) that says which classes an image holds.

Two classifiers learn from label vectors of the labeled images and from the agreement of both on the unlabeled ones.
The teacher's scores of the evaluation images go into text files, by which the segmentation branch's classes are
switched off (`fusion.py`). Steps and schedules are those of `train_mlmt.py` of s4GAN.

With several processes the losses are those of the global batch, so gradients, and with synchronised BatchNorm (GPUs)
the whole run, are those of one process. Otherwise BatchNorm normalises each process's own share of a batch, and the
running statistics are the first process's, as under the authors' DataParallel.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import torch

from common.config import RunConfig, dump, save_config
from common.data.split import Split
from common.distributed import Dist, broadcast_object, mean_over_ranks
from common.numerics.ema import update_teacher, warmup_decay
from common.numerics.losses import Losses
from common.numerics.optim import FiniteGuard
from common.numerics.schedules import cosine
from common.run.backend import configure
from common.run.checkpoint import MAY_CHANGE, Start, require_resumable, resolve_start
from common.run.log import RunLog, duration, peak_memory_bytes, write_result
from common.run.signals import StopRequest
from projects.s4gan_mlmt.config import Config
from projects.s4gan_mlmt.mlmt_data import (
    MlmtData,
    StepBatches,
    branch_spec,
    build_mlmt_data,
    build_score_data,
    split_views,
)
from projects.s4gan_mlmt.mlmt_losses import consistency_weight, log_accuracies, mlmt_losses
from projects.s4gan_mlmt.mlmt_scores import score_files, share_statistics, validate
from projects.s4gan_mlmt.mlmt_state import (
    BRANCH,
    MlmtState,
    build_state,
    load_networks,
    require_branch,
    restore,
    save_last,
)
from projects.s4gan_mlmt.splits import training_split
from projects.s4gan_mlmt.state import PROJECT

# what does not decide about the branch's numbers, besides what no run minds
HARMLESS = (
    *MAY_CHANGE, "optim.*", "model.*", "method.*", "keep.*", "quirks.*", "mlmt.workers", "mlmt.keep_threshold",
    "mlmt.threshold", "mlmt.val_batch", "mlmt.flat_roll", "mlmt.evaluation_epochs", "mlmt.val_labels",
)  # fmt: skip
SUMMED = ("loss", "loss_class", "loss_consistency", "accuracy", "accuracy_teacher")


def train_step(
    batches: StepBatches,
    epoch: int,
    cfg: Config,
    state: MlmtState,
    guard: FiniteGuard,
    names: Callable[[], str],
) -> Losses:
    """One optimiser step and the teacher's average after it; the loss and its terms, still on the device.

    The teacher's forward on the labeled images is for the log, but moves its BatchNorm statistics as in the
    original; for the same reason the unlabeled forwards are made while the consistency has weight 0.
    """
    mlmt = cfg.mlmt
    x_l, y_l = batches.labeled.image, batches.labeled.label
    clean, augmented = split_views(batches.unlabeled.image)
    state.optimizer.zero_grad(set_to_none=True)
    guard.protect(state.student, state.teacher)
    logits, student = state.learn(x_l, augmented)
    with torch.no_grad():
        taught, teacher = state.teach(x_l, clean)
    weight = consistency_weight(epoch, mlmt.burn_in_epochs, mlmt.epochs, mlmt.w_cons)
    total, terms = mlmt_losses(
        logits, y_l, student, teacher, weight, batches.labeled_share, batches.unlabeled_share
    )
    state.scaler.scale(total).backward()
    bad = guard.watch(state.step + 1, total, terms, names)
    if guard.dist.device.type == "cpu":
        guard.check(state.seen)
    guard.step(state.scaler, state.optimizer)
    update_teacher(state.teacher, state.student, warmup_decay(state.step + 1, mlmt.ema_decay))
    found = log_accuracies(logits, taught, y_l, mlmt.threshold, batches.labeled_share, guard.dist)
    return Losses(total.detach(), {k: v.detach() for k, v in terms.items()} | found | {"nonfinite": bad})


def set_rate(cfg: Config, state: MlmtState, epoch: int) -> float:
    """Give the optimiser the rate of an epoch (from 0): half a cosine from `lr` to `eta_min`."""
    rate = cosine(cfg.mlmt.lr, epoch, cfg.mlmt.epochs, cfg.mlmt.eta_min)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    return rate


def train_epoch(
    epoch: int, cfg: Config, data: MlmtData, state: MlmtState, log: RunLog, guard: FiniteGuard, request: StopRequest,
    dist: Dist,
) -> bool:  # fmt: skip
    """The rest of an epoch from `state.step` on; True if the run was asked to stop (and has been saved)."""
    run, length = cfg.run, data.steps_per_epoch
    rate = set_rate(cfg, state, epoch)
    state.student.train()
    state.teacher.train()
    for batches in data.epoch(epoch, state.step % length, dist, run.channels_last):
        total, terms = train_step(batches, epoch, cfg, state, guard, data.names(batches))
        state.step += 1
        values = terms | {"loss": total}
        state.sums += torch.stack([values[name].double() for name in SUMMED])
        log.step(state.step, values, epoch=epoch, lr=rate, expected=["loss_class", "loss_consistency"])
        if log.last_means.get("nonfinite"):
            guard.check(state.seen)
        due = run.save_interval and state.step % run.save_interval == 0
        ending = request.agree(dist) or (run.max_steps is not None and state.step >= run.max_steps)
        if (due or ending) and log.run_dir is not None:
            guard.check(state.seen)  # on a GPU a bad step may not have been noticed yet
            with log.paused():
                save_last(log.run_dir / "last.pt", cfg, data.spec, state, log, dist)
        if ending:
            if log.run_dir is not None:
                log.info(f"mlmt: stopped after step {state.step}; start the same command again to go on")
            return True
    return False


def is_due(cfg: Config, epochs: int) -> bool:
    """Whether the scores are written after so many epochs: every `evaluation_epochs`, and at the end."""
    return epochs % cfg.mlmt.evaluation_epochs == 0 or epochs == cfg.mlmt.epochs


def end_epoch(
    epoch: int, cfg: Config, data: MlmtData, state: MlmtState, log: RunLog, run_dir: Path, dist: Dist
) -> None:
    """Say how epoch `epoch` (from 0) went; where that is due write both networks' scores and save everything."""
    done = epoch + 1
    means = (mean_over_ranks(state.sums, dist) / data.steps_per_epoch).tolist()
    state.sums.zero_()
    state.last = dict(zip(SUMMED, means, strict=True))
    shown = " ".join(f"{name.removeprefix('loss_')} {value:.4f}" for name, value in state.last.items())
    log.info(f"mlmt epoch {done}/{cfg.mlmt.epochs}: {shown}")
    state.evaluated = done
    if not is_due(cfg, done):
        return
    with log.paused():
        write_all_scores(cfg, data, state, log, run_dir, dist)
        save_last(run_dir / "last.pt", cfg, data.spec, state, log, dist)


def write_all_scores(
    cfg: Config, data: MlmtData, state: MlmtState, log: RunLog, run_dir: Path, dist: Dist
) -> None:
    """Both networks' scores of the list `eval.list` into files, and how good they are into the log."""
    share_statistics(state, dist)
    scored = build_score_data(cfg, data.spec, cfg.eval.list, dist)
    with contextlib.closing(scored.loader):
        state.figures = validate(cfg, state, scored, run_dir, state.evaluated, dist)
    state.scored = cfg.eval.list
    log.scalars(state.step, {"epoch": state.evaluated - 1, **state.figures})
    shown = ", ".join(f"{name} {value:.4f}" for name, value in state.figures.items())
    log.info(f"mlmt epoch {state.evaluated}: {shown or 'scores written'}")


def set_up(
    cfg: Config, dist: Dist, split: Split | None, say: Callable[[str], object]
) -> tuple[MlmtData, MlmtState]:
    """Data, networks and optimiser of the branch, before any checkpoint is read."""
    configure(cfg.run)
    spec = branch_spec(cfg)
    if split is None:
        split = training_split(cfg, spec, masks=cfg.mlmt.labels == "masks").split
    build_score_data(
        cfg, spec, cfg.eval.list, dist
    ).loader.close()  # a list or label file that is missing, now
    data = build_mlmt_data(cfg, spec, split, dist)
    return data, build_state(cfg, spec.num_classes, dist, say)


def branch_start(run_dir: Path, run: RunConfig, *, alone: bool) -> Start:
    """Where the branch begins: its own last checkpoint, else what `run.resume` and `run.init` name.

    As part of a run of both branches it continues the branch in the `mlmt` folder of the run that is resumed, if that
    has come so far, and `run.init` concerns the segmentation branch.
    """
    if alone:
        return resolve_start(run_dir, run.resume, run.init)
    resume = None
    if run.resume is not None:
        folder = Path(run.resume) if Path(run.resume).is_dir() else Path(run.resume).parent
        resume = folder / BRANCH if (folder / BRANCH / "last.pt").is_file() else None
    return resolve_start(run_dir, resume, None)


def announce(cfg: Config, data: MlmtData, log: RunLog, run_dir: Path, dist: Dist, *, alone: bool) -> None:
    """Places and arithmetic, once, at the start."""
    mlmt, split = cfg.mlmt, data.split
    if alone:
        log.info(dump(cfg).rstrip())
    log.info(f"mlmt directory: {run_dir}")
    log.info(
        f"mlmt: {dist.world_size} process(es) on {dist.device.type}; batch {mlmt.labeled_batch} + "
        f"{mlmt.unlabeled_batch}; {len(split.labeled)} labeled + {len(split.unlabeled)} unlabeled images "
        f"({split.name}, {split.hash[:12]}); {data.steps_per_epoch} steps x {mlmt.epochs} epochs = "
        f"{data.steps_per_epoch * mlmt.epochs} steps"
    )
    if not split.unlabeled:
        log.info("mlmt: no unlabeled images; the labeled ones are shown as unlabeled too")


def train_branch(
    cfg: Config,
    run_dir: Path,
    dist: Dist,
    request: StopRequest,
    *,
    split: Split | None = None,
    alone: bool = False,
) -> Path | None:
    """Train the branch from wherever `run_dir` stands to the end; a collective.

    Writes `last.pt`, the log and, every `mlmt.evaluation_epochs`, `output_{val,ema}_{raw,bin}_{epochs}.txt` with the
    scores of the list `eval.list`, both into `run_dir`.

    Args:
        cfg: the run; of its sections `data`, `mlmt`, `run` and `eval.list` matter here.
        run_dir: folder of the branch; a run of both branches gives it a folder of its own, `mlmt`.
        dist: this process.
        request: asked after every step whether to stop.
        split: labeled and unlabeled images; None for those that `cfg.data` names.
        alone: the run consists of this branch only, so `run.resume` and `run.init` mean it.

    Returns:
        The teacher's scores after the last epoch; None if the run was stopped before.

    Raises:
        UserError: data, label files, weights or checkpoint do not fit.
    """
    lines: list[str] = []
    data, state = set_up(cfg, dist, split, lines.append)
    length, epochs = data.steps_per_epoch, cfg.mlmt.epochs
    total = length * epochs
    images = cfg.mlmt.labeled_batch + cfg.mlmt.unlabeled_batch
    with contextlib.closing(data), RunLog(
        run_dir, dist, total_steps=total, images_per_step=images, interval=cfg.run.log_interval
    ) as log:  # fmt: skip
        began = branch_start(run_dir, cfg.run, alone=alone)
        if began.continues and began.state is not None:
            require_branch(began.state, str(began.path))
            require_resumable(began.state, PROJECT, cfg, str(began.path), HARMLESS)
            restore(state, began.state, str(began.path), log, dist)
        elif began.state is not None:
            require_branch(began.state, str(began.path))
            load_networks(state, began.state, str(began.path))
        else:
            for line in dict.fromkeys(lines):
                log.info(f"classifiers: {line}")
        announce(cfg, data, log, run_dir, dist, alone=alone)
        if dist.is_main:
            save_config(cfg, run_dir / "config.yaml")
        log.begin(state.step)
        guard = FiniteGuard(cfg.run.on_nonfinite, dist, cfg.run.log_interval)
        while state.evaluated < epochs:
            epoch = state.evaluated
            if state.step < (epoch + 1) * length and train_epoch(
                epoch, cfg, data, state, log, guard, request, dist
            ):
                return None
            guard.check(state.seen)
            end_epoch(epoch, cfg, data, state, log, run_dir, dist)
        return finish(cfg, data, state, log, guard, run_dir, dist)


def finish(
    cfg: Config, data: MlmtData, state: MlmtState, log: RunLog, guard: FiniteGuard, run_dir: Path, dist: Dist
) -> Path:
    """Write `result.json` of the branch, and the scores anew where they are gone or of another list.

    Returns:
        The teacher's scores after the last epoch.
    """
    files = score_files(run_dir, state.evaluated)
    complete = state.scored == cfg.eval.list and all(path.is_file() for path in files.values())
    if not broadcast_object(complete, dist):
        write_all_scores(cfg, data, state, log, run_dir, dist)
    path = files["ema_raw"]
    if dist.is_main:
        result = {
            "project": PROJECT, "branch": BRANCH, "list": cfg.eval.list, "split": data.split.name,
            "split_hash": data.split.hash, "seed": cfg.run.seed, "steps": state.step, "epochs": state.evaluated,
            "last_epoch": state.last, "scores": path.name, **state.figures, "seconds": log.elapsed_s,
            "skipped_files": data.skipped, "skipped_steps": float(guard.cancelled),
        }  # fmt: skip
        write_result(run_dir, result)
    log.info(f"mlmt scores: {path}")
    return path


def dry_run(cfg: Config, dist: Dist, split: Split | None = None) -> None:
    """Build everything, run steps of the branch, say what the whole run will need; leaves nothing behind."""
    data, state = set_up(cfg, dist, split, lambda line: line)
    total = data.steps_per_epoch * cfg.mlmt.epochs
    log = RunLog(None, dist, total_steps=total, images_per_step=1, interval=total)
    guard = FiniteGuard("stop", dist, 1)
    seconds = []
    with contextlib.closing(data):
        for _ in range(min(3, data.steps_per_epoch)):
            began = time.perf_counter()
            limited = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, max_steps=state.step + 1))
            train_epoch(0, limited, data, state, log, guard, StopRequest(), dist)
            if dist.device.type == "cuda":
                torch.cuda.synchronize(dist.device)
            seconds.append(time.perf_counter() - began)
    if dist.is_main:
        print(  # noqa: T201  (the answer of run.dry_run)
            f"dry run of mlmt: peak memory {peak_memory_bytes(dist) / 2**30:.2f} GiB per process, about "
            f"{duration(min(seconds) * total)} for {total} steps without validation",
            flush=True,
        )
