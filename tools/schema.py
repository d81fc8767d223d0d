"""A JSON schema of a project's configurations, by which editors complete and check the YAML files.

    python -m tools.schema u2pl --out u2pl.schema.json

It is made from the declarations that the configurations are read by. A file whose first line is
`# yaml-language-server: $schema=u2pl.schema.json` is then checked while it is written.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import re
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from common.errors import UserError, run_main, writing

PROJECTS = Path(__file__).resolve().parents[1] / "projects"
TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}
BOUNDS = {
    "gt": "exclusiveMinimum",
    "ge": "minimum",
    "lt": "exclusiveMaximum",
    "le": "maximum",
    "at_least": "minItems",
}


def schema(project: str) -> dict[str, Any]:
    """The schema (draft 7) of the files in a project's folder `configs`.

    Nothing is required, for a file may leave a key to its `base` or to the command line.

    Raises:
        UserError: no such project.
    """
    known = sorted(path.parent.name for path in PROJECTS.glob("*/config.py"))
    if project not in known:
        raise UserError(f"{project}: no such project; choose one of {', '.join(known)}")
    result = section(importlib.import_module(f"projects.{project}.config").Config)
    result["properties"]["base"] = {"type": "string", "description": "file beside this one to begin from"}
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": project, **result}


def section(cls: type[Any]) -> dict[str, Any]:
    """The schema of a dataclass."""
    hints, texts = get_type_hints(cls, include_extras=True), descriptions(cls)
    properties = {}
    for field in dataclasses.fields(cls):
        found = values(hints[field.name])
        if field.name in texts:
            found["description"] = texts[field.name]
        if field.default is not dataclasses.MISSING:
            found["default"] = json.loads(json.dumps(field.default))
        properties[field.name] = found
    about = (cls.__doc__ or "").split("\n\n")[0]
    return {"type": "object", "description": about, "additionalProperties": False, "properties": properties}


def values(hint: Any) -> dict[str, Any]:
    """The schema of what a field of the type `hint` may be."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        found = values(parts[0])
        for limit in parts[1:]:
            bounds = {key: getattr(limit, name, None) for name, key in BOUNDS.items()}
            found |= {key: bound for key, bound in bounds.items() if bound is not None}
        return found
    if origin in (Union, types.UnionType):
        return {"anyOf": [values(parts[0]), {"type": "null"}]}
    if origin is Literal:
        return {"enum": list(parts)}
    if origin is tuple and parts[-1] is Ellipsis:
        return {"type": "array", "items": values(parts[0])}
    if origin is tuple:
        return {
            "type": "array",
            "items": [values(part) for part in parts],
            "minItems": len(parts),
            "maxItems": len(parts),
        }
    return {"type": TYPES[hint]} if hint in TYPES else section(hint)


def descriptions(cls: type[Any]) -> dict[str, str]:
    """What the docstrings of a dataclass and of those it extends say about its fields."""
    texts: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        listed = (one.__doc__ or "").partition("Attributes:\n")[2]
        for names, text in re.findall(
            r"^        (\w+(?:, \w+)*): ((?:.+\n?)(?: {9,}.+\n?)*)", listed, re.MULTILINE
        ):
            texts |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return texts


def main(argv: Sequence[str]) -> int:
    """Print the schema of a project, or write it to a file."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.schema", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("project", help="folder below projects/")
    parser.add_argument("--out", type=Path, help="file to write; without it the schema is printed")
    args = parser.parse_args(argv)
    text = json.dumps(schema(args.project), indent=1) + "\n"
    if args.out is None:
        sys.stdout.write(text)
        return 0
    with writing(args.out, "choose another place"):
        args.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_main(main)
