"""The `infer.py` of code that descends from U2PL's: a quick look at the evaluation list.

As the original does, each photo is squeezed to the training crop, and the scores are stretched to its size. That is not
the measured protocol (eval.py --save), nor for any folder (predict.py). Class ids go to `gray/<id>.png`, colours to
`color/<id>.png`; the original wrote lossy colours and stopped at the first ids.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from common.config import load_config
from common.data.dataset_yaml import load_spec
from common.data.transforms import to_normalized
from common.models.deeplab import SegmentationNetwork, upsample
from common.numerics.losses import best_class
from common.numerics.precision import autocast
from tools.eval_script import Legend, Saved, ScriptProject, picture_writer, read_checkpoint, require_classes
from tools.processes import start, stop

LoadNetwork = Callable[[Any, Saved, str, torch.device, str], SegmentationNetwork]


@torch.inference_mode()
def main(project: ScriptProject, load_network: LoadNetwork, argv: Sequence[str]) -> int:
    """Predict and write every photo of `data.val`.

    Args:
        project: What the scripts know of the project.
        load_network: As `project.predictor`, for the network itself: its scores are stretched once, not twice.
        argv: The command line.

    Raises:
        UserError: a mistake in the configuration, or a checkpoint of something else.
    """
    args = parser().parse_intermixed_args(argv)
    cfg = load_config(project.config, args.config, args.overrides)
    saved = read_checkpoint(project, args.model_path)
    spec = load_spec(cfg.data.dataset, cfg.data.root)
    require_classes(spec, saved, str(args.model_path))
    items = spec.read_list(cfg.data.val, labels=False)
    dist = start(cfg.run.device)
    try:
        role = project.default_network(cfg)
        network = load_network(cfg, saved, role, dist.device, str(args.model_path))
        legend = Legend(spec.classes, spec.palette)
        write = picture_writer(args.save_folder, spec, legend)
        for item in tqdm(items[dist.rank :: dist.world_size], unit="photo", disable=None):
            image = spec.load_image(item)
            x = upsample(to_normalized(image, cfg.data.mean, cfg.data.std)[None], cfg.data.crop_size)
            with autocast(dist.device, cfg.run.precision):
                small = network(x.to(dist.device)).logits
            scores = upsample(small.float(), image.shape[:2])[0]
            write(item.id, scores, best_class(scores, dim=0))
        legend.write(args.save_folder, dist)
        if dist.is_main:
            sys.stdout.write(f"{args.save_folder}: {len(items)} photos predicted\n")
    finally:
        stop()
    return 0


def parser() -> argparse.ArgumentParser:
    """The original's command line, with this project's overrides behind it."""
    result = argparse.ArgumentParser(prog="infer.py", description="Predict the evaluation list.")
    result.add_argument("--config", type=Path, default=Path("config.yaml"), help="YAML file (config.yaml)")
    result.add_argument(
        "--model_path", type=Path, default=Path("checkpoints/psp_best.pth"), help="checkpoint of this project"
    )
    result.add_argument(
        "--save_folder", type=Path, default=Path("viewer"), help="folder of the results (viewer)"
    )
    result.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="changes to the configuration"
    )
    return result
