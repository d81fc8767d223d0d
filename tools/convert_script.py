"""What the converters of all projects share: the command line, and the report on every key of a file."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from common.config import ProjectConfig, ReadConfig, load_config, read_config
from common.data.dataset_yaml import load_spec
from common.data.spec import DatasetSpec
from common.errors import UserError, writing
from common.models.pretrained import LoadReport
from common.run.checkpoint import describe, save

T = TypeVar("T", bound=ProjectConfig)
Converted = tuple[dict[str, Mapping[str, Tensor]], dict[str, LoadReport]]
Convert = Callable[[Path, Any, DatasetSpec, str], Converted]


def main(argv: Sequence[str], project: str, config: type[T], convert: Convert) -> int:
    """Convert what the command line names.

    Args:
        argv: The command line.
        project: As checkpoints name it.
        config: The project's configuration class.
        convert: (file, cfg, dataset, name of the configuration) -> state dicts of the networks by role, and what
            became of every key.

    Raises:
        UserError: see `read_arguments` and `write_checkpoint`, or the file does not hold such a network.
    """
    args = parser().parse_intermixed_args(argv)
    cfg, spec = read_arguments(args, config, args.source)
    networks, reports = convert(args.source, cfg, spec, str(args.config))
    write_checkpoint(args, project, cfg, spec, networks, reports)
    return 0


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


def read_arguments(
    args: argparse.Namespace, config: type[T], *sources: Path, read: ReadConfig = read_config
) -> tuple[T, DatasetSpec]:
    """The configuration and the dataset that the command line names.

    Args:
        args: Of `parser`.
        config: The project's configuration class.
        sources: Files that are read, and must not be written over.
        read: See `load_config`.

    Raises:
        UserError: a mistake in the configuration, or the result would replace a source.
    """
    cfg = load_config(config, args.config, args.overrides, read)
    if args.out.resolve() in {path.resolve() for path in sources}:
        raise UserError(f"--out {args.out}: is the source; choose another file")
    return cfg, load_spec(cfg.data.dataset, cfg.data.root)


def write_checkpoint(
    args: argparse.Namespace, project: str, cfg: ProjectConfig, spec: DatasetSpec,
    networks: Mapping[str, Mapping[str, Tensor]], reports: Mapping[str, LoadReport], rest: Sequence[str] = (),
) -> None:  # fmt: skip
    """Write the networks as a checkpoint without training state, and tell and report what became of every key.

    Args:
        args: Of `parser`.
        project: As checkpoints name it.
        cfg: Describes the networks.
        spec: The dataset, for classes and palette.
        networks: State dicts by role.
        reports: What became of the keys, by role.
        rest: Keys of the file that belong to no network.

    Raises:
        UserError: a file cannot be written.
    """
    save(args.out, describe(project, cfg, spec, 0, networks))
    for role, report in reports.items():
        sys.stdout.write(f"{role}: {report.summary()}\n")
    for part, count in Counter(key.partition(".")[0] for key in rest).items():
        sys.stdout.write(f"not taken: {part} ({count} tensors)\n")
    if args.report is not None:
        write_report(args.report, reports, rest)
    sys.stdout.write(f"{args.out}: written ({', '.join(networks)})\n")


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
    with writing(f"--report {path}", "choose another file"):
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
