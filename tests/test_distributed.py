from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common.distributed import (
    Dist,
    all_gather_padded,
    broadcast_object,
    delayed_reduction,
    gather_objects,
    max_over_ranks,
    mean_over_ranks,
    sum_over_ranks,
)
from common.errors import UserError
from tools import processes
from tools.ports import free_port, port_problem
from tools.processes import Place, choose_device, first_host, place_from_environment, start, stop

ROOT = Path(__file__).resolve().parents[1]
RUN = """
    import os
    import sys
    import torch
    from common.run.checkpoint import bare_state_dict
    from common.run.rng import capture_rng, restore_rng
    from common.distributed import *
    from tools.processes import start, stop
    from common.errors import UserError, run_main
    from common.run.log import RunLog
    from common.run.signals import StopRequest

    def main(argv):
        dist = start("cpu")
        rank, world = dist.rank, dist.world_size
        assert torch.distributed.is_initialized() == (world > 1)
        mine = torch.tensor([rank, 2.0 * rank])
        ranks = torch.arange(world, dtype=torch.float32)
        total = ranks.sum()
        assert sum_over_ranks(mine, dist).tolist() == [total, 2 * total]
        assert mean_over_ranks(mine, dist).tolist() == [total / world, 2 * total / world]
        assert max_over_ranks(mine, dist).tolist() == [world - 1, 2 * world - 2]
        assert mine.tolist() == [rank, 2 * rank]
        assert all_gather_padded(mine, dist).tolist() == [[r, 2 * r] for r in range(world)]
        flags = torch.tensor([rank == 0, True])
        gathered = all_gather_padded(flags, dist)
        assert gathered.dtype == torch.bool and gathered.tolist() == [[r == 0, True] for r in range(world)]
        assert gather_objects({"rank": rank}, dist) == [{"rank": r} for r in range(world)]
        assert broadcast_object(f"from {rank}", dist) == "from 0"

        net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
        keys = list(net.state_dict())
        net[1].running_mean.fill_(float(rank + 1))
        broadcast_buffers(net, dist)
        assert net[1].running_mean.tolist() == [1, 1]
        if world > 1:
            wrapped = torch.nn.parallel.DistributedDataParallel(net)
            assert list(bare_state_dict(wrapped)) == keys != list(wrapped.state_dict())

        torch.manual_seed(rank)
        states = capture_rng(dist)
        expected = torch.rand(3)
        restore_rng(states, dist)
        assert torch.equal(torch.rand(3), expected) and len(states) == world

        with RunLog(None, dist, total_steps=4, images_per_step=1, interval=2) as log:
            log.begin(0)
            for step in (1, 2, 3):
                log.step(step, {"loss_a": torch.tensor(float(step + rank))}, epoch=1, lr=1.0)
            assert log.last_means["loss_a"] == 1.5 + total / world, log.last_means
            state = log.state_dict()
            log.load_state_dict(state)
            log.step(4, {"loss_a": torch.tensor(4.0 + rank)}, epoch=1, lr=1.0)
            assert log.last_means["loss_a"] == 3.5 + total / world, log.last_means

        module = torch.nn.Linear(1, 1, bias=False)
        wrapped = torch.nn.parallel.DistributedDataParallel(module) if world > 1 else module
        for delay, expected in ((True, 1.0 + rank), (False, 2 * (1.0 + total / world))):  # the own one, then of all
            with delayed_reduction(wrapped, delay):
                wrapped(torch.full((1, 1), 1.0 + rank)).sum().backward()
            assert module.weight.grad.item() == expected, (delay, module.weight.grad)

        request = StopRequest()
        assert not request.agree(dist)
        if rank == world - 1:
            request.requested, request.signal = True, 15
        assert request.agree(dist) and request.requested and request.signal == 15
        sys.stdout.write(f"done {dist.launcher} {rank}/{world} {dist.backend}\\n")
        stop()
        assert not torch.distributed.is_initialized()
        sys.stdout.flush()
        os._exit(0)  # a thread of gloo may still hold the last tensor, and would abort at Python's end

    run_main(main)
"""
LAUNCHER = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SSS_DEVICE",
)


def clean(env: dict[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in env.items() if name not in LAUNCHER and "SLURM" not in name}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in set(os.environ) - set(clean(dict(os.environ))):
        monkeypatch.delenv(name)
    yield
    stop()


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "collectives.py"
    path.write_text(textwrap.dedent(RUN))
    return path


def test_plain_start_is_one_process_without_a_group() -> None:
    dist = start("cpu")
    assert dist == Dist(0, 1, 0, torch.device("cpu"), "none", "single")
    assert dist.is_main
    assert not torch.distributed.is_initialized()


def test_collectives_of_one_process_change_nothing() -> None:
    tensor = torch.tensor([1.0, 2.0])
    for reduce in (sum_over_ranks, mean_over_ranks, max_over_ranks):
        assert reduce(tensor, Dist()) is tensor
    assert all_gather_padded(tensor, Dist()).tolist() == [[1.0, 2.0]]
    assert gather_objects("x", Dist()) == ["x"]
    assert broadcast_object("x", Dist()) == "x"


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_torchrun(script: Path, processes: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += [f"--master-port={free_port()}", str(script)]
    done = subprocess.run(
        command, env=clean(dict(os.environ)), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    backend = "none" if processes == 1 else "gloo"
    said = sorted(line for line in done.stdout.splitlines() if line.startswith("done"))
    assert said == [f"done torchrun {rank}/{processes} {backend}" for rank in range(processes)]


@pytest.mark.slow
def test_the_environment_that_srun_sets(script: Path) -> None:
    env = clean(dict(os.environ)) | {
        "SLURM_JOB_ID": "1",
        "MASTER_PORT": str(free_port()),
        "SLURM_NTASKS": "2",
        "SLURM_NODELIST": "localhost",
        "SLURM_TASKS_PER_NODE": "2",
    }
    tasks = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={**env, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [task.communicate(timeout=120) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert [out.splitlines()[-1] for out, _ in said] == [f"done slurm {rank}/2 gloo" for rank in range(2)]


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("gpu[003-006,010],login1", "gpu003"),
        ("node-a1", "node-a1"),
        ("login1,gpu[1-2]", "login1"),
        ("rack[1-2]n[01-04]", "rack1n01"),
        ("tux[7,9]-ib", "tux7-ib"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_which_launcher_decides() -> None:
    slurm = {
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "SLURM_TASKS_PER_NODE": "4(x2)",
        "SLURM_JOB_NODELIST": "gpu[07-08]",
        "SLURM_JOB_ID": "123456",
    }
    assert place_from_environment(slurm) == Place("slurm", 5, 8, 1, 4, "gpu07", 10000 + 123456 % 20000)
    assert place_from_environment(slurm, 1234).port == 1234
    assert place_from_environment({**slurm, "MASTER_PORT": "4321"}).port == 4321
    assert place_from_environment({**slurm, "MASTER_ADDR": "10.0.0.1"}).host == "10.0.0.1"
    torchrun = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu01",
        "MASTER_PORT": "29501",
    }
    assert place_from_environment({**slurm, **torchrun}) == Place("torchrun", 3, 4, 1, 2, "gpu01", 29501)
    assert place_from_environment({**slurm, "SLURM_NTASKS": "1"}).launcher == "single"
    shell = {name: value for name, value in slurm.items() if name not in ("SLURM_PROCID", "SLURM_LOCALID")}
    assert place_from_environment(shell).launcher == "single"
    # A single-task step inside an allocation for many tasks.
    assert place_from_environment({**slurm, "SLURM_STEP_NUM_TASKS": "1"}).launcher == "single"
    with pytest.raises(UserError, match="LOCAL_RANK is not set"):
        place_from_environment({"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(UserError, match="RANK='x' is not an integer"):
        place_from_environment({"RANK": "x", "WORLD_SIZE": "2"})


def test_device_follows_the_gpus_and_the_request() -> None:
    place = Place("torchrun", 1, 2, 1, 2, "localhost", 1)
    assert choose_device("auto", place, 0, {}) == torch.device("cpu")
    assert choose_device("auto", place, 2, {}) == torch.device("cuda", 1)
    assert choose_device("auto", place, 2, {"SSS_DEVICE": "cpu"}) == torch.device("cpu")
    assert choose_device("cpu", place, 0, {"SSS_DEVICE": "cuda"}) == torch.device("cpu")
    for device in ("auto", "cuda"):
        with pytest.raises(UserError, match=r"2 processes on this machine but only 1 GPU.*SSS_DEVICE=cpu"):
            choose_device(device, place, 1, {})
    with pytest.raises(UserError, match="device=cuda: this process sees no GPU"):
        choose_device("cuda", place, 0, {})
    with pytest.raises(UserError, match="device=gpu: unknown device; choose auto, cpu or cuda"):
        choose_device("gpu", place, 1, {})
    bound = Place("slurm", 3, 4, 3, 4, "localhost", 1)
    assert choose_device("auto", bound, 1, {"SLURM_GPUS_ON_NODE": "4"}) == torch.device("cuda", 0)
    with pytest.raises(UserError, match="4 processes on this machine but only 1 GPU"):
        choose_device("auto", bound, 1, {"SLURM_GPUS_ON_NODE": "1"})


def join_environment(monkeypatch: pytest.MonkeyPatch, rank: int, port: int) -> None:
    values = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**values, "MASTER_PORT": port, "SSS_JOIN_TIMEOUT": 1}.items():
        monkeypatch.setenv(name, str(value))


def test_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert port_problem(port) == "already in use on this machine"
        join_environment(monkeypatch, 0, port)
        with pytest.raises(UserError, match=f"^port {port}: already in use on this machine; choose another"):
            start("cpu")
    assert port_problem(port) is None


@pytest.mark.parametrize("rank", [0, 1])
def test_the_others_do_not_come(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    port = free_port()
    join_environment(monkeypatch, rank, port)
    with pytest.raises(
        UserError, match=f"127.0.0.1:{port}: the 2 processes of this run did not meet"
    ) as caught:
        start("cpu")
    assert "\n" not in str(caught.value)
    assert not torch.distributed.is_initialized()


def test_a_lost_peer_takes_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    lost = RuntimeError("[pair.cc:534] Connection closed by peer\n [127.0.0.1]:1234")
    processes._report_lost_peer(RuntimeError, lost, None)
    reported = capsys.readouterr().err
    assert reported.startswith("rank ?: lost contact with the other processes of this run (")
    assert reported.count("\n") == 1
    processes._report_lost_peer(RuntimeError, RuntimeError("a bug"), None)
    assert "RuntimeError: a bug" in capsys.readouterr().err


def test_nothing_is_delayed_where_nothing_is_reduced() -> None:
    module = torch.nn.Linear(1, 1)
    with delayed_reduction(module, True):
        module(torch.ones(1, 1)).sum().backward()
    assert module.weight.grad is not None
