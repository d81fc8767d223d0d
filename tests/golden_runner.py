"""Compare our functions with values recorded from the authors' code.

    python tests/golden_runner.py [--golden-root DIR] [--project PAPER]

`DIR/<paper>/cases.yaml` lists the cases; without `--golden-root` the projects' own recordings are taken. Every
case name has an adapter in `projects/<paper>/tests/golden_adapters.py` that feeds the recorded inputs to our
public functions and returns our outputs under the recorded names. The comparison is generic: a value holds when
|ours - recorded| <= atol + rtol * |recorded| + scale_rtol * max|recorded|; integers, booleans and text exactly.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

OUTPUT_PREFIXES = ("out", "grad")
FLOAT64_TIGHTEN = 0.6  # the recordings themselves are float32, so their own rounding stays in the difference


SLOW_IN_FLOAT64 = re.compile(r"net_|.*_forward$|(s4gan|full)_trajectory$")  # whole networks


class Skip(Exception):  # noqa: N818  (not an error)
    """A case that cannot run here; the message says why."""


@dataclass(frozen=True)
class Case:
    """One recorded case.

    Attributes:
        name: file name without `.npz`.
        arrays: everything recorded, inputs and outputs.
        keys: content of the keys file, if the case has one.
        spec: the entry of `cases.yaml`.
        dtype: floating-point type in which the adapter should run (float32 or float64).
    """

    name: str
    arrays: Mapping[str, np.ndarray]
    keys: Any
    spec: Mapping[str, Any]
    dtype: np.dtype

    def __getitem__(self, key: str) -> np.ndarray:
        value = self.arrays[key]
        return value.astype(self.dtype) if value.dtype == np.float32 else value

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def recorded(self) -> dict[str, np.ndarray]:
        return {k: v for k, v in self.arrays.items() if k.split("_")[0] in OUTPUT_PREFIXES}


Adapter = Callable[[Case], Mapping[str, Any]]


@cache
def read_specs(folder: Path) -> list[dict[str, Any]]:
    return yaml.safe_load((folder / "cases.yaml").read_text(encoding="utf-8"))["cases"]


def load_cases(folder: Path, dtype: str = "float32") -> list[Case]:
    cases = []
    for spec in read_specs(folder):
        with np.load(folder / spec["file"], allow_pickle=False) as data:
            arrays = {key: data[key] for key in data.files}
        beside = f"{Path(spec['file']).stem}.keys.json"  # not every index names the keys file
        keys_file = folder / (spec.get("keys") or beside)
        named = spec.get("keys") or keys_file.is_file()
        keys = json.loads(keys_file.read_text()) if named else None
        cases.append(Case(Path(spec["file"]).stem, arrays, keys, spec, np.dtype(dtype)))
    return cases


def load_adapters(project: str) -> dict[str, Adapter]:
    return importlib.import_module(f"projects.{project}.tests.golden_adapters").ADAPTERS


def find_adapter(case: Case, adapters: Mapping[str, Adapter]) -> Adapter:
    if case.name not in adapters:
        raise KeyError(f"no adapter for the case '{case.name}'; add one to golden_adapters.py")
    return adapters[case.name]


def mismatches(case: Case, ours: Mapping[str, Any], tighten: float = 1.0) -> list[str]:
    """One line per recorded value that ours does not reach; `tighten` scales the tolerances."""
    rtol, atol, scale_rtol = (case.spec[k] * tighten for k in ("rtol", "atol", "scale_rtol"))
    recorded = case.recorded()
    lines = [f"{key}: not returned by the adapter" for key in recorded if key not in ours]
    for key, value in ours.items():
        if key not in recorded:
            lines.append(f"{key}: not recorded, so it cannot be checked")
            continue
        line = _compare(np.asarray(value), recorded[key], rtol, atol, scale_rtol)
        if line:
            lines.append(f"{key}: {line}")
    return lines


def _compare(ours: np.ndarray, theirs: np.ndarray, rtol: float, atol: float, scale_rtol: float) -> str:
    if ours.shape != theirs.shape:
        return f"shape {ours.shape}, recorded {theirs.shape}"
    if theirs.dtype.kind not in "f":
        wrong = ours != theirs
        return f"{int(wrong.sum())} of {theirs.size} entries differ" if wrong.any() else ""
    if ours.dtype.kind != "f":
        ours = ours.astype(np.float64)
    both_nan = np.isnan(ours) & np.isnan(theirs)
    error = np.where(both_nan, 0.0, np.abs(ours.astype(np.float64) - theirs))
    scale = np.nanmax(np.abs(theirs)) if theirs.size else 0.0
    limit = atol + rtol * np.abs(theirs) + scale_rtol * scale
    wrong = ~(error <= np.where(both_nan, 0.0, limit))
    if not wrong.any():
        return ""
    worst = np.unravel_index(np.argmax(np.where(wrong, error, -1)), error.shape) if error.shape else ()
    return (
        f"{int(wrong.sum())} of {theirs.size} values off, worst {ours[worst]!r} for {theirs[worst]!r} "
        f"(limit {np.broadcast_to(limit, error.shape)[worst]:.3g})"
    )


def projects_with_golden(root: Path | None) -> list[str]:
    pattern = "*/cases.yaml" if root else "*/tests/golden/cases.yaml"
    found = sorted((root or ROOT / "projects").glob(pattern))
    ours = [path.relative_to(root or ROOT / "projects").parts[0] for path in found]
    return [name for name in ours if (ROOT / "projects" / name / "tests" / "golden_adapters.py").is_file()]


def golden_folder(project: str, root: Path | None) -> Path:
    return root / project if root else ROOT / "projects" / project / "tests" / "golden"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--golden-root", type=Path, help="folder with <paper>/cases.yaml; default: ours")
    parser.add_argument("--project", help="only this paper")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    args = parser.parse_args(argv)
    projects = [args.project] if args.project else projects_with_golden(args.golden_root)
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for project in projects:
        folder = golden_folder(project, args.golden_root)
        if not (folder / "cases.yaml").is_file():
            print(f"{project}: no cases.yaml in {folder}", file=sys.stderr)
            counts["failed"] += 1
            continue
        adapters = load_adapters(project)
        for case in load_cases(folder, args.dtype):
            outcome, lines = run_case(case, adapters)
            counts[outcome] += 1
            print(
                f"{project}/{case.name}: {outcome}" + "".join(f"\n    {line}" for line in lines), flush=True
            )
    if counts["skipped"]:
        print(f"{counts['skipped']} skipped")
    if not counts["passed"] + counts["failed"]:
        counts["failed"] = 1
        print("no case found", file=sys.stderr)
    print(f"{counts['passed']} passed, {counts['failed']} failed")
    return 1 if counts["failed"] else 0


def run_case(case: Case, adapters: Mapping[str, Adapter], tighten: float = 1.0) -> tuple[str, list[str]]:
    try:
        lines = mismatches(case, find_adapter(case, adapters)(case), tighten)
    except Skip as reason:
        return "skipped", [str(reason)]
    except Exception:
        if os.environ.get("GOLDEN_DEBUG"):
            raise
        return "failed", traceback.format_exc().strip().splitlines()[-3:]
    return ("failed", lines) if lines else ("passed", [])


def float64_twins(cases: Sequence[Case]) -> list[Any]:
    """Parameters of a pytest test: cases in float64, those of whole networks marked slow."""
    import pytest

    slow = [pytest.mark.slow]
    return [
        pytest.param(case, id=case.name, marks=slow if SLOW_IN_FLOAT64.match(case.name) else [])
        for case in cases
    ]


def require_passed(case: Case, adapters: Mapping[str, Adapter], tighten: float = 1.0) -> None:
    """The body of a pytest test of one case; skips where something that may not be distributed is absent."""
    import pytest

    outcome, lines = run_case(case, adapters, tighten)
    if outcome == "skipped":
        pytest.skip(lines[0])
    assert outcome == "passed", "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
