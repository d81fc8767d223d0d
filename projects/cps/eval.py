"""Measure trained weights: mIoU by the configured protocol, per class, with pictures of the predictions if asked.

    python eval.py --run runs/voc_1323_r50_cps/seed2                 best.pt, last.pt and all weights that were kept
    python eval.py --config configs/voc_1323_r50_cps.yaml            the same: the run of that configuration
    python eval.py --run runs/... --epochs 20-34 --network mean      some of the kept weights; both networks' mean
    python eval.py --config configs/... --checkpoint FILE            one file, also one that convert.py made

The code is that of training, so the same weights, list and protocol give the same number to the last digit. The
flags of the original's `eval.py` are understood; its epochs count from 0, here `epoch_20.pt` holds the weights after
20 epochs. Behind torchrun, which takes `--run` for an option of its own, write `--run-dir`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from common.errors import UserError, run_main
from common.measure.inference import Forward
from common.run.checkpoint import kept_weights, load_weights
from projects.cps.compat.eval_flags import add_flags, notes, weights_of_epochs
from projects.cps.compat.flags import read_own, refuse_port_weights, say
from projects.cps.config import Config
from projects.cps.evaluate import protocol, require_network
from projects.cps.model import BRANCHES, MeanOfBranches, build_branch
from projects.cps.network import CpsNetwork
from projects.cps.state import KEPT_BY
from projects.cps.state import PROJECT as NAME
from tools import eval_script


def main(argv: Sequence[str]) -> int:
    """Measure what the command line names; 1 if `--check` finds the figure outside the expected band."""
    args = parser().parse_intermixed_args(argv)
    refuse_port_weights(args.checkpoint)
    say(notes(args))
    if args.epochs is None:
        return eval_script.main(PROJECT, argv, parser())
    if args.checkpoint is not None:
        raise UserError(
            f"--epochs {args.epochs} --checkpoint {args.checkpoint}: name one of them; epochs are those of a run"
        )
    if Path(args.epochs).suffix in (".pt", ".pth"):
        return eval_script.main(PROJECT, [*argv, "--checkpoint", args.epochs], parser())
    project = dataclasses.replace(PROJECT, checkpoints=partial(weights_of_epochs, chosen=args.epochs))
    return eval_script.main(project, argv, parser())


def parser() -> argparse.ArgumentParser:
    """The command line, with the flags of the original's `eval.py`."""
    also = {"--checkpoint": ("--model_path",), "--save": ("-p", "--save_path")}
    result = eval_script.parser(PROJECT, also)
    result.allow_abbrev = False
    add_flags(result)
    return result


def checkpoints(run_dir: Path, cfg: object = None) -> dict[str, Path]:
    """All weights of a run: the best and the last, then those that it kept, from the earliest on."""
    del cfg
    return {**eval_script.best_and_last(run_dir), **kept_weights(run_dir, KEPT_BY)}


def load_network(
    cfg: Config, saved: Mapping[str, Any], role: str, device: torch.device, where: str
) -> CpsNetwork:
    """One network of a checkpoint in evaluation mode on `device`.

    Raises:
        UserError: the checkpoint has no such network, or it is of another architecture.
    """
    weights = eval_script.network_of(saved, role, where)
    network = build_branch(cfg, len(saved["classes"]))
    load_weights(network, weights, where)
    layout = torch.channels_last if cfg.run.channels_last else torch.contiguous_format
    return network.to(device, memory_format=layout).eval()  # type: ignore[call-overload]


def predictor(cfg: Config, saved: Mapping[str, Any], role: str, device: torch.device, where: str) -> Forward:
    """Scores at image size by `branch1`, `branch2` or the `mean` of both; raises as `load_network`."""
    require_network(cfg, role)
    roles = BRANCHES if role == "mean" else (role,)
    networks = [load_network(cfg, saved, one, device, where) for one in roles]
    return networks[0].predict if len(networks) == 1 else MeanOfBranches(networks).eval().predict


def default_network(cfg: Config) -> str:
    """The network that results are reported for."""
    return cfg.eval.network


def method_name(cfg: Config) -> str:
    """The method, for reports."""
    return cfg.method.name


PROJECT = eval_script.ScriptProject(
    name=NAME,
    folder=Path(__file__).resolve().parent,
    config=Config,
    example="configs/voc_1323_r50_cps.yaml",
    networks=(*BRANCHES, "mean"),
    default_network=default_network,
    predictor=predictor,
    protocol=protocol,
    method=method_name,
    checkpoints=checkpoints,
    read=read_own,
)

if __name__ == "__main__":
    run_main(main)
