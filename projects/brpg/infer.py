"""Predict the evaluation list by the original's command line.

    python infer.py --config configs/voc_classic_366_r101.yaml --model_path best.pt --save_folder viewer

As the original does, each photo is squeezed to the training crop (513x513 or 769x769), and the scores are stretched
to its size: a quick look, not the measured protocol (that is eval.py --save; for any folder see predict.py). Class
ids go to `gray/<id>.png`, colours to `color/<id>.png`. COCO works too; the original misreads its lists.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from tqdm import tqdm

from common.config import load_config
from common.data.datasets import load_spec
from common.distributed import start, stop
from common.errors import run_main
from common.eval_script import picture_writer, read_checkpoint, require_classes
from common.inference import normalize_image, resize
from common.precision import autocast
from projects.brpg.config import Config
from projects.brpg.eval import PROJECT, load_network
from projects.brpg.evaluate import reported_network


@torch.inference_mode()
def main(argv: Sequence[str]) -> int:
    """Predict and write every photo of `data.val`."""
    args = parser().parse_intermixed_args(argv)
    cfg = load_config(Config, args.config, args.overrides)
    saved = read_checkpoint(PROJECT, args.model_path)
    spec = load_spec(cfg.data.dataset, cfg.data.root)
    require_classes(spec, saved, str(args.model_path))
    items = spec.read_list(cfg.data.val, labels=False)
    dist = start(cfg.run.device)
    try:
        network = load_network(cfg, saved, reported_network(cfg), dist.device, str(args.model_path))
        write = picture_writer(args.save_folder, spec)
        for item in tqdm(items[dist.rank :: dist.world_size], unit="photo", disable=None):
            image = spec.load_image(item)
            x = resize(normalize_image(image, cfg.data.mean, cfg.data.std), cfg.data.crop_size)
            with autocast(dist.device, cfg.run.precision):
                small = network(x.to(dist.device)).logits
            scores = resize(small.float(), image.shape[:2])[0]
            write(item.id, scores, scores.argmax(dim=0))
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


if __name__ == "__main__":
    run_main(main)
