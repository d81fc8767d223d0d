"""Start-up of one or several processes from the launcher's environment."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as torch_dist
from torch.distributed.rendezvous import rendezvous

from common.distributed import Dist
from common.errors import UserError
from tools.ports import require_free_port

DEFAULT_PORT = 29500
JOIN_TIMEOUT_S = 300.0
COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # the first rank may evaluate alone while the others wait
PEER_LOST = re.compile(
    r"connection (closed|reset)|broken pipe|socket (closed|timeout)|remote process", re.IGNORECASE
)


@dataclass(frozen=True)
class Place:
    """What the environment says about this process, before a device is chosen."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_size: int
    host: str
    port: int


def first_host(nodelist: str) -> str:
    """First host name of a Slurm node list such as `gpu[003-006,010],login1` (here `gpu003`)."""
    name = re.split(r",(?![^\[]*\])", nodelist.strip(), maxsplit=1)[0]
    return re.sub(r"\[([^\]]*)\]", lambda found: re.split(r"[-,]", found[1])[0], name)


def _integer(env: Mapping[str, str], name: str) -> int:
    """Value of the environment variable `name` as an integer; `UserError` if it is none."""
    try:
        return int(env[name])
    except KeyError:
        raise UserError(
            f"environment: {name} is not set; start through torchrun or train.sh, or unset RANK"
        ) from None
    except ValueError:
        raise UserError(
            f"environment: {name}={env[name]!r} is not an integer; unset it or correct it"
        ) from None


def _slurm_local_size(env: Mapping[str, str], local_rank: int) -> int:
    """Number of tasks on this machine, from a list such as `2(x3),1`; at least `local_rank + 1`."""
    counts: list[int] = []
    for part in (env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or "").split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if found:
            counts += [int(found[1])] * int(found[2] or 1)
    node = int(env.get("SLURM_NODEID") or 0)
    return max(local_rank + 1, counts[node] if node < len(counts) else 0)


def _slurm_port(env: Mapping[str, str], port: int | None) -> int:
    """Port of a Slurm run: the argument, MASTER_PORT, or one derived from the job id (10000-29999)."""
    if port is not None:
        return port
    if "MASTER_PORT" in env:
        return _integer(env, "MASTER_PORT")
    job = re.sub(r"\D", "", env.get("SLURM_JOB_ID") or env.get("SLURM_JOBID") or "")
    return 10000 + int(job) % 20000 if job else DEFAULT_PORT


def place_from_environment(env: Mapping[str, str], port: int | None = None) -> Place:
    """Read rank, world size and meeting point from `env`.

    RANK and WORLD_SIZE (torchrun, `tools.launch`) win over Slurm's variables, because torchrun may run
    inside a Slurm job. Slurm counts only where it has started this process as one of several tasks:
    the shell of an allocation has SLURM_NTASKS but no SLURM_PROCID.

    Raises:
        UserError: a variable is missing or no integer.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, world = _integer(env, "RANK"), _integer(env, "WORLD_SIZE")
        local_rank = _integer(env, "LOCAL_RANK") if "LOCAL_RANK" in env or world > 1 else 0
        local_size = _integer(env, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in env else local_rank + 1
        if "MASTER_PORT" in env:  # the launcher has told it to all ranks; an argument is for the other cases
            port = _integer(env, "MASTER_PORT")
        host = env.get("MASTER_ADDR", "127.0.0.1")
        return Place("torchrun", rank, world, local_rank, local_size, host, port or DEFAULT_PORT)
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    if "SLURM_PROCID" in env and tasks in env and _integer(env, tasks) > 1:
        rank, local_rank = _integer(env, "SLURM_PROCID"), _integer(env, "SLURM_LOCALID")
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST") or env.get("SLURM_JOB_NODELIST")
        host = env.get("MASTER_ADDR") or (first_host(nodes) if nodes else "127.0.0.1")
        local_size = _slurm_local_size(env, local_rank)
        return Place(
            "slurm", rank, _integer(env, tasks), local_rank, local_size, host, _slurm_port(env, port)
        )
    return Place("single", 0, 1, 0, 1, "127.0.0.1", port or DEFAULT_PORT)


def choose_device(device: str, place: Place, gpus: int, env: Mapping[str, str]) -> torch.device:
    """Device of this process; `gpus` is the number that it can see.

    `device="auto"` takes a GPU where there is one; the environment variable SSS_DEVICE replaces "auto".

    Raises:
        UserError: an unknown word, no GPU although one is asked for, or fewer GPUs than processes on this machine.
    """
    where = "device"
    if device == "auto" and env.get("SSS_DEVICE"):
        device, where = env["SSS_DEVICE"], "SSS_DEVICE"
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"{where}={device}: unknown device; choose auto, cpu or cuda")
    if device == "cpu" or (device == "auto" and gpus == 0):
        return torch.device("cpu")
    if gpus == 0:
        raise UserError(
            f"{where}=cuda: this process sees no GPU; use {where}=cpu or check CUDA_VISIBLE_DEVICES"
        )
    bound = place.launcher == "slurm" and (
        "SLURM_GPUS_PER_TASK" in env or int(env.get("SLURM_GPUS_ON_NODE") or 0) >= place.local_size
    )
    if place.local_size > gpus and not bound:
        raise UserError(
            f"{place.local_size} processes on this machine but only {gpus} GPU(s); "
            f"start {gpus} process(es), or set SSS_DEVICE=cpu to train on CPUs"
        )
    return torch.device(
        "cuda", place.local_rank % gpus
    )  # Slurm may show each task only its own GPU, as number 0


def _join(place: Place) -> Any:
    """Store that all processes share, once they have met at `place.host:place.port`.

    Raises:
        UserError: the port is in use, or not all came within the time limit (SSS_JOIN_TIMEOUT, in seconds).
    """
    timeout = float(os.environ.get("SSS_JOIN_TIMEOUT", JOIN_TIMEOUT_S))
    torchrun_listens = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if place.rank == 0 and not torchrun_listens:
        require_free_port(place.port)
    host = f"[{place.host}]" if ":" in place.host else place.host
    url = f"tcp://{host}:{place.port}"
    try:
        store, _, _ = next(rendezvous(url, place.rank, place.world_size, timeout=timedelta(seconds=timeout)))
    except (RuntimeError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:160]
        if "EADDRINUSE" in str(error) or "already in use" in str(error):
            raise UserError(
                f"port {place.port}: already in use on this machine; choose another port"
            ) from error
        raise UserError(
            f"{place.host}:{place.port}: the {place.world_size} processes of this run did not meet within "
            f"{timeout:.0f} s as seen by rank {place.rank} ({reason}); check that all were started, "
            "that MASTER_ADDR and the port are right, and that no firewall is between them"
        ) from error
    return store


def _only_loopback(host: str) -> bool:
    """True if gloo should be told to use the loopback interface, because all processes are on this machine."""
    local = host in ("127.0.0.1", "localhost", "::1")
    return (
        local
        and "GLOO_SOCKET_IFNAME" not in os.environ
        and "lo" in [name for _, name in socket.if_nameindex()]
    )


def _report_lost_peer(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Exception hook: one line instead of a traceback when another process has gone, for that one has said why."""
    lost = isinstance(error, torch_dist.DistError) or (
        isinstance(error, RuntimeError) and PEER_LOST.search(str(error))
    )
    if not lost:
        sys.__excepthook__(kind, error, trace)
        return
    rank = torch_dist.get_rank() if torch_dist.is_initialized() else "?"
    reason = " ".join(str(error).split())[:200]
    sys.stderr.write(f"rank {rank}: lost contact with the other processes of this run ({reason})\n")


def start(device: str = "auto", port: int | None = None) -> Dist:
    """Join the run that the environment describes, and return this process's place in it.

    A single process gets no process group at all, whoever started it. Several get gloo for tensors on
    CPUs and, where the device is a GPU, NCCL for tensors on GPUs.

    Args:
        device: "auto", "cpu" or "cuda".
        port: Meeting point of a Slurm run; a launcher's MASTER_PORT and, without either, the job id decide.

    Raises:
        UserError: unknown device, fewer GPUs than processes, port in use, or the others cannot be reached.
    """
    place = place_from_environment(os.environ, port)
    chosen = choose_device(device, place, 0 if device == "cpu" else torch.cuda.device_count(), os.environ)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if place.world_size == 1:
        return Dist(device=chosen, launcher=place.launcher)
    if _only_loopback(place.host):
        os.environ["GLOO_SOCKET_IFNAME"] = (
            "lo"  # a host name that resolves to a foreign address would hang gloo
        )
    store = _join(place)
    on_gpu = chosen.type == "cuda"
    torch_dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=chosen if on_gpu else None,
    )
    sys.excepthook = _report_lost_peer
    backend = "nccl" if on_gpu else "gloo"
    return Dist(place.rank, place.world_size, place.local_rank, chosen, backend, place.launcher)


def stop() -> None:
    """Leave the process group, if there is one."""
    if torch_dist.is_available() and torch_dist.is_initialized():
        torch_dist.destroy_process_group()
        sys.excepthook = sys.__excepthook__
