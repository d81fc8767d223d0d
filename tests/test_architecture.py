"""Rules that keep the papers apart, checked over the syntax trees (no module is imported)."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

from tests.each import for_each

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("common", "projects", "splits", "studies", "tools")
PROJECTS = sorted(path.parent.name for path in (ROOT / "projects").glob("*/train.py"))
HIDDEN = {"__pycache__", "runs", "build", "dist"}


def rel(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def files_below(*folders: str, suffix: str = ".py", tests: bool = True) -> list[Path]:
    found = []
    for folder in folders:
        for path in sorted((ROOT / folder).rglob(f"*{suffix}")):
            parts = path.relative_to(ROOT).parts
            if any(part in HIDDEN or part.startswith(".") for part in parts):
                continue
            if tests or "tests" not in parts:
                found.append(path)
    return found


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), rel(path))


CODE = files_below(*PACKAGES)
SHIPPED = files_below(*PACKAGES, tests=False)
ALL_PYTHON = [*CODE, *files_below("tests"), *sorted(ROOT.glob("*.py"))]


def complaints(paths: Iterable[Path], rule: Callable[[ast.Module], Iterable[str]]) -> list[str]:
    """What a rule says about files, each line with its file."""
    return [f"{rel(path)}: {line}" for path in paths for line in rule(parse(path))]


def test_the_rules_look_at_real_files() -> None:
    assert "common/numerics/losses.py" in map(rel, CODE)
    assert "projects/u2pl/train.py" in map(rel, CODE)
    assert "u2pl" in PROJECTS


# --- imports ---------------------------------------------------------------------------------------------------

MAY_IMPORT: dict[str, tuple[str, ...]] = {  # besides itself and third parties
    "common": (),
    "splits": ("common.",),
    "tools": ("common.", "splits."),
    "projects": ("common.", "tools."),
    "studies": ("common.", "splits.", "tools.environment.", "tools.launch.", "tools.ready."),
}


def imports(tree: ast.AST, types: bool = True) -> Iterator[str]:
    """Dotted names that a file imports, wherever in it; for types alone if `types`. Relative ones keep their dots."""
    for node in ast.iter_child_nodes(tree):
        if not types and isinstance(node, ast.If) and dotted(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            if module not in PACKAGES:  # `from projects import brpg` names the project in its list
                yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func).endswith(("import_module", "__import__")):
            yield from (
                a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)
            )
        yield from imports(node, types)


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a chain of attributes; what cannot be named is `?`."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def wrong_imports(where: str, tree: ast.AST) -> list[str]:
    """Imports from a room that `where` may not know."""
    room, second, *_ = where.split("/")
    known = (*MAY_IMPORT[room], f"projects.{second}." if room == "projects" else f"{room}.")
    if "/tests/" in where:
        known += ("tests.", "splits.")
    found = []
    for module in imports(tree):
        if module.startswith("."):
            found.append(f"relative import '{module}'; write the whole name")
        elif module.split(".")[0] in (*PACKAGES, "tests") and not f"{module}.".startswith(known):
            found.append(f"must not import {module}")
    return found


def test_imports_point_at_common() -> None:
    found = [f"{rel(path)}: {line}" for path in CODE for line in wrong_imports(rel(path), parse(path))]
    assert not found, "\n".join(found)


@for_each(
    ("where", "code"),
    [
        ("common/x.py", "import projects.u2pl.losses"),
        ("common/x.py", "def f():\n    from projects import u2pl"),
        ("common/x.py", "import importlib\nimportlib.import_module('projects.u2pl')"),
        ("common/x.py", "from studies import run"), ("common/x.py", "from tools import bench"),
        ("common/x.py", "from splits.make import f"), ("splits/x.py", "import tools.bench"),
        ("tools/x.py", "from projects.u2pl import eval"),
        ("projects/u2pl/x.py", "from projects.brpg.losses import f"),
        ("projects/u2pl/x.py", "from projects import brpg"), ("projects/u2pl/x.py", "import studies.run"),
        ("projects/u2pl/x.py", "from splits.check import f"),
        ("projects/u2pl/x.py", "from .losses import f"),
        ("projects/u2pl/x.py", "from tests.golden_runner import Case"),
        ("common/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import splits"),
        ("studies/x.py", "import projects.u2pl.train"), ("studies/x.py", "from tools.eval_script import f"),
    ],
)  # fmt: skip
def test_wrong_imports_are_noticed(where: str, code: str) -> None:
    assert wrong_imports(where, ast.parse(code))


@for_each(
    ("where", "code"),
    [
        ("projects/u2pl/x.py", "from projects.u2pl.losses import f\nfrom common.numerics.ema import g"),
        ("projects/u2pl/x.py", "from projects.u2pl import train\nfrom tools import bench"),
        ("projects/u2pl/tests/x.py", "from tests.golden_runner import Case\nimport projects.u2pl.train"),
        ("studies/x.py", "from common.config import build\nimport studies.table\nfrom tools import launch"),
    ],
)
def test_right_imports_are_not(where: str, code: str) -> None:
    assert not wrong_imports(where, ast.parse(code))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def import_graph(trees: Mapping[str, ast.AST]) -> dict[str, set[str]]:
    """The modules, of those given, that each one imports."""
    return {
        name: {m for m in imports(tree, types=False) if m in trees and m != name}
        for name, tree in trees.items()
    }


def reached(graph: Mapping[str, set[str]], *starts: str) -> set[str]:
    """Modules that `starts` import, directly or through others."""
    found, todo = set(), list(starts)
    while todo:
        new = graph[todo.pop()] - found
        found |= new
        todo += new
    return found


@cache
def whole_graph() -> dict[str, set[str]]:
    """Of all that is shipped; a package's own file is no way to a module, for it is imported with any of them."""
    return import_graph({module_name(path): parse(path) for path in SHIPPED if path.name != "__init__.py"})


def circles(graph: Mapping[str, set[str]]) -> set[str]:
    """Modules that reach themselves."""
    return {name for name in graph if name in reached(graph, name)}


def test_no_import_leads_back() -> None:
    """Imports within functions count: what is delayed to make a circle work is a circle."""
    assert not circles(whole_graph())


def test_a_circle_is_noticed() -> None:
    codes = {
        "a": "from b import f",
        "b": "def f():\n    import c",
        "c": "import a.x\nimport a",
        "d": "import a",
    }
    graph = import_graph({name: ast.parse(code) for name, code in codes.items()})
    assert circles(graph) == {"a", "b", "c"}
    types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a"
    assert not circles(import_graph({"a": ast.parse("import b"), "b": ast.parse(types)}))


def test_every_module_of_common_serves_two_papers() -> None:
    """Whatever a project's scripts reach; what one paper alone uses belongs to that paper."""
    used, graph = Counter[str](), whole_graph()
    for project in PROJECTS:
        used.update(reached(graph, *(name for name in graph if name.startswith(f"projects.{project}."))))
    few = {name: used[name] for name in graph if name.startswith("common.") and used[name] < 2}
    assert not few, "modules of common and how many papers use them: " + str(few)


# --- configuration ---------------------------------------------------------------------------------------------

SETTINGS = {"cfg", "config", "conf", "settings", "options", "opts", "opt", "args", "params", "kwargs"}
SECTIONS = {"data", "model", "optim", "method", "eval", "run", "quirks", "expect", "trainer", "dataset"}


def default_lookups(tree: ast.AST) -> list[str]:
    """`settings.get(key, default)`: a hidden default, for sections are typed and complete."""
    found = []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        second = len(node.args) > 1 or any(word.arg == "default" for word in node.keywords)
        if node.func.attr not in ("get", "setdefault", "pop") or not second:
            continue
        names = {part.id for part in ast.walk(node.func.value) if isinstance(part, ast.Name)}
        keys = {part.value for part in ast.walk(node.func.value) if isinstance(part, ast.Constant)}
        keys |= {part.attr for part in ast.walk(node.func.value) if isinstance(part, ast.Attribute)}
        if names & (SETTINGS | SECTIONS) or keys & (SETTINGS | SECTIONS):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def test_no_hidden_defaults() -> None:
    paths = [path for path in files_below("projects", tests=False) if path.name != "config.py"]
    found = complaints(paths, default_lookups)
    assert not found, "\n".join(found)


@for_each(
    "code",
    [
        "cfg.get('lr', 1)", "cfg['trainer'].get('epochs', 1)", "saved['config'].get('x', default=2)",
        "run.optim.get('a', 0)",
    ],
)  # fmt: skip
def test_a_hidden_default_is_noticed(code: str) -> None:
    assert default_lookups(ast.parse(code))


# --- unsafe loading --------------------------------------------------------------------------------------------

RESTRICTED_READER = "common/data/safe_pickle.py"
SAFE_YAML = {"yaml.SafeLoader", "yaml.CSafeLoader"}
NEVER = {
    "os.system", "os.popen", "eval", "exec", "compile", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all",
    "marshal.load", "marshal.loads", "shelve.open", "dill.load", "dill.loads", "joblib.load", "torch.hub.load",
    "subprocess.getoutput", "subprocess.getstatusoutput", "pickle.load", "pickle.loads", "pickle.Unpickler",
    "cPickle.load", "cPickle.loads", "numpy.memmap.load", "pandas.read_pickle",
}  # fmt: skip


def whole_names(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for, so that `from pickle import loads as l` hides nothing."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def is_false(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def is_safe_loader(node: ast.AST, safe: set[str]) -> bool:
    """A safe loader, or the fast one of `getattr(yaml, "CSafeLoader", yaml.SafeLoader)`."""
    if isinstance(node, ast.Call) and dotted(node.func) == "getattr" and len(node.args) == 3:
        package, name, other = node.args
        fast = f"{dotted(package)}.{name.value if isinstance(name, ast.Constant) else '?'}"
        return fast in safe and is_safe_loader(other, safe)
    return dotted(node) in safe


def unsafe_calls(tree: ast.AST) -> list[str]:
    names = whole_names(tree)
    safe_loaders = SAFE_YAML | {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and any(dotted(base) in SAFE_YAML for base in node.bases)
    }
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        first, dot, rest = dotted(node.func).partition(".")
        name = names.get(first, first) + dot + rest
        words = {word.arg: word.value for word in node.keywords}
        bad = name in NEVER
        if name == "torch.load":
            value = words.get("weights_only")
            bad = not (isinstance(value, ast.Constant) and value.value is True)
        elif name == "numpy.load":
            bad = len(node.args) > 1 or ("allow_pickle" in words and not is_false(words["allow_pickle"]))
        elif name == "yaml.load":
            loader = words.get("Loader") or (node.args[1] if len(node.args) > 1 else None)
            bad = loader is None or not is_safe_loader(loader, safe_loaders)
        if "shell" in words and not is_false(words["shell"]):
            bad = True
        if bad:
            found.append(f"line {node.lineno}: {ast.unparse(node)[:80]}")
    return found


def test_nothing_loads_or_runs_foreign_code() -> None:
    found = complaints(ALL_PYTHON, unsafe_calls)
    # a test may read back the pickle that it has just made
    found = [line for line in found if not ("tests/" in line and "pickle.loads(" in line)]
    assert not found, "\n".join(found)


def test_pickles_are_read_by_the_restricted_reader_alone() -> None:
    readers = []
    for path in ALL_PYTHON:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ClassDef) and any(dotted(b).endswith("Unpickler") for b in node.bases):
                methods = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
                readers.append((rel(path), "find_class" in methods))
    assert readers == [(RESTRICTED_READER, True)]


@for_each(
    "code",
    [
        "import torch\ntorch.load(f)", "import torch\ntorch.load(f, weights_only=False)",
        "from torch import load\nload(f)", "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import numpy as np\nnp.load(f, None, True)", "import pickle\npickle.loads(data)",
        "from pickle import load as read\nread(f)", "import pickle\npickle.Unpickler(f).load()",
        "import yaml\nyaml.load(text)", "import yaml\nyaml.load(text, Loader=yaml.FullLoader)",
        "import yaml\nyaml.load(text, Loader=getattr(yaml, 'CLoader', yaml.SafeLoader))",
        "import yaml\nyaml.unsafe_load(text)", "import subprocess\nsubprocess.run(line, shell=True)",
        "import os\nos.system(line)", "eval(text)", "exec(text)",
    ],
)  # fmt: skip
def test_unsafe_calls_are_noticed(code: str) -> None:
    assert unsafe_calls(ast.parse(code))


@for_each(
    "code",
    [
        "import torch\ntorch.load(f, map_location='cpu', weights_only=True)",
        "import numpy as np\nnp.load(f, allow_pickle=False)",
        "import yaml\nclass _L(yaml.SafeLoader): pass\nyaml.load(text, Loader=_L)",
        "import yaml\nyaml.safe_load(text)", "network.eval()",
        "import yaml\nyaml.load(text, Loader=getattr(yaml, 'CSafeLoader', yaml.SafeLoader))",
        "import subprocess\nsubprocess.run(['git'], shell=False)",
    ],
)  # fmt: skip
def test_safe_calls_are_not(code: str) -> None:
    assert not unsafe_calls(ast.parse(code))


# --- layout ----------------------------------------------------------------------------------------------------

CONTRACT = (
    "README.md", "train.sh", "eval.sh", "train.py", "eval.py", "config.py", "model.py", "losses.py", "data.py",
    "configs/smoke.yaml", "tests/golden/cases.yaml",
)  # fmt: skip
TRAIN_LINES = 330


def test_every_project_has_the_contract_files() -> None:
    paths = [ROOT / "projects" / project / name for project in PROJECTS for name in CONTRACT]
    bad = [rel(path) for path in paths if not path.is_file() or not path.stat().st_size]
    assert not bad, f"missing or empty: {bad}"


def test_the_loop_fits_on_a_few_screens() -> None:
    lines = {
        project: len((ROOT / "projects" / project / "train.py").read_text().splitlines())
        for project in PROJECTS
    }
    assert max(lines.values()) <= TRAIN_LINES, lines


TEXT_SUFFIXES = (".py", ".sh", ".yaml", ".yml", ".toml", ".md", ".txt")
TEXTS = sorted(
    {path for suffix in TEXT_SUFFIXES for path in files_below(".", suffix=suffix)} | set(ROOT.glob(".ci/*"))
)
# put together, so that this file does not name them itself
MACHINE_PATH = re.compile(
    "(?<![\\w.~-])/("
    + "|".join(("ho" + "me", "Use" + "rs", "wo" + "rk", "ro" + "ot", "op" + "t", "mn" + "t", "scra" + "tch"))
    + ")/\\w"
)
UNFINISHED = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK")) + r")\b")


@for_each(("pattern", "what"), [(MACHINE_PATH, "a path of one machine"), (UNFINISHED, "unfinished work")])
def test_texts_are_clean(pattern: re.Pattern[str], what: str) -> None:
    assert len(TEXTS) > 50
    hits = [
        f"{rel(path)}:{number}: {what}: {line.strip()[:80]}"
        for path in TEXTS
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]
    assert not hits, "\n".join(hits)


def test_the_patterns_match_what_they_are_for() -> None:
    assert MACHINE_PATH.search("root: /ho" + "me/ann/voc")
    assert MACHINE_PATH.search('"/wo' + 'rk/main"')
    assert not MACHINE_PATH.search("a/b/ho" + "me/c")
    assert UNFINISHED.search("# TO" + "DO: later")


# --- documentation ---------------------------------------------------------------------------------------------


def undocumented(tree: ast.Module) -> list[str]:
    """Public classes, functions and methods without a docstring."""
    found = [] if ast.get_docstring(tree) or not tree.body else ["module"]

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                continue
            if node.name.startswith("_"):
                continue
            if not ast.get_docstring(node):
                found.append(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")

    visit(tree.body, "")
    return found


# the modules of `nn` whose shapes the class docstring states
DOCUMENTED = [path for path in files_below("common") if path.name != "__init__.py"]


def test_everything_public_in_common_and_every_equation_is_documented() -> None:
    losses = [ROOT / "projects" / project / "losses.py" for project in PROJECTS]
    found = complaints([*DOCUMENTED, *losses], undocumented)
    assert not found, "\n".join(found)


def test_a_missing_docstring_is_noticed() -> None:
    assert undocumented(ast.parse('"""m"""\nclass A:\n    """a"""\n    def f(self): pass')) == ["A.f"]
