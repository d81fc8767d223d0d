"""Hand the runs of a study to a Slurm cluster, as one array of jobs, through submitit.

A job stops its run before its time is over (the run saves) and asks for another turn, in which the same command goes
on. How a run has ended is read from its run directory; nothing that jobs have pickled is loaded here. The numbers of
the jobs are kept in `cluster/jobs.json`, so that a study that is started again waits for jobs that are still in the
queue and does not submit them twice.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from common.errors import UserError
from common.run.log import write_json
from studies.node import SAVE_S, ClusterRun, require_submitit
from studies.plan import Plan, make_plan
from studies.run import (
    Outcome,
    Write,
    begin,
    failure,
    finished,
    record,
    say,
    set_aside,
    thread_count,
)
from studies.study import ROOT, Job, Slurm, Study

Cluster = Literal["slurm", "local"]

FOLDER = "cluster"
POLL_S = {"slurm": 20.0, "local": 0.2}
WAITING = ("PENDING", "RUNNING", "REQUEUED", "SUSPENDED", "COMPLETING", "CONFIGURING", "UNKNOWN")
TURNS = 1000  # how often a job may ask for another turn


def run_on_cluster(
    study: Study, out: Path, *, cluster: Cluster, plan: Plan | None = None, write: Write = say
) -> list[Outcome]:
    """Submit everything that is missing below `out` and wait for it; returns how each run ended.

    A Ctrl-C ends the waiting, not the jobs; the same command waits again.

    Args:
        study: The study; its `slurm` says what a run asks for.
        out: Its folder, on a disk that the nodes share.
        cluster: "slurm", or "local" for processes of this machine.
        plan: What `make_plan` has made of it, if that was done before.
        write: Receives the lines that tell what happens.

    Raises:
        UserError: submitit is missing, the cluster refuses, or a mistake in a configuration.
    """
    submitit = require_submitit()
    plan = plan or make_plan(study, out)
    outcomes, waiting = begin(plan, out, write)
    hashes = {run.job.name: run.hash for run in plan.runs}
    folder = out / FOLDER
    numbers = _read(folder)
    active = {job.name: _known(submitit, cluster, folder, numbers.get(job.name)) for job in waiting}
    missing = [job for job in waiting if active[job.name] is None]
    for job in missing:
        set_aside(job, hashes[job.name], write)
    if missing:
        executor = _executor(submitit, study, folder, cluster)
        threads = thread_count(study, 1) if study.slurm is None else study.threads or study.slurm.cpus
        calls = [ClusterRun(job.command, job.folder, job.run_dir, threads) for job in missing]
        for job, one in zip(missing, _submit(executor, calls, cluster), strict=True):
            active[job.name] = one
            numbers[job.name] = one.job_id
        write_json(folder / "jobs.json", numbers)
    for job in waiting:
        record(out, started=job)
        state = "submitted" if job in missing else "in the queue since before"
        write(f"{job.name}: {state} as job {numbers[job.name]}, writes to {job.run_dir}")
    try:
        _wait(waiting, active, hashes, out, outcomes, POLL_S[cluster], write)
    except KeyboardInterrupt:
        write(
            "study: stops waiting; the jobs go on (scancel ends them); start the study again to wait for them"
        )
        for job in waiting:
            outcomes.setdefault(job.name, Outcome(job, "stopped", message=f"job {numbers[job.name]} goes on"))
    return [outcomes[run.job.name] for run in plan.runs]


def _submit(executor: Any, calls: Sequence[ClusterRun], cluster: Cluster) -> list[Any]:
    """The jobs of the calls, as one array.

    Raises:
        UserError: the cluster does not take them.
    """
    former = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = (
        f"{ROOT}{os.pathsep}{former}" if former else str(ROOT)
    )  # jobs import this module
    try:
        with executor.batch():
            submitted = [executor.submit(call) for call in calls]
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"--submit={cluster}: the cluster refuses: {lines[-1]}; check 'slurm' in the study"
        ) from None
    finally:
        os.environ.pop("PYTHONPATH")
        if former is not None:
            os.environ["PYTHONPATH"] = former
    return submitted


def _wait(
    waiting: Sequence[Job],
    active: Mapping[str, Any],
    hashes: Mapping[str, str],
    out: Path,
    outcomes: dict[str, Outcome],
    poll_s: float,
    write: Write,
) -> None:
    """Follow the jobs until all have ended."""
    began = time.monotonic()
    left = list(waiting)
    while left:
        for job in list(left):
            if _is_waiting(active[job.name]):
                continue
            left.remove(job)
            outcome = _outcome(job, hashes[job.name], time.monotonic() - began)
            outcomes[job.name] = outcome
            record(out, outcome)
            write(f"{job.name}: {outcome.status}{f': {outcome.message}' if outcome.message else ''}")
        if left:
            time.sleep(poll_s)


def _is_waiting(job: Any) -> bool:
    return job is not None and not job.done() and str(job.state).split()[0].upper() in WAITING


def _outcome(job: Job, expected: str, seconds: float) -> Outcome:
    """How a run has ended, from its run directory."""
    if finished(job, expected):
        return Outcome(job, "finished", seconds)
    return Outcome(job, "failed", seconds, failure(job.run_dir))


def _executor(submitit: Any, study: Study, folder: Path, cluster: Cluster) -> Any:
    """What submits jobs that ask for what the study says."""
    wish = study.slurm or Slurm()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        executor = submitit.AutoExecutor(
            folder=str(folder / "%j"), cluster=cluster, slurm_max_num_timeout=TURNS
        )
    except (OSError, RuntimeError) as error:
        raise UserError(f"--submit={cluster}: {error}; is this a login node of the cluster?") from None
    path = f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"
    shared: dict[str, Any] = {
        "name": "study",
        "timeout_min": max(1, round(60 * wish.hours)),
        "nodes": 1,
        "tasks_per_node": 1,
        "cpus_per_task": wish.cpus,
        "gpus_per_node": wish.gpus if cluster == "slurm" else 0,
        "mem_gb": wish.memory_gb,
    }
    named = {"partition": wish.partition, "account": wish.account, "constraint": wish.constraint}
    slurm: dict[str, Any] = {f"slurm_{key}": value for key, value in named.items() if value is not None}
    slurm |= {"slurm_array_parallelism": wish.at_once, "slurm_signal_delay_s": SAVE_S, "slurm_setup": [path]}
    executor.update_parameters(**shared, **slurm)
    return executor


def _known(submitit: Any, cluster: Cluster, folder: Path, number: str | None) -> Any:
    """A job of an earlier start that is still in the queue, else None."""
    if number is None:
        return None
    cls = submitit.SlurmJob if cluster == "slurm" else submitit.LocalJob
    job = cls(folder=str(folder / "%j"), job_id=number)
    return job if _is_waiting(job) and job.state.upper() != "UNKNOWN" else None


def _read(folder: Path) -> dict[str, str]:
    try:
        found = json.loads((folder / "jobs.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}
