"""The documents say what is there: links, commands, environment variables."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "common/models/README.md",
    "splits/README.md",
    "studies/README.md",
    "docs/export.md",
    "docs/own_photos.md",
    "studies/results/README.md",
)
READ = re.compile(
    r'env(?:iron)?(?:\.\w+\(|\[)"([A-Z_]+)"|_(?:integer|number)\(env, "([A-Z_]+)"|"([A-Z_]+)" (?:not )?in (?:os\.)?env'
    r"|\$\{([A-Z_]+):-"
)
NOT_A_USERS = {
    "PATH",
    "PYTHONPATH",
    "TORCHELASTIC_USE_AGENT_STORE",
    "TEST_PROGRAM",
    "TEST_PORTS",
    "CODE",
    "PYTEST_XDIST_WORKER",
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_commands_lead_somewhere(name: str) -> None:
    path = ROOT / name
    text = path.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if not link.startswith("http")]
    assert [link for link in links if not (path.parent / link).exists()] == []
    modules = set(re.findall(r"python -m (\w[\w.]*\w)", text))
    assert [module for module in sorted(modules) if find_spec(module) is None] == []
    files = re.findall(r"(?:studies|configs)/\w+\.yaml", text)
    assert [file for file in files if not [*ROOT.glob(file), *ROOT.glob(f"projects/*/{file}")]] == []


def test_the_table_of_environment_variables_is_complete() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split("## Environment variables")[1].split("\n## ")[0]
    named = set(re.findall(r"`([A-Z_]+)`", table))
    folders = ("common", "projects", "splits", "studies", "tests", "tools")
    files = {path for folder in folders for path in (ROOT / folder).rglob("*.[ps][yh]")} - {Path(__file__)}
    source = "\n".join(path.read_text(encoding="utf-8") for path in (*files, ROOT / "noxfile.py"))
    read = {name for groups in READ.findall(source) for name in groups if name}
    assert len(read) > 30
    assert {name for name in read - named - NOT_A_USERS if not name.startswith("SLURM_")} == set()
    assert {name for name in named if name not in source} == {"UV_TORCH_BACKEND"}
