"""The README says what is there: switches, figures, commands, places in the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from common.config import load_config
from projects.unimatch.config import Config, QuirkConfig
from tests import readmes
from tests.each import for_each
from tests.readmes import rows

PROJECT = Path(__file__).resolve().parents[1]
README = (PROJECT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return readmes.section(README, title)


def test_every_switch_is_explained_with_its_default() -> None:
    readmes.assert_switches_are_explained(README, QuirkConfig)


def test_every_quirk_of_the_code_is_listed() -> None:
    readmes.assert_quirks_of_the_code_are_listed(README, PROJECT)


VOC, CITY = ("92", "183", "366", "732", "1464"), ("186", "372", "744", "1488")
COCO, ADE = ("1_512", "1_256", "1_128", "1_64", "1_32"), ("1_64", "1_32", "1_16", "1_8", "1_4")
BLENDED = ("662", "1323", "2646")
SMALL, BASE = "dinov2_small", "dinov2_base"
# by the beginning of a table: the parts of its columns, and names of the configurations of its rows
TABLES = {
    "V1, Pascal classic": (VOC, ["voc_classic_{}_r101", "voc_classic_{}_r101_sup", "voc_classic_{}_r50"]),
    "V1, Pascal blended": (BLENDED, ["voc_blended_{}_r101", "voc_u2pl_{}_r101", "voc_u2pl_{}_r50"]),
    "V1, Cityscapes": (CITY, [f"cityscapes_{{}}_{net}{kind}" for net in ("r50", "r101") for kind in ("", "_sup")]),
    "V1, COCO": (COCO, ["coco_{}_x65", "coco_{}_x65_sup"]),
    "V2, Pascal classic": (
        VOC,
        [
            f"voc_classic_{{}}_{name}"
            for name in (
                SMALL, f"{SMALL}_sup", BASE, f"{BASE}_frozen", f"{BASE}_fixmatch", f"{BASE}_sup", "dinov2_large"
            )
        ],
    ),
    "V2, Cityscapes": (CITY, [f"cityscapes_{{}}_{name}{kind}" for name in (SMALL, BASE) for kind in ("", "_sup")]),
    "V2, COCO": (COCO, [f"coco_{{}}_{name}" for name in (SMALL, BASE, f"{BASE}_sup")]),
    "V2, ADE20K": (ADE, [f"ade20k_{{}}_{name}" for name in (SMALL, BASE, f"{BASE}_sup")]),
}  # fmt: skip


@for_each("title", TABLES)
def test_published_figures_are_those_of_the_configs(title: str) -> None:
    table = section("Published results").split(f"| {title}")[1].split("\n\n")[0]
    parts, stems = TABLES[title]
    shown = [cells[1:] for cells in rows(table) if not cells[1].startswith("1/")]
    shown = [[cell.strip(" |") for cell in cells] for cells in shown if cells[0] != ""]
    assert len(shown) == len(stems)
    for cells, stem in zip(shown, stems, strict=True):
        paths = [PROJECT / "configs" / f"{stem.format(part)}.yaml" for part in parts]
        assert cells == [f"{load_config(Config, path).expect.miou:.2f}" for path in paths], stem


def test_commands_name_files_that_exist() -> None:
    files = re.findall(
        r"(?:configs/[\w.]+|\b(?:train|eval|slurm_train)\.sh|\b\w+\.py\b)", section("Commands")
    )
    assert len(files) > 10
    for name in files:
        assert (PROJECT / name).is_file(), name


def definitions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_named_places_in_the_code_exist() -> None:
    text = section("Where the losses are") + section("Implementation details").replace("\n    ", " ")
    places = re.findall(r"`(\w+\.py): ([\w, ]+)`", text.replace("\n   ", " "))
    assert len(places) >= 15
    for file, names in places:
        if (PROJECT / file).is_file():
            assert {name.strip() for name in names.split(",")} <= definitions(PROJECT / file), (file, names)
