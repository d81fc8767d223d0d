from __future__ import annotations

import ast
import json
import logging
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.distributed import Dist
from common.errors import UserError
from common.run import log as runlog
from common.run.log import RunLock, RunLog, duration, write_json
from tools.environment import environment, peak_memory_bytes


@pytest.fixture(autouse=True)
def logger_as_before() -> Iterator[None]:
    handlers, level, propagate = list(runlog.LOG.handlers), runlog.LOG.level, runlog.LOG.propagate
    yield
    runlog.LOG.handlers, runlog.LOG.propagate = handlers, propagate
    runlog.LOG.setLevel(level)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def train(
    run_dir: Path | None, first: int, last: int, state: dict[str, Any] | None = None, **options: Any
) -> dict[str, Any]:
    """Steps `first`..`last` of a run of 10 whose terms depend only on the step; returns the log's state."""
    options = {"total_steps": 10, "images_per_step": 4, "interval": 3} | options
    with RunLog(run_dir, Dist(), **options) as log:
        if state is not None:
            log.load_state_dict(state)
        log.begin(first - 1)
        for step in range(first, last + 1):
            terms = {"loss_sup": torch.tensor(1.0 / step), "conf": torch.tensor(step * 0.1)}
            if step >= 5:  # the method's own term begins in the middle of an interval
                terms["loss_unsup"] = torch.tensor(2.0)
            log.step(step, terms, epoch=(step + 4) // 5, lr=0.1 / step)
        return log.state_dict()


def test_lines_hold_the_means_of_their_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, 1, 10)
    rows = lines(tmp_path)
    assert [row["step"] for row in rows] == [3, 6, 9, 10]
    assert rows[0]["loss_sup"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3, rel=1e-6)
    assert rows[0]["conf"] == pytest.approx(0.2, rel=1e-6)
    assert "loss_unsup" not in rows[0]
    assert rows[1]["loss_unsup"] == 2.0
    assert rows[1]["loss"] == pytest.approx(rows[1]["loss_sup"] + 2.0, rel=1e-6)
    assert rows[1]["epoch"] == 2
    assert rows[1]["lr"] == pytest.approx(0.1 / 6)
    assert all(row["images_per_s"] > 0 for row in rows)
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("step  3/10 ep 1 lr 3.33e-02 sup 0.611 ")
    assert out[3].startswith("step 10/10 ep 2 lr 1.00e-02 sup 0.100 unsup 2.000 ")
    assert out[3].endswith(" img/s eta 0s")
    assert "step 10/10" in (tmp_path / "train.log").read_text()


def test_a_killed_and_resumed_run_leaves_the_file_of_an_undisturbed_one(tmp_path: Path) -> None:
    train(tmp_path / "a", 1, 10)
    state = train(tmp_path / "b", 1, 4)  # saved within an interval
    train(tmp_path / "b", 5, 8, state)  # went on and was killed, leaving half a line
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "half')
    buffer = tmp_path / "state.pt"
    torch.save(state, buffer)
    state = torch.load(buffer, weights_only=True)
    train(tmp_path / "b", 5, 10, state)

    def without_time(run_dir: Path) -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if key != "images_per_s"} for row in lines(run_dir)]

    assert without_time(tmp_path / "b") == without_time(tmp_path / "a")


def test_beginning_anew_clears_the_metrics_of_a_run_that_never_saved(tmp_path: Path) -> None:
    train(tmp_path, 1, 7)
    train(tmp_path, 1, 3)
    assert [row["step"] for row in lines(tmp_path)] == [3]


def test_an_evaluation_after_the_save_is_not_kept_twice(tmp_path: Path) -> None:
    with RunLog(tmp_path, Dist(), total_steps=9, images_per_step=1, interval=3) as log:
        log.begin(0)
        for step in (1, 2, 3):
            log.step(step, {"loss_a": torch.tensor(1.0)}, epoch=1, lr=1.0)
        state = log.state_dict()
        log.scalars(3, {"miou": 0.5, "worst": math.nan})
    assert lines(tmp_path)[-1] == {"step": 3, "miou": 0.5, "worst": None}
    with RunLog(tmp_path, Dist(), total_steps=9, images_per_step=1, interval=3) as log:
        log.load_state_dict(state)
        log.begin(3)
        log.scalars(3, {"miou": 0.5})
        assert log.elapsed_s >= state["seconds"]
    assert [sorted(row) for row in lines(tmp_path)][1:] == [["miou", "step"]]


def test_a_term_that_stays_exactly_zero_is_reported_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runlog, "ZERO_PATIENCE", 12)

    def run(value: float, expected: tuple[str, ...] | None, revive_at: int = 99) -> list[str]:
        with RunLog(None, Dist(), total_steps=40, images_per_step=1, interval=5) as log:
            log.begin(0)
            for step in range(1, 41):
                second = 1.0 if step == revive_at else value
                terms = {"loss_sup": torch.tensor(1.0), "loss_contra": torch.tensor(second)}
                log.step(step, terms, epoch=1, lr=0.1, expected=expected)
        return [line for line in capsys.readouterr().err.splitlines() if "exactly 0" in line]

    reported = run(0.0, None)
    assert len(reported) == 1
    assert reported[0].startswith("warning: loss_contra: exactly 0 for 15 steps up to step 15; ")
    assert run(0.0, ("loss_sup",)) == []
    assert run(1e-30, None) == []
    assert len(run(0.0, None, revive_at=20)) == 2


def test_without_a_directory_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    train(None, 1, 10)
    assert list(tmp_path.iterdir()) == []
    assert "step 10/10" in capsys.readouterr().out


def test_other_ranks_write_no_file_and_say_only_warnings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(tmp_path, Dist(rank=1, world_size=2), total_steps=3, images_per_step=1) as log:
        log.begin(0)
        log.info("ordinary")
        logging.getLogger("semiseg").warning("unusual")
        log.scalars(0, {"miou": 0.1})
    captured = capsys.readouterr()
    assert "ordinary" not in captured.out
    assert captured.err == "warning: unusual\n"
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_file_holds_curves_and_pictures(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    state = train(tmp_path, 1, 6)
    with RunLog(tmp_path, Dist(), total_steps=10, images_per_step=1, interval=3) as log:
        log.load_state_dict(state)
        log.begin(6)
        log.scalars(6, {"miou": 0.25})
        log.add_image("panel", 6, np.zeros((4, 6, 3), np.uint8))
    files = sorted((tmp_path / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime)
    events = []
    for file in files:
        raw, at = file.read_bytes(), 0
        while at < len(raw):
            size = int.from_bytes(raw[at : at + 8], "little")
            events.append(Event.FromString(raw[at + 12 : at + 12 + size]))
            at += 16 + size
    values = {(event.step, value.tag): value for event in events for value in event.summary.value}
    assert values[3, "loss_sup"].simple_value == pytest.approx(0.6111111)
    assert values[6, "miou"].simple_value == 0.25
    assert (values[6, "panel"].image.height, values[6, "panel"].image.width) == (4, 6)
    assert [event.step for event in events if event.HasField("session_log")] == [7]


def test_time_out_of_the_loop_does_not_count(tmp_path: Path) -> None:
    with RunLog(tmp_path, Dist(), total_steps=2, images_per_step=10, interval=1) as log:
        log.begin(0)
        with log.paused():
            time.sleep(0.5)
        log.step(1, {"loss_a": torch.tensor(1.0)}, epoch=1, lr=1.0)
    assert lines(tmp_path)[0]["images_per_s"] > 10 / 0.4


def test_no_progress_bar_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, 1, 10)
    assert capsys.readouterr().err == ""


def test_progress_bar_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    train(tmp_path, 1, 10)
    captured = capsys.readouterr()
    assert "/10 [" in captured.err
    assert "step 10/10" in captured.out
    assert "[" not in (tmp_path / "train.log").read_text()


def test_one_live_process_per_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runlog, "LOCK_PATIENCE_S", 0.3)
    ready, release = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            lock = RunLock(tmp_path)
            grandchild = os.fork()  # a data worker that outlives its parent must not keep the lock
            if grandchild == 0:
                time.sleep(3)
                os._exit(0)
            os.write(release, b"x")
            time.sleep(30)
            lock.release()
        finally:
            os._exit(1)
    os.read(ready, 1)
    with pytest.raises(UserError, match=rf"another live run writes here \(process {child} on "):
        RunLog(tmp_path, Dist(), total_steps=1, images_per_step=1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with (
        RunLog(tmp_path, Dist(), total_steps=1, images_per_step=1),
        pytest.raises(UserError, match="this process"),
    ):
        RunLock(tmp_path)
    RunLock(tmp_path).release()


def test_unwritable_directory_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"file/run: cannot be created \(not a directory\); choose"):
        RunLog(tmp_path / "file" / "run", Dist(), total_steps=1, images_per_step=1)
    with pytest.raises(UserError, match=r"result\.json: cannot be written"):
        write_json(tmp_path / "absent" / "result.json", {"miou": 0.5})


def test_full_disk_ends_the_run_with_one_line(tmp_path: Path) -> None:
    import resource

    message = tmp_path / "message"
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
            train(tmp_path / "run", 1, 1000, total_steps=1000, interval=1)
        except UserError as error:
            message.write_text(str(error))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert message.read_text().endswith(
        "metrics.jsonl: cannot be written (file too large); free space and start again to resume"
    )


def test_env_and_result_files(tmp_path: Path) -> None:
    write_json(tmp_path / "env.json", environment(Dist()))
    env = json.loads((tmp_path / "env.json").read_text())
    assert env["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert env["world_size"] == 1
    assert set(env) >= {"commit", "dirty", "devices", "command", "threads", "cuda"}
    home = str(Path.home())
    assert home == "/" or home not in json.dumps(environment(Dist()))
    write_json(
        tmp_path / "result.json",
        {"miou": np.float32(0.5), "iou": torch.tensor([1.0, math.nan]), "split": tmp_path},
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert result == {"miou": 0.5, "iou": [1.0, None], "split": str(tmp_path)}
    write_json(tmp_path / "result.json", {"miou": 1})
    assert json.loads((tmp_path / "result.json").read_text()) == {"miou": 1}
    assert not list(tmp_path.glob("*.tmp"))


def test_peak_memory_is_that_of_this_process() -> None:
    assert 50e6 < peak_memory_bytes(Dist()) < 64e9


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (45.4, "45s"), (59.6, "1m00"), (200, "3m20"), (7440, "2h04"), (360000, "4d04h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_log_asks_the_device_in_one_place_only() -> None:
    """`step` must not synchronize; `_flush` brings all means over in a single call."""
    tree = ast.parse(Path(runlog.__file__).read_text())
    log = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "RunLog")
    banned = {"item", "tolist", "cpu", "numpy", "cuda", "synchronize"}
    calls = {
        method.name: [
            node.func.attr
            for node in ast.walk(method)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in banned
        ]
        for method in log.body
        if isinstance(method, ast.FunctionDef)
    }
    assert {name: found for name, found in calls.items() if found} == {
        "_flush": ["tolist"],
        "state_dict": ["cpu"],
    }


def test_a_closed_console_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

        def flush(self) -> None:
            raise BrokenPipeError(32, "Broken pipe")

    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", Closed())
        train(tmp_path, 1, 10)
    assert "step 10/10" in (tmp_path / "train.log").read_text()
    assert not any(isinstance(handler, logging.FileHandler) for handler in runlog.LOG.handlers)
