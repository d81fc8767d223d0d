"""Measure trained weights: mIoU by the configured protocol, per class, with pictures of the predictions if asked.

    python eval.py --run runs/voc_1322_r101_mlmt/seed2               best, last, kept weights; fused and not
    python eval.py --config configs/voc_1322_r101.yaml               the run of that configuration
    python eval.py --run runs/... --network segmentation             without the image-level branch
    python eval.py --config configs/... --checkpoint FILE            one file, also one that convert.py made

The code is that of training, so the same weights, list and protocol give the same number to the last digit. A run of
both branches is measured with the scores of its own image-level branch; for a list that these are not of, its teacher
scores the images anew. `--mlmt-file` takes the scores from a file, for any run and checkpoint. Behind torchrun, which
takes `--run` for an option of its own, write `--run-dir`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch

from common.config import load_config
from common.data.spec import DatasetSpec
from common.distributed import Dist
from common.errors import UserError, run_main
from common.measure.inference import Forward
from common.models.placing import placed
from common.run.checkpoint import kept_path, kept_weights, load, load_weights
from projects.s4gan_mlmt.compat import flags
from projects.s4gan_mlmt.config import Config
from projects.s4gan_mlmt.evaluation import Measured, fusion_of, protocol, segmenter_of
from projects.s4gan_mlmt.mlmt.data import branch_spec, build_score_data
from projects.s4gan_mlmt.mlmt.fusion import Fusion
from projects.s4gan_mlmt.mlmt.model import MultiLabelClassifier
from projects.s4gan_mlmt.mlmt.scores import score, score_files
from projects.s4gan_mlmt.mlmt.state import BRANCH, require_branch
from projects.s4gan_mlmt.model import SEGMENTATION
from projects.s4gan_mlmt.state import PROJECT as NAME
from tools import eval_script

FUSED = "fused"
DECIMALS = 6  # of a scores file


def main(argv: Sequence[str]) -> int:
    """Measure what the command line names; 1 if `--check` finds the figure outside the expected band."""
    args = parser().parse_intermixed_args(argv)
    project = PROJECT
    if args.mlmt_file is not None:
        project = dataclasses.replace(
            PROJECT,
            default_network=fused_network,
            further_networks=segmentation_too,
            refine=partial(refine, scores=args.mlmt_file),
        )
    elif args.checkpoint is not None and args.run is None:
        if args.network == FUSED:
            raise UserError(
                f"--network fused --checkpoint {args.checkpoint}: a file has no scores of the image-level branch; add "
                "--mlmt-file FILE, or name its run with --run"
            )
        project = dataclasses.replace(
            PROJECT, default_network=segmentation_network, further_networks=eval_script.no_further
        )
        if args.network is None:
            flags.say(
                [
                    "a file that is no run is measured without the image-level branch, see --mlmt-file and --run"
                ]
            )
    return eval_script.main(project, argv, parser())


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = eval_script.parser(PROJECT)
    result.add_argument(
        "--mlmt-file", type=Path, metavar="FILE", help="scores to fuse with, instead of those of the run"
    )
    return result


def predictor(cfg: Config, saved: Mapping[str, Any], role: str, device: torch.device, where: str) -> Forward:
    """Scores at image size by the segmentation network of a checkpoint, whichever of both figures is asked for.

    Raises:
        UserError: the checkpoint lacks it, or it is of another architecture.
    """
    del role
    weights = eval_script.network_of(saved, SEGMENTATION, where)
    segmenter = segmenter_of(cfg, weights, len(saved["classes"]), device, where)
    return Measured(segmenter, cfg.data.pipeline).eval().predict


def refine(
    cfg: Config,
    spec: DatasetSpec,
    role: str,
    run_dir: Path | None,
    dist: Dist,
    scores: Path | None = None,
) -> Fusion | None:
    """The fusion of the figure `fused`: with a scores file, or with what the run's own image-level branch sees.

    Args:
        cfg: the run's configuration.
        spec: the dataset.
        role: `segmentation` or `fused`.
        run_dir: folder of the run, if there is one.
        dist: this process.
        scores: a file that goes before the run's own.

    Raises:
        UserError: there are no scores, or they are of another list or other classes.
    """
    if role != FUSED:
        return None
    if scores is not None:
        return fusion_of(cfg, scores, spec, cfg.eval.list, dist)
    branch = Path(BRANCH) if run_dir is None else run_dir / BRANCH
    path = score_files(branch, cfg.mlmt.epochs)["ema_raw"]
    if path.is_file() and scored_list(branch) == cfg.eval.list:
        return fusion_of(cfg, path, spec, cfg.eval.list, dist)
    return scored_anew(cfg, spec, branch, dist)


def scored_list(branch: Path) -> str | None:
    """The list that the scores of an image-level branch are of; None if it has not finished."""
    try:
        found = json.loads((branch / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found.get("list") if isinstance(found, dict) else None


def scored_anew(cfg: Config, spec: DatasetSpec, branch: Path, dist: Dist) -> Fusion:
    """The fusion by the teacher of an image-level branch, for the list `eval.list`; a collective.

    Raises:
        UserError: the branch has no weights, or they are of another architecture.
    """
    path = branch / "last.pt"
    if not path.is_file():
        raise UserError(
            f"{branch}: holds no image-level branch of this run; train it, give --mlmt-file FILE, or measure "
            "--network segmentation"
        )
    saved = load(path)
    require_branch(saved, str(path))
    teacher = MultiLabelClassifier(cfg.mlmt.backbone, spec.num_classes)
    load_weights(teacher, saved["networks"]["teacher"], str(path))
    teacher = placed(teacher, dist, synchronize=False, channels_last=cfg.run.channels_last)
    cfg = dataclasses.replace(cfg, mlmt=dataclasses.replace(cfg.mlmt, labels="masks"))
    scored = build_score_data(cfg, branch_spec(cfg), cfg.eval.list, dist)
    rows = score(cfg, teacher, scored, dist).rows
    scored.loader.close()
    ids = [item.id for item in scored.items]
    rounded = np.round(rows.double().numpy(), DECIMALS)
    return Fusion(ids, rounded, cfg.quirks.fusion, cfg.mlmt.keep_threshold, dist.device)


def checkpoints(run_dir: Path, cfg: Config | None = None) -> dict[str, Path]:
    """All weights of a run, those of its main figure first: of `eval.after_steps`, else the best, else the last."""
    found = {**eval_script.best_and_last(run_dir), **kept_weights(run_dir, "step")}
    config = run_dir / "config.yaml"
    if cfg is None and config.is_file():
        cfg = load_config(Config, config)
    if cfg is None or cfg.eval.after_steps is None:
        return found
    first = kept_path(run_dir, "step", cfg.eval.after_steps)
    return {first.stem: first, **found}


def segmentation_network(cfg: Config) -> str:
    """The segmentation network without the image-level branch."""
    del cfg
    return SEGMENTATION


def fused_network(cfg: Config) -> str:
    """The segmentation network with the image-level branch."""
    del cfg
    return FUSED


def segmentation_too(cfg: Config) -> tuple[str, ...]:
    """What is measured beside the fusion."""
    del cfg
    return (SEGMENTATION,)


def reported_network(cfg: Config) -> str:
    """What results are reported for."""
    return FUSED if cfg.method.name == "s4gan_mlmt" else SEGMENTATION


def further_networks(cfg: Config) -> tuple[str, ...]:
    """With both branches the segmentation network is measured without the other, too."""
    return (SEGMENTATION,) if cfg.method.name == "s4gan_mlmt" else ()


def method_name(cfg: Config) -> str:
    """The method, for reports."""
    return cfg.method.name


PROJECT = eval_script.ScriptProject(
    name=NAME,
    folder=Path(__file__).resolve().parent,
    config=Config,
    example="configs/voc_1322_r101.yaml",
    networks=(SEGMENTATION, FUSED),
    default_network=reported_network,
    predictor=predictor,
    protocol=protocol,
    method=method_name,
    checkpoints=checkpoints,
    further_networks=further_networks,
    refine=refine,
)

if __name__ == "__main__":
    run_main(main)
