"""Semi-supervised training by the original's command line.

    python train_semi.py --config configs/voc_classic_366_r101.yaml --seed 2 --port 29500

The original's flags are translated into this project's overrides; `train.py` does the rest.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import yaml

from common.config import load_config
from common.errors import UserError, run_main
from projects.brpg import train
from projects.brpg.config import Config

ORIGINAL_SECTIONS = {"dataset", "trainer", "saver", "criterion", "net"}
SCRIPTS = {"semi": "train_semi.py", "sup_only": "train_sup.py"}

Mode = Literal["semi", "sup_only"]


def main(argv: Sequence[str]) -> int:
    """Train with labeled and unlabeled images."""
    return run_original(argv, "semi")


def run_original(argv: Sequence[str], mode: Mode) -> int:
    """Translate the original's flags and train in `mode`.

    `--local_rank` is accepted and, as in the original, not used: the launcher's environment decides. `--port` is
    the meeting point of a Slurm run; another launcher has named its own.

    Raises:
        UserError: the configuration is one of the original's, or of the other mode.
    """
    args = parser(mode).parse_intermixed_args(argv)
    refuse_original(args.config)
    overrides = [f"run.seed={args.seed}", *args.overrides]
    cfg = load_config(Config, args.config, overrides)
    if cfg.method.mode != mode:
        raise UserError(
            f"{args.config}: method.mode is {cfg.method.mode}, but {SCRIPTS[mode]} trains {mode}; use "
            f"{SCRIPTS[cfg.method.mode]} or {twin(args.config, mode)}"
        )
    if args.port is not None and "RANK" not in os.environ:
        os.environ["MASTER_PORT"] = str(args.port)
    return train.main(["--config", str(args.config), *overrides])


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


def refuse_original(config: Path) -> None:
    """Refuse a configuration written for the original code, which has other sections.

    Raises:
        UserError: it is one.
    """
    try:
        tree = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return  # `load_config` says what is wrong with it
    if isinstance(tree, dict) and len(ORIGINAL_SECTIONS & set(tree)) > 1:
        raise UserError(
            f"{config}: is written for the original code (sections {', '.join(map(str, tree))}); use one of this "
            "project's folder 'configs', which hold every setting of the paper"
        )


def twin(config: Path, mode: Mode) -> str:
    """Where the configuration of the other mode should be: `<name>.yaml` and `<name>_sup.yaml` belong together."""
    stem = config.stem.removesuffix("_sup") if mode == "semi" else f"{config.stem}_sup"
    return str(config.with_name(f"{stem}{config.suffix}"))


if __name__ == "__main__":
    run_main(main)
