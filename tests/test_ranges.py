"""Every number of every configuration has a range where it is declared; reader and editor schema refuse alike."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import math
import random
import re
import shutil
import types
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import jsonschema
import pytest
import yaml

from common.config import from_tree, load_config, read_config, to_dict
from common.errors import UserError
from tests.configurations import ROOT, configs, folder, trees
from tests.each import for_each
from tools import schema

PROJECTS = sorted(path.parent.name for path in ROOT.glob("projects/*/train.py"))
SMOKE = {name: folder(name) / "configs" / "smoke.yaml" for name in PROJECTS}
LIMITS = ("gt", "ge", "lt", "le")

all_projects = for_each("project", PROJECTS)


@pytest.fixture(autouse=True)
def hints_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.config.get_type_hints", cache(get_type_hints))


def config_class(project: str) -> Any:
    return importlib.import_module(f"projects.{project}.config").Config


def refused(project: str, tree: Any, *overrides: str) -> str:
    """The one line by which a tree is refused; empty if it is accepted."""
    return line_of(lambda: from_tree(config_class(project), tree, overrides))


def line_of(read: Callable[[], object]) -> str:
    """The one line that a reading ends with; empty if it comes through."""
    try:
        read()
    except UserError as error:
        line = str(error)
    else:
        return ""
    assert line
    assert "\n" not in line
    return line


def fields(cls: Any, where: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Path and type of all fields that are no sections; those of optional sections too."""
    hints = get_type_hints(cls, include_extras=True)
    for name, hint in ((one.name, hints[one.name]) for one in dataclasses.fields(cls)):
        inner = get_args(hint)[0] if get_origin(hint) in (Union, types.UnionType) else hint
        if dataclasses.is_dataclass(inner):
            yield from fields(inner, (*where, name))
        else:
            yield (*where, name), hint


def bad_numbers(hint: Any) -> list[Any]:
    """Numbers just outside each bound of a declared number, and those that are none; fails without a lower bound."""
    kind, *limits = get_args(hint)
    bounds = [
        (name, getattr(one, name)) for one in limits for name in LIMITS if getattr(one, name) is not None
    ]
    assert any(name in ("gt", "ge") for name, _ in bounds), "has no lower bound"
    bad: list[Any] = []
    for name, bound in bounds:
        step = 1 if kind is int else max(abs(bound), 1) * 1e-9
        outside = {"gt": bound, "ge": bound - step, "lt": bound, "le": bound + step}[name]
        bad += [kind(outside), kind(bound - 1 if name in ("gt", "ge") else bound + 1)]
    return [*bad, math.nan, math.inf, -math.inf, 10**400, "much", True, *([1.5] if kind is int else [])]


def bad_values(hint: Any, value: Any) -> list[Any]:
    """What a field must not be: numbers out of range, lists that hold one, lists of a wrong length."""
    if get_origin(hint) in (Union, types.UnionType):
        return bad_values(get_args(hint)[0], value)
    if hint in (int, float):
        raise AssertionError("is a number without a range")
    kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if kind in (int, float):
        return bad_numbers(hint)
    if get_origin(kind) is not tuple:
        return []
    entries = [part for part in get_args(kind) if part is not Ellipsis]
    fixed = get_args(kind)[-1] is not Ellipsis
    good = list(value or [32] * len(entries))
    lists: list[Any] = [[*good, good[0]], good[:-1], [], 5] if fixed else [5]
    if any(getattr(one, "at_least", None) for one in getattr(hint, "__metadata__", ())):
        lists.append([])
    if any(getattr(one, "words", "") == "low <= high" for one in getattr(hint, "__metadata__", ())):
        lists.append([good[1] if good[1] > good[0] else good[0] + 0.1, good[0]])
    number = get_origin(entries[0]) is Annotated or entries[0] in (int, float)
    return lists + [[bad, *good[1:]] for bad in (bad_values(entries[0], None) if number else [])]


def whole_tree(project: str) -> dict[str, Any]:
    """The settings of a small run, with the optional sections that it leaves out."""
    tree = to_dict(load_config(config_class(project), SMOKE[project]))
    if project == "u2pl":
        ael = importlib.import_module("projects.u2pl.ael.config").AelConfig()
        tree["method"] |= {"ael": to_dict(ael), "average_from_start": True}
        tree["quirks"]["shared_first_epoch"] = False
    return tree


@all_projects
def test_no_field_takes_what_is_out_of_its_range(project: str) -> None:
    tree, walked, offenders = whole_tree(project), 0, []
    assert not refused(project, tree)
    for path, hint in fields(config_class(project)):
        changed = copy.deepcopy(tree)
        section = changed
        for part in path[:-1]:
            section = section[part]
        try:
            bad = bad_values(hint, section[path[-1]])
        except AssertionError as error:
            offenders.append(f"{'.'.join(path)} {error}")
            continue
        for value in bad:
            section[path[-1]] = value
            message = refused(project, changed)
            walked += 1
            if path[-1] not in message or "expected" not in message:
                offenders.append(f"{'.'.join(path)}={value!r}: {message or 'accepted'}")
    assert not offenders, "\n".join(offenders)
    assert walked > 400


EXAMPLES = [
    "optim.lr=.inf", "optim.momentum=5", "optim.weight_decay=-3", "optim.power=-1", "data.crop_size=[1,1]",
    "data.mean=[.nan,1,1]", "data.scale_range=[.inf,.inf]", "data.workers=100000", "run.seed=-5",
    f"run.seed={10**20}", "run.max_steps=0", "eval.crop_size=[0,0]", "eval.stride=[0,0]", "model.inner_planes=0",
    "model.width=-3", "model.dilations=[0,0,0]",
]  # fmt: skip
OF_U2PL = [
    "method.num_queries=0", "method.num_negatives=-1", "method.ema_decay=2", "method.unsup_weight=.nan",
    "method.temperature=1e-300", "method.queue_size=0", "method.queue_size=-3", "method.augment_probability=7",
]  # fmt: skip


@for_each(
    ("project", "override"),
    [(project, one) for project in PROJECTS for one in EXAMPLES] + [("u2pl", one) for one in OF_U2PL],
)
def test_what_used_to_fail_late(project: str, override: str) -> None:
    message = refused(project, read_config(SMOKE[project]), override)
    assert override.partition("=")[0].rpartition(".")[2] in message
    assert "expected" in message


# --- the schema for editors ------------------------------------------------------------------------------------


class EditorLoader(yaml.SafeLoader):
    """Reads `1e-3` as the number that it is in YAML 1.2, which editors speak."""


EditorLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
)


@all_projects
def test_shipped_configurations_fit_the_schema(project: str) -> None:
    jsonschema.Draft7Validator.check_schema(schema.schema(project))
    found = jsonschema.Draft7Validator(schema.schema(project))
    for path in sorted((folder(project) / "configs").glob("*.yaml")):
        found.validate(yaml.load(path.read_text(encoding="utf-8"), EditorLoader))
    for path in trees(project).glob("*.json"):  # with every key
        found.validate(json.loads(path.read_text(encoding="utf-8")))


@all_projects
def test_the_schema_refuses_what_the_reader_refuses(project: str) -> None:
    found, tree = jsonschema.Draft7Validator(schema.schema(project)), whole_tree(project)
    assert found.is_valid(tree)
    for override in EXAMPLES:
        section, _, rest = override.partition(".")
        key, _, text = rest.partition("=")
        changed = copy.deepcopy(tree)
        changed[section][key] = yaml.load(text, EditorLoader)
        finite = json.loads(json.dumps(changed).replace("NaN", "null").replace("Infinity", "null"))
        assert not found.is_valid(finite), override
    for section, key in (("optim", "momentun"), ("data", "crop")):
        assert not found.is_valid({section: {key: 1}})


def test_the_schema_explains_every_field(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert schema.main(["cps"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert schema.main(["cps", "--out", str(tmp_path / "s.json")]) == 0
    assert json.loads((tmp_path / "s.json").read_text()) == printed
    for section in printed["properties"].values():
        for name, field in section.get("properties", {}).items():
            assert field.get("description"), name
    method = printed["properties"]["method"]["properties"]
    assert method["cps_weight"]["default"] == 1.5
    assert printed["properties"]["optim"]["properties"]["lr"]["exclusiveMinimum"] == 0
    with pytest.raises(UserError, match="no such project; choose one of brpg"):
        schema.schema("nobody")


# --- mutated configurations ------------------------------------------------------------------------------------

ODD = [
    None, True, 0, -1, 1, 3, 10**9 + 1, 10**20, 10**400, 0.5, -0.0, 1e-300, 1e300, math.nan, math.inf, "", "a", "1e-3",
    "no", "a\nb", "\x00", "\ud800", [], [0], [1, 2], [1, 2, 3], [[1]], {}, {"a": 1}, {1: 2}, {None: None}, b"x",
    "../..", "-" * 300,
]  # fmt: skip
ODD_TEXT = [
    "\n", "  ", ":", "- ", "[", "]", "{", "}", "&a ", "*a", "!!set ", "!!binary ", "2020-13-45", "1:99:1", "\t", "'",
    '"', "#", "%", "@", "|", ">", "~", ".nan", "0x", "1e400", "? ", "<<: ", "---\n", "...", "\ufeff", "\x07", "\xe9",
]  # fmt: skip


def mutated_tree(rng: random.Random, tree: Any) -> Any:
    """The tree with one to three changes anywhere: odd values, keys that are gone, misspelt or moved."""
    changed = copy.deepcopy(tree)
    for _ in range(rng.randint(1, 3)):
        node: Any = changed
        while node:
            key = rng.choice(list(node))
            if isinstance(node[key], dict) and node[key] and rng.random() < 0.8:
                node = node[key]
                continue
            action = rng.randrange(5)
            if action == 0:
                del node[key]
            elif action == 1:
                node[rng.choice([f"{key}x", str(key)[1:], 5, None, ""])] = node.pop(key)
            elif action == 2 and isinstance(node[key], list) and node[key]:
                node[key][rng.randrange(len(node[key]))] = rng.choice(ODD)
            else:
                node[key] = copy.deepcopy(rng.choice(ODD))
            break
    return changed


def mutated_text(rng: random.Random, text: str) -> str:
    """The text with one to four pieces put in, taken out or doubled."""
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(text) + 1), rng.randint(0, 12)
        piece = rng.choice([*ODD_TEXT, text[at : at + length] * 2, ""])
        text = text[:at] + piece + text[at + rng.choice([0, length]) :]
    return text


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_configurations_load_or_take_one_line(count: int, tmp_path: Path) -> None:
    rng = random.Random(15)
    shipped = [(project, path) for project in PROJECTS for path in configs(project)]
    whole = {
        path: json.loads((trees(project) / f"{path.stem}.json").read_text()) for project, path in shipped
    }
    texts = {path: path.read_text(encoding="utf-8") for _, path in shipped}
    for project in PROJECTS:
        shutil.copytree(folder(project) / "configs", tmp_path / project)
    taken = 0
    for i in range(count):
        project, path = rng.choice(shipped)
        if i % 2:
            taken += not refused(project, mutated_tree(rng, whole[path]))
            continue
        written = tmp_path / project / "mutated.yaml"
        written.write_text(mutated_text(rng, texts[path]), encoding="utf-8")
        overrides = [
            f"{rng.choice(['optim.lr', 'data.val', 'run.dir'])}={rng.choice(ODD_TEXT)}"
        ] * rng.randint(0, 1)
        taken += not line_of(partial(load_config, config_class(project), written, overrides))
    assert count / 20 < taken < count * 0.9  # both happen
