"""The command line that every `train.py` has, and the process it starts in."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from common.config import ReadConfig, load_config, read_config
from tools import ready

if TYPE_CHECKING:
    from common.distributed import Dist

T = TypeVar("T")


def parser(description: str) -> argparse.ArgumentParser:
    """`--config FILE section.key=value ...`."""
    result = argparse.ArgumentParser(prog="train.py", description=description)
    result.add_argument("--config", required=True, type=Path, help="YAML file, see the folder 'configs'")
    result.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="changes to the configuration"
    )
    return result


def run_directory(cfg: Any, config: Path, folder: Path) -> Path:
    """`run.dir`, or `runs/<config>/seed<seed>` of the project's folder, as seen from here."""
    default = folder / "runs" / config.stem / f"seed{cfg.run.seed}"
    return Path(cfg.run.dir or os.path.relpath(default))


def read(
    argv: Sequence[str],
    config: type[T],
    folder: Path,
    description: str,
    read_file: ReadConfig = read_config,
) -> tuple[T, Path]:
    """The configuration that the command line names, and the run directory.

    Args:
        argv: The command line.
        config: Class of the configuration.
        folder: Of the project.
        description: For `--help`.
        read_file: Gives the sections of the file; it may refuse files of other programs.

    Raises:
        UserError: a mistake in the configuration.
    """
    args = parser(description).parse_args(argv)
    cfg = load_config(config, args.config, args.overrides, read_file)
    return cfg, run_directory(cfg, args.config, folder)


def start(
    cfg: Any, run_dir: Path, train: Callable[[Any, Path, Dist], object], dry_run: Callable[[Any, Dist], None]
) -> int:
    """Join the other processes, and train or, with `run.dry_run`, make the dry run; the exit status.

    Raises:
        UserError: what the run needs is missing, all of it at once; or as `train` and `dry_run`.
    """
    from tools import processes  # torch: after what can be said without it

    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        ready.require(cfg, run_dir)
    dist = processes.start(cfg.run.device)
    try:
        if cfg.run.dry_run:
            dry_run(cfg, dist)
        else:
            train(cfg, run_dir, dist)
    finally:
        processes.stop()
    return 0
