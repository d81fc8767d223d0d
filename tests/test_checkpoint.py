from __future__ import annotations

import contextlib
import logging
import os
import pickle
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from common.config import to_dict
from common.data.dataset_yaml import load_spec
from common.distributed import Dist
from common.errors import UserError
from common.run import checkpoint
from common.run.checkpoint import (
    bare_state_dict,
    config_differences,
    copy_best,
    describe,
    find_newest,
    kept_path,
    kept_weights,
    load,
    load_weights,
    previous_path,
    require_own,
    require_resumable,
    resolve_start,
    save,
)
from common.run.rng import capture_rng, restore_rng
from tests.fake_project import fake_checkpoint, fake_config


@pytest.fixture(autouse=True)
def messages_reach_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.LOG, "propagate", True)


def load_newest(folder: Path) -> dict | None:
    found = find_newest(folder)
    return None if found is None else found[0]


def in_child(work: Callable[[], None]) -> int:
    """Exit code of `work` in a forked process: 0, 1 for an exception, 2 for a `UserError`."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except UserError:
            code = 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def cut(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def test_round_trip_of_tensors_and_containers(tmp_path: Path) -> None:
    state = {
        "format": 1,
        "step": 7,
        "config": {"optim": {"lr": 0.1, "betas": [0.9, 0.99], "name": None}},
        "networks": {"student": {"w": torch.arange(6.0).view(2, 3)}},
        "rng": capture_rng(Dist()),
    }
    save(tmp_path / "last.pt", state)
    loaded = load(tmp_path / "last.pt")
    assert loaded["config"] == state["config"]
    torch.testing.assert_close(loaded["networks"]["student"]["w"], torch.arange(6.0).view(2, 3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt"]


def test_save_keeps_the_one_before_and_removes_stale_attempts(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    (tmp_path / ".last.pt.123.tmp").write_bytes(b"half")
    (tmp_path / ".best.pt.123.tmp").write_bytes(b"another checkpoint's")
    for step in (1, 2, 3):
        save(path, {"step": step})
    assert (load(path)["step"], load(previous_path(path))["step"]) == (3, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".best.pt.123.tmp", "last.prev.pt", "last.pt"]


def test_save_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, target: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2):
        save(tmp_path / "last.pt", {"step": step})
    assert load(tmp_path / "last.pt")["step"] == 2
    assert load(tmp_path / "last.prev.pt")["step"] == 1


@pytest.mark.parametrize("damage", [lambda path: cut(path, 0.5), flip_a_byte, lambda path: cut(path, 0.0)])
def test_damaged_newest_falls_back_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    path = tmp_path / "last.pt"
    for step in (1, 2):
        save(path, {"step": step, "w": torch.zeros(5000)})
    damage(path)
    with pytest.raises(UserError, match=r"last\.pt: damaged"):
        load(path)
    with caplog.at_level(logging.WARNING):
        state = load_newest(tmp_path)
    assert state is not None
    assert state["step"] == 1
    assert len(caplog.records) == 1
    assert "continuing from the one before it, last.prev.pt" in caplog.text
    # The damaged file must not push the good one out before the next one is complete.
    save(path, {"step": 3})
    assert load(path)["step"] == 3
    cut(previous_path(path), 0.3)
    cut(path, 0.5)
    with pytest.raises(UserError, match="no readable checkpoint is left"):
        load_newest(tmp_path)


def test_load_newest_of_a_new_directory_is_none(tmp_path: Path) -> None:
    assert load_newest(tmp_path) is None


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_foreign_objects_are_never_loaded(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(marker),)

    torch.save({"x": Bomb()}, tmp_path / "new.pt")
    torch.save({"x": Bomb()}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps({"x": Bomb()}))
    for name in ("new.pt", "old.pt", "bare.pt"):
        with pytest.raises(UserError, match=rf"{name}: "):
            load(tmp_path / name)
    assert not marker.exists()


def test_older_torch_format_and_other_contents(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert load(tmp_path / "old.pth")["w"].tolist() == [1, 1]
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="holds a list, not a dictionary"):
        load(tmp_path / "list.pt")
    with pytest.raises(UserError, match="no such checkpoint"):
        load(tmp_path / "absent.pt")


def test_kill_9_at_random_moments_leaves_a_readable_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    padding = torch.zeros(300_000)
    draw = random.Random(0)
    newest = 0
    for kills in range(500):  # on a busy machine many children die before their first save
        if kills >= 12 and newest > 12:
            break
        child = os.fork()
        if child == 0:
            try:
                for step in range(newest + 1, newest + 10_000):
                    save(path, {"step": step, "twice": torch.tensor(2 * step), "padding": padding})
            finally:
                os._exit(1)
        time.sleep(0.02 + 0.15 * draw.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        state = load_newest(tmp_path)
        if state is None:
            assert not path.exists()
            continue
        assert state["twice"] == 2 * state["step"]
        assert state["step"] >= newest
        newest = state["step"]
    assert newest > 12, "the processes were killed before they could save at all"
    save(path, {"step": newest + 1})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.prev.pt", "last.pt"]


def test_kill_between_any_two_renames_leaves_a_readable_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file operation of a save is made the last one in turn."""

    class Killed(BaseException):
        pass

    def run(stop_at: int) -> int:
        calls = 0

        def counted(original: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **keywords: object) -> object:
                nonlocal calls
                calls += 1
                if calls > stop_at:
                    raise Killed
                return original(*arguments, **keywords)

            return call

        folder = tmp_path / str(stop_at)
        save(folder / "last.pt", {"step": 1})
        save(folder / "last.pt", {"step": 2})
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", counted(Path.replace))
            patch.setattr(os, "link", counted(os.link))
            patch.setattr(os, "fsync", counted(os.fsync))
            with contextlib.suppress(Killed):
                save(folder / "last.pt", {"step": 3})
        state = load_newest(folder)
        assert state is not None
        assert state["step"] in (2, 3)
        return calls

    stop_at = 0
    while run(stop_at) > stop_at:
        stop_at += 1
    assert stop_at >= 5  # fsync, link, two renames, fsync of the folder


def test_full_disk_keeps_the_checkpoints_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    for step in (1, 2):
        save(path, {"step": step})
    big = {"step": 3, "w": torch.zeros(100_000)}
    message = tmp_path / "message"

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            save(path, big)
        except UserError as error:
            message.write_text(str(error))
            raise

    assert in_child(work) == 2
    assert "last.pt: cannot be written (" in message.read_text()
    assert "the checkpoint before it is intact; free space" in message.read_text()
    assert (load(path)["step"], load(previous_path(path))["step"]) == (2, 1)
    assert not list(tmp_path.glob(".*.tmp"))


def test_unwritable_directory_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"file/last\.pt: cannot be written"):
        save(tmp_path / "file" / "last.pt", {"step": 1})


def draws() -> list[object]:
    return [
        random.gauss(0, 1),
        random.random(),
        np.random.standard_normal(3).tolist(),  # noqa: NPY002
        np.random.rand(3).tolist(),  # noqa: NPY002
        torch.rand(3).tolist(),
        torch.randperm(10).tolist(),
    ]


def test_random_states_survive_a_file(tmp_path: Path) -> None:
    random.gauss(0, 1)  # leaves a second value pending, which is part of the state
    np.random.standard_normal(1)  # noqa: NPY002
    save(tmp_path / "last.pt", {"rng": capture_rng(Dist())})
    expected = draws()
    assert draws() != expected
    restore_rng(load(tmp_path / "last.pt")["rng"], Dist())
    assert draws() == expected


def test_random_states_of_another_world_size_are_refused() -> None:
    states = capture_rng(Dist())
    with pytest.raises(UserError, match=r"written by 1 process\(es\), this run has 2; resume with 1"):
        restore_rng(states, Dist(rank=1, world_size=2))


class Net(nn.Module):
    def __init__(self, classes: int = 3, width: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))
        self.head = nn.Conv2d(width, classes, 1)


def test_load_weights_through_wrappers() -> None:
    source, target = Net(), Net()
    wrapped = torch.compile(source)  # the wrapper alone; nothing is compiled before a call
    assert list(bare_state_dict(wrapped)) == list(source.state_dict())
    load_weights(target, wrapped.state_dict(), "here")
    torch.testing.assert_close(target.state_dict(), source.state_dict(), rtol=0, atol=0)
    partly = Net()
    partly.encoder = torch.compile(partly.encoder)  # type: ignore[assignment]
    assert list(bare_state_dict(partly)) == list(source.state_dict())
    ddp_file = {f"module.{key}": value for key, value in source.state_dict().items()}
    load_weights(partly, ddp_file, "here")
    torch.testing.assert_close(bare_state_dict(partly), dict(source.state_dict()), rtol=0, atol=0)


def test_load_weights_names_another_class_count_and_changes_nothing() -> None:
    target = Net(classes=21)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_weights(target, Net(classes=19).state_dict(), "run.init=ckpt.pth")
    assert str(caught.value) == (
        "run.init=ckpt.pth: 2 tensors of 9 do not fit (file vs network): head.weight (19, 4, 1, 1) vs (21, 4, 1, 1), "
        "head.bias (19,) vs (21,); it has 19 classes: choose a dataset with as many, or load the backbone only"
    )
    torch.testing.assert_close(dict(target.state_dict()), before, rtol=0, atol=0)


def test_load_weights_names_another_architecture() -> None:
    state = Net(width=8).state_dict()
    del state["encoder.1.running_mean"]
    state["decoder.weight"] = torch.zeros(1)
    with pytest.raises(UserError) as caught:
        load_weights(Net(), state, "run.init=ckpt.pth")
    assert str(caught.value) == (
        "run.init=ckpt.pth: 6 tensors of 9 do not fit (file vs network): "
        "encoder.0.weight (8, 3, 3, 3) vs (4, 3, 3, 3), encoder.0.bias (8,) vs (4,), "
        "encoder.1.weight (8,) vs (4,), ...; 1 of 9 tensors are not in the file: encoder.1.running_mean; "
        "1 are unknown to the network: decoder.weight; use the model settings (backbone, stem, widths) it was made with"
    )


def test_start_up_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="semiseg")
    own, other = tmp_path / "own", tmp_path / "other"
    save(other / "last.pt", {"step": 20})
    init = tmp_path / "init.pt"
    save(init, {"step": 30})
    fresh = resolve_start(own, None, None)
    weights = resolve_start(own, None, init)
    resumed = resolve_start(own, str(other), init)
    save(own / "last.pt", {"step": 10})
    continued = resolve_start(own, str(other), init)
    starts = (fresh, weights, resumed, continued)
    assert [start.kind for start in starts] == ["backbone", "init", "resume", "own"]
    assert [start.state and start.state["step"] for start in starts] == [None, 30, 20, 10]
    assert [start.continues for start in starts] == [False, False, True, True]
    assert [record.getMessage() for record in caplog.records] == [
        "start: backbone weights, step 0",
        f"start: run.init={init} (weights only)",
        f"start: run.resume={other / 'last.pt'} (step 20)",
        f"start: own last checkpoint {own / 'last.pt'} (step 10)",
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"run\.resume=.*holds no last\.pt"):
        resolve_start(None, tmp_path / "empty", None)


def test_config_differences() -> None:
    saved = {"optim": {"lr": 0.1, "betas": [0.9, 0.99]}, "run": {"dir": "a"}, "old": 1, "quirks": {}}
    current = {"optim": {"lr": 0.2, "betas": (0.9, 0.99)}, "run": {"dir": "b"}, "quirks": {}}
    assert config_differences(saved, current, ()) == {
        "optim.lr": (0.1, 0.2),
        "run.dir": ("a", "b"),
        "old": (1, None),
    }
    assert config_differences(saved, current, ("run.*", "optim.lr")) == {"old": (1, None)}
    assert not config_differences(saved, current, ("run.*", "optim.lr", "old"))
    for allowed in (("run.*", "!run.dir"), ("!run.dir", "run.*")):
        assert list(config_differences(saved, current, allowed)) == ["optim.lr", "run.dir", "old"]


# what a checkpoint says about itself


def test_a_description_is_enough_to_build_and_to_colour(tmp_path: Path) -> None:
    cfg, spec = fake_config(Path("nowhere")), load_spec("shapes")
    weights = {"student": {"a": torch.ones(2)}}
    path = tmp_path / "a.pt"
    save(path, describe("fake", cfg, spec, 7, weights))
    saved = load(path)
    assert (saved["project"], saved["step"], saved["format"]) == ("fake", 7, checkpoint.FORMAT)
    assert saved["config"] == to_dict(cfg)
    assert saved["classes"] == list(spec.classes)
    assert saved["palette"] == np.asarray(spec.palette).tolist()
    assert torch.equal(saved["networks"]["student"]["a"], torch.ones(2))


def test_only_own_checkpoints_are_taken() -> None:
    require_own({"project": "fake"}, "fake", "a.pt")
    with pytest.raises(
        UserError, match=r"a\.pt: made by project 'other'; give a checkpoint of fake, or convert"
    ):
        require_own({"project": "other"}, "fake", "a.pt")
    with pytest.raises(UserError, match="made by project 'unknown'"):
        require_own({}, "fake", "a.pt")


def test_only_the_whole_state_of_the_same_run_is_continued() -> None:
    cfg = fake_config(Path("nowhere"))
    weights = fake_checkpoint(cfg, load_spec("shapes"))
    whole = weights | {"rng": []}
    require_resumable(whole, "fake", cfg, "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: holds weights only; set run\.init"):
        require_resumable(weights, "fake", cfg, "a.pt")
    with pytest.raises(UserError, match="made by project 'fake'; give a checkpoint of other"):
        require_resumable(whole, "other", cfg, "a.pt")
    free = {
        "run": {"log_interval": 3, "save_interval": 5},
        "eval": {"every_epochs": 2},
        "data": {"workers": 1},
    }
    require_resumable(whole, "fake", fake_config(Path("nowhere"), **free), "a.pt")
    for section, key, value in (("run", "seed", 3), ("optim", "lr", 0.5), ("data", "flip", False)):
        other = fake_config(Path("nowhere"), **{section: {key: value}})
        with pytest.raises(UserError, match=rf"a\.pt: made with other settings: {section}\.{key} "):
            require_resumable(whole, "fake", other, "a.pt")
        require_resumable(whole, "fake", other, "a.pt", (f"{section}.{key}",))
    two = fake_config(Path("nowhere"), optim={"lr": 0.5}, data={"flip": False})
    with pytest.raises(UserError, match=r"data\.flip True -> False, optim\.lr \S+ -> 0\.5"):
        require_resumable(whole, "fake", two, "a.pt")


def test_of_the_run_section_only_the_seed_must_stay() -> None:
    cfg = fake_config(Path("nowhere"))
    saved = fake_checkpoint(cfg, load_spec("shapes")) | {"rng": []}
    run = {**saved["config"]["run"], "speed": "fast"} | dict.fromkeys(saved["config"]["run"])
    run["seed"] = saved["config"]["run"]["seed"]
    require_resumable({**saved, "config": {**saved["config"], "run": run}}, "fake", cfg, "a.pt")
    run["seed"] += 1
    with pytest.raises(UserError, match=r"made with other settings: run\.seed 3 -> 2; restore"):
        require_resumable({**saved, "config": {**saved["config"], "run": run}}, "fake", cfg, "a.pt")


def test_best_weights_come_along_once_and_never_replace_own_ones(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    new.mkdir()
    copy_best(None, new, Dist())
    copy_best(old / "last.pt", new, Dist())
    assert not list(new.iterdir())
    save(old / "best.pt", {"miou": 0.5})
    copy_best(old / "last.pt", new, Dist(rank=1, world_size=2))
    assert not list(new.iterdir())
    copy_best(old / "last.pt", new, Dist())
    assert load(new / "best.pt") == {"miou": 0.5}
    save(old / "best.pt", {"miou": 0.6})
    copy_best(old / "last.pt", new, Dist())
    assert load(new / "best.pt") == {"miou": 0.5}


def test_the_file_that_was_read_is_named(tmp_path: Path) -> None:
    assert find_newest(tmp_path, "epoch-3") is None
    path = tmp_path / "epoch-3.pt"
    save(path, {"step": 1})
    assert find_newest(tmp_path, "epoch-3") == ({"step": 1}, path)
    save(path, {"step": 2})
    path.write_bytes(b"damaged")
    assert find_newest(tmp_path, "epoch-3") == ({"step": 1}, previous_path(path))


def test_kept_weights_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    assert kept_weights(tmp_path, "epoch") == {}
    for number in (10, 2, 2):
        save(kept_path(tmp_path, "epoch", number), {"number": number})
    save(kept_path(tmp_path, "step", 7), {"number": 7})
    (tmp_path / "weights" / "epoch_last.pt").touch()
    found = kept_weights(tmp_path, "epoch")  # not the file before the second 2
    assert list(found) == ["epoch_2", "epoch_10"]
    assert [load(path)["number"] for path in found.values()] == [2, 10]
    assert list(kept_weights(tmp_path, "step")) == ["step_7"]
