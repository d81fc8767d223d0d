"""What the converters of all projects share: the command line, and the report on every key of a file."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.errors import UserError
from common.models.pretrained import LoadReport


def parser() -> argparse.ArgumentParser:
    """The command line; a project adds its own options."""
    result = argparse.ArgumentParser(
        prog="convert.py", description="Turn a checkpoint of the authors into one of this project."
    )
    result.add_argument("source", type=Path, help="the authors' .pth file")
    result.add_argument(
        "--config", type=Path, required=True, help="configuration of the same network and dataset"
    )
    result.add_argument("--out", type=Path, required=True, help="checkpoint to write")
    result.add_argument(
        "--report", type=Path, help="file for the full lists of used, unused and missing keys"
    )
    result.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="changes to the configuration"
    )
    return result


def write_report(path: Path, reports: Mapping[str, LoadReport], rest: Sequence[str] = ()) -> None:
    """Write every key of every network: used, unused (with its name in the file), missing, of another shape.

    Args:
        path: Text file to write.
        reports: What became of the keys, by network.
        rest: Keys of the file that belong to no network.

    Raises:
        UserError: the file cannot be written.
    """
    lines = []
    for role, report in reports.items():
        lines.append(f"# {role} from {report.source}")
        for kind in ("used", "unused", "missing", "mismatched"):
            lines += [f"{kind}\t{key}" for key in getattr(report, kind)]
    if rest:
        lines.append("# the rest of the file")
        lines += [f"unused\t{key}" for key in rest]
    try:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--report {path}: cannot be written ({error.strerror}); choose another file"
        ) from error
