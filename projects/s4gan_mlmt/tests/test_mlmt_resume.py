"""A run of the image-level branch that is stopped and resumed is the run that was never stopped, bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from common.config import load_config
from common.distributed import Dist
from common.errors import UserError
from common.run.signals import StopRequest
from projects.s4gan_mlmt import train_mlmt
from projects.s4gan_mlmt.config import Config
from projects.s4gan_mlmt.mlmt import model
from projects.s4gan_mlmt.mlmt.train import BRANCH
from projects.s4gan_mlmt.mlmt.train import train as train_branch
from projects.s4gan_mlmt.tests.mlmt_toys import Toy, write_config, write_voc
from tests.runs import SEVERAL_RUNS, assert_same_run, differences, launch_script, lines, saved
from tools.ports import free_port

EPOCH = 3  # steps
FILES = [
    f"output_{name}_{kind}_{n}.txt" for name in ("val", "ema") for kind in ("raw", "bin") for n in (2, 3)
]


@pytest.fixture(autouse=True)
def _same_process_settings() -> Iterator[None]:
    """Runs in this process switch deterministic algorithms on; give them back."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_voc(tmp_path_factory.mktemp("data") / "voc", label_files=True)


def go(config: Path, run_dir: Path, steps: int | None = None, *overrides: str) -> None:
    """One run in this process up to `steps`, with whatever the generators happen to hold before."""
    random.seed(os.urandom(8))
    np.random.seed(int.from_bytes(os.urandom(3), "big"))  # noqa: NPY002
    torch.seed()
    limit = [] if steps is None else [f"run.max_steps={steps}"]
    assert train_mlmt.main(["--config", str(config), f"run.dir={run_dir}", *limit, *overrides]) == 0


def texts(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(run_dir.glob("output_*.txt"))}


# --- one process -----------------------------------------------------------------------------------------------


def test_stops_anywhere(voc: Path, tmp_path: Path) -> None:
    """In an epoch and a log interval, at its end, in the next one; the whole state, metrics and files."""
    config = write_config(tmp_path / "c.yaml", voc)
    go(config, tmp_path / "whole")
    for steps in (1, 2, EPOCH, EPOCH + 1, 2 * EPOCH, 3 * EPOCH - 1, 3 * EPOCH):
        go(config, tmp_path / "parts", steps)
        assert saved(tmp_path / "parts")["step"] == steps
    assert not (tmp_path / "parts" / "result.json").exists()
    go(config, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert sorted(texts(tmp_path / "whole")) == sorted(FILES)
    assert texts(tmp_path / "whole") == texts(tmp_path / "parts")
    results = [json.loads((tmp_path / d / "result.json").read_text()) for d in ("whole", "parts")]
    for result in results:
        del result["seconds"]
    assert results[0] == results[1]
    assert results[0]["scores"] == "output_ema_raw_3.txt"


def test_the_compared_state_holds_everything(voc: Path, tmp_path: Path) -> None:
    """The equality above would be cheap if momentum, average, statistics or sums were asleep."""
    config = write_config(tmp_path / "c.yaml", voc)
    states = []
    for steps in (4, 5):
        go(config, tmp_path / "run", steps)
        states.append(saved(tmp_path / "run"))
    changes = differences(*states)
    for path in (
        "/networks/student/fc.weight", "/networks/student/bn1.running_mean", "/networks/teacher/fc.weight",
        "/networks/teacher/bn1.running_mean", "/optimizer/state/0/momentum_buffer", "/sums/0",
    ):  # fmt: skip
        assert path in changes
    assert states[1]["networks"]["teacher"]["bn1.num_batches_tracked"] == 10


@pytest.mark.parametrize(
    "sections",
    [
        {"mlmt": {"labels": "files", "labeled_batch": 1, "unlabeled_batch": 2, "copy_teacher": True}},
        {"run": {"on_nonfinite": "skip", "channels_last": True}, "mlmt": {"flat_roll": False}},
    ],
    ids=["files, several passes", "skip, channels last"],
)
def test_variants_resume(voc: Path, tmp_path: Path, sections: dict) -> None:
    config = write_config(tmp_path / "c.yaml", voc, **sections)
    go(config, tmp_path / "whole", 5)
    for steps in (2, 5):
        go(config, tmp_path / "parts", steps)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_files_and_masks_train_the_same(voc: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", voc)
    for labels in ("masks", "files"):
        go(config, tmp_path / labels, None, f"mlmt.labels={labels}")
    assert_same_run(tmp_path / "masks", tmp_path / "files", besides=("/config/mlmt/labels",))
    assert texts(tmp_path / "masks") == texts(tmp_path / "files")


def test_workers_do_not_matter(voc: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", voc)
    go(config, tmp_path / "none", 5)
    go(config, tmp_path / "some", 2, "mlmt.workers=1")
    go(config, tmp_path / "some", 5)
    assert_same_run(tmp_path / "none", tmp_path / "some", besides=("/config/mlmt/workers",))


def test_a_killed_run_goes_on_from_its_last_save(voc: Path, tmp_path: Path) -> None:
    """Lines of the log and files after the save are written again, not twice."""
    config = write_config(tmp_path / "c.yaml", voc, run={"save_interval": 2})
    go(config, tmp_path / "whole")
    go(config, tmp_path / "killed", 5)
    shutil.copy(tmp_path / "killed" / "last.prev.pt", tmp_path / "killed" / "last.pt")
    go(config, tmp_path / "killed")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert texts(tmp_path / "whole") == texts(tmp_path / "killed")


def test_a_stop_request_saves_and_returns_nothing(voc: Path, tmp_path: Path) -> None:
    cfg = load_config(Config, write_config(tmp_path / "c.yaml", voc))
    request = StopRequest()
    request.requested, request.signal = True, 15
    assert train_branch(cfg, tmp_path / "run", Dist(), request) is None
    assert saved(tmp_path / "run")["step"] == 1
    path = train_branch(cfg, tmp_path / "run", Dist(), StopRequest())
    assert path == tmp_path / "run" / "output_ema_raw_3.txt"


def test_a_finished_run_is_left_alone_but_scores_another_list(voc: Path, tmp_path: Path) -> None:
    config, run = write_config(tmp_path / "c.yaml", voc), tmp_path / "run"
    go(config, run)
    before, files, metrics = (run / "last.pt").read_bytes(), texts(run), lines(run)
    go(config, run)
    assert (run / "last.pt").read_bytes() == before
    assert (texts(run), lines(run)) == (files, metrics)
    (run / "output_ema_raw_3.txt").unlink()
    go(config, run)
    assert texts(run) == files
    some = tmp_path / "some.txt"
    some.write_text("p010\np011\n")
    go(config, run, None, f"eval.list={some}")
    shorter = texts(run)["output_ema_raw_3.txt"].splitlines()
    assert shorter == files["output_ema_raw_3.txt"].splitlines()[:2]


# --- as part of a run of both branches -------------------------------------------------------------------------


def test_resume_and_init_concern_the_right_branch(voc: Path, tmp_path: Path) -> None:
    """The folder that `run.resume` names is the whole run's; the branch continues what lies in its `mlmt`."""
    config = write_config(tmp_path / "c.yaml", voc)
    cfg = load_config(Config, config)
    train_branch(cfg, tmp_path / "whole", Dist(), StopRequest())
    first = load_config(Config, config, ["run.max_steps=4"])
    assert train_branch(first, tmp_path / "first" / BRANCH, Dist(), StopRequest()) is None
    second = load_config(Config, config, [f"run.resume={tmp_path / 'first'}"])
    train_branch(second, tmp_path / "second" / BRANCH, Dist(), StopRequest())
    assert_same_run(tmp_path / "whole", tmp_path / "second" / BRANCH, after=4)
    (tmp_path / "segmentation").mkdir()
    third = load_config(Config, config, [f"run.resume={tmp_path / 'segmentation'}", "run.init=absent.pt"])
    train_branch(third, tmp_path / "third", Dist(), StopRequest())
    assert_same_run(tmp_path / "whole", tmp_path / "third")


def test_alone_weights_may_start_another_run(voc: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", voc)
    go(config, tmp_path / "first", 4)
    go(config, tmp_path / "second", 1, f"run.init={tmp_path / 'first' / 'last.pt'}", "mlmt.lr=1e-12")
    one, two = (saved(tmp_path / name)["networks"]["student"]["fc.weight"] for name in ("first", "second"))
    torch.testing.assert_close(one, two)


# --- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("mlmt.lr=0.5", "mlmt.lr 0.02 -> 0.5"),
        ("mlmt.unlabeled_batch=2", "mlmt.unlabeled_batch 3 -> 2"),
        ("mlmt.ema_decay=0.5", "mlmt.ema_decay 0.999 -> 0.5"),
        ("data.labeled_ratio=0.4", "data.labeled_ratio 0.5 -> 0.4"),
        ("run.seed=7", "run.seed 2 -> 7"),
    ],
)
def test_other_settings_are_refused_by_name(voc: Path, tmp_path: Path, override: str, words: str) -> None:
    config = write_config(tmp_path / "c.yaml", voc)
    go(config, tmp_path / "run", 1)
    before = (tmp_path / "run" / "last.pt").read_bytes()
    with pytest.raises(UserError, match="made with other settings") as caught:
        go(config, tmp_path / "run", 2, override)
    assert words in str(caught.value)
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_settings_that_do_not_change_the_numbers_are_free(voc: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", voc)
    go(config, tmp_path / "run", 1)
    go(
        config,
        tmp_path / "run",
        2,
        "optim.lr=1",
        "mlmt.evaluation_epochs=1",
        "mlmt.val_batch=5",
        "run.log_interval=1",
    )
    assert saved(tmp_path / "run")["step"] == 2


def test_the_other_branchs_checkpoint_is_refused(voc: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", voc)
    go(config, tmp_path / "run", 1)
    state = saved(tmp_path / "run")
    del state["branch"]
    torch.save(state, tmp_path / "seg.pt")
    for key in ("resume", "init"):
        with pytest.raises(UserError, match=r"seg.pt: holds the segmentation branch"):
            go(config, tmp_path / key, 1, f"run.{key}={tmp_path / 'seg.pt'}")


def test_another_class_count_is_refused(voc: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", voc)
    go(config, tmp_path / "run", 1)
    overrides = [
        "data.dataset=shapes",
        "data.split=random_seed0/10",
        "data.root=null",
        "data.labeled_ratio=null",
    ]
    with pytest.raises(UserError, match=r"fc.weight \(21, \d+\) vs \(5, \d+\).*has 21 classes"):
        go(
            config,
            tmp_path / "new",
            1,
            *overrides,
            "data.split_file=null",
            f"run.init={tmp_path / 'run' / 'last.pt'}",
        )


def test_another_number_of_processes_is_refused(voc: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", voc)
    go(config, tmp_path / "run", 1)
    state = saved(tmp_path / "run")
    state["rng"], state["sums"] = state["rng"] * 2, state["sums"] * 2
    torch.save(state, tmp_path / "run" / "last.pt")
    with pytest.raises(UserError, match=r"written by 2 process\(es\), this run has 1"):
        go(config, tmp_path / "run", 2)


# --- two processes ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(voc: Path, tmp_path: Path) -> None:
    """Each with BatchNorm statistics of its own; the first one's are kept and evaluated."""
    config = write_config(tmp_path / "c.yaml", voc, mlmt={"unlabeled_batch": 4})

    def words(run: str, *more: str) -> str:
        return "|".join(["--config", str(config), f"run.dir={tmp_path / run}", *more])

    runs = [
        words("whole"),
        words("parts", "run.max_steps=4"),
        words("parts", "run.max_steps=5"),
        words("parts"),
    ]
    ports = " ".join(str(free_port()) for _ in runs)
    launch_script(
        tmp_path, SEVERAL_RUNS, *runs, TEST_PROGRAM="projects.s4gan_mlmt.train_mlmt", TEST_PORTS=ports
    )
    state = saved(tmp_path / "whole")
    assert len(state["rng"]) == len(state["sums"]) == 2
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert texts(tmp_path / "whole") == texts(tmp_path / "parts")


FROZEN = """
    import sys
    from common.errors import run_main
    from projects.s4gan_mlmt import train_mlmt
    from projects.s4gan_mlmt.mlmt import model
    from projects.s4gan_mlmt.tests.mlmt_toys import Toy

    def frozen(backbone, classes):
        return Toy(classes, frozen=True)

    def main(argv):
        model.MultiLabelClassifier = frozen
        return train_mlmt.main(argv)

    if __name__ == "__main__":
        run_main(main)
"""


@pytest.mark.slow
def test_two_processes_equal_one_where_batchnorm_is_frozen(
    voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same photos, draws and order, batches of 4 with short last ones; up to the order of float32 sums."""
    config = write_config(
        tmp_path / "c.yaml", voc, mlmt={"labeled_batch": 4, "unlabeled_batch": 4}, run={"log_interval": 1}
    )
    launch_script(tmp_path, FROZEN, "--config", str(config), f"run.dir={tmp_path / 'two'}")
    monkeypatch.setattr(model, "MultiLabelClassifier", lambda _, classes: Toy(classes, frozen=True))
    go(config, tmp_path / "one")
    one, two = (saved(tmp_path / name) for name in ("one", "two"))
    assert one["step"] == two["step"] == 6
    for role in ("student", "teacher"):
        torch.testing.assert_close(two["networks"][role], one["networks"][role], rtol=1e-4, atol=1e-6)
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), key
    for name, text in texts(tmp_path / "one").items():
        if "raw" in name:
            found, wanted = (
                np.array([line.split() for line in t.splitlines()], float)
                for t in (texts(tmp_path / "two")[name], text)
            )
            np.testing.assert_allclose(found, wanted, atol=1e-4)
