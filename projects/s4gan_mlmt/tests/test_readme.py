"""The README says what is there: switches, quirks, figures, commands, places in the code."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from common.config import load_config
from projects.s4gan_mlmt.compat import evaluate, train_mlmt, training
from projects.s4gan_mlmt.config import Config, QuirkConfig, S4GanDataConfig
from projects.s4gan_mlmt.mlmt.config import MlmtConfig

PROJECT = Path(__file__).resolve().parents[1]
README = (PROJECT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {s.name: training.parser(s) for s in (training.FULL, training.S4GAN, training.WRN38)} | {
    "evaluate.py": evaluate.parser(), "train_mlmt.py": train_mlmt.parser(),
}  # fmt: skip


def section(title: str) -> str:
    return README.split(f"## {title}")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


# --- quirks ----------------------------------------------------------------------------------------------------


def quirks() -> dict[str, str]:
    """What the table says of each name."""
    table = rows(section("Quirks"))[1:]
    found = {cells[0].strip("`"): cells[1].strip("`") for cells in table}
    assert len(found) == len(table) == 30
    return found


def test_every_switch_is_explained_with_its_default() -> None:
    found = {name: default for name, default in quirks().items() if "." in name}
    expected = {
        f"quirks.{field.name}": str(getattr(QuirkConfig(), field.name)).lower()
        for field in dataclasses.fields(QuirkConfig)
    }
    data, mlmt = S4GanDataConfig(dataset="voc", split="x"), MlmtConfig()
    others = {
        "data.random_scale": data.random_scale, "data.random_mirror": data.random_mirror,
        "mlmt.flat_roll": mlmt.flat_roll, "mlmt.copy_teacher": mlmt.copy_teacher, "keep.original_every": 0,
    }  # fmt: skip
    assert found == expected | {key: str(value).lower() for key, value in others.items()}


def test_every_switch_has_a_tag_where_it_acts_and_the_code_names_no_other_quirk() -> None:
    files = [path for path in PROJECT.rglob("*.py") if "tests" not in path.parts]
    named = set(re.findall(r"QUIRK ([\w.]+): ", "".join(path.read_text(encoding="utf-8") for path in files)))
    assert named <= set(quirks())
    assert named >= {name for name in quirks() if name.startswith(("quirks.", "mlmt."))}


# --- figures ---------------------------------------------------------------------------------------------------

LABELS = {"supervised only": "_sup", "s4GAN": "", "s4GAN + MLMT": "_mlmt"}
UNVERIFIED = "by the paper's table as remembered, not verified; no figure to check against"


@pytest.mark.parametrize(
    ("title", "stem", "counts"),
    [
        ("Pascal VOC, ImageNet", "voc_{}_r101", ("211", "529", "1322", "full")),
        ("Pascal VOC, COCO", "voc_{}_r101_coco", ("211", "529", "1322", "full")),
        ("PASCAL-Context", "pascal_context_{}_r101", ("624", "1249", "full")),
        ("Cityscapes", "cityscapes_{}_r101", ("371", "743", "full")),
    ],
)
def test_published_figures_are_those_of_the_configs(title: str, stem: str, counts: tuple[str, ...]) -> None:
    """Bold is what a run is compared with; what is not verified is not."""
    table = rows(section("Published results").split(f"| {title} ")[1].split("\n\n")[0])
    shown = {cells[0]: [cell.strip(" |") for cell in cells[1:]] for cells in table if cells[0] in LABELS}
    assert len(shown) >= 2
    for label, cells in shown.items():
        expected = []
        for count in counts:
            expect = load_config(
                Config, PROJECT / "configs" / f"{stem.format(count)}{LABELS[label]}.yaml"
            ).expect
            quoted = re.fullmatch(rf"([\d.]+) {re.escape(UNVERIFIED)}", expect.source)
            plain = f"{float(quoted[1]):.1f}" if quoted else "-"
            expected.append(plain if expect.miou is None else f"**{expect.miou:.1f}**")
        assert cells == expected, label


# --- commands --------------------------------------------------------------------------------------------------


def test_commands_name_files_that_exist() -> None:
    files = re.findall(
        r"(?:configs/[\w.]+|\b(?:train|eval|slurm_train)\.sh|\b\w+\.py\b)", section("Commands")
    )
    assert len(files) > 15
    for name in files:
        assert (PROJECT / name).is_file(), name


def original_commands() -> list[tuple[str, list[str]]]:
    blocks = re.findall(r"```sh\n(.*?)```", section("Commands"), flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [(w[1], w[2:]) for w in words if w[0] == "python" and w[1] in SCRIPTS]


def test_the_originals_commands_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = original_commands()
    assert [name for name, _ in commands] == [
        "train_full.py", "train_s4GAN.py", "evaluate.py", "train_mlmt.py", "evaluate.py", "train_s4GAN.py",
        "train_s4GAN_wrn38.py",
    ]  # fmt: skip
    for name, words in commands:
        args = SCRIPTS[name].parse_intermixed_args(words)
        assert args.overrides == []


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_help_can_be_printed(name: str) -> None:
    text = SCRIPTS[name].format_help()
    assert name in text
    assert "section.key=value" in text


def test_flags_without_effect_are_those_of_the_readme() -> None:
    text = section("Commands").split("Accepted without effect")[1].split("Here `")[0]
    assert set(re.findall(r"`(--[\w-]+)`", text)) == {
        "--model", "--ignore-label", "--eta-min-factor", "--out", "--restore-from"
    }  # fmt: skip


# --- code ------------------------------------------------------------------------------------------------------


def definitions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_named_places_in_the_code_exist() -> None:
    text = re.sub(r"\n +", " ", section("Implementation details"))
    places = re.findall(r"`([\w/]+\.py): ([\w, ]+)`", text)
    assert len(places) >= 12
    for file, names in places:
        assert {name.strip() for name in names.split(",")} <= definitions(PROJECT / file), (file, names)
