"""Checkpoints and runs of small networks that need no training, and generated images to measure them on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.config import load_config, save_config
from common.data.dataset_yaml import load_spec
from common.run.checkpoint import describe, save
from projects.s4gan_mlmt.config import Config
from projects.s4gan_mlmt.mlmt.fusion import write_scores
from projects.s4gan_mlmt.mlmt.model import MultiLabelClassifier
from projects.s4gan_mlmt.model import build_discriminator, build_segmentation

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SMOKE = CONFIGS / "smoke.yaml"
METHODS = ("sup_only", "s4gan", "s4gan_mlmt")
IMAGES = 6


def smoke(*overrides: str, method: str = "s4gan") -> Config:
    changes = ["run.device=cpu", "run.channels_last=false", f"method.name={method}"]
    return load_config(Config, SMOKE, [*changes, *overrides])


def loud(network: nn.Module, x: Tensor, std: float = 3.0, layers: Sequence[nn.Module] = ()) -> nn.Module:
    """A network in evaluation mode whose last layers (or layer) have large weights and prefer no class on `x`."""
    kinds = (nn.Conv2d, nn.Linear)
    last = layers or [module for module in network.eval().modules() if isinstance(module, kinds)][-1:]
    for layer in last:
        nn.init.normal_(layer.weight, std=std)
    with torch.no_grad():
        scores = network(x)
        last[0].bias -= scores.mean(dim=[d for d in range(scores.ndim) if d != 1])
    return network.eval()


def segmentation(seed: int, cfg: Config | None = None, classes: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return loud(build_segmentation(cfg or smoke(), classes), torch.randn(2, 3, 64, 64))


def weights(seed: int, cfg: Config | None = None, classes: int = 5) -> dict[str, Tensor]:
    return segmentation(seed, cfg, classes).state_dict()


def contents(cfg: Config, seed: int, step: int = 7, dataset: str = "shapes") -> dict[str, Any]:
    """A checkpoint of a run."""
    spec = load_spec(dataset)
    networks = {"segmentation": weights(seed, cfg, spec.num_classes)}
    if cfg.method.adversarial:
        networks["discriminator"] = build_discriminator(cfg, spec.num_classes).state_dict()
    return describe("s4gan_mlmt", cfg, spec, step, networks)


def few_images(folder: Path, count: int = IMAGES, name: str = "few") -> str:
    """Override that evaluates so many images."""
    path = folder / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(item.id for item in load_spec("shapes").read_list("val")[:count]) + "\n")
    return f"eval.list={path}"


def random_scores(seed: int = 0, images: int = IMAGES, classes: int = 5) -> np.ndarray[Any, Any]:
    """Probabilities of which the rule keeps about half."""
    return np.random.default_rng(seed).random((images, classes)).round(6) ** 2


def teacher(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return loud(MultiLabelClassifier("resnet_tiny", 5), torch.randn(4, 3, 64, 64), 2.0)


def run_directory(
    run: Path, method: str = "s4gan", labels: Sequence[str] = ("best", "last"), **values: str
) -> Path:
    """A finished run with different weights under each label, seeds 0, 10, 20 ...; of both branches, its scores too."""
    cfg = smoke(
        few_images(run.parent), *(f"{k.replace('__', '.')}={v}" for k, v in values.items()), method=method
    )
    run.mkdir()
    save_config(cfg, run / "config.yaml")
    for i, label in enumerate(labels):
        folder = run / "weights" if label.startswith("step") else run
        save(folder / f"{label}.pt", contents(cfg, 10 * i))
    if method == "s4gan_mlmt":
        write_scores(run / "mlmt" / f"output_ema_raw_{cfg.mlmt.epochs}.txt", random_scores())
        (run / "mlmt" / "result.json").write_text(json.dumps({"list": cfg.eval.list}))
        networks = {"student": teacher(1).state_dict(), "teacher": teacher(2).state_dict()}
        branch = describe("s4gan_mlmt", cfg, load_spec("shapes"), 4, networks) | {"branch": "mlmt"}
        save(run / "mlmt" / "last.pt", branch)
    return run
