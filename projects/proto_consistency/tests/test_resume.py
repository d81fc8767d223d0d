"""A run that is stopped and resumed, in any phase, is the run that was never stopped, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from common.config import load_config
from common.data.dataset_yaml import load_spec
from common.distributed import Dist
from projects.proto_consistency import train
from projects.proto_consistency.config import Config
from projects.proto_consistency.initial import read_prototypes, save_prototypes
from projects.proto_consistency.state import PROTOTYPES
from projects.proto_consistency.tests.test_readme import OPEN_POINTS
from tests.runs import (
    NOT_OF_THE_RUN,
    SEVERAL_RUNS,
    Runs,
    assert_same_run,
    differences,
    give_settings_back,
    launch_script,
    lines,
    saved,
    two_processes_are_refused,
    write_lists,
)
from tools.ports import free_port

# two points have no switch, the third is about another run
NOT_SAID = ("exactly at the threshold", "only well classified pixels move prototypes", "the stage before")
# epochs of two steps: supervised 1-2, the teacher as the student 3-4, averaged from step 5 on
SEMI, AVERAGED, STEPS = 2, 4, 7


_same_process_settings = pytest.fixture(autouse=True)(give_settings_back)
go = Runs(train.main)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few images of the embedded dataset, and a file of prototypes: 3 labeled, 8 unlabeled, 4 to evaluate."""
    folder = write_lists(tmp_path_factory.mktemp("split"), 3, 8)
    prototypes = torch.randn(10, 16, generator=torch.Generator().manual_seed(1))
    save_prototypes(folder / "prototypes.npz", prototypes, load_spec("shapes").classes, {})
    return folder


def write(path: Path, split: Path, **sections: Mapping[str, Any]) -> Path:
    """A configuration of 4 epochs of 2 steps; sections add to it, `proto` to `method.proto`."""
    val = str(split / "val.txt")
    proto: dict[str, Any] = {"per_class": 2, "granularity": 8, "source": "file", "pixels_per_image": 64,
                             "init_path": str(split / "prototypes.npz")}  # fmt: skip
    tree: dict[str, Any] = {
        "data": {"dataset": "shapes", "split": str(split), "val": val, "crop_size": [33, 33], "workers": 0},
        "optim": {"lr": 0.002, "head_lr_factor": 10.0, "epochs": 4, "batch_size": 4},
        "model": {"backbone": "resnet_tiny", "width": 4, "inner_planes": 8, "dilations": [1, 2, 3],
                  "multi_grid": [1, 1, 1]},
        "method": {"confid_thresh": 0.21, "ohem_min_kept": 500, "proto": proto | dict(sections.pop("proto", {}))},
        "eval": {"during_training": "whole_image", "list": val, "head": "both", "every_epochs": 2},
        "run": {"log_interval": 3, "deterministic": True, "channels_last": False, "panels": False, "device": "cpu"},
    }  # fmt: skip
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | dict(values)
    path.write_text(yaml.safe_dump(tree))
    return path


# --- one process -----------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "published": {},
    "clustered, every other switch": {
        "model": {"aux_weight": 0.4},
        "method": {"select": "entropy", "norm": "u2pl", "strong_augmentation": "classmix", "criterion": "ce",
                   "teacher_copy": "once", "average_from_start": True,
                   "proto": {"per_class": 2, "granularity": 8, "source": "warmup_end", "pixels_per_image": 64,
                             "sync": "gather", "update_source": "teacher", "teacher_proto": "copy",
                             "select": "none"}},
        "quirks": {"border_never_sampled": False, "one_mask": False, "raw_update": False,
                   "own_teacher_statistics": False},
    },
    "random, accumulation, adam": {
        "optim": {"device_batch": 2, "optimizer": "adam", "lr": 0.001},
        "proto": {"source": "random"},
    },
    "mean teacher": {"method": {"proto": None}, "eval": {"head": "linear"}},
    "supervised only": {"method": {"mode": "sup_only", "sup_only_order": "sampled"}, "eval": {"head": "linear"},
                        "optim": {"epochs": 8, "batch_size": 3}},
}  # fmt: skip


def sections_of(name: str) -> dict[str, dict[str, Any]]:
    """Sections of a variant on top of what `write` has."""
    found = {key: dict(value) for key, value in VARIANTS[name].items()}
    if "optim" in found:
        found["optim"] = {"lr": 0.002, "head_lr_factor": 10.0, "epochs": 4, "batch_size": 4} | found["optim"]
    if "eval" in found:
        found["eval"] = {"during_training": "whole_image", "every_epochs": 2} | found["eval"]
    return found


@pytest.fixture(scope="module", params=VARIANTS)
def whole(request, tmp_path_factory: pytest.TempPathFactory, split: Path) -> Path:
    """A folder with a configuration and the run of seven steps that never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    go(write(folder / "c.yaml", split, **sections_of(request.param)), folder / "run", STEPS)
    return folder


@pytest.mark.parametrize("stop", [SEMI, SEMI + 1, AVERAGED + 1], ids=lambda n: f"after step {n}")
def test_a_stop_in_any_phase_changes_nothing(whole: Path, tmp_path: Path, stop: int) -> None:
    """The clustering itself comes after the stop at step 2, and before the one at step 3."""
    go(whole / "c.yaml", tmp_path / "parts", stop)
    assert saved(tmp_path / "parts")["step"] == stop
    go(whole / "c.yaml", tmp_path / "parts", STEPS)
    assert_same_run(whole / "run", tmp_path / "parts")


def test_the_compared_runs_use_everything(split: Path, tmp_path: Path) -> None:
    """The equality above would be cheap if prototypes, selection or mixing were asleep."""
    config = write(tmp_path / "c.yaml", split)
    go(config, tmp_path / "run", STEPS)
    state, metrics = saved(tmp_path / "run"), lines(tmp_path / "run")
    late = [line for line in metrics if line["step"] > SEMI and "loss" in line]
    assert all(line["loss_unsup"] > 0 and line["loss_proto_unsup"] > 0 for line in late)
    assert all(line["confident"] > 0 for line in late)
    assert metrics[0]["loss_proto_sup"] > 0  # prototypes from a file learn from the first step on
    first = read_prototypes(split / "prototypes.npz", 5, 2, 16)
    student, teacher = (state["networks"][role][PROTOTYPES] for role in ("student", "teacher"))
    assert (student != first).any(dim=1).sum() > 5
    assert not torch.equal(student, teacher)
    (own,) = state["own"]
    assert torch.equal(own["student"], student)
    assert torch.equal(own["teacher"], teacher)
    assert own["usage"].sum() > 0
    cfg = load_config(Config, config)
    fresh = train.set_up(cfg, Dist())
    assert differences(fresh.draws.state_dict(), state["draws"][0])


def test_stopping_after_every_step_to_the_end(split: Path, tmp_path: Path) -> None:
    """All eight steps one by one, evaluations, usage and the result included."""
    config = write(tmp_path / "c.yaml", split, **sections_of("clustered, every other switch"))
    go(config, tmp_path / "whole")
    for steps in range(1, 9):
        go(config, tmp_path / "parts", steps)
    assert not (tmp_path / "parts" / "result.json").exists()
    go(config, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", name="best.pt")
    results = [json.loads((tmp_path / d / "result.json").read_text()) for d in ("whole", "parts")]
    for result in results:
        del result["seconds"], result["peak_memory_bytes"]
    assert results[0] == results[1]
    counts = torch.tensor(list(results[0]["prototype_usage"].values()))
    assert counts.shape == (5, 2)
    assert counts.sum() > 0
    assert {"proto_best", "proto_last"} <= set(results[0])


def test_usage_is_said_at_every_evaluation(split: Path, tmp_path: Path) -> None:
    go(
        write(tmp_path / "c.yaml", split, eval={"during_training": "whole_image", "every_epochs": 1}),
        tmp_path / "run",
    )
    found = [line for line in lines(tmp_path / "run") if "prototypes_in_use" in line]
    assert [line["step"] for line in found] == [2, 4, 6, 8]
    assert all(1 <= line["prototypes_in_use_min"] <= line["prototypes_in_use"] <= 2 for line in found)
    text = (tmp_path / "run" / "train.log").read_text()
    assert text.count("prototypes of background: ") == 4


def test_resolved_switches_are_said_at_the_start(split: Path, tmp_path: Path) -> None:
    go(write(tmp_path / "c.yaml", split), tmp_path / "run", 1)
    text = (tmp_path / "run" / "train.log").read_text()
    for point in OPEN_POINTS:
        assert (f"switch {point}: " in text) == (point not in NOT_SAID), point


def test_measuring_pseudo_labels_changes_nothing_else(split: Path, tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", split)
    go(config, tmp_path / "plain", 5)
    go(config, tmp_path / "measured", 5, "run.pseudo_images=4")
    found = lines(tmp_path / "measured")
    figures = [line for line in found if "pseudo_kept" in line]
    assert [line["step"] for line in figures] == [4]
    assert [line for line in found if line not in figures] == lines(tmp_path / "plain")
    found = differences(saved(tmp_path / "plain"), saved(tmp_path / "measured"))
    assert not [path for path in found if not path.startswith(NOT_OF_THE_RUN)]


# --- starting from weights, and what is refused ----------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, split: Path) -> Path:
    """A run of five steps (so there is a best teacher) with its configuration beside it."""
    folder = tmp_path_factory.mktemp("stopped")
    go(write(folder / "c.yaml", split), folder / "run", 5)
    assert (folder / "run" / "best.pt").is_file()
    return folder


@pytest.fixture
def copied(stopped: Path, tmp_path: Path) -> Path:
    shutil.copytree(stopped, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.confid_thresh=0.5", "method.confid_thresh 0.21 -> 0.5"),
        ("method.proto.momentum=0.9", "method.proto.momentum 0.99 -> 0.9"),
        ("quirks.one_mask=false", "quirks.one_mask True -> False"),
        ("run.seed=3", "run.seed 2 -> 3"),
    ],
)
def test_other_settings_are_refused_by_name(copied: Path, override: str, words: str) -> None:
    go.refused_by_name(copied, override, words)


def test_weights_alone_cannot_be_resumed(copied: Path, tmp_path: Path) -> None:
    config, weights = copied / "c.yaml", copied / "run" / "best.pt"
    message = go.refused(config, tmp_path / "new", f"run.resume={weights}")
    assert message.startswith(f"{weights}: holds weights only; set run.init")


@pytest.mark.parametrize("proto", ["same", "fewer", "none"])
def test_weights_to_start_from_come_without_prototypes(
    copied: Path, split: Path, tmp_path: Path, proto: str
) -> None:
    """Also those of a network with another number of them, or from and for one without any."""
    changes = {
        "same": {},
        "fewer": {"proto": {"per_class": 1, "source": "random"}},
        "none": {"method": {"proto": None}, "eval": {"head": "linear"}},
    }
    sections = dict(changes[proto])
    if "eval" in sections:
        sections["eval"] = {"during_training": "whole_image", **sections["eval"]}
    config = write(tmp_path / "new.yaml", split, **sections)
    go(config, tmp_path / "new", 1, f"run.init={copied / 'run'}", "optim.lr=1e-9")
    ours, theirs = (saved(path)["networks"]["student"] for path in (tmp_path / "new", copied / "run"))
    key = "decoder.classifier.8.weight"
    torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-6)
    assert (PROTOTYPES in ours) == (proto != "none")
    # and the other way round
    back = tmp_path / "back"
    go(copied / "c.yaml", back, 1, f"run.init={tmp_path / 'new'}")
    assert saved(back)["networks"]["student"][PROTOTYPES].shape == (10, 16)


@pytest.mark.parametrize(
    "content", [{"conv1.weight": torch.zeros(1)}, {"project": "brpg", "config": {}, "optimizer": {}}]
)
@pytest.mark.parametrize("key", ["run.resume", "run.init"])
def test_foreign_files_are_refused(copied: Path, tmp_path: Path, key: str, content: dict[str, Any]) -> None:
    path = tmp_path / "foreign.pt"
    torch.save(content, path)
    assert go.refused(copied / "c.yaml", tmp_path / "new", f"{key}={path}").startswith(f"{path}: ")


def test_another_number_of_processes_is_refused(copied: Path) -> None:
    cfg = load_config(Config, copied / "c.yaml")
    two_processes_are_refused(train.set_up(cfg, Dist()), saved(copied / "run"))


# --- two processes ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(split: Path, tmp_path: Path) -> None:
    """Eight steps and three plus five, with prototypes of each process and with common ones."""
    changes: dict[str, dict[str, Any]] = {
        "local": {},
        "gather": {"proto": {"sync": "gather", "source": "warmup_end"}},
    }
    configs = {name: write(tmp_path / f"{name}.yaml", split, **changes[name]) for name in changes}

    def words(name: str, run: str, steps: int) -> str:
        folder = tmp_path / name / run
        return "|".join(["--config", str(configs[name]), f"run.dir={folder}", f"run.max_steps={steps}"])

    def all_runs(*runs: str) -> None:
        ports = " ".join(str(free_port()) for _ in runs)
        launch_script(
            tmp_path, SEVERAL_RUNS, *runs, TEST_PORTS=ports, TEST_PROGRAM="projects.proto_consistency.train"
        )

    all_runs(*(words(name, run, steps) for name in configs for run, steps in (("whole", 8), ("parts", 3))))
    all_runs(*(words(name, "parts", 8) for name in configs))
    for name in configs:
        state = saved(tmp_path / name / "whole")
        assert len(state["rng"]) == 2
        assert_same_run(tmp_path / name / "whole", tmp_path / name / "parts")
        for role in ("student", "teacher"):
            one, two = (own[role] for own in state["own"])
            assert torch.equal(one, two) == (name == "gather")
            assert torch.equal(
                one, state["networks"][role][PROTOTYPES]
            )  # the first process's are the published ones
