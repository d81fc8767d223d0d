"""The loop around the steps: networks as configured, phases in order, ablations, evaluation within epochs."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from common.config import build, load_config
from common.distributed import Dist
from common.errors import UserError
from common.mean_teacher import networks as student_teacher
from common.models import placing
from common.models.pretrained import load_state
from common.models.xception import Xception65
from common.run.log import RunLog
from projects.brpg import model, train
from projects.brpg.config import Config
from projects.brpg.reporting import deviations
from projects.brpg.settings import MethodConfig
from projects.brpg.state import MethodState
from projects.brpg.step import clustering_due
from projects.brpg.tests import toys
from tests.runs import differences, lines, saved
from tests.tiny import write_dataset

CONFIGS = Path(train.__file__).parent / "configs"


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 labeled and 10 unlabeled photos, so 5 steps an epoch."""
    return write_dataset(tmp_path_factory.mktemp("farm"))


def go(folder: Path, dataset: Path, *overrides: str, **sections: dict[str, Any]) -> Path:
    """The run directory of a training."""
    config = toys.write_config(folder / "c.yaml", dataset, **sections)
    run_dir = folder / "run"
    assert train.main(["--config", str(config), f"run.dir={run_dir}", *overrides]) == 0
    return run_dir


def terms(run_dir: Path) -> list[set[str]]:
    """Names of what was logged at every step."""
    general = {"step", "epoch", "lr", "loss", "nonfinite"}
    return [set(line) - general for line in lines(run_dir) if "loss" in line]


# --- whole runs ------------------------------------------------------------------------------------------------


def test_phases_follow_each_other(tmp_path: Path, farm: Path) -> None:
    run_dir = go(tmp_path, farm)
    found = terms(run_dir)
    semi = {"loss_sup", "loss_unsup", "kept"}
    collect = semi | {"collected_high", "collected_low"}
    assert found == [{"loss_sup"}] * 5 + [semi] * 5 + [collect] * 5 + [semi | {"loss_proto"}] * 5
    said = (run_dir / "train.log").read_text()
    assert len(re.findall(r"prototypes from epoch 4 on: meadow \d, pond \d, barn \d", said)) == 1
    result = json.loads((run_dir / "result.json").read_text())
    assert (result["project"], result["method"], result["network"]) == ("brpg", "brpg", "teacher")
    assert result["steps"] == 20
    state = saved(run_dir)
    assert all(value.isfinite().all() for value in state["networks"]["teacher"].values())


def test_without_prototypes_the_mean_teacher_is_left(tmp_path: Path, farm: Path) -> None:
    run_dir = go(tmp_path, farm, "method.prototypes=false", "optim.epochs=2")
    assert terms(run_dir)[5:] == [{"loss_sup", "loss_unsup", "kept"}] * 5
    state = saved(run_dir)
    assert not any(key.startswith("memory.") for key in state["method"])
    assert not state["method"]["prototypes.real"].any()
    assert json.loads((run_dir / "result.json").read_text())["method"] == "mean_teacher"


def test_up_to_the_collection_the_switch_changes_nothing(tmp_path: Path, farm: Path) -> None:
    """The plug-in adds to the mean teacher; it does not alter it."""
    runs = []
    for switch in ("true", "false"):
        (tmp_path / switch).mkdir()
        runs.append(go(tmp_path / switch, farm, f"method.prototypes={switch}", "run.max_steps=10"))
    assert lines(runs[0]) == lines(runs[1])
    assert not differences(saved(runs[0])["networks"], saved(runs[1])["networks"])


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({}, 6),
        ({"collect_confidence": "high"}, 3),
        ({"collect_confidence": "low"}, 3),
        ({"adaptive": False}, 4),
        ({"adaptive": False, "collect_confidence": "high", "high_prototypes": 1}, 1),
        ({"adaptive": False, "prototype_kind": "random"}, 4),
    ],
    ids=str,
)
def test_ablations_decide_the_number_of_prototypes(
    tmp_path: Path, farm: Path, changes: dict[str, Any], most: int
) -> None:
    method = toys.tree(farm)["method"] | {"collect_start": 1} | changes
    state = saved(go(tmp_path, farm, "run.max_steps=11", method=method, optim={"epochs": 3}))
    real = state["method"]["prototypes.real"]
    assert real.shape == (3, most)
    assert real.any(dim=1).all()
    if method.get("adaptive", True):
        assert (real.sum(dim=1) == most).any() or most == 6
    else:
        assert real.all()


@pytest.mark.parametrize(
    "changes",
    [
        {"high_threshold": 1.0, "pseudo_threshold": 1.0, "pseudo_threshold_end": 1.0, "low_threshold": 1.0},
        {"high_threshold": 1.0, "pseudo_threshold": 1.0, "pseudo_threshold_end": 1.0, "scarce_queue": True},
        {"drop_percent": 0.0},
    ],
    ids=("no features at all", "low-confidence features alone", "no pseudo-labels"),
)
def test_scarcity_is_no_accident(tmp_path: Path, changes: dict[str, Any]) -> None:
    """One labeled photo, classes without features, pixels without pseudo-labels: every loss stays finite."""
    alone = write_dataset(tmp_path / "alone", labeled=1)
    run_dir = go(tmp_path, alone, method=toys.tree(alone)["method"] | changes)
    for line in lines(run_dir):
        assert all(torch.tensor(value).isfinite() for value in line.values() if isinstance(value, float))
    assert sum(line.get("nonfinite", 0) for line in lines(run_dir)) == 0
    if "high_threshold" in changes:
        late = [line for line in lines(run_dir) if "loss_proto" in line]
        assert len(late) == 5
        assert all((line["loss_proto"] == 0) is ("scarce_queue" not in changes) for line in late)


def test_too_few_features_stop_with_the_remedy(tmp_path: Path, farm: Path) -> None:
    high = ("method.high_threshold=1", "method.pseudo_threshold=1")
    with pytest.raises(UserError, match=r"clustering: class 'meadow' has 0 features .*scarce_classes=fewer"):
        go(tmp_path, farm, "method.scarce_classes=stop", *high)


def test_average_from_the_start(tmp_path: Path, farm: Path) -> None:
    """The teacher comes into use as an average; the original's as a copy."""
    teachers = {}
    for average in ("true", "false"):
        (tmp_path / average).mkdir()
        run_dir = go(tmp_path / average, farm, f"method.average_from_start={average}", "run.max_steps=5")
        state = saved(run_dir)["networks"]
        teachers[average] = differences(state["student"], state["teacher"])
        fresh = train.set_up(load_config(Config, tmp_path / average / "c.yaml"), Dist()).nets.teacher
        moved = differences(
            {k: v for k, v in fresh.state_dict().items() if "running" not in k and "batches" not in k},
            {k: v for k, v in state["teacher"].items() if "running" not in k and "batches" not in k},
        )
        assert bool(moved) is (average == "true")
    assert all(teachers.values())


def test_evaluation_within_epochs(tmp_path: Path, farm: Path) -> None:
    run_dir = go(tmp_path, farm, "eval.every_steps=3", "eval.every_epochs=0", "run.max_steps=17")
    assert [line["step"] for line in lines(run_dir) if "miou" in line] == [4, 7, 10, 13, 16]
    said = (run_dir / "train.log").read_text()
    assert "epoch 1, step 4: student mIoU" in said
    assert "epoch 2, step 7: teacher mIoU" in said
    assert saved(run_dir, "best.pt")["step"] >= 7  # the student of the supervised epochs is no candidate


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(tmp_path: Path, farm: Path, precision: str) -> None:
    small = ("data.crop_size=[17,17]", "optim.batch_size=5", "optim.lr=0.001")  # CPUs are slow in it
    run_dir = go(tmp_path, farm, f"run.precision={precision}", *small)
    found = [line for line in lines(run_dir) if "loss" in line]
    assert all(torch.tensor(line["loss"]).isfinite() for line in found)
    state = saved(run_dir)
    assert all(v.dtype in (torch.float32, torch.int64) for v in state["networks"]["student"].values())
    assert (state["scaler"] != {}) is (precision == "fp16")


def test_accumulated_forwards_are_one_step(tmp_path: Path, farm: Path) -> None:
    run_dir = go(tmp_path, farm, optim={"batch_size": 4, "device_batch": 2, "lr": 0.01, "epochs": 4})
    assert json.loads((run_dir / "result.json").read_text())["steps"] == 8
    assert [len(found) for found in terms(run_dir)] == [1, 1, 3, 3, 5, 5, 4, 4]


@pytest.mark.parametrize("overrides", [(), ("method.prototypes=false",), ("method.mode=sup_only",)])
def test_dry_run_leaves_nothing(
    tmp_path: Path, farm: Path, capsys: pytest.CaptureFixture[str], overrides: tuple[str, ...]
) -> None:
    config = toys.write_config(tmp_path / "c.yaml", farm)
    run_dir = tmp_path / "run"
    assert train.main(["--config", str(config), f"run.dir={run_dir}", "run.dry_run=true", *overrides]) == 0
    assert "dry run: peak memory" in capsys.readouterr().out
    assert not run_dir.exists()


# --- networks --------------------------------------------------------------------------------------------------


def xception_config(**quirks: bool) -> Config:
    tree = toys.tree("shapes", "none", model={"backbone": "xception65", "width": 8, "multi_grid": [2, 2, 4]})
    return build(Config, tree | {"quirks": quirks})


@pytest.mark.parametrize("own", [True, False])
def test_xception_of_the_teacher_on_several_gpus(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """QUIRK quirks.own_xception_statistics."""
    monkeypatch.setattr(placing, "wrapped", lambda network, *_, **__: network)
    monkeypatch.setattr(student_teacher, "synchronized", lambda *_: True)
    nets = model.build_networks(xception_config(own_xception_statistics=own), 3, Dist(world_size=2))

    def kinds(network: nn.Module) -> set[type]:
        return {type(m) for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}

    assert kinds(nets.student) == kinds(nets.teacher.decoder) == {nn.SyncBatchNorm}
    assert kinds(nets.teacher.encoder) == {nn.BatchNorm2d if own else nn.SyncBatchNorm}
    assert nets.unsynchronized == ((nets.teacher.encoder,) if own else ())
    momenta = {m.momentum for m in nets.student.encoder.modules() if isinstance(m, nn.SyncBatchNorm)}
    assert momenta == {0.0003}


@pytest.mark.parametrize("backbone", ["resnet_tiny", "xception65"])
def test_own_statistics_of_processes_without_synchronization(
    backbone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placing, "wrapped", lambda network, *_, **__: network)
    cfg = xception_config() if backbone == "xception65" else toys.config("shapes", "none")
    nets = model.build_networks(cfg, 3, Dist(world_size=2))
    assert nets.unsynchronized == (nets.student, nets.teacher)
    shared: list[nn.Module] = []
    monkeypatch.setattr(placing, "broadcast_buffers", lambda part, dist: shared.append(part))
    nets.share_statistics(Dist(world_size=2))
    assert shared == [nets.student, nets.teacher]
    assert model.build_networks(cfg, 3, Dist()).unsynchronized == ()


def test_statistics_are_shared_before_every_step(
    tmp_path: Path, farm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(
        student_teacher.StudentTeacher, "share_statistics", lambda nets, dist: calls.append(dist.rank)
    )
    go(tmp_path, farm, "run.max_steps=7")
    assert len(calls) == 7 + 1  # and before the evaluation


@pytest.mark.parametrize("rectified", [True, False])
def test_shortcut_of_xception(rectified: bool) -> None:
    """QUIRK quirks.rectified_shortcut: the same weights, another network."""
    torch.manual_seed(0)
    cfg = xception_config(rectified_shortcut=rectified)
    encoder = model.build_student(cfg, 3).encoder.eval()
    other = Xception65(16, 8, True).eval()
    load_state(other, encoder.state_dict(), source="test")
    x = torch.randn(1, 3, 33, 33)
    assert torch.equal(encoder(x)[3], other(x)[3]) is rectified


def test_teacher_is_a_network_of_its_own() -> None:
    torch.manual_seed(0)
    cfg = toys.config("shapes", "none")
    nets = model.build_networks(cfg, 3, Dist())
    assert not any(p.requires_grad for p in nets.teacher.parameters())
    assert differences(nets.student.state_dict(), nets.teacher.state_dict())
    alone = model.build_networks(toys.config("shapes", "none", method={"mode": "sup_only"}), 3, Dist())
    assert alone.teacher is None
    assert "representation" not in alone.student.decoder._modules


def test_xception_weights(tmp_path: Path) -> None:
    """What the file lacks keeps its value, counters of another framework are dropped, strangers are refused."""
    cfg = xception_config()
    run = toys.run_of(cfg, model.build_networks(cfg, 3, Dist()), None)
    nets, log = run.nets, RunLog(None, Dist(), total_steps=1, images_per_step=1)
    theirs = {k: v + 1 for k, v in Xception65(16, 8).state_dict().items() if v.is_floating_point()}
    missing = [theirs.pop(key) for key in list(theirs)[-1:]]
    path = tmp_path / "xception.pth"
    torch.save(theirs | {"itr": torch.zeros(1), "bn1.num_batches_tracked": torch.tensor(3)}, path)
    run.cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, weights=str(path)))
    run.load_backbone(log)
    assert missing
    for network in (nets.student, nets.teacher):
        state = network.encoder.state_dict()
        assert all(torch.equal(state[key], value) for key, value in theirs.items())
    torch.save(theirs | {"fc.weight": torch.zeros(3)}, path)
    with pytest.raises(UserError, match=r"1 tensors have no place in xception65, the first is fc\.weight"):
        run.load_backbone(log)
    run.cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, weights="nowhere.pth"))
    with pytest.raises(UserError, match=r"model\.weights=nowhere\.pth"):
        run.load_backbone(log)


# --- rules across settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.epochs=1", "'method.sup_only_epochs' is 1; expected less than optim.epochs=1"),
        ("method.collect_epochs=2", "'method.collect_start' + 'method.collect_epochs' is 4"),
        ("method.collect_start=0", "'collect_start' is 0; expected sup_only_epochs=1 or more"),
        ("eval.every_steps=-1", "'every_steps' is -1; expected 0 or more"),
        ("method.collect_confidence=medium", "expected one of both, high, low"),
    ],
)
def test_rules_across_settings(tmp_path: Path, override: str, words: str) -> None:
    path = toys.write_config(tmp_path / "c.yaml", "shapes", "none")
    with pytest.raises(UserError) as caught:
        load_config(Config, path, [override])
    assert words in str(caught.value)


@pytest.mark.parametrize("override", ["optim.epochs=1", "method.collect_epochs=2", "method.collect_start=0"])
def test_stages_do_not_concern_supervised_only_runs(tmp_path: Path, override: str) -> None:
    path = toys.write_config(tmp_path / "c.yaml", "shapes", "none")
    load_config(Config, path, [override, "method.mode=sup_only"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prototype_kind": "random", "collect_confidence": "high"}, "'collect_confidence' is 'high'; expected both"),
        ({"contra_weight": 1.0, "prototypes": False}, "'contra_weight' needs prototypes=true"),
        ({"collect_confidence": "high", "high_prototypes": 0}, "at least one of them"),
    ],
)  # fmt: skip
def test_switches_that_contradict_each_other(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MethodConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fix_classes": [3]}, r"method\.fix_classes: class 3 does not exist; the dataset has 0 to 2"),
        ({"paste_ignore": [0, 4]}, r"method\.paste_ignore: class 4 does not exist"),
        ({"contra_weight": 1.0}, r"method\.low_rank=3, method\.high_rank=20: no rank of 3 classes"),
    ],
)
def test_classes_that_the_dataset_lacks(farm: Path, changes: dict[str, Any], words: str) -> None:
    method = toys.tree(farm)["method"] | changes
    with pytest.raises(UserError, match=words):
        train.set_up(toys.config(farm, method=method), Dist())


def test_without_prototypes_the_stages_do_not_matter() -> None:
    method = MethodConfig(prototypes=False, sup_only_epochs=4)
    state = MethodState(method, 3, 4)
    assert state.memory is None
    cfg = toys.settings(method, epochs=9)
    run = toys.run_of(cfg, model.build_networks(cfg, 3, Dist()), state)
    assert not clustering_due(toys.at(2, length=5, epochs=9), run)


@pytest.mark.parametrize(("world", "words"), [(1, "proto_weight=0.25"), (4, None)])
def test_deviations_are_announced(world: int, words: str | None) -> None:
    cfg = load_config(Config, CONFIGS / "voc_classic_366_r101.yaml")
    said = deviations(cfg, world)
    if words is None:
        assert said == []
    else:
        assert any(words in line for line in said)
        assert any("entropy percentiles are taken per forward of 4 images" in line for line in said)
        assert any("OHEM" in line for line in said)


# --- short runs --------------------------------------------------------------------------------------------------


def test_short_settings_differ_in_the_prototypes_alone() -> None:
    """The comparison with and without the plug-in is one of a single switch."""
    full, bare = (load_config(Config, CONFIGS / f"{n}.yaml") for n in ("shapes", "shapes_no_prototypes"))
    sup = load_config(Config, CONFIGS / "shapes_sup.yaml")
    for section in ("data", "model", "eval", "quirks"):
        assert getattr(full, section) == getattr(bare, section)
    assert full.optim == bare.optim
    assert full.method.prototypes
    assert not bare.method.prototypes
    with_, without = (dataclasses.asdict(cfg.method) for cfg in (full, bare))
    of_the_prototypes = {
        "prototypes",
        "proto_weight",
        "collect_start",
        "collect_epochs",
        "queue_size",
        "scarce_classes",
    }
    assert {key for key in with_ if with_[key] != without[key]} <= of_the_prototypes
    for section in ("data", "model"):
        assert getattr(sup, section) == getattr(full, section)
    assert (sup.method.ce_weight, sup.method.ohem_weight) == (full.method.ce_weight, full.method.ohem_weight)
