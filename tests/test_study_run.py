from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import submitit
import yaml

import projects
import studies.cluster
import studies.run
import studies.study
from common.config import build, load_config, to_dict
from common.errors import UserError
from studies.__main__ import adjusted, main
from studies.cluster import run_on_cluster
from studies.node import ClusterRun
from studies.plan import (
    budget_overrides,
    common_steps,
    compare,
    describe,
    grouped,
    make_plan,
    plan_tree,
    save_plan,
)
from studies.run import places, read_outcomes, run_study, set_aside
from studies.study import OUTCOMES_NAME, Study, jobs, load_study, output_folder, read_plan, resolve
from studies.table import load_records, tables
from tools.environment import config_hash

ROOT = Path(__file__).resolve().parents[1]
STUDY: dict[str, Any] = {
    "name": "Trees <and> cars",
    "baseline": "labels only",
    "seeds": [0, 1],
    "pictures": 1,
    "runs": [
        {"label": "labels only", "project": "u2pl", "config": "configs/smoke_sup.yaml"},
        {"label": "method A", "project": "u2pl", "config": "configs/smoke.yaml"},
        {
            "label": "method B",
            "project": "u2pl",
            "config": "configs/smoke.yaml",
            "overrides": ["optim.lr=0.02"],
        },
    ],
}


def make_study(**changes: Any) -> Study:
    return build(Study, STUDY | changes)


# The file


def test_a_study_file_is_checked(tmp_path: Path) -> None:
    def message(**changes: Any) -> str:
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(STUDY | changes))
        with pytest.raises(UserError) as caught:
            load_study(path)
        return str(caught.value)

    assert "'baseline' is 'nobody'; expected one of labels only, method A, method B" in message(
        baseline="nobody"
    )
    assert "did you mean 'seeds'?" in message(seed=[0])
    assert "'seeds' is [1, 1]; expected each seed once" in message(seeds=[1, 1])
    assert "need at least one entry" in message(runs=[])
    assert "'slots' is 0; expected 1 or more" in message(slots=0)
    twins = [STUDY["runs"][0], {**STUDY["runs"][1], "label": "Labels-only!"}]
    assert "too alike" in message(runs=twins)
    assert "'runs[0].label'" in message(runs=[{"project": "u2pl", "config": "x.yaml"}])
    with pytest.raises(UserError, match="no such study"):
        load_study(tmp_path / "absent.yaml")


def test_what_contradicts_itself_is_refused(tmp_path: Path) -> None:
    def message(**changes: Any) -> str:
        try:
            make_study(**changes)
        except ValueError as error:
            return str(error)
        raise AssertionError(f"{changes} was accepted")

    one = STUDY["runs"][0]
    fraction = {**one, "config": "configs/voc_classic_{fraction}_r101_sup.yaml"}
    other = STUDY["runs"][1]
    assert "run 'method A' has the baseline 'nobody'; expected one of labels only, method A" in message(
        runs=[one, {**other, "baseline": "nobody"}]
    )
    assert "run 'method A' is a baseline itself" in message(runs=[one, {**other, "baseline": "method A"}])
    assert "run 'labels only' is a baseline itself" in message(runs=[{**one, "baseline": "method A"}, other])
    assert "'splits' is ['a/1', 'a_1']; expected names that differ" in message(splits=["a/1", "a_1"])
    assert "names the split 'b'; expected one of a" in message(splits=["a"], runs=[{**one, "splits": ["b"]}])
    changes = {**one, "by_split": [{"split": "b", "overrides": []}]}
    assert "names the split 'b'" in message(splits=["a"], runs=[changes])
    assert "has {fraction} in 'config', but the study has no 'splits'" in message(runs=[fraction])
    assert "'budget_steps' goes with mode matched" in message(mode="as_published", budget_steps=9)
    same = message(mode="as_published", splits=["a", "b"], runs=[one])
    assert "would be the same on every split" in same
    recipe = message(mode="as_published", overrides=["run.panels=false", "optim.lr=1"])
    assert "'optim.lr=1', which changes the recipe" in recipe
    assert "'slots' and 'gpus' were both given" in message(slots=2, gpus=[0])
    assert "expected a multiple of 'processes' (2)" in message(processes=2, gpus=[0, 1, 2])
    assert "expected numbers from 0 on" in message(gpus=[-1])
    assert "'budget_steps' is 0; expected 1 or more" in message(budget_steps=0)
    assert "'hours' is 0.0; expected a positive number" in message(slurm={"hours": 0})
    assert "'cpus' is 0; expected 1 or more" in message(slurm={"cpus": 0})


def existing(study: Study) -> Study:
    """The study with the methods whose projects can be trained."""
    there = [method for method in study.runs if (ROOT / "projects" / method.project / "train.sh").is_file()]
    return dataclasses.replace(study, runs=tuple(there))


STUDIES = sorted((ROOT / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_of_the_repository_name_real_configurations(path: Path) -> None:
    study = load_study(path)
    out = output_folder(study)
    assert out.is_relative_to(ROOT / "runs")
    for job in jobs(existing(study), out, {}):
        cfg = resolve(job)
        assert cfg.run.seed == job.seed
        assert (job.folder / cfg.run.dir).resolve() == job.run_dir  # named so that it holds in any checkout
        assert not Path(cfg.run.dir).is_absolute()
        if job.split and study.mode == "matched":
            own = [one for one in job.method.overrides if one.startswith("data.split=")]  # that of a bound
            assert f"data.split={cfg.data.split}" == (own or [f"data.split={job.split}"])[-1]
        elif job.split:  # as published, each paper has its own list of so many images
            assert cfg.data.split.split("/")[-1] == job.split.split("/")[-1]


@pytest.mark.parametrize("name", ["shapes", "shapes_demo", "shapes_cps", "shapes_3seeds"])
def test_the_matched_studies_of_the_embedded_dataset_are_matched(name: str, tmp_path: Path) -> None:
    plan = make_plan(existing(load_study(ROOT / "studies" / f"{name}.yaml")), tmp_path)
    bound = "fully supervised"  # all labels: another split, and as many steps as its epochs give
    steps = plan.steps[""]
    assert {steps[label] for label in steps if label != bound} == {588}
    for entry in plan.differences:
        others = {str(value) for label, value in entry["values"].items() if label != bound}
        assert len(others) == 1 or not entry["matters"] or entry["what"] in plan.study.exceptions, entry


def test_the_methods_of_the_camvid_study_train_one_network_in_one_way(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSS_DATA", str(shared_data / "camvid"))
    plan = make_plan(load_study(ROOT / "studies" / "camvid.yaml"), tmp_path)
    assert plan.shared["seed0/46"]["network"] == "generic"
    assert {entry["what"] for entry in plan.differences} == {"split", "steps"}
    assert set(plan.steps["seed0/46"].values()) == {1196, 1200}

    labels = make_plan(load_study(ROOT / "studies" / "camvid_labels.yaml"), tmp_path / "labels")
    assert {entry["what"] for entry in labels.differences} == {"steps"}
    assert {steps for split in labels.steps.values() for steps in split.values()} == {1196, 1200, 1224, 1232}
    table = {(run.job.method.label, run.job.split, run.job.seed): run.hash for run in plan.runs}
    again = {(run.job.method.label, run.job.split, run.job.seed): run.hash for run in labels.runs}
    both = table.keys() & again.keys()  # with 46 labels the records of the table serve
    assert len(both) == 4 * 3
    assert all(table[key] == again[key] for key in both)


def test_places_and_names_of_runs_with_and_without_splits(tmp_path: Path) -> None:
    first, *_ = jobs(make_study(), tmp_path)
    assert first.run_dir == tmp_path / "labels_only" / "seed0"
    assert first.name == "labels only seed 0"
    study = make_study(splits=["seed0/12", "seed0/46"])
    found = jobs(study, tmp_path)
    assert len(found) == 2 * 2 * 3
    assert [job.split for job in found[:6]] == ["seed0/12"] * 3 + ["seed0/46"] * 3
    assert found[3].run_dir == tmp_path / "seed0_46" / "labels_only" / "seed0"
    assert found[3].name == "labels only on seed0/46 seed 0"
    assert resolve(found[3]).data.split == "seed0/46"


def test_methods_on_some_splits_and_changes_on_one(tmp_path: Path) -> None:
    a, b, c = STUDY["runs"]
    few = {"split": "random/4", "overrides": ["optim.lr=0.5"]}
    study = make_study(
        splits=["random/4", "random/8"], runs=[a, {**b, "splits": ["random/8"]}, {**c, "by_split": [few]}]
    )
    found = {(job.split, job.method.label): resolve(job).optim.lr for job in jobs(study, tmp_path)}
    assert ("random/4", "method A") not in found
    assert found["random/4", "method B"] == 0.5  # after the method's own 0.02
    assert found["random/8", "method B"] == 0.02


def test_as_published_the_split_chooses_the_configuration(tmp_path: Path) -> None:
    runs = [
        {"label": "a", "project": "u2pl", "config": "configs/voc_classic_{fraction}_r101.yaml"},
        {"label": "b", "project": "cps", "config": "configs/voc_few_{fraction}_r101_cps_cutmix.yaml",
         "splits": ["classic/92"]},
    ]  # fmt: skip
    study = make_study(
        mode="as_published", splits=["classic/92", "classic/366"], runs=runs, baseline="a", seeds=[5]
    )
    found = jobs(study, tmp_path)
    assert [job.config for job in found] == [
        "configs/voc_classic_92_r101.yaml",
        "configs/voc_few_92_r101_cps_cutmix.yaml",
        "configs/voc_classic_366_r101.yaml",
    ]
    assert [resolve(job).data.split for job in found] == ["classic/92", "cps_few/92", "classic/366"]
    assert not any("data.split" in word for job in found for word in job.command)
    plan = make_plan(study, tmp_path)
    assert (plan.shared, plan.differences, plan.deviations) == ({}, (), ())
    expected = {run.job.config: run.cfg.expect.miou for run in plan.runs}
    assert [run["expect"]["miou"] for run in plan_tree(plan, tmp_path)["runs"]] == list(expected.values())


def test_as_published_changes_to_a_recipe_are_listed(tmp_path: Path) -> None:
    one = {"label": "a", "project": "u2pl", "config": "configs/voc_classic_92_r101.yaml"}
    other = {**one, "label": "b", "overrides": ["optim.batch_size=8", "run.panels=false"]}
    study = make_study(
        mode="as_published", runs=[one, other], baseline="a", overrides=["run.log_interval=50"]
    )
    plan = make_plan(study, tmp_path)
    assert plan.deviations == ({"label": "b", "split": "", "overrides": ["optim.batch_size=8"]},)
    assert describe(plan) == ["changed: b: optim.batch_size=8"]


# The comparison and the budget


def test_every_difference_is_listed_and_what_matters_comes_first() -> None:
    facts = {
        "a": {"batch": 8, "steps": 588, "optim.power": 0.1, "data.blur": False},
        "b": {"batch": 8, "steps": 600, "optim.power": 0.2, "data.blur": False, "data.scales": [1.0]},
        "c": {"batch": 4, "steps": 588, "optim.power": 0.2},
    }
    shared, differences = compare(facts)
    assert shared == {"data.blur": False}  # of those that have it; 'data.scales' is b's own affair
    assert [(entry["what"], entry["matters"]) for entry in differences] == [
        ("batch", True),
        ("steps", True),
        ("optim.power", False),
    ]
    assert differences[0]["values"] == {"a": 8, "b": 8, "c": 4}
    assert grouped(differences[0]["values"]) == "8 (a, b); 4 (c)"
    near = compare({"a": {"steps": 5952}, "b": {"steps": 5950}})[1]
    assert [entry["matters"] for entry in near] == [False]  # whole epochs do not come closer


def test_a_difference_of_the_resolved_configurations_is_said_and_kept(tmp_path: Path) -> None:
    runs = [
        {"label": "a", "project": "u2pl", "config": "configs/shapes_sup.yaml"},
        {
            "label": "b",
            "project": "cps",
            "config": "configs/shapes.yaml",
            "overrides": ["optim.batch_size=4"],
        },
    ]
    unequal = ["network", "batch", "steps"]
    for number, name in enumerate(unequal):
        with pytest.raises(UserError, match=f"holds '{name}' equal, .*'exceptions' of the study"):
            make_plan(make_study(runs=runs, baseline="a", exceptions=unequal[:number]), tmp_path)
    with pytest.raises(UserError, match="exceptions: 'colour'; known: dataset, split"):
        make_plan(make_study(runs=runs, baseline="a", exceptions=[*unequal, "colour"]), tmp_path)
    plan = make_plan(make_study(runs=runs, baseline="a", exceptions=unequal), tmp_path)
    assert plan.study.meaning.endswith("steps and seeds for every method; except: network, batch, steps")
    lines = describe(plan)
    assert lines[0].startswith(
        "matched: all methods have dataset shapes, split random/6, crop 64x64, scale range"
    )
    assert "exception: batch: 8 (a); 4 (b)" in lines
    assert "exception: steps: 588 (a); 1176 (b)" in lines
    assert "changed: b: optim.batch_size=4" in lines
    save_plan(plan, tmp_path)
    kept = read_plan(tmp_path)
    assert kept["steps"] == {"": {"a": 588, "b": 1176}}
    assert {"split": "", "what": "batch", "matters": True, "values": {"a": 8, "b": 4}} in kept["differences"]
    assert kept["runs"][1]["folder"] == "b/seed0"
    assert kept["runs"][1]["config_hash"] == config_hash(resolve(jobs(plan.study, tmp_path)[1]))


def test_the_budget_gives_every_project_the_same_number_of_steps(tmp_path: Path) -> None:
    def run(label: str, project: str, config: str, *overrides: str) -> dict[str, Any]:
        return {
            "label": label,
            "project": project,
            "config": f"configs/{config}.yaml",
            "overrides": list(overrides),
        }

    runs = [
        run("labels only", "u2pl", "shapes_sup"),
        run("U2PL", "u2pl", "shapes"),
        run("AEL", "u2pl", "shapes_ael"),
        run("BRPG", "brpg", "shapes"),
        run("CPS", "cps", "shapes_cps_cutmix"),
    ]
    study = make_study(
        runs=runs, seeds=[0, 1], budget_steps=294, evaluations=3, exceptions=["network"]
    )  # half of the configured 588
    plan = make_plan(study, tmp_path)
    assert set(plan.steps[""].values()) == {294}
    assert [entry["what"] for entry in plan.differences if entry["matters"]] == ["network"]
    cfgs = {run.job.method.label: run.cfg for run in plan.runs}
    assert cfgs["labels only"].optim.epochs == 294
    assert cfgs["U2PL"].optim.epochs == 6
    assert (cfgs["U2PL"].method.sup_only_epochs, cfgs["AEL"].method.ael.start_epoch) == (2, 2)  # of 12: 4
    brpg = cfgs["BRPG"].method
    assert (brpg.sup_only_epochs, brpg.collect_start, brpg.collect_epochs) == (2, 2, 1)
    assert {cfg.optim.epochs / cfg.eval.every_epochs for cfg in cfgs.values()} == {3.0}
    # the report, and a second start, read what was planned
    save_plan(plan, tmp_path)
    assert [job.command for job in jobs(study, tmp_path)] == [run.job.command for run in plan.runs]
    assert all(job.seed in (0, 1) for job in jobs(study, tmp_path))
    assert jobs(make_study(runs=runs), tmp_path)[0].overrides[-1] == "run.seed=0"
    assert not any("epochs" in word for word in jobs(make_study(runs=runs), tmp_path)[0].command)


def test_a_budget_of_steps_where_a_configuration_counts_steps() -> None:
    class Cfg:
        pass

    assert budget_overrides(Cfg(), 600, 10, None) == (
        "optim.steps=600",
        "optim.epochs=10",
        "eval.every_epochs=1",
    )
    assert budget_overrides(Cfg(), 588, 10, None)[1] == "optim.epochs=7"  # rounds of equally many steps
    assert budget_overrides(Cfg(), 7, 10, None)[:2] == ("optim.steps=7", "optim.epochs=7")


def test_whole_epochs_of_all_methods_meet_as_closely_as_they_can() -> None:
    assert common_steps(6000, [40, 6]) == 6000
    assert common_steps(6000, [44, 2]) == 5984
    assert common_steps(6000, [34, 12]) == 5950  # 5952 in epochs of 12
    assert common_steps(600, []) == 600


def test_a_budget_that_cannot_be_met_is_refused(tmp_path: Path) -> None:
    runs = [{"label": "labels only", "project": "u2pl", "config": "configs/shapes_sup.yaml"},
            {"label": "U2PL", "project": "u2pl", "config": "configs/shapes.yaml"}]  # fmt: skip
    with pytest.raises(UserError) as caught:
        make_plan(make_study(runs=runs, budget_steps=120), tmp_path)
    assert str(caught.value) == (
        "run 'U2PL': budget_steps=120: an epoch on data.split=random/6 has 49 steps, and whole epochs do not come "
        "within 1%; use 98 or 147, or another optim.batch_size"
    )
    with pytest.raises(UserError, match=r"use 49, or another"):
        make_plan(make_study(runs=runs, budget_steps=20), tmp_path)
    plan = make_plan(make_study(runs=runs, budget_steps=120, exceptions=["steps"]), tmp_path)
    assert plan.steps == {"": {"labels only": 120, "U2PL": 98}}
    assert "exception: steps: 120 (labels only); 98 (U2PL)" in describe(plan)


def test_overrides_of_the_study_come_before_those_of_the_method(tmp_path: Path) -> None:
    study = make_study(overrides=("optim.lr=0.5", "optim.epochs=3"))
    cfg = resolve(jobs(study, tmp_path)[2])
    assert (cfg.optim.lr, cfg.optim.epochs) == (0.02, 3)


def test_a_mistake_in_a_configuration_names_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run 'labels only': .*did you mean 'optim.momentum'"):
        run_study(make_study(overrides=("optim.momentun=1",)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    wrong = [{**STUDY["runs"][0], "project": "u2pI"}]
    with pytest.raises(UserError, match=r"run 'labels only': no project 'u2pI'; known: .*u2pl"):
        run_study(make_study(runs=wrong), tmp_path / "out")


# The runner, with a project of shell and standard library


CONFIG = """
    from dataclasses import dataclass
    from common.config import RunConfig

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Toy:
        steps: int = 3
        fail: bool = False
        wait: bool = False

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        run: RunConfig
        toy: Toy
"""
TRAIN = """
    import json, os, signal, sys, time
    from pathlib import Path
    from common.config import load_config, save_config
    from projects.toy.config import Config
    from tools.environment import config_hash

    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    path, *overrides = sys.argv[1:]
    cfg = load_config(Config, path, overrides)
    run_dir = Path(cfg.run.dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    save_config(cfg, run_dir / "config.yaml")
    state = run_dir / "last.pt"
    step = int(state.read_text()) if state.exists() else 0
    print(f"from step {step} with {os.environ['OMP_NUM_THREADS']} thread(s), process {os.getpid()}")
    print(f"GPUs {os.environ.get('CUDA_VISIBLE_DEVICES')}")
    while step < cfg.toy.steps:
        step += 1
        state.write_text(str(step))
        print(f"step {step}")
        if cfg.toy.fail:
            print("error: toy.fail=true: the disk is full; free space", file=sys.stderr)
            sys.exit(2)
        while cfg.toy.wait and not stop:
            time.sleep(0.02)
        if stop:
            sys.exit(0)
    result = {"miou_best": 0.5, "miou_last": 0.5, "best": {"iou": {}}, "last": {"iou": {}}, "protocol": {},
              "split_hash": "x", "config_hash": config_hash(cfg), "seed": cfg.run.seed}
    (run_dir / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project `toy` beside the real ones; returns the folder that takes the place of the repository."""
    root = tmp_path / "repo"
    folder = root / "projects" / "toy"
    folder.mkdir(parents=True)
    (folder / "config.py").write_text(textwrap.dedent(CONFIG))
    (folder / "toy_train.py").write_text(textwrap.dedent(TRAIN))
    (folder / "train.sh").write_text(
        'cd "$(dirname "$0")" && shift 2 && export PYTHONPATH="$PYTHONPATH:../.." && exec "$PYTHON" start.py "$@"\n'
    )
    (folder / "start.py").write_text(
        "import projects, runpy; projects.__path__.append('..'); runpy.run_path('toy_train.py', run_name='__main__')\n"
    )
    (folder / "plain.yaml").write_text("toy: {steps: 3}\nrun: {}\n")
    monkeypatch.setattr(studies.study, "ROOT", root)
    monkeypatch.setattr(projects, "__path__", [*projects.__path__, str(root / "projects")])
    for name in ("projects.toy", "projects.toy.config"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return root


def toy_study(**changes: Any) -> Study:
    def run(label: str, *overrides: str) -> dict[str, Any]:
        return {"label": label, "project": "toy", "config": "plain.yaml", "overrides": list(overrides)}

    tree = {
        "name": "toys",
        "baseline": "a",
        "runs": [run("a"), run("b", "toy.fail=true"), run("c", "toy.steps=4")],
    }
    return build(Study, tree | {"threads": 1} | changes)


def statuses(outcomes: list[Any]) -> dict[str, str]:
    return {outcome.job.method.label: outcome.status for outcome in outcomes}


@pytest.mark.parametrize("slots", [1, 3])
def test_a_failed_run_is_reported_and_the_others_go_on(toy: Path, slots: int) -> None:
    lines: list[str] = []
    outcomes = run_study(toy_study(slots=slots), toy / "out", write=lines.append)
    assert statuses(outcomes) == {"a": "finished", "b": "failed", "c": "finished"}
    assert outcomes[1].message == "toy.fail=true: the disk is full; free space"
    assert "c seed 0 | step 4" in lines
    assert "step 4" in (toy / "out" / "c" / "seed0" / "console.log").read_text()
    assert any("with 1 thread(s)" in line for line in lines)


def test_finished_runs_are_skipped_and_interrupted_ones_go_on(toy: Path) -> None:
    study, out = toy_study(), toy / "out"
    run_study(study, out, write=lambda line: None)
    (out / "c" / "seed0" / "result.json").unlink()  # as if it had been killed after its third step
    (out / "c" / "seed0" / "last.pt").write_text("3")
    lines: list[str] = []
    outcomes = run_study(study, out, write=lines.append)
    assert statuses(outcomes) == {"a": "finished before", "b": "failed", "c": "finished"}
    assert not [line for line in lines if line.startswith("a seed 0 |")]
    assert any("c seed 0 (continues)" in line for line in lines)
    assert any("from step 3" in line for line in lines)


def test_a_run_of_another_configuration_is_set_aside_not_lost(toy: Path) -> None:
    out = toy / "out"
    run_study(toy_study(), out, write=lambda line: None)
    lines: list[str] = []
    outcomes = run_study(toy_study(overrides=["toy.steps=5"]), out, write=lines.append)
    assert statuses(outcomes)["a"] == "finished"
    assert (out / "a" / "seed0.old1" / "result.json").is_file()
    assert any("the former run is now seed0.old1" in line for line in lines)
    assert any(line == "a seed 0 | step 5" for line in lines)
    assert statuses(outcomes)["c"] == "finished before"  # its own override comes later and is the same


def test_a_run_under_another_truth_is_set_aside(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, now, lines = toy / "out", {"labeled": "a", "classes": ["x"]}, list[str]()
    monkeypatch.setattr("tools.ready.truth_of", lambda cfg: dict(now))
    run_study(toy_study(), out, write=lambda line: None)
    path = out / "a/seed0/result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"truth": now}))
    assert statuses(run_study(toy_study(), out, write=lambda line: None))["a"] == "finished before"
    now["labeled"] = "b"
    assert statuses(run_study(toy_study(), out, write=lines.append))["a"] == "finished"
    assert any("the labeled list changed; the former run is now seed0.old1" in line for line in lines)
    assert (out / "a/seed0.old1/result.json").is_file()


def test_set_aside_leaves_a_live_run_alone(toy: Path) -> None:
    from common.run.log import RunLock

    (job,) = [job for job in jobs(toy_study(), toy / "out") if job.method.label == "a"]
    run_study(toy_study(), toy / "out", write=lambda line: None)
    lock = RunLock(job.run_dir)
    try:
        with pytest.raises(UserError, match="another live run"):
            set_aside(job, "another hash", lambda line: None)
    finally:
        lock.release()
    assert job.run_dir.is_dir()


def test_dry_run_and_exit_codes(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = toy / "toys.yaml"
    file.write_text(yaml.safe_dump(to_dict(toy_study())))
    out = toy / "out"
    assert main(["run", str(file), "--out", str(out), "--dry-run"]) == 0
    assert "(cd projects/toy && sh train.sh 1 0 plain.yaml toy.fail=true run.dir=" in capsys.readouterr().out
    assert not out.exists()
    assert main(["run", str(file), "--out", str(out), "--slots", "2"]) == 1
    shown = capsys.readouterr().out
    assert "study: 2 of 3 runs finished" in shown
    assert "b seed 0: failed: toy.fail=true: the disk is full; free space" in shown
    assert load_study(out / "study.yaml") == toy_study()
    with pytest.raises(UserError, match="--slots=0"):
        main(["run", str(file), "--slots", "0"])


def test_how_runs_have_ended_is_kept(toy: Path) -> None:
    study, out = toy_study(), toy / "out"
    run_study(study, out, write=lambda line: None)
    found = read_outcomes(out)
    assert {name: entry["status"] for name, entry in found.items()} == {
        "a seed 0": "finished",
        "b seed 0": "failed",
        "c seed 0": "finished",
    }
    assert found["b seed 0"]["message"] == "toy.fail=true: the disk is full; free space"
    assert found["a seed 0"]["seconds"] > 0
    repaired = toy_study(runs=[*to_dict(study)["runs"][:1], {**to_dict(study)["runs"][1], "overrides": []}])
    run_study(repaired, out, write=lambda line: None)
    again = read_outcomes(out)
    assert again["b seed 0"]["status"] == "finished"
    assert again["b seed 0"]["message"] == ""
    assert again["a seed 0"] == found["a seed 0"]  # finished before: how long it took is not lost
    (out / OUTCOMES_NAME).write_text("{")
    assert read_outcomes(out) == {}


def test_runs_are_given_the_listed_gpus(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies.run, "count_gpus", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    study = toy_study(gpus=[0, 2], seeds=[0, 1], runs=to_dict(toy_study())["runs"][::2])
    lines: list[str] = []
    outcomes = run_study(study, toy / "out", write=lines.append)
    assert [outcome.status for outcome in outcomes] == ["finished"] * 4
    given = [line.split("GPUs ")[1] for line in lines if "GPUs " in line]
    assert len(given) == 4
    assert set(given) == {"0", "2"}


def test_the_places_of_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies.run, "count_gpus", lambda: 4)
    assert places(toy_study(slots=3), {}) == [None] * 3
    assert places(toy_study(gpus=[0, 1, 1]), {}) == ["0", "1", "1"]
    assert places(toy_study(gpus=[0, 1, 2, 3], processes=2), {}) == ["0,1", "2,3"]
    assert places(toy_study(gpus=[0, 1]), {"CUDA_VISIBLE_DEVICES": "4,7,8,9"}) == ["4", "7"]
    with pytest.raises(UserError, match=r"gpus=\[4\]: this machine has 4 \(numbers 0 to 3\)"):
        places(toy_study(gpus=[4]), {})
    monkeypatch.setattr(studies.run, "count_gpus", lambda: 0)
    with pytest.raises(UserError, match="has none that torch can use"):
        places(toy_study(gpus=[0]), {})


def test_the_command_line_names_other_places() -> None:
    study = toy_study(gpus=[0, 1])
    assert (adjusted(study, 2, None).slots, adjusted(study, 2, None).gpus) == (2, ())
    assert adjusted(toy_study(slots=2), None, "1,3").gpus == (1, 3)
    assert adjusted(study, None, None) == study
    for arguments, words in [((1, "0"), "give one of them"), ((None, "a"), "expected numbers such as 0,1"),
                             ((0, None), "--slots=0"), ((None, "-1"), "expected numbers from 0 on")]:  # fmt: skip
        with pytest.raises(UserError, match=words):
            adjusted(study, *arguments)


def test_several_processes_per_run(tmp_path: Path) -> None:
    assert jobs(toy_study(processes=4), tmp_path)[0].command[:4] == ["sh", "train.sh", "4", "0"]


HOLD = """
import sys, time
from pathlib import Path
from common.run.log import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.readline()
lock.release()
"""


def test_a_live_run_in_a_directory_is_waited_for(toy: Path) -> None:
    """The rest of a killed study may still be saving; its place is not taken, and other runs go on meanwhile."""
    out = toy / "out"
    (out / "a" / "seed0").mkdir(parents=True)
    command = [sys.executable, "-c", HOLD, str(out / "a" / "seed0")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holding:
        assert holding.stdout is not None
        assert holding.stdout.readline() == "held\n"
        lines: list[str] = []

        def write(line: str) -> None:
            lines.append(line)
            if line.startswith("c seed 0: f"):  # finished, or failed, which ends the test too
                assert holding.stdin is not None
                holding.stdin.write("\n")
                holding.stdin.flush()

        outcomes = run_study(toy_study(), out, write=write)
    assert statuses(outcomes) == {"a": "finished", "b": "failed", "c": "finished"}
    waits = [line for line in lines if line.startswith("a seed 0: waits for the live run")]
    assert len(waits) == 1
    assert f"process {holding.pid} on" in waits[0]
    assert lines.index(waits[0]) < lines.index(
        next(line for line in lines if line.startswith("c seed 0: fin"))
    )


# The cluster


def test_jobs_of_a_cluster_write_what_local_runs_write(toy: Path) -> None:
    study, out = toy_study(), toy / "out"
    lines: list[str] = []
    outcomes = run_on_cluster(study, out, cluster="local", write=lines.append)
    assert statuses(outcomes) == {"a": "finished", "b": "failed", "c": "finished"}
    assert outcomes[1].message == "toy.fail=true: the disk is full; free space"
    assert "step 4" in (out / "c" / "seed0" / "console.log").read_text()
    assert read_outcomes(out)["b seed 0"]["status"] == "failed"
    assert sum(" submitted as job " in line for line in lines) == 3
    lines.clear()
    again = run_on_cluster(study, out, cluster="local", write=lines.append)
    assert statuses(again) == {"a": "finished before", "b": "failed", "c": "finished before"}
    assert [line.split(":")[0] for line in lines if " submitted as job " in line] == ["b seed 0"]


def test_a_job_whose_time_is_over_saves_and_asks_for_another_turn(toy: Path) -> None:
    job = jobs(toy_study(overrides=["toy.wait=true"]), toy / "out")[0]
    run = ClusterRun(job.command, job.folder, job.run_dir, threads=1)
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(run()))
    thread.start()
    state = job.run_dir / "last.pt"
    deadline = time.monotonic() + 30
    while not (state.exists() and state.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    again = run.checkpoint()
    thread.join(timeout=30)
    assert codes == [0]
    assert state.read_text() == "1"
    assert again.function.command == job.command
    assert again.function.run_dir == job.run_dir


SBATCH = """#!/bin/sh
cp "$1" "{folder}/script"
echo "Submitted batch job 77"
echo x >> "{folder}/calls"
"""
SACCT = """#!/bin/sh
echo "JobID|State|NodeList"
for i in 0 1 2; do echo "77_$i|$(cat "{folder}/state")|node1"; done
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with commands that stand in for those of Slurm; `state` says how the jobs are, `calls` counts them."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("sacct", SACCT), ("srun", "#!/bin/sh\n")):
        (folder / name).write_text(text.format(folder=folder))
        (folder / name).chmod(0o755)
    (folder / "state").write_text("RUNNING")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    submitit.SlurmJob.watcher.clear()
    return folder


def test_slurm_gets_one_array_and_is_not_asked_twice(
    toy: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wish = {"partition": "fast", "gpus": 2, "cpus": 6, "memory_gb": 48, "hours": 2.5, "at_once": 2,
            "account": "me", "constraint": "a100"}  # fmt: skip
    study, out = toy_study(slurm=wish), toy / "out"

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    lines: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(studies.cluster.time, "sleep", interrupted)
        patched.setattr(submitit.SlurmExecutor, "_throttle", lambda self: None)
        outcomes = run_on_cluster(study, out, cluster="slurm", write=lines.append)
    assert statuses(outcomes) == {"a": "stopped", "b": "stopped", "c": "stopped"}
    assert outcomes[1].message == "job 77_1 goes on"
    script = (slurm / "script").read_text()
    for word in ("--partition=fast", "--array=0-2%2", "--gpus-per-node=2", "--cpus-per-task=6", "--mem=48GB",
                 "--time=150", "--account=me", "--constraint=a100", "--signal=USR2@300"):  # fmt: skip
        assert word in script
    assert f"export PYTHONPATH={studies.cluster.ROOT}" in script
    # started again while the jobs run: attached; then they end
    config_hashes = {run.job.method.label: run for run in make_plan(study, out).runs}
    for label in "ac":
        run = config_hashes[label]
        run.job.run_dir.mkdir(parents=True, exist_ok=True)
        content = {"miou_best": 0.5, "miou_last": 0.5, "best": {}, "last": {}, "protocol": {}, "split_hash": "x",
                   "config_hash": run.hash, "seed": 0}  # fmt: skip
        (run.job.run_dir / "result.json").write_text(json.dumps(content))
    (out / "a" / "seed0" / "result.json").unlink()

    def ended(seconds: float) -> None:
        run = config_hashes["a"]
        content = json.loads((out / "c" / "seed0" / "result.json").read_text()) | {"config_hash": run.hash}
        (run.job.run_dir / "result.json").write_text(json.dumps(content))
        (slurm / "state").write_text("COMPLETED")
        submitit.SlurmJob.watcher.update()

    lines.clear()
    monkeypatch.setattr(studies.cluster.time, "sleep", ended)
    outcomes = run_on_cluster(study, out, cluster="slurm", write=lines.append)
    assert statuses(outcomes) == {"a": "finished", "b": "failed", "c": "finished before"}
    assert outcomes[1].message == "it has never started; see the folder 'cluster'"
    assert sum("in the queue since before as job 77_" in line for line in lines) == 2
    assert (slurm / "calls").read_text() == "x\n"


def test_without_the_library_or_the_cluster_there_is_one_clear_line(
    toy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with monkeypatch.context() as patched:
        patched.setenv("PATH", str(empty))
        with pytest.raises(UserError, match=r"--submit=slurm: .*; is this a login node of the cluster\?"):
            run_on_cluster(toy_study(), toy / "out", cluster="slurm", write=lambda line: None)
    monkeypatch.setitem(sys.modules, "submitit", None)
    file = toy / "toys.yaml"
    file.write_text(yaml.safe_dump(to_dict(toy_study())))
    with pytest.raises(
        UserError, match=r"--submit: needs the library submitit, .*'pip install semiseg\[slurm\]'"
    ):
        main(["run", str(file), "--out", str(tmp_path / "new"), "--submit", "slurm"])
    assert not (tmp_path / "new").exists()


# Stopping and killing


def start_study(toy: Path, study: Study) -> subprocess.Popen[str]:
    """The study in a process of its own, with the toy project in place."""
    (toy / "toys.yaml").write_text(yaml.safe_dump(to_dict(study)))
    code = f"""
import sys, projects, studies.study
from pathlib import Path
studies.study.ROOT = Path({str(toy)!r})
projects.__path__.append({str(toy / "projects")!r})
from studies.__main__ import main
sys.exit(main(["run", {str(toy / "toys.yaml")!r}, "--out", {str(toy / "out")!r}]))
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)


def wait_for(stream: Any, pattern: str) -> re.Match[str]:
    for line in stream:
        if match := re.search(pattern, line):
            return match
    raise AssertionError(f"the study ended without {pattern!r}")


def gone(process: int, seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        state = Path(f"/proc/{process}/stat")
        if state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_study_saves_its_runs_and_goes_on_later(toy: Path, kind: signal.Signals) -> None:
    waiting = toy_study(overrides=["toy.wait=true"])
    with start_study(toy, waiting) as process:
        wait_for(process.stdout, r"a seed 0 \| step 1")
        process.send_signal(kind)
        rest = process.stdout.read()  # type: ignore[union-attr]
    assert process.returncode == 1
    assert "a seed 0: stopped" in rest
    assert "c seed 0: stopped: not started" in rest
    assert (toy / "out" / "a" / "seed0" / "last.pt").read_text() == "1"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_a_killed_study_takes_its_run_along(toy: Path) -> None:
    with start_study(toy, toy_study(overrides=["toy.wait=true"])) as process:
        child = int(wait_for(process.stdout, r"process (\d+)").group(1))
        wait_for(process.stdout, r"a seed 0 \| step 1")
        process.kill()
    assert gone(child)
    assert (toy / "out" / "a" / "seed0" / "last.pt").read_text() == "1"


KILL: dict[str, Any] = {
    "name": "killed",
    "baseline": "labels only",
    "slots": 2,
    "threads": 1,
    "overrides": ["data.epoch_images=64", "optim.batch_size=8", "optim.epochs=6", "run.save_interval=3",
                  "run.log_interval=2", "run.panels=false", "eval.every_epochs=2", "run.pseudo_images=2"],
    "runs": [
        {"label": "labels only", "project": "cps", "config": "configs/smoke_sup.yaml"},
        {"label": "CPS + CutMix", "project": "cps", "config": "configs/smoke_cps_cutmix.yaml"},
    ],
}  # fmt: skip
OF_THE_MACHINE = ("seconds", "peak_memory_bytes")


def start_real(file: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "studies", "run", str(file), "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "SSS_DEVICE": "cpu"}
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def figures(out: Path) -> dict[str, Any]:
    """Everything that the runs of a study have to say, but for how long they took, and its table."""
    study = load_study(out / "study.yaml")
    found: dict[str, Any] = {}
    for job in jobs(study, out):
        result = json.loads((job.run_dir / "result.json").read_text())
        lines = [json.loads(line) for line in (job.run_dir / "metrics.jsonl").read_text().splitlines()]
        found[job.name] = (
            {key: value for key, value in result.items() if key not in OF_THE_MACHINE},
            [{key: value for key, value in line.items() if key != "images_per_s"} for line in lines],
        )
    (table,) = tables(study, load_records(study, out))
    found["table"] = [
        (row.label, row.n, row.best, row.last, row.gain_best, row.gain_last) for row in table.rows
    ]
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_a_study_killed_at_random_ends_with_the_table_of_an_undisturbed_one(tmp_path: Path) -> None:
    """`kill -9` of one of its runs, then of the study itself, each at a moment of its own."""
    file, val = tmp_path / "study.yaml", tmp_path / "val.txt"
    val.write_text("".join(f"{i:06d}\n" for i in range(400, 406)))
    few = [f"data.val={val}", f"eval.list={val}"]
    file.write_text(yaml.safe_dump(KILL | {"overrides": [*KILL["overrides"], *few]}))
    began = time.monotonic()
    assert start_real(file, tmp_path / "whole").wait(timeout=900) == 0
    length = time.monotonic() - began
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    disturbed = 0
    for kind in rng.sample(["run", "study"], 2):
        study = start_real(file, tmp_path / "parts")
        time.sleep(rng.uniform(0.3, 0.9) * length)
        children = psutil.Process(study.pid).children() if study.poll() is None else []
        disturbed += len(children)
        if kind == "run" and children:
            rng.choice(children).kill()
            time.sleep(0.3)
            study.terminate()
        else:
            study.kill()
        study.wait(timeout=300)
    assert disturbed, "the study had ended before it was killed"
    assert start_real(file, tmp_path / "parts").wait(timeout=900) == 0, f"random seed {seed}"
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole"), f"random seed {seed}"


def test_the_configuration_hash_is_that_of_the_training_script(toy: Path) -> None:
    job = jobs(toy_study(), toy / "out")[2]
    expected = config_hash(resolve(job))
    cls: Callable[..., Any] = type(resolve(job))
    assert expected == config_hash(load_config(cls, job.folder / "plain.yaml", ["toy.steps=4", "run.seed=7"]))
