"""What tests of the projects' READMEs share."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path


def section(readme: str, title: str) -> str:
    """The text below a heading `## title`."""
    return readme.split(f"## {title}")[1].split("\n## ", maxsplit=1)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of all tables, heads included."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def assert_switches_are_explained(readme: str, quirks: type) -> None:
    """Every switch stands in the table of quirks with its default, and no other."""
    listed = [cells[:2] for cells in rows(section(readme, "Quirks")) if "quirks." in cells[0]]
    switches = {f"`quirks.{field.name}`": field.name for field in dataclasses.fields(quirks)}
    defaults = {key: f"`{str(getattr(quirks(), name)).lower()}`" for key, name in switches.items()}
    assert len(listed) == len(defaults)
    assert dict(listed) == defaults


def assert_quirks_of_the_code_are_listed(readme: str, project: Path) -> None:
    """Whatever the code marks as a quirk stands in the table of quirks."""
    listed = {cells[0].strip("`") for cells in rows(section(readme, "Quirks"))}
    text = "".join(path.read_text(encoding="utf-8") for path in project.rglob("*.py"))
    named = set(re.findall(r"QUIRK ([\w.]+\w)", text))
    assert len(named) > 5
    assert named <= listed
