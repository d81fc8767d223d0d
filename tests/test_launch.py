from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from common.errors import UserError
from tools.launch import check_gpus, child_environment, count_gpus, make_plan
from tools.ports import free_port

ROOT = Path(__file__).resolve().parents[1]
TARGET = """
    import os, signal, sys, time
    from common.errors import UserError, run_main

    def say(text):
        sys.stdout.write(text + "\\n")
        sys.stdout.flush()

    def main(argv):
        rank = int(os.environ.get("RANK", 0))
        if argv[0] == "environment":
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "OMP_NUM_THREADS")
            say(" ".join([__name__, str(os.getpid()), *argv, *(os.environ.get(name, "-") for name in names)]))
        elif argv[0] == "mistake":  # of all ranks
            raise UserError("data.root=/nowhere: no such folder; set SSS_DATA")
        elif argv[0] == "exit":  # one rank fails, the other waits for it
            if rank == 1:
                sys.exit(int(argv[1]))
            time.sleep(60)
        elif argv[0] == "killed":
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        elif argv[0] == "count":
            seen = []
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                signal.signal(number, lambda number, frame: seen.append(number))
            say(f"ready {rank}")
            while not seen:
                time.sleep(0.05)
            time.sleep(0.5)  # for a second one
            say(f"seen {rank} {seen}")
        elif argv[0] == "wait":
            say(f"waiting {os.getpid()}")
            time.sleep(60)
        elif argv[0] == "peer":  # a mistake that only the second rank notices, in the middle of a collective
            from common import distributed
            from tools import processes
            dist = processes.start("cpu")
            if rank == 1:
                raise UserError("photo.jpg: cannot be decoded; replace it")
            distributed.gather_objects(rank, dist)
        elif argv[0] == "train":
            from common.run.signals import StopRequest
            from tools import processes
            dist = processes.start("cpu")
            with StopRequest() as stop:
                for step in range(10000):
                    time.sleep(0.01)
                    if step == 2:
                        say(f"training {rank}")
                    if stop.agree(dist):
                        break
            time.sleep(0.3)  # a save that a second signal would cut short
            say(f"stopped {rank} by {stop.signal} after {step}")
            processes.stop()

    if __name__ == "__main__":
        run_main(main)
"""


def environment() -> dict[str, str]:
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NNODES", "NODE_RANK", "OMP_NUM_THREADS")
    env = {name: value for name, value in os.environ.items() if name not in dropped and "SLURM" not in name}
    return {**env, "PYTHONPATH": str(ROOT), "SSS_DEVICE": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("launch")
    (path / "target.py").write_text(textwrap.dedent(TARGET))
    return path


def begin(
    folder: Path, processes: int | str, *argv: str, port: int | None = None, **env: str
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tools.launch", "--processes", str(processes)]
    command += ["--port", str(free_port() if port is None else port), "target", "--", *argv]
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**environment(), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background
        # jobs ignore Ctrl-C, and the tests may be one
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, list[str], str]:
    try:
        out, err = process.communicate(timeout=90)
    finally:
        process.kill()
    return process.returncode, sorted(out.splitlines()), err


def run(
    folder: Path, processes: int | str, *argv: str, port: int | None = None, **env: str
) -> tuple[int, list[str], str]:
    return finish(begin(folder, processes, *argv, port=port, **env))


def test_one_process_runs_the_module_in_place(folder: Path) -> None:
    process = begin(
        folder, 1, "environment", "--config", "a b.yaml", SLURM_PROCID="0", SLURM_NTASKS="4", RANK="3"
    )
    code, out, err = finish(process)
    assert (code, err) == (0, "")
    assert out == [f"__main__ {process.pid} environment --config a b.yaml - - - - - -"]


def test_two_processes_get_what_torchrun_would_set(folder: Path) -> None:
    port = free_port()
    code, out, err = run(folder, 2, "environment", port=port)
    assert (code, err) == (0, "")
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    said = [line.split(maxsplit=2) for line in out]
    assert {name for name, _, _ in said} == {"__main__"}
    assert len({pid for _, pid, _ in said}) == 2
    assert sorted(rest for _, _, rest in said) == [
        f"environment {r} 2 {r} 2 {port} {threads}" for r in range(2)
    ]


def test_several_machines(folder: Path) -> None:
    env = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1"}
    with socket.create_server(("127.0.0.1", 0)) as busy:  # the port matters on the first machine only
        port = busy.getsockname()[1]
        code, out, err = run(folder, 1, "environment", port=port, NODE_RANK="1", **env)
        assert (code, err) == (0, "")
        assert out[0].split()[3:8] == ["1", "2", "0", "1", str(port)]
        code, out, err = run(folder, 1, "environment", port=port, NODE_RANK="0", **env)
        assert (code, out) == (2, [])
        assert err == f"error: port {port}: already in use on this machine; choose another port\n"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_shared_mistake_is_one_line_and_exit_code_2(folder: Path, processes: int) -> None:
    code, out, err = run(folder, processes, "mistake")
    assert (code, out) == (2, [])
    assert err == "error: data.root=/nowhere: no such folder; set SSS_DATA\n"


def test_a_mistake_that_one_rank_notices_is_one_error_line(folder: Path) -> None:
    code, _, err = run(folder, 2, "peer")
    assert code == 2
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert errors == ["error: rank 1: photo.jpg: cannot be decoded; replace it"]


def test_exit_code_of_the_first_failure_and_end_of_the_others(folder: Path) -> None:
    began = time.monotonic()
    code, _, err = run(folder, 2, "exit", "7")
    assert (code, err) == (7, "")
    assert time.monotonic() - began < 20


def test_a_killed_child_is_named(folder: Path) -> None:
    code, _, err = run(folder, 2, "killed")
    assert code == 128 + 9
    assert err == "error: process 1 was ended by SIGKILL (out of memory?)\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_children_get_a_signal_of_the_whole_group_exactly_once(folder: Path, number: signal.Signals) -> None:
    process = begin(folder, 2, "count")
    assert process.stdout is not None
    assert {process.stdout.readline().split()[0] for _ in range(2)} == {"ready"}
    os.killpg(process.pid, number)  # as the terminal does with Ctrl-C
    code, out, err = finish(process)
    assert (code, err) == (0, "")
    assert out == [f"seen {rank} [{int(number)}]" for rank in range(2)]


def test_sigterm_to_the_launcher_stops_all_after_the_same_step(folder: Path) -> None:
    process = begin(folder, 2, "train")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("training")
    process.terminate()
    code, out, err = finish(process)
    assert (code, err) == (0, "")
    stopped = [line for line in out if line.startswith("stopped")]
    assert [line.split()[1:4] for line in stopped] == [["0", "by", "15"], ["1", "by", "15"]]
    assert len({line.split()[-1] for line in stopped}) == 1


def gone(pid: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def test_children_do_not_outlive_a_killed_launcher(folder: Path) -> None:
    process = begin(folder, 2, "wait")
    assert process.stdout is not None
    children = [int(process.stdout.readline().split()[1]) for _ in range(2)]
    assert not any(gone(pid) for pid in children)
    process.kill()
    deadline = time.monotonic() + 10
    while not all(gone(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(gone(pid) for pid in children)
    process.communicate()


@pytest.fixture
def from_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))


@pytest.mark.parametrize(
    ("argv", "env", "message"),
    [
        (["--processes", "0"], {}, "processes=0: expected an integer >= 1"),
        (["--processes", "two"], {}, "processes=two: expected an integer >= 1"),
        (["--port", "99999"], {}, "port=99999: expected an integer from 0 to 65535"),
        ([], {"NNODES": "2"}, "NNODES=2: MASTER_ADDR is not set; set it to the address of the first machine"),
        (
            [],
            {"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "2"},
            "NODE_RANK=2: expected an integer from 0 to 1",
        ),
    ],
)
@pytest.mark.usefixtures("from_folder")
def test_bad_arguments(argv: list[str], env: dict[str, str], message: str) -> None:
    command = ["--processes", "2", "--port", "29500", *argv, "--module", "target", "--", "--config", "x.yaml"]
    with pytest.raises(UserError) as caught:
        make_plan(command, env)
    assert str(caught.value) == message


@pytest.mark.usefixtures("from_folder")
def test_plan_and_gpus() -> None:
    plan = make_plan(["--processes", "4", "--port", "0", "target", "--", "x", "--", "y"], {})
    assert (plan.module, plan.arguments, plan.world_size, plan.port) == ("target", ("x", "--", "y"), 4, 0)
    with pytest.raises(
        UserError, match=r"processes=4: this machine has 2 GPU\(s\); start 2 .* SSS_DEVICE=cpu"
    ):
        check_gpus(plan, 2, {})
    check_gpus(plan, 2, {"SSS_DEVICE": "cpu"})
    check_gpus(plan, 0, {})
    check_gpus(plan, 4, {})
    assert child_environment(plan, 0, {"OMP_NUM_THREADS": "3"}, 16)["OMP_NUM_THREADS"] == "3"
    assert child_environment(plan, 0, {"RANK": "9"}, 16) | {
        "OMP_NUM_THREADS": "4",
        "RANK": "0",
    } == child_environment(plan, 0, {}, 16)
    with pytest.raises(UserError, match=r"no\.such\.module: no such module"):
        make_plan(["--processes", "1", "--port", "0", "no.such.module"], {})


def test_count_gpus_agrees_with_torch() -> None:
    import torch

    assert count_gpus() == torch.cuda.device_count()
