"""Checkpoints and runs of small networks that need no training, and shapes to measure them on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.config import load_config, save_config
from common.data.dataset_yaml import load_spec
from common.run.checkpoint import describe, save
from projects.cps.config import Config
from projects.cps.model import build_branch

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SMOKE = CONFIGS / "smoke.yaml"


def smoke(*overrides: str, config: Path = SMOKE) -> Config:
    return load_config(Config, config, ["run.device=cpu", "run.channels_last=false", *overrides])


def weights(seed: int, cfg: Config | None = None) -> dict[str, Tensor]:
    """A network whose classes vary over an image."""
    torch.manual_seed(seed)
    network = build_branch(cfg or smoke(), 5)
    torch.nn.init.normal_(network.classifier.weight, std=3.0)
    return network.state_dict()


def contents(cfg: Config, *seeds: int) -> dict[str, Any]:
    """A checkpoint of one network per seed."""
    networks = {f"branch{i}": weights(seed, cfg) for i, seed in enumerate(seeds, start=1)}
    return describe("cps", cfg, load_spec("shapes"), 7, networks)


def few_images(folder: Path, count: int = 6) -> str:
    """Override that evaluates so many images."""
    path = folder / "few.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(item.id for item in load_spec("shapes").read_list("val")[:count]) + "\n")
    return f"eval.list={path}"


def run_directory(run: Path, labels: Sequence[str] = ("last", "epoch_1", "epoch_2")) -> Path:
    """A finished run with different weights under each label."""
    cfg = smoke(few_images(run.parent))
    run.mkdir()
    save_config(cfg, run / "config.yaml")
    for i, label in enumerate(labels):
        folder = run / "weights" if label.startswith("epoch") else run
        folder.mkdir(exist_ok=True)
        save(folder / f"{label}.pt", contents(cfg, 10 * i, 10 * i + 1))
    return run
