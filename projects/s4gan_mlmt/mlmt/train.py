"""The image-level branch: a multi-label mean teacher (MLMT) that says which classes an image holds.

Two classifiers learn from label vectors of the labeled images and from the agreement of both on the unlabeled ones.
The teacher's scores of the evaluation images go into text files, by which the segmentation branch's classes are
switched off (`fusion.py`). Steps and schedules are those of `train_mlmt.py` of s4GAN.

With several processes the losses are those of the global batch, so gradients, and with synchronized BatchNorm (GPUs)
the whole run, are those of one process. Otherwise BatchNorm normalizes each process's own share of a batch, and the
running statistics are the first process's, as under the authors' DataParallel.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from common.config import dump
from common.data.streams import Batches
from common.distributed import Dist, broadcast_object, mean_over_ranks
from common.models.placing import share_statistics
from common.numerics.ema import update_teacher, warmup_decay
from common.numerics.losses import Losses
from common.numerics.optim import cosine
from common.numerics.precision import grad_scaler
from common.run.log import write_json
from common.run.progress import Progress
from common.run.rng import configure
from common.run.session import Session
from common.run.signals import StopRequest
from projects.s4gan_mlmt.config import Config
from projects.s4gan_mlmt.mlmt.data import branch_spec, build_mlmt_data, build_score_data, split_views
from projects.s4gan_mlmt.mlmt.losses import consistency_weight, log_accuracies, mlmt_losses
from projects.s4gan_mlmt.mlmt.model import build_networks, weights_file
from projects.s4gan_mlmt.mlmt.scores import score_files, validate
from projects.s4gan_mlmt.mlmt.state import (
    BRANCH,
    FREE,
    SUMMED,
    Run,
    branch_start,
    build_student_optimizer,
    no_sums,
)
from projects.s4gan_mlmt.state import PROJECT
from projects.s4gan_mlmt.training_split import training_split
from tools.training import begin, forecast


def train_step(batch: Batches, at: Progress, run: Run) -> Losses:
    """All loss terms of a step, still on the device, and how many label entries both networks get right.

    The teacher's forward on the labeled images is for the log, but moves its BatchNorm statistics as in the
    original; for the same reason the unlabeled forwards are made while the consistency has weight 0.
    """
    nets, mlmt = run.nets, run.cfg.mlmt
    (x_l, y_l), (clean, augmented) = batch[0][:2], split_views(batch[1].image)
    labeled, unlabeled = run.data.shares(at)
    logits, student = nets.learn(x_l, augmented)
    with torch.no_grad():
        taught, teacher = nets.teach(x_l, clean)
    weight = consistency_weight(at.epoch, mlmt.burn_in_epochs, mlmt.epochs, mlmt.w_cons)
    losses = mlmt_losses(logits, y_l, student, teacher, weight, labeled, unlabeled)
    accuracies = log_accuracies(logits, taught, y_l, mlmt.threshold, labeled, run.dist)
    return Losses(losses.total, losses.terms | accuracies)


def after_step(at: Progress, run: Run) -> None:
    """Move the teacher after the optimizer step."""
    update_teacher(run.nets.teacher, run.nets.student, warmup_decay(run.step + 1, run.cfg.mlmt.ema_decay))


def set_rate(epoch: int, run: Run) -> float:
    """Give the optimizer the rate of an epoch (from 0): half a cosine from `lr` to `eta_min`."""
    mlmt = run.cfg.mlmt
    rate = cosine(mlmt.lr, epoch, mlmt.epochs, mlmt.eta_min)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    return rate


def train_epoch(epoch: int, run: Run, session: Session) -> bool:
    """The rest of an epoch; True if the run was asked to stop (and has been saved)."""
    nets = run.nets
    rate = set_rate(epoch, run)
    for at, (batch,) in session.steps(epoch):
        nets.student.train()
        nets.teacher.train()
        session.guard.protect(nets.student, nets.teacher)
        run.optimizer.zero_grad(set_to_none=True)
        losses = train_step(batch, at, run)
        run.scaler.scale(losses.total).backward()
        bad = session.watch(at, losses, [batch])
        session.guard.step(run.scaler, run.optimizer)
        after_step(at, run)
        run.add(losses)
        session.record(epoch, losses, bad, rate)
        if session.save_or_stop():
            return True
    return False


def say_means(epoch: int, run: Run, session: Session) -> None:
    """Say the mean losses and accuracies of `epoch` (from 0), and begin new sums."""
    session.guard.check()
    means = (mean_over_ranks(run.sums, run.dist) / run.data.steps_per_epoch).tolist()
    run.sums.zero_()
    run.means, run.evaluated = dict(zip(SUMMED, means, strict=True)), epoch + 1
    shown = " ".join(f"{name.removeprefix('loss_')} {value:.4f}" for name, value in run.means.items())
    session.log.info(f"mlmt epoch {epoch + 1}/{run.epochs}: {shown}")


def evaluation_due(epoch: int, run: Run) -> bool:
    """Whether the scores are written after `epoch` (from 0): every `evaluation_epochs`, and at the end."""
    return (epoch + 1) % run.cfg.mlmt.evaluation_epochs == 0 or epoch + 1 == run.epochs


def evaluate(epoch: int, run: Run, session: Session) -> None:
    """Write both networks' scores of the list `eval.list` after `epoch` (from 0), and say how good they are."""
    cfg, log, networks = run.cfg, session.log, run.nets.bare
    assert session.run_dir is not None, "a dry run leaves nothing behind"
    with log.paused():
        share_statistics(networks.values(), run.dist)
        scored = build_score_data(cfg, run.data.spec, cfg.eval.list, run.dist)
        with contextlib.closing(scored.loader):
            run.figures = validate(cfg, networks, scored, session.run_dir, epoch + 1, run.dist)
        run.scored = cfg.eval.list
        log.scalars(run.step, {"epoch": epoch, **run.figures})
        shown = ", ".join(f"{name} {value:.4f}" for name, value in run.figures.items())
        log.info(f"mlmt epoch {epoch + 1}: {shown or 'scores written'}")


def set_up(cfg: Config, dist: Dist) -> Run:
    """Data, networks and optimizer of the branch, before any checkpoint is read."""
    configure(cfg.run)
    spec = branch_spec(cfg)
    split = training_split(cfg, spec, masks=cfg.mlmt.labels == "masks").split
    # what is missing is said before the training
    build_score_data(cfg, spec, cfg.eval.list, dist).loader.close()
    if cfg.model.network != "generic":
        weights_file(cfg.mlmt)
    data = build_mlmt_data(cfg, spec, split, dist)
    nets = build_networks(cfg, spec.num_classes, dist)
    optimizer = build_student_optimizer(cfg.mlmt, nets.student)
    return Run(cfg, dist, data, nets, optimizer, grad_scaler(cfg.run.precision, dist), no_sums(dist))


def train(cfg: Config, run_dir: Path, dist: Dist, request: StopRequest | None = None) -> Path | None:
    """Train the branch from wherever `run_dir` stands to the end; a collective.

    Writes `last.pt`, the log and, every `mlmt.evaluation_epochs`, `output_{val,ema}_{raw,bin}_{epochs}.txt` with the
    scores of the list `eval.list`, both into `run_dir`.

    Args:
        cfg: the run; of its sections `data`, `mlmt`, `run` and `eval.list` matter here.
        run_dir: folder of the branch; a run of both branches gives it a folder of its own, `mlmt`.
        dist: this process.
        request: the stop request of the run of both branches that this is a part of; None: the branch is all of the
            run, so `run.resume` and `run.init` mean it.

    Returns:
        The teacher's scores after the last epoch; None if the run was stopped before.

    Raises:
        UserError: data, label files, weights or checkpoint do not fit.
    """
    run = set_up(cfg, dist)
    with Session(run, PROJECT, run_dir, may_change=FREE, request=request, name=BRANCH) as session:
        session.start(branch_start(run_dir, cfg.run, part=request is not None))
        announce(run, session, part=request is not None)
        begin(session)
        for epoch in session.epochs():
            if train_epoch(epoch, run, session):
                return None
            say_means(epoch, run, session)
            if evaluation_due(epoch, run):
                evaluate(epoch, run, session)
                session.end_epoch(epoch)
        return finish(run, session)


def announce(run: Run, session: Session, *, part: bool) -> None:
    """Places and arithmetic, once, at the start; the configuration too, unless a run of both branches has said it."""
    mlmt, split, length, log = run.cfg.mlmt, run.data.split, run.data.steps_per_epoch, session.log
    if not part:
        log.info(dump(run.cfg).rstrip())
    log.info(f"mlmt directory: {session.run_dir}")
    log.info(
        f"mlmt: {run.dist.world_size} process(es) on {run.dist.device.type}; batch {mlmt.labeled_batch} + "
        f"{mlmt.unlabeled_batch}; {len(split.labeled)} labeled + {len(split.unlabeled)} unlabeled images "
        f"({split.name}, {split.hash[:12]}); {length} steps x {run.epochs} epochs = {run.total_steps} steps"
    )
    if not split.unlabeled:
        log.info("mlmt: no unlabeled images; the labeled ones are shown as unlabeled too")


def finish(run: Run, session: Session) -> Path:
    """Write `result.json` of the branch, and the scores anew where they are gone or of another list.

    Returns:
        The teacher's scores after the last epoch.
    """
    cfg, split, run_dir = run.cfg, run.data.split, session.run_dir
    assert run_dir is not None, "a dry run leaves nothing behind"
    files = score_files(run_dir, run.evaluated)
    complete = run.scored == cfg.eval.list and all(path.is_file() for path in files.values())
    if not broadcast_object(complete, run.dist):
        evaluate(run.evaluated - 1, run, session)
    path = files["ema_raw"]
    if run.dist.is_main:
        result = {
            "project": PROJECT, "branch": BRANCH, "list": cfg.eval.list, "split": split.name,
            "split_hash": split.hash, "truth": session.measured_on(cfg.eval.list), "seed": cfg.run.seed,
            "steps": run.step, "epochs": run.evaluated,
            "last_epoch": run.means, "scores": path.name, **run.figures, "seconds": session.log.elapsed_s,
            "skipped_files": run.data.skipped, "skipped_steps": float(session.guard.cancelled),
        }  # fmt: skip
        write_json(run_dir / "result.json", result)
    session.log.info(f"mlmt scores: {path}")
    return path


def dry_run(cfg: Config, dist: Dist) -> None:
    """Build everything, run steps of the branch, print the forecast; leaves nothing behind."""
    run = set_up(cfg, dist)
    with Session(run, PROJECT, None, name=BRANCH) as session:
        forecast(session, [lambda: train_epoch(0, run, session)] * 3)
