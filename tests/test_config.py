"""Strict configuration: what is accepted, what is refused and with which words."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from common.config import (
    BatchPlan,
    DataConfig,
    EvalConfig,
    ExpectConfig,
    OptimConfig,
    RunConfig,
    build,
    dump,
    from_tree,
    load_config,
    plan_batch,
    save_config,
    to_dict,
)
from common.errors import UserError
from tools.environment import config_hash


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    """A section with every kind of value."""

    rate: float = 0.5
    count: int = 3
    name: str = "a"
    flag: bool = False
    kind: Literal["x", "y"] = "x"
    stride: Literal[8, 16] = 8
    pair: tuple[int, int] = (1, 2)
    scales: tuple[float, ...] = (1.0,)
    maybe: int | None = None
    maybe_pair: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Demo:
    """A small configuration."""

    inner: Inner = field(default_factory=Inner)
    optim: OptimConfig
    run: RunConfig = field(default_factory=RunConfig)
    expect: ExpectConfig = field(default_factory=ExpectConfig)


OPTIM = "optim: {lr: 0.1, epochs: 2, batch_size: 4}\n"


@pytest.fixture
def write(tmp_path: Path):
    def written(text: str, name: str = "demo.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return written


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(Demo, path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- types -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("rate", "1e-3", 1e-3),  # YAML 1.1 reads this as text
        ("rate", "1.0e-3", 1e-3),
        ("rate", "2", 2.0),
        ("rate", "-.5", -0.5),
        ("count", "-7", -7),
        ("name", "'366'", "366"),
        ("flag", "true", True),
        ("flag", "no", False),
        ("kind", "y", "y"),
        ("stride", "16", 16),
        ("pair", "[3, 4]", (3, 4)),
        ("scales", "[1, 1e-1, 2.5]", (1.0, 0.1, 2.5)),
        ("scales", "[]", ()),
        ("maybe", "5", 5),
        ("maybe", "null", None),
        ("maybe_pair", "[-10, 1e1]", (-10.0, 10.0)),
        ("maybe_pair", "null", None),
    ],
)
def test_accepted_values(write, key, text, expected):
    cfg = load_config(Demo, write(f"{OPTIM}inner:\n  {key}: {text}\n"))
    value = getattr(cfg.inner, key)
    assert value == expected
    assert type(value) is type(expected)
    if isinstance(value, tuple):
        assert [type(v) for v in value] == [type(v) for v in expected]
    # an override passes through the same conversion
    assert getattr(load_config(Demo, write(OPTIM), [f"inner.{key}={text}"]).inner, key) == expected


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("rate", "true", "a number"),
        ("rate", "fast", "a number"),
        ("rate", "[1.0]", "a number"),
        ("rate", "null", "a number"),
        ("count", "true", "a whole number"),
        ("count", "2.0", "a whole number"),
        ("count", "'2'", "a whole number"),
        ("count", "1e3", "a whole number"),
        ("count", "null", "a whole number"),
        ("name", "366", "text"),
        ("name", "null", "text"),
        ("flag", "1", "true or false"),
        ("flag", "'yes'", "true or false"),
        ("kind", "z", "one of x, y"),
        ("kind", "[x]", "one of x, y"),
        ("stride", "32", "one of 8, 16"),
        ("stride", "true", "one of 8, 16"),
        ("stride", "8.0", "one of 8, 16"),
        ("pair", "[1]", "has 1 entries; expected 2"),
        ("pair", "[1, 2, 3]", "has 3 entries; expected 2"),
        ("pair", "5", "a list"),
        ("pair", "'12'", "a list"),
        ("pair", "[1, 2.5]", "inner.pair[1]"),
        ("scales", "[1.0, big]", "inner.scales[1]"),
        ("scales", "null", "a list"),
        ("maybe", "five", "a whole number"),
        ("maybe", "true", "a whole number"),
        ("maybe_pair", "[1]", "has 1 entries; expected 2"),
    ],
)
def test_refused_values(write, key, text, words):
    path = write(f"{OPTIM}inner:\n  {key}: {text}\n")
    message = refused(path)
    assert message.startswith(f"{path}: ")
    assert f"inner.{key}" in message
    assert words in message


@pytest.mark.parametrize("text", ["inner:\n", "inner: 5\n", "inner: [1]\n"])
def test_a_section_must_be_a_section(write, text):
    message = refused(write(OPTIM + text))
    assert "'inner'" in message
    assert "expected a section" in message


def test_a_tree_is_read_as_a_file(write):
    """For command lines that need no file."""
    tree = {"optim": {"lr": 0.1, "epochs": 2, "batch_size": 4}}
    assert from_tree(Demo, tree, ["inner.count=9"]) == load_config(Demo, write(OPTIM), ["inner.count=9"])
    assert tree == {"optim": {"lr": 0.1, "epochs": 2, "batch_size": 4}}
    with pytest.raises(UserError, match=r"^command line: unknown key 'optim.momentun'"):
        from_tree(Demo, tree, ["optim.momentun=1"], "command line")


# --- keys ------------------------------------------------------------------------------------------------------


def test_unknown_key_suggests_the_nearest(write):
    path = write("optim: {lr: 0.1, epochs: 2, batch_size: 4, momentun: 0.9}\n")
    assert refused(path) == f"{path}: unknown key 'optim.momentun'; did you mean 'optim.momentum'?"


def test_unknown_section_suggests_the_nearest(write):
    assert "unknown key 'optimm'; did you mean 'optim'?" in refused(write(OPTIM + "optimm: {lr: 1}\n"))


def test_unknown_key_without_a_near_one_lists_all(write):
    message = refused(write(OPTIM + "inner: {zzzzzz: 1}\n"))
    assert "unknown key 'inner.zzzzzz'; known keys: rate, count, name" in message


def test_missing_key(write):
    assert "missing key 'optim.epochs'; add it" in refused(write("optim: {lr: 0.1, batch_size: 4}\n"))
    assert "missing key 'optim'; add it" in refused(write("inner: {rate: 1}\n"))


@pytest.mark.parametrize(
    "text",
    [
        "optim: {lr: 0.1, epochs: 2, batch_size: 4, lr: 0.2}\n",
        OPTIM + "inner:\n  rate: 1\n  count: 2\n  rate: 3\n",
        OPTIM + OPTIM,
    ],
)
def test_a_key_given_twice_is_refused(write, text):
    message = refused(write(text))
    assert "given twice" in message
    assert "line" in message  # where it stands


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim: [1, 2\n", "not valid YAML"),
        ("- a\n- b\n", "expected 'key: value' lines"),
        ("", "expected 'key: value' lines"),
        ("!!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("a: \x00\n", "not valid YAML"),
        (OPTIM + "? [a, b]\n: 1\n", "not valid YAML"),
        (OPTIM + "5: 1\n", "unknown key '5'"),
    ],
)
def test_broken_files(write, text, words):
    path = write(text)
    message = refused(path)
    assert message.startswith(f"{path}: ")
    assert words in message


def test_absent_and_unreadable_files(tmp_path):
    assert "no such configuration file" in refused(tmp_path / "nothing.yaml")
    assert "cannot be read" in refused(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"optim: {name: \xe4}")
    assert "cannot be read" in refused(tmp_path / "latin.yaml")


# --- base file -------------------------------------------------------------------------------------------------


def test_base_is_merged_key_by_key(write):
    write(OPTIM + "inner: {rate: 0.1, count: 9, pair: [7, 8]}\n", "base.yaml")
    path = write("base: base.yaml\ninner: {rate: 0.2, pair: [5, 6]}\noptim: {epochs: 7}\n")
    cfg = load_config(Demo, path, ["inner.rate=0.3"])
    assert (cfg.inner.rate, cfg.inner.count, cfg.inner.pair) == (0.3, 9, (5, 6))  # override, base, file
    assert (cfg.optim.lr, cfg.optim.epochs) == (0.1, 7)


def test_base_lies_beside_the_file(write, tmp_path, monkeypatch):
    write(OPTIM, "base.yaml")
    path = write("base: base.yaml\n")
    monkeypatch.chdir("/")
    assert load_config(Demo, path).optim.lr == 0.1


def test_base_of_a_base_is_refused(write):
    write(OPTIM, "first.yaml")
    write("base: first.yaml\n", "second.yaml")
    assert "cannot have a base itself" in refused(write("base: second.yaml\n"))


def test_missing_base_is_named(write, tmp_path):
    message = refused(write(f"base: gone.yaml\n{OPTIM}"))
    assert message.startswith(f"{tmp_path / 'gone.yaml'}: no such configuration file")


# --- overrides -------------------------------------------------------------------------------------------------


def test_overrides_win_and_the_last_one_counts(write):
    cfg = load_config(
        Demo, write(OPTIM), ["optim.lr=1e-2", "inner.scales=[0.5, 1]", "optim.lr=2e-2", "run.dir=a=b"]
    )
    assert cfg.optim.lr == 2e-2
    assert cfg.inner.scales == (0.5, 1.0)
    assert cfg.run.dir == "a=b"


def test_an_override_may_fill_a_missing_key(write):
    assert load_config(Demo, write("optim: {lr: 0.1, batch_size: 4}\n"), ["optim.epochs=3"]).optim.epochs == 3


def test_an_empty_value_is_null(write):
    path = write(OPTIM + "inner: {maybe: 4}\n")
    assert load_config(Demo, path, ["inner.maybe="]).inner.maybe is None
    assert "'optim.lr' is None; expected a number" in refused(path, "optim.lr=")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lr", "not an override; write section.key=value"),
        ("lr=1", "not an override; write section.key=value with a section of inner, optim, run, expect"),
        ("--lr=1", "not an override"),
        ("inner.pair=[1, 2", "not valid YAML"),
        ("optim.momentun=1", "did you mean 'optim.momentum'?"),
        ("optin.lr=1", "did you mean 'optim'?"),
        ("optim.lr=fast", "expected a number"),
        ("optim.lr.x=1", "expected a number"),
        ("inner.kind=z", "expected one of x, y"),
    ],
)
def test_bad_overrides(write, override, words):
    message = refused(write(OPTIM), override)
    assert words in message
    assert override.partition("=")[0].split(".")[0] in message


# --- cross-field rules of the shared sections ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        (OptimConfig, "lr", 0),
        (OptimConfig, "lr", -1),
        (OptimConfig, "lr", float("nan")),
        (OptimConfig, "epochs", 0),
        (OptimConfig, "batch_size", 0),
        (OptimConfig, "device_batch", 0),
        (DataConfig, "crop_size", [0, 33]),
        (DataConfig, "scale_range", [2.0, 0.5]),
        (DataConfig, "scale_range", [0.0, 0.5]),
        (DataConfig, "workers", -1),
        (DataConfig, "std", [1.0, 1.0, 0.0]),
        (EvalConfig, "scales", []),
        (EvalConfig, "scales", [1.0, -1.0]),
        (EvalConfig, "every_epochs", -1),
        (RunConfig, "log_interval", 0),
        (RunConfig, "save_interval", -1),
    ],
)
def test_values_out_of_range(section, key, value):
    needed = {
        OptimConfig: {"lr": 1.0, "epochs": 1, "batch_size": 1},
        DataConfig: {"dataset": "a", "split": "b"},
    }
    with pytest.raises(ValueError, match=f"'{key}' is .*expected"):
        build(section, needed.get(section, {}) | {key: value})


def test_range_errors_name_file_and_section(write):
    path = write("optim: {lr: -1, epochs: 2, batch_size: 4}\n")
    assert refused(path) == f"{path}: optim: 'lr' is -1.0; expected a positive number"


# --- round trip, hash ------------------------------------------------------------------------------------------

FULL = """
optim: {lr: 1e-5, epochs: 2, batch_size: 4, device_batch: 2}
inner: {rate: 1e-7, name: "1e-3", kind: y, pair: [4, 5], scales: [0.5, 1.75], maybe: 3, maybe_pair: [-1, 1.5]}
run: {dir: "no", seed: 7}
expect: {miou: 73.66, source: "paper, table 1: ours"}
"""


def test_saved_configuration_is_itself_a_configuration(write, tmp_path):
    cfg = load_config(Demo, write(FULL))
    save_config(cfg, tmp_path / "saved.yaml")
    again = load_config(Demo, tmp_path / "saved.yaml")
    assert again == cfg
    assert dump(again) == dump(cfg) == (tmp_path / "saved.yaml").read_text()
    assert again.inner.name == "1e-3"
    assert isinstance(again.inner.pair, tuple)


def test_to_dict_holds_plain_values(write):
    tree = to_dict(load_config(Demo, write(FULL)))
    assert tree["inner"]["pair"] == [4, 5]
    assert yaml.safe_load(yaml.safe_dump(tree)) == tree
    assert set(tree) == {"inner", "optim", "run", "expect"}


def test_hash_is_stable_and_blind_to_place_and_claim(write):
    path = write(FULL)
    digest = config_hash(load_config(Demo, path))
    assert len(digest) == 12
    assert int(digest, 16) >= 0
    assert digest == config_hash(load_config(Demo, path, ["run.seed=9", "run.dir=else", "expect.miou=1"]))
    assert digest == config_hash(load_config(Demo, path, ["optim.lr=0.00001"]))
    others = ["optim.lr=2e-5", "inner.pair=[5, 4]", "inner.maybe=null", "inner.flag=true"]
    assert len({digest, *(config_hash(load_config(Demo, path, [o])) for o in others)}) == 5
    assert config_hash(load_config(Demo, path), without=()) != digest


def test_hash_does_not_change_between_versions(write):
    """A recorded value: result tables of different days are matched by it."""
    assert config_hash(load_config(Demo, write(FULL)), without=("run", "expect", "optim")) == "e70aee563602"


# --- dataclasses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", [DataConfig, OptimConfig, EvalConfig, RunConfig, ExpectConfig, BatchPlan])
def test_sections_are_frozen_and_closed(section):
    needed = {
        OptimConfig: {"lr": 1.0, "epochs": 1, "batch_size": 1},
        DataConfig: {"dataset": "a", "split": "b"},
        BatchPlan: {"per_forward": 1, "accumulate": 1},
    }
    value = section(**needed.get(section, {}))
    name = dataclasses.fields(section)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, 1)
    with pytest.raises((AttributeError, TypeError)):
        object.__setattr__(value, "not_a_field", 1)
    assert not hasattr(value, "__dict__")


# --- batch plan ------------------------------------------------------------------------------------------------


def optim(batch: int, device: int | None = None) -> OptimConfig:
    return OptimConfig(lr=0.1, epochs=1, batch_size=batch, device_batch=device)


@pytest.mark.parametrize(
    ("batch", "device", "world", "per_forward", "accumulate"),
    [
        (16, None, 4, 4, 1),
        (16, None, 1, 16, 1),
        (16, 4, 1, 4, 4),
        (16, 2, 4, 2, 2),
        (16, 64, 2, 8, 1),
        (1, None, 1, 1, 1),
        (12, 3, 2, 3, 2),
    ],
)
def test_plan(batch, device, world, per_forward, accumulate):
    plan = plan_batch(optim(batch, device), world)
    assert (plan.per_forward, plan.accumulate) == (per_forward, accumulate)
    assert plan.per_forward * plan.accumulate * world == batch


@pytest.mark.parametrize(
    ("batch", "device", "world", "words"),
    [
        (16, None, 3, "optim.batch_size=16: cannot be shared by 3 processes; use a multiple of 3"),
        (2, None, 4, "optim.batch_size=2: cannot be shared by 4 processes"),
        (
            16,
            3,
            1,
            "optim.device_batch=3: does not divide the 16 labeled images of each process; use a divisor of 16",
        ),
    ],
)
def test_plans_that_do_not_divide(batch, device, world, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        plan_batch(optim(batch, device), world)
