"""The README says what is there: logged keys, switches, figures, commands, places in the code."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from common.config import load_config
from projects.brpg import train
from projects.brpg.config import Config
from projects.brpg.settings import QuirkConfig
from tests import readmes
from tests.readmes import rows

PROJECT = Path(__file__).resolve().parents[1]
README = (PROJECT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return readmes.section(README, title)


def logged_keys(run: Path, *overrides: str) -> set[str]:
    arguments = ["--config", str(PROJECT / "configs" / "smoke.yaml"), f"run.dir={run}", "run.panels=false"]
    assert train.main([*arguments, *overrides]) == 0
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {key for line in lines for key in json.loads(line)}


@pytest.mark.smoke
def test_logged_keys_are_those_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSS_DEVICE", "cpu")
    explained = {key for cells in rows(section("What is logged")) for key in re.findall(r"`(\w+)`", cells[0])}
    contrast = ("method.contra_weight=0.1", "method.low_rank=1", "method.scarce_queue=true")
    assert logged_keys(tmp_path / "a", *contrast) == explained - {"collected_random"}
    found = logged_keys(
        tmp_path / "b", "run.max_steps=5", "eval.every_epochs=0", "method.prototype_kind=random"
    )
    others = {"collected_high", "collected_low", "collected_scarce", "loss_contra"}
    assert found == explained - others - {"miou", "miou_present"}


def test_every_switch_is_explained_with_its_default() -> None:
    readmes.assert_switches_are_explained(README, QuirkConfig)


def test_every_quirk_of_the_code_is_listed() -> None:
    readmes.assert_quirks_of_the_code_are_listed(README, PROJECT)


@pytest.mark.parametrize(
    ("place", "stem", "parts"),
    [
        ("Pascal classic", "voc_classic_{}_r101", ("92", "183", "366", "732", "1464")),
        ("Pascal blended", "voc_blended_{}_r101", ("662", "1323", "2646", "5291")),
        ("Cityscapes", "cityscapes_{}_r101", ("186", "372", "744", "1488")),
        ("COCO", "coco_{}_x65", ("1_128", "1_64", "1_32", "1_16")),
    ],
)
def test_published_figures_are_those_of_the_configs(place: str, stem: str, parts: tuple[str, ...]) -> None:
    table = section("Published results").split(f"| {place}")[1].split("\n\n")[0]
    shown = {cells[0]: cells[1:] for cells in rows(table)}
    for label, suffix in (("BRPG", ""), ("supervised only", "_sup")):
        configs = [PROJECT / "configs" / f"{stem.format(part)}{suffix}.yaml" for part in parts]
        expected = [f"{load_config(Config, path).expect.miou:.2f}" for path in configs]
        assert [cell.strip(" |") for cell in shown[label]] == expected


def test_commands_name_files_that_exist() -> None:
    commands = section("Commands")
    files = re.findall(r"(?:configs/[\w.]+|\b(?:train|eval|slurm_train)\.sh|\b\w+\.py\b)", commands)
    assert len(files) > 10
    for name in files:
        assert (PROJECT / name).is_file(), name


def definitions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_named_places_in_the_code_exist() -> None:
    text = section("Implementation details").replace("\n    ", " ").replace("\n   ", " ")
    places = []
    for line in text.splitlines():
        ours = line.split(" -> ")[0]
        places += re.findall(r"`(\w+\.py): ([\w, ]+)`", ours)
    assert len(places) >= 10
    for file, names in places:
        found = definitions(PROJECT / file)
        assert {name.strip() for name in names.split(",")} <= found, (file, names)
