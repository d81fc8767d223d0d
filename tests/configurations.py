"""What tests of published configurations share: their files, headers and recorded trees, and the lists they name."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from common.config import load_config, plan_batch, to_dict
from common.data.loaders import EpochSampler, match_lengths
from common.data.spec import SPLITS

ROOT = Path(__file__).resolve().parents[1]


def folder(project: str) -> Path:
    return ROOT / "projects" / project


def configs(project: str) -> list[Path]:
    """The configurations of a project without the parts that they have in common."""
    return sorted(p for p in (folder(project) / "configs").glob("*.yaml") if not p.name.startswith("_"))


def trees(project: str) -> Path:
    """Holds the resolved tree of every configuration."""
    return folder(project) / "tests" / "golden" / "configs"


def header(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8").splitlines()[:4]
    facts = [re.fullmatch(r"# (command|hardware|hours|miou): +(\S.*)", line) for line in lines]
    assert all(facts), f"{path.name}: the first four lines must state command, hardware, hours and miou"
    return {fact[1]: fact[2] for fact in facts if fact}


@lru_cache(maxsize=1)
def published_lists() -> list[dict[str, Any]]:
    return yaml.safe_load((SPLITS / "published.yaml").read_text(encoding="utf-8"))["lists"]


def published_counts(name: str) -> dict[str, int]:
    """Images by role of a published split."""
    return {entry["role"]: entry["count"] for entry in published_lists() if entry["name"] == name}


def record(project: str, config_class: type[Any]) -> None:
    """Write the resolved tree of every configuration."""
    trees(project).mkdir(exist_ok=True)
    for old in trees(project).glob("*.json"):
        old.unlink()
    for path in configs(project):
        text = json.dumps(to_dict(load_config(config_class, path)), indent=1) + "\n"
        (trees(project) / f"{path.stem}.json").write_text(text, encoding="utf-8")


def assert_steps(cfg: Any, processes: str, expected: int, total: int) -> None:
    """The steps of an epoch and of a run on published lists are those of the original.

    `processes` is "paper", or "one" for a process that takes the forwards of all one after the other.
    """
    counts = published_counts(f"{cfg.data.dataset}/{cfg.data.split}")
    world = cfg.optim.paper_processes if processes == "paper" else 1
    assert world is not None
    plan = plan_batch(cfg.optim, world)
    semi = cfg.method.mode == "semi"
    length = counts["labeled"]
    if semi:
        labeled, unlabeled = match_lengths(range(length), range(counts["unlabeled"]), cfg.run.seed)
        assert len(labeled) == len(unlabeled) == counts["unlabeled"]
        length = len(unlabeled)
    sampler = EpochSampler(length, plan.per_forward, 0, world, drop_last=semi or plan.accumulate > 1)
    steps = sampler.steps_per_epoch // plan.accumulate
    if processes == "paper":
        assert plan.accumulate == 1
        assert steps == expected
        assert steps * cfg.optim.epochs == total
    else:
        assert plan.per_forward * plan.accumulate == cfg.optim.batch_size
        assert 0 <= expected - steps <= 1
