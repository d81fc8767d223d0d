"""The `eval.py` of code that descends from U2PL's: its flags, and the networks of a checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from common.mean_teacher.evaluation import protocol, reported_network
from common.measure.inference import Forward
from common.models.deeplab import SegmentationNetwork
from common.run.checkpoint import load_weights
from tools import eval_script
from tools.eval_script import Saved, ScriptProject
from tools.infer_script import LoadNetwork


def network_loader(build_student: Callable[[Any, int], SegmentationNetwork]) -> LoadNetwork:
    """A function that gives one network of a checkpoint; `build_student` (cfg, class count) makes an empty one."""

    def load_network(
        cfg: Any, saved: Saved, role: str, device: torch.device, where: str
    ) -> SegmentationNetwork:
        """One network of a checkpoint in evaluation mode on `device`.

        Raises:
            UserError: the checkpoint has no such network, or it is of another architecture.
        """
        weights = eval_script.network_of(saved, role, where)
        network = build_student(cfg, len(saved["classes"]))
        load_weights(network, weights, where)
        layout = torch.channels_last if cfg.run.channels_last else torch.contiguous_format
        return network.to(device, memory_format=layout).eval()  # type: ignore[call-overload]

    return load_network


def script_project(
    name: str,
    folder: Path,
    config: type,
    example: str,
    load_network: LoadNetwork,
    method: Callable[[Any], str],
) -> ScriptProject:
    """What `eval.py` and `predict.py` of a paper with student and teacher know of it, see `ScriptProject`."""

    def predictor(cfg: Any, saved: Saved, role: str, device: torch.device, where: str) -> Forward:
        return load_network(cfg, saved, role, device, where).predict

    return ScriptProject(
        name=name,
        folder=folder,
        config=config,
        example=example,
        networks=("teacher", "student"),
        default_network=reported_network,
        predictor=predictor,
        protocol=protocol,
        method=method,
    )


def evaluate(project: ScriptProject, argv: Sequence[str]) -> int:
    """Measure what the command line names; 1 if `--check` finds the figure outside the expected band."""
    return eval_script.main(project, argv, parser(project), original_flags)


def parser(project: ScriptProject) -> argparse.ArgumentParser:
    """The command line, with the flags of the original's `eval.py` as second names."""
    result = eval_script.parser(project, {"--checkpoint": ("--model_path",), "--save": ("--save_folder",)})
    result.add_argument("--base_size", type=int, help="long side at scale 1 (as eval.base_size)")
    result.add_argument(
        "--scales", type=float, nargs="+", help="scales whose scores are summed (as eval.scales)"
    )
    result.add_argument("--names_path", help="accepted and not used, as in the original")
    result.add_argument("--crop", action="store_true", help="accepted and not used, as in the original")
    return result


def original_flags(
    args: argparse.Namespace, cfg: Any, no_base_size: Sequence[str] = ("center_crop",)
) -> list[str]:
    """Overrides for the original's `--base_size` and `--scales`.

    Where training measures centre crops (Pascal, COCO), the original's script takes whole images at these scales
    and has no base size.

    Args:
        args: of `parser`.
        cfg: the configuration.
        no_base_size: protocols of the configuration that go without one.
    """
    overrides = []
    if args.scales is not None:
        overrides.append(f"eval.scales={args.scales}")
        if cfg.eval.protocol == "center_crop":
            overrides.append("eval.protocol=whole_image")
    if args.base_size is not None and cfg.eval.protocol not in no_base_size:
        overrides.append(f"eval.base_size={args.base_size}")
    return overrides
