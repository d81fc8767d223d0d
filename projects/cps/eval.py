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
import re
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
from common.run.checkpoint import load_weights
from projects.cps import flags
from projects.cps.config import Config
from projects.cps.evaluate import protocol, require_network
from projects.cps.model import MeanOfBranches, build_branch
from projects.cps.network import CpsNetwork
from projects.cps.state import PROJECT as NAME
from projects.cps.state import kept_weights
from tools import eval_script


def main(argv: Sequence[str]) -> int:
    """Measure what the command line names; 1 if `--check` finds the figure outside the expected band."""
    args = parser().parse_intermixed_args(argv)
    flags.refuse_port_weights(args.checkpoint)
    flags.say(notes(args))
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
    result.add_argument(
        "-e", "--epochs", metavar="EPOCHS",
        help="which of a run's weights: last, N, A-B, A-, or a file (default: best, last and all that were kept)",
    )  # fmt: skip
    result.add_argument("-d", "--devices", help="accepted, without effect")
    result.add_argument("-v", "--verbose", action="store_true", help="accepted, without effect")
    result.add_argument("-s", "--show_image", action="store_true", help="accepted, without effect")
    return result


def notes(args: argparse.Namespace) -> list[str]:
    """What becomes of flags of the original that have no effect."""
    reasons = {
        "devices": "the processes that are started share the images, see eval.sh",
        "verbose": "every class is always printed",
        "show_image": "no window is opened; --save writes the predictions",
    }
    return [
        f"--{key}: accepted, without effect: {reason}"
        for key, reason in reasons.items()
        if getattr(args, key)
    ]


def checkpoints(run_dir: Path, cfg: object = None) -> dict[str, Path]:
    """All weights of a run: the best and the last, then those that it kept, from the earliest on."""
    del cfg
    return {**eval_script.best_and_last(run_dir), **kept_weights(run_dir)}


def weights_of_epochs(run_dir: Path, cfg: object, chosen: str) -> dict[str, Path]:
    """Weights of a run that `--epochs` chooses: `last`, `N`, `A-B` (inclusive) or `A-`.

    Raises:
        UserError: no such words, or none of these were kept.
    """
    del cfg
    if chosen == "last":
        return {"last": run_dir / "last.pt"}
    found = re.fullmatch(r"(\d+)(-?)(\d*)", chosen)
    if not found or (found[3] and not found[2]):
        raise UserError(f"--epochs {chosen}: give last, N, A-B, A-, or a file .pt")
    first = int(found[1])
    last = int(found[3]) if found[3] else (None if found[2] else first)
    kept = {int(label.removeprefix("epoch_")): path for label, path in kept_weights(run_dir).items()}
    wanted = {n: path for n, path in kept.items() if n >= first and (last is None or n <= last)}
    if not wanted:
        has = f"those of {', '.join(map(str, kept))}" if kept else "none"
        raise UserError(
            f"--epochs {chosen}: {run_dir} has kept {has}; choose among them, use --epochs last, or train with "
            "keep.every_epochs=1"
        )
    return {f"epoch_{n}": path for n, path in wanted.items()}


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
    roles = ("branch1", "branch2") if role == "mean" else (role,)
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
    networks=("branch1", "branch2", "mean"),
    default_network=default_network,
    predictor=predictor,
    protocol=protocol,
    method=method_name,
    checkpoints=checkpoints,
    read=flags.read_own,
)

if __name__ == "__main__":
    run_main(main)
