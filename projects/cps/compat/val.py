"""The body of `val.py`: flags of the port become overrides; what measures is `eval.py`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from common.errors import UserError
from projects.cps.compat import flags
from projects.cps.config import Config
from projects.cps.eval import PROJECT
from tools import eval_script


def main(argv: Sequence[str]) -> int:
    """Measure what the command line names; 1 if `--check` finds the figure outside the expected band."""
    args = parser().parse_intermixed_args(argv)
    flags.refuse_port_weights(args.checkpoint)
    if args.auc_roc:
        raise UserError("--auc_roc: is not measured here; leave it out")
    if args.data_format:
        flags.say(["--data_format: accepted, without effect: run.channels_last chooses the memory layout"])
    return eval_script.main(PROJECT, argv, parser(), port_flags)


def parser() -> argparse.ArgumentParser:
    """The command line of the port; see `eval_script.parser` for the rest."""
    result = eval_script.parser(PROJECT, {"--checkpoint": ("--model_path",)})
    result.prog, result.allow_abbrev = "val.py", False
    result.add_argument("--num_workers", type=int, help="decoding processes (as data.workers)")
    flags.add_device(result)
    flags.add_protocol(result, "--aug_eval")
    flags.add_unused_format(result)
    result.add_argument("--auc_roc", action="store_true", help="refused: not measured")
    flags.add_opts(result)
    return result


def port_flags(args: argparse.Namespace, cfg: Config) -> list[str]:
    """Overrides for the port's flags, `--opts` last."""
    workers = [] if args.num_workers is None else [flags.override("data.workers", args.num_workers)]
    return [*workers, *flags.protocol_overrides(args, cfg), *args.opts]
