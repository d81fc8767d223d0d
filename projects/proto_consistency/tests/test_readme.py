"""The README says what is there: facts and switches, quirks, figures, commands, places in the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from common.config import load_config
from projects.proto_consistency.config import Config, MethodConfig, ProtoConfig, QuirkConfig
from tests import readmes
from tests.readmes import rows

PROJECT = Path(__file__).resolve().parents[1]
README = (PROJECT / "README.md").read_text(encoding="utf-8")
OPEN_POINTS = (
    "pixels of the pseudo-label loss",
    "divisor of the pseudo-label loss",
    "exactly at the threshold",
    "pixels of the prototype loss",
    "first prototypes",
    "first epoch of the prototypes",
    "prototypes of several processes",
    "features of the movement",
    "unlabeled pixels in the movement",
    "prototypes of the teacher",
    "share of mixed batches",
    "start of the student",
    "the stage before",
    "weight of the pseudo-label loss",
    "temperature",
    "only well classified pixels move prototypes",
    "first epoch of the teacher",
)


def section(title: str) -> str:
    return readmes.section(README, title)


def test_every_open_point_is_in_the_table() -> None:
    """All seventeen, with source, a confidence, our choice and the alternatives."""
    open_points, facts = (rows(part)[1:] for part in section("Reconstructed facts").split("### ")[1:])
    assert tuple(cells[0] for cells in open_points) == OPEN_POINTS
    for cells in open_points + facts:
        assert len(cells) == 5, cells[0]
        assert re.fullmatch(r"[HML](-[HM])?", cells[2]), cells[0]
        assert all(cells)


def test_choices_are_the_defaults() -> None:
    stated = re.findall(r"`(method(?:\.proto)?)\.(\w+): ([^`]+)`", section("Reconstructed facts"))
    assert len(stated) >= 12
    for place, name, value in stated:
        holder = ProtoConfig() if place.endswith("proto") else MethodConfig()
        default = getattr(holder, name)
        shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
        if isinstance(shown, float):
            assert float(value) == shown, name
        else:
            assert value == str(shown), name


def test_every_quirk_switch_is_explained_with_its_default() -> None:
    readmes.assert_switches_are_explained(README, QuirkConfig)


def test_every_quirk_of_the_code_is_listed() -> None:
    readmes.assert_quirks_of_the_code_are_listed(README, PROJECT)


@pytest.mark.parametrize(
    ("place", "stem", "parts"),
    [
        ("Pascal classic", "voc_classic_{}_r101", ("92", "183", "366", "732", "1464")),
        ("Cityscapes", "cityscapes_{}_r101", ("186", "372", "744", "1488")),
    ],
)
def test_figures_are_those_of_the_configurations(place: str, stem: str, parts: tuple[str, ...]) -> None:
    table = section("Published results").split(f"| {place} |")[1].split("\n\n")[0]
    figures = {cells[0]: cells[1:] for cells in rows(table)}
    for row, end in (("PCR, paper", ""), ("supervised only", "_sup")):
        for count, figure in zip(parts, figures[row], strict=True):
            cfg = load_config(Config, PROJECT / "configs" / f"{stem.format(count)}{end}.yaml")
            assert f"{cfg.expect.miou:.2f}" == figure
    for count, figure in zip(parts, figures["PCR, released"], strict=True):
        text = (PROJECT / "configs" / f"{stem.format(count)}.yaml").read_text(encoding="utf-8")
        assert f"has {figure}." in text


def test_files_and_functions_that_it_names_exist() -> None:
    for name, functions in re.findall(r"`([\w/]+\.py): ([\w, ]+)`", README):
        tree = ast.parse((PROJECT / name).read_text(encoding="utf-8"))
        defined = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        assert set(functions.split(", ")) <= defined, name
    for name in re.findall(r"`([\w/]+\.py)`", README):
        assert (PROJECT / name).is_file(), name
    for name in re.findall(r"configs/(\w+\.yaml)", README):
        assert name == "mine.yaml" or (PROJECT / "configs" / name).is_file(), name
