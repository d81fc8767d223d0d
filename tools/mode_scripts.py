"""The `train_semi.py` and `train_sup.py` of code that descends from U2PL's: its flags, this project's overrides."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.config import load_config, read_config
from common.distributed import Dist
from common.errors import UserError
from tools import train_script

ORIGINAL_SECTIONS = {"dataset", "trainer", "saver", "criterion", "net"}
SCRIPTS = {"semi": "train_semi.py", "sup_only": "train_sup.py"}

Mode = Literal["semi", "sup_only"]


@dataclass(frozen=True)
class ModeScripts:
    """What the two scripts of a project need.

    Attributes:
        config: Configuration class; its `method.mode` must be the script's.
        folder: Of the project.
        train: That of its `train.py`.
        dry_run: Likewise.
        variant: Ending of configurations that share the supervised twin of the one without it, such as "_ael".
    """

    config: type
    folder: Path
    train: Callable[[Any, Path, Dist], object]
    dry_run: Callable[[Any, Dist], None]
    variant: str = ""

    def run(self, argv: Sequence[str], mode: Mode) -> int:
        """Translate the original's flags and train in `mode`.

        `--local_rank` is accepted and, as in the original, not used: the launcher's environment decides. `--port`
        is the meeting point of a Slurm run; another launcher has named its own.

        Raises:
            UserError: the configuration is one of the original's, or of the other mode.
        """
        args = parser(mode).parse_intermixed_args(argv)
        cfg: Any = load_config(self.config, args.config, [f"run.seed={args.seed}", *args.overrides], read_own)
        held = cfg.method.mode
        if held != mode:
            raise UserError(
                f"{args.config}: method.mode is {held}, but {SCRIPTS[mode]} trains {mode}; use {SCRIPTS[held]} or "
                f"{self.twin(args.config, mode)}"
            )
        if args.port is not None and "RANK" not in os.environ:
            os.environ["MASTER_PORT"] = str(args.port)
        run_dir = train_script.run_directory(cfg, args.config, self.folder)
        return train_script.start(cfg, run_dir, self.train, self.dry_run)

    def twin(self, config: Path, mode: Mode) -> str:
        """Where the configuration of the other mode should be: `<name>_sup.yaml` is that of `<name>.yaml`."""
        stem = config.stem.removesuffix("_sup")
        if mode == "sup_only":
            stem = f"{config.stem.removesuffix(self.variant)}_sup"
        return str(config.with_name(f"{stem}{config.suffix}"))


def parser(mode: Mode) -> argparse.ArgumentParser:
    """The original's command line, with this project's overrides behind it."""
    result = argparse.ArgumentParser(prog=SCRIPTS[mode], description="Train by the original's flags.")
    result.add_argument("--config", type=Path, default=Path("config.yaml"), help="YAML file (config.yaml)")
    result.add_argument("--local_rank", "--local-rank", type=int, default=0, help="accepted and not used")
    result.add_argument("--seed", type=int, default=0, help="as run.seed (0)")
    result.add_argument("--port", type=int, help="port of a Slurm run")
    result.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="changes to the configuration"
    )
    return result


def is_original(tree: object) -> bool:
    """Whether a configuration has the original's sections."""
    return isinstance(tree, dict) and len(ORIGINAL_SECTIONS & set(tree)) > 1


def read_own(config: Path, besides: str = ", which hold every setting of the paper") -> dict[str, Any]:
    """The sections of a configuration that is not written for the original code, which has others.

    Args:
        config: The file.
        besides: What the message adds to the advice to use one of the folder `configs`.

    Raises:
        UserError: it is, or cannot be read.
    """
    tree = read_config(config)
    if is_original(tree):
        raise UserError(
            f"{config}: is written for the original code (sections {', '.join(map(str, tree))}); use one of this "
            f"project's folder 'configs'{besides}"
        )
    return tree
