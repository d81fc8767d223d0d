"""The session of a training loop: what it yields, counts, saves and leaves behind; nothing is trained here."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from common.config import build, to_dict
from common.data.dataset_yaml import load_spec
from common.data.loaders import SegmentationDataset, make_train_loader
from common.data.split import resolve_split
from common.data.streams import TrainingData
from common.data.transforms import EvalTransform
from common.distributed import Dist
from common.errors import UserError
from common.measure.evaluation import Evaluation, Protocol
from common.numerics.losses import Losses
from common.run.checkpoint import Start, load_weights
from common.run.log import RunLog
from common.run.progress import Progress
from common.run.session import Session
from common.run.signals import StopRequest
from common.run.state import Run
from tests.fake_project import FakeConfig, fake_config
from tests.runs import lines, saved
from tests.tiny import CLASSES, write_dataset
from tools import training
from tools.environment import config_hash
from tools.training import announce, forecast, report, summary

LENGTH, EPOCHS = 3, 3  # six labeled photos, two at once


@dataclass
class ToyRun(Run):
    """Its network is a count of steps."""

    network: nn.Module
    calls: list[str] = field(default_factory=list)

    def weights(self) -> dict[str, Any]:
        return {"student": self.network.state_dict()}

    def state_dict(self) -> dict[str, Any]:
        return {"own": torch.tensor(self.step)}

    def load_state_dict(self, saved: Mapping[str, Any], where: str) -> None:
        self.calls.append("everything")
        load_weights(self.network, saved["networks"]["student"], where)
        assert saved["own"] == saved["step"]

    def load_networks(self, saved: Mapping[str, Any], where: str) -> None:
        self.calls.append("weights")
        load_weights(self.network, saved["networks"]["student"], where)

    def load_backbone(self, log: RunLog) -> None:
        self.calls.append("backbone")


def number(value: float = 0.0) -> nn.Module:
    network = nn.Module()
    network.register_buffer("value", torch.tensor(value))
    return network


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("farm"))


@pytest.fixture
def cfg(farm: Path) -> FakeConfig:
    return fake_config(farm, run={"device": "cpu", "channels_last": False, "log_interval": 2})


def changed(cfg: FakeConfig, **sections: Mapping[str, Any]) -> FakeConfig:
    """The same configuration with other values."""
    tree = to_dict(cfg)
    return build(FakeConfig, tree | {name: tree[name] | dict(values) for name, values in sections.items()})


def toy(cfg: FakeConfig, *others: str, **counters: Any) -> ToyRun:
    """A run with a loader of the labeled list, and of that list again for every other role."""
    spec = load_spec(cfg.data.dataset)
    split = resolve_split(spec, cfg.data.split)
    transform = EvalTransform(mean=cfg.data.mean, std=cfg.data.std)
    loaders = {}
    for role in ("labeled", *others):
        dataset = SegmentationDataset(spec, split.labeled, transform, 0, role)
        loaders[role] = make_train_loader(dataset, cfg.optim.batch_size, Dist(), workers=0)
    return ToyRun(cfg, Dist(), TrainingData(spec, split, loaders, 1), number(), **counters)


def train_epoch(epoch: int, run: ToyRun, session: Session, seen: list[tuple[Progress, list[int]]]) -> bool:
    """A loop as in `train.py`, whose loss is the number of the step."""
    for at, group in session.steps(epoch):
        seen.append((at, group[0][0].index.tolist()))
        run.network.value += 1
        losses = Losses(
            torch.tensor(float(at.step)), {"loss_sup": torch.tensor(1.0), "kept": torch.tensor(0.0)}
        )
        bad = session.watch(at, losses, group)
        session.record(epoch, losses, bad, 0.5)
        if session.save_or_stop():
            return True
    return False


def train(cfg: FakeConfig, run_dir: Path) -> tuple[ToyRun, list[tuple[Progress, list[int]]], list[int]]:
    """From wherever the run directory stands: the run, the steps it saw, the epochs it finished."""
    run, seen, finished = toy(cfg), [], []
    with Session(run, "toy", run_dir) as session:
        session.start()
        announce(session)
        for epoch in session.epochs():
            if train_epoch(epoch, run, session, seen):
                break
            session.end_epoch(epoch)
            finished.append(epoch)
    return run, seen, finished


def evaluation(miou: float) -> Evaluation:
    return Evaluation(miou, miou + 0.1, (0.1, 0.2, 0.3), 0.9, (1, 2, 3), (10, 10, 10), 4, 0, Protocol())


# --- the loop --------------------------------------------------------------------------------------------------


def test_a_run_goes_through_all_steps_of_all_epochs(cfg: FakeConfig, tmp_path: Path) -> None:
    run, seen, finished = train(cfg, tmp_path)
    assert finished == list(range(EPOCHS))
    assert [at for at, _ in seen] == [Progress(step, LENGTH, EPOCHS) for step in range(LENGTH * EPOCHS)]
    assert [at.epoch for at, _ in seen] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for epoch in range(EPOCHS):
        indices = [i for at, index in seen if at.epoch == epoch for i in index]
        assert sorted(indices) == list(range(6))
    assert (run.step, run.evaluated, float(run.network.value)) == (9, 3, 9.0)


@pytest.mark.parametrize(
    ("counters", "epochs", "steps"),
    [
        ({"step": 7, "evaluated": 2}, [2], [7, 8]),
        (
            {"step": 3, "evaluated": 0},
            [0, 1, 2],
            [3, 4, 5, 6, 7, 8],
        ),  # saved between last step and evaluation
        ({"step": 9, "evaluated": 2}, [2], []),
        ({"step": 9, "evaluated": 3}, [], []),
    ],
)
def test_epochs_and_steps_begin_where_the_run_stands(
    cfg: FakeConfig, tmp_path: Path, counters: dict[str, int], epochs: list[int], steps: list[int]
) -> None:
    run, found, seen = toy(cfg, **counters), [], []
    with Session(run, "toy", tmp_path) as session:
        for epoch in session.epochs():
            found.append(epoch)
            train_epoch(epoch, run, session, seen)
            session.end_epoch(epoch)
    assert found == epochs
    assert [at.step for at, _ in seen] == steps


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 8])
def test_a_resumed_run_sees_the_batches_that_are_left(cfg: FakeConfig, tmp_path: Path, stop: int) -> None:
    whole, all_steps, _ = train(cfg, tmp_path / "whole")
    _, first, _ = train(changed(cfg, run={"max_steps": stop}), tmp_path / "parts")
    run, rest, _ = train(cfg, tmp_path / "parts")
    assert len(first) == stop
    assert first + rest == all_steps
    assert run.calls == ["everything"]
    assert (run.step, run.evaluated, run.network.value) == (whole.step, whole.evaluated, whole.network.value)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_record_counts_and_logs(cfg: FakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means of an interval of two steps; a term that is no loss may be 0 for ever."""
    expected = []
    step = RunLog.step
    monkeypatch.setattr(
        RunLog,
        "step",
        lambda log, *args, **words: expected.append(words["expected"]) or step(log, *args, **words),
    )
    train(cfg, tmp_path)
    found = [line for line in lines(tmp_path) if "loss" in line]
    assert [line["step"] for line in found] == [2, 4, 6, 8, 9]
    assert [line["loss"] for line in found] == [0.5, 2.5, 4.5, 6.5, 8.0]
    assert [line["epoch"] for line in found] == [0, 1, 1, 2, 2]
    assert all(
        (line["loss_sup"], line["kept"], line["nonfinite"], line["lr"]) == (1, 0, 0, 0.5) for line in found
    )
    assert expected == [["loss_sup"]] * 9


# --- saving and stopping ---------------------------------------------------------------------------------------


def test_checkpoints_at_the_interval_and_after_every_epoch(
    cfg: FakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, save = [], Session.save
    monkeypatch.setattr(Session, "save", lambda session: steps.append(session.run.step) or save(session))
    train(cfg, tmp_path / "none")
    assert steps == [3, 6, 9]
    steps.clear()
    train(changed(cfg, run={"save_interval": 2}), tmp_path / "two")
    assert steps == [2, 3, 4, 6, 6, 8, 9]
    assert saved(tmp_path / "two")["step"] == 9


def test_max_steps_saves_and_ends_inside_an_epoch(cfg: FakeConfig, tmp_path: Path) -> None:
    run, seen, finished = train(changed(cfg, run={"max_steps": 4}), tmp_path)
    assert (run.step, len(seen), finished) == (4, 4, [0])
    state = saved(tmp_path)
    assert (state["step"], state["evaluated"], state["project"]) == (4, 1, "toy")
    assert "stopped after step 4" in (tmp_path / "train.log").read_text()


def test_a_signal_ends_the_run_after_its_step(
    cfg: FakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, record = signal.getsignal(signal.SIGTERM), Session.record

    def record_and_signal(session: Session, *args: Any) -> None:
        if session.run.step == 4:
            signal.raise_signal(signal.SIGTERM)
        record(session, *args)

    monkeypatch.setattr(Session, "record", record_and_signal)
    run, _, finished = train(cfg, tmp_path)
    assert (run.step, finished, saved(tmp_path)["step"]) == (5, [0], 5)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("moment", ["record", "save_or_stop", "evaluation_due", "end_epoch"])
def test_a_bad_step_is_noticed_before_anything_is_kept(cfg: FakeConfig, tmp_path: Path, moment: str) -> None:
    """As on a GPU, where nobody asks at once; the checkpoint before it stays."""
    run = toy(changed(cfg, run={"save_interval": 1, "log_interval": 1 if moment == "record" else 10}))
    with Session(run, "toy", tmp_path) as session:
        session.guard.at_once = False
        session.save()
        at, group = next(session.steps(0))
        losses = Losses(torch.tensor(torch.nan), {"loss_sup": torch.tensor(torch.nan)})
        bad = session.watch(at, losses, group)
        assert bad == 1
        notices = {
            "record": lambda: session.record(0, losses, bad, 0.5),
            "save_or_stop": session.save_or_stop,
            "evaluation_due": lambda: session.evaluation_due(0),
            "end_epoch": lambda: session.end_epoch(0),
        }
        if moment != "record":
            session.record(0, losses, bad, 0.5)
        with pytest.raises(UserError, match=r"step 1: loss_sup is nan; images .*last\.pt"):
            notices[moment]()
    assert saved(tmp_path)["step"] == 0


# --- evaluation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "due"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3, 4]), (0, [4])])
def test_evaluations_are_due_every_so_often_and_at_the_end(
    cfg: FakeConfig, tmp_path: Path, every: int, due: list[int]
) -> None:
    run = toy(changed(cfg, optim={"epochs": 5}, eval={"every_epochs": every}))
    with Session(run, "toy", tmp_path) as session:
        assert [epoch for epoch in range(5) if session.evaluation_due(epoch)] == due


def test_the_best_candidate_is_kept(cfg: FakeConfig, tmp_path: Path) -> None:
    run = toy(cfg)
    with Session(run, "toy", tmp_path) as session:
        session.log.begin(0)
        run.step = 3
        assert session.note(0, evaluation(0.9), candidate=False) == ""
        assert (run.best, run.best_epoch, run.last) == (-1.0, 0, 0.9)
        assert not (tmp_path / "best.pt").exists()
        for epoch, (miou, best) in enumerate([(0.4, 40), (0.6, 60), (0.6, 60), (0.5, 60)], start=1):
            run.step += 3
            run.network.value.fill_(epoch)
            assert session.note(epoch, evaluation(miou), student=0.25) == f" (best {best}.00)"
    assert (run.best, run.best_epoch, run.last) == (0.6, 3, 0.5)
    state = saved(tmp_path, "best.pt")
    assert (state["miou"], state["step"], state["networks"]["student"]["value"]) == (0.6, 9, 2.0)
    assert "rng" not in state  # weights alone
    found = lines(tmp_path)
    assert found[0] == {"step": 3, "epoch": 0, "miou": 0.9, "miou_present": 1.0}
    assert found[-1] == {"step": 15, "epoch": 4, "miou": 0.5, "miou_present": 0.6, "student": 0.25}


def test_the_result_holds_the_common_fields_and_the_extra_ones(cfg: FakeConfig, tmp_path: Path) -> None:
    cfg = changed(cfg, expect={"miou": 70.0, "source": "Table 1"})
    run, said = toy(cfg, "unlabeled", step=9, best=0.6, best_epoch=2, last=0.4), []
    with Session(run, "toy", tmp_path) as session:
        session.guard.cancelled += 1
        session.log.info = said.append  # type: ignore[method-assign]
        report(
            session,
            method="m",
            network="branch1",
            best=evaluation(0.5),
            last=evaluation(0.25),
            extra={"epochs": {"3": 0.4}},
        )
        seconds = session.log.elapsed_s
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["miou"], result["miou_best"], result["miou_last"]) == (0.5, 0.5, 0.25)
    assert result["best"] == summary(evaluation(0.5), CLASSES)
    assert result["last"] == summary(evaluation(0.25), CLASSES)
    assert result["in_training"] == {"best": 0.6, "best_epoch": 2, "last": 0.4}
    assert (result["project"], result["method"], result["network"]) == ("toy", "m", "branch1")
    assert (result["split"], result["split_hash"]) == ("few", run.data.split.hash)
    assert (result["labeled"], result["unlabeled"]) == (6, 10)
    assert (result["steps"], result["skipped_steps"], result["skipped_files"]) == (9, 1.0, 0)
    assert (result["seed"], result["config_hash"]) == (2, config_hash(cfg))
    assert 0 <= result["seconds"] <= seconds
    assert result["protocol"]["kind"] == "whole_image"
    assert list(result)[-1] == "epochs"
    assert result["epochs"] == {"3": 0.4}
    assert said == [
        "val: mIoU best 50.00 last 25.00 (branch1, whole_image)",
        "published: 70.00 (Table 1)",
        f"result: {tmp_path / 'result.json'}",
    ]


def test_a_result_names_the_code_that_the_run_began_with(cfg: FakeConfig, tmp_path: Path) -> None:
    with Session(toy(cfg), "toy", tmp_path) as session:
        announce(session)
        noted = json.loads((tmp_path / "env.json").read_text())
        report(session, method="m", network="n", best=evaluation(0.5), last=evaluation(0.5))
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["code"], result["commit"]) == (noted["code"], noted["commit"])
    assert noted["world_size"] == 1


def test_only_the_first_process_writes(
    cfg: FakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "max_over_ranks", lambda value, dist: value)
    run = toy(cfg)
    run.dist = Dist(rank=1, world_size=2)
    with Session(run, "toy", tmp_path) as session:
        report(session, method="m", network="n", best=evaluation(0.5), last=evaluation(0.5))
        session.save_weights(tmp_path / "best.pt")
    assert not list(tmp_path.iterdir())


# --- the start -------------------------------------------------------------------------------------------------


def test_a_run_starts_from_its_checkpoint_from_weights_or_from_the_backbone(
    cfg: FakeConfig, tmp_path: Path
) -> None:
    def start(run_dir: Path, **values: Any) -> ToyRun:
        run = toy(changed(cfg, run=values))
        with Session(run, "toy", run_dir) as session:
            session.start()
        return run

    assert start(tmp_path / "new").calls == ["backbone"]
    train(changed(cfg, run={"max_steps": 4}), tmp_path / "old")
    old = str(tmp_path / "old" / "last.pt")
    run = start(tmp_path / "new", init=old)
    assert (run.calls, run.step, float(run.network.value)) == (["weights"], 0, 4.0)
    run = start(tmp_path / "new", resume=old)
    assert (run.calls, run.step, run.evaluated) == (["everything"], 4, 1)
    run = start(tmp_path / "old", init="never read")
    assert (run.calls, run.step, run.evaluated) == (["everything"], 4, 1)


def test_counters_come_back_and_messages_name_the_checkpoint(cfg: FakeConfig, tmp_path: Path) -> None:
    first = toy(cfg, step=4, evaluated=1, best=0.6, best_epoch=1, last=0.5)
    with Session(first, "toy", tmp_path) as session:
        session.save()
    run = toy(cfg)
    with Session(run, "toy", tmp_path) as session:
        session.start()
        assert session.guard.last_saved == tmp_path / "last.pt"
    for name in ("step", "evaluated", "best", "best_epoch", "last"):
        assert getattr(run, name) == getattr(first, name)


@pytest.mark.parametrize("key", ["init", "resume"])
def test_files_of_other_projects_are_refused(cfg: FakeConfig, tmp_path: Path, key: str) -> None:
    train(changed(cfg, run={"max_steps": 1}), tmp_path / "old")
    run = toy(changed(cfg, run={key: str(tmp_path / "old" / "last.pt")}))
    with Session(run, "other", tmp_path / "new") as session, pytest.raises(UserError, match="project 'toy'"):
        session.start()
    assert not run.calls


@pytest.mark.parametrize("others", [(), ("unlabeled",), ("u0", "u1")])
def test_the_start_names_places_arithmetic_and_deviations(
    cfg: FakeConfig, tmp_path: Path, others: tuple[str, ...]
) -> None:
    run, said, plain = toy(cfg, *others), [], []
    for heard, words in (
        (said, {"deviations": ["one", "two"], "notes": ["three"], "unsynchronized": True}),
        (plain, {}),
    ):
        with Session(run, "toy", tmp_path) as session:
            session.log.info = heard.append  # type: ignore[method-assign]
            announce(session, **words)
    counts = "6 labeled + 10 unlabeled images" if others else "6 labeled images"
    assert "dataset: " in said[0]
    assert said[1:] == [
        f"run directory: {tmp_path}",
        f"data: {Path(cfg.data.dataset).parent}",
        f"1 process(es) on cpu; batch 2 = 1 x 1 x 2; {counts} (few, {run.data.split.hash[:12]}); "
        "3 steps x 3 epochs = 9 steps",
        "BatchNorm statistics are those of each process (SyncBatchNorm needs GPUs)",
        "deviation from the paper: one",
        "deviation from the paper: two",
        "three",
    ]
    assert plain == said[:4]
    assert (tmp_path / "config.yaml").is_file()


def test_a_finished_run_says_so(cfg: FakeConfig, tmp_path: Path) -> None:
    train(cfg, tmp_path)
    assert "finished already" not in (tmp_path / "train.log").read_text()
    _, seen, finished = train(cfg, tmp_path)
    assert (seen, finished) == ([], [])
    assert "finished already (9 steps)" in (tmp_path / "train.log").read_text()


def test_a_session_that_cannot_open_its_log_closes_what_it_had_opened(
    cfg: FakeConfig, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    run, closed, before = toy(cfg), [], signal.getsignal(signal.SIGTERM)
    run.data.close = lambda: closed.append(True)  # type: ignore[method-assign]
    with pytest.raises(UserError, match="cannot be created"):
        Session(run, "toy", tmp_path / "file")
    assert closed == [True]
    assert signal.getsignal(signal.SIGTERM) == before


# --- a part of a larger run ------------------------------------------------------------------------------------


def test_another_process_may_begin_before_the_folder_is_made(cfg: FakeConfig, tmp_path: Path) -> None:
    run = toy(cfg)
    run.dist = Dist(rank=1)
    with Session(run, "toy", tmp_path / "later") as session:
        session.begin()
    assert not (tmp_path / "later").exists()


class PartRun(ToyRun):
    """Has no best weights, and a `last` of its own."""

    COUNTERS = ("evaluated",)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"last": {"loss": 0.5}}


def test_a_part_stops_at_the_request_of_the_whole(cfg: FakeConfig, tmp_path: Path) -> None:
    whole, before = StopRequest(), signal.getsignal(signal.SIGTERM)
    whole.requested, whole.signal = True, 15
    run = toy(cfg)
    with Session(run, "toy", tmp_path, request=whole, name="part") as session:
        assert signal.getsignal(signal.SIGTERM) == before
        session.start(Start("backbone"))
        session.begin()
        assert train_epoch(0, run, session, [])
    assert saved(tmp_path)["step"] == 1
    assert "part: stopped after step 1" in (tmp_path / "train.log").read_text()
    assert (tmp_path / "config.yaml").is_file()


def test_a_part_may_begin_elsewhere_and_count_otherwise(cfg: FakeConfig, tmp_path: Path) -> None:
    first = PartRun(cfg, Dist(), toy(cfg).data, number(), step=4, evaluated=1)
    with Session(first, "toy", tmp_path / "first") as session:
        session.save()
    state = saved(tmp_path / "first")
    assert (state["evaluated"], state["last"]) == (1, {"loss": 0.5})
    assert not {"best", "best_epoch"} & set(state)
    run = PartRun(cfg, Dist(), toy(cfg).data, number())
    with Session(run, "toy", tmp_path / "second") as session:
        session.start(Start("resume", tmp_path / "first" / "last.pt", state))
    assert (run.step, run.evaluated, run.last) == (4, 1, -1.0)


# --- the dry run -----------------------------------------------------------------------------------------------


def test_a_dry_run_steps_once_leaves_nothing_and_minds_no_signal(
    cfg: FakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run, seen = toy(changed(cfg, run={"log_interval": 1, "save_interval": 1, "on_nonfinite": "skip"})), []
    before = signal.getsignal(signal.SIGTERM)
    with Session(run, "toy", None) as session:
        assert signal.getsignal(signal.SIGTERM) == before
        assert train_epoch(0, run, session, seen)
        session.note(0, evaluation(0.5))
        assert session.guard.mode == "stop"
    assert [at.step for at, _ in seen] == [0]
    assert not list(tmp_path.iterdir())


def test_a_forecast_times_real_steps_however_short_the_epoch(cfg: FakeConfig) -> None:
    """One step an epoch: without going back the second call would find nothing to do."""
    run, seen = toy(changed(cfg, optim={"batch_size": 6}), step=2), []
    assert run.data.steps_per_epoch == 1
    with Session(run, "toy", None) as session:
        forecast(session, [lambda: train_epoch(2, run, session, seen)] * 3)
    assert [at.step for at, _ in seen] == [2, 2, 2]


def test_a_forecast_counts_the_images_of_all_loaders(
    cfg: FakeConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, called = toy(changed(cfg, optim={"epochs": 33}), "u0", "u1"), []
    with Session(run, "toy", None, name="toys") as session:
        times = iter(
            (0.0, 9.0, 10.0, 12.0, 20.0, 23.0)
        )  # the first step does not count; then 2 and 3 seconds
        with monkeypatch.context() as patched:
            patched.setattr(training.time, "perf_counter", lambda: next(times))
            forecast(session, [lambda: called.append(1)] * 3)
    line = capsys.readouterr().out
    assert len(called) == 3
    assert re.match(
        r"dry run of toys: peak memory \d+\.\d\d GiB per process, 2000 ms per step, 3\.0 images/s, "
        r"about 3m18 for 99 steps",
        line,
    ), line


def test_a_forecast_without_enough_memory_is_one_line(cfg: FakeConfig) -> None:
    def too_much() -> None:
        raise torch.OutOfMemoryError("too large")

    message = r"optim\.device_batch=2: the device's memory is too small"
    with Session(toy(cfg), "toy", None) as session, pytest.raises(UserError, match=message):
        forecast(session, [too_much])
