"""A project of two networks that need no training, for tests of what all projects share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.config import DataConfig, EvalConfig, ExpectConfig, OptimConfig, RunConfig, build
from common.data.spec import DatasetSpec
from common.measure.evaluation import protocol_of
from common.run.checkpoint import describe, load_weights
from tools.eval_script import ScriptProject, network_of

ROLES = ("branch1", "branch2")


@dataclass(frozen=True, kw_only=True, slots=True)
class FakeModel:
    kernel: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class FakeConfig:
    data: DataConfig
    optim: OptimConfig
    model: FakeModel = field(default_factory=FakeModel)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)
    expect: ExpectConfig = field(default_factory=ExpectConfig)


def fake_config(dataset: Path, **sections: Mapping[str, Any]) -> FakeConfig:
    """A configuration for the dataset of `tests.tiny`; sections add to or replace its values."""
    tree: dict[str, dict[str, Any]] = {
        "data": {"dataset": str(dataset), "split": "few", "crop_size": [32, 32], "workers": 0},
        "optim": {"lr": 0.01, "epochs": 3, "batch_size": 2},
        "run": {"device": "cpu", "channels_last": False},
    }
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | dict(values)
    return build(FakeConfig, tree)


def fake_network(seed: int, classes: int, kernel: int = 1) -> nn.Conv2d:
    """Scores at image size."""
    torch.manual_seed(seed)
    return nn.Conv2d(3, classes, kernel, padding=kernel // 2)


def fake_checkpoint(cfg: FakeConfig, spec: DatasetSpec, seed: int = 0) -> dict[str, Any]:
    """Contents of a checkpoint whose two networks see different things."""
    networks = {
        role: fake_network(2 * seed + i, spec.num_classes, cfg.model.kernel).state_dict()
        for i, role in enumerate(ROLES)
    }
    return describe("fake", cfg, spec, seed, networks)


def predictor(
    cfg: FakeConfig, saved: Mapping[str, Any], role: str, device: torch.device, where: str
) -> Callable[[Tensor], Tensor]:
    networks = []
    for name in ROLES if role == "both" else (role,):
        network = fake_network(0, len(saved["classes"]), cfg.model.kernel)
        load_weights(network, network_of(saved, name, where), where)
        networks.append(network.to(device).eval())
    return lambda x: torch.stack([network(x) for network in networks]).mean(dim=0)


def epochs(run_dir: Path, cfg: FakeConfig | None) -> dict[str, Path]:
    """The weights of every epoch, the newest first."""
    return {path.stem: path for path in sorted(run_dir.glob("epoch-*.pt"), reverse=True)}


def fake_project(folder: Path, **values: Any) -> ScriptProject:
    fields: dict[str, Any] = {
        "name": "fake",
        "folder": folder,
        "config": FakeConfig,
        "example": "configs/some.yaml",
        "networks": (*ROLES, "both"),
        "default_network": lambda cfg: "branch1",
        "predictor": predictor,
        "protocol": lambda cfg, when: protocol_of(cfg.eval, cfg.data, when),
        "method": lambda cfg: "fake method",
    }
    return ScriptProject(**(fields | values))
