from __future__ import annotations

import os
import signal
import textwrap
import threading
from pathlib import Path

import pytest

from common.distributed import Dist
from common.errors import UserError
from common.run.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_first_signal_only_sets_the_flag_and_handlers_come_back(number: signal.Signals) -> None:
    former = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        assert not stop.agree(Dist())
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.signal == number
        assert stop.agree(Dist())
    assert signal.getsignal(number) is former


def test_second_signal_exits_at_once_with_128_plus_its_number() -> None:
    child = os.fork()
    if child == 0:
        try:
            with StopRequest():
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGINT)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGINT


def test_other_threads_install_nothing() -> None:
    seen: list[object] = []

    def enter() -> None:
        with StopRequest():
            seen.append(signal.getsignal(signal.SIGTERM))

    former = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [former]


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for scontrol that notes its arguments, one a line, and fails for the job 13."""
    program, notes = tmp_path / "scontrol", tmp_path / "notes"
    program.write_text(
        textwrap.dedent(f"""\
            #!/bin/sh
            printf '%s\\n' "$@" > '{notes}'
            [ "$2" != 13 ] || {{ echo 'Invalid job id' >&2; exit 1; }}
        """)
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    return notes


def request(number: signal.Signals) -> StopRequest:
    stop = StopRequest()
    stop.requested, stop.signal = True, int(number)
    return stop


def test_requeue_names_the_job_without_a_shell(scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "42; touch oops")
    assert request(signal.SIGUSR1).requeue(Dist())
    assert scontrol.read_text().splitlines() == ["requeue", "42; touch oops"]
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert request(signal.SIGUSR1).requeue(Dist())
    assert scontrol.read_text().splitlines() == ["requeue", "40_2"]


def test_requeue_is_for_the_first_rank_after_sigusr1_in_a_job(
    scontrol: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    assert not request(signal.SIGTERM).requeue(Dist())
    assert not request(signal.SIGUSR1).requeue(Dist(rank=1, world_size=2))
    monkeypatch.delenv("SLURM_JOB_ID")
    assert not request(signal.SIGUSR1).requeue(Dist())
    assert not scontrol.exists()


def test_requeue_reports_a_refusal_and_a_missing_program(
    scontrol: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    with pytest.raises(UserError, match=r"slurm job 13: requeue refused \(Invalid job id\); submit"):
        request(signal.SIGUSR1).requeue(Dist())
    monkeypatch.setenv("PATH", str(scontrol.parent / "nowhere"))
    with pytest.raises(UserError, match="scontrol is not on PATH"):
        request(signal.SIGUSR1).requeue(Dist())


def test_a_loop_that_is_told_to_stop_finishes_its_step_and_exits_0(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with StopRequest() as stop:
                for step in range(1, 100):
                    if step == 3:
                        os.kill(os.getpid(), signal.SIGTERM)
                    (tmp_path / "finished").write_text(str(step))
                    if stop.agree(Dist()):
                        break
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert (tmp_path / "finished").read_text() == "3"
