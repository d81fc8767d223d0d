"""Configurations of all projects: resolved values, headers, command line.

A changed default shows up as a difference to the recorded tree of every configuration it touches. When the change is
meant, record the trees of the project anew and look at the difference before committing it:

    python -m projects.u2pl.tests.test_configs

Splits, figures and arithmetic of the papers are tested by the projects' own `test_configs.py`.
"""

from __future__ import annotations

import importlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from common.config import dump, load_config, to_dict
from common.errors import UserError
from tests.configurations import ROOT, configs, folder, header, trees
from tests.each import for_each

# lines that a configuration may have
LONGEST = {"brpg": 36, "cps": 32, "proto_consistency": 33, "s4gan_mlmt": 45, "u2pl": 32, "unimatch": 32}
# figures of the other two come from more than one table; their own tests know the words
FIGURES_OF_ONE_PAPER = ("brpg", "proto_consistency", "u2pl", "unimatch")
FIRST_LINES = {
    "brpg": "Train BRPG, its mean teacher alone, or its supervised-only baseline.",
    "proto_consistency": "Train prototype consistency, or the supervised stage before it.",
    "u2pl": "Train U2PL or its supervised-only baseline.",
    "unimatch": "Train UniMatch V1 or V2, FixMatch, or their supervised-only baseline.",
}

all_projects = for_each("project", LONGEST)
all_configs = for_each(
    ("project", "path"), [(project, path) for project in LONGEST for path in configs(project)]
)


def config_class(project: str) -> Any:
    return importlib.import_module(f"projects.{project}.config").Config


def train(project: str, *arguments: str) -> int:
    return importlib.import_module(f"projects.{project}.train").main(list(arguments))


@cache
def resolved(project: str, path: Path) -> Any:
    return load_config(config_class(project), path)


def test_every_project_is_here() -> None:
    assert sorted(LONGEST) == sorted(path.parent.name for path in ROOT.glob("projects/*/train.py"))


# --- files -----------------------------------------------------------------------------------------------------


@all_configs
def test_resolved_tree_is_the_recorded_one(project: str, path: Path) -> None:
    recorded = json.loads((trees(project) / f"{path.stem}.json").read_text(encoding="utf-8"))
    assert to_dict(resolved(project, path)) == recorded


@all_projects
def test_no_recorded_tree_without_a_config(project: str) -> None:
    recorded = sorted(path.stem for path in trees(project).glob("*.json"))
    assert recorded == [path.stem for path in configs(project)]


@all_configs
def test_resolved_tree_is_a_config_again(project: str, path: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump(resolved(project, path)), encoding="utf-8")
    again = load_config(config_class(project), tmp_path / "config.yaml")
    assert again == resolved(project, path)


@all_configs
def test_header_gives_the_command(project: str, path: Path) -> None:
    command = header(path)["command"]
    found = re.fullmatch(r"(?:SSS_DATA=\S+ )?sh train\.sh (\d+) \d+ (configs/\S+)", command)
    assert found, command
    assert found[2] == f"configs/{path.name}"
    assert int(found[1]) == (resolved(project, path).optim.paper_processes or 1)


@for_each(
    ("project", "path"),
    [(project, path) for project in FIGURES_OF_ONE_PAPER for path in configs(project)],
)
def test_header_gives_the_published_figure(project: str, path: Path) -> None:
    facts, expected = header(path), resolved(project, path).expect
    if expected.miou is None:
        assert facts["miou"].startswith("none")
    else:
        assert facts["miou"] == f"{expected.miou:.2f}, from {expected.source}"
        assert facts["hours"] == "not stated by the authors"


@for_each(
    ("project", "path"),
    [(project, path) for project in LONGEST for path in sorted((folder(project) / "configs").glob("*.yaml"))],
)
def test_configs_are_short_and_say_what_they_are(project: str, path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LONGEST[project]
    assert lines[0].startswith("# ")


# --- command line ----------------------------------------------------------------------------------------------

HELP = """\
usage: train.py [-h] --config CONFIG [section.key=value ...]

{}

positional arguments:
  section.key=value  changes to the configuration

options:
  -h, --help         show this help message and exit
  --config CONFIG    YAML file, see the folder 'configs'
"""


@for_each("project", FIRST_LINES)
def test_the_command_line_is_closed(
    project: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit) as ended:
        train(project, "--help")
    assert ended.value.code == 0
    assert capsys.readouterr().out == HELP.format(FIRST_LINES[project])


@all_projects
@for_each(
    ("override", "message"),
    [
        ("optim.momentun=0.9", "unknown key 'optim.momentun'; did you mean 'optim.momentum'?"),
        ("optimm.lr=0.1", "unknown key 'optimm'; did you mean 'optim'?"),
        ("optim.epochs=many", "'optim.epochs' is 'many'; expected a whole number"),
        ("optim.epochs=true", "'optim.epochs' is True; expected a whole number"),
        ("optim.lr=-1", "'lr' is -1.0; expected a positive number"),
        ("data.crop_size=513", "'data.crop_size' is 513; expected a list"),
        ("data.crop_size=[513]", "'data.crop_size' has 1 entries; expected 2"),
        ("lr=0.1", "'lr=0.1': not an override; write section.key=value"),
        ("data.crop_size=[1", "'data.crop_size=[1': the value is not valid YAML"),
    ],
)
def test_mistakes_in_overrides_are_named(project: str, override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        train(project, "--config", str(folder(project) / "configs" / "smoke.yaml"), override)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@all_projects
@for_each(
    ("text", "message"),
    [
        ("data: [voc]\n", "'data' is ['voc']; expected a section with keys"),
        ("just text\n", "expected 'key: value' lines, found str"),
        ("data: {dataset: voc\n", "not valid YAML"),
        ("base: smoke.yaml\nbase: other.yaml\n", "given twice"),
    ],
)
def test_mistakes_in_a_file_are_named(project: str, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        train(project, "--config", str(path))
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


@for_each("project", ["brpg", "u2pl"])
def test_a_setting_without_default_must_be_given(project: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("data: {dataset: voc, split: a}\noptim: {lr: 1e-2, epochs: 3}\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        train(project, "--config", str(path))
    assert str(error.value).startswith(f"{path}: ")
    assert "'optim.batch_size'" in str(error.value)
