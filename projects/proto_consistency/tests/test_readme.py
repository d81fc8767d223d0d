"""The README says what is there: facts and switches, quirks, figures, commands, places in the code."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from common.config import load_config
from projects.proto_consistency.config import Config, MethodConfig, ProtoConfig, QuirkConfig

PROJECT = Path(__file__).resolve().parents[1]
README = (PROJECT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return README.split(f"## {title}")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_every_open_point_is_in_the_table() -> None:
    """All seventeen, with source, a confidence, our choice and the alternatives."""
    table = rows(section("Reconstructed facts"))[1:]
    numbers = [int(found[1]) for cells in table if (found := re.match(r"11\.(\d+) ", cells[0]))]
    assert numbers == list(range(1, 18))
    for cells in table:
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
    listed = [cells[1] for cells in rows(section("Quirks")) if "quirks." in cells[1]]
    parts = [re.fullmatch(r"`quirks\.(\w+)` \(`?(\w+)`?\)", cell) for cell in listed]
    switches = {found[1]: found[2] for found in parts if found}
    assert len(switches) == len(listed)
    assert switches == {
        field.name: str(getattr(QuirkConfig(), field.name)).lower()
        for field in dataclasses.fields(QuirkConfig)
    }


def test_every_quirk_of_the_code_is_listed() -> None:
    listed = {cells[0] for cells in rows(section("Quirks"))}
    text = "".join(path.read_text(encoding="utf-8") for path in PROJECT.glob("*.py"))
    named = set(re.findall(r"(?:proto|u2pl)-\d+", text))
    assert named
    assert named <= listed


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
    for name, functions in re.findall(r"`(\w+\.py): ([\w, ]+)`", README):
        tree = ast.parse((PROJECT / name).read_text(encoding="utf-8"))
        defined = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        assert set(functions.split(", ")) <= defined, name
    for name in re.findall(r"`(\w+\.py)`", README):
        assert (PROJECT / name).is_file(), name
    for name in re.findall(r"configs/(\w+\.yaml)", README):
        assert name == "mine.yaml" or (PROJECT / "configs" / name).is_file(), name
