"""Start a module as one or several processes of one run; the command behind every `train.sh`.

    python -m tools.launch --processes 2 --port 29500 projects.u2pl.train -- --config configs/smoke.yaml

One process runs here, without a launcher. Several are started with the variables that torchrun sets (RANK,
WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT). NNODES, NODE_RANK and MASTER_ADDR in the
environment extend the run to several machines. torchrun works as well, but a run that it stops by a signal has
30 s to save and ends with exit code 1 and a traceback even if every process has ended with 0.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from common.config import load_config
from common.errors import UserError, run_main
from tools import ready, train_script
from tools.ports import free_port, require_free_port

FORWARDED = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGINT,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGHUP: signal.SIGTERM,  # a closed terminal should end in a saved checkpoint, too
}
LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "SLURM_PROCID",
    "TORCHELASTIC_USE_AGENT_STORE",
)
PR_SET_PDEATHSIG = 1
POLL_S = 0.05
GRACE_S = 2.0  # shorter than `run_main` lets the other ranks wait before they repeat the first rank's message


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to start on this machine.

    Attributes:
        module: Dotted name of the module, run as `__main__`.
        arguments: Its command line.
        processes: Number of processes on this machine.
        nodes: Number of machines, each with `processes`.
        node_rank: Index of this machine.
        host: Address of the first machine.
        port: Port on the first machine.
    """

    module: str
    arguments: tuple[str, ...]
    processes: int
    nodes: int
    node_rank: int
    host: str
    port: int

    @property
    def world_size(self) -> int:
        """Number of processes on all machines."""
        return self.processes * self.nodes


def _number(text: str, what: str, least: int, most: int | None = None) -> int:
    """`text` as an integer from `least` to `most`; `UserError` if it is none."""
    accepted = f"an integer >= {least}" if most is None else f"an integer from {least} to {most}"
    try:
        value = int(text)
    except ValueError:
        raise UserError(f"{what}={text}: expected {accepted}") from None
    if value < least or (most is not None and value > most):
        raise UserError(f"{what}={text}: expected {accepted}")
    return value


def make_plan(argv: Sequence[str], env: Mapping[str, str]) -> Plan:
    """Read the command line and the environment.

    Raises:
        UserError: a number out of range, no such module, or MASTER_ADDR missing for several machines.
    """
    own, arguments = list(argv), []
    if "--" in own:
        cut = own.index("--")
        own, arguments = own[:cut], own[cut + 1 :]
    parser = argparse.ArgumentParser(
        prog="python -m tools.launch", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--processes", required=True, help="processes on this machine")
    parser.add_argument("--port", required=True, help="free TCP port of the first machine; 0 picks one")
    parser.add_argument(
        "--module", action="store_true", help="accepted for clarity: the target is always a module"
    )
    parser.add_argument(
        "target", help="module to run, such as projects.u2pl.train; its arguments follow after --"
    )
    options = parser.parse_args(own)
    nodes = _number(env.get("NNODES", "1"), "NNODES", 1)
    if nodes > 1 and "MASTER_ADDR" not in env:
        raise UserError(f"NNODES={nodes}: MASTER_ADDR is not set; set it to the address of the first machine")
    port = _number(options.port, "port", 0, 65535)
    if port == 0 and nodes > 1:
        raise UserError(
            "port=0: several machines cannot guess a port; name one that is free on the first machine"
        )
    try:
        found = find_spec(options.target)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise UserError(f"{options.target}: no such module; check the name and PYTHONPATH")
    return Plan(
        module=options.target,
        arguments=tuple(arguments),
        processes=_number(options.processes, "processes", 1),
        nodes=nodes,
        node_rank=_number(env.get("NODE_RANK", "0"), "NODE_RANK", 0, nodes - 1),
        host=env.get("MASTER_ADDR", "127.0.0.1") if nodes > 1 else "127.0.0.1",
        port=port,
    )


def look_ahead(plan: Plan) -> None:
    """Refuse the training of a project whose data, lists or weights are missing before any process loads torch.

    Other programs, and command lines in the form of an original, look for themselves.

    Raises:
        UserError: what is missing, all of it at once.
    """
    package, _, name = plan.module.rpartition(".")
    words = (
        train_script.parser("").parse_known_args(plan.arguments)[1] if "--config" in plan.arguments else ["?"]
    )
    if name != "train" or words or {"-h", "--help"} & set(plan.arguments):
        return
    args = train_script.parser("").parse_args(plan.arguments)
    try:
        cfg = load_config(import_module(f"{package}.config").Config, args.config, args.overrides)
    except (UserError, ModuleNotFoundError):
        return  # the program says it in its own words
    here = find_spec(package)
    folder = Path(here.submodule_search_locations[0]) if here and here.submodule_search_locations else Path()
    ready.require(cfg, train_script.run_directory(cfg, args.config, folder))


def count_gpus() -> int:
    """Number of GPUs that torch would see; 0 at once, without importing torch, where no driver is loaded."""
    if not any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        return 0
    import torch

    return torch.cuda.device_count()


def check_gpus(plan: Plan, gpus: int, env: Mapping[str, str]) -> None:
    """Refuse more processes than GPUs, unless there are none or SSS_DEVICE=cpu asks for CPUs.

    Raises:
        UserError: names both numbers and the remedy.
    """
    if env.get("SSS_DEVICE") != "cpu" and 0 < gpus < plan.processes:
        raise UserError(
            f"processes={plan.processes}: this machine has {gpus} GPU(s); start {gpus} process(es), "
            "or set SSS_DEVICE=cpu to train on CPUs"
        )


def run_here(plan: Plan) -> None:
    """Run the module in this process as if it had been started by `python -m`."""
    for name in LAUNCHER_VARIABLES:  # this call says that the run has one process, whatever surrounds it
        os.environ.pop(name, None)
    sys.argv = [plan.module, *plan.arguments]
    runpy.run_module(plan.module, run_name="__main__", alter_sys=True)


def child_environment(plan: Plan, local_rank: int, env: Mapping[str, str], cores: int) -> dict[str, str]:
    """Environment of the process `local_rank` of this machine."""
    result = {name: value for name, value in env.items() if name not in LAUNCHER_VARIABLES}
    result |= {
        "RANK": str(plan.node_rank * plan.processes + local_rank),
        "WORLD_SIZE": str(plan.world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(plan.processes),
        "MASTER_ADDR": plan.host,
        "MASTER_PORT": str(plan.port),
    }
    result.setdefault("OMP_NUM_THREADS", str(max(1, cores // plan.processes)))
    return result


def _die_with(parent: int) -> Callable[[], None]:
    """What a child runs first: the kernel kills it when the launcher dies, even of `kill -9`."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

    def prepare() -> None:
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)

    return prepare


def _exit_code(failed: Mapping[int, int], stopping: bool) -> int:
    """Exit code of the run from those of the ranks that failed first; a signal n counts as 128 + n.

    A mistake of the user (2) wins: other ranks that fail at the same moment have only lost their peer. A rank
    that died of a signal could not say so itself; unless the run was to stop, that is done here.
    """
    if 2 in failed.values():
        return 2
    rank, code = next(iter(failed.items()))
    if code >= 0:
        return code
    if not stopping:
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        sys.stderr.write(f"error: process {rank} was ended by {signal.Signals(-code).name}{hint}\n")
    return 128 - code


def _send(children: Sequence[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    """Send the signal to the children that still run."""
    for child in children:
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(number)


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """End the remaining children: they have lost a peer and could only wait for it."""
    _send(children, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while any(child.poll() is None for child in children) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    for child in children:
        if child.poll() is None:
            child.kill()
        child.wait()


def run_children(plan: Plan) -> int:
    """Start the processes of this machine, pass signals on, and wait until all have ended.

    Returns:
        0 if all ended with 0, otherwise the exit code of the one that failed first; the others are ended.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    children: list[subprocess.Popen[bytes]] = []
    pending: list[signal.Signals] = []

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        pending.append(FORWARDED[signal.Signals(number)])

    for number in FORWARDED:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup stays in force
            signal.signal(number, note)
    prepare, first_rank, stopping = _die_with(os.getpid()), plan.node_rank * plan.processes, False
    try:
        for local_rank in range(plan.processes):
            # A session of its own keeps the terminal's Ctrl-C from the child, which gets it from here, once.
            child = subprocess.Popen(
                [sys.executable, "-m", plan.module, *plan.arguments],
                env=child_environment(plan, local_rank, os.environ, cores),
                start_new_session=True,
                preexec_fn=prepare,  # noqa: PLW1509 -- this process runs no threads of its own
            )
            children.append(child)
        while True:
            while pending:
                stopping = True
                _send(children, pending.pop(0))
            codes = [child.poll() for child in children]
            failed = {first_rank + index: code for index, code in enumerate(codes) if code}
            if failed:
                return _exit_code(failed, stopping)
            if all(code == 0 for code in codes):
                return 0
            time.sleep(POLL_S)
    finally:
        _end(children)


def main(argv: Sequence[str]) -> int | None:
    """Start the run that `argv` describes; returns its exit code."""
    plan = make_plan(argv, os.environ)
    if plan.node_rank == 0:
        look_ahead(plan)
    if plan.world_size == 1:
        run_here(plan)
        return None
    check_gpus(plan, count_gpus(), os.environ)
    if plan.port == 0:
        plan = dataclasses.replace(plan, port=free_port())
    elif plan.node_rank == 0:
        require_free_port(plan.port)
    return run_children(plan)


if __name__ == "__main__":
    run_main(main)
