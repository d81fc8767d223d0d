"""A run that is stopped and resumed, anywhere and in any way, is the run that was never stopped, bit for bit."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from common.config import load_config
from common.data.loaders import Key, Sample, SegmentationDataset
from common.distributed import Dist
from common.mean_teacher import evaluation
from common.mean_teacher.networks import StudentTeacher
from projects.u2pl import train
from projects.u2pl.config import Config
from tests.runs import (
    NOT_OF_THE_RUN,
    SEVERAL_RUNS,
    Runs,
    assert_same_run,
    differences,
    give_settings_back,
    launch,
    launch_script,
    lines,
    saved,
    two_processes_are_refused,
    write_lists,
)
from tools.ports import free_port

BOUNDARY = 4  # steps of an epoch; the burn-in is the first one


_same_process_settings = pytest.fixture(autouse=True)(give_settings_back)
go = Runs(train.main)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few images of the embedded dataset: 4 labeled, 8 unlabeled, 4 to evaluate."""
    return write_lists(tmp_path_factory.mktemp("split"), 4, 8)


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 labeled and 16 unlabeled images, 4 to evaluate: the AEL variant takes 4 at once."""
    return write_lists(tmp_path_factory.mktemp("larger"), 6, 16)


def write(path: Path, split: Path, **sections: Mapping[str, Any]) -> Path:
    """A configuration of 3 epochs of 4 steps; sections add to it."""
    val = str(split / "val.txt")
    tree: dict[str, Any] = {
        "data": {"dataset": "shapes", "split": str(split), "val": val, "crop_size": [33, 33], "workers": 0},
        "optim": {"lr": 0.002, "head_lr_factor": 10.0, "epochs": 3, "batch_size": 2},
        "model": {"backbone": "resnet_tiny", "width": 4, "inner_planes": 8, "dilations": [1, 2, 3],
                  "multi_grid": [1, 1, 1]},
        "method": {"num_queries": 8, "num_negatives": 4, "queue_size": 64, "queue_size_first": 128,
                   "low_entropy_threshold": 60.0, "current_class_threshold": 0.1},
        "eval": {"during_training": "whole_image", "list": val},
        "run": {"log_interval": 2, "deterministic": True, "channels_last": False, "panels": False, "device": "cpu"},
    }  # fmt: skip
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | dict(values)
    path.write_text(yaml.safe_dump(tree))
    return path


# --- one process -----------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "cutmix": {},
    "classmix, aux, ohem": {
        "model": {"aux_weight": 0.4},
        "method": {"strong_augmentation": "classmix", "criterion": "ohem", "ohem_min_kept": 500},
    },
    "averaged centres, own queues": {
        "method": {"anchor_ema": True, "negative_high_entropy": False},
        "quirks": {"own_label_negatives": False, "onehot_first_image": False, "slot_index": False},
    },
    "accumulation, adam": {"optim": {"batch_size": 4, "device_batch": 2, "optimizer": "adam", "lr": 0.001}},
    "supervised only": {"method": {"mode": "sup_only", "sup_only_order": "sampled"}},
}


def ael(
    start_epoch: int, batch: int = 4, device_batch: int = 4, burn_in: int = 0, **values: Any
) -> dict[str, Any]:
    """Sections of the AEL variant; an epoch of the larger split has 16 / `batch` steps."""
    chosen = {"start_epoch": start_epoch, "common_classes": [0], "momentum": 0.9, **values}
    return {
        "optim": {"batch_size": batch, "device_batch": device_batch},
        "method": {"sup_only_epochs": burn_in, "average_from_start": True, "ael": chosen},
        "quirks": {"shared_first_epoch": False},
    }


AEL = {
    "ael with contrast": ael(0),
    "ael, contrast begins": ael(1),
    "ael before the contrast": ael(2, no_pad=False, no_slim=False),
    "ael, burn-in, accumulation": ael(1, batch=8, burn_in=1, banks="shared", drop_low_entropy=False),
}


@pytest.fixture(params=[*VARIANTS, *AEL])
def variant(request, tmp_path: Path, split: Path, larger: Path) -> Path:
    if request.param in AEL:
        return with_sections(tmp_path / "c.yaml", larger, AEL[request.param])
    return write(tmp_path / "c.yaml", split, **VARIANTS[request.param])


def with_sections(path: Path, split: Path, sections: Mapping[str, Any]) -> Path:
    """As `write`; the optimizer's other values stay."""
    optim = {"lr": 0.002, "head_lr_factor": 10.0, "epochs": 4} | sections["optim"]
    return write(path, split, **(dict(sections) | {"optim": optim}))


def test_six_steps_are_three_and_three(variant: Path, tmp_path: Path) -> None:
    """The stop falls into an epoch and into a log interval; the burn-in ends on the way."""
    go(variant, tmp_path / "whole", 6)
    go(variant, tmp_path / "parts", 3)
    assert saved(tmp_path / "parts")["step"] == 3
    go(variant, tmp_path / "parts", 6)
    assert saved(tmp_path / "parts")["step"] == 6
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_the_compared_runs_use_everything(split: Path, tmp_path: Path) -> None:
    """The equality above would be cheap if queues, draws or the contrast were asleep."""
    go(write(tmp_path / "c.yaml", split), tmp_path / "run", 8)
    state, metrics = saved(tmp_path / "run"), lines(tmp_path / "run")
    assert state["method"]["queues.written"].sum() > 0
    late = [line for line in metrics if line["step"] > BOUNDARY and "loss" in line]
    assert all(line["loss_unsup"] > 0 for line in late)
    assert any(line["loss_contra"] > 0 for line in late)
    assert differences(state["networks"]["student"], state["networks"]["teacher"])


def test_the_compared_ael_runs_use_everything(larger: Path, tmp_path: Path) -> None:
    """Bank, class confidence, passes over the labeled list, contrast: everything that a resumed run has to keep."""
    go(with_sections(tmp_path / "c.yaml", larger, AEL["ael, contrast begins"]), tmp_path / "run", 6)
    state, metrics = saved(tmp_path / "run"), lines(tmp_path / "run")
    (own,) = state["own"]
    assert own["cutmix_bank"].any(dim=0).sum() >= 8
    assert torch.equal(own["cutmix_bank"], state["method"]["cutmix_bank"])
    assert state["method"]["queues.written"].sum() > 0
    assert "loss_contra" not in metrics[0]
    assert metrics[-1]["loss_contra"] > 0
    fresh = train.set_up(load_config(Config, tmp_path / "c.yaml"), Dist())
    assert (fresh.memory.class_confidence - own["class_confidence"]).abs().min() > 0
    assert differences(fresh.draws.state_dict(), state["draws"][0])


def test_ael_images_that_threads_decode_during_the_step_before_change_nothing(
    larger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_sections(tmp_path / "c.yaml", larger, AEL["ael, burn-in, accumulation"])
    go(config, tmp_path / "whole", 5)
    original, read_in = SegmentationDataset.__getitem__, {True: set(), False: set()}

    def read(self: SegmentationDataset, key: Key) -> Sample:
        if self.role == "second":
            read_in[threading.current_thread() is threading.main_thread()].add((key.epoch, key.slot))
        return original(self, key)

    monkeypatch.setattr(SegmentationDataset, "__getitem__", read)
    for steps in (2, 3, 5):
        go(config, tmp_path / "parts", steps, "data.workers=1")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", besides=("/config/data/workers",))
    forwards = {(epoch, slot // 2) for epoch, slot in read_in[True]}
    assert forwards == {(1, 0), (1, 2), (2, 0)}  # nothing is chosen before an epoch or a run
    used = {(epoch, slot) for epoch, slots in ((1, 8), (2, 4)) for slot in range(slots)}  # after the burn-in
    assert used <= read_in[True] | read_in[False]  # besides, the last step has begun with those of a next one


def test_stopping_after_every_step_to_the_end(split: Path, tmp_path: Path) -> None:
    """All twelve steps one by one, evaluations and the result included."""
    config = write(tmp_path / "c.yaml", split)
    go(config, tmp_path / "whole")
    for steps in range(1, 13):
        go(config, tmp_path / "parts", steps)
    assert not (tmp_path / "parts" / "result.json").exists()
    go(config, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", name="best.pt")
    results = [json.loads((tmp_path / d / "result.json").read_text()) for d in ("whole", "parts")]
    for result in results:
        del result["seconds"], result["peak_memory_bytes"]
    assert results[0] == results[1]


def test_a_run_repeats_itself(split: Path, tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", split)
    for name in "ab":
        go(config, tmp_path / name, 6)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    go(config, tmp_path / "c", 6, "run.seed=3")
    assert lines(tmp_path / "c") != lines(tmp_path / "a")


def test_measuring_pseudo_labels_changes_nothing_else(split: Path, tmp_path: Path) -> None:
    """Nor does a stop in between; the figures are the same then too."""
    config = write(tmp_path / "c.yaml", split)
    measure = "run.pseudo_images=4"
    go(config, tmp_path / "plain", 9)
    go(config, tmp_path / "whole", 9, measure)
    go(config, tmp_path / "parts", 7, measure)
    go(config, tmp_path / "parts", 9, measure)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    found = lines(tmp_path / "whole")
    figures = [line for line in found if "pseudo_kept" in line]
    assert [line["step"] for line in figures] == [8]
    assert [line for line in found if line not in figures] == lines(tmp_path / "plain")
    found = differences(saved(tmp_path / "plain"), saved(tmp_path / "whole"))
    assert not [path for path in found if not path.startswith(NOT_OF_THE_RUN)]


def test_statistics_are_shared_before_every_step(split: Path, tmp_path: Path, monkeypatch) -> None:
    """Processes with BatchNorm of their own begin every step, and every evaluation, with those of the first one."""
    calls: list[int] = []
    monkeypatch.setattr(StudentTeacher, "share_statistics", lambda nets, dist: calls.append(dist.rank))
    go(write(tmp_path / "c.yaml", split), tmp_path / "run", BOUNDARY + 2)
    assert len(calls) == BOUNDARY + 2 + 1


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_does_not_matter(split: Path, tmp_path: Path, workers: int) -> None:
    """Neither from the start nor for the rest of a run."""
    config = write(tmp_path / "c.yaml", split)
    go(config, tmp_path / "none", 6)
    go(config, tmp_path / "some", 3, f"data.workers={workers}")
    go(config, tmp_path / "some", 6)
    found = differences(saved(tmp_path / "none"), saved(tmp_path / "some"))
    assert not [path for path in found if not path.startswith((*NOT_OF_THE_RUN, "/config/data/workers"))]
    assert lines(tmp_path / "none") == lines(tmp_path / "some")


@pytest.mark.parametrize("source", ["folder", "file"])
def test_resume_from_another_directory(split: Path, tmp_path: Path, source: str) -> None:
    config = write(tmp_path / "c.yaml", split)
    go(config, tmp_path / "whole", 6)
    go(config, tmp_path / "first", 3)
    before = (tmp_path / "first" / "last.pt").read_bytes()
    path = tmp_path / "first" / ("last.pt" if source == "file" else "")
    go(config, tmp_path / "second", 6, f"run.resume={path}")
    assert_same_run(tmp_path / "whole", tmp_path / "second", after=3)
    assert (tmp_path / "first" / "last.pt").read_bytes() == before
    # the second directory now has a checkpoint of its own, which comes first
    go(config, tmp_path / "second", 8, f"run.resume={path}")
    go(config, tmp_path / "whole", 8)
    assert_same_run(tmp_path / "whole", tmp_path / "second", after=3)


def test_the_best_weights_come_along(split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also into another directory, for the result tells about the best weights of the whole run."""
    scores = {name: iter((0.1, 0.9, 0.5)) for name in ("whole", "parts")}  # the second epoch is the best
    config, name = write(tmp_path / "c.yaml", split), "whole"

    measure = evaluation.evaluate_network

    def in_training(cfg: Config, network: Any, spec: Any, images: str, how: Any, dist: Dist) -> Any:
        score = next(scores[name], None)
        if score is None:  # the script's figures at the end are measured
            return measure(cfg, network, spec, images, how, dist)
        return SimpleNamespace(miou=score, miou_present=score)

    monkeypatch.setattr(evaluation, "evaluate_network", in_training)
    go(config, tmp_path / "whole")
    name = "parts"
    go(config, tmp_path / "first", 9)
    go(config, tmp_path / "second", None, f"run.resume={tmp_path / 'first'}")
    assert_same_run(tmp_path / "whole", tmp_path / "second", after=9, name="best.pt")
    results = [json.loads((tmp_path / d / "result.json").read_text()) for d in ("whole", "second")]
    assert results[0]["in_training"] == results[1]["in_training"]
    assert results[0]["in_training"]["best_epoch"] == 2
    assert results[0]["best"] == results[1]["best"]
    assert saved(tmp_path / "second", "best.pt")["step"] == 8


def test_resume_in_a_fresh_process(split: Path, tmp_path: Path) -> None:
    """Through the real launcher, so that nothing can survive in memory."""
    config = write(tmp_path / "c.yaml", split)
    go(config, tmp_path / "whole", 6)
    go(config, tmp_path / "parts", 3)
    launch(
        1, "projects.u2pl.train", "--config", str(config), f"run.dir={tmp_path / 'parts'}", "run.max_steps=6"
    )
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


# --- what is refused -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, split: Path) -> Path:
    """A run of nine steps (so there is a best teacher) with its configuration beside it."""
    folder = tmp_path_factory.mktemp("stopped")
    go(write(folder / "c.yaml", split), folder / "run", 9)
    assert (folder / "run" / "best.pt").is_file()
    return folder


@pytest.fixture
def copied(stopped: Path, tmp_path: Path) -> Path:
    shutil.copytree(stopped, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lr=0.5", "optim.lr 0.002 -> 0.5"),
        ("method.temperature=0.7", "method.temperature 0.5 -> 0.7"),
        ("data.flip=false", "data.flip True -> False"),
        ("quirks.slot_index=false", "quirks.slot_index True -> False"),
        ("model.width=8", "model.width 4 -> 8"),
        ("run.seed=3", "run.seed 2 -> 3"),
    ],
)
def test_other_settings_are_refused_by_name(copied: Path, override: str, words: str) -> None:
    go.refused_by_name(copied, override, words)


@pytest.mark.parametrize(
    "override",
    [
        "run.log_interval=1",
        "run.save_interval=2",
        "eval.every_epochs=2",
        "expect.miou=50",
        "data.workers=1",
        "data.cache=true",
    ],
)
def test_settings_that_do_not_change_the_numbers_are_free(copied: Path, override: str) -> None:
    go(copied / "c.yaml", copied / "run", 10, override)
    assert saved(copied / "run")["step"] == 10


def test_weights_alone_cannot_be_resumed(copied: Path, tmp_path: Path) -> None:
    config, weights = copied / "c.yaml", copied / "run" / "best.pt"
    message = go.refused(config, tmp_path / "new", f"run.resume={weights}")
    assert message.startswith(f"{weights}: holds weights only; set run.init")
    go(config, tmp_path / "new", 1, f"run.init={weights}")


@pytest.mark.parametrize(
    "content", [{"conv1.weight": torch.zeros(1)}, {"project": "brpg", "config": {}, "optimizer": {}}]
)
@pytest.mark.parametrize("key", ["run.resume", "run.init"])
def test_foreign_files_are_refused(copied: Path, tmp_path: Path, key: str, content: dict[str, Any]) -> None:
    path = tmp_path / "foreign.pt"
    torch.save(content, path)
    assert go.refused(copied / "c.yaml", tmp_path / "new", f"{key}={path}").startswith(f"{path}: ")


def test_another_architecture_is_refused(copied: Path, tmp_path: Path, split: Path) -> None:
    other = write(
        tmp_path / "other.yaml", split, model={"backbone": "resnet_tiny", "width": 8, "inner_planes": 8}
    )
    message = go.refused(other, tmp_path / "new", f"run.init={copied / 'run' / 'best.pt'}")
    assert "best.pt: " in message
    assert "do not fit (file vs network): encoder." in message
    message = go.refused(other, tmp_path / "new", f"run.resume={copied / 'run'}")
    assert "model.width 4 -> 8" in message


def test_another_number_of_processes_is_refused(copied: Path) -> None:
    cfg = load_config(Config, copied / "c.yaml")
    two_processes_are_refused(train.set_up(cfg, Dist()), saved(copied / "run"))


def test_a_finished_run_is_only_evaluated_again(copied: Path) -> None:
    go.only_evaluated_again(copied, 12)


# --- two processes ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(split: Path, larger: Path, tmp_path: Path) -> None:
    """Eight steps and three plus five: plain, with what each process keeps on its own, and the AEL variant."""
    sections = {"plain": {}, "centres": VARIANTS["averaged centres, own queues"]}
    batch = {"optim": {"lr": 0.002, "epochs": 4, "batch_size": 4}}  # two steps an epoch and process
    configs = {name: write(tmp_path / f"{name}.yaml", split, **batch, **sections[name]) for name in sections}
    # two steps an epoch again; the stop is before the contrast, and after its begin
    variants = {"ael": ael(2, batch=8), "shared": ael(1, batch=8, banks="shared")}
    configs |= {
        name: with_sections(tmp_path / f"{name}.yaml", larger, values) for name, values in variants.items()
    }

    def words(name: str, run: str, steps: int) -> str:
        return "|".join(
            ["--config", str(configs[name]), f"run.dir={tmp_path / name / run}", f"run.max_steps={steps}"]
        )

    def all_runs(*runs: str) -> None:
        ports = " ".join(str(free_port()) for _ in runs)
        launch_script(tmp_path, SEVERAL_RUNS, *runs, TEST_PORTS=ports, TEST_PROGRAM="projects.u2pl.train")

    all_runs(*(words(name, run, steps) for name in configs for run, steps in (("whole", 8), ("parts", 3))))
    all_runs(*(words(name, "parts", 8) for name in configs))
    for name in configs:
        assert len(saved(tmp_path / name / "whole")["rng"]) == 2
        assert saved(tmp_path / name / "parts")["step"] == 8
        assert_same_run(tmp_path / name / "whole", tmp_path / name / "parts")
    for name in variants:
        state = saved(tmp_path / name / "parts")
        first, second = (own["cutmix_bank"] for own in state["own"])
        assert first.any()
        assert second.any()
        assert torch.equal(first, second) == (name == "shared")
        assert torch.equal(*(own["class_confidence"] for own in state["own"])) == (name == "shared")
        assert state["method"]["queues.written"].sum() > 0
