"""Conversion of the authors' checkpoints: what holds for all projects, and for those with a student and a teacher.

Scores of converted networks and what only one project's files hold are tested in its own `test_convert.py`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from common.config import load_config, to_dict
from common.data.dataset_yaml import load_spec
from common.distributed import Dist
from common.errors import UserError
from common.run.checkpoint import describe
from tests.conversions import Converter, Trap, authors_file, parallel, same

ROOT = Path(__file__).resolve().parents[1]
PROJECTS = sorted(path.parent.name for path in ROOT.glob("projects/*/convert.py"))


class Project:
    """The modules of a project that take part, and its small configuration."""

    def __init__(self, name: str) -> None:
        self.configs = ROOT / "projects" / name / "configs"
        self.reads = "file" if name == "proto_consistency" else "weight file"  # it knows three formats
        self.smoke = self.configs / "smoke.yaml"
        self.convert = self._module(name, "convert")
        self.model, self.state, config = (self._module(name, part) for part in ("model", "state", "config"))
        self.config_class: Any = config.Config

    @staticmethod
    def _module(name: str, part: str) -> ModuleType:
        return importlib.import_module(f"projects.{name}.{part}")

    def tiny(self, seed: int, config: str = "smoke.yaml") -> dict[str, Tensor]:
        """Weights of a small network."""
        torch.manual_seed(seed)
        return self.model.build_student(load_config(self.config_class, self.configs / config), 5).state_dict()


@pytest.fixture(scope="module")
def project(request: pytest.FixtureRequest) -> Project:
    return Project(request.param)


@pytest.fixture
def converted(project: Project) -> Converter:
    return Converter(project.convert.main, project.smoke)


all_projects = pytest.mark.parametrize("project", PROJECTS, indirect=True)
student_and_teacher = pytest.mark.parametrize("project", ["brpg", "u2pl"], indirect=True)


@all_projects
def test_files_that_could_run_code_are_refused(converted: Converter, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1), "trap": Trap(tmp_path / "ran")}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth: .*save it as a plain state dict"):
        converted(tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "converted.pt").exists()


@all_projects
def test_mistakes_on_the_command_line_and_damaged_files_are_named(
    project: Project, converted: Converter, tmp_path: Path
) -> None:
    full, short, absent = (tmp_path / f"{name}.pth" for name in ("full", "short", "absent"))
    torch.save({"a": torch.zeros(2000)}, full)
    before = full.read_bytes()
    short.write_bytes(before[:5000])
    converted.refuses(
        [
            (full, ["--out", str(full)], "full.pth: is the source; choose another file"),
            (full, ["optim.momentun=1"], "did you mean 'optim.momentum'?"),
            (short, [], "short.pth: damaged or not a file of tensors"),
            (absent, [], f"absent.pth: no such {project.reads}"),
        ]
    )
    assert full.read_bytes() == before


@student_and_teacher
def test_student_and_teacher_keep_their_weights(
    project: Project, converted: Converter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, teacher = project.tiny(1), project.tiny(2)
    source = authors_file(tmp_path / "a.pth", model_state=parallel(student), teacher_state=parallel(teacher))
    saved = converted(source)
    assert same(saved["networks"]["student"], student)
    assert same(saved["networks"]["teacher"], teacher)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == (
        f"student: {source}[model_state]: {len(student)} tensors used, 0 unused, 0 kept their initial values"
    )
    assert shown[1].startswith(f"teacher: {source}[teacher_state]: {len(teacher)} tensors used")
    assert shown[2] == f"{tmp_path / 'converted.pt'}: written (student, teacher)"


@student_and_teacher
def test_keys_without_the_prefix_of_parallel_training(
    project: Project, converted: Converter, tmp_path: Path
) -> None:
    weights = project.tiny(3)
    torch.save(weights, tmp_path / "bare.pth")
    saved = converted(tmp_path / "bare.pth")
    assert same(saved["networks"]["student"], weights)
    assert same(saved["networks"]["teacher"], weights)


@student_and_teacher
def test_supervised_only_file_gives_a_student(project: Project, converted: Converter, tmp_path: Path) -> None:
    weights = project.tiny(4, "smoke_sup.yaml")
    source = authors_file(tmp_path / "a.pth", model_state=parallel(weights))
    saved = converted(source, config=project.configs / "smoke_sup.yaml")
    assert list(saved["networks"]) == ["student"]
    assert same(saved["networks"]["student"], weights)


@student_and_teacher
def test_result_describes_itself_as_a_checkpoint_of_training(
    project: Project, converted: Converter, tmp_path: Path
) -> None:
    weights = project.tiny(5)
    saved = converted(authors_file(tmp_path / "a.pth", model_state=weights, teacher_state=weights))
    cfg, spec = load_config(project.config_class, project.smoke), load_spec("shapes")
    network = project.model.build_student(cfg, 5)
    nets = project.model.Networks(network, network, network, project.model.build_criterion(cfg))
    run = project.state.Run(cfg, Dist(), None, nets, None, None, None, None)
    trained = describe(project.state.PROJECT, cfg, spec, run.step, run.weights())
    assert saved.keys() == trained.keys()
    assert {key: saved[key] for key in saved if key != "networks"} == {
        key: trained[key] for key in trained if key != "networks"
    }
    assert saved["config"] == to_dict(cfg)
    run.load_networks(saved, "converted.pt")  # as run.init does
    assert same(network.state_dict(), weights)


@student_and_teacher
def test_report_lists_every_key(project: Project, converted: Converter, tmp_path: Path) -> None:
    weights = parallel(project.tiny(6))
    del weights["module.encoder.bn1.num_batches_tracked"]  # as files from before these counters existed
    extra = weights | {"module.encoder.fc.weight": torch.zeros(3, 3)}
    source = authors_file(tmp_path / "a.pth", model_state=weights, teacher_state=extra)
    saved = converted(source, "--report", str(tmp_path / "report.txt"))
    lines = (tmp_path / "report.txt").read_text(encoding="utf-8").splitlines()
    parts = "\n".join(lines).split("# teacher from ")
    keys = [key.removeprefix("module.") for key in weights]
    assert parts[0].splitlines() == [
        f"# student from {source}[model_state]",
        *(f"used\t{key}" for key in keys),
    ]
    assert sorted(parts[1].splitlines()[1:]) == sorted(
        [*(f"used\t{key}" for key in keys), "unused\tencoder.fc.weight"]
    )
    assert "encoder.fc.weight" not in saved["networks"]["teacher"]


@student_and_teacher
def test_files_of_another_network_name_the_setting(
    project: Project, converted: Converter, tmp_path: Path
) -> None:
    weights = parallel(project.tiny(8))
    backbone = {key: value for key, value in weights.items() if ".encoder." in key}
    without_head = {key: value for key, value in weights.items() if ".representation." not in key}
    incomplete = {key: value for key, value in weights.items() if key != "module.decoder.low_conv.0.weight"}
    full = authors_file(tmp_path / "full.pth", model_state=weights, teacher_state=weights)
    converted.refuses(
        [
            (full, ["data.dataset=voc"], "full.pth[model_state]: scores 5 classes, dataset 'voc' of"),
            (full, ["method.mode=sup_only"], "has the representation head"),
            (full, ["method.mode=sup_only"], "set method.mode=semi"),
            (full, ["model.aux_weight=0.4"], "lacks the auxiliary head that"),
            (full, ["model.aux_weight=0.4"], "set model.aux_weight=0"),
            (full, ["model.inner_planes=8"], "do not fit (file vs network)"),
            (authors_file(tmp_path / "sup.pth", model_state=without_head), [], "set method.mode=sup_only"),
            (authors_file(tmp_path / "backbone.pth", model_state=backbone), [], "holds a backbone only"),
            (authors_file(tmp_path / "part.pth", model_state=incomplete), [],
             f"1 of {len(weights)} tensors are not in the file: decoder.low_conv.0.weight"),
            (authors_file(tmp_path / "none.pth"), [],
             "none.pth: holds epoch, optimizer_state, best_miou, but no network"),
        ]
    )  # fmt: skip
